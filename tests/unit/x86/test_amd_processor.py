"""What makes a processor AMD's: CPUID leaves of its own, its MSRs, and the calls between privilege levels."""

from __future__ import annotations

import pytest
from event_fixtures import long_machine, protected_machine

from vtx.x86.cpuid import ZERO, Dynamic, cpuid
from vtx.x86.msrs import MsrFile
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.profile import build_profile, load_profile, profile_document
from vtx.x86.state import Efer, Gpr, Segment
from vtx.x86.syscall import SyscallMsrs, SysenterMsrs, sysexit, sysret
from vtx.x86.toml_section import ProfileError

ZEN = load_profile("zen-server")
MSRS = SyscallMsrs(star=0x0023_0010_1234_5678)


# Signature, caches and address widths as dumps of the silicon have them; the rest follows the profile.
@pytest.mark.parametrize(
    ("leaf", "register", "value"),
    [
        (0, 1, 0x6874_7541),  # "Auth"
        (0, 3, 0x6974_6E65),  # "enti"
        (0, 2, 0x444D_4163),  # "cAMD"
        (0x8000_0000, 1, 0x6874_7541),
        (1, 0, 0x0080_0F12),
        (0x8000_0005, 2, 0x2008_0140),
        (0x8000_0005, 3, 0x4004_0140),
        (0x8000_0006, 2, 0x0200_6140),
        (0x8000_0008, 0, 0x3030),
        (0x8000_000A, 0, 1),
        (0x8000_000A, 1, 0x8000),
        (0x8000_000A, 3, 0x0001_B4FF),
        (2, 0, 0),
        (4, 0, 0),
    ],
)
def test_amd_leaf(leaf: int, register: int, value: int) -> None:
    assert cpuid(ZEN, leaf, 0, Dynamic())[register] == value


@pytest.mark.parametrize(("profile", "edx"), [("zen-server", 0), ("everything-amd", 0x1_0007)])
def test_last_register_of_rdpru_and_count_of_invlpgb(profile: str, edx: int) -> None:
    assert cpuid(load_profile(profile), 0x8000_0008, 0, Dynamic())[3] == edx


# Function, register and bit of what later Zen processors have.
@pytest.mark.parametrize(
    ("leaf", "register", "bit", "zen"),
    [
        (0x8000_0001, 2, 29, True),  # MONITORX
        (0x8000_0001, 3, 25, True),  # FFXSR
        (0x8000_0008, 1, 3, False),  # INVLPGB
        (0x8000_0008, 1, 8, False),  # MCOMMIT
        (0x8000_0008, 1, 21, False),  # INVLPGB of nested pages
        (0x8000_000A, 3, 24, False),  # TlbiCtl
        (0x8000_000A, 3, 28, False),  # guest VMCB address check
    ],
)
def test_feature_bit(leaf: int, register: int, bit: int, zen: bool) -> None:
    for profile, expected in ((ZEN, zen), (load_profile("everything-amd"), True), (load_profile("everything"), False)):
        assert bool(cpuid(profile, leaf, 0, Dynamic())[register] >> bit & 1) == expected


def test_extended_features_repeat_those_of_function_1() -> None:
    basic, extended = cpuid(ZEN, 1, 0, Dynamic())[3], cpuid(ZEN, 0x8000_0001, 0, Dynamic())[3]
    assert basic & 0x0183_F3FF == extended & 0x0183_F3FF


def test_syscall_is_reported_in_every_mode() -> None:
    assert cpuid(ZEN, 0x8000_0001, 0, Dynamic(in_64_bit_mode=False))[3] & 1 << 11


@pytest.mark.parametrize("leaf", [0x20, 0x4000_0000, 0x8000_0020, 0xFFFF_FFFF])
def test_leaf_out_of_range_is_zero(leaf: int) -> None:
    assert cpuid(ZEN, leaf, 0, Dynamic()) == ZERO


@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_cores(cpus: int) -> None:
    dynamic = Dynamic(cpus=cpus)
    assert cpuid(ZEN, 0x8000_0008, 0, dynamic)[2] & 0xFF == cpus - 1
    assert bool(cpuid(ZEN, 0x8000_0001, 0, dynamic)[2] & 2) == (cpus > 1)


