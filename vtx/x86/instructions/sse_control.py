"""LDMXCSR, STMXCSR, FXRSTOR and FXSAVE: the engine would take any value for MXCSR, and keeps its exceptions elsewhere.

Interpretations. With CR4.OSFXSR clear, FXSAVE and FXRSTOR leave MXCSR and the XMM registers alone, as they may.

Spec: SDM Vol. 2, "LDMXCSR—Load MXCSR Register", "FXRSTOR—Restore x87 FPU, MMX, XMM, and MXCSR State"; Vol. 1, "MXCSR
Control and Status Register"; APM Vol. 2, "Extended Feature Enable Register (EFER)" (FFXSR).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from attrs import frozen
from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import operand_address, privilege, read_linear, write_linear
from vtx.x86.outcome import Fault, InstructionAborted, Vector, gp, ud
from vtx.x86.second_level import AccessKind
from vtx.x86.state import MASK32, MASK64, Cr0, Cr4, Efer

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

MXCSR_MASK: Final = 0xFFFF
"""The bits of MXCSR that exist."""

# Where things are in the area that FXSAVE stores, and in the legacy region of that of XSAVE.
X87_CONTROL: Final = slice(0, 24)
MXCSR: Final = slice(24, 28)
X87_REGISTERS: Final = slice(32, 160)
XMM: Final = 160
_ALL_XMM: Final = slice(XMM, 416)
_LOW_XMM: Final = slice(XMM, 288)  # outside 64-bit mode

_AREA_SIZE: Final = 512
_AREA_ALIGNMENT: Final = 16
_TS, _EM = int(Cr0.TS), int(Cr0.EM)
_OSFXSR: Final = int(Cr4.OSFXSR)
_FFXSR: Final = int(Efer.FFXSR)


def require_not_task_switched(cpu: LogicalProcessor, mask: int = _TS) -> None:
    """#NM if CR0.TS is set, or another bit of ``mask``."""
    if cpu.state.cr0 & mask:
        raise InstructionAborted(Fault(Vector.NM))


def require_sse(cpu: LogicalProcessor) -> None:
    """#UD or #NM unless SSE instructions may be executed."""
    if cpu.state.cr0 & _EM or not cpu.state.cr4 & _OSFXSR:
        raise ud()
    require_not_task_switched(cpu)


def xmm_registers(cpu: LogicalProcessor) -> slice:
    """Where the XMM registers are that there are in this mode."""
    return _ALL_XMM if cpu.state.in_64_bit_mode else _LOW_XMM


def narrow(control: bytes) -> bytes:
    """`X87_CONTROL` with 32-bit pointers; processors no longer save the selectors."""
    head, instruction, operand = struct.unpack_from("<QQQ", control)
    return struct.pack("<QQQ", head, instruction & MASK32, operand & MASK32)


@frozen
class StateArea:
    """Registers in memory at ``linear``, accessed with the privilege of the running code."""

    cpu: LogicalProcessor
    linear: int

    def at(self, offset: int) -> int:
        """The linear address of a part of it."""
        return (self.linear + offset) & (MASK64 if self.cpu.state.in_64_bit_mode else MASK32)

    def read(self, offset: int, size: int) -> bytes:
        """A part of it."""
        user, ac = privilege(self.cpu)
        return self.cpu.mmu.read_bytes(self.at(offset), size, user=user, ac=ac)

    def check_writable(self, offset: int, size: int) -> None:
        """The faults of writing a part of it."""
        user, ac = privilege(self.cpu)
        self.cpu.mmu.check(self.at(offset), size, AccessKind.WRITE, user=user, ac=ac)

    def write(self, offset: int, data: bytes) -> None:
        """Store a part of it."""
        user, ac = privilege(self.cpu)
        self.cpu.mmu.write_bytes(self.at(offset), data, user=user, ac=ac)


def check_mxcsr(legacy: bytes | bytearray) -> None:
    """#GP(0) for bits that MXCSR has not."""
    if int.from_bytes(legacy[MXCSR], "little") & ~MXCSR_MASK:
        raise gp(0)


def load_registers(cpu: LogicalProcessor, legacy: bytes | bytearray) -> None:
    """Replace the x87 and SSE registers."""
    cpu.engine.set_legacy_area(bytes(legacy))
    cpu.reload = True  # MXCSR may unmask exceptions


def stmxcsr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """STMXCSR."""
    require_sse(cpu)
    linear = operand_address(cpu, instruction, 4, write=True)
    write_linear(cpu, linear, 4, int.from_bytes(cpu.engine.legacy_area()[MXCSR], "little"))
    cpu.retire(instruction)


def ldmxcsr(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LDMXCSR."""
    require_sse(cpu)
    linear = operand_address(cpu, instruction, 4)
    legacy = bytearray(cpu.engine.legacy_area())
    legacy[MXCSR] = read_linear(cpu, linear, 4).to_bytes(4, "little")
    check_mxcsr(legacy)
    load_registers(cpu, legacy)
    cpu.retire(instruction)


def _area(cpu: LogicalProcessor, instruction: Instruction, *, write: bool) -> StateArea:
    require_not_task_switched(cpu, _TS | _EM)
    linear = operand_address(cpu, instruction, _AREA_SIZE, write=write)
    if linear % _AREA_ALIGNMENT:
        raise gp(0)
    return StateArea(cpu, linear)


def _end(cpu: LogicalProcessor) -> int:
    """Where the registers end that FXSAVE and FXRSTOR move: with EFER.FFXSR the kernel does without the XMM ones."""
    state = cpu.state
    fast = state.efer & _FFXSR and state.in_64_bit_mode and not state.cpl
    return X87_REGISTERS.stop if fast else xmm_registers(cpu).stop


def fxsave(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """FXSAVE, which stores MXCSR and the XMM registers only if CR4.OSFXSR is set."""
    area, legacy = _area(cpu, instruction, write=True), cpu.engine.legacy_area()
    control = legacy[X87_CONTROL]
    stored = control if instruction.mnemonic == Mnemonic.FXSAVE64 else narrow(control)
    if cpu.state.cr4 & _OSFXSR:
        stored += legacy[X87_CONTROL.stop : _end(cpu)]
    else:
        stored += area.read(X87_CONTROL.stop, 8) + legacy[X87_REGISTERS]
    area.check_writable(0, len(stored))
    area.write(0, stored)
    cpu.retire(instruction)


def fxrstor(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """FXRSTOR, which takes MXCSR and the XMM registers only if CR4.OSFXSR is set."""
    area, legacy = _area(cpu, instruction, write=False), bytearray(cpu.engine.legacy_area())
    with_sse = bool(cpu.state.cr4 & _OSFXSR)
    rest = slice(X87_REGISTERS.start, _end(cpu)) if with_sse else X87_REGISTERS
    stored = area.read(0, rest.stop)
    control = stored[X87_CONTROL]
    legacy[X87_CONTROL] = control if instruction.mnemonic == Mnemonic.FXRSTOR64 else narrow(control)
    legacy[rest] = stored[rest]
    if with_sse:
        legacy[MXCSR] = stored[MXCSR]
    check_mxcsr(legacy)
    load_registers(cpu, legacy)
    cpu.retire(instruction)


HANDLERS: Final = {
    Mnemonic.LDMXCSR: ldmxcsr,
    Mnemonic.STMXCSR: stmxcsr,
    Mnemonic.FXSAVE: fxsave,
    Mnemonic.FXSAVE64: fxsave,
    Mnemonic.FXRSTOR: fxrstor,
    Mnemonic.FXRSTOR64: fxrstor,
}
