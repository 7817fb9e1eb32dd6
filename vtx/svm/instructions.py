"""The SVM instructions: what may stop each, and what it does.

Interpretations. Without its CPUID feature, SKINIT is an invalid opcode whatever EFER.SVME is. The guest VMCB address
check of CPUID lets the intercepts of VMRUN, VMLOAD and VMSAVE come before the #GP for every address that is none of a
control block.

Spec: APM Vol. 2, "Instruction Intercepts", "VMRUN Instruction", "VMSAVE and VMLOAD Instructions", "VMMCALL
Instruction", "Global Interrupt Flag, STGI and CLGI Instructions", "TLB Control", "Enabling SVM", "Secure Startup with
SKINIT".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import frozen
from iced_x86 import Mnemonic

from vmcs.vmcb import layouts
from vmcs.vmcb.intercepts import Exit
from vtx.addresses import PAGE_OFFSET_MASK, GuestPhysicalAddress, LinearAddress
from vtx.svm import control_block
from vtx.svm import places as at
from vtx.svm.intercepts import next_rip, of_instruction
from vtx.svm.operation import SvmOperation
from vtx.svm.outcome import COMPLETED, Completed, Outcome
from vtx.svm.processor_state import load_more, save_more
from vtx.svm.vmexit import perform_exit
from vtx.svm.vmrun import vmrun
from vtx.x86.decode import Instruction
from vtx.x86.outcome import Fault, InstructionAborted, NotModelled, Vector
from vtx.x86.page_rights import USER, WRITABLE
from vtx.x86.second_level import AccessKind, SecondLevelFault
from vtx.x86.state import MASK32, MASK64, CpuState, Efer, Gpr, Rflags, Shadow

_UD: Final = Fault(Vector.UD)
_GP: Final = Fault(Vector.GP, 0)
_SVME: Final = int(Efer.SVME)
_RF: Final = int(Rflags.RF)


@frozen
class Row:
    """One instruction: its name, intercept, and what executes it after privilege checks and the intercept."""

    name: str
    intercept: Exit
    execute: Callable[[SvmOperation, Instruction], Outcome]


def _admit(operation: SvmOperation, mnemonic: int) -> Fault | None:
    """The faults that every SVM instruction but VMMCALL has, before its intercept."""
    state = operation.processor.state
    enabled = bool(state.efer & _SVME) or (mnemonic in _OF_SECURE_STARTUP and operation.features.skinit)
    if not enabled or not state.protected or state.virtual_8086:
        return _UD
    return _GP if state.cpl else None


def _address(operation: SvmOperation, instruction: Instruction) -> int | None:
    """The physical address in rAX; None if no control block can be there."""
    processor = operation.processor
    address = processor.state.gpr[Gpr.RAX] & (MASK64 if instruction.address_size == 8 else MASK32)
    if address & PAGE_OFFSET_MASK or address >> processor.profile.physical_address_width:
        return None
    return address


def _vmrun(operation: SvmOperation, instruction: Instruction) -> Outcome:
    address = _address(operation, instruction)
    if address is None:
        return _GP
    state = operation.processor.state
    state.rip = next_rip(operation, instruction)
    state.rflags &= ~_RF
    state.shadow = Shadow.NONE
    return vmrun(operation, address)


def _host_physical(operation: SvmOperation, address: int, kind: AccessKind) -> int:
    """Where the block is that a guest's VMLOAD or VMSAVE names: virtualized, rAX is a guest-physical address."""
    virtualizes = operation.vmcb.values[at.EXTENSIONS] & layouts.VMSAVE_VIRTUALIZATION
    if not (operation.guest_mode and virtualizes and operation.features.vmsave_virtualization):
        return address
    second_level = operation.processor.mmu.second_level
    page = second_level.translate(GuestPhysicalAddress(address), kind, LinearAddress(0), USER | WRITABLE)
    if isinstance(page, SecondLevelFault):
        raise InstructionAborted(page)
    return page.physical


def _vmload(operation: SvmOperation, instruction: Instruction) -> Outcome:
    address = _address(operation, instruction)
    if address is None:
        return _GP
    memory = operation.processor.memory
    values = control_block.read(memory, _host_physical(operation, address, AccessKind.READ))
    load_more(operation.processor, values)
    operation.processor.load_control_state()
    return COMPLETED