@pytest.mark.parametrize("index", [0x17, 0x3A, 0x198, 0x1A0, 0x480, 0xC000_0105, 0xC001_0119])
def test_msr_that_amd_has_not(index: int) -> None:
    assert MsrFile(ZEN).read(index) is None


@pytest.mark.parametrize(
    ("index", "reset"), [(0xC000_0104, 1 << 32), (0xC001_0114, 0), (0xC001_0117, 0), (0x8B, 0x0800_1250)]
)
def test_msr_of_amd(index: int, reset: int) -> None:
    assert MsrFile(ZEN).read(index) == reset


@pytest.mark.parametrize(
    ("index", "value", "accepted"),
    [
        (0xC000_0080, 0x1000, True),  # EFER.SVME
        (0xC000_0080, 0x2000, False),  # EFER.LMSLE
        (0xC000_0080, 0x4000, True),  # EFER.FFXSR
        (0xC000_0080, 0x2_0000, False),  # EFER.MCOMMIT
        (0xC001_0117, 0x12_3000, True),
        (0xC001_0117, 0x12_3800, False),
        (0xC001_0117, 1 << 48, False),
        (0xC000_0104, 0xFF_FFFF_FFFF, True),
        (0xC000_0104, 1 << 40, False),
        (0xC001_0114, 0x20, False),
        (0x176, 0x8000_0000_0000, True),  # SYSENTER_EIP: not checked here
    ],
)
def test_writing_an_msr(index: int, value: int, accepted: bool) -> None:
    assert MsrFile(ZEN).write(index, value) is accepted


def test_efer_mcommit() -> None:
    assert MsrFile(load_profile("everything-amd")).write(0xC000_0080, 0x2_0000)


def test_vm_cr_lock() -> None:
    msrs = MsrFile(ZEN)
    assert msrs.write(0xC001_0114, 0x18)
    assert not msrs.write(0xC001_0114, 0x08)
    assert not msrs.write(0xC001_0114, 0x10)
    assert msrs.write(0xC001_0114, 0x1A)


def test_sysret_leaves_the_attributes_of_ss_alone() -> None:
    state, _ = long_machine()
    state.segments[2] = Segment(0x18, 0x1234, 0xFFFF, 0x93)
    state.gpr[Gpr.RCX], state.gpr[Gpr.R11] = 0x8000_0000_0000, 0x202
    sysret(state, MSRS, 64, amd=True)  # not canonical: the fetch faults, not the instruction
    assert (state.rip, state.cpl) == (0x8000_0000_0000, 3)
    assert state.ss == Segment(0x2B, 0x1234, 0xFFFF, 0xF3)
    assert state.cs == Segment(0x33, 0, 0xFFFF_FFFF, 0xA0FB)


def test_sysret_in_legacy_mode() -> None:
    state, _ = protected_machine()
    state.efer = Efer.SCE.value
    state.gpr[Gpr.RCX] = 0x40_0000
    sysret(state, MSRS, 32, amd=True)
    assert (state.rip, state.rflags & 0x200, state.cs) == (0x40_0000, 0x200, Segment(0x23, 0, 0xFFFF_FFFF, 0xC0FB))


def test_sysexit_is_invalid_in_long_mode() -> None:
    state, _ = long_machine()
    with pytest.raises(InstructionAborted) as caught:
        sysexit(state, SysenterMsrs(cs=0x13), 64, amd=True)
    assert caught.value.cause == Fault(Vector.UD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("svm"), "an [svm] table if and only if"),
        (lambda d: d["identity"].update(vendor="GenuineIntel"), "no SVM with the vendor GenuineIntel"),
        (lambda d: d["svm"].update(asids=1), "svm.asids: expected an integer"),
        (lambda d: d["svm"].update(extra=1), "svm.extra: expected no such key"),
        (lambda d: d["cpuid"].update(invlpgb_count_max=7), "cpuid.invlpgb_count_max: expected no such key"),
        (lambda d: d["cpuid"]["features"].append("INVLPGB"), "cpuid.invlpgb_count_max: expected"),
    ],
)
def test_mistakes_in_a_profile(change, message) -> None:  # type: ignore[no-untyped-def]
    document = profile_document("zen-server")
    change(document)
    with pytest.raises(ProfileError, match=message.replace("[", r"\[")):
        build_profile("zen.toml", document)
