"""Whether IN, OUT, INS and OUTS may access a port.

Spec: SDM Vol. 1, "Protected-Mode I/O", "I/O Permission Bit Map".
"""

from __future__ import annotations

from vtx.x86.descriptors import TSS_32_TYPES
from vtx.x86.linear import LinearMemory, system_address
from vtx.x86.outcome import gp
from vtx.x86.state import CpuState

_TSS_IO_MAP_BASE = 102


def check_io_permission(state: CpuState, memory: LinearMemory, port: int, size: int) -> None:
    """Raise #GP(0) unless the current program may access ``size`` (1, 2 or 4) bytes of I/O space at ``port``.

    Beyond IOPL, and always in virtual-8086 mode, each byte's bit in the I/O permission bit map of a 32-bit or 64-bit
    TSS must be clear. The map is read as two bytes, which both must lie within the limit of the TSS.
    """
    if not state.protected:
        return
    iopl = (state.rflags >> 12) & 3
    if state.cpl <= iopl and not state.virtual_8086:
        return
    tss = state.tr
    if not tss.usable or tss.type not in TSS_32_TYPES or tss.limit < _TSS_IO_MAP_BASE + 1:
        raise gp(0)
    offset = memory.read(system_address(state, tss.base, _TSS_IO_MAP_BASE), 2) + (port >> 3)
    if offset + 1 > tss.limit:
        raise gp(0)
    bits = memory.read(system_address(state, tss.base, offset), 2)
    if bits >> (port & 7) & ((1 << size) - 1):
        raise gp(0)
