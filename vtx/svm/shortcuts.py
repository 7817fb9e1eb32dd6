"""STGI, CLGI, VMSAVE and VMLOAD of a host, when nothing about them is special: hypervisors execute them at every exit.

VMLOAD is special unless the processor has already what it would load.

What is done is what `vtx.svm.instructions` does, without the questions whose answers are known.

Spec: APM Vol. 2, "Global Interrupt Flag, STGI and CLGI Instructions", "VMSAVE and VMLOAD Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from iced_x86 import Mnemonic

from vtx.addresses import PAGE_OFFSET_MASK
from vtx.svm import control_block
from vtx.svm.operation import SvmOperation
from vtx.svm.processor_state import save_more
from vtx.x86.decode import Instruction
from vtx.x86.state import MASK64, AccessRights, CpuState, Efer, Rflags, Shadow

_SVME: Final = int(Efer.SVME)
_LMA: Final = int(Efer.LMA)
_LONG: Final = int(AccessRights.LONG)
_DPL: Final = 3 << 5
_TF: Final = int(Rflags.TF)
_RF: Final = int(Rflags.RF)


def shortcut(operation: SvmOperation, instruction: Instruction) -> Callable[[], bool] | None:
    """A function that executes ``instruction`` if nothing about it is special, and returns whether it did."""
    kind = _KINDS.get(instruction.mnemonic)
    if kind is None or instruction.address_size != 8:
        return None
    length, state = instruction.length, operation.processor.state

    def execute() -> bool:
        if _is_special(operation, state) or not kind(operation, state):
            return False
        state.rip = (state.rip + length) & MASK64
        state.rflags &= ~_RF
        state.shadow = Shadow.NONE
        return True

    return execute


def _is_special(operation: SvmOperation, state: CpuState) -> bool:
    """In guest mode, watched, or not at privilege level 0 of 64-bit mode with SVM enabled."""
    return (
        operation.guest_mode
        or (operation.observer is not None and operation.observer.traces)
        or not state.efer & _SVME
        or not (state.efer & _LMA and state.segments[1].access_rights & _LONG)
        or bool(state.segments[2].access_rights & _DPL or state.rflags & _TF)
    )


def _stgi(operation: SvmOperation, state: CpuState) -> bool:
    processor = operation.processor
    if operation.smi_pending or processor.nmi_pending() or processor.interrupt_pending():
        return False
    state.gif = True
    return True


def _clgi(operation: SvmOperation, state: CpuState) -> bool:
    state.gif = False
    return True


def _has_block(operation: SvmOperation, address: int) -> bool:
    """Whether a control block can be at ``address``."""
    return not (address & PAGE_OFFSET_MASK or address >> operation.processor.profile.physical_address_width)


def _more_state(operation: SvmOperation) -> list[int]:
    values = [0] * len(operation.vmcb.values)
    save_more(operation.processor, values)
    return values


def _vmsave(operation: SvmOperation, state: CpuState) -> bool:
    address = state.gpr[0]
    if not _has_block(operation, address):
        return False
    control_block.write(operation.processor.memory, address, _more_state(operation), control_block.MORE_STATE)
    return True


def _vmload(operation: SvmOperation, state: CpuState) -> bool:
    address = state.gpr[0]
    if not _has_block(operation, address):
        return False
    stored = control_block.read(operation.processor.memory, address)
    present = _more_state(operation)
    return all(stored[part.first : part.end] == present[part.first : part.end] for part in control_block.MORE_STATE)


_KINDS: Final[dict[int, Callable[[SvmOperation, CpuState], bool]]] = {
    Mnemonic.STGI: _stgi,
    Mnemonic.CLGI: _clgi,
    Mnemonic.VMSAVE: _vmsave,
    Mnemonic.VMLOAD: _vmload,
}
