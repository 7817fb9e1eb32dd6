"""The frames of FRED: what they hold, on which stack they are, and what keeps them from being stored.

Frames are written out as quadwords from the error code upwards, as the manual's figure shows them.
"""

from __future__ import annotations

import copy

import pytest
from event_fixtures import FakeMemory, long_machine

from vtx.x86.delivery import deliver
from vtx.x86.double_fault import TripleFault, deliver_with_faults
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Gpr, Segment, SegmentRegister, Shadow

FRED, CET = 1 << 32, 1 << 23
ENTRY = 0xFFFF_FFFF_8100_0000
RIP = 0xFFFF_8000_0040_1234
STAR = 0x0063_0058_0000_0000  # ring 3 from 63H, ring 0 from 58H
RSP = (0xFFFF_8800_0001_0000, 0xFFFF_8800_0002_0000, 0xFFFF_8800_0003_0000, 0xFFFF_8800_0004_0000)
SSP = (0xFFFF_8800_0005_0000, 0xFFFF_8800_0006_0000, 0xFFFF_8800_0007_0000, 0xFFFF_8800_0008_0000)
IN_64_BIT_MODE, NESTED = 1 << 57, 1 << 58
SH_STK_EN, ENDBR_EN, WAITING = 1, 1 << 2, 1 << 11

EXTERNAL, NMI, EXCEPTION, INT_N = (
    EventKind.EXTERNAL_INTERRUPT,
    EventKind.NMI,
    EventKind.HARDWARE_EXCEPTION,
    EventKind.SOFTWARE_INTERRUPT,
)
INTERRUPT = Event(0x40, EXTERNAL)
PAGE_FAULT = Event(14, EXCEPTION, error_code=6, address=0x7FFF_1234)


def machine(cpl: int = 0, config: int = 0, levels: int = 0) -> tuple[CpuState, FakeMemory]:
    state, memory = long_machine(cpl)
    state.cr4 |= FRED
    state.fred_config = ENTRY | config
    state.fred_stack_levels = levels
    state.fred_rsp[:] = RSP
    state.pl_ssp[0], state.fred_ssp[:] = SSP[0], SSP[1:]
    return state, memory


def delivered(state: CpuState, memory: FakeMemory, event: Event) -> list[int]:
    """The frame."""
    deliver(state, memory, event, star=STAR)
    return memory.words(state.gpr[Gpr.RSP], 8, 8)


def fault_of(state: CpuState, memory: FakeMemory, event: Event) -> Fault:
    before = copy.deepcopy(state)
    with pytest.raises(InstructionAborted) as caught:
        deliver(state, memory, event, star=STAR)
    assert state == before
    assert isinstance(caught.value.cause, Fault)
    return caught.value.cause


class TestFromRing3:
    def test_a_fault(self) -> None:
        state, memory = machine(3)
        state.segments[SegmentRegister.GS].base, state.kernel_gs_base = 0x7000, 0xFFFF_9000_0000_0000
        information = 0x23 | 14 << 32 | 3 << 48 | IN_64_BIT_MODE
        frame = delivered(state, memory, PAGE_FAULT)
        assert frame == [6, RIP, 0x63, 0x1_0202, 0x9008, information, 0x7FFF_1234, 0]
        assert (state.rip, state.gpr[Gpr.RSP], state.rflags) == (ENTRY, RSP[0] - 64, 2)
        assert state.cs == Segment(0x58, 0, 0xFFFF_FFFF, 0xA09B)
        assert state.ss == Segment(0x60, 0, 0xFFFF_FFFF, 0xC093)
        assert (state.segments[SegmentRegister.GS].base, state.kernel_gs_base) == (0xFFFF_9000_0000_0000, 0x7000)

    @pytest.mark.parametrize(
        "event",
        [Event(0x40, EXTERNAL), Event(2, NMI), PAGE_FAULT],
        ids=["interrupt", "NMI", "#PF"],
    )
    def test_the_stack_is_that_of_level_0(self, event: Event) -> None:
        state, memory = machine(3, config=3 << 9, levels=(1 << 64) - 1)
        delivered(state, memory, event)
        assert (state.gpr[Gpr.RSP], state.fred_config) == (RSP[0] - 64, ENTRY | 3 << 9)

    def test_a_nested_exception_asks_for_its_own_level(self) -> None:
        state, memory = machine(3, levels=2 << 28)
        frame = delivered(state, memory, Event(14, EXCEPTION, error_code=0, address=8, nested=True))
        assert state.gpr[Gpr.RSP] == RSP[2] - 64
        assert state.fred_config & 3 == 2
        assert frame[5] == 0x23 | 14 << 32 | 3 << 48 | IN_64_BIT_MODE | NESTED

    def test_a_double_fault_asks_for_its_own_level(self) -> None:
        state, memory = machine(3, levels=3 << 16)
        delivered(state, memory, Event(8, EXCEPTION, error_code=0))
        assert state.gpr[Gpr.RSP] == RSP[3] - 64

    def test_of_compatibility_mode(self) -> None:
        state, memory = machine(3)
        state.segments[SegmentRegister.CS] = Segment(0x1B, 0, 0xFFFF_FFFF, 0xC0FB)
        frame = delivered(state, memory, INTERRUPT)
        assert (frame[2], frame[5]) == (0x1B, 0x23 | 0x40 << 32)
        assert state.in_64_bit_mode

    def test_the_selectors_ignore_the_privilege_level_in_star(self) -> None:
        state, memory = machine(3)
        deliver(state, memory, INTERRUPT, star=0x5B << 32)
        assert (state.cs.selector, state.ss.selector) == (0x58, 0x60)


