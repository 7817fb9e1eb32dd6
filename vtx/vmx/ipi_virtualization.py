"""IPI virtualization: a guest's interprocessor interrupt goes into the posted-interrupt descriptor of its destination.

Interpretations. In x2APIC mode, a write of reserved bits to the virtual ICR is a general-protection exception. The
notification is sent in the mode in which the local APIC is: with 8 bits of destination, or 32.

Spec: SDM Vol. 3, "APIC Virtualization and Virtual Interrupts", "IPI Virtualization".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vtx.vmx.operation import VmxOperation
from vtx.vmx.record import VmExit
from vtx.vmx.virtual_apic import VICR_HIGH, VICR_LOW, VirtualApic
from vtx.x86.msr_table import APIC_BASE_EXTD, IA32_APIC_BASE

_CONTROL: Final = c.IPI_VIRTUALIZATION.mask
# What a virtualized IPI has: no shorthand, edge-triggered, physical, fixed, a vector that is no exception's.
_MUST_BE_0: Final = 0xFFF3_0000 | 3 << 18 | 1 << 15 | 1 << 13 | 1 << 12 | 1 << 11 | 7 << 8
_CLASS: Final = 0xF0
# A PID-pointer-table entry.
_VALID: Final = 1
_RESERVED: Final = 0x3E
# The posted-interrupt descriptor, behind the 256 bits of requests.
_NOTIFICATION_INFORMATION: Final = 32
_OUTSTANDING: Final = 1 << 0
_SUPPRESS: Final = 1 << 1
_VECTOR_SHIFT: Final = 16
_DESTINATION_SHIFT: Final = 32


def virtualize(operation: VmxOperation, apic: VirtualApic, record: VmExit, *, x2apic: bool) -> VmExit | None:
    """What comes of the APIC-write VM exit ``record``: nothing, if it is of the ICR and the IPI is virtualized."""
    view = operation.view
    if view is None or not view.tertiary & _CONTROL or record.reason != Reason.APIC_WRITE:
        return record
    if record.qualification & ~3 != VICR_LOW:
        return record
    command, high = apic.read(VICR_LOW), apic.read(VICR_LOW + 4 if x2apic else VICR_HIGH)
    if command & _MUST_BE_0 or not command & _CLASS:
        return record
    descriptor = _descriptor(operation, high if x2apic else high >> 24)
    if descriptor is None:
        return record
    _post(operation, descriptor, command & 0xFF)
    return None


def _descriptor(operation: VmxOperation, destination: int) -> int | None:
    """Address of the posted-interrupt descriptor of the virtual processor with APIC ID ``destination``."""
    vmcs, processor = operation.current_vmcs, operation.processor
    if destination > vmcs[f.LAST_PID_POINTER_INDEX]:
        return None
    pointer = processor.memory.read_u64(vmcs[f.PID_POINTER_TABLE_ADDRESS] + 8 * destination)
    if not pointer & _VALID or pointer & _RESERVED or pointer >> processor.profile.physical_address_width:
        return None
    return pointer & ~(_VALID | _RESERVED)


def _post(operation: VmxOperation, descriptor: int, vector: int) -> None:
    """Request ``vector`` in the descriptor, and notify the processor it names unless that was done or is suppressed."""
    processor = operation.processor
    memory = processor.memory
    byte = descriptor + (vector >> 3)
    memory.write_u8(byte, memory.read_u8(byte) | 1 << (vector & 7))
    place = descriptor + _NOTIFICATION_INFORMATION
    information = memory.read_u64(place)
    if information & (_OUTSTANDING | _SUPPRESS):
        return
    memory.write_u64(place, information | _OUTSTANDING)
    destination = information >> _DESTINATION_SHIFT
    if not (processor.msrs.read(IA32_APIC_BASE) or 0) & APIC_BASE_EXTD:
        destination = destination >> 8 & 0xFF
    processor.send_interrupt(information >> _VECTOR_SHIFT & 0xFF, destination)
