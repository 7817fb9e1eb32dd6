"""Which operations of a guest cause a #VMEXIT, and with what information: functions of operation and VMCB.

`exit_of` looks the operation's class up in one table. Nothing here changes state; `vtx.svm.vmexit` performs the exit
that these functions describe.

Interpretations. The traps after writes of control registers are those of MOV, LMSW and CLTS. They are no exits due to
an instruction intercept, so nRIP is 0, and the trap of single-stepping that was due at the same time is lost.

Spec: APM Vol. 2, "Intercept Operation", "Instruction Intercepts", "Decode Assists", "Control Register Write Traps".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from iced_x86 import Mnemonic

from vmcs.vmcb import layouts
from vmcs.vmcb.intercepts import Exit
from vtx.svm import places as at
from vtx.svm.operation import SvmOperation
from vtx.svm.record import Vmexit, event_word
from vtx.x86 import operations as op
from vtx.x86.decode import Instruction
from vtx.x86.operations import Plain, TaskSwitchSource
from vtx.x86.state import MASK32, MASK64, Cr0, Rflags

_PLAIN: Final[Mapping[Plain, Exit]] = {
    Plain.CPUID: Exit.CPUID,
    Plain.HLT: Exit.HLT,
    Plain.INVD: Exit.INVD,
    Plain.WBINVD: Exit.WBINVD,
    Plain.RDTSC: Exit.RDTSC,
    Plain.RDTSCP: Exit.RDTSCP,
    Plain.RDPMC: Exit.RDPMC,
    Plain.RDPRU: Exit.RDPRU,
    Plain.MCOMMIT: Exit.MCOMMIT,
    Plain.TLBSYNC: Exit.TLBSYNC,
    Plain.PAUSE: Exit.PAUSE,
    Plain.MONITOR: Exit.MONITOR,
    Plain.XSETBV: Exit.XSETBV,
    Plain.RSM: Exit.RSM,
    Plain.PUSHF: Exit.PUSHF,
    Plain.POPF: Exit.POPF,
    Plain.IRET: Exit.IRET,
    Plain.ICEBP: Exit.ICEBP,
}
_DESCRIPTOR_TABLES: Final[Mapping[int, Exit]] = {
    Mnemonic.SIDT: Exit.IDTR_READ,
    Mnemonic.SGDT: Exit.GDTR_READ,
    Mnemonic.SLDT: Exit.LDTR_READ,
    Mnemonic.STR: Exit.TR_READ,
    Mnemonic.LIDT: Exit.IDTR_WRITE,
    Mnemonic.LGDT: Exit.GDTR_WRITE,
    Mnemonic.LLDT: Exit.LDTR_WRITE,
    Mnemonic.LTR: Exit.TR_WRITE,
}

_MOV: Final = 1 << 63  # EXITINFO1 of CR accesses: the instruction is MOV
_SELECTIVE_EXEMPT: Final = int(Cr0.TS | Cr0.MP)

_MSR_RANGES: Final = (0, 0xC000_0000, 0xC001_0000)
_MSR_RANGE: Final = 0x2000
_MSR_RANGE_BYTES: Final = 0x800

_IO_IN: Final = 1 << 0
_IO_STRING: Final = 1 << 2
_IO_REPEATED: Final = 1 << 3
_IO_SIZES: Final = {1: 1 << 4, 2: 1 << 5, 4: 1 << 6}
_IO_ADDRESS_SIZES: Final = {2: 1 << 7, 4: 1 << 8, 8: 1 << 9}
_IO_SEGMENT_SHIFT: Final = 10

_TASK_SWITCH_IRET: Final = 1 << 36
_TASK_SWITCH_JMP: Final = 1 << 38
_TASK_SWITCH_ERROR_CODE: Final = 1 << 44
_TASK_SWITCH_RF: Final = 1 << 48
_RF: Final = int(Rflags.RF)


def next_rip(operation: SvmOperation, instruction: Instruction) -> int:
    """RIP of the instruction after ``instruction``, which is at RIP."""
    state = operation.processor.state
    return (state.rip + instruction.length) & (MASK64 if state.in_64_bit_mode else MASK32)


def of_instruction(
    operation: SvmOperation, code: int, instruction: Instruction, info1: int = 0, info2: int = 0
) -> Vmexit | None:
    """The exit of an instruction if intercept ``code`` is on."""
    if not operation.intercepts >> code & 1:
        return None
    return Vmexit(code, info1, info2, next_rip(operation, instruction))


def _decoded(operation: SvmOperation, information: int) -> int:
    """EXITINFO1 that only processors with decode assists define."""
    return information if operation.features.decode_assists else 0


def _simple(operation: SvmOperation, what: op.Simple, instruction: Instruction) -> Vmexit | None:
    code = _PLAIN.get(what.kind)
    if code is None or (code is Exit.TLBSYNC and not operation.features.tlbi_control):
        return None
    record = of_instruction(operation, code, instruction)
    if record is None and code is Exit.HLT and operation.features.idle_hlt and not operation.virtual_event_pending:
        return of_instruction(operation, Exit.IDLE_HLT, instruction)
    return record


def _mwait(operation: SvmOperation, what: op.MonitorWait, instruction: Instruction) -> Vmexit | None:
    record = of_instruction(operation, Exit.MWAIT_CONDITIONAL, instruction) if what.armed else None
    return record or of_instruction(operation, Exit.MWAIT, instruction, int(what.armed))


def _move_to_cr(operation: SvmOperation, what: op.MoveToControlRegister, instruction: Instruction) -> Vmexit | None:
    info1 = _decoded(operation, _MOV | what.register)
    record = of_instruction(operation, Exit.CR0_WRITE + what.number, instruction, info1)
    if record is None and what.number == 0:
        return _selective(operation, what.value, instruction, info1)
    return record


def _selective(operation: SvmOperation, value: int, instruction: Instruction, info1: int) -> Vmexit | None:
    """The intercept of writes to CR0 that change more than TS and MP."""
    if not (value ^ operation.processor.state.cr0) & ~_SELECTIVE_EXEMPT:
        return None
    return of_instruction(operation, Exit.CR0_SEL_WRITE, instruction, info1)


def _move_from_cr(operation: SvmOperation, what: op.MoveFromControlRegister, instruction: Instruction) -> Vmexit | None:
    info1 = _decoded(operation, _MOV | what.register)
    return of_instruction(operation, Exit.CR0_READ + what.number, instruction, info1)


def _clts(operation: SvmOperation, what: op.ClearTaskSwitched, instruction: Instruction) -> Vmexit | None:
    return of_instruction(operation, Exit.CR0_WRITE, instruction)


def _lmsw(operation: SvmOperation, what: op.LoadMachineStatusWord, instruction: Instruction) -> Vmexit | None:
    # LMSW counts for the selective intercept whatever it changes.
    return of_instruction(operation, Exit.CR0_WRITE, instruction) or of_instruction(
        operation, Exit.CR0_SEL_WRITE, instruction
    )


def _smsw(operation: SvmOperation, what: op.StoreMachineStatusWord, instruction: Instruction) -> Vmexit | None:
    return of_instruction(operation, Exit.CR0_READ, instruction)


def _move_dr(operation: SvmOperation, what: op.MoveDebugRegister, instruction: Instruction) -> Vmexit | None:
    code = (Exit.DR0_WRITE if what.write else Exit.DR0_READ) + what.encoded
    return of_instruction(operation, code, instruction, _decoded(operation, what.register))


def _invlpg(operation: SvmOperation, what: op.InvalidatePage, instruction: Instruction) -> Vmexit | None:
    return of_instruction(operation, Exit.INVLPG, instruction, _decoded(operation, what.linear))


def _invpcid(operation: SvmOperation, what: op.InvalidateProcessContext, instruction: Instruction) -> Vmexit | None:
    return of_instruction(operation, Exit.INVPCID, instruction)


def _invlpgb(operation: SvmOperation, what: op.BroadcastInvalidation, instruction: Instruction) -> Vmexit | None:
    record = of_instruction(operation, Exit.INVLPGB, instruction)
    if record is None and not what.legal:
        return of_instruction(operation, Exit.INVLPGB_ILLEGAL, instruction)
    return record


def _descriptor_table(
    operation: SvmOperation, what: op.DescriptorTableAccess, instruction: Instruction
) -> Vmexit | None:
    return of_instruction(operation, _DESCRIPTOR_TABLES[instruction.mnemonic], instruction)


def _software_interrupt(operation: SvmOperation, what: op.SoftwareInterrupt, instruction: Instruction) -> Vmexit | None:
    return of_instruction(operation, Exit.SWINT, instruction, _decoded(operation, what.vector))


def _msr_intercepted(operation: SvmOperation, index: int, write: bool) -> bool:
    """Whether the MSR permissions map intercepts an access; MSRs that it does not cover always are.

    Spec: APM Vol. 2, "SVM Related MSRs".
    """
    for place, first in enumerate(_MSR_RANGES):
        if first <= index < first + _MSR_RANGE:
            bit = 2 * (index - first) + write
            base = operation.vmcb.values[at.MSRPM] & ~0xFFF
            byte = operation.processor.memory.read_u8(base + place * _MSR_RANGE_BYTES + (bit >> 3))
            return bool(byte >> (bit & 7) & 1)
    return True


def _rdmsr(operation: SvmOperation, what: op.ReadMsr, instruction: Instruction) -> Vmexit | None:
    if not operation.intercepted(Exit.MSR) or not _msr_intercepted(operation, what.index, False):
        return None
    return of_instruction(operation, Exit.MSR, instruction, 0)


def _wrmsr(operation: SvmOperation, what: op.WriteMsr, instruction: Instruction) -> Vmexit | None:
    if not operation.intercepted(Exit.MSR) or not _msr_intercepted(operation, what.index, True):
        return None
    return of_instruction(operation, Exit.MSR, instruction, 1)


def _port_io(operation: SvmOperation, what: op.PortIo, instruction: Instruction) -> Vmexit | None:
    if not operation.intercepted(Exit.IOIO):
        return None
    base = operation.vmcb.values[at.IOPM] & ~0xFFF
    # The map goes on after the bit of port FFFFH, for accesses that extend beyond it.
    first = what.port >> 3
    window = int.from_bytes(operation.processor.memory.read(base + first, 2), "little")
    if not window >> (what.port & 7) & ((1 << what.size) - 1):
        return None
    info1 = (
        (_IO_IN if what.is_in else 0)
        | (_IO_STRING if what.string else 0)
        | (_IO_REPEATED if what.rep else 0)
        | _IO_SIZES[what.size]
        | _IO_ADDRESS_SIZES[instruction.address_size]
        | what.port << 16
    )
    if what.string and instruction.memory is not None:
        info1 |= _decoded(operation, int(instruction.memory.segment) << _IO_SEGMENT_SHIFT)
    return of_instruction(operation, Exit.IOIO, instruction, info1, next_rip(operation, instruction))


def _task_switch(operation: SvmOperation, what: op.TaskSwitch, instruction: Instruction) -> Vmexit | None:
    if not operation.intercepted(Exit.TASK_SWITCH):
        return None
    info2 = {TaskSwitchSource.IRET: _TASK_SWITCH_IRET, TaskSwitchSource.JMP: _TASK_SWITCH_JMP}.get(what.source, 0)
    if operation.processor.state.rflags & _RF:
        info2 |= _TASK_SWITCH_RF
    record = Vmexit(Exit.TASK_SWITCH, what.selector, info2)
    if what.delivering is not None:
        record.interrupted = event_word(what.delivering)
        if what.delivering.error_code is not None:
            record.info2 |= _TASK_SWITCH_ERROR_CODE | what.delivering.error_code
    return record


def _never(operation: SvmOperation, what: op.Operation, instruction: Instruction) -> None:
    return None


def control_register_trap(operation: SvmOperation, number: int) -> Vmexit | None:
    """The exit after a write of CR``number``: EXITINFO1 is what the register holds now.

    Spec: APM Vol. 2, "Control Register Write Traps".
    """
    if not operation.intercepted(Exit.CR0_WRITE_TRAP + number):
        return None
    processor = operation.processor
    state = processor.state
    value = {0: state.cr0, 2: state.cr2, 3: state.cr3, 4: state.cr4}.get(number)
    if value is None:
        virtual = operation.virtualizes_task_priority
        value = operation.virtual & layouts.V_TPR & 0xF if virtual else processor.task_priority()
    return Vmexit(Exit.CR0_WRITE_TRAP + number, value)


def efer_trap(operation: SvmOperation) -> Vmexit | None:
    """The exit after a write of EFER."""
    if not operation.intercepted(Exit.EFER_WRITE_TRAP):
        return None
    return Vmexit(Exit.EFER_WRITE_TRAP, operation.processor.state.efer)


_DECISIONS: Final[Mapping[type, Callable[[SvmOperation, Any, Instruction], Vmexit | None]]] = {
    op.Simple: _simple,
    op.MonitorWait: _mwait,
    op.MoveToControlRegister: _move_to_cr,
    op.MoveFromControlRegister: _move_from_cr,
    op.ClearTaskSwitched: _clts,
    op.LoadMachineStatusWord: _lmsw,
    op.StoreMachineStatusWord: _smsw,
    op.MoveDebugRegister: _move_dr,
    op.InvalidatePage: _invlpg,
    op.InvalidateProcessContext: _invpcid,
    op.BroadcastInvalidation: _invlpgb,
    op.DescriptorTableAccess: _descriptor_table,
    op.SoftwareInterrupt: _software_interrupt,
    op.ReadMsr: _rdmsr,
    op.WriteMsr: _wrmsr,
    op.PortIo: _port_io,
    op.TaskSwitch: _task_switch,
    op.ExtendedStateTransfer: _never,
    op.ReadMsrList: _never,
    op.WriteMsrList: _never,
    op.SendUserIpi: _never,
    op.RaiseException: _never,
}


def exit_of(operation: SvmOperation, what: op.Operation, instruction: Instruction) -> Vmexit | None:
    """The #VMEXIT that ``what``, of ``instruction``, causes, or None if the guest may go on."""
    return _DECISIONS[type(what)](operation, what, instruction)