class TestFromRing0:
    def test_the_entry_point_is_256_bytes_further_on(self) -> None:
        state, memory = machine()
        cs, ss = state.cs, state.ss
        frame = delivered(state, memory, INTERRUPT)
        information = 0x10 | 0x40 << 32 | IN_64_BIT_MODE
        assert frame == [0, RIP, 0x58, 0x202, 0x9008, information, 0, 0]
        assert (state.rip, state.gpr[Gpr.RSP], state.rflags) == (ENTRY + 256, 0x9000 - 64, 2)
        assert (state.cs, state.ss) == (cs, ss)

    def test_gs_is_left_alone(self) -> None:
        state, memory = machine()
        state.segments[SegmentRegister.GS].base, state.kernel_gs_base = 0x7000, 0x8000
        delivered(state, memory, INTERRUPT)
        assert (state.segments[SegmentRegister.GS].base, state.kernel_gs_base) == (0x7000, 0x8000)

    @pytest.mark.parametrize(("chunks", "top"), [(0, 0x9000), (1, 0x8FC0), (7, 0x8E40)])
    def test_the_red_zone(self, chunks: int, top: int) -> None:
        state, memory = machine(config=chunks << 6)
        delivered(state, memory, INTERRUPT)
        assert state.gpr[Gpr.RSP] == top - 64

    @pytest.mark.parametrize(("current", "wanted", "new"), [(0, 1, 1), (0, 3, 3), (2, 1, 2), (1, 1, 1)])
    def test_the_level_never_sinks(self, current: int, wanted: int, new: int) -> None:
        state, memory = machine(config=current | wanted << 9)
        frame = delivered(state, memory, INTERRUPT)
        assert state.fred_config & 3 == new
        assert frame[2] == 0x58 | current << 16
        assert state.gpr[Gpr.RSP] == (RSP[new] if new > current else 0x9000) - 64

    @pytest.mark.parametrize("vector", [0, 1, 14, 31])
    def test_exceptions_have_levels_by_vector(self, vector: int) -> None:
        state, memory = machine(levels=1 << 2 * vector)
        delivered(state, memory, Event(vector, EXCEPTION))
        assert state.fred_config & 3 == 1

    def test_nmis_have_the_level_of_vector_2(self) -> None:
        state, memory = machine(levels=3 << 4)
        frame = delivered(state, memory, Event(2, NMI))
        assert state.fred_config & 3 == 3
        assert frame[5] == 0x10 | 1 << 18 | 2 << 32 | 2 << 48 | IN_64_BIT_MODE

    def test_int_n_has_no_level_of_its_own(self) -> None:
        state, memory = machine(config=3 << 9, levels=(1 << 64) - 1)
        frame = delivered(state, memory, Event(0x0E, INT_N, instruction_length=2))
        assert state.fred_config & 3 == 0
        assert frame[1] == RIP + 2
        assert frame[5] == 0x10 | 1 << 17 | 0x0E << 32 | 4 << 48 | IN_64_BIT_MODE | 2 << 60

    @pytest.mark.parametrize(("vector", "kind"), [(1, 5), (3, 6), (4, 6)], ids=["INT1", "INT3", "INTO"])
    def test_software_exceptions(self, vector: int, kind: int) -> None:
        state, memory = machine(levels=1 << 2 * vector)
        frame = delivered(state, memory, Event(vector, EventKind(kind), instruction_length=1))
        assert state.fred_config & 3 == 1
        assert frame[5] == 0x10 | vector << 32 | kind << 48 | IN_64_BIT_MODE | 1 << 60

    @pytest.mark.parametrize("vector", [1, 2], ids=["SYSCALL", "SYSENTER"])
    def test_system_calls(self, vector: int) -> None:
        state, memory = machine(levels=(1 << 64) - 1)
        frame = delivered(state, memory, Event(vector, EventKind.OTHER, instruction_length=2))
        assert state.fred_config & 3 == 0
        assert frame[5] == 0x10 | 1 << 17 | vector << 32 | 7 << 48 | IN_64_BIT_MODE | 2 << 60
        assert frame[6] == 0

    def test_blocking_by_sti_is_saved(self) -> None:
        state, memory = machine()
        state.shadow = Shadow.STI
        assert delivered(state, memory, Event(2, NMI))[5] & 1 << 16

    def test_the_causes_of_a_debug_exception(self) -> None:
        state, memory = machine()
        assert delivered(state, memory, Event(1, EXCEPTION, debug=0x4002))[6] == 0x4002

    def test_data_given_with_the_event(self) -> None:
        state, memory = machine()
        assert delivered(state, memory, Event(0x40, EXTERNAL, data=0x1234))[6] == 0x1234


