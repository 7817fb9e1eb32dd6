"""Branch records: the last branch, and the last one before an exception or interrupt.

A record of one entry, as the P6 family and AMD processors have it; addresses are offsets into the code segment.
Recording follows a look at each instruction (`vtx.x86.watch`) and costs nothing while IA32_DEBUGCTL.LBR is clear.

Spec: SDM Vol. 3B, "Monitoring Branches, Exceptions, and Interrupts", "Single-Stepping on Branches".
"""

from __future__ import annotations

from typing import Final

from attrs import evolve

from vtx.x86.event import Event, EventKind
from vtx.x86.state import CpuState, Rflags

LBR: Final = 1 << 0  # of IA32_DEBUGCTL: record branches
BTF: Final = 1 << 1  # single-step on branches
_TF: Final = int(Rflags.TF)


def are_watched(state: CpuState) -> bool:
    """Whether each instruction must be looked at: branches are recorded, or single-stepping is on branches."""
    return bool(state.debugctl & LBR) or bool(state.debugctl & BTF and state.rflags & _TF)


def record(state: CpuState, origin: int) -> None:
    """A branch from ``origin`` has led to RIP."""
    state.last_branch = evolve(state.last_branch, from_ip=origin, to_ip=state.rip)


def record_event(state: CpuState, event: Event, origin: int) -> None:
    """Delivery of ``event`` at ``origin`` has led to RIP: a branch too. Only INT n is a branch like any other."""
    last = state.last_branch
    if event.kind is not EventKind.SOFTWARE_INTERRUPT:
        state.last_branch = evolve(last, exception_from_ip=last.from_ip, exception_to_ip=last.to_ip)
    record(state, origin)