def _vmsave(operation: SvmOperation, instruction: Instruction) -> Outcome:
    address = _address(operation, instruction)
    if address is None:
        return _GP
    memory = operation.processor.memory
    physical = _host_physical(operation, address, AccessKind.WRITE)
    values = [0] * len(operation.vmcb.values)
    save_more(operation.processor, values)
    control_block.write(memory, physical, values, control_block.MORE_STATE)
    return COMPLETED


def _set_gif(operation: SvmOperation, value: bool) -> Outcome:
    if operation.guest_mode and operation.uses_virtual_gif:
        virtual = operation.virtual
        operation.vmcb.values[at.VIRTUAL] = virtual | layouts.V_GIF if value else virtual & ~layouts.V_GIF
    else:
        operation.processor.state.gif = value
    return COMPLETED


def _invlpga(operation: SvmOperation, instruction: Instruction) -> Outcome:
    gpr = operation.processor.state.gpr
    linear = gpr[Gpr.RAX] & (MASK64 if instruction.address_size == 8 else MASK32)
    operation.processor.mmu.invlpga(gpr[Gpr.RCX] & MASK32, linear)
    return COMPLETED


def _skinit(operation: SvmOperation, instruction: Instruction) -> Outcome:
    raise NotModelled("secure startup by SKINIT")


ROWS: Final[dict[int, Row]] = {
    Mnemonic.VMRUN: Row("VMRUN", Exit.VMRUN, _vmrun),
    Mnemonic.VMLOAD: Row("VMLOAD", Exit.VMLOAD, _vmload),
    Mnemonic.VMSAVE: Row("VMSAVE", Exit.VMSAVE, _vmsave),
    Mnemonic.VMMCALL: Row("VMMCALL", Exit.VMMCALL, lambda operation, instruction: _UD),
    Mnemonic.STGI: Row("STGI", Exit.STGI, lambda operation, instruction: _set_gif(operation, True)),
    Mnemonic.CLGI: Row("CLGI", Exit.CLGI, lambda operation, instruction: _set_gif(operation, False)),
    Mnemonic.SKINIT: Row("SKINIT", Exit.SKINIT, _skinit),
    Mnemonic.INVLPGA: Row("INVLPGA", Exit.INVLPGA, _invlpga),
}
_OF_CONTROL_BLOCKS: Final = frozenset((Mnemonic.VMRUN, Mnemonic.VMLOAD, Mnemonic.VMSAVE))
_WITHOUT_PRIVILEGE: Final = frozenset((Mnemonic.VMMCALL,))
_OF_SECURE_STARTUP: Final = frozenset((Mnemonic.SKINIT, Mnemonic.STGI))
"""What EFER.SVME need not enable where there is SKINIT."""


def execute(operation: SvmOperation, instruction: Instruction) -> bool:
    """Execute ``instruction`` if it is an SVM instruction, and commit; raises `InstructionAborted` with a fault."""
    row = ROWS.get(instruction.mnemonic)
    if row is None or (instruction.mnemonic == Mnemonic.SKINIT and not operation.features.skinit):
        return False
    outcome = _outcome(operation, row, instruction)
    if operation.observer is not None:
        operation.observer.svm_instruction(row.name, outcome)
    if isinstance(outcome, Fault):
        raise InstructionAborted(outcome)
    if isinstance(outcome, Completed):
        _retire(operation.processor.state, instruction)
    return True


def _outcome(operation: SvmOperation, row: Row, instruction: Instruction) -> Outcome:
    if instruction.mnemonic not in _WITHOUT_PRIVILEGE:
        fault = _admit(operation, instruction.mnemonic)
        if fault is not None:
            return fault
    if operation.guest_mode:
        early = instruction.mnemonic in _OF_CONTROL_BLOCKS and not operation.features.late_address_check
        if early and _address(operation, instruction) is None:
            return _GP
        record = of_instruction(operation, row.intercept, instruction)
        if record is not None:
            if row.intercept is Exit.INVLPGA and operation.features.decode_assists:
                record.info1 = operation.processor.state.gpr[Gpr.RAX]
            return perform_exit(operation, record)
    return row.execute(operation, instruction)


def _retire(state: CpuState, instruction: Instruction) -> None:
    """Move RIP past ``instruction``, which has completed. The processor sees to the trap of single-stepping."""
    state.rip = (state.rip + instruction.length) & (MASK64 if state.in_64_bit_mode else MASK32)
    state.rflags &= ~_RF
    state.shadow = Shadow.NONE
