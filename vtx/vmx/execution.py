"""Executing VMX instructions of guest code: operands in, the instruction, results and flags out.

Each handler is a row of one table; the operation itself is in `vtx.vmx.instructions` and `vtx.vmx.entry`. `commit`
alone writes RFLAGS and RIP.

Spec: SDM Vol. 3, "VMX Instruction Reference", "Conventions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import frozen
from iced_x86 import Mnemonic

from vmcs.exits import Reason
from vtx.vmx import instructions as i
from vtx.vmx.entry import enter
from vtx.vmx.operation import VmxOperation
from vtx.vmx.outcome import Completed, Outcome, VmEntered, VmExited, VmFailInvalid, VmFailValid, VmSucceed
from vtx.vmx.vm_functions import vmfunc
from vtx.x86.decode import Instruction, linear_address, read_register, write_register
from vtx.x86.linear import linear_address_width
from vtx.x86.outcome import Fault, InstructionAborted
from vtx.x86.state import MASK32, MASK64, AccessRights, CpuState, Efer, Gpr, Rflags, Shadow

_STATUS_FLAGS: Final = int(Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.OF)
_CF: Final = int(Rflags.CF)
_ZF: Final = int(Rflags.ZF)
_AC: Final = int(Rflags.AC)
_LMA: Final = int(Efer.LMA)
_LONG: Final = int(AccessRights.LONG)
_RF: Final = int(Rflags.RF)
_TF: Final = int(Rflags.TF)
_PENDING_BS: Final = 1 << 14
_DPL: Final = 3 << 5  # of SS: the CPL in protected mode

Admission = Callable[[VmxOperation, Reason, Instruction | None], Outcome | None]


@frozen
class Row:
    """One instruction: what may stop it before its operands are read, and what executes it."""

    name: str
    reason: Reason
    admit: Admission
    execute: Callable[[VmxOperation, Instruction], Outcome]


# Operands


def _memory_address(operation: VmxOperation, instruction: Instruction, size: int, *, write: bool = False) -> int:
    state = operation.processor.state
    return linear_address(state, instruction, size, write=write, width=linear_address_width(state))


def _read_memory(operation: VmxOperation, instruction: Instruction, size: int) -> int:
    processor = operation.processor
    address = _memory_address(operation, instruction, size)
    # The CPL is 0 whenever an operand is accessed.
    return processor.mmu.read(address, size, ac=bool(processor.state.rflags & _AC))


def _register_value(operation: VmxOperation, instruction: Instruction, position: int) -> int:
    operand = instruction.registers[position]
    assert operand is not None
    return read_register(operation.processor.state, operand)


def _data_size(state: CpuState) -> int:
    """Operand size of VMREAD and VMWRITE, in bytes."""
    return 8 if state.in_64_bit_mode else 4


def _store(operation: VmxOperation, instruction: Instruction, size: int, value: int) -> None:
    processor = operation.processor
    operand = instruction.registers[0] if instruction.memory is None else None
    if operand is not None:
        write_register(processor.state, operand, value)
        return
    address = _memory_address(operation, instruction, size, write=True)
    processor.mmu.write(address, size, value, ac=bool(processor.state.rflags & _AC))


# Handlers that do more than pass a physical address


def _vmptrst(operation: VmxOperation, instruction: Instruction) -> Outcome:
    outcome = i.vmptrst(operation)
    if isinstance(outcome, VmSucceed):
        _store(operation, instruction, 8, outcome.value)
    return outcome


def _vmread(operation: VmxOperation, instruction: Instruction) -> Outcome:
    outcome = i.vmread(operation, _register_value(operation, instruction, 1))
    if isinstance(outcome, VmSucceed):
        _store(operation, instruction, _data_size(operation.processor.state), outcome.value)
    return outcome


def _vmwrite(operation: VmxOperation, instruction: Instruction) -> Outcome:
    encoding = _register_value(operation, instruction, 0)
    if instruction.memory is None:
        value = _register_value(operation, instruction, 1)
        return i.vmwrite(operation, encoding, lambda: value)
    size = _data_size(operation.processor.state)
    return i.vmwrite(operation, encoding, lambda: _read_memory(operation, instruction, size))


def _vmfunc(operation: VmxOperation, instruction: Instruction) -> Outcome:
    gpr = operation.processor.state.gpr
    return vmfunc(operation, gpr[Gpr.RAX], gpr[Gpr.RCX], instruction)


def _admit_field_access(position: int) -> Admission:
    """Admission of VMREAD or VMWRITE, whose operand ``position`` is the register with the field's encoding."""

    def admit(operation: VmxOperation, reason: Reason, instruction: Instruction | None) -> Outcome | None:
        assert instruction is not None
        encoding = _register_value(operation, instruction, position)
        return i.admit_field_access(operation, reason, instruction, encoding)

    return admit


