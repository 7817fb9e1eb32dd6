"""What only a look at every single instruction can find: breakpoints and misaligned accesses.

The engine knows neither debug registers nor alignment checks. While either can matter, the processor executes one
instruction at a time and looks at its address and memory operands first; guests that use neither pay nothing.

Spec: SDM Vol. 3, "Breakpoint Field Recognition"; "Interrupt 17—Alignment Check Exception (#AC)".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtx.x86 import access
from vtx.x86.execution import STEP, ExceptionTrap, RefusedFill
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Cr0, Cr4, Rflags, Shadow

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_ENABLES: Final = 0xFF  # L0, G0 ... L3, G3 of DR7
_AM: Final = int(Cr0.AM)
_AC: Final = int(Rflags.AC)
_RF: Final = int(Rflags.RF)
_DE: Final = int(Cr4.DE)
_LENGTHS: Final = (1, 2, 8, 4)
_EXECUTE, _WRITE, _PORT, _READ_WRITE = range(4)
_LARGEST_ALIGNMENT: Final = 8
ENABLED_BREAKPOINT: Final = 1 << 12  # of the pending debug exceptions


def checks_alignment(state: CpuState) -> bool:
    """Whether a misaligned data access raises #AC now."""
    return bool(state.cr0 & _AM and state.rflags & _AC) and state.cpl == 3


def is_needed(state: CpuState) -> bool:
    """Whether instructions must be looked at one by one."""
    return bool(state.dr7 & _ENABLES) or (bool(state.cr0 & _AM) and checks_alignment(state))


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


def before(processor: LogicalProcessor) -> tuple[Fault | None, int]:
    """Look at the instruction at RIP: the fault it raises before it executes, and the data breakpoints it will hit.

    The breakpoints are bits 3:0 as in DR6. Raises `InstructionAborted` if the instruction cannot be fetched.
    """
    state = processor.state
    if not state.rflags & _RF and not state.shadow & Shadow.MOV_SS:
        hit = 0
        for number, _, address, _ in _breakpoints(state, (_EXECUTE,)):
            hit |= (address == state.linear_rip) << number
        if hit:
            return Fault(Vector.DB, debug=hit), 0
    operands = access.operands(processor)
    if checks_alignment(state):
        for operand in operands:
            if operand.linear & (min(operand.size, _LARGEST_ALIGNMENT) - 1):
                return Fault(Vector.AC, 0), 0
    hits = 0
    for number, kind, address, length in _breakpoints(state, (_WRITE, _READ_WRITE)):
        for operand in operands:
            overlaps = operand.linear < address + length and address < operand.linear + operand.size
            if overlaps and (operand.writes or kind == _READ_WRITE):
                hits |= 1 << number
    return None, hits


def step(processor: LogicalProcessor) -> None:
    """Execute one instruction with breakpoints and alignment checks."""
    try:
        fault, hits = before(processor)
    except InstructionAborted as aborted:
        processor.abort(aborted.cause)
        return
    if fault is not None:
        processor.raise_fault(fault)
        return
    transitions = processor.transitions_seen
    reload, processor.reload = processor.reload, False
    event = processor.engine.run(processor.state, STEP, reload=reload)
    processor.forget_implicit_accesses()
    processor.handle(event)
    faulted = isinstance(event, RefusedFill) or (isinstance(event, ExceptionTrap) and event.vector != Vector.DB)
    if hits and not faulted and processor.transitions_seen == transitions:
        processor.state.pending_debug |= hits | ENABLED_BREAKPOINT


def port_hits(state: CpuState, port: int, size: int) -> int:
    """The I/O breakpoints (bits 3:0 as in DR6) that an access to ``size`` ports from ``port`` hits."""
    if not state.dr7 & _ENABLES or not state.cr4 & _DE:
        return 0
    hits = 0
    for number, _, address, length in _breakpoints(state, (_PORT,)):
        hits |= (port < address + length and address < port + size) << number
    return hits
