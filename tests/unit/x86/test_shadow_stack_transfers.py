"""What events, returns, far transfers, system calls and task switches do to shadow stacks.

Spec: SDM Vol. 1, "Shadow Stacks", "Indirect Branch Tracking"; SDM Vol. 2, "CALL—Call Procedure", "RET—Return From
Procedure", "INT n/INTO/INT3/INT1—Call to Interrupt Procedure", "IRET/IRETD/IRETQ—Interrupt Return",
"SYSCALL—Fast System Call"; SDM Vol. 3, "Task Switching".
"""

from __future__ import annotations

import pytest
from event_fixtures import GDT, FakeMemory, long_machine, protected_machine, virtual_8086_machine

from vtx.x86.delivery import deliver
from vtx.x86.event import Event, EventKind
from vtx.x86.far_transfer import far_call, far_jump, far_return
from vtx.x86.iret import iret
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState
from vtx.x86.syscall import SyscallMsrs, SysenterMsrs, syscall, sysenter, sysexit, sysret

CET = 1 << 23
SH_STK_EN, ENDBR_EN, SUPPRESS, WAITING = 1, 4, 1 << 10, 1 << 11
HANDLER = 0xFFFF_8000_0000_7000
USER_SSP, SUPERVISOR_SSP, TOKEN, IST_TOKEN = 0x7000_0000, 0x4_0000, 0x5_0000, 0x6_0000
SSP_TABLE = 0x3_0000
RSP = 4
EXTERNAL = Event(0x40, EventKind.EXTERNAL_INTERRUPT)
FAR_RET_IRET = 2
INTERRUPT_GATE = 0x8E
CODE_64, CODE_64_3, DATA_3, CODE_32, CODE_32_3 = 0x58, 0x63, 0x23, 0x08, 0x1B


def enabled(state: CpuState, *, user: int = SH_STK_EN, supervisor: int = SH_STK_EN) -> CpuState:
    state.cr4 |= CET
    state.cr0 |= 1 << 16
    state.u_cet, state.s_cet = user, supervisor
    state.ssp = USER_SSP if state.cpl == 3 else SUPERVISOR_SSP
    state.pl_ssp = [TOKEN, 0, 0, USER_SSP]
    state.interrupt_ssp_table = SSP_TABLE
    return state


def long(cpl: int, *, ist: int = 0, user: int = SH_STK_EN, supervisor: int = SH_STK_EN) -> tuple[CpuState, FakeMemory]:
    state, memory = long_machine(cpl)
    enabled(state, user=user, supervisor=supervisor)
    memory.gate64(0x40, CODE_64, HANDLER, INTERRUPT_GATE, ist)
    memory.poke(TOKEN, TOKEN, 8)
    memory.poke(IST_TOKEN, IST_TOKEN, 8)
    memory.poke(SSP_TABLE + 8 * ist, IST_TOKEN if ist else 0, 8)
    return state, memory


def fault_of(aborted: pytest.ExceptionInfo[InstructionAborted]) -> tuple[int, int | None]:
    cause = aborted.value.cause
    assert isinstance(cause, Fault)
    return cause.vector, cause.error_code


def frame(state: CpuState, memory: FakeMemory) -> list[int]:
    """SSP, linear address and CS, upwards."""
    return memory.words(state.ssp, 3, 8)


