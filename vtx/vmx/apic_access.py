"""The APIC-access page: which accesses are virtualized, which cause a VM exit, and with what qualification.

The MMU refuses every access to the page. A virtualized one is then made after all, on the virtual-APIC page (see
`vtx.x86.reserved_page`).

Interpretations. An access that both reads and writes exits as a write. Of two operands on the page the second exits,
even if it is the same bytes. A page that is part of a larger one is treated as any other. The instruction length is
recorded, because hypervisors use it. Accesses of instructions that the model itself executes always exit.

Spec: SDM Vol. 3, "APIC Virtualization and Virtual Interrupts", "Virtualizing Memory-Mapped APIC Accesses"; "VM Exits",
"Exit Qualification for APIC-Access VM Exits from Linear Accesses and Guest-Physical Accesses".
"""

from __future__ import annotations

from functools import partial
from typing import Final

from vmcs.exits import Reason
from vmcs.qualifications import ApicAccessType, apic_access
from vtx.addresses import PAGE_OFFSET_MASK, LinearAddress
from vtx.vmx import ipi_virtualization
from vtx.vmx.exit import perform_exit
from vtx.vmx.operation import VmxOperation
from vtx.vmx.record import VmExit
from vtx.vmx.virtual_apic import VEOI, VICR_LOW, VTPR, VirtualApic
from vtx.x86 import reserved_page
from vtx.x86.event import Event
from vtx.x86.outcome import InstructionAborted
from vtx.x86.reserved_page import Hit
from vtx.x86.second_level import AccessKind, ReservedPageAccess
from vtx.x86.virtualization import RefusedInstruction

_LARGEST: Final = 4  # bytes of a virtualized access


def _registers(*ranges: tuple[int, int]) -> frozenset[int]:
    return frozenset(offset for first, last in ranges for offset in range(first, last + 1, 0x10))


_READABLE: Final = _registers(
    (0x020, 0x030), (0x080, 0x080), (0x0B0, 0x0B0), (0x0D0, 0x0F0), (0x100, 0x280), (0x300, 0x380), (0x3E0, 0x3E0)
)
"""Registers whose reads APIC-register virtualization virtualizes."""

_WRITABLE: Final = _registers(
    (0x020, 0x020), (0x080, 0x080), (0x0B0, 0x0B0), (0x0D0, 0x0F0), (0x280, 0x280), (0x300, 0x380), (0x3E0, 0x3E0)
)
"""Registers whose writes APIC-register virtualization virtualizes."""

_TYPES: Final = {
    AccessKind.READ: ApicAccessType.LINEAR_READ,
    AccessKind.WRITE: ApicAccessType.LINEAR_WRITE,
    AccessKind.EXECUTE: ApicAccessType.LINEAR_FETCH,
}


def _fits(offset: int, size: int) -> bool:
    """Whether the access is within the low 4 bytes of a 16-byte register."""
    return size <= _LARGEST and offset % 16 + size <= _LARGEST


def virtualizes_read(apic: VirtualApic, offset: int, size: int) -> bool:
    """Whether a data read of ``size`` bytes at ``offset`` of the page is virtualized.

    Spec: "Virtualizing Reads from the APIC-Access Page".
    """
    if not apic.register_virtualization:
        return offset == VTPR and size <= _LARGEST
    return _fits(offset, size) and offset & ~0xF in _READABLE


def virtualizes_write(apic: VirtualApic, offset: int, size: int) -> bool:
    """Whether a data write of ``size`` bytes at ``offset`` of the page is virtualized.

    Spec: "Virtualizing Writes to the APIC-Access Page".
    """
    if apic.register_virtualization:
        return _fits(offset, size) and offset & ~0xF in _WRITABLE
    if offset == VICR_LOW:
        return size <= _LARGEST and (apic.interrupt_delivery or apic.ipi_virtualization)
    return size <= _LARGEST and (offset == VTPR or (apic.interrupt_delivery and offset == VEOI))


def access_exit(operation: VmxOperation, access: ReservedPageAccess, delivering: Event | None) -> VmExit:
    """The APIC-access VM exit of ``access``, which was made while ``delivering`` an event or by an instruction.

    Without a linear address it is a guest-physical access, whose offset the manual leaves undefined.
    """
    kind = ApicAccessType.LINEAR_EVENT_DELIVERY if delivering else _TYPES[access.kind]
    if access.linear is None:
        kind = ApicAccessType.GUEST_PHYSICAL_FETCH_OR_DATA
        if delivering:
            kind = ApicAccessType.GUEST_PHYSICAL_EVENT_DELIVERY
    offset = 0 if access.linear is None else access.linear & PAGE_OFFSET_MASK
    record = VmExit(Reason.APIC_ACCESS, apic_access(offset, kind), resume_flag=1)
    if delivering is None and not access.asynchronous and access.kind is not AccessKind.EXECUTE:
        record.instruction_length = _instruction_length(operation)
    return record


def _instruction_length(operation: VmxOperation) -> int | None:
    """Length of the instruction at RIP; None if another processor has changed it meanwhile."""
    try:
        instruction = operation.processor.fetch()
    except InstructionAborted:
        return None
    return instruction.length if instruction else None


def virtualize(operation: VmxOperation, refused: RefusedInstruction, access: ReservedPageAccess) -> None:
    """An instruction that the engine executes met the APIC-access page: virtualize its access, or exit."""
    apic, processor = operation.virtual_apic, operation.processor
    found = [] if access.kind is AccessKind.EXECUTE else reserved_page.hits(processor, refused)
    if found:
        exiting: Hit | None = found[0]
        if apic is not None:
            reads, writes = partial(virtualizes_read, apic), partial(virtualizes_write, apic)
            exiting = reserved_page.not_allowed(found, reads, writes)
            if exiting is None:
                _perform(operation, apic, refused, found[0])
                return
        assert exiting is not None
        access = ReservedPageAccess(access.guest_physical, LinearAddress(exiting.linear), exiting.kind)
    perform_exit(operation, access_exit(operation, access, delivering=None))


def _perform(operation: VmxOperation, apic: VirtualApic, refused: RefusedInstruction, hit: Hit) -> None:
    """Execute the instruction at RIP with its access to the APIC-access page made to the virtual-APIC page."""
    if reserved_page.perform(operation.processor, refused, hit, apic.page) and hit.operand.writes:
        record = apic.register_written(hit.operand.linear & PAGE_OFFSET_MASK)
        if record is not None:
            record = ipi_virtualization.virtualize(operation, apic, record, x2apic=False)
        if record is not None:
            perform_exit(operation, record)
