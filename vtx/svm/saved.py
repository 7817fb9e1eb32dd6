"""The SVM state of a logical processor, saved and restored for snapshots.

The control block is in memory, but for a running guest what VMRUN read of it counts, and the host's paging mode as it
was then: nested paging follows that.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from vmcs.vmcb.fields import Vmcb
from vtx.svm.avic import Avic
from vtx.svm.nested_paging import NestedPaging
from vtx.svm.svm import Svm
from vtx.svm.vmrun import second_level_of
from vtx.x86.second_level import IdentitySecondLevel, SecondLevel
from vtx.x86.state import CpuState


@frozen
class SavedSvm:
    """Guest mode. The names are those of the attributes of `SvmOperation`.

    With nested paging, ``host_cr4`` and ``host_efer`` are those of the host at VMRUN, and ``structures`` is where guest
    page tables have been found since. ``virtual_interrupt`` is whether AVIC has recognized an interrupt.
    """

    guest_mode: bool
    address: int
    vmcb: tuple[int, ...]
    intercepts: int
    host_if: bool
    host_nmi_blocked: bool
    host_pat: int
    host_branches: tuple[int, ...] | None
    tsc_ratio: int
    pauses: int
    last_pause: int | None
    smi_pending: bool
    cached: int | None
    transitions: int
    host_cr4: int
    host_efer: int
    structures: Mapping[int, int]
    virtual_interrupt: bool


def save_svm(svm: Svm) -> SavedSvm:
    """The state of ``svm``, between two instructions."""
    operation = svm.operation
    nested = operation.processor.mmu.second_level
    return SavedSvm(
        guest_mode=operation.guest_mode,
        address=operation.address,
        vmcb=tuple(operation.vmcb.values),
        intercepts=operation.intercepts,
        host_if=operation.host_if,
        host_nmi_blocked=operation.host_nmi_blocked,
        host_pat=operation.host_pat,
        host_branches=operation.host_branches,
        tsc_ratio=operation.tsc_ratio,
        pauses=operation.pauses,
        last_pause=operation.last_pause,
        smi_pending=operation.smi_pending,
        cached=operation.cached,
        transitions=operation.transitions,
        host_cr4=nested.host_cr4 if isinstance(nested, NestedPaging) else 0,
        host_efer=nested.host_efer if isinstance(nested, NestedPaging) else 0,
        structures=dict(nested.structures) if isinstance(nested, NestedPaging) else {},
        virtual_interrupt=operation.avic is not None and operation.avic.pending,
    )


def restore_svm(svm: Svm, saved: SavedSvm) -> None:
    """Put ``svm`` and the second level of its processor's MMU back."""
    operation = svm.operation
    operation.guest_mode = saved.guest_mode
    operation.address = saved.address
    operation.vmcb = Vmcb(list(saved.vmcb))
    operation.intercepts = saved.intercepts
    operation.host_if, operation.host_nmi_blocked = saved.host_if, saved.host_nmi_blocked
    operation.host_pat, operation.host_branches = saved.host_pat, saved.host_branches
    operation.tsc_ratio = saved.tsc_ratio
    operation.pauses, operation.last_pause = saved.pauses, saved.last_pause
    operation.smi_pending = saved.smi_pending
    operation.cached = saved.cached
    operation.transitions = saved.transitions
    operation.last_failure = operation.block = operation.host = None
    operation.avic = None
    if saved.guest_mode and operation.uses_avic:
        operation.avic = Avic(operation)
        operation.avic.pending = saved.virtual_interrupt
    second_level: SecondLevel = IdentitySecondLevel()
    if saved.guest_mode:
        second_level = second_level_of(operation, CpuState(cr4=saved.host_cr4, efer=saved.host_efer))
    if isinstance(second_level, NestedPaging):
        second_level.structures.update(saved.structures)
    operation.processor.mmu.second_level = second_level
