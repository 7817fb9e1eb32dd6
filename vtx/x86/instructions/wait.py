"""UMONITOR, UMWAIT and TPAUSE: MONITOR, MWAIT and a timed PAUSE for every privilege level.

Interpretations. Waits may end early for reasons of the implementation's own: UMWAIT ends at once, TPAUSE after at most
a few thousand ticks. UMONITOR arms nothing.

Spec: SDM Vol. 2, the instructions' pages; Vol. 4, "Architectural MSRs" (IA32_UMWAIT_CONTROL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction, read_register
from vtx.x86.instructions.common import read_linear, require_feature
from vtx.x86.msr_table import IA32_UMWAIT_CONTROL
from vtx.x86.operations import Plain, Simple
from vtx.x86.outcome import gp
from vtx.x86.spinning import PAUSE_TICKS
from vtx.x86.state import MASK32, Cr4, Gpr, Rflags, SegmentRegister

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_ARITHMETIC: Final = int(Rflags.CF | Rflags.PF | Rflags.AF | Rflags.ZF | Rflags.SF | Rflags.OF)
_DEEPEST_STATE: Final = 1  # bit 0 of the operand: C0.1; clear: C0.2
_TIME_LIMIT: Final = MASK32 & ~3  # of IA32_UMWAIT_CONTROL, in ticks of the time-stamp counter; 0: none
_LONGEST: Final = PAUSE_TICKS << 5


def umonitor(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """UMONITOR: checks its address as a one-byte read."""
    require_feature(cpu, "WAITPKG")
    state, register = cpu.state, instruction.registers[0]
    assert register is not None
    address = read_register(state, register) & ((1 << 8 * instruction.address_size) - 1)
    if not state.in_64_bit_mode:
        address = (address + state.segments[SegmentRegister.DS].base) & MASK32
    read_linear(cpu, address, 1)
    cpu.retire(instruction)


def _wait(cpu: LogicalProcessor, instruction: Instruction, kind: Plain, longest: int) -> None:
    """Wait until the time-stamp counter reaches EDX:EAX, the operating system's limit, or ``longest`` ticks pass."""
    require_feature(cpu, "WAITPKG")
    state, register = cpu.state, instruction.registers[0]
    assert register is not None
    if read_register(state, register) & MASK32 & ~_DEEPEST_STATE or (state.cpl and state.cr4 & Cr4.TSD):
        raise gp(0)
    if cpu.intercepts(Simple(kind), instruction):
        return
    now, extension = cpu.tsc(), cpu.virtualization
    if extension is not None and extension.non_root:
        now = extension.guest_tsc(now)
    left = ((state.gpr[Gpr.RDX] & MASK32) << 32 | state.gpr[Gpr.RAX] & MASK32) - now
    limit = cpu.msrs.values.get(IA32_UMWAIT_CONTROL, 0) & _TIME_LIMIT
    stopped = 0 < limit < left and limit <= longest
    cpu.charge(max(PAUSE_TICKS, min(left, limit or left, longest)))
    state.rflags = state.rflags & ~_ARITHMETIC | (Rflags.CF if stopped else 0)
    cpu.retire(instruction)


def umwait(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """UMWAIT."""
    _wait(cpu, instruction, Plain.UMWAIT, PAUSE_TICKS)


def tpause(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """TPAUSE."""
    _wait(cpu, instruction, Plain.TPAUSE, _LONGEST)


HANDLERS: Final = {Mnemonic.UMONITOR: umonitor, Mnemonic.UMWAIT: umwait, Mnemonic.TPAUSE: tpause}