class TestEvents:
    def test_from_the_user(self) -> None:
        """The token of the supervisor's shadow stack is taken; nothing is pushed."""
        state, memory = long(3)
        deliver(state, memory, EXTERNAL)
        assert (state.ssp, memory.peek(TOKEN, 8), state.pl_ssp[3]) == (TOKEN, TOKEN | 1, USER_SSP)
        assert ("shadow write", TOKEN, 8, False, False) in memory.accesses

    def test_the_users_pointer_is_made_canonical(self) -> None:
        state, memory = long(3)
        state.ssp = 0x8000_0000_0000 + 0x10
        deliver(state, memory, EXTERNAL)
        assert state.pl_ssp[3] == 0xFFFF_8000_0000_0010

    def test_at_the_same_level(self) -> None:
        state, memory = long(0)
        rip = state.rip
        deliver(state, memory, EXTERNAL)
        assert state.ssp == SUPERVISOR_SSP - 24
        assert frame(state, memory) == [SUPERVISOR_SSP, rip, CODE_64]

    def test_a_pointer_that_is_not_a_multiple_of_8(self) -> None:
        state, memory = long(0)
        state.ssp = SUPERVISOR_SSP + 4
        memory.poke(SUPERVISOR_SSP, 0xFFFF_FFFF, 4)
        deliver(state, memory, EXTERNAL)
        assert state.ssp == SUPERVISOR_SSP - 24
        assert frame(state, memory)[0] == SUPERVISOR_SSP + 4
        assert memory.peek(SUPERVISOR_SSP, 4) == 0

    @pytest.mark.parametrize("cpl", [0, 3])
    def test_through_the_table(self, cpl: int) -> None:
        state, memory = long(cpl, ist=1)
        rip = state.rip
        deliver(state, memory, EXTERNAL)
        assert memory.peek(IST_TOKEN, 8) == IST_TOKEN | 1
        if cpl == 3:
            assert (state.ssp, state.pl_ssp[3]) == (IST_TOKEN, USER_SSP)
        else:
            assert state.ssp == IST_TOKEN - 24
            assert frame(state, memory) == [SUPERVISOR_SSP, rip, CODE_64]

    @pytest.mark.parametrize("token", [0, TOKEN | 1, TOKEN + 8])
    def test_without_a_token_that_is_free(self, token: int) -> None:
        state, memory = long(3)
        memory.poke(TOKEN, token, 8)
        with pytest.raises(InstructionAborted) as aborted:
            deliver(state, memory, EXTERNAL)
        assert fault_of(aborted) == (Vector.GP, 0)
        assert (state.cpl, state.ssp, memory.peek(TOKEN, 8)) == (3, USER_SSP, token)

    def test_a_pointer_of_the_level_that_is_not_aligned(self) -> None:
        state, memory = long(3)
        state.pl_ssp[0] = TOKEN + 4
        with pytest.raises(InstructionAborted) as aborted:
            deliver(state, memory, EXTERNAL)
        assert fault_of(aborted) == (Vector.GP, 0)

    def test_the_supervisor_alone_has_one(self) -> None:
        state, memory = long(3, user=0)
        deliver(state, memory, EXTERNAL)
        assert (state.ssp, state.pl_ssp[3]) == (TOKEN, USER_SSP)

    def test_the_user_alone_has_one(self) -> None:
        state, memory = long(3, supervisor=0)
        state.ssp = USER_SSP - 8
        deliver(state, memory, EXTERNAL)
        assert (state.ssp, state.pl_ssp[3]) == (USER_SSP - 8, USER_SSP - 8)
        assert memory.peek(TOKEN, 8) == TOKEN

    @pytest.mark.parametrize("cpl", [0, 3])
    def test_the_handler_begins_with_endbranch(self, cpl: int) -> None:
        state, memory = long(cpl, user=ENDBR_EN | WAITING, supervisor=ENDBR_EN | SUPPRESS)
        deliver(state, memory, EXTERNAL)
        assert state.s_cet == ENDBR_EN | WAITING
        assert state.u_cet == ENDBR_EN | WAITING  # still waits

    @pytest.mark.parametrize(("cpl", "refused", "busy"), [(0, IST_TOKEN - 8, True), (0, IST_TOKEN, False)])
    def test_a_token_that_is_taken_in_vain(self, cpl: int, refused: int, busy: bool) -> None:
        """Where the frame cannot be pushed, the token is busy already: a fact that a VM exit can report."""
        state, memory = long(cpl, ist=1)
        memory.read_only.add(refused >> 12)
        with pytest.raises(InstructionAborted) as aborted:
            deliver(state, memory, EXTERNAL)
        assert isinstance(aborted.value.cause, Fault)
        assert aborted.value.cause.vector == Vector.PF
        assert aborted.value.cause.shadow_stack_busy is busy
        assert memory.peek(IST_TOKEN, 8) == IST_TOKEN | busy

    def test_in_protected_mode(self) -> None:
        state, memory = protected_machine(3)
        enabled(state)
        memory.gate(0x40, CODE_32, 0x7000, INTERRUPT_GATE)
        memory.poke(TOKEN, TOKEN, 8)
        deliver(state, memory, EXTERNAL)
        assert (state.ssp, memory.peek(TOKEN, 8), state.pl_ssp[3]) == (TOKEN, TOKEN | 1, USER_SSP)
        deliver(state, memory, EXTERNAL)
        assert frame(state, memory) == [TOKEN, 0x7000, CODE_32]

    def test_from_virtual_8086_mode(self) -> None:
        """The 8086 program has no shadow stack, whatever the controls say."""
        state, memory = virtual_8086_machine()
        enabled(state)
        state.ssp = 0x1234
        memory.gate(0x40, CODE_32, 0x7000, INTERRUPT_GATE)
        memory.poke(TOKEN, TOKEN, 8)
        deliver(state, memory, EXTERNAL)
        assert (state.ssp, state.pl_ssp[3]) == (TOKEN, USER_SSP)


