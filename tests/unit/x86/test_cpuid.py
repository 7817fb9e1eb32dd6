"""CPUID against values typed from data sheets and dumps of real processors, and its state-dependent bits."""

import struct

import pytest

from vtx.x86.cpuid import Dynamic, cpuid, reserved_cr0_bits, reserved_cr4_bits
from vtx.x86.cpuid_features import FEATURES
from vtx.x86.profile import load_profile
from vtx.x86.state import CpuState, Cr4

SKYLAKE = load_profile("skylake-server")
NEHALEM = load_profile("nehalem-server")
EVERYTHING, EVERYTHING_AMD = load_profile("everything"), load_profile("everything-amd")
POWER_UP = Dynamic()


def leaf(number, subleaf=0, dynamic=POWER_UP, profile=SKYLAKE):
    return cpuid(profile, number, subleaf, dynamic)


@pytest.mark.parametrize(
    ("profile", "number", "subleaf", "register", "value"),
    [
        (SKYLAKE, 0, 0, 1, 0x756E_6547),  # "Genu"
        (SKYLAKE, 0, 0, 3, 0x4965_6E69),  # "ineI"
        (SKYLAKE, 0, 0, 2, 0x6C65_746E),  # "ntel"
        (SKYLAKE, 1, 0, 0, 0x0005_0654),
        (NEHALEM, 1, 0, 0, 0x0001_06A5),
        (SKYLAKE, 1, 0, 2, 0x47FA_62AB),
        (SKYLAKE, 1, 0, 3, 0x2F8B_FBFF),
        (SKYLAKE, 2, 0, 0, 0x7603_6301),
        (SKYLAKE, 4, 0, 1, 0x01C0_003F),  # 32 KiB: 8 ways, 64-byte lines ...
        (SKYLAKE, 4, 0, 2, 0x0000_003F),  # ... 64 sets
        (SKYLAKE, 4, 2, 1, 0x03C0_003F),
        (SKYLAKE, 4, 2, 2, 0x0000_03FF),
        (SKYLAKE, 4, 3, 1, 0x0280_003F),
        (SKYLAKE, 4, 3, 2, 0x0000_8FFF),
        (SKYLAKE, 6, 0, 0, 0x0000_0004),
        (SKYLAKE, 7, 0, 1, 0x0194_6683),
        (SKYLAKE, 7, 0, 2, 0x0000_000C),
        (SKYLAKE, 0xD, 0, 0, 0x21B),
        (SKYLAKE, 0xD, 0, 1, 576),
        (SKYLAKE, 0xD, 0, 2, 2696),
        (SKYLAKE, 0x8000_0000, 0, 0, 0x8000_0008),
        (SKYLAKE, 0x8000_0001, 0, 2, 0x0000_0101),
        (SKYLAKE, 0x8000_0001, 0, 3, 0x2C10_0800),
        (NEHALEM, 0x8000_0006, 0, 2, 0x0100_6040),
        (SKYLAKE, 0x8000_0007, 0, 3, 0x0000_0100),
        (SKYLAKE, 0x8000_0008, 0, 0, 0x0000_302E),
        (NEHALEM, 0x8000_0008, 0, 0, 0x0000_3028),
    ],
)
def test_well_known_value(profile, number, subleaf, register, value):
    assert leaf(number, subleaf, profile=profile)[register] == value


def test_brand_string_is_48_bytes_with_a_terminating_zero():
    data = b"".join(struct.pack("<4I", *leaf(number)) for number in (0x8000_0002, 0x8000_0003, 0x8000_0004))
    assert data.rstrip(b"\0").decode() == SKYLAKE.brand
    assert len(data) == 48 and data[-1] == 0


@pytest.mark.parametrize("number", [0x3, 0x8, 0x9, 0xA, 0xC, 0xE, 0xF, 0x10, 0x12, 0x14, 0x8000_0005])
def test_leaf_in_range_without_content_is_zero(number):
    assert leaf(number) == (0, 0, 0, 0)


@pytest.mark.parametrize("number", [0x17, 0x4000_0000, 0x7FFF_FFFF, 0x8000_0009, 0x8FFF_FFFF, 0xFFFF_FFFF])
@pytest.mark.parametrize("subleaf", [0, 1, 0xFFFF_FFFF])
def test_leaf_out_of_range_answers_as_the_highest_basic_leaf(number, subleaf):
    assert leaf(number, subleaf) == leaf(0x16, subleaf) != (0, 0, 0, 0)
    assert leaf(number, subleaf, profile=NEHALEM) == leaf(0xB, subleaf, profile=NEHALEM)


