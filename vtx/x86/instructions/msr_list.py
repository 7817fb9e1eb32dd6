"""RDMSRLIST and WRMSRLIST: up to 64 MSRs by tables of addresses and values.

RCX says which entries are still to do, and RSI and RDI where the tables are, so that the instruction can be
interrupted and begun anew anywhere: what is done is no longer in RCX.

Spec: SDM Vol. 2, the instructions' pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import read_linear, require_feature, require_ring_0, write_linear
from vtx.x86.instructions.msr import read_msr
from vtx.x86.operations import ReadMsrList, WriteMsrList
from vtx.x86.outcome import gp, ud
from vtx.x86.state import MASK64, Gpr

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_ENTRY: Final = 8


def _admit(cpu: LogicalProcessor) -> None:
    require_feature(cpu, "MSRLIST")
    if not cpu.state.in_64_bit_mode:
        raise ud()
    require_ring_0(cpu)
    gpr = cpu.state.gpr
    if (gpr[Gpr.RSI] | gpr[Gpr.RDI]) % _ENTRY:
        raise gp(0)


def _next(cpu: LogicalProcessor) -> tuple[int, int, int]:
    """The lowest entry to do: its bit in RCX, its offset in the tables, and the address of the MSR."""
    gpr = cpu.state.gpr
    bit = gpr[Gpr.RCX] & -gpr[Gpr.RCX]
    offset = _ENTRY * (bit.bit_length() - 1)
    address = read_linear(cpu, (gpr[Gpr.RSI] + offset) & MASK64, _ENTRY)
    if address >> 32:
        raise gp(0)
    return bit, offset, address


def rdmsrlist(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """RDMSRLIST."""
    _admit(cpu)
    gpr = cpu.state.gpr
    while gpr[Gpr.RCX]:
        bit, offset, address = _next(cpu)
        if cpu.intercepts(ReadMsrList(address), instruction):
            return
        write_linear(cpu, (gpr[Gpr.RDI] + offset) & MASK64, _ENTRY, read_msr(cpu, address))
        gpr[Gpr.RCX] ^= bit
    cpu.retire(instruction)


def wrmsrlist(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """WRMSRLIST."""
    _admit(cpu)
    gpr = cpu.state.gpr
    while gpr[Gpr.RCX]:
        bit, offset, address = _next(cpu)
        value = read_linear(cpu, (gpr[Gpr.RDI] + offset) & MASK64, _ENTRY)
        if cpu.intercepts(WriteMsrList(address, value), instruction):
            return
        if not cpu.msrs.write(address, value):
            raise gp(0)
        cpu.changed_system_state()
        gpr[Gpr.RCX] ^= bit
    cpu.retire(instruction)


HANDLERS: Final = {Mnemonic.RDMSRLIST: rdmsrlist, Mnemonic.WRMSRLIST: wrmsrlist}
