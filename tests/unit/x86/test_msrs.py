"""The MSR file: what exists, what each MSR accepts, and what bound MSRs see."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtx.x86.cpuid import Dynamic, cpuid
from vtx.x86.msrs import MsrFile, bind_clock, bind_effective_frequency, bind_registers, tsc_of
from vtx.x86.profile import build_profile, load_profile, profile_document
from vtx.x86.state import CpuState, SegmentRegister

SKYLAKE = load_profile("skylake-server")
NEHALEM = load_profile("nehalem-server")
M64 = 0xFFFF_FFFF_FFFF_FFFF
TOP = 0xFFFF_8000_0000_0000  # lowest address of the upper canonical half
HOLE = 0x0000_8000_0000_0000  # first address beyond the lower one


@pytest.fixture
def msrs():
    return MsrFile(SKYLAKE)


# Index, value at power-up, values that WRMSR takes, values that it refuses with #GP(0).
TABLE = {
    "IA32_APIC_BASE": (0x1B, 0xFEE0_0900, [0xFEE0_0800, 0xFEE0_0D00, 0x3FFF_FFFF_F800], [1 << 46 | 0x800, 0xFEE0_0901]),
    "IA32_FEATURE_CONTROL": (0x3A, 0, [0, 4, 5], [2, 8, 1 << 20]),
    "IA32_TSC_ADJUST": (0x3B, 0, [0, M64], []),
    "IA32_MTRRCAP": (0xFE, 0x50A, [], [0, 0x50A]),
    "IA32_SYSENTER_CS": (0x174, 0, [0, 8, 0xFFFF_FFFF], []),
    "IA32_SYSENTER_ESP": (0x175, 0, [0, TOP, HOLE - 1], [HOLE, TOP - 1]),
    "IA32_SYSENTER_EIP": (0x176, 0, [0, TOP], [HOLE]),
    "IA32_MCG_CAP": (0x179, 4, [], [4]),
    "IA32_MCG_STATUS": (0x17A, 0, [0, 4, 7], [8]),
    "IA32_MISC_ENABLE": (0x1A0, 0x4_1801, [0x4_1801, 0x1801, 0x40_1801, 0x4_1800], [2, 1 << 13, 1 << 38]),
    "IA32_MISC_ENABLE-all": (0x1A0, 0x4_1801, [0x4_00C5_1809], [0x4_00C5_180B]),
    "IA32_DEBUGCTL": (0x1D9, 0, [0, 1, 2, 3], [4, 0x40, 1 << 15, M64]),
    "MSR_LASTBRANCHFROMIP": (0x1DB, 0, [], [0]),
    "IA32_PAT": (0x277, 0x0007_0406_0007_0406, [0, 0x0607_0504_0100_0106], [2, 3, 8, 0x0300_0000_0000_0000, M64]),
    "IA32_MTRR_PHYSBASE9": (0x212, 0, [0, 0x3FFF_FFFF_F006], [2, 7, 0x106, 1 << 46]),
    "IA32_MTRR_PHYSMASK9": (0x213, 0, [0, 0x3FFF_FFFF_F800], [1, 0x400, 1 << 46]),
    "IA32_MTRR_FIX64K": (0x250, 0, [0, 0x0606_0505_0404_0100], [2, 7 << 56]),
    "IA32_MTRR_FIX4K_F8000": (0x26F, 0, [0, 0x0606_0606_0606_0606], [3]),
    "IA32_MTRR_DEF_TYPE": (0x2FF, 0, [0, 0xC06, 0x800], [2, 0x100, 0x1000]),
    "IA32_PERF_CTL": (0x199, 0, [0, 0x1_0000_FFFF], [1 << 16]),
    "IA32_MC3_CTL": (0x40C, 0, [0, M64], [1, M64 - 1]),
    "IA32_MC3_STATUS": (0x40D, 0, [0], [1, M64]),
    "IA32_MC3_ADDR": (0x40E, 0, [0, M64], []),
    "IA32_MC3_MISC": (0x40F, 0, [0, M64], []),
    "IA32_VMX_BASIC": (0x480, 0x00D8_1000_5654_5801, [], [0, 0x00D8_1000_5654_5801]),
    "IA32_TSC_DEADLINE": (0x6E0, 0, [0, M64], []),
    # Enable, BNDPRESERVE and the base of the bound directory, which must be canonical
    "IA32_BNDCFGS": (0xD90, 0, [0, 1, 2, TOP | 3, HOLE - 0x1000], [4, 0x800, 0xFFC, HOLE, TOP - 0x1000]),
    "IA32_EFER": (0xC000_0080, 0, [0, 1, 0x100, 0x800, 0x901], [2, 8, 0x1000, 0x4000, 1 << 63]),
    "IA32_STAR": (0xC000_0081, 0, [0, M64], []),
    "IA32_LSTAR": (0xC000_0082, 0, [0, TOP], [HOLE, TOP - 1]),
    "IA32_CSTAR": (0xC000_0083, 0, [0, TOP], [HOLE]),
    "IA32_FMASK": (0xC000_0084, 0, [0, 0xFFFF_FFFF], [1 << 32]),
    "IA32_FS_BASE": (0xC000_0100, 0, [0, TOP], [HOLE]),
    "IA32_GS_BASE": (0xC000_0101, 0, [0, TOP], [HOLE]),
    "IA32_KERNEL_GS_BASE": (0xC000_0102, 0, [0, TOP], [HOLE]),
    "IA32_TSC_AUX": (0xC000_0103, 0, [0, 0xFFFF_FFFF], [1 << 32]),
}
ROWS = [pytest.param(*row, id=name) for name, row in TABLE.items()]


@pytest.mark.parametrize(("index", "reset", "accepted", "refused"), ROWS)
def test_table(index, reset, accepted, refused):
    for value in accepted:
        msrs = MsrFile(SKYLAKE)
        assert msrs.write(index, value), hex(value)
        assert msrs.read(index) == value
    for value in refused:
        msrs = MsrFile(SKYLAKE)
        assert msrs.read(index) == reset
        assert not msrs.write(index, value), hex(value)
        assert msrs.read(index) == reset
    assert MsrFile(SKYLAKE).read(index) == reset


ABSENT = [
    *(0x48, 0x49, 0x9B, 0xC1, 0xE7, 0x10A, 0x186, 0x17B, 0x214, 0x345, 0x38D, 0x38F, 0x390, 0x410, 0x492),
    *(0x6A2, 0x800, 0x802, 0x83F, 0x8FF, 0xDA0, 0x4000_0000, 0xC000_0104, 0xC001_0117, 0xFFFF_FFFF),
]


@pytest.mark.parametrize("index", ABSENT)
def test_absent_msr_faults(msrs, index):
    assert msrs.read(index) is None
    assert not msrs.write(index, 0)


def test_bounds_configuration_is_that_of_mpx():
    assert MsrFile(NEHALEM).read(0xD90) is None
    assert not MsrFile(NEHALEM).write(0xD90, 0)


def test_upper_half_of_sysenter_cs_is_not_stored(msrs):
    assert msrs.write(0x174, 0x1234_5678_0000_0008)
    assert msrs.read(0x174) == 8


def test_microcode_revision_survives_the_write_that_asks_for_it(msrs):
    assert msrs.write(0x8B, 0)
    assert msrs.read(0x8B) == SKYLAKE.microcode_revision << 32


@pytest.mark.parametrize(("index", "feature"), [(0x49, "SPEC_CTRL"), (0x10B, "L1D_FLUSH")])
def test_commands_can_only_be_written(index, feature):
    document = profile_document("skylake-server")
    document["cpuid"]["features"].append(feature)
    msrs = MsrFile(build_profile("test", document))
    assert msrs.write(index, 1)
    assert not msrs.write(index, 2)
    assert msrs.read(index) is None


@pytest.mark.parametrize(("bit", "feature"), [(3, "TM"), (16, "EIST"), (18, "MONITOR"), (23, "xTPR"), (34, "NX")])
def test_bits_of_misc_enable_come_with_features(bit, feature):
    document = profile_document("skylake-server")
    document["cpuid"]["features"].remove(feature)
    msrs = MsrFile(build_profile("test", document))
    assert not msrs.write(0x1A0, 1 << bit)


def test_xd_disable__hides_nx_and_reserves_efer_nxe(msrs):
    state = CpuState()
    bind_registers(msrs, lambda: state, lambda: None)
    xd_disable, nxe = 1 << 34, 1 << 11
    assert msrs.write(0x1A0, xd_disable)
    assert not msrs.write(0xC000_0080, nxe)
    assert msrs.write(0xC000_0080, 1)
    assert not cpuid(SKYLAKE, 0x8000_0001, 0, Dynamic(misc_enable=xd_disable))[3] & 1 << 20
    assert msrs.write(0x1A0, 0)
    assert msrs.write(0xC000_0080, nxe)
    assert cpuid(SKYLAKE, 0x8000_0001, 0, Dynamic(misc_enable=0))[3] & 1 << 20


def test_performance_monitoring__is_available_and_can_be_frozen():
    msrs = MsrFile(load_profile("everything"))
    assert msrs.read(0x1A0) == 0x4_1881
    assert msrs.write(0x1D9, 0x1803)
    assert not msrs.write(0x1D9, 0x4000)


def test_smm_base_of_amd_processors__is_the_processors():
    msrs, state = MsrFile(load_profile("zen-server")), CpuState()
    bind_registers(msrs, lambda: state, lambda: None)
    assert msrs.read(0xC001_0111) == 0x3_0000
    assert msrs.write(0xC001_0111, 0x5_0000)
    assert state.smbase == 0x5_0000


def test_read_only_bits_of_misc_enable_stay(msrs):
    assert msrs.write(0x1A0, 0)
    assert msrs.read(0x1A0) == 0x1800


def test_feature_control_locks(msrs):
    assert msrs.write(0x3A, 4)
    assert msrs.write(0x3A, 5)
    for value in (5, 4, 0):
        assert not msrs.write(0x3A, value)
    assert msrs.read(0x3A) == 5


X2, XAPIC, OFF = 0xFEE0_0D00, 0xFEE0_0900, 0xFEE0_0100


@pytest.mark.parametrize(
    ("path", "last_accepted"),
    [
        ([XAPIC, X2, X2, OFF, XAPIC], True),
        ([OFF, OFF, XAPIC], True),
        ([OFF, X2], False),
        ([X2, XAPIC], False),
        ([0xFEE0_0500], False),
    ],
)
def test_apic_mode_transitions(msrs, path, last_accepted):
    assert [msrs.write(0x1B, value) for value in path] == [True] * (len(path) - 1) + [last_accepted]


def test_bootstrap_flag():
    assert MsrFile(SKYLAKE, bootstrap=True).read(0x1B) == 0xFEE0_0900
    assert MsrFile(SKYLAKE, bootstrap=False).read(0x1B) == 0xFEE0_0800


@pytest.mark.parametrize(
    ("index", "value"), [(0x1B, 0xFEE0_0C00), (0x3B, None), (0x6E0, None), (0x48D, 0x7F_0000_0016)]
)
def test_older_processor_lacks_what_cpuid_lacks(index, value):
    msrs = MsrFile(NEHALEM)
    if value is None:
        assert msrs.read(index) is None
    else:
        assert not msrs.write(index, value)
        assert msrs.read(index) is not None


class TestBinding:
    def test_x2apic_registers_answer_in_x2apic_mode_alone(self, msrs):
        written = {}

        def write(index, value):
            written[index] = value
            return index != 0x803

        msrs.bind(range(0x800, 0x900), lambda index: None if index == 0x80B else index, write)
        assert msrs.read(0x802) is None
        assert not msrs.write(0x808, 1)
        assert not written
        assert msrs.write(0x1B, X2)
        assert msrs.read(0x802) == 0x802
        assert msrs.read(0x80B) is None
        assert msrs.write(0x808, 1)
        assert not msrs.write(0x803, 1)
        assert written[0x808] == 1

    def test_writer_sees_checked_values_only(self, msrs):
        seen = []
        msrs.bind(0x277, lambda index: 0, lambda index, value: seen.append(value) is None)
        assert not msrs.write(0x277, 2)
        assert msrs.write(0x277, 6)
        assert seen == [6]

    def test_binding_does_not_create_an_msr(self, msrs):
        msrs.bind(0xC1, lambda index: 1, lambda index, value: True)
        assert msrs.read(0xC1) is None
        assert not msrs.write(0xC1, 1)


class TestRegisters:
    @pytest.fixture
    def state(self):
        return CpuState()

    @pytest.fixture
    def changes(self):
        return []

    @pytest.fixture
    def bound(self, msrs, state, changes):
        bind_registers(msrs, lambda: state, lambda: changes.append(1))
        return msrs

    def test_efer_lma_is_the_processors(self, bound, state, changes):
        state.efer = 0x500
        assert bound.write(0xC000_0080, 0x101)
        assert state.efer == 0x501
        assert bound.read(0xC000_0080) == 0x501
        state.efer = 0x100
        assert bound.write(0xC000_0080, 0xD00)
        assert state.efer == 0x900
        assert changes == [1, 1]

    def test_efer_lme_is_frozen_while_paging(self, bound, state, changes):
        state.cr0 |= 1 << 31
        assert not bound.write(0xC000_0080, 0x100)
        assert state.efer == 0
        assert bound.write(0xC000_0080, 0x800)
        state.efer = 0xD00
        assert not bound.write(0xC000_0080, 0x800)
        assert bound.write(0xC000_0080, 0x101)
        assert state.efer == 0x501
        assert changes == [1, 1]

    @pytest.mark.parametrize(
        ("index", "register"), [(0xC000_0100, SegmentRegister.FS), (0xC000_0101, SegmentRegister.GS)]
    )
    def test_segment_bases(self, bound, state, changes, index, register):
        assert bound.write(index, TOP)
        assert state.segments[register].base == TOP
        assert not bound.write(index, HOLE)
        state.segments[register].base = 0x1000
        assert bound.read(index) == 0x1000
        assert changes == [1]

    def test_kernel_gs_base(self, bound, state):
        assert bound.write(0xC000_0102, 0x2000)
        assert state.kernel_gs_base == 0x2000
        state.kernel_gs_base = TOP
        assert bound.read(0xC000_0102) == TOP


class TestClock:
    def test_counter_and_adjustment_move_together(self, msrs):
        now = 1000
        bind_clock(msrs, lambda: now, lambda: None)
        assert msrs.read(0x10) == 1000
        assert msrs.write(0x10, 5000)
        assert (msrs.read(0x10), msrs.read(0x3B)) == (5000, 4000)
        now = 1500
        assert msrs.read(0x10) == 5500
        assert msrs.write(0x3B, 4000 - 500)
        assert msrs.read(0x10) == 5000
        assert msrs.write(0x10, 0)
        assert msrs.read(0x3B) == M64 + 1 - 1500
        assert tsc_of(msrs, 1500) == 0

    def test_counter_is_writable_without_an_adjustment_msr(self):
        msrs = MsrFile(NEHALEM)
        bind_clock(msrs, lambda: 7, lambda: None)
        assert msrs.write(0x10, 100)
        assert msrs.read(0x10) == 100
        assert msrs.read(0x3B) is None
        assert not msrs.write(0x3B, 0)


def test_effective_frequency_counts_what_was_not_spent_halted():
    msrs = MsrFile(load_profile("everything-amd"))
    unhalted = [1000]
    bind_effective_frequency(msrs, lambda: unhalted[0])
    assert (msrs.read(0xE7), msrs.read(0xE8)) == (1000, 1000)
    assert msrs.write(0xE8, 5)
    unhalted[0] += 70
    assert (msrs.read(0xE7), msrs.read(0xE8)) == (1070, 75)
    before = msrs.snapshot()
    unhalted[0] += 1
    msrs.restore(before)
    assert msrs.read(0xE8) == 76


def test_effective_frequency_is_not_there_without_the_feature(msrs):
    bind_effective_frequency(msrs, lambda: 0)
    assert msrs.read(0xE7) is None
    assert not msrs.write(0xE8, 0)


def test_snapshot_is_independent(msrs):
    before = msrs.snapshot()
    msrs.write(0xC000_0081, 0x1234)
    after = msrs.snapshot()
    msrs.restore(before)
    assert msrs.read(0xC000_0081) == 0
    msrs.restore(after)
    msrs.write(0xC000_0081, 5)
    assert after[0xC000_0081] == 0x1234


INDICES = st.one_of(st.integers(0, 0x1000), st.integers(0xC000_0000, 0xC000_0200), st.integers(0, 0xFFFF_FFFF))


@given(st.lists(st.tuples(INDICES, st.integers(0, M64)), max_size=20))
def test_any_write_is_taken_or_leaves_everything_as_it_was(writes):
    msrs = MsrFile(SKYLAKE)
    for index, value in writes:
        before = msrs.snapshot()
        if not msrs.write(index, value):
            assert msrs.snapshot() == before
        else:
            assert msrs.read(index) is not None
            assert {i for i in before if before[i] != msrs.values[i]} <= {index}
