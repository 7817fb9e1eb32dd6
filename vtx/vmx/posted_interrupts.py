"""Posted-interrupt processing: interrupts for the guest that others leave in a descriptor in memory.

Spec: SDM Vol. 3, "APIC Virtualization and Virtual Interrupts", "Posted-Interrupt Processing".
"""

from __future__ import annotations

from typing import Final

from vmcs import fields as f
from vtx.vmx.operation import VmxOperation

_VECTOR: Final = f.POSTED_INTERRUPT_NOTIFICATION_VECTOR.encoding
_DESCRIPTOR: Final = f.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS.encoding
_REQUESTS_SIZE: Final = 32  # bytes: one bit for each vector
_OUTSTANDING_NOTIFICATION: Final = 1  # in the byte after the requests


def is_notification(operation: VmxOperation, vector: int) -> bool:
    """Whether the external interrupt just acknowledged says that interrupts have been posted."""
    return vector == operation.current_vmcs.values[_VECTOR]


def process_posted(operation: VmxOperation) -> None:
    """Move the posted requests to the virtual-APIC page; the notification is dismissed from the local APIC."""
    apic, processor = operation.virtual_apic, operation.processor
    assert apic is not None, "VM entry checks that there is a TPR shadow"
    descriptor = operation.current_vmcs.values[_DESCRIPTOR]
    flags = descriptor + _REQUESTS_SIZE
    processor.memory.write_u8(flags, processor.memory.read_u8(flags) & ~_OUTSTANDING_NOTIFICATION)
    processor.end_of_interrupt()
    requests = int.from_bytes(processor.memory.read(descriptor, _REQUESTS_SIZE), "little")
    processor.memory.write(descriptor, bytes(_REQUESTS_SIZE))
    apic.post(requests)
