"""ERETS and ERETU: what they take from the frame, what they refuse, and what they do to stacks, GS and shadow stacks.

Spec: SDM Vol. 2, "ERETS—Event Return to Supervisor", "ERETU—Event Return to User", operation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from event_fixtures import GDT, FakeMemory, long_machine

from vtx.x86.fred_return import Returned, erets, eretu
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Gpr, Segment, SegmentRegister, Shadow

FRED, CET = 1 << 32, 1 << 23
CONFIG = 0xFFFF_FFFF_8100_0000
SP = 0x9000
RIP, RSP = 0xFFFF_8000_0070_0000, 0xFFFF_8800_0000_1238
USER_RIP, USER_RSP = 0x40_2000, 0x7FFF_0008
NON_CANONICAL = 0x8000_0000_0000
STAR = 0x1003_0058_0000_0000  # ring 3: 32-bit code 1003H, stack 100BH, 64-bit code 1013H; no such descriptors
SSP = 0xA000
TOP = (0xB000, 0xC000, 0xD000, 0xE000)
SH_STK_EN, ENDBR_EN, SUPPRESS, WAITING = 1, 1 << 2, 1 << 10, 1 << 11
TF, IF, RF, VM, IOPL = 1 << 8, 1 << 9, 1 << 16, 1 << 17, 3 << 12
GS = SegmentRegister.GS

Instruction = Callable[[CpuState, FakeMemory], Returned]


def to_supervisor(state: CpuState, memory: FakeMemory) -> Returned:
    return erets(state, memory)


def to_user(state: CpuState, memory: FakeMemory) -> Returned:
    return eretu(state, memory, STAR)


def machine(*, level: int = 0) -> tuple[CpuState, FakeMemory]:
    state, memory = long_machine()
    state.cr4 |= FRED
    state.fred_config = CONFIG | level
    state.gpr[Gpr.RSP] = SP
    state.rflags = 2
    state.pl_ssp[0], state.fred_ssp[:] = TOP[0], TOP[1:]
    return state, memory


def put(memory: FakeMemory, *, rip: int, cs: int, rsp: int, ss: int, rflags: int = 0x202) -> None:
    for number, value in enumerate((0xDEAD, rip, cs, rflags, rsp, ss, 0, 0)):
        memory.poke(SP + 8 * number, value, 8)


def supervisor_frame(memory: FakeMemory, **changed: int) -> None:
    put(memory, **{"rip": RIP, "cs": 0x58, "rsp": RSP, "ss": 0x10} | changed)


def user_frame(memory: FakeMemory, **changed: int) -> None:
    put(memory, **{"rip": USER_RIP, "cs": 0x1013, "rsp": USER_RSP, "ss": 0x100B} | changed)


def fault_of(instruction: Instruction, state: CpuState, memory: FakeMemory) -> Fault:
    before = copy.deepcopy(state)
    with pytest.raises(InstructionAborted) as caught:
        instruction(state, memory)
    assert state == before
    assert isinstance(caught.value.cause, Fault)
    return caught.value.cause


@pytest.mark.parametrize("instruction", [to_supervisor, to_user])
class TestWhereTheyAreValid:
    def test_not_without_fred(self, instruction: Instruction) -> None:
        state, memory = machine()
        state.cr4 &= ~FRED
        assert fault_of(instruction, state, memory) == Fault(Vector.UD)

    def test_not_in_ring_3(self, instruction: Instruction) -> None:
        state, memory = long_machine(3)
        state.cr4 |= FRED
        assert fault_of(instruction, state, memory) == Fault(Vector.UD)

    def test_the_stack_can_fault(self, instruction: Instruction) -> None:
        state, memory = machine()
        memory.refused.add(SP >> 12)
        assert fault_of(instruction, state, memory).vector == Vector.PF


class TestErets:
    def test_what_it_loads(self) -> None:
        state, memory = machine()
        cs, ss, gs = state.cs, state.ss, state.segments[GS].base
        supervisor_frame(memory, rflags=0x1_0A97)
        assert to_supervisor(state, memory) == Returned(unblocks_nmi=False, traps=False)
        assert (state.rip, state.gpr[Gpr.RSP], state.rflags) == (RIP, RSP, 0x1_0A97)
        assert (state.cs, state.ss, state.segments[GS].base) == (cs, ss, gs)

    def test_event_information_is_ignored(self) -> None:
        state, memory = machine()
        supervisor_frame(memory, ss=0x10 | 0xFFFF_FFFF << 32)
        to_supervisor(state, memory)
        assert state.rip == RIP

    @pytest.mark.parametrize(
        "changed",
        [
            {"rip": NON_CANONICAL},
            {"cs": 0x5B},
            {"cs": 0x60},
            {"cs": 0x58 | 1 << 19},
            {"cs": 0x58 | 1 << 32},
            {"ss": 0x13},
            {"ss": 0x10 | 1 << 19},
            {"rflags": 0x200},
            {"rflags": 0x202 | VM},
            {"rflags": 0x202 | 1 << 3},
            {"rflags": 0x202 | 1 << 15},
            {"rflags": 0x202 | 1 << 22},
            {"rflags": 0x202 | 1 << 32},
        ],
        ids=str,
    )
    def test_frames_that_it_refuses(self, changed: dict[str, int]) -> None:
        state, memory = machine()
        supervisor_frame(memory, **changed)
        assert fault_of(to_supervisor, state, memory) == Fault(Vector.GP, 0)

    @pytest.mark.parametrize(("current", "saved", "new"), [(3, 1, 1), (2, 0, 0), (1, 1, 1), (1, 3, 1), (0, 2, 0)])
    def test_the_level_never_rises(self, current: int, saved: int, new: int) -> None:
        state, memory = machine(level=current)
        supervisor_frame(memory, cs=0x58 | saved << 16)
        to_supervisor(state, memory)
        assert state.fred_config == CONFIG | new

    def test_bit_18_of_ss_unblocks_nmis(self) -> None:
        state, memory = machine()
        supervisor_frame(memory, ss=0x10 | 1 << 18)
        assert to_supervisor(state, memory).unblocks_nmi

    @pytest.mark.parametrize(
        ("saved", "rflags", "earlier", "blocked"),
        [
            (1, IF, Shadow.NONE, True),
            (1, 0, Shadow.NONE, False),
            (0, IF, Shadow.NONE, False),
            (1, IF, Shadow.STI, False),
        ],
    )
    def test_bit_16_of_ss_restores_blocking_by_sti(
        self, saved: int, rflags: int, earlier: Shadow, blocked: bool
    ) -> None:
        state, memory = machine()
        state.shadow = earlier
        supervisor_frame(memory, ss=0x10 | saved << 16, rflags=2 | rflags)
        to_supervisor(state, memory)
        assert state.shadow is (Shadow.STI if blocked else Shadow.NONE)

    @pytest.mark.parametrize(
        ("software", "rflags", "stepped", "traps"),
        [(1, TF, 0, True), (0, TF, 0, False), (1, 0, 0, False), (0, 0, TF, True)],
    )
    def test_a_trap_follows_a_stepped_system_call(self, software: int, rflags: int, stepped: int, traps: bool) -> None:
        state, memory = machine()
        state.rflags |= stepped
        supervisor_frame(memory, ss=0x10 | software << 17, rflags=2 | rflags)
        assert to_supervisor(state, memory).traps is traps


def shadow_stacks(state: CpuState, memory: FakeMemory, *, ssp: int = SSP, cs: int = 0x58, rip: int = RIP) -> None:
    """SSP of ring 0, with a frame on it that returns to ``ssp``."""
    state.cr4 |= CET
    state.s_cet = SH_STK_EN
    for number, value in enumerate((ssp, rip, cs)):
        memory.poke(state.ssp + 8 * number, value, 8)


class TestShadowStacks:
    def test_on_the_same_level(self) -> None:
        state, memory = machine(level=1)
        state.ssp = SSP - 24
        supervisor_frame(memory, cs=0x58 | 1 << 16)
        shadow_stacks(state, memory, cs=0x58 | 1 << 16)
        to_supervisor(state, memory)
        assert state.ssp == SSP

    def test_to_a_lower_level(self) -> None:
        state, memory = machine(level=2)
        state.ssp = TOP[2] - 24
        supervisor_frame(memory)
        shadow_stacks(state, memory)
        to_supervisor(state, memory)
        assert state.ssp == SSP

    def test_the_level_that_is_left_must_be_empty(self) -> None:
        state, memory = machine(level=2)
        state.ssp = TOP[2] - 48
        supervisor_frame(memory)
        shadow_stacks(state, memory)
        assert fault_of(to_supervisor, state, memory) == Fault(Vector.CP, 2)

    @pytest.mark.parametrize("changed", [{"cs": 0x60}, {"rip": RIP + 1}], ids=str)
    def test_a_frame_that_differs(self, changed: dict[str, int]) -> None:
        state, memory = machine()
        state.ssp = SSP - 24
        supervisor_frame(memory)
        shadow_stacks(state, memory, **changed)
        assert fault_of(to_supervisor, state, memory) == Fault(Vector.CP, 2)

    def test_a_pointer_that_is_not_canonical(self) -> None:
        state, memory = machine()
        state.ssp = SSP - 24
        supervisor_frame(memory)
        shadow_stacks(state, memory, ssp=NON_CANONICAL)
        assert fault_of(to_supervisor, state, memory) == Fault(Vector.GP, 0)

    @pytest.mark.parametrize(("suppressed", "after"), [(0, WAITING), (SUPPRESS, SUPPRESS)])
    def test_bit_18_of_cs_makes_the_tracker_wait(self, suppressed: int, after: int) -> None:
        state, memory = machine()
        state.cr4 |= CET
        state.s_cet = ENDBR_EN | suppressed
        supervisor_frame(memory, cs=0x58 | 1 << 18)
        to_supervisor(state, memory)
        assert state.s_cet == ENDBR_EN | after

    def test_to_ring_3_that_of_ring_0_must_be_empty(self) -> None:
        state, memory = machine()
        state.cr4 |= CET
        state.s_cet, state.ssp = SH_STK_EN, TOP[0] - 8
        user_frame(memory)
        assert fault_of(to_user, state, memory) == Fault(Vector.CP, 2)

    def test_to_ring_3_its_own_is_taken_up(self) -> None:
        state, memory = machine()
        state.cr4 |= CET
        state.s_cet = state.u_cet = SH_STK_EN
        state.ssp, state.pl_ssp[3] = TOP[0], 0x7000_0000
        user_frame(memory)
        to_user(state, memory)
        assert state.ssp == 0x7000_0000

    def test_one_that_32_bit_code_cannot_have(self) -> None:
        state, memory = machine()
        state.cr4 |= CET
        state.u_cet, state.pl_ssp[3] = SH_STK_EN, 1 << 32
        user_frame(memory, cs=0x1003)
        assert fault_of(to_user, state, memory) == Fault(Vector.GP, 0)


class TestEretu:
    def test_what_it_loads(self) -> None:
        state, memory = machine()
        state.segments[GS].base, state.kernel_gs_base = 0x1000, 0x2000
        user_frame(memory, rflags=0x1_0A97)
        assert to_user(state, memory) == Returned(unblocks_nmi=False, traps=False)
        assert (state.rip, state.gpr[Gpr.RSP], state.rflags, state.cpl) == (USER_RIP, USER_RSP, 0x1_0A97, 3)
        assert state.cs == Segment(0x1013, 0, 0xFFFF_FFFF, 0xA0FB)
        assert state.ss == Segment(0x100B, 0, 0xFFFF_FFFF, 0xC0F3)
        assert (state.segments[GS].base, state.kernel_gs_base) == (0x2000, 0x1000)

    def test_to_compatibility_mode(self) -> None:
        state, memory = machine()
        user_frame(memory, cs=0x1003, rip=0xFFFF_FFFF_0040_2000, rsp=0x1_0000_9000)
        to_user(state, memory)
        assert state.cs == Segment(0x1003, 0, 0xFFFF_FFFF, 0xC0FB)
        assert (state.rip, state.gpr[Gpr.RSP]) == (0x40_2000, 0x9000)

    def test_by_descriptors(self) -> None:
        state, memory = machine()
        user_frame(memory, cs=0x63, ss=0x23)
        to_user(state, memory)
        assert state.cs == Segment(0x63, 0, 0xFFFF_FFFF, 0xA0FB)
        assert state.ss == Segment(0x23, 0, 0xFFFF_FFFF, 0xC0F3)

    def test_a_mixture_is_looked_up(self) -> None:
        state, memory = machine()
        user_frame(memory, ss=0x23)
        assert fault_of(to_user, state, memory) == Fault(Vector.GP, 0x1010)

    @pytest.mark.parametrize(
        ("changed", "fault"),
        [
            ({"cs": 0x4B, "ss": 0x23}, Fault(Vector.GP, 0x48)),  # DPL 1, not conforming
            ({"cs": 0x23, "ss": 0x23}, Fault(Vector.GP, 0x20)),  # data
            ({"cs": 0x63, "ss": 0x13}, Fault(Vector.GP, 0x10)),  # DPL 0
            ({"cs": 0x63, "ss": 0x03}, Fault(Vector.GP, 0)),
            ({"cs": 0x43, "ss": 0x23}, Fault(Vector.GP, 0x40)),  # DPL 0
            ({"cs": 0x63, "ss": 0x23, "rip": NON_CANONICAL}, Fault(Vector.GP, 0)),
        ],
        ids=str,
    )
    def test_descriptors_that_it_refuses(self, changed: dict[str, int], fault: Fault) -> None:
        state, memory = machine()
        user_frame(memory, **changed)
        assert fault_of(to_user, state, memory) == fault

    @pytest.mark.parametrize(
        "changed",
        [
            {"rip": NON_CANONICAL},
            {"cs": 0x58},
            {"cs": 0x1013 | 1 << 16},
            {"cs": 0x1013 | 1 << 18},
            {"ss": 0x1008},
            {"ss": 0x100B | 1 << 19},
            {"rflags": 0x200},
            {"rflags": 0x202 | IOPL},
            {"rflags": 0x202 | VM},
        ],
        ids=str,
    )
    def test_frames_that_it_refuses(self, changed: dict[str, int]) -> None:
        state, memory = machine()
        user_frame(memory, **changed)
        assert fault_of(to_user, state, memory) == Fault(Vector.GP, 0)

    def test_only_from_level_0(self) -> None:
        state, memory = machine(level=1)
        user_frame(memory)
        assert fault_of(to_user, state, memory) == Fault(Vector.GP, 0)

    def test_bits_16_to_18_of_ss(self) -> None:
        state, memory = machine()
        user_frame(memory, ss=0x100B | 7 << 16, rflags=2 | TF | IF)
        assert to_user(state, memory) == Returned(unblocks_nmi=True, traps=True)
        assert state.shadow is Shadow.NONE

    def test_a_descriptor_is_marked_accessed(self) -> None:
        state, memory = machine()
        memory.poke(GDT + 0x60, 0x00AF_FA00_0000_FFFF, 8)
        user_frame(memory, cs=0x63, ss=0x23)
        to_user(state, memory)
        assert memory.peek(GDT + 0x60, 8) == 0x00AF_FB00_0000_FFFF
