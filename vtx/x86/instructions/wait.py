"""Waiting: MONITOR and MWAIT; what AMD (MONITORX, MWAITX) and Intel (UMONITOR, UMWAIT, TPAUSE) have at every CPL.

Interpretations. Waits may end early for reasons of the implementation's own: UMWAIT ends at once, TPAUSE after at most
a few thousand ticks. UMONITOR arms nothing. The timer of MWAITX counts the host's ticks in a guest too, whatever its
TSC ratio.

Spec: SDM Vol. 2, the instructions' pages; Vol. 4, "Architectural MSRs" (IA32_UMWAIT_CONTROL); APM Vol. 3,
"General-Purpose Instruction Reference" (MONITORX, MWAITX); APM Vol. 2, "Instruction Intercepts".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.cpuid import MISC_ENABLE_MONITOR
from vtx.x86.decode import Instruction, read_register
from vtx.x86.instructions.common import ARITHMETIC, operand_address, privilege, read_linear, require_feature
from vtx.x86.monitor import LONGEST_WAIT, Monitor
from vtx.x86.msr_table import IA32_MISC_ENABLE, IA32_UMWAIT_CONTROL
from vtx.x86.operations import SIMPLE, MonitorWait, Plain, Simple
from vtx.x86.outcome import gp, ud
from vtx.x86.second_level import AccessKind
from vtx.x86.spinning import PAUSE_TICKS
from vtx.x86.state import MASK32, Cr4, Gpr, Rflags, SegmentRegister

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_DEEPEST_STATE: Final = 1  # bit 0 of the operand: C0.1; clear: C0.2
_TIME_LIMIT: Final = MASK32 & ~3  # of IA32_UMWAIT_CONTROL, in ticks of the time-stamp counter; 0: none
_LONGEST: Final = PAUSE_TICKS << 5

# Extensions of MWAIT and MWAITX, in ECX.
_MASKED_INTERRUPTS_BREAK: Final = 1 << 0
_TIMER: Final = 1 << 1  # of MWAITX: EBX limits the wait


def _require_monitor(cpu: LogicalProcessor) -> None:
    """#UD unless CPUID reports MONITOR, which IA32_MISC_ENABLE can switch off, or above CPL 0."""
    require_feature(cpu, "MONITOR")
    if cpu.state.cpl or not cpu.msrs.values.get(IA32_MISC_ENABLE, MISC_ENABLE_MONITOR) & MISC_ENABLE_MONITOR:
        raise ud()


def monitor(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MONITOR."""
    _require_monitor(cpu)
    _set_up_monitor(cpu, instruction)


def monitorx(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MONITORX."""
    require_feature(cpu, "MONITORX")
    _set_up_monitor(cpu, instruction)


def _set_up_monitor(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """Arm the monitor. VMX exits before the faults of the operands, SVM after them."""
    state, is_amd, operation = cpu.state, cpu.profile.is_amd, SIMPLE[Plain.MONITOR]
    if not is_amd and cpu.intercepts(operation, instruction):
        return
    if state.gpr[Gpr.RCX] & MASK32:
        raise gp(0)
    linear = operand_address(cpu, instruction, 1)
    read_linear(cpu, linear, 1)
    if is_amd and cpu.intercepts(operation, instruction):
        return
    user, ac = privilege(cpu)
    cpu.monitor = Monitor.arm(cpu.memory, cpu.mmu.translate(linear, AccessKind.READ, user=user, ac=ac))
    cpu.retire(instruction)


def mwait(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MWAIT."""
    _require_monitor(cpu)
    _wait_for_store(cpu, instruction, _MASKED_INTERRUPTS_BREAK)


def mwaitx(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """MWAITX: a timer of zero is none."""
    require_feature(cpu, "MONITORX")
    _wait_for_store(cpu, instruction, _MASKED_INTERRUPTS_BREAK | _TIMER)


def _wait_for_store(cpu: LogicalProcessor, instruction: Instruction, known: int) -> None:
    """Wait with the extensions asked for, all of them ``known``. The order is as in `_set_up_monitor`."""
    gpr, is_amd = cpu.state.gpr, cpu.profile.is_amd
    armed = cpu.monitor is not None and not cpu.monitor.triggered(cpu.memory)
    if not is_amd and cpu.intercepts(MonitorWait(armed), instruction):
        return
    extensions = gpr[Gpr.RCX] & MASK32
    if extensions & ~known:
        raise gp(0)
    if is_amd and cpu.intercepts(MonitorWait(armed), instruction):
        return
    timer = gpr[Gpr.RBX] & MASK32 if extensions & _TIMER else 0
    cpu.charge(PAUSE_TICKS)
    cpu.retire(instruction)
    cpu.begin_wait(masked_too=bool(extensions & _MASKED_INTERRUPTS_BREAK), ticks=timer or LONGEST_WAIT)


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
    state.rflags = state.rflags & ~ARITHMETIC | (Rflags.CF if stopped else 0)
    cpu.retire(instruction)


def umwait(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """UMWAIT."""
    _wait(cpu, instruction, Plain.UMWAIT, PAUSE_TICKS)


def tpause(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """TPAUSE."""
    _wait(cpu, instruction, Plain.TPAUSE, _LONGEST)


HANDLERS: Final = {
    Mnemonic.MONITOR: monitor,
    Mnemonic.MWAIT: mwait,
    Mnemonic.MONITORX: monitorx,
    Mnemonic.MWAITX: mwaitx,
    Mnemonic.UMONITOR: umonitor,
    Mnemonic.UMWAIT: umwait,
    Mnemonic.TPAUSE: tpause,
}
