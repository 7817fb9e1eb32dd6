"""What only a look at every single instruction can find: breakpoints, branches, and what follows an indirect one.

The engine knows neither debug registers nor branch records nor trackers. While one of them can matter, the processor
executes one instruction at a time and looks at its address and memory operands first, and at where it went afterwards;
guests that use none of them pay nothing.

Spec: SDM Vol. 3, "Breakpoint Field Recognition"; "Single-Stepping on Branches". APM Vol. 2, "Global Interrupt Flag,
STGI and CLGI Instructions".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Decoder, FlowControl, Mnemonic

from vtx.x86 import access, branches, conditions, control_flow, indirect_branches
from vtx.x86.decode import Instruction
from vtx.x86.execution import STEP
from vtx.x86.linear_masking import data_address
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.profile import Profile
from vtx.x86.state import CpuState, Cr4, Rflags, Shadow

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_ENABLES: Final = 0xFF  # L0, G0 ... L3, G3 of DR7
_RF: Final = int(Rflags.RF)
_TF: Final = int(Rflags.TF)
_DE: Final = int(Cr4.DE)
_CET: Final = int(Cr4.CET)
_LENGTHS: Final = (1, 2, 8, 4)
_EXECUTE, _WRITE, _PORT, _READ_WRITE = range(4)
# Of CpuState.pending_debug, which has the layout of the VMCS field.
ENABLED_BREAKPOINT: Final = 1 << 12
PENDING_SINGLE_STEP: Final = 1 << 14

_ALWAYS_TAKEN: Final = frozenset(
    (
        *(FlowControl.UNCONDITIONAL_BRANCH, FlowControl.INDIRECT_BRANCH, FlowControl.RETURN),
        *(FlowControl.CALL, FlowControl.INDIRECT_CALL),
    )
)
# VMX instructions, whose flow of control is no branch of the program.
_NO_BRANCH: Final = frozenset((Mnemonic.VMLAUNCH, Mnemonic.VMRESUME, Mnemonic.VMCALL, Mnemonic.VMMCALL, Mnemonic.VMRUN))


def is_needed(state: CpuState) -> bool:
    """Whether instructions must be looked at one by one."""
    return (
        bool(state.dr7 & _ENABLES)
        or (bool(state.debugctl) and branches.are_watched(state))
        or (bool(state.cr4 & _CET) and control_flow.watches_next(state))
    )


def _breakpoints(state: CpuState, kinds: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """(number, kind, address, length) of the enabled breakpoints of ``kinds``."""
    found = []
    for number in range(4):
        if state.dr7 >> 2 * number & 3:
            field = state.dr7 >> 16 + 4 * number
            kind, length = field & 3, _LENGTHS[field >> 2 & 3]
            if kind in kinds:
                found.append((number, kind, state.dr[number] & ~(length - 1), length))
    return found


def are_discarded(state: CpuState, profile: Profile) -> bool:
    """Whether breakpoints that match now are ignored for good: while the global interrupt flag is clear."""
    return not state.gif and not profile.breakpoints_without_gif


def before(processor: LogicalProcessor) -> tuple[Fault | None, int]:
    """Look at the instruction at RIP: the fault it raises before it executes, and the data breakpoints it will hit.

    The breakpoints are bits 3:0 as in DR6. Raises `InstructionAborted` if the instruction cannot be fetched.
    """
    state = processor.state
    if are_discarded(state, processor.profile):
        return None, 0
    # On AMD processors, MOV SS holds traps back, but not the fault of the next instruction's breakpoint.
    held_back = state.shadow & Shadow.MOV_SS and not processor.profile.is_amd
    if not state.rflags & _RF and not held_back:
        hit = 0
        for number, _, address, _ in _breakpoints(state, (_EXECUTE,)):
            hit |= (address == state.linear_rip) << number
        if hit:
            return Fault(Vector.DB, debug=hit), 0
    operands = access.operands(processor)
    hits = 0
    for number, kind, address, length in _breakpoints(state, (_WRITE, _READ_WRITE)):
        for operand in operands:
            linear = data_address(state, operand.linear)
            overlaps = linear < address + length and address < linear + operand.size
            if overlaps and (operand.writes or kind == _READ_WRITE):
                hits |= 1 << number
    return None, hits


def step(processor: LogicalProcessor) -> None:
    """Execute one instruction with breakpoints and branch records."""
    state, extension = processor.state, processor.virtualization
    try:
        instruction = processor.fetch()
        fault, hits = before(processor)
        if fault is None and control_flow.watches_next(state):
            fault = indirect_branches.before(processor, instruction)
    except InstructionAborted as aborted:
        processor.abort(aborted.cause)
        return
    if fault is not None:
        processor.raise_fault(fault)
        return
    rip, traps, transitions = state.rip, state.rflags & _TF, extension and extension.transitions
    debugctl = state.debugctl
    reload, processor.reload = processor.reload, False
    event = processor.engine.run(state, STEP, reload=reload)
    processor.forget_implicit_accesses()
    if not processor.handle(event) or (extension and extension.transitions) != transitions:
        return  # it did not complete, or what follows is on the other side of a VM entry or VM exit
    if hits:
        state.pending_debug |= hits | ENABLED_BREAKPOINT
    if debugctl and instruction is not None:
        _follow_branch(state, instruction, rip, single_step_on_branches=bool(debugctl & branches.BTF and traps))


def _is_taken(state: CpuState, instruction: Instruction, rip: int) -> bool:
    """Whether ``instruction`` at ``rip``, which has completed, was a branch, and taken."""
    if instruction.mnemonic in _NO_BRANCH:
        return False
    flow = Decoder(instruction.bits, instruction.encoding).decode().flow_control
    if flow in _ALWAYS_TAKEN:
        return True
    if flow != FlowControl.CONDITIONAL_BRANCH:
        return False
    return state.rip != rip + instruction.length or conditions.holds(instruction, state)


def _follow_branch(state: CpuState, instruction: Instruction, rip: int, *, single_step_on_branches: bool) -> None:
    """``instruction`` at ``rip`` completed: record it if it is a branch taken, and trap on nothing else if asked to."""
    if _is_taken(state, instruction, rip):
        if state.debugctl & branches.LBR:
            branches.record(state, rip)
    elif single_step_on_branches:
        state.pending_debug &= ~PENDING_SINGLE_STEP


def port_hits(state: CpuState, port: int, size: int) -> int:
    """The I/O breakpoints (bits 3:0 as in DR6) that an access to ``size`` ports from ``port`` hits."""
    if not state.dr7 & _ENABLES or not state.cr4 & _DE:
        return 0
    hits = 0
    for number, _, address, length in _breakpoints(state, (_PORT,)):
        hits |= (port < address + length and address < port + size) << number
    return hits
