"""The instructions that manage shadow stacks.

Without a shadow stack RDSSP is a NOP, like ENDBR32 and ENDBR64, and the others are invalid opcodes.

Spec: SDM Vol. 2, "INCSSPD/INCSSPQ—Increment Shadow Stack Pointer", "RDSSPD/RDSSPQ—Read Shadow Stack Pointer",
"SAVEPREVSSP—Save Previous Shadow Stack Pointer", "RSTORSSP—Restore Saved Shadow Stack Pointer", "WRSSD/WRSSQ—Write to
Shadow Stack", "WRUSSD/WRUSSQ—Write to User Shadow Stack", "SETSSBSY—Mark Shadow Stack Busy", "CLRSSBSY—Clear Busy Flag
in a Supervisor Shadow Stack Token".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86 import fred
from vtx.x86.control_flow import (
    ControlProtection,
    cp,
    has_shadow_stack,
    may_write_shadow_stack,
    shadow_stack_enabled,
)
from vtx.x86.decode import Instruction, read_register, write_register
from vtx.x86.instructions.common import (
    ARITHMETIC,
    operand_address,
    require_feature,
    require_protected_mode,
    require_ring_0,
)
from vtx.x86.outcome import gp, ud
from vtx.x86.shadow_stack import ShadowStack, free, take
from vtx.x86.state import MASK64, Cr4, Rflags

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_IN_64_BIT_MODE: Final = 1 << 0  # of a restore token and of a previous-SSP token
_PREVIOUS: Final = 1 << 1  # of a previous-SSP token
_QUADWORDS: Final = frozenset((Mnemonic.INCSSPQ, Mnemonic.RDSSPQ, Mnemonic.WRSSQ, Mnemonic.WRUSSQ))


def _size(instruction: Instruction) -> int:
    return 8 if instruction.mnemonic in _QUADWORDS else 4


def _require_shadow_stack(cpu: LogicalProcessor) -> None:
    require_feature(cpu, "CET_SS")
    if not has_shadow_stack(cpu.state):
        raise ud()


def _require_supervisor_shadow_stack(cpu: LogicalProcessor, *, tokens: bool = False) -> None:
    """``tokens`` if the instruction is about tokens, for which FRED has no use."""
    require_feature(cpu, "CET_SS")
    require_protected_mode(cpu)
    if not shadow_stack_enabled(cpu.state, 0) or (tokens and fred.is_enabled(cpu.state)):
        raise ud()
    require_ring_0(cpu)


def _aligned_operand(cpu: LogicalProcessor, instruction: Instruction, size: int, *, write: bool) -> int:
    linear = operand_address(cpu, instruction, size, write=write)
    if linear % size:
        raise gp(0)
    return linear


def _set_carry(cpu: LogicalProcessor, carry: bool) -> None:
    cpu.state.rflags = cpu.state.rflags & ~ARITHMETIC | (Rflags.CF if carry else 0)


def increment(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INCSSPD, INCSSPQ: the first and the last of the values passed over are read."""
    _require_shadow_stack(cpu)
    state, size = cpu.state, _size(instruction)
    register = instruction.registers[0]
    assert register is not None
    count = read_register(state, register) & 0xFF
    for number in (0, max(count, 1) - 1):
        cpu.mmu.shadow_read((state.ssp + number * size) & MASK64, size, user=state.cpl == 3)
    state.ssp = (state.ssp + count * size) & MASK64
    cpu.retire(instruction)