# What the engine cannot execute, or this model does not have, must never be announced.
@pytest.mark.parametrize("profile", [SKYLAKE, NEHALEM])
@pytest.mark.parametrize(
    ("number", "register", "bits"),
    [
        (1, 2, 1 << 12 | 1 << 28 | 1 << 29 | 1 << 31 | 1 << 6),  # FMA, AVX, F16C, hypervisor, SMX
        (1, 3, 1 << 21 | 1 << 30),  # debug store
        (7, 1, 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 11 | 1 << 16 | 1 << 25 | 1 << 29),
        (7, 2, 1 << 4 | 1 << 5 | 1 << 7 | 1 << 22),  # OSPKE, WAITPKG, CET_SS, RDPID
        (7, 3, 1 << 20 | 1 << 26 | 1 << 29),
        (0xD, 0, ~0x21B),  # x87, SSE, MPX, PKRU
        (0xA, 0, ~0),
    ],
)
def test_what_is_not_modelled_is_not_announced(profile, number, register, bits):
    answer = leaf(number, profile=profile) if number <= profile.highest_basic_leaf else (0, 0, 0, 0)
    assert not answer[register] & bits


def test_osxsave_follows_cr4():
    assert not leaf(1)[2] >> 27 & 1
    assert leaf(1, dynamic=Dynamic(cr4=Cr4.OSXSAVE))[2] >> 27 & 1


def test_ospke_follows_cr4():
    assert leaf(7, dynamic=Dynamic(cr4=Cr4.PKE))[2] >> 4 & 1


def test_apic_flag_follows_the_global_enable_bit():
    assert leaf(1)[3] >> 9 & 1
    assert not leaf(1, dynamic=Dynamic(apic_enabled=False))[3] >> 9 & 1


def test_monitor_flag_follows_misc_enable():
    assert not leaf(1, dynamic=Dynamic(misc_enable=0))[2] >> 3 & 1


def test_limit_cpuid_cuts_the_basic_leaves():
    limited = Dynamic(misc_enable=1 << 22 | 1 << 18)
    assert leaf(0, dynamic=limited)[0] == 2
    assert leaf(7, dynamic=limited) == leaf(2)
    assert leaf(0x8000_0001, dynamic=limited) == leaf(0x8000_0001)


def test_syscall_is_reported_in_64_bit_mode_alone():
    assert leaf(0x8000_0001)[3] >> 11 & 1
    assert not leaf(0x8000_0001, dynamic=Dynamic(in_64_bit_mode=False))[3] >> 11 & 1


def test_dynamic_of_a_processor_in_reset():
    dynamic = Dynamic.of(CpuState(), apic_id=3, cpus=4, apic_enabled=True, misc_enable=1 << 18)
    assert dynamic == Dynamic(apic_id=3, cpus=4, in_64_bit_mode=False)


@pytest.mark.parametrize(
    ("cpus", "bits", "addressable"), [(1, 0, 1), (2, 1, 2), (3, 2, 4), (4, 2, 4), (5, 3, 8), (64, 6, 64)]
)
def test_topology_leaves_agree(cpus, bits, addressable):
    dynamic = Dynamic(apic_id=cpus - 1, cpus=cpus)
    signature = leaf(1, dynamic=dynamic)
    assert signature[1] >> 24 == cpus - 1
    assert signature[1] >> 16 & 0xFF == addressable
    assert signature[3] >> 28 & 1 == (cpus > 1)
    assert leaf(4, 0, dynamic)[0] >> 26 == addressable - 1
    assert leaf(4, 0, dynamic)[0] >> 14 & 0xFFF == 0, "first-level caches are private"
    assert leaf(4, 3, dynamic)[0] >> 14 & 0xFFF == addressable - 1, "the last level is shared"
    assert leaf(0xB, 0, dynamic) == (0, 1, 1 << 8, cpus - 1)
    assert leaf(0xB, 1, dynamic) == (bits, cpus, 2 << 8 | 1, cpus - 1)
    assert leaf(0xB, 2, dynamic) == (0, 0, 2, cpus - 1)
    assert leaf(0xB, 0x1_02, dynamic)[2] == 2, "only the low byte of the subleaf comes back"


def test_cache_leaf_types_and_levels_and_end():
    listed = [(leaf(4, n)[0] & 0x1F, leaf(4, n)[0] >> 5 & 7) for n in range(5)]
    assert listed == [(1, 1), (2, 1), (3, 2), (3, 3), (0, 0)]