def _with_address(perform: Callable[[VmxOperation, int], Outcome]) -> Callable[[VmxOperation, Instruction], Outcome]:
    """An instruction whose operand is a 64-bit physical address in memory."""
    return lambda operation, instruction: perform(operation, _read_memory(operation, instruction, 8))


def _without_operand(perform: Callable[[VmxOperation], Outcome]) -> Callable[[VmxOperation, Instruction], Outcome]:
    return lambda operation, instruction: perform(operation)


def _invalidation(
    perform: Callable[[VmxOperation, int, Callable[[], int]], Outcome],
) -> Callable[[VmxOperation, Instruction], Outcome]:
    """INVEPT or INVVPID: the kind in a register, a 128-bit descriptor in memory."""

    def execute(operation: VmxOperation, instruction: Instruction) -> Outcome:
        kind = _register_value(operation, instruction, 0)
        return perform(operation, kind, lambda: _read_memory(operation, instruction, 16))

    return execute


# VMREAD and VMWRITE between registers, which every VM exit brings a dozen of, once more without detours. What is out of
# the ordinary in any way is left to the functions above.


def shortcut(operation: VmxOperation, instruction: Instruction) -> Callable[[], bool] | None:
    """A function that executes ``instruction`` if nothing about it is special, and returns whether it did."""
    reads = instruction.mnemonic == Mnemonic.VMREAD
    if instruction.memory is not None or not (reads or instruction.mnemonic == Mnemonic.VMWRITE):
        return None
    first, second = instruction.registers[0], instruction.registers[1]
    if first is None or second is None or first.size != 8:
        return None
    destination, source, length = first.number, second.number, instruction.length
    field_of, writes_any = operation.capabilities.fields.get, operation.capabilities.vmwrite_any_field
    processor, no_shadow = operation.processor, Shadow.NONE

    def is_special(state: CpuState) -> bool:
        return (
            operation.non_root
            or operation.current is None
            or operation.vmxon_pointer is None
            or (operation.observer is not None and operation.observer.traces)
            or not (state.efer & _LMA and state.segments[1].access_rights & _LONG)
            or bool(state.segments[2].access_rights & _DPL or state.rflags & _TF)
        )

    def vmread_registers() -> bool:
        state = processor.state
        if is_special(state):
            return False
        assert operation.current is not None
        value = operation.current.vmcs.read(state.gpr[source])
        if value is None:
            return False
        state.gpr[destination] = value
        return succeed(state)

    def vmwrite_registers() -> bool:
        state = processor.state
        if is_special(state):
            return False
        assert operation.current is not None
        encoding = state.gpr[destination]
        field = field_of(encoding)
        if field is None or (field.read_only and not writes_any):
            return False
        operation.current.vmcs.write(encoding, state.gpr[source])
        return succeed(state)

    def succeed(state: CpuState) -> bool:
        state.rflags &= ~(_STATUS_FLAGS | _RF)
        state.rip = state.rip + length & MASK64
        state.shadow = no_shadow
        return True

    return vmread_registers if reads else vmwrite_registers


