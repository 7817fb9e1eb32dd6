"""HLT, caches, PAUSE, the time-stamp counter, random numbers, RSM.

Interpretations. RDPRU above CPL 0 with CR4.TSD set is an invalid opcode.

Spec: SDM Vol. 2, the instructions' pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86 import smm
from vtx.x86.decode import Instruction, write_register
from vtx.x86.instructions.common import ARITHMETIC, require_feature, require_ring_0
from vtx.x86.msr_table import IA32_APERF, IA32_MPERF, IA32_TSC_AUX, PERF_COUNTER_0, PERF_COUNTERS
from vtx.x86.operations import SIMPLE, Plain
from vtx.x86.outcome import gp, ud
from vtx.x86.state import MASK32, MASK64, Activity, Cr4, Gpr, Rflags

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

WBINVD_TICKS: Final = 20_000  # writing back a cache takes far longer than that, but never less


def hlt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """HLT."""
    require_ring_0(cpu)
    if not cpu.intercepts(SIMPLE[Plain.HLT], instruction):
        cpu.retire(instruction)
        cpu.state.activity = Activity.HLT


def pause(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """PAUSE."""
    if not cpu.intercepts(SIMPLE[Plain.PAUSE], instruction):
        cpu.pause()
        cpu.retire(instruction)


def invd(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """INVD: there are no caches."""
    require_ring_0(cpu)
    if not cpu.intercepts(SIMPLE[Plain.INVD], instruction):
        cpu.retire(instruction)


def wbinvd(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """WBINVD: there are no caches."""
    require_ring_0(cpu)
    if not cpu.intercepts(SIMPLE[Plain.WBINVD], instruction):
        cpu.charge(WBINVD_TICKS)
        cpu.retire(instruction)


def _time_stamp(cpu: LogicalProcessor) -> None:
    extension = cpu.virtualization
    value = cpu.read_tsc()
    if extension is not None and extension.non_root:
        value = extension.guest_tsc(value)
    cpu.state.gpr[Gpr.RAX] = value & MASK32
    cpu.state.gpr[Gpr.RDX] = value >> 32 & MASK32


def _require_time_stamp_access(cpu: LogicalProcessor) -> None:
    if cpu.state.cpl and cpu.state.cr4 & Cr4.TSD:
        raise gp(0)


def rdtsc(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDTSC."""
    _require_time_stamp_access(cpu)
    if not cpu.intercepts(SIMPLE[Plain.RDTSC], instruction):
        _time_stamp(cpu)
        cpu.retire(instruction)


def rdtscp(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDTSCP."""
    require_feature(cpu, "RDTSCP")
    _require_time_stamp_access(cpu)
    if not cpu.intercepts(SIMPLE[Plain.RDTSCP], instruction):
        _time_stamp(cpu)
        cpu.state.gpr[Gpr.RCX] = cpu.msrs.values.get(IA32_TSC_AUX, 0) & MASK32
        cpu.retire(instruction)


def rdpid(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDPID."""
    require_feature(cpu, "RDPID")
    register = instruction.registers[0]
    assert register is not None
    write_register(cpu.state, register, cpu.msrs.values.get(IA32_TSC_AUX, 0) & MASK32)
    cpu.retire(instruction)


def _counter_msr(cpu: LogicalProcessor, number: int) -> int | None:
    profile = cpu.profile
    if profile.is_amd:
        return PERF_COUNTER_0 + number if number < PERF_COUNTERS else None
    return profile.performance.rdpmc(number) if profile.performance is not None else None


def rdpmc(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDPMC of the counters that the profile has."""
    if cpu.state.cpl and cpu.state.protected and not cpu.state.cr4 & Cr4.PCE:
        raise gp(0)
    if cpu.intercepts(SIMPLE[Plain.RDPMC], instruction):
        return
    gpr = cpu.state.gpr
    number = gpr[Gpr.RCX] & MASK32
    index = _counter_msr(cpu, number)
    value = None if index is None else cpu.msrs.read(index)
    if value is None:
        raise gp(0)
    gpr[Gpr.RAX], gpr[Gpr.RDX] = value & MASK32, value >> 32
    cpu.retire(instruction)


_READABLE_BY_USERS: Final = (IA32_MPERF, IA32_APERF)
"""The registers of RDPRU, by their number there."""


def rdpru(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDPRU; a register that it does not know reads zero.

    Spec: APM Vol. 3, "General-Purpose Instruction Reference" (RDPRU).
    """
    require_feature(cpu, "RDPRU")
    gpr = cpu.state.gpr
    if cpu.state.cpl and cpu.state.cr4 & Cr4.TSD:
        raise ud()
    if cpu.intercepts(SIMPLE[Plain.RDPRU], instruction):
        return
    number, value = gpr[Gpr.RCX] & MASK32, 0
    if number < len(_READABLE_BY_USERS):
        value = cpu.msrs.read(_READABLE_BY_USERS[number]) or 0
    gpr[Gpr.RAX], gpr[Gpr.RDX] = value & MASK32, value >> 32
    cpu.retire(instruction)


def _random(cpu: LogicalProcessor, instruction: Instruction, feature: str, kind: Plain) -> None:
    require_feature(cpu, feature)
    if cpu.intercepts(SIMPLE[kind], instruction):
        return
    register = instruction.registers[0]
    assert register is not None
    write_register(cpu.state, register, next_random(cpu) & ((1 << 8 * register.size) - 1))
    cpu.state.rflags = cpu.state.rflags & ~ARITHMETIC | Rflags.CF
    cpu.retire(instruction)


def next_random(cpu: LogicalProcessor) -> int:
    """The next of the processor's deterministic random numbers, 64 bits (SplitMix64)."""
    cpu.random_state = (cpu.random_state + 0x9E37_79B9_7F4A_7C15) & MASK64
    value = cpu.random_state
    value = ((value ^ value >> 30) * 0xBF58_476D_1CE4_E5B9) & MASK64
    value = ((value ^ value >> 27) * 0x94D0_49BB_1331_11EB) & MASK64
    return value ^ value >> 31


def rdrand(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDRAND, reproducible from the machine's seed."""
    _random(cpu, instruction, "RDRAND", Plain.RDRAND)


def rdseed(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDSEED, reproducible from the machine's seed."""
    _random(cpu, instruction, "RDSEED", Plain.RDSEED)


def rsm(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RSM, which is invalid outside SMM."""
    if cpu.intercepts(SIMPLE[Plain.RSM], instruction):
        return
    if cpu.state.smm is not None:
        smm.leave(cpu)
    else:
        raise ud()


HANDLERS: Final = {
    Mnemonic.HLT: hlt,
    Mnemonic.PAUSE: pause,
    Mnemonic.INVD: invd,
    Mnemonic.WBINVD: wbinvd,
    Mnemonic.RDTSC: rdtsc,
    Mnemonic.RDTSCP: rdtscp,
    Mnemonic.RDPID: rdpid,
    Mnemonic.RDPMC: rdpmc,
    Mnemonic.RDPRU: rdpru,
    Mnemonic.RDRAND: rdrand,
    Mnemonic.RDSEED: rdseed,
    Mnemonic.RSM: rsm,
}
