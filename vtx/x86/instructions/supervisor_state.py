"""XSAVES and XRSTORS: x87, SSE and supervisor state in the compacted format.

The one supervisor state component modelled is HDC state, a single MSR.

Interpretations. XSAVES takes every component for in use, as a processor may, and so saves all that it is asked for.

Spec: SDM Vol. 1, "Managing State Using the XSAVE Feature Set", "Operation of XSAVES", "Operation of XRSTORS".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from attrs import frozen
from iced_x86 import Mnemonic

from vtx.x86.cpuid_features import HDC_STATE, LEGACY_AND_HEADER_SIZE, SSE_STATE, X87_STATE
from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import operand_address, require_feature, require_ring_0
from vtx.x86.msr_table import IA32_PM_CTL1, IA32_XSS
from vtx.x86.operations import ExtendedStateTransfer
from vtx.x86.outcome import Fault, InstructionAborted, Vector, gp, ud
from vtx.x86.second_level import AccessKind
from vtx.x86.state import MASK32, MASK64, Cr0, Cr4, Gpr

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_ALIGNMENT: Final = 64
_COMPACTED: Final = 1 << 63
_HEADER: Final = 512  # offset of XSTATE_BV; XCOMP_BV follows, then 48 bytes of zeros
_HEADER_SIZE: Final = 64
_COMPONENT_SIZE: Final = 8
_MXCSR: Final = slice(24, 28)
_MXCSR_RESERVED: Final = MASK32 & ~0xFFFF
_X87_CONTROL: Final = slice(0, 24)
_X87_REGISTERS: Final = slice(32, 160)
_XMM_REGISTERS: Final = slice(160, 416)
# What XRSTORS gives components whose bit in XSTATE_BV is clear.
_INITIAL_X87: Final = struct.pack("<H", 0x037F).ljust(24, b"\0")
_INITIAL_MXCSR: Final = struct.pack("<I", 0x1F80)
_INITIAL_HDC: Final = 1
_WIDE: Final = frozenset((Mnemonic.XSAVES64, Mnemonic.XRSTORS64))


@frozen
class _Area:
    """A save area at ``linear``; ``requested`` are the components that the instruction is about."""

    linear: int
    requested: int


def _admit(cpu: LogicalProcessor, instruction: Instruction, *, save: bool) -> _Area | None:
    """Faults and VM exit that both have; None after an exit."""
    state = cpu.state
    require_feature(cpu, "XSAVES")
    if not state.cr4 & Cr4.OSXSAVE:
        raise ud()
    if state.cr0 & Cr0.TS:
        raise InstructionAborted(Fault(Vector.NM))
    require_ring_0(cpu)
    wanted = (state.gpr[Gpr.RDX] & MASK32) << 32 | state.gpr[Gpr.RAX] & MASK32
    supervisor = cpu.msrs.values.get(IA32_XSS, 0)
    if cpu.intercepts(ExtendedStateTransfer(save, wanted & supervisor), instruction):
        return None
    area = _Area(
        operand_address(cpu, instruction, LEGACY_AND_HEADER_SIZE, write=save), wanted & (state.xcr0 | supervisor)
    )
    if area.linear % _ALIGNMENT:
        raise gp(0)
    return area


def xsaves(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XSAVES and XSAVES64."""
    area = _admit(cpu, instruction, save=True)
    if area is None:
        return
    legacy = cpu.engine.legacy_area()
    parts: list[tuple[int, bytes]] = []
    if area.requested & X87_STATE:
        pointers = legacy[_X87_CONTROL]
        if instruction.mnemonic not in _WIDE:
            pointers = _narrow(pointers)
        parts += (0, pointers), (_X87_REGISTERS.start, legacy[_X87_REGISTERS])
    if area.requested & SSE_STATE:
        parts += (_MXCSR.start, legacy[_MXCSR.start : 32]), (_XMM_REGISTERS.start, legacy[_XMM_REGISTERS])
    parts.append((_HEADER, struct.pack("<QQ", area.requested, area.requested | _COMPACTED)))
    if area.requested & HDC_STATE:
        parts.append((LEGACY_AND_HEADER_SIZE, cpu.msrs.values[IA32_PM_CTL1].to_bytes(_COMPONENT_SIZE, "little")))
    # The area may cross pages: all of it must be writable before any of it is written.
    for offset, data in parts:
        cpu.mmu.check(_at(area, offset), len(data), AccessKind.WRITE)
    for offset, data in parts:
        cpu.mmu.write_bytes(_at(area, offset), data)
    cpu.retire(instruction)


def xrstors(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XRSTORS and XRSTORS64."""
    area = _admit(cpu, instruction, save=False)
    if area is None:
        return
    header = cpu.mmu.read_bytes(_at(area, _HEADER), _HEADER_SIZE)
    present, format_ = struct.unpack_from("<QQ", header)
    known = _COMPACTED | cpu.state.xcr0 | cpu.msrs.values.get(IA32_XSS, 0)
    if not format_ & _COMPACTED or format_ & ~known or present & ~format_ or any(header[16:]):
        raise gp(0)
    loaded, initial = area.requested & present, area.requested & ~present
    if loaded & HDC_STATE and not _restore_hdc(cpu, area, format_):
        raise gp(0)
    memory = cpu.mmu.read_bytes(area.linear, _XMM_REGISTERS.stop)
    if loaded & SSE_STATE and int.from_bytes(memory[_MXCSR], "little") & _MXCSR_RESERVED:
        raise gp(0)
    legacy = bytearray(cpu.engine.legacy_area())
    if loaded & X87_STATE:
        wide = instruction.mnemonic in _WIDE
        legacy[_X87_CONTROL] = memory[_X87_CONTROL] if wide else _narrow(memory[_X87_CONTROL])
        legacy[_X87_REGISTERS] = memory[_X87_REGISTERS]
    elif initial & X87_STATE:
        legacy[_X87_CONTROL], legacy[_X87_REGISTERS] = _INITIAL_X87, bytes(128)
    if loaded & SSE_STATE:
        legacy[_MXCSR], legacy[_XMM_REGISTERS] = memory[_MXCSR], memory[_XMM_REGISTERS]
    elif initial & SSE_STATE:
        legacy[_MXCSR], legacy[_XMM_REGISTERS] = _INITIAL_MXCSR, bytes(256)
    cpu.engine.set_legacy_area(bytes(legacy))
    if initial & HDC_STATE:
        cpu.msrs.write(IA32_PM_CTL1, _INITIAL_HDC)
    cpu.retire(instruction)


def _restore_hdc(cpu: LogicalProcessor, area: _Area, format_: int) -> bool:
    """Load IA32_PM_CTL1; False if it does not take the value. HDC state is the first supervisor component there is."""
    assert format_ & HDC_STATE
    data = cpu.mmu.read_bytes(_at(area, LEGACY_AND_HEADER_SIZE), _COMPONENT_SIZE)
    return cpu.msrs.write(IA32_PM_CTL1, int.from_bytes(data, "little"))


def _at(area: _Area, offset: int) -> int:
    return (area.linear + offset) & MASK64


def _narrow(pointers: bytes) -> bytes:
    """The control part of the x87 state with 32-bit pointers; processors no longer save the selectors."""
    head, instruction, operand = struct.unpack_from("<QQQ", pointers)
    return struct.pack("<QQQ", head, instruction & MASK32, operand & MASK32)


HANDLERS: Final = {
    Mnemonic.XSAVES: xsaves,
    Mnemonic.XSAVES64: xsaves,
    Mnemonic.XRSTORS: xrstors,
    Mnemonic.XRSTORS64: xrstors,
}
