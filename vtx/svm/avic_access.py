"""A guest's accesses to the registers of its virtual APIC: in memory, by MSRs in x2AVIC mode, and by CR8.

Interpretations. A register is its low 4 bytes: an access beyond them, or of more, exits before it is made. Fetches of
code and accesses by event delivery exit likewise. In x2AVIC mode, reserved bits, writes of other values than 0 to EOI
and ESR, any write of the APIC ID, reads of SELF IPI, and MSRs that no register has are general-protection exceptions;
other writes of read-only registers exit.

Spec: APM Vol. 2, "Virtual APIC Register Accesses", "VMCB Changes for AVIC", "x2AVIC".
"""

from __future__ import annotations

from typing import Final

from vmcs.bits import MASK64
from vmcs.vmcb import avic as data
from vmcs.vmcb import layouts
from vmcs.vmcb.avic import Behavior, behavior
from vtx.addresses import PAGE_OFFSET_MASK
from vtx.svm import avic_ipi
from vtx.svm import places as at
from vtx.svm.avic import Avic, not_accelerated
from vtx.svm.operation import SvmOperation
from vtx.svm.record import Vmexit
from vtx.svm.vmexit import perform_exit
from vtx.x86 import apic_page, reserved_page
from vtx.x86.outcome import gp
from vtx.x86.second_level import AccessKind, ReservedPageAccess
from vtx.x86.state import MASK32, Gpr
from vtx.x86.virtualization import RefusedInstruction

_REGISTER: Final = 4  # bytes


def access_exit(access: ReservedPageAccess) -> Vmexit:
    """The exit of an access to the APIC page that cannot be made."""
    return not_accelerated(access.guest_physical & PAGE_OFFSET_MASK, write=access.kind is AccessKind.WRITE)


def virtualize(operation: SvmOperation, refused: RefusedInstruction, access: ReservedPageAccess) -> None:
    """An instruction that the engine executes met the APIC page: make its access on the backing page, or exit."""
    processor, avic = operation.processor, operation.avic
    assert avic is not None
    found = [] if access.kind is AccessKind.EXECUTE else reserved_page.hits(processor, refused)
    if not found:
        perform_exit(operation, access_exit(access))
        return
    exiting = reserved_page.not_allowed(found, _reads, _writes)
    if exiting is not None:
        offset = exiting.linear & PAGE_OFFSET_MASK
        write = exiting.kind is AccessKind.WRITE and not (exiting.operand.reads and not _reads(offset, _REGISTER))
        perform_exit(operation, not_accelerated(offset, write=write))
    elif reserved_page.perform(processor, refused, found[0], avic.page) and found[0].operand.writes:
        _exit_if(operation, _written(avic, found[0].operand.linear & PAGE_OFFSET_MASK))


def _exit_if(operation: SvmOperation, record: Vmexit | None) -> None:
    if record is not None:
        perform_exit(operation, record)


def _reads(offset: int, size: int) -> bool:
    return offset % 16 + size <= _REGISTER and behavior(offset & ~0xF, write=False) is not Behavior.FAULT


def _writes(offset: int, size: int) -> bool:
    return offset % 16 + size <= _REGISTER and behavior(offset & ~0xF, write=True) is not Behavior.FAULT


def _written(avic: Avic, offset: int) -> Vmexit | None:
    """What follows a write to ``offset`` of the backing page."""
    register = offset & ~0xF
    if behavior(register, write=True) is Behavior.TRAP:
        return not_accelerated(register, write=True)
    if register == apic_page.TPR:
        avic.task_priority_written()
    elif register == apic_page.EOI:
        return avic.end_of_interrupt()
    elif register == apic_page.ICR_LOW:
        return avic_ipi.send(avic)
    return None


# MSRs.


def is_register(avic: Avic, index: int) -> bool:
    """Whether MSR ``index`` is one of the virtual APIC's."""
    return avic.x2apic and data.FIRST_X2APIC_MSR <= index <= data.LAST_X2APIC_MSR


def read_msr(operation: SvmOperation, avic: Avic, index: int) -> Vmexit | None:
    """RDMSR of a register: EDX:EAX, or the exit. Raises `InstructionAborted` with #GP(0)."""
    offset = (index & 0xFF) << 4
    if not data.is_x2apic_register(offset, write=False):
        raise gp(0)
    if behavior(offset, write=False) is Behavior.FAULT:
        return not_accelerated(offset, write=False)
    gpr = operation.processor.state.gpr
    gpr[Gpr.RAX] = avic.read(offset)
    gpr[Gpr.RDX] = avic.read(apic_page.ICR_HIGH) if offset == apic_page.ICR_LOW else 0
    return None


def refuse_write(index: int, value: int) -> Vmexit | None:
    """The exit before WRMSR of ``value`` to a register. Raises `InstructionAborted` with #GP(0)."""
    offset = (index & 0xFF) << 4
    reserved = data.X2APIC_RESERVED.get(offset, MASK64 & ~MASK32)
    if not data.is_x2apic_register(offset, write=True) or value & reserved or offset == apic_page.ID:
        raise gp(0)
    return not_accelerated(offset, write=True) if behavior(offset, write=True) is Behavior.FAULT else None


def write_msr(avic: Avic, index: int, value: int) -> Vmexit | None:
    """WRMSR of ``value`` to a register, once RIP is past it: the exit after it."""
    offset = (index & 0xFF) << 4
    avic.write(offset, value & MASK32)
    if offset == apic_page.SELF_IPI:
        return avic_ipi.send_to_self(avic, value)
    if offset == apic_page.ICR_LOW:
        avic.write(apic_page.ICR_HIGH, value >> 32)
    return _written(avic, offset)


# CR8.


def read_cr8(operation: SvmOperation) -> int:
    """V_TPR."""
    return operation.virtual & layouts.V_TPR & 0xF


def write_cr8(operation: SvmOperation, value: int) -> None:
    """V_TPR, and with AVIC the task priority in the backing page."""
    if operation.avic is not None:
        operation.avic.set_task_priority(value)
        return
    values = operation.vmcb.values
    values[at.VIRTUAL] = values[at.VIRTUAL] & ~layouts.V_TPR | value
