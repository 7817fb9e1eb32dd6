"""Guest mode and system-management interrupts that are not intercepted: an SMI leaves guest mode, RSM returns to it.

The guest's control block is not written, and its intercepts do not act while the handler runs.

Spec: APM Vol. 2, "SMM Support" (Secure Virtual Machine), "SMRAM State-Save Area".
"""

from __future__ import annotations

from vtx.svm import avic
from vtx.svm.nested_paging import NestedPaging
from vtx.svm.operation import SvmOperation
from vtx.svm.vmrun import second_level_of
from vtx.x86.state import CpuState
from vtx.x86.virtualization import SmmSuspension


def suspend(operation: SvmOperation) -> SmmSuspension | None:
    """Leave guest mode for SMM; None if the processor is not in guest mode."""
    if not operation.guest_mode:
        return None
    mmu, state = operation.processor.mmu, operation.processor.state
    nested = mmu.second_level
    host_cr4, host_efer = (nested.host_cr4, nested.host_efer) if isinstance(nested, NestedPaging) else (0, 0)
    suspended = (mmu.asid, host_cr4, host_efer, int(state.popf_intercepted))
    operation.guest_mode = state.popf_intercepted = False
    avic.stop(operation)
    return SmmSuspension(suspended, {"SVM guest": 1, "guest VMCB": operation.address})


def resume(operation: SvmOperation, suspended: tuple[int, ...]) -> None:
    """Return to guest mode as `suspend` left it; RSM has restored the registers and invalidated translations."""
    processor = operation.processor
    asid, host_cr4, host_efer, popf_intercepted = suspended
    operation.guest_mode, processor.state.popf_intercepted = True, bool(popf_intercepted)
    avic.start(operation)
    second_level = second_level_of(operation, CpuState(cr4=host_cr4, efer=host_efer))
    processor.mmu.vm_transition(processor.state, second_level, asid, flush=True)
