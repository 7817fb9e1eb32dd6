"""Shadow stacks: copies of return addresses, which only transfers of control read and write.

A transfer does to the shadow stack in memory what it has to, and raises what it must, before any register changes; what
it makes of SSP and IA32_PL3_SSP is committed with the other registers. Each shadow stack of a supervisor begins with a
*token*, its own address, which is marked busy while a processor uses the stack.

Interpretation. IRET to the same privilege level frees the token beneath the frame it has popped if SSP was somewhere
else before the event: the stack came from the interrupt SSP table then.

Spec: SDM Vol. 1, "Shadow Stacks"; SDM Vol. 2, "CALL—Call Procedure", "RET—Return From Procedure", "INT
n/INTO/INT3/INT1—Call to Interrupt Procedure", "IRET/IRETD/IRETQ—Interrupt Return", operation.
"""

from __future__ import annotations

from typing import Final

from attrs import define, evolve, frozen

from vtx.x86.control_flow import ControlProtection, cp, expect_endbranch, has_shadow_stack, shadow_stack_enabled
from vtx.x86.linear import LinearMemory, linear_address_width, system_address
from vtx.x86.outcome import Fault, InstructionAborted, gp
from vtx.x86.second_level import SecondLevelFault
from vtx.x86.state import MASK64, CpuState

BUSY: Final = 1 << 0
"""Of a supervisor shadow-stack token."""


@define(slots=True)
class ShadowStack:
    """The shadow stack at ``pointer``, before SSP is committed; ``user`` if it is one of privilege level 3."""

    memory: LinearMemory
    pointer: int
    user: bool

    @classmethod
    def of(cls, state: CpuState, memory: LinearMemory) -> ShadowStack:
        """The current one."""
        return cls(memory, state.ssp, state.cpl == 3)

    def push(self, value: int, size: int) -> None:
        """Push ``size`` bytes."""
        pointer = (self.pointer - size) & MASK64
        self.memory.shadow_write(pointer, size, value, user=self.user)
        self.pointer = pointer

    def pop(self, size: int) -> int:
        """Pop ``size`` bytes."""
        value = self.memory.shadow_read(self.pointer, size, user=self.user)
        self.pointer = (self.pointer + size) & MASK64
        return value

    def push_frame(self, cs: int, lip: int, ssp: int) -> None:
        """Push what a far return compares: CS, linear return address and SSP, on a multiple of 8."""
        if self.pointer & 7:
            self.memory.shadow_write((self.pointer - 4) & MASK64, 4, 0, user=self.user)
            self.pointer &= ~7
        for value in (cs, lip, ssp):
            self.push(value, 8)

    def pop_frame(self, cs: int, lip: int, *, long: bool) -> int:
        """SSP before the frame was pushed; #CP unless the frame names ``cs`` and ``lip``.

        ``long`` if the return is to 64-bit code.
        """
        if self.pointer & 7:
            raise cp(ControlProtection.FAR_RET_IRET)
        ssp, pushed_lip, pushed_cs = (self.pop(8) for _ in range(3))
        if pushed_cs != cs or pushed_lip != lip or ssp & 3:
            raise cp(ControlProtection.FAR_RET_IRET)
        if not long and ssp >> 32:
            raise gp(0)
        return ssp


def take(memory: LinearMemory, address: int) -> bool:
    """Mark the token at ``address`` busy; False if it is no token, or a busy one."""
    found = memory.shadow_read(address, 8, user=False)
    memory.shadow_write(address, 8, found if found != address else address | BUSY, user=False)
    return found == address


def free(memory: LinearMemory, address: int) -> bool:
    """Mark the token at ``address`` free; False if it is no busy token."""
    found = memory.shadow_read(address, 8, user=False)
    memory.shadow_write(address, 8, found if found != address | BUSY else address, user=False)
    return found == address | BUSY


def release(state: CpuState, memory: LinearMemory) -> None:
    """A return to code without a shadow stack frees the token of the current one."""
    if state.ssp & 7:
        raise cp(ControlProtection.FAR_RET_IRET)
    free(memory, state.ssp)