class TestShadowStacks:
    def test_staying_pushes_three_words(self) -> None:
        state, memory = machine()
        state.cr4 |= CET
        state.s_cet, state.ssp = SH_STK_EN, 0xA000
        delivered(state, memory, INTERRUPT)
        assert state.ssp == 0xA000 - 24
        assert memory.words(0xA000 - 24, 3, 8) == [0xA000, RIP, 0x58]

    def test_staying_can_leave_a_word_free(self) -> None:
        state, memory = machine(config=1 << 3)
        state.cr4 |= CET
        state.s_cet, state.ssp = SH_STK_EN, 0xA000
        delivered(state, memory, INTERRUPT)
        assert memory.words(0x9FE0, 3, 8) == [0xA000, RIP, 0x58]

    def test_a_higher_level_has_its_own(self) -> None:
        state, memory = machine(config=2 << 9)
        state.cr4 |= CET
        state.s_cet, state.ssp = SH_STK_EN, 0xA000
        delivered(state, memory, INTERRUPT)
        assert state.ssp == SSP[2] - 24
        assert memory.words(SSP[2] - 24, 3, 8) == [0xA000, RIP, 0x58]

    def test_from_ring_3_it_stays_empty(self) -> None:
        state, memory = machine(3)
        state.cr4 |= CET
        state.s_cet = state.u_cet = SH_STK_EN
        state.ssp = 0xB000
        delivered(state, memory, INTERRUPT)
        assert (state.ssp, state.pl_ssp[3]) == (SSP[0], 0xB000)
        assert not any("shadow" in access[0] for access in memory.accesses)

    def test_a_pointer_that_is_not_aligned(self) -> None:
        state, memory = machine(config=1 << 9)
        state.cr4 |= CET
        state.s_cet, state.fred_ssp[0] = SH_STK_EN, SSP[1] + 4
        assert fault_of(state, memory, INTERRUPT) == Fault(Vector.GP, 1)

    def test_a_waiting_tracker_is_saved_and_reset(self) -> None:
        state, memory = machine()
        state.cr4 |= CET
        state.s_cet = ENDBR_EN | WAITING
        assert delivered(state, memory, INTERRUPT)[2] == 0x58 | 1 << 18
        assert state.s_cet == ENDBR_EN

    def test_the_tracker_of_ring_3_stays_as_it_is(self) -> None:
        state, memory = machine(3)
        state.cr4 |= CET
        state.u_cet = ENDBR_EN | WAITING
        assert delivered(state, memory, INTERRUPT)[2] == 0x63
        assert state.u_cet == ENDBR_EN | WAITING


class TestFaults:
    def test_an_entry_point_that_is_not_canonical(self) -> None:
        state, memory = machine()
        state.fred_config = 0x8000_0000_0000_0000
        assert fault_of(state, memory, INTERRUPT) == Fault(Vector.GP, 1)

    def test_int_n_is_no_external_event(self) -> None:
        state, memory = machine()
        state.fred_config = 0x8000_0000_0000_0000
        assert fault_of(state, memory, Event(0x40, INT_N, instruction_length=2)) == Fault(Vector.GP, 0)

    def test_a_page_of_the_stack(self) -> None:
        state, memory = machine()
        memory.refused.add(0x8)
        assert fault_of(state, memory, INTERRUPT).vector == Vector.PF

    def test_a_stack_that_is_not_canonical(self) -> None:
        state, memory = machine()
        state.gpr[Gpr.RSP] = 0x8000_0000_0000_0000
        assert fault_of(state, memory, INTERRUPT) == Fault(Vector.SS, 1)

    def test_what_follows_is_nested(self) -> None:
        state, memory = machine(levels=1 << 28)
        memory.refused.add(0x8)
        outcome = deliver_with_faults(state, memory, INTERRUPT, lambda *_: None, star=STAR)
        assert not isinstance(outcome, TripleFault)
        frame = memory.words(RSP[1] - 64, 8, 8)
        assert frame[5] == 0x10 | 14 << 32 | 3 << 48 | IN_64_BIT_MODE | NESTED

    def test_a_double_fault_is_not_marked(self) -> None:
        state, memory = machine(levels=1 << 16)
        memory.refused.add(0x8)
        outcome = deliver_with_faults(state, memory, PAGE_FAULT, lambda *_: None, star=STAR)
        assert not isinstance(outcome, TripleFault)
        frame = memory.words(RSP[1] - 64, 8, 8)
        assert frame[5] == 0x10 | 8 << 32 | 3 << 48 | IN_64_BIT_MODE
        assert frame[0] == 0


def test_without_ia_32e_mode_the_idt_is_used() -> None:
    state, memory = machine()
    state.efer = 0
    memory.gate(0x40, 0x08, 0x5678, 0x8E)
    state.segments[SegmentRegister.CS] = Segment(0x08, 0, 0xFFFF_FFFF, 0xC09B)
    state.rip = 0x1234
    deliver(state, memory, INTERRUPT, star=STAR)
    assert state.rip == 0x5678