class TestReturns:
    @pytest.mark.parametrize("cpl", [0, 3])
    @pytest.mark.parametrize("ist", [0, 1])
    def test_from_an_event(self, cpl: int, ist: int) -> None:
        """Back to where it was, with all tokens free."""
        state, memory = long(cpl, ist=ist)
        before = (state.rip, state.gpr[RSP], state.ssp, state.cpl, list(state.pl_ssp))
        deliver(state, memory, EXTERNAL)
        iret(state, memory, 64)
        assert (state.rip, state.gpr[RSP], state.ssp, state.cpl, state.pl_ssp) == before
        assert (memory.peek(TOKEN, 8), memory.peek(IST_TOKEN, 8)) == (TOKEN, IST_TOKEN)

    def test_over_a_hole(self) -> None:
        state, memory = long(0)
        state.ssp = SUPERVISOR_SSP + 4
        deliver(state, memory, EXTERNAL)
        iret(state, memory, 64)
        assert state.ssp == SUPERVISOR_SSP + 4

    @pytest.mark.parametrize("word", [1, 2])
    def test_from_an_event_to_somewhere_else(self, word: int) -> None:
        state, memory = long(0)
        deliver(state, memory, EXTERNAL)
        ssp, pointer = state.ssp, state.gpr[RSP]
        memory.poke(ssp + 8 * word, memory.peek(ssp + 8 * word, 8) ^ 1, 8)
        with pytest.raises(InstructionAborted) as aborted:
            iret(state, memory, 64)
        assert fault_of(aborted) == (Vector.CP, FAR_RET_IRET)
        assert (state.rip, state.gpr[RSP], state.ssp) == (HANDLER, pointer, ssp)

    @pytest.mark.parametrize("odd", [1, 2])
    def test_a_pointer_in_the_frame_that_is_odd(self, odd: int) -> None:
        state, memory = long(0)
        deliver(state, memory, EXTERNAL)
        memory.poke(state.ssp, SUPERVISOR_SSP + odd, 8)
        with pytest.raises(InstructionAborted) as aborted:
            iret(state, memory, 64)
        assert fault_of(aborted) == (Vector.CP, FAR_RET_IRET)

    @pytest.mark.parametrize("cpl", [0, 3])
    def test_with_a_pointer_that_is_not_a_multiple_of_8(self, cpl: int) -> None:
        state, memory = long(cpl)
        deliver(state, memory, EXTERNAL)
        state.ssp += 4
        with pytest.raises(InstructionAborted) as aborted:
            iret(state, memory, 64)
        assert fault_of(aborted) == (Vector.CP, FAR_RET_IRET)

    def test_to_compatibility_mode_with_a_wide_pointer(self) -> None:
        state, memory = long(0)
        state.pl_ssp[3] = 1 << 32
        memory.poke(state.gpr[RSP], 0x1000, 8)
        for number, value in enumerate((CODE_32_3, 0x202, 0x9000, DATA_3), 1):
            memory.poke(state.gpr[RSP] + 8 * number, value, 8)
        with pytest.raises(InstructionAborted) as aborted:
            iret(state, memory, 64)
        assert fault_of(aborted) == (Vector.GP, 0)
        state.pl_ssp[3] = 0xFFFF_FFF8
        iret(state, memory, 64)
        assert (state.cpl, state.ssp) == (3, 0xFFFF_FFF8)

    def test_the_token_is_left_alone_if_it_is_not_busy(self) -> None:
        state, memory = long(3)
        deliver(state, memory, EXTERNAL)
        memory.poke(TOKEN, 0x55, 8)
        iret(state, memory, 64)
        assert memory.peek(TOKEN, 8) == 0x55


