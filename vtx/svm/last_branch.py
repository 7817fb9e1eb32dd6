"""Virtualization of the last-branch record: a guest with it has DebugCtl and the four record MSRs to itself.

Spec: APM Vol. 2, "Last Branch Record Virtualization".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmcs.vmcb import layouts
from vtx.svm import control_block
from vtx.svm import places as at
from vtx.x86.state import CpuState, LastBranch

if TYPE_CHECKING:
    from vtx.svm.operation import SvmOperation


def is_virtualized(operation: SvmOperation) -> bool:
    """Whether the running guest has a last-branch record of its own."""
    return operation.features.lbr_virtualization and bool(
        operation.vmcb.values[at.EXTENSIONS] & layouts.LBR_VIRTUALIZATION
    )


def swap_in(operation: SvmOperation) -> None:
    """At VMRUN: put the host's record aside, load the guest's."""
    operation.host_branches = None
    if is_virtualized(operation):
        state, values = operation.processor.state, operation.vmcb.values
        operation.host_branches = _record(state)
        _load(state, values[at.DBGCTL : at.DBGCTL + at.LAST_BRANCH_FIELDS])


def swap_out(operation: SvmOperation) -> None:
    """At #VMEXIT: store the guest's record, load the host's."""
    if operation.host_branches is None:
        return
    state, values = operation.processor.state, operation.vmcb.values
    values[at.DBGCTL : at.DBGCTL + at.LAST_BRANCH_FIELDS] = _record(state)
    control_block.write(operation.processor.memory, operation.address, values, (control_block.LAST_BRANCH,))
    _load(state, operation.host_branches)


def _record(state: CpuState) -> tuple[int, ...]:
    """DebugCtl and the record, in the order of the fields of the VMCB."""
    last = state.last_branch
    return state.debugctl, last.from_ip, last.to_ip, last.exception_from_ip, last.exception_to_ip


def _load(state: CpuState, values: Sequence[int]) -> None:
    state.debugctl, *record = values
    state.last_branch = LastBranch(*record)