@frozen
class SspChange:
    """What a transfer makes of SSP and of IA32_PL3_SSP; None: it leaves the register alone."""

    ssp: int | None = None
    outer: int | None = None

    def commit(self, state: CpuState) -> None:
        """Load the registers."""
        if self.ssp is not None:
            state.ssp = self.ssp
        if self.outer is not None:
            state.pl_ssp[3] = self.outer


def _extended(state: CpuState) -> int:
    """SSP, made canonical."""
    shift = 64 - linear_address_width(state)
    extended = state.ssp << shift & MASK64
    return ((extended ^ 1 << 63) - (1 << 63) >> shift) & MASK64


def check_mode(state: CpuState, cpl: int, *, long: bool) -> None:
    """#GP(0) if code of ``cpl`` would go on with an SSP that is too wide for code that is not ``long``."""
    if not long and state.ssp >> 32 and shadow_stack_enabled(state, cpl):
        raise gp(0)


def enter(state: CpuState, memory: LinearMemory, cpl: int, *, cs: int, lip: int, long: bool, ist: int = 0) -> SspChange:
    """Go to a procedure or handler of ``cpl``, 64-bit code if ``long``, which returns to ``lip`` in ``cs``.

    The stack is that of the privilege level if it is an inner one, or that of entry ``ist`` of the interrupt SSP table.
    """
    inner = cpl != state.cpl
    outer = _extended(state) if inner and state.cpl == 3 and has_shadow_stack(state) else None
    if not shadow_stack_enabled(state, cpl):
        return SspChange(outer=outer)
    stack, token = ShadowStack(memory, state.ssp, cpl == 3), None
    if ist:
        token = memory.read(system_address(state, state.interrupt_ssp_table, 8 * ist), 8)
    elif inner:
        token = state.pl_ssp[cpl]
    if token is not None:
        if token & 7 or (not long and token >> 32) or not take(memory, token):
            raise gp(0)
        stack.pointer = token
    if not inner or state.cpl != 3:
        try:
            stack.push_frame(cs, lip, state.ssp)
        except InstructionAborted as aborted:
            if token is not None and isinstance(aborted.cause, Fault | SecondLevelFault):
                raise InstructionAborted(evolve(aborted.cause, shadow_stack_busy=True)) from None
            raise
    return SspChange(stack.pointer, outer)


def leave(
    state: CpuState, memory: LinearMemory, cpl: int, *, cs: int, lip: int, long: bool, event: bool = False
) -> SspChange:
    """Return to ``lip`` in ``cs``, code of ``cpl``, 64-bit code if ``long``; with ``event`` from its handler."""
    stack, inner = ShadowStack.of(state, memory), state.cpl
    checks = has_shadow_stack(state)
    returned = state.pl_ssp[3]
    if checks and (cpl != 3 or inner == 3):
        returned = stack.pop_frame(cs, lip, long=long)
    elif checks and stack.pointer & 7:
        raise cp(ControlProtection.FAR_RET_IRET)
    if cpl == inner:
        if not checks:
            return SspChange()
        if event and state.long_mode and returned != stack.pointer and inner != 3:
            free(memory, stack.pointer)
        return SspChange(returned)
    continues = shadow_stack_enabled(state, cpl)
    if continues and not long and returned >> 32:
        raise gp(0)
    if checks:
        free(memory, stack.pointer)
    return SspChange(returned if continues else None)


def leave_user_stack(state: CpuState) -> None:
    """Code that has a shadow stack will be returned to by way of IA32_PL3_SSP."""
    if has_shadow_stack(state):
        state.pl_ssp[3] = _extended(state)


def enter_fast(state: CpuState) -> None:
    """SYSCALL and SYSENTER: the procedure at privilege level 0 has no shadow stack until it takes one."""
    leave_user_stack(state)
    if shadow_stack_enabled(state, 0):
        state.ssp = 0
    expect_endbranch(state, 0)


def leave_fast(state: CpuState) -> None:
    """SYSRET and SYSEXIT, to privilege level 3."""
    if shadow_stack_enabled(state, 3):
        state.ssp = state.pl_ssp[3]