def read_pointer(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDSSPD, RDSSPQ."""
    register = instruction.registers[0]
    assert register is not None
    if has_shadow_stack(cpu.state):
        write_register(cpu.state, register, cpu.state.ssp)
    cpu.retire(instruction)


def save_previous(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SAVEPREVSSP: leave a restore token on the shadow stack that RSTORSSP has switched from."""
    _require_shadow_stack(cpu)
    state = cpu.state
    if state.ssp & 7:
        raise gp(0)
    stack, long = ShadowStack.of(state, cpu.mmu), state.in_64_bit_mode
    token = stack.pop(8)
    if state.rflags & Rflags.CF and (long or stack.pop(4)):
        raise gp(0)  # the hole for alignment, which is zero
    if not token & _PREVIOUS or (not long and token >> 32):
        raise gp(0)
    previous = ShadowStack(cpu.mmu, token & ~3, stack.user)
    restore = previous.pointer | (_IN_64_BIT_MODE if long else 0)
    if previous.pointer & 7:
        previous.push(0, 4)
    previous.push(restore, 8)
    state.ssp = stack.pointer
    cpu.retire(instruction)


def restore_saved(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RSTORSSP: switch to the shadow stack whose restore token is the operand, which remembers the former SSP."""
    _require_shadow_stack(cpu)
    state = cpu.state
    linear = _aligned_operand(cpu, instruction, 8, write=False)
    long, user = state.in_64_bit_mode, state.cpl == 3
    mode = _IN_64_BIT_MODE if long else 0
    token = cpu.mmu.shadow_read(linear, 8, user=user)
    saved = token & ~_IN_64_BIT_MODE
    if token & 3 != mode or (not long and token >> 32) or (saved - 8 & MASK64) & ~7 != linear:
        raise cp(ControlProtection.RSTORSSP)
    cpu.mmu.shadow_write(linear, 8, state.ssp | mode | _PREVIOUS, user=user)
    state.ssp = linear
    _set_carry(cpu, bool(token & 4))
    cpu.retire(instruction)


def _store(cpu: LogicalProcessor, instruction: Instruction, *, user: bool) -> None:
    size = _size(instruction)
    register = instruction.registers[1]
    assert register is not None
    linear = _aligned_operand(cpu, instruction, size, write=True)
    cpu.mmu.shadow_write(linear, size, read_register(cpu.state, register), user=user)
    cpu.retire(instruction)


def store(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """WRSSD, WRSSQ."""
    require_feature(cpu, "CET_SS")
    if not may_write_shadow_stack(cpu.state):
        raise ud()
    _store(cpu, instruction, user=cpu.state.cpl == 3)


def store_user(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """WRUSSD, WRUSSQ: as the user would, whatever the controls of its privilege level."""
    require_feature(cpu, "CET_SS")
    require_protected_mode(cpu)
    if not cpu.state.cr4 & Cr4.CET:
        raise ud()
    require_ring_0(cpu)
    _store(cpu, instruction, user=True)


def set_busy(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SETSSBSY: take the shadow stack of privilege level 0."""
    _require_supervisor_shadow_stack(cpu, tokens=True)
    token = cpu.state.pl_ssp[0]
    if token & 7:
        raise gp(0)
    if (not cpu.state.in_64_bit_mode and token >> 32) or not take(cpu.mmu, token):
        raise cp(ControlProtection.SETSSBSY)
    cpu.state.ssp = token
    cpu.retire(instruction)


def clear_busy(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """CLRSSBSY: CF says that there was no busy token."""
    _require_supervisor_shadow_stack(cpu, tokens=True)
    linear = _aligned_operand(cpu, instruction, 8, write=True)
    _set_carry(cpu, not free(cpu.mmu, linear))
    cpu.state.ssp = 0
    cpu.retire(instruction)


HANDLERS: Final = {
    Mnemonic.INCSSPD: increment,
    Mnemonic.INCSSPQ: increment,
    Mnemonic.RDSSPD: read_pointer,
    Mnemonic.RDSSPQ: read_pointer,
    Mnemonic.SAVEPREVSSP: save_previous,
    Mnemonic.RSTORSSP: restore_saved,
    Mnemonic.WRSSD: store,
    Mnemonic.WRSSQ: store,
    Mnemonic.WRUSSD: store_user,
    Mnemonic.WRUSSQ: store_user,
    Mnemonic.SETSSBSY: set_busy,
    Mnemonic.CLRSSBSY: clear_busy,
}
