"""Near branches where control-flow enforcement or Intel MPX watches them; elsewhere the engine executes them by itself.

Everything is checked, and pushed or popped, before anything is committed.

Interpretations. Jcc initializes the bound registers whether or not its condition holds.

Spec: SDM Vol. 2, "CALL—Call Procedure", "RET—Return From Procedure", "JMP—Jump", "Jcc—Jump if Condition Is Met"; SDM
Vol. 1, "Shadow Stacks", "Indirect Branch Tracking", "CALL, RET, JMP and All Jcc".
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from attrs import frozen
from iced_x86 import Decoder, MemorySizeExt, Mnemonic, OpKind, Register, RegisterExt

from vtx.x86 import access, bounds, conditions, control_flow, operand_checks
from vtx.x86.alignment import checks_alignment
from vtx.x86.control_flow import ControlProtection, cp, has_shadow_stack
from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import read_operand
from vtx.x86.instructions.tasks import far_transfer
from vtx.x86.linear import is_canonical, linear_address_width
from vtx.x86.near_branches import FAR_TRANSFERS, initializes_bounds
from vtx.x86.outcome import InstructionAborted, gp
from vtx.x86.shadow_stack import ShadowStack
from vtx.x86.stack import Stack
from vtx.x86.state import MASK32, MASK64, CpuState, Gpr, Rflags

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_RF: Final = int(Rflags.RF)
_TF: Final = int(Rflags.TF)
_BRANCH_SIZES: Final = {OpKind.NEAR_BRANCH16: 2, OpKind.NEAR_BRANCH32: 4, OpKind.NEAR_BRANCH64: 8}


@frozen
class _Form:
    """What the bytes of a near branch say: ``size`` of the instruction pointer in bytes, ``no_track`` the prefix 3EH.

    ``displacement`` counts from the begin of the instruction; None for what is indirect. ``bound`` is the prefix BND,
    or that the branch needs none to leave the bound registers alone.
    """

    size: int
    displacement: int | None
    no_track: bool
    bound: bool


@lru_cache(maxsize=4096)
def _form(encoding: bytes, bits: int) -> _Form:
    raw = Decoder(bits, encoding).decode()
    displacement = None
    if raw.mnemonic == Mnemonic.RET:
        size = raw.stack_pointer_increment - (raw.immediate(0) if raw.op_count else 0)
    elif raw.op0_kind in _BRANCH_SIZES:
        size, displacement = _BRANCH_SIZES[raw.op0_kind], int(raw.near_branch_target)
    elif raw.op0_kind == OpKind.MEMORY:
        size = MemorySizeExt.size(raw.memory_size)
    else:
        size = RegisterExt.size(raw.op0_register)
    return _Form(size, displacement, raw.segment_prefix == Register.DS, not initializes_bounds(raw))


def _check_operands(cpu: LogicalProcessor) -> None:
    """The faults of segmentation and alignment of all memory operands, the stack among them."""
    state = cpu.state
    if state.in_64_bit_mode and not checks_alignment(state):
        return  # what is left are addresses that are not canonical, which each access finds out
    fault = operand_checks.operand_fault(state, access.operands(cpu))
    if fault is not None:
        raise InstructionAborted(fault)


def _check_target(state: CpuState, target: int) -> None:
    if state.in_64_bit_mode:
        if not is_canonical(target, linear_address_width(state)):
            raise gp(0)
    elif target > state.cs.limit:
        raise gp(0)


def _target(cpu: LogicalProcessor, instruction: Instruction, form: _Form) -> int:
    target = (
        read_operand(cpu, instruction, 0, form.size) if form.displacement is None else cpu.state.rip + form.displacement
    )
    return target & (1 << 8 * form.size) - 1


def _commit(cpu: LogicalProcessor, form: _Form, rip: int, pointer: int | None = None) -> None:
    state = cpu.state
    if not form.bound and bounds.initialize(state):
        cpu.changed_system_state()  # what follows need not be watched
    if pointer is not None:
        state.gpr[Gpr.RSP] = pointer
    state.rip = rip
    single_step = bool(state.rflags & _TF)
    state.rflags &= ~_RF
    cpu.completed(single_step=single_step)


def _track(state: CpuState, form: _Form) -> None:
    if form.displacement is None:
        control_flow.near_branch(state, no_track=form.no_track)


def near_call(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """Near CALL. One of the next instruction, which only reads RIP, is not pushed on the shadow stack."""
    state, form = cpu.state, _form(instruction.encoding, instruction.bits)
    _check_operands(cpu)
    size, target = form.size, _target(cpu, instruction, form)
    next_rip = (state.rip + instruction.length) & (MASK64 if state.in_64_bit_mode else MASK32)
    _check_target(state, target)
    stack = Stack.of(state, cpu.mmu)
    stack.push(next_rip, size=size)
    if has_shadow_stack(state) and (form.displacement is None or target != next_rip):
        shadow = ShadowStack.of(state, cpu.mmu)
        shadow.push(next_rip & (1 << 8 * size) - 1, 8 if size == 8 else 4)
        state.ssp = shadow.pointer
    _commit(cpu, form, target, stack.pointer)
    _track(state, form)


def near_return(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """Near RET."""
    state = cpu.state
    _check_operands(cpu)
    form = _form(instruction.encoding, instruction.bits)
    size = form.size
    stack = Stack.of(state, cpu.mmu)
    target = stack.pop(size)
    ssp = state.ssp
    if has_shadow_stack(state):
        shadow = ShadowStack.of(state, cpu.mmu)
        if shadow.pop(8 if size == 8 else 4) != target:
            raise cp(ControlProtection.NEAR_RET)
        ssp = shadow.pointer
    _check_target(state, target)
    stack.release(instruction.immediate)
    state.ssp = ssp
    _commit(cpu, form, target, stack.pointer)


def near_jump(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """Near JMP."""
    form = _form(instruction.encoding, instruction.bits)
    _check_operands(cpu)
    target = _target(cpu, instruction, form)
    _check_target(cpu.state, target)
    _commit(cpu, form, target)
    _track(cpu.state, form)


def near_conditional(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """Jcc."""
    state, form = cpu.state, _form(instruction.encoding, instruction.bits)
    target = (state.rip + instruction.length) & (MASK64 if state.in_64_bit_mode else MASK32)
    if conditions.holds(instruction, state):
        target = _target(cpu, instruction, form)
        _check_target(state, target)
    _commit(cpu, form, target)


def call(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """CALL, near or far."""
    if instruction.code in FAR_TRANSFERS:
        far_transfer(cpu, instruction)
    else:
        near_call(cpu, instruction)


def jump(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """JMP, near or far."""
    if instruction.code in FAR_TRANSFERS:
        far_transfer(cpu, instruction)
    else:
        near_jump(cpu, instruction)


CONDITIONAL: Final = frozenset(
    (
        *(Mnemonic.JO, Mnemonic.JNO, Mnemonic.JB, Mnemonic.JAE, Mnemonic.JE, Mnemonic.JNE, Mnemonic.JBE, Mnemonic.JA),
        *(Mnemonic.JS, Mnemonic.JNS, Mnemonic.JP, Mnemonic.JNP, Mnemonic.JL, Mnemonic.JGE, Mnemonic.JLE, Mnemonic.JG),
    )
)
"""Jcc, without JrCXZ."""

HANDLERS: Final = {
    Mnemonic.CALL: call,
    Mnemonic.JMP: jump,
    Mnemonic.RET: near_return,
    **dict.fromkeys(CONDITIONAL, near_conditional),
}
