"""Virtualization exceptions (#VE): EPT violations that the guest handles itself.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "Virtualization Exceptions".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vtx.vmx.ept import EptViolation
from vtx.vmx.operation import VmxOperation
from vtx.x86.event import Event
from vtx.x86.second_level import SecondLevelFault
from vtx.x86.state import MASK32, Cr0

# Offsets in the virtualization-exception information area.
_EXIT_REASON: Final = 0
_BUSY: Final = 4
_QUALIFICATION: Final = 8
_LINEAR: Final = 16
_PHYSICAL: Final = 24
_EPTP_INDEX: Final = 32

_PE: Final = int(Cr0.PE)


def convert(operation: VmxOperation, fault: SecondLevelFault, delivering: Event | None) -> bool:
    """Whether ``fault`` is to be a virtualization exception; its information area is then filled in."""
    view, processor = operation.view, operation.processor
    if view is None or not view.secondary & c.EPT_VIOLATION_VE.mask:
        return False
    if not isinstance(fault, EptViolation) or fault.suppressed or delivering is not None:
        return False
    vmcs, memory = operation.current_vmcs, processor.memory
    area = vmcs[f.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS]
    if not processor.state.cr0 & _PE or memory.read_u32(area + _BUSY):
        return False
    memory.write_u32(area + _EXIT_REASON, Reason.EPT_VIOLATION)
    memory.write_u32(area + _BUSY, MASK32)
    memory.write_u64(area + _QUALIFICATION, fault.complete_qualification)
    memory.write_u64(area + _LINEAR, fault.linear or 0)
    memory.write_u64(area + _PHYSICAL, fault.guest_physical)
    memory.write_u16(area + _EPTP_INDEX, vmcs[f.EPTP_INDEX])
    return True
