"""Shadow stacks across a task switch: each task keeps the pointer to its own in its TSS, which must be a 32-bit one.

Spec: SDM Vol. 3, "Task Switching"; SDM Vol. 1, "Shadow Stacks".
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.x86.control_flow import (
    ControlProtection,
    cp,
    expect_endbranch,
    has_shadow_stack,
    shadow_stack_enabled,
    watches_at,
)
from vtx.x86.descriptors import selector_fault
from vtx.x86.linear import LinearMemory, linear_code_address
from vtx.x86.outcome import Vector, gp
from vtx.x86.shadow_stack import ShadowStack, SspChange, free, take
from vtx.x86.state import CpuState

SSP_OFFSET: Final = 104
"""Of the shadow-stack pointer in a 32-bit TSS."""
MINIMUM_LIMIT: Final = 0x6B
_UNCHANGED: Final = SspChange()


@frozen
class Passage:
    """What the task that is left leaves for the one that is entered, as CS, linear address and SSP.

    ``pushed`` are to be pushed on the new shadow stack; ``popped`` came from that of a nested task that returns, whose
    address parts are None where no frame says them. ``left`` is to be committed when the task has been left.
    """

    left: SspChange = _UNCHANGED
    pushed: tuple[int, int, int] | None = None
    popped: tuple[int | None, int | None, int] | None = None


def leave_task(state: CpuState, memory: LinearMemory, cpl: int, rip: int, *, nests: bool, returns: bool) -> Passage:
    """The current task, which goes on at ``rip``, is about to be left for one of ``cpl``.

    ``nests`` for CALL and task gates, ``returns`` for IRET.
    """
    if not has_shadow_stack(state):
        return Passage()
    stack = ShadowStack.of(state, memory)
    if nests:
        if cpl < state.cpl == 3:
            return Passage(SspChange(outer=state.ssp))
        return Passage(pushed=(state.cs.selector, linear_code_address(state, rip), state.ssp))
    if not returns:
        return Passage()
    popped: tuple[int | None, int | None, int] = None, None, state.pl_ssp[3]
    if cpl in (state.cpl, 0, 1, 2):
        ssp, lip, cs = (stack.pop(8) for _ in range(3))
        popped = cs, lip, ssp
    if not stack.user:
        free(memory, stack.pointer)
    return Passage(SspChange(ssp=0), popped=popped)


def enter_task(state: CpuState, memory: LinearMemory, passage: Passage, ssp: int | None) -> None:
    """The registers are those of the new task; ``ssp`` is from its TSS, None if it is returned to."""
    cpl = state.cpl
    if state.virtual_8086 and watches_at(state, cpl):
        raise selector_fault(Vector.TS, state.tr.selector)
    if ssp is None:
        _return(state, passage)
        return
    if shadow_stack_enabled(state, cpl):
        if ssp & 7:
            raise selector_fault(Vector.TS, state.tr.selector)
        if not take(memory, ssp):
            raise gp(0)
        stack = ShadowStack(memory, ssp, cpl == 3)
        if passage.pushed is not None:
            stack.push_frame(*passage.pushed)
        state.ssp = stack.pointer
    expect_endbranch(state, cpl)


def _return(state: CpuState, passage: Passage) -> None:
    if passage.popped is None:
        return
    cs, lip, ssp = passage.popped
    if cs is not None and (cs != state.cs.selector or lip != linear_code_address(state, state.rip)):
        raise cp(ControlProtection.FAR_RET_IRET)
    if shadow_stack_enabled(state, state.cpl):
        if ssp & 3 or ssp >> 32:
            raise cp(ControlProtection.FAR_RET_IRET)
        state.ssp = ssp
