"""RDMSR and WRMSR (SDM Vol. 2, the instructions' pages)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import require_ring_0
from vtx.x86.msr_table import IA32_EFER, IA32_TIME_STAMP_COUNTER
from vtx.x86.operations import ReadMsr, WriteMsr
from vtx.x86.outcome import gp
from vtx.x86.state import MASK32, Gpr

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor


def read_msr(cpu: LogicalProcessor, index: int) -> int:
    """The value of an MSR for software that may have it; #GP(0) if there is none."""
    value = cpu.msrs.read(index)
    if value is None:
        raise gp(0)
    extension = cpu.virtualization
    if index == IA32_TIME_STAMP_COUNTER and extension is not None and extension.non_root:
        value = extension.guest_tsc(value)
    return value


def rdmsr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDMSR. In non-root operation the time-stamp counter is offset as for RDTSC."""
    require_ring_0(cpu)
    gpr = cpu.state.gpr
    index = gpr[Gpr.RCX] & MASK32
    if cpu.intercepts(ReadMsr(index), instruction):
        return
    value = read_msr(cpu, index)
    gpr[Gpr.RAX], gpr[Gpr.RDX] = value & MASK32, value >> 32
    cpu.retire(instruction)


def wrmsr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """WRMSR."""
    require_ring_0(cpu)
    gpr = cpu.state.gpr
    index = gpr[Gpr.RCX] & MASK32
    value = (gpr[Gpr.RDX] & MASK32) << 32 | gpr[Gpr.RAX] & MASK32
    if cpu.intercepts(WriteMsr(index, value), instruction):
        return
    if not cpu.msrs.write(index, value):
        raise gp(0)
    cpu.changed_system_state()
    cpu.retire(instruction)
    extension = cpu.virtualization
    if index == IA32_EFER and extension is not None and extension.non_root:
        extension.efer_written()


HANDLERS: Final = {Mnemonic.RDMSR: rdmsr, Mnemonic.WRMSR: wrmsr}
