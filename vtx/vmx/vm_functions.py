"""VMFUNC: operations that a guest may have the processor perform without a VM exit. There is one, EPTP switching.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "VM Functions", "General Operation of the VMFUNC Instruction".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vtx.vmx.exit import perform_exit
from vtx.vmx.operation import VmxOperation
from vtx.vmx.outcome import COMPLETED, Outcome
from vtx.vmx.record import VmExit
from vtx.vmx.translation import second_level_of
from vtx.x86.decode import Instruction
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import MASK32

_UD: Final = Fault(Vector.UD)
_FUNCTIONS: Final = 64
_EPTP_LIST_ENTRIES: Final = 512


def vmfunc(operation: VmxOperation, function: int, index: int, instruction: Instruction | None) -> Outcome:
    """VMFUNC with EAX = ``function`` and ECX = ``index``, at any privilege level; ``instruction`` is for its length."""
    view = operation.view
    function &= MASK32
    if view is None or not view.secondary & c.ENABLE_VM_FUNCTIONS.mask or function >= _FUNCTIONS:
        return _UD
    enabled = operation.current_vmcs[f.VM_FUNCTION_CONTROLS] >> function & 1
    if enabled and function == f.EPTP_SWITCHING and _switch(operation, index & MASK32):
        return COMPLETED
    length = instruction.length if instruction else 0
    return perform_exit(operation, VmExit(Reason.VMFUNC, instruction_length=length, resume_flag=0))


def _switch(operation: VmxOperation, index: int) -> bool:
    """EPTP switching to entry ``index`` of the list; False if there is no such entry or VM entry would refuse it."""
    active, view, processor = operation.current, operation.view, operation.processor
    assert active is not None and view is not None
    vmcs = active.vmcs
    if index >= _EPTP_LIST_ENTRIES:
        return False
    eptp = processor.memory.read_u64(vmcs[f.EPTP_LIST_ADDRESS] + 8 * index)
    if not operation.eptp_is_valid(eptp):
        return False
    vmcs[f.EPT_POINTER] = view.eptp = eptp
    if view.secondary & c.EPT_VIOLATION_VE.mask:
        vmcs[f.EPTP_INDEX] = index
    active.second_level = second_level_of(operation, vmcs, view)
    # Mappings are tagged by the EPTP, so none has to go.
    processor.mmu.vm_transition(processor.state, active.second_level, view.vpid, flush=False)
    return True