def test_extended_state_subleaves():
    """Size and offset, as a dump has them; of components absent, or in the legacy region, the sub-leaves are zero."""
    assert [leaf(0xD, n) for n in (3, 4, 9)] == [(64, 960, 0, 0), (64, 1024, 0, 0), (8, 2688, 0, 0)]
    assert all(leaf(0xD, n) == (0, 0, 0, 0) for n in range(1, 64) if n not in (3, 4, 9))


@pytest.mark.parametrize(
    ("profile", "subleaf", "xcr0", "xss", "expected"),
    [
        # EAX and EDX are what XCR0 can have, EBX is for what it has, ECX for all it can have.
        (SKYLAKE, 0, 3, 0, (0x21B, 576, 2696, 0)),
        (SKYLAKE, 0, 0x1B, 0, (0x21B, 1088, 2696, 0)),
        (SKYLAKE, 0, 0x203, 0, (0x21B, 2696, 2696, 0)),
        (EVERYTHING, 0, 0x201, 0, (0x21B, 2696, 2696, 0)),
        # XSAVEOPT, XSAVEC, XGETBV with ECX 1, XSAVES; the size of the compacted format; what IA32_XSS can have
        (EVERYTHING, 1, 3, 0, (0xF, 576, 0x7800, 0)),
        (EVERYTHING, 1, 0x203, 0, (0xF, 584, 0x7800, 0)),
        (EVERYTHING, 1, 0x1B, 0, (0xF, 704, 0x7800, 0)),
        (EVERYTHING, 1, 0x21B, 0, (0xF, 712, 0x7800, 0)),
        (EVERYTHING, 1, 3, 0x2000, (0xF, 584, 0x7800, 0)),
        (EVERYTHING, 1, 0x203, 0x2000, (0xF, 592, 0x7800, 0)),
        (EVERYTHING, 1, 3, 0x1800, (0xF, 616, 0x7800, 0)),  # 16 bytes of user state, 24 of supervisor state
        (EVERYTHING, 1, 0x203, 0x3800, (0xF, 632, 0x7800, 0)),
        (EVERYTHING, 11, 3, 0, (16, 0, 1, 0)),
        (EVERYTHING, 12, 3, 0, (24, 0, 1, 0)),
        (EVERYTHING, 9, 3, 0, (8, 2688, 0, 0)),
        (EVERYTHING, 13, 3, 0, (8, 0, 1, 0)),
        (EVERYTHING, 1, 3, 0x4000, (0xF, 624, 0x7800, 0)),
        (EVERYTHING, 14, 3, 0, (48, 0, 1, 0)),
        # A dump of a processor of the third Zen generation has PKRU here.
        (EVERYTHING_AMD, 0, 0x203, 0, (0x203, 0x988, 0x988, 0)),
        (EVERYTHING_AMD, 1, 0x203, 0, (0xF, 584, 0, 0)),
        (EVERYTHING_AMD, 9, 3, 0, (8, 0x980, 0, 0)),
        (EVERYTHING_AMD, 13, 3, 0, (0, 0, 0, 0)),
    ],
)
def test_extended_state_sizes(profile, subleaf, xcr0, xss, expected):
    assert leaf(0xD, subleaf, Dynamic(xcr0=xcr0, xss=xss), profile) == expected


def test_leaf_7_has_one_subleaf():
    assert leaf(7)[0] == 0
    assert leaf(7, 1) == (0, 0, 0, 0)


def test_frequencies_agree():
    denominator, numerator, crystal, _ = leaf(0x15)
    assert crystal * numerator // denominator == SKYLAKE.tsc_frequency
    assert leaf(0x16)[0] * 1_000_000 == SKYLAKE.tsc_frequency


def test_no_two_features_share_a_bit():
    places = [(f.leaf, f.subleaf, f.register, f.bit) for f in FEATURES.values()]
    assert len(set(places)) == len(places)


# CR4 bits by position: VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT UMIP . VMXE . . FSGSBASE PCIDE OSXSAVE .
# SMEP SMAP PKE.
def test_reserved_cr4_bits():
    assert reserved_cr4_bits(SKYLAKE) == 0xFFFF_FFFF_FFFF_FFFF ^ 0x0077_2FFF
    assert reserved_cr4_bits(NEHALEM) == 0xFFFF_FFFF_FFFF_FFFF ^ 0x0000_27FF


def test_reserved_cr0_bits():
    assert reserved_cr0_bits(SKYLAKE) == 0xFFFF_FFFF_0000_0000