ROWS: Final[dict[int, Row]] = {
    Mnemonic.VMXON: Row("VMXON", Reason.VMXON, i.admit_vmxon, _with_address(i.vmxon)),
    Mnemonic.VMXOFF: Row("VMXOFF", Reason.VMXOFF, i.admit, _without_operand(i.vmxoff)),
    Mnemonic.VMCLEAR: Row("VMCLEAR", Reason.VMCLEAR, i.admit, _with_address(i.vmclear)),
    Mnemonic.VMPTRLD: Row("VMPTRLD", Reason.VMPTRLD, i.admit, _with_address(i.vmptrld)),
    Mnemonic.VMPTRST: Row("VMPTRST", Reason.VMPTRST, i.admit, _vmptrst),
    Mnemonic.VMREAD: Row("VMREAD", Reason.VMREAD, _admit_field_access(1), _vmread),
    Mnemonic.VMWRITE: Row("VMWRITE", Reason.VMWRITE, _admit_field_access(0), _vmwrite),
    Mnemonic.VMLAUNCH: Row("VMLAUNCH", Reason.VMLAUNCH, i.admit, lambda o, _: enter(o, launching=True)),
    Mnemonic.VMRESUME: Row("VMRESUME", Reason.VMRESUME, i.admit, lambda o, _: enter(o, launching=False)),
    Mnemonic.VMCALL: Row("VMCALL", Reason.VMCALL, i.admit_vmcall, _without_operand(i.vmcall)),
    Mnemonic.VMFUNC: Row("VMFUNC", Reason.VMFUNC, lambda *_: None, _vmfunc),
    Mnemonic.INVEPT: Row("INVEPT", Reason.INVEPT, i.admit_invept, _invalidation(i.invept)),
    Mnemonic.INVVPID: Row("INVVPID", Reason.INVVPID, i.admit_invvpid, _invalidation(i.invvpid)),
}
BY_NAME: Final = {row.name: row for row in ROWS.values()}


def execute_instruction(operation: VmxOperation, instruction: Instruction) -> bool:
    """Execute ``instruction`` if it is a VMX instruction, and commit; raises `InstructionAborted` with a fault."""
    row = ROWS.get(instruction.mnemonic)
    if row is None:
        return False
    outcome = row.admit(operation, row.reason, instruction) or row.execute(operation, instruction)
    if operation.observer is not None:
        operation.observer.vm_instruction(row.name, outcome)
    if isinstance(outcome, Fault):
        raise InstructionAborted(outcome)
    commit(operation.processor.state, outcome, instruction)
    return True


def execute_directly(
    operation: VmxOperation, name: str, perform: Callable[[], Outcome], encoding: int | None = None
) -> Outcome:
    """Execute the instruction of that name with operands given by the caller; RIP stays where it is.

    ``encoding`` is the field that VMREAD and VMWRITE access.
    """
    row = BY_NAME[name]
    if encoding is None:
        stopped = row.admit(operation, row.reason, None)
    else:
        stopped = i.admit_field_access(operation, row.reason, None, encoding)
    outcome = stopped or perform()
    if operation.observer is not None:
        operation.observer.vm_instruction(name, outcome)
    commit(operation.processor.state, outcome, None)
    return outcome


def commit(state: CpuState, outcome: Outcome, instruction: Instruction | None) -> None:
    """Set RFLAGS as the outcome says and retire ``instruction``; entries and exits have loaded their own state."""
    if type(outcome) is VmEntered or type(outcome) is VmExited:
        return
    match outcome:
        case VmSucceed():
            flags = 0
        case VmFailInvalid():
            flags = _CF
        case VmFailValid():
            flags = _ZF
        case Completed():
            flags = state.rflags & _STATUS_FLAGS
        case _:
            return
    state.rflags = state.rflags & ~_STATUS_FLAGS | flags
    if instruction is not None:
        retire(state, instruction)


def complete(state: CpuState, instruction: Instruction) -> None:
    """Retire ``instruction``, with the debug trap of single-stepping pending if that is on."""
    if state.rflags & _TF:
        state.pending_debug |= _PENDING_BS
    retire(state, instruction)


def retire(state: CpuState, instruction: Instruction) -> None:
    """Move RIP past ``instruction``, which has completed."""
    long = state.efer & _LMA and state.segments[1].access_rights & _LONG
    state.rip = (state.rip + instruction.length) & (MASK64 if long else MASK32)
    state.rflags &= ~_RF
    state.shadow = Shadow.NONE
