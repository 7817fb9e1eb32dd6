"""CPUID (SDM Vol. 2A, "CPUID—CPU Identification")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import evolve
from iced_x86 import Mnemonic

from vtx.x86.cpuid import MISC_ENABLE_MONITOR, Dynamic, cpuid
from vtx.x86.decode import Instruction
from vtx.x86.msr_table import IA32_MISC_ENABLE, IA32_XSS
from vtx.x86.operations import SIMPLE, Plain
from vtx.x86.state import MASK32, Gpr

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_EXTENDED_STATE_LEAF: Final = 0xD


def execute_cpuid(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """CPUID."""
    if cpu.intercepts(SIMPLE[Plain.CPUID], instruction):
        return
    gpr = cpu.state.gpr
    misc_enable = cpu.msrs.values.get(IA32_MISC_ENABLE, MISC_ENABLE_MONITOR)
    dynamic = Dynamic.of(cpu.state, cpu.index, cpu.count, cpu.platform.apic_enabled, misc_enable)
    leaf, subleaf = gpr[Gpr.RAX] & MASK32, gpr[Gpr.RCX] & MASK32
    if leaf == _EXTENDED_STATE_LEAF:
        dynamic = evolve(dynamic, xss=cpu.msrs.values.get(IA32_XSS, 0))
    gpr[Gpr.RAX], gpr[Gpr.RBX], gpr[Gpr.RCX], gpr[Gpr.RDX] = cpuid(cpu.profile, leaf, subleaf, dynamic)
    cpu.retire(instruction)


HANDLERS: Final = {Mnemonic.CPUID: execute_cpuid}
