"""Control-flow enforcement: what is enabled at a privilege level, and the tracker of indirect branches.

IA32_U_CET rules privilege level 3, IA32_S_CET all others. The tracker is a bit of them: after an indirect branch, the
next instruction must be ENDBR32 or ENDBR64.

Spec: SDM Vol. 1, "Control-Flow Enforcement Technology (CET)", "Shadow Stacks", "Indirect Branch Tracking".
"""

from __future__ import annotations

import enum
from typing import Final

from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Cr4

SH_STK_EN: Final = 1 << 0
WR_SHSTK_EN: Final = 1 << 1
ENDBR_EN: Final = 1 << 2
LEG_IW_EN: Final = 1 << 3
NO_TRACK_EN: Final = 1 << 4
SUPPRESS_DIS: Final = 1 << 5
SUPPRESS: Final = 1 << 10
TRACKER: Final = 1 << 11
"""Set while the tracker waits for ENDBR32 or ENDBR64."""
EB_LEG_BITMAP_BASE: Final = ((1 << 64) - 1) & ~0xFFF

_CET: Final = int(Cr4.CET)


class ControlProtection(enum.IntEnum):
    """Error code of #CP (SDM Vol. 3, "Interrupt 21—Control Protection Exception (#CP)")."""

    NEAR_RET = 1
    FAR_RET_IRET = 2
    ENDBRANCH = 3
    RSTORSSP = 4
    SETSSBSY = 5


def cp(cause: ControlProtection) -> InstructionAborted:
    """A control-protection fault, ready to raise."""
    return InstructionAborted(Fault(Vector.CP, int(cause)))


def _enabled(state: CpuState, cpl: int, bits: int) -> bool:
    """Whether all of ``bits`` are set for code of ``cpl`` in protected mode, virtual-8086 mode apart."""
    if not state.cr4 & _CET or not state.protected:
        return False
    return (state.u_cet if cpl == 3 else state.s_cet) & bits == bits


def shadow_stack_enabled(state: CpuState, cpl: int) -> bool:
    """Whether code of ``cpl``, other than in virtual-8086 mode, has a shadow stack."""
    return _enabled(state, cpl, SH_STK_EN)


def has_shadow_stack(state: CpuState) -> bool:
    """Whether the running code has one."""
    return _enabled(state, state.cpl, SH_STK_EN) and not state.virtual_8086


def may_write_shadow_stack(state: CpuState) -> bool:
    """Whether the running code may use WRSS."""
    return _enabled(state, state.cpl, SH_STK_EN | WR_SHSTK_EN) and not state.virtual_8086


def watches_at(state: CpuState, cpl: int) -> bool:
    """Whether near branches of code of ``cpl`` mean more than they do without control-flow enforcement."""
    return _enabled(state, cpl, SH_STK_EN) or _enabled(state, cpl, ENDBR_EN)


def watches_branches(state: CpuState) -> bool:
    """The same of the running code."""
    return bool(state.cr4 & _CET) and watches_at(state, state.cpl) and not state.virtual_8086


def watches_next(state: CpuState) -> bool:
    """Whether it matters to the tracker what the next instruction is."""
    if not state.cr4 & _CET or not state.protected or state.virtual_8086:
        return False
    control = state.u_cet if state.cpl == 3 else state.s_cet
    return bool(control & ENDBR_EN and control & (TRACKER | SUPPRESS))


def tracked(state: CpuState) -> int:
    """The control that rules the running code."""
    return state.u_cet if state.cpl == 3 else state.s_cet


def _set(state: CpuState, cpl: int, value: int) -> None:
    if cpl == 3:
        state.u_cet = value
    else:
        state.s_cet = value


def expect_endbranch(state: CpuState, cpl: int) -> None:
    """A far transfer or an event has led to code of ``cpl``, which begins with ENDBR32 or ENDBR64 if it is tracked."""
    if _enabled(state, cpl, ENDBR_EN):
        _set(state, cpl, ((state.u_cet if cpl == 3 else state.s_cet) | TRACKER) & ~SUPPRESS)


def reset_tracker(state: CpuState) -> None:
    """Code of privilege level 0 begins with whatever it likes: FRED has led to it."""
    if _enabled(state, 0, ENDBR_EN):
        state.s_cet &= ~(TRACKER | SUPPRESS)


def resume_tracker(state: CpuState) -> None:
    """A return goes back to code of privilege level 0 whose tracker waited, unless it was made to rest meanwhile."""
    if _enabled(state, 0, ENDBR_EN) and not state.s_cet & SUPPRESS:
        state.s_cet |= TRACKER


def near_branch(state: CpuState, *, no_track: bool) -> None:
    """The running code has made an indirect near branch; ``no_track`` is its prefix 3EH."""
    control = tracked(state)
    if not _enabled(state, state.cpl, ENDBR_EN) or state.virtual_8086 or control & SUPPRESS:
        return
    if not (no_track and control & NO_TRACK_EN):
        _set(state, state.cpl, control | TRACKER)


def settle(state: CpuState, *, suppress: bool = False) -> None:
    """The tracker has what it waited for; with ``suppress``, it got something else for which it is made to rest."""
    control = tracked(state) & ~(TRACKER | SUPPRESS)
    _set(state, state.cpl, control | SUPPRESS if suppress and not control & SUPPRESS_DIS else control)
