"""MOV CR8, RDMSR, WRMSR and SENDUIPI that act on the virtual-APIC page instead of the local APIC.

Interpretation. With a TPR shadow, the notification of SENDUIPI is an IPI of xAPIC mode if APIC accesses are
virtualized, and one of x2APIC mode if not, whether or not x2APIC mode is virtualized. It is virtualized, or else causes
an APIC-write VM exit, once the descriptor has been written.

Spec: SDM Vol. 3, "APIC Virtualization and Virtual Interrupts", "Virtualizing CR8-Based TPR Accesses", "Virtualizing
MSR-Based APIC Accesses".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs.exits import Reason
from vtx.vmx import ipi_virtualization
from vtx.vmx.execution import complete
from vtx.vmx.exit import perform_exit
from vtx.vmx.operation import VmxOperation
from vtx.vmx.record import VmExit
from vtx.vmx.virtual_apic import VEOI, VICR_HIGH, VICR_LOW, VSELF_IPI, VTPR, VirtualApic
from vtx.x86.decode import Instruction
from vtx.x86.operations import (
    MoveFromControlRegister,
    MoveToControlRegister,
    Operation,
    ReadMsr,
    SendUserIpi,
    WriteMsr,
)
from vtx.x86.outcome import gp
from vtx.x86.state import MASK32, Gpr

_X2APIC_MODE: Final = c.VIRTUALIZE_X2APIC_MODE.mask
_APIC_ACCESSES: Final = c.VIRTUALIZE_APIC_ACCESSES.mask
_FIRST_MSR, _LAST_MSR = 0x800, 0x8FF
_TPR_MSR: Final = 0x808
_EOI_MSR: Final = 0x80B
_SELF_IPI_MSR: Final = 0x83F
_ICR_MSR: Final = 0x830
_ICR_RESERVED: Final = 0xFFF3_0000 | 1 << 13 | 1 << 12


def virtualize(operation: VmxOperation, action: Operation, instruction: Instruction) -> bool:
    """Carry out ``action``, which does not exit, on the virtual-APIC page; False if it does not belong there.

    Raises `InstructionAborted` with #GP(0) for a value that the virtual register does not take.
    """
    apic, view = operation.virtual_apic, operation.view
    if apic is None or view is None:
        return False
    state, record = operation.processor.state, None
    x2apic = bool(view.secondary & _X2APIC_MODE)
    match action:
        case MoveFromControlRegister(number=8, register=register):
            state.gpr[register] = apic.read(VTPR, 1) >> 4
        case MoveToControlRegister(number=8, value=value):
            apic.write(VTPR, (value & 0xF) << 4)
            record = apic.task_priority_written()
        case ReadMsr(index=index) if x2apic and _is_read_virtually(apic, index):
            value = apic.read((index & 0xFF) << 4, 8)
            state.gpr[Gpr.RAX], state.gpr[Gpr.RDX] = value & MASK32, value >> 32
        case WriteMsr(index=index, value=value) if x2apic and _is_written_virtually(apic, index):
            record = _write_msr(apic, index, value)
            if record is not None:
                record = ipi_virtualization.virtualize(operation, apic, record, x2apic=True)
        case SendUserIpi(vector=vector, destination=destination):
            in_xapic_mode = bool(view.secondary & _APIC_ACCESSES)
            record = _send(apic, vector, destination, x2apic=not in_xapic_mode)
            record = ipi_virtualization.virtualize(operation, apic, record, x2apic=not in_xapic_mode)
        case _:
            return False
    complete(state, instruction)
    if record is not None:
        perform_exit(operation, record)
    return True


def _send(apic: VirtualApic, vector: int, destination: int, *, x2apic: bool) -> VmExit:
    """Command a fixed interrupt to the physical APIC ID that ``destination`` (NDST) names; the exit that follows."""
    if x2apic:
        apic.write(VICR_LOW, destination << 32 | vector, 8)
    else:
        apic.write(VICR_HIGH, (destination >> 8 & 0xFF) << 24)
        apic.write(VICR_LOW, vector)
    return VmExit(Reason.APIC_WRITE, VICR_LOW)


def is_virtual_register(operation: VmxOperation, index: int) -> bool:
    """Whether MSR ``index`` may stand for a register on the virtual-APIC page."""
    view = operation.view
    return view is not None and bool(view.secondary & _X2APIC_MODE) and _FIRST_MSR <= index <= _LAST_MSR


def _is_read_virtually(apic: VirtualApic, index: int) -> bool:
    return index == _TPR_MSR or (apic.register_virtualization and _FIRST_MSR <= index <= _LAST_MSR)


def _is_written_virtually(apic: VirtualApic, index: int) -> bool:
    if index == _ICR_MSR:
        return apic.ipi_virtualization
    return index == _TPR_MSR or (apic.interrupt_delivery and index in (_EOI_MSR, _SELF_IPI_MSR))


def _write_msr(apic: VirtualApic, index: int, value: int) -> VmExit | None:
    """Whether the local APIC is in x2APIC mode does not matter."""
    if index == _ICR_MSR:
        if value & _ICR_RESERVED:
            raise gp(0)
        apic.write(VICR_LOW, value, 8)
        return VmExit(Reason.APIC_WRITE, VICR_LOW)
    if value >> (0 if index == _EOI_MSR else 8):
        raise gp(0)
    if index == _TPR_MSR:
        apic.write(VTPR, value, 8)
        return apic.task_priority_written()
    if index == _EOI_MSR:
        apic.write(VEOI, 0, 8)
        return apic.end_of_interrupt()
    apic.write(VSELF_IPI, value, 8)
    if not value & 0xF0:
        return VmExit(Reason.APIC_WRITE, VSELF_IPI)
    apic.self_ipi(value)
    return None
