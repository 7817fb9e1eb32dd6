"""RDMSR and WRMSR of IA32_SPEC_CTRL as a guest sees it: a shadow, and a mask of bits that stay the host's.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "Changes to Instruction Behavior in VMX Non-Root Operation" (RDMSR, WRMSR);
"Fields Controlling Virtualization of the IA32_SPEC_CTRL MSR".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vtx.vmx.apic_instructions import is_virtual_register
from vtx.vmx.execution import complete
from vtx.vmx.operation import VmxOperation
from vtx.x86.decode import Instruction
from vtx.x86.msr_table import IA32_SPEC_CTRL
from vtx.x86.operations import Operation, ReadMsr, ReadMsrList, WriteMsr, WriteMsrList
from vtx.x86.outcome import NotModelled, gp
from vtx.x86.state import MASK32, Gpr

_VIRTUALIZE: Final = c.VIRTUALIZE_IA32_SPEC_CTRL.mask


def virtualize(operation: VmxOperation, action: Operation, instruction: Instruction) -> bool:
    """Carry out ``action``, which does not exit, if it accesses an MSR that is virtualized; whether it did."""
    match action:
        case ReadMsr(index=index):
            value = read(operation, index)
            if value is None:
                return False
            gpr = operation.processor.state.gpr
            gpr[Gpr.RAX], gpr[Gpr.RDX] = value & MASK32, value >> 32
        case WriteMsr(index=index, value=value):
            written = write(operation, index, value)
            if written is None:
                return False
            if not written:
                raise gp(0)
        case ReadMsrList(index=index) | WriteMsrList(index=index):
            if _is_virtualized(operation, index) or is_virtual_register(operation, index):
                raise NotModelled("RDMSRLIST or WRMSRLIST of an MSR that is virtualized")
            return False
        case _:
            return False
    complete(operation.processor.state, instruction)
    return True


def read(operation: VmxOperation, index: int) -> int | None:
    """What a guest reads from MSR ``index``; None if it is not virtualized."""
    if not _is_virtualized(operation, index):
        return None
    return operation.current_vmcs[f.IA32_SPEC_CTRL_SHADOW]


def write(operation: VmxOperation, index: int, value: int) -> bool | None:
    """A guest's write of ``value`` to MSR ``index``: False for a general-protection fault, None if not virtualized."""
    if not _is_virtualized(operation, index):
        return None
    vmcs, msrs = operation.current_vmcs, operation.processor.msrs
    mask = vmcs[f.IA32_SPEC_CTRL_MASK]
    if not msrs.write(IA32_SPEC_CTRL, (msrs.read(IA32_SPEC_CTRL) or 0) & mask | value & ~mask):
        return False
    vmcs[f.IA32_SPEC_CTRL_SHADOW] = value
    return True


def _is_virtualized(operation: VmxOperation, index: int) -> bool:
    view = operation.view
    return index == IA32_SPEC_CTRL and view is not None and bool(view.tertiary & _VIRTUALIZE)
