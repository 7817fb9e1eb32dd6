"""Which operations of a guest cause a VM exit, and with what information: pure functions of operation and VMCS.

`exit_of` looks the operation's class up in one table. Nothing here changes state; `vtx.vmx.exit` performs the exit that
these functions describe.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "Instructions That Cause VM Exits" and "Other Causes of VM Exits"; "VM
Exits", "Basic VM-Exit Information".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from attrs import define

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vtx.vmx.information import displacement_qualification, instruction_information, string_io_information
from vtx.vmx.record import VmExit, interruption_word
from vtx.vmx.view import ControlView
from vtx.x86 import operations as op
from vtx.x86.decode import Instruction
from vtx.x86.event import Event, EventKind
from vtx.x86.memory import PhysicalMemory
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import CpuState, Cr0, Rflags

_CR0_MASK: Final = f.CR0_GUEST_HOST_MASK.encoding
_CR4_MASK: Final = f.CR4_GUEST_HOST_MASK.encoding
_CR0_SHADOW: Final = f.CR0_READ_SHADOW.encoding
_CR4_SHADOW: Final = f.CR4_READ_SHADOW.encoding
_EXCEPTION_BITMAP: Final = f.EXCEPTION_BITMAP.encoding
_XSS_EXITING_BITMAP: Final = f.XSS_EXITING_BITMAP.encoding
_PAGE_FAULT_MASK: Final = f.PAGE_FAULT_ERROR_CODE_MASK.encoding
_PAGE_FAULT_MATCH: Final = f.PAGE_FAULT_ERROR_CODE_MATCH.encoding

# Access types in the qualification of control-register accesses.
_MOVE_TO, _MOVE_FROM, _CLTS, _LMSW = range(4)
_TS: Final = int(Cr0.TS)
_PE: Final = int(Cr0.PE)
_RF: Final = int(Rflags.RF)
_LMSW_MEMORY: Final = 1 << 6
_LMSW_BITS: Final = int(Cr0.MP | Cr0.EM | Cr0.TS)
_MSR_RANGE: Final = 0x2000
_HIGH_MSRS: Final = 0xC000_0000


@define(slots=True, eq=False)
class Guest:
    """What the decision may look at: the VMCS's fields, its view, memory for the bitmaps, and the guest's registers."""

    values: Mapping[int, int]
    view: ControlView
    memory: PhysicalMemory
    state: CpuState


def _of_instruction(reason: int, instruction: Instruction, qualification: int = 0) -> VmExit:
    """An exit due to executing ``instruction``: fault-like, RFLAGS.RF saved as 0."""
    return VmExit(
        reason,
        qualification,
        instruction_length=instruction.length,
        instruction_information=instruction_information(instruction),
        resume_flag=0,
    )


def vmx_instruction_exit(reason: int, instruction: Instruction, rip: int) -> VmExit:
    """The unconditional exit of a VMX instruction executed by a guest."""
    return _of_instruction(reason, instruction, displacement_qualification(instruction, rip))


def _simple(guest: Guest, operation: op.Simple, instruction: Instruction) -> VmExit | None:
    reason = guest.view.plain_exits.get(operation.kind)
    return None if reason is None else _of_instruction(reason, instruction)


def _mwait(guest: Guest, operation: op.MonitorWait, instruction: Instruction) -> VmExit | None:
    if not guest.view.primary & c.MWAIT_EXITING.mask:
        return None
    return _of_instruction(Reason.MWAIT, instruction, int(operation.armed))


def _owned_bits_differ(guest: Guest, mask: int, shadow: int, value: int) -> bool:
    """Whether ``value`` differs from the read shadow in a bit that the host owns."""
    return bool((value ^ guest.values[shadow]) & guest.values[mask])


def _move_to_cr(guest: Guest, operation: op.MoveToControlRegister, instruction: Instruction) -> VmExit | None:
    number, view = operation.number, guest.view
    if number == 0:
        exits = _owned_bits_differ(guest, _CR0_MASK, _CR0_SHADOW, operation.value)
    elif number == 4:
        exits = _owned_bits_differ(guest, _CR4_MASK, _CR4_SHADOW, operation.value)
    elif number == 3:
        exits = bool(view.primary & c.CR3_LOAD_EXITING.mask) and operation.value not in view.cr3_targets
    else:
        exits = number == 8 and bool(view.primary & c.CR8_LOAD_EXITING.mask)
    if not exits:
        return None
    return _of_instruction(Reason.CR_ACCESS, instruction, number | _MOVE_TO << 4 | operation.register << 8)


def _move_from_cr(guest: Guest, operation: op.MoveFromControlRegister, instruction: Instruction) -> VmExit | None:
    control = c.CR3_STORE_EXITING if operation.number == 3 else c.CR8_STORE_EXITING
    if operation.number not in (3, 8) or not guest.view.primary & control.mask:
        return None
    return _of_instruction(Reason.CR_ACCESS, instruction, operation.number | _MOVE_FROM << 4 | operation.register << 8)


def _clts(guest: Guest, operation: op.ClearTaskSwitched, instruction: Instruction) -> VmExit | None:
    if guest.values[_CR0_MASK] & guest.values[_CR0_SHADOW] & _TS:
        return _of_instruction(Reason.CR_ACCESS, instruction, _CLTS << 4)
    return None


def _lmsw(guest: Guest, operation: op.LoadMachineStatusWord, instruction: Instruction) -> VmExit | None:
    mask, shadow = guest.values[_CR0_MASK], guest.values[_CR0_SHADOW]
    # LMSW cannot clear PE, so a 0 in bit 0 of the source never attempts to change it.
    sets_pe = mask & ~shadow & operation.source & _PE
    if not sets_pe and not (operation.source ^ shadow) & mask & _LMSW_BITS:
        return None
    qualification = _LMSW << 4 | (operation.source & 0xFFFF) << 16
    if operation.linear is not None:
        qualification |= _LMSW_MEMORY
    record = _of_instruction(Reason.CR_ACCESS, instruction, qualification)
    record.guest_linear = operation.linear
    return record


def _move_dr(guest: Guest, operation: op.MoveDebugRegister, instruction: Instruction) -> VmExit | None:
    if not guest.view.primary & c.MOV_DR_EXITING.mask:
        return None
    direction = 0 if operation.write else 1 << 4
    return _of_instruction(Reason.DR_ACCESS, instruction, operation.number | direction | operation.register << 8)


def _invlpg(guest: Guest, operation: op.InvalidatePage, instruction: Instruction) -> VmExit | None:
    if not guest.view.primary & c.INVLPG_EXITING.mask:
        return None
    return _of_instruction(Reason.INVLPG, instruction, operation.linear)


def _invpcid(guest: Guest, operation: op.InvalidateProcessContext, instruction: Instruction) -> VmExit | None:
    if not guest.view.primary & c.INVLPG_EXITING.mask or not guest.view.secondary & c.ENABLE_INVPCID.mask:
        return None
    return vmx_instruction_exit(Reason.INVPCID, instruction, guest.state.rip)


def _descriptor_table(guest: Guest, operation: op.DescriptorTableAccess, instruction: Instruction) -> VmExit | None:
    if not guest.view.secondary & c.DESCRIPTOR_TABLE_EXITING.mask:
        return None
    reason = Reason.LDTR_TR_ACCESS if operation.local else Reason.GDTR_IDTR_ACCESS
    return vmx_instruction_exit(reason, instruction, guest.state.rip)


def _msr_exits(guest: Guest, index: int, bitmap: int) -> bool:
    """Whether the MSR bitmaps make an access exit; ``bitmap`` is the offset of the pair for reads or writes."""
    base = guest.view.msr_bitmaps
    if base is None:
        return True
    offset = index - _HIGH_MSRS
    if 0 <= index < _MSR_RANGE:
        address = base + bitmap + (index >> 3)
    elif 0 <= offset < _MSR_RANGE:
        address = base + bitmap + 0x400 + (offset >> 3)
    else:
        return True
    return bool(guest.memory.read_u8(address) >> (index & 7) & 1)


def _rdmsr(guest: Guest, operation: op.ReadMsr, instruction: Instruction) -> VmExit | None:
    return _of_instruction(Reason.RDMSR, instruction) if _msr_exits(guest, operation.index, 0) else None


def _wrmsr(guest: Guest, operation: op.WriteMsr, instruction: Instruction) -> VmExit | None:
    return _of_instruction(Reason.WRMSR, instruction) if _msr_exits(guest, operation.index, 0x800) else None


def _extended_state(guest: Guest, operation: op.ExtendedStateTransfer, instruction: Instruction) -> VmExit | None:
    if not operation.supervisor & guest.values[_XSS_EXITING_BITMAP]:
        return None
    reason = Reason.XSAVES if operation.save else Reason.XRSTORS
    return vmx_instruction_exit(reason, instruction, guest.state.rip)


def _rdmsrlist(guest: Guest, operation: op.ReadMsrList, instruction: Instruction) -> VmExit | None:
    if not _msr_exits(guest, operation.index, 0):
        return None
    return _of_instruction(Reason.RDMSRLIST, instruction, operation.index)


def _wrmsrlist(guest: Guest, operation: op.WriteMsrList, instruction: Instruction) -> VmExit | None:
    if not _msr_exits(guest, operation.index, 0x800):
        return None
    return _of_instruction(Reason.WRMSRLIST, instruction, operation.index)


def _port_exits(guest: Guest, port: int, size: int) -> bool:
    if guest.view.io_bitmaps is None:
        return bool(guest.view.primary & c.UNCONDITIONAL_IO_EXITING.mask)
    if port + size > 0x1_0000:
        return True
    low, high = guest.view.io_bitmaps
    for number in range(port, port + size):
        address = (high if number & 0x8000 else low) + ((number & 0x7FFF) >> 3)
        if guest.memory.read_u8(address) >> (number & 7) & 1:
            return True
    return False


def _port_io(guest: Guest, operation: op.PortIo, instruction: Instruction) -> VmExit | None:
    if not _port_exits(guest, operation.port, operation.size):
        return None
    qualification = (
        (operation.size - 1)
        | operation.is_in << 3
        | operation.string << 4
        | operation.rep << 5
        | operation.immediate << 6
        | operation.port << 16
    )
    record = _of_instruction(Reason.IO_INSTRUCTION, instruction, qualification)
    if operation.string:
        record.guest_linear = operation.linear
        record.instruction_information = string_io_information(instruction)
    return record


def _task_switch(guest: Guest, operation: op.TaskSwitch, instruction: Instruction) -> VmExit | None:
    record = _of_instruction(Reason.TASK_SWITCH, instruction, operation.selector | operation.source << 30)
    record.resume_flag = None
    return record


_SOFTWARE_KINDS: Final = {
    "INT3": EventKind.SOFTWARE_EXCEPTION,
    "INTO": EventKind.SOFTWARE_EXCEPTION,
    "INT1": EventKind.PRIVILEGED_SOFTWARE_EXCEPTION,
}
_EXCEPTIONS: Final = frozenset((EventKind.HARDWARE_EXCEPTION, *_SOFTWARE_KINDS.values()))


def _exception_is_selected(values: Mapping[int, int], vector: int, error_code: int) -> bool:
    """Whether the exception bitmap selects an exception, page faults by error-code mask and match."""
    selected = values[_EXCEPTION_BITMAP] >> vector & 1
    if vector == Vector.PF and error_code & values[_PAGE_FAULT_MASK] != values[_PAGE_FAULT_MATCH]:
        selected ^= 1
    return bool(selected)


def exception_exit(values: Mapping[int, int], state: CpuState, event: Event, fault: Fault | None) -> VmExit | None:
    """The exit of an exception about to be delivered, or None (also for events that are none).

    ``fault`` has the CR2 or DR6 payload of a hardware exception if ``event`` lacks it.
    """
    if event.kind not in _EXCEPTIONS or not _exception_is_selected(values, event.vector, event.error_code or 0):
        return None
    qualification = 0
    if event.kind == EventKind.HARDWARE_EXCEPTION:
        if event.vector == Vector.PF:
            qualification = (fault.address if fault else event.address) or 0
        elif event.vector == Vector.DB:
            qualification = (fault.debug if fault else event.debug) or 0
    elif event.kind == EventKind.PRIVILEGED_SOFTWARE_EXCEPTION:
        qualification = event.debug or 0  # data breakpoints that blocking by MOV SS held back until INT1
    return VmExit(
        Reason.EXCEPTION_OR_NMI,
        qualification,
        instruction_length=event.instruction_length if event.is_software else None,
        interruption=interruption_word(event.vector, event.kind, error_code=event.error_code is not None),
        interruption_error=event.error_code or 0,
        resume_flag=resume_flag(event, state),
    )


def resume_flag(event: Event, state: CpuState) -> int:
    """RFLAGS.RF in the image that delivery of ``event`` would push."""
    return 1 if event.saved_rflags(state) & _RF else 0


def _exception(guest: Guest, operation: op.RaiseException, instruction: Instruction) -> VmExit | None:
    event = Event.from_fault(operation.fault)
    if operation.software is not None:
        event = Event(operation.fault.vector, _SOFTWARE_KINDS[operation.software], None, instruction.length)
    return exception_exit(guest.values, guest.state, event, operation.fault)


def _never(guest: Guest, operation: op.Operation, instruction: Instruction) -> None:
    return None


_DECISIONS: Final[Mapping[type, Callable[[Guest, Any, Instruction], VmExit | None]]] = {
    op.Simple: _simple,
    op.MonitorWait: _mwait,
    op.MoveToControlRegister: _move_to_cr,
    op.MoveFromControlRegister: _move_from_cr,
    op.ClearTaskSwitched: _clts,
    op.LoadMachineStatusWord: _lmsw,
    op.StoreMachineStatusWord: _never,
    op.MoveDebugRegister: _move_dr,
    op.InvalidatePage: _invlpg,
    op.InvalidateProcessContext: _invpcid,
    op.BroadcastInvalidation: _never,
    op.DescriptorTableAccess: _descriptor_table,
    op.SoftwareInterrupt: _never,
    op.ReadMsr: _rdmsr,
    op.WriteMsr: _wrmsr,
    op.ExtendedStateTransfer: _extended_state,
    op.ReadMsrList: _rdmsrlist,
    op.WriteMsrList: _wrmsrlist,
    op.SendUserIpi: _never,
    op.PortIo: _port_io,
    op.TaskSwitch: _task_switch,
    op.RaiseException: _exception,
}


def exit_of(guest: Guest, operation: op.Operation, instruction: Instruction) -> VmExit | None:
    """The VM exit that ``operation`` of ``instruction`` causes, or None if the guest may go on."""
    return _DECISIONS[type(operation)](guest, operation, instruction)
