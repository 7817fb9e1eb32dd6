"""Virtualization of the last-branch record: a guest with it has DebugCtl and the four record MSRs to itself.

Spec: APM Vol. 2, "Last Branch Record Virtualization".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmcs.vmcb import layouts
from vtx.svm import control_block
from vtx.svm import places as at
from vtx.x86.msr_table import IA32_DEBUGCTL

if TYPE_CHECKING:
    from vtx.svm.operation import SvmOperation

# In the order of the fields from DBGCTL on.
RECORD_MSRS: Final = (IA32_DEBUGCTL, 0x1DB, 0x1DC, 0x1DD, 0x1DE)


def is_virtualized(operation: SvmOperation) -> bool:
    """Whether the running guest has a last-branch record of its own."""
    return operation.features.lbr_virtualization and bool(
        operation.vmcb.values[at.EXTENSIONS] & layouts.LBR_VIRTUALIZATION
    )


def swap_in(operation: SvmOperation) -> None:
    """At VMRUN: put the host's record aside, load the guest's."""
    operation.host_branches = None
    if is_virtualized(operation):
        msrs, values = operation.processor.msrs.values, operation.vmcb.values
        operation.host_branches = tuple(msrs[index] for index in RECORD_MSRS)
        for place, index in enumerate(RECORD_MSRS, at.DBGCTL):
            msrs[index] = values[place]


def swap_out(operation: SvmOperation) -> None:
    """At #VMEXIT: store the guest's record, load the host's."""
    if operation.host_branches is None:
        return
    msrs, values = operation.processor.msrs.values, operation.vmcb.values
    for place, index in enumerate(RECORD_MSRS, at.DBGCTL):
        values[place] = msrs[index]
    control_block.write(operation.processor.memory, operation.address, values, (control_block.LAST_BRANCH,))
    msrs.update(zip(RECORD_MSRS, operation.host_branches, strict=True))
