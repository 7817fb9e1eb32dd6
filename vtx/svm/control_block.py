"""The VMCB, and the host save area, in memory: reading all of it, and writing the parts that a #VMEXIT writes.

Fields between those parts keep what software put there. Most of what is written is there already, from the time before:
comparing a block's bytes with those that were there then is quicker than storing them, and assumes nothing.

Spec: APM Vol. 2, "Layout of VMCB", "#VMEXIT".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from attrs import define, frozen

from vmcs.vmcb.fields import BY_NAME, FIELDS, IMAGE, VmcbField, packing
from vtx.addresses import PAGE_SHIFT
from vtx.svm import places as at
from vtx.x86.memory import PhysicalMemory


@frozen
class Part:
    """Fields ``first`` to ``end`` - 1, which are written together."""

    first: int
    end: int
    offset: int
    packing: struct.Struct


def _part(first: str, last: str) -> Part:
    start, end = BY_NAME[first].encoding, BY_NAME[last].encoding + 1
    fields: Sequence[VmcbField] = FIELDS[start:end]
    return Part(start, end, fields[0].offset, packing(fields))


EXIT: Final = _part("EXITCODE", "EXITINTINFO")
INTERRUPTS_AND_EXIT: Final = _part("virtual interrupt control", "EXITINTINFO")
EVENT_INJECTION: Final = _part("EVENTINJ", "EVENTINJ")
NEXT_RIP: Final = _part("nRIP", "nRIP")
SEGMENTS: Final = _part("ES selector", "DS base")
FS_AND_GS: Final = _part("FS selector", "GS base")
GDTR: Final = _part("GDTR selector", "GDTR base")
LDTR: Final = _part("LDTR selector", "LDTR base")
IDTR: Final = _part("IDTR selector", "IDTR base")
TR: Final = _part("TR selector", "TR base")
CPL_AND_EFER: Final = _part("CPL", "EFER")
CONTROL_REGISTERS: Final = _part("CR4", "RIP")
STACK_POINTER: Final = _part("RSP", "RSP")
ACCUMULATOR: Final = _part("RAX", "RAX")
SYSTEM_CALLS: Final = _part("STAR", "SYSENTER_EIP")
PAGE_FAULT_ADDRESS: Final = _part("CR2", "CR2")
PAT: Final = _part("G_PAT", "G_PAT")
LAST_BRANCH: Final = _part("DBGCTL", "LASTEXCPTO")

STATE: Final = (SEGMENTS, GDTR, IDTR, CPL_AND_EFER, CONTROL_REGISTERS, STACK_POINTER, ACCUMULATOR)
"""What #VMEXIT saves of a guest and VMRUN saves of the host."""
HOST_SAVED: Final[tuple[Part, ...]] = STATE
GUEST_SAVED: Final[tuple[Part, ...]] = (INTERRUPTS_AND_EXIT, EVENT_INJECTION, NEXT_RIP, *STATE, PAGE_FAULT_ADDRESS)
NESTED_GUEST_SAVED: Final[tuple[Part, ...]] = (*GUEST_SAVED, PAT)
"""With nested paging, the guest has a PAT of its own."""
MORE_STATE: Final = (FS_AND_GS, LDTR, TR, SYSTEM_CALLS)
"""What VMLOAD loads and VMSAVE saves."""

INSTRUCTION_BYTES: Final = 0xD0  # their number, then up to 15 of them
_INSTRUCTION_BYTES_SIZE: Final = 16


def image(memory: PhysicalMemory, address: int) -> bytes:
    """The block in the page at ``address`` as it is in memory; ones where there is no RAM."""
    offset = memory.ram_offset(address)
    if offset is not None:
        return memory.backing[offset : offset + IMAGE.size]
    return memory.read(address, IMAGE.size)


def read(memory: PhysicalMemory, address: int) -> list[int]:
    """The values of all fields of the block in the page at ``address``; ones where there is no RAM."""
    return list(IMAGE.unpack(image(memory, address)))


@define(slots=True, eq=False)
class Contents:
    """What memory held when somebody looked: a block's bytes, and the values of its fields."""

    image: bytes
    values: list[int]

    @classmethod
    def of(cls, memory: PhysicalMemory, address: int) -> Contents:
        """The block in the page at ``address``."""
        found = image(memory, address)
        return cls(found, list(IMAGE.unpack(found)))


def write(memory: PhysicalMemory, address: int, values: Sequence[int], parts: Sequence[Part]) -> None:
    """Store ``parts`` of ``values`` into the block in the page at ``address``; no RAM there, no effect."""
    offset = memory.ram_offset(address)
    if offset is not None:
        for part in parts:
            part.packing.pack_into(memory.backing, offset + part.offset, *values[part.first : part.end])
        memory.note_written(address >> PAGE_SHIFT)


def update(
    memory: PhysicalMemory, address: int, values: list[int], parts: Sequence[Part], known: Contents | None
) -> None:
    """As `write`; while memory still has the contents that are ``known``, what it holds already is not stored again."""
    offset = memory.ram_offset(address)
    if offset is None:
        return
    backing = memory.backing
    if known is None or backing[offset : offset + IMAGE.size] != known.image:
        write(memory, address, values, parts)
        return
    before = known.values
    for part in parts:
        new = values[part.first : part.end]
        if new != before[part.first : part.end]:
            part.packing.pack_into(backing, offset + part.offset, *new)
    memory.note_written(address >> PAGE_SHIFT)


def write_instruction_bytes(memory: PhysicalMemory, address: int, code: bytes) -> None:
    """Store what decode assists fetched: the number of bytes, and the bytes."""
    data = bytes((len(code),)) + code
    memory.write(address + INSTRUCTION_BYTES, data.ljust(_INSTRUCTION_BYTES_SIZE, b"\0"))


def write_exit_code(memory: PhysicalMemory, address: int, values: list[int], code: int) -> None:
    """Report a VMRUN that failed: EXITCODE alone has a meaning."""
    values[at.EXITCODE], values[at.EXITINFO1], values[at.EXITINFO2], values[at.EXITINTINFO] = code, 0, 0, 0
    write(memory, address, values, (EXIT,))