class TestFarTransfers:
    @pytest.mark.parametrize("cpl", [0, 3])
    def test_call_and_return(self, cpl: int) -> None:
        state, memory = long(cpl)
        selector, ssp, rip = state.cs.selector, state.ssp, state.rip
        far_call(state, memory, selector, 0x7000, operand_size=8, next_rip=rip + 3)
        assert state.ssp == ssp - 24
        assert frame(state, memory) == [ssp, rip + 3, selector]
        far_return(state, memory, 8, 0)
        assert (state.rip, state.ssp) == (rip + 3, ssp)

    def test_return_to_somewhere_else(self) -> None:
        state, memory = long(0)
        far_call(state, memory, CODE_64, 0x7000, operand_size=8, next_rip=state.rip + 3)
        memory.poke(state.gpr[RSP], 0x8000, 8)
        with pytest.raises(InstructionAborted) as aborted:
            far_return(state, memory, 8, 0)
        assert fault_of(aborted) == (Vector.CP, FAR_RET_IRET)

    def test_the_linear_address_counts(self) -> None:
        """Not the offset: the code segment has a base."""
        state, memory = protected_machine(0)
        enabled(state)
        state.cs.base = 0x1_0000
        far_call(state, memory, CODE_32, 0x7000, operand_size=4, next_rip=0x1234)
        assert frame(state, memory) == [SUPERVISOR_SSP, 0x1_1234, CODE_32]
        with pytest.raises(InstructionAborted) as aborted:
            far_return(state, memory, 4, 0)  # the descriptor has no base
        assert fault_of(aborted) == (Vector.CP, FAR_RET_IRET)

    @pytest.mark.parametrize("call", [False, True])
    def test_to_compatibility_mode_with_a_wide_pointer(self, call: bool) -> None:
        state, memory = long(0)
        state.ssp = 1 << 32

        def transfer() -> None:
            if call:
                far_call(state, memory, CODE_32, 0x7000, operand_size=8, next_rip=state.rip + 3)
            else:
                far_jump(state, memory, CODE_32, 0x7000)

        with pytest.raises(InstructionAborted) as aborted:
            transfer()
        assert fault_of(aborted) == (Vector.GP, 0)
        state.ssp = SUPERVISOR_SSP
        transfer()
        assert state.cs.selector == CODE_32

    def test_calls_and_jumps_are_tracked(self) -> None:
        state, memory = long(0, supervisor=ENDBR_EN | SUPPRESS)
        far_jump(state, memory, CODE_64, 0x7000)
        assert state.s_cet == ENDBR_EN | WAITING
        state.s_cet = ENDBR_EN | SUPPRESS
        far_call(state, memory, CODE_64, 0x7000, operand_size=8, next_rip=0x7003)
        assert state.s_cet == ENDBR_EN | WAITING
        state.s_cet = ENDBR_EN
        far_return(state, memory, 8, 0)
        assert state.s_cet == ENDBR_EN

    def test_through_a_call_gate_and_back(self) -> None:
        state, memory = long(3)
        gate = 0xE0
        memory.poke(GDT + gate, 0x7000 | CODE_64 << 16 | 0xEC << 40, 8)
        memory.poke(GDT + gate + 8, 0xFFFF_8000, 8)
        rip = state.rip
        far_call(state, memory, gate | 3, 0, operand_size=8, next_rip=rip + 7)
        assert (state.cpl, state.ssp, memory.peek(TOKEN, 8), state.pl_ssp[3]) == (0, TOKEN, TOKEN | 1, USER_SSP)
        far_return(state, memory, 8, 0)
        assert (state.cpl, state.rip, state.ssp, memory.peek(TOKEN, 8)) == (3, rip + 7, USER_SSP, TOKEN)


class TestSystemCalls:
    MSRS = SyscallMsrs(star=0x0058 << 32 | 0x0013 << 48, lstar=0xFFFF_8000_0000_5000)
    SYSENTER = SysenterMsrs(cs=0x58, esp=0x9000, eip=0x5000)

    def test_syscall_and_sysret(self) -> None:
        state, memory = long(3, supervisor=SH_STK_EN | ENDBR_EN)
        state.ssp = USER_SSP - 16
        rip = state.rip
        syscall(state, self.MSRS, 2)
        assert (state.cpl, state.ssp, state.pl_ssp[3]) == (0, 0, USER_SSP - 16)
        assert state.s_cet == SH_STK_EN | ENDBR_EN | WAITING
        sysret(state, self.MSRS, 64)
        assert (state.cpl, state.rip, state.ssp) == (3, rip + 2, USER_SSP - 16)
        assert not memory.accesses

    def test_sysenter_and_sysexit(self) -> None:
        state, _ = long(3)
        sysenter(state, self.SYSENTER)
        assert (state.cpl, state.ssp, state.pl_ssp[3]) == (0, 0, USER_SSP)
        sysexit(state, self.SYSENTER, 64)
        assert (state.cpl, state.ssp) == (3, USER_SSP)

    def test_without_a_shadow_stack_of_the_supervisor(self) -> None:
        state, _ = long(3, supervisor=0)
        syscall(state, self.MSRS, 2)
        assert (state.ssp, state.pl_ssp[3], state.s_cet) == (USER_SSP, USER_SSP, 0)

    def test_a_call_that_faults_changes_nothing(self) -> None:
        state, _ = long(3)
        state.efer &= ~1
        state.ssp = 0x18
        with pytest.raises(InstructionAborted):
            syscall(state, self.MSRS, 2)
        assert (state.ssp, state.pl_ssp[3]) == (0x18, USER_SSP)
