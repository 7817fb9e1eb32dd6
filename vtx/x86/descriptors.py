"""Segment descriptors, system descriptors and gates, and the tables that hold them.

A descriptor in memory is 8 bytes; in IA-32e mode gates of the IDT and the descriptors of TSS and LDT are 16. The parsed
form keeps the access rights in the VMCS format, so that loading a segment register is a copy.

Spec: SDM Vol. 3, "Segment Descriptors", "System Descriptor Types", "IDT Descriptors", "Segment Descriptor Tables in
IA-32e Mode", "Error Code".
"""

from __future__ import annotations

import enum
import functools
from typing import Final

from attrs import evolve, frozen

from vtx.x86.linear import LinearMemory, system_address
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import MASK64, AccessRights, CpuState, Segment

_DESCRIPTOR_RIGHTS: Final = 0xF0FF
# Plain integers: arithmetic on flag enumerations is slow and drops the bits they do not name.
_ACCESSED: Final = AccessRights.ACCESSED.value
_CODE_OR_DATA: Final = AccessRights.CODE_OR_DATA.value
_PRESENT: Final = AccessRights.PRESENT.value
_LONG: Final = AccessRights.LONG.value
_DEFAULT_BIG: Final = AccessRights.DEFAULT_BIG.value
_GRANULARITY: Final = AccessRights.GRANULARITY.value
_UNUSABLE: Final = AccessRights.UNUSABLE.value
TABLE_INDICATOR: Final = 4
"""The selector bit that chooses the LDT."""


class SystemType(enum.IntEnum):
    """Types of system segments and gates (S = 0)."""

    TSS_16_AVAILABLE = 1
    LDT = 2
    TSS_16_BUSY = 3
    CALL_GATE_16 = 4
    TASK_GATE = 5
    INTERRUPT_GATE_16 = 6
    TRAP_GATE_16 = 7
    TSS_32_AVAILABLE = 9  # the 64-bit TSS in IA-32e mode
    TSS_32_BUSY = 11
    CALL_GATE_32 = 12
    INTERRUPT_GATE_32 = 14  # the 64-bit gates in IA-32e mode
    TRAP_GATE_32 = 15


TSS_BUSY: Final = 2
"""The type bit that tells a busy TSS from an available one."""
TSS_32_TYPES: Final = frozenset({SystemType.TSS_32_AVAILABLE, SystemType.TSS_32_BUSY})
TSS_16_TYPES: Final = frozenset({SystemType.TSS_16_AVAILABLE, SystemType.TSS_16_BUSY})
AVAILABLE_TSS_TYPES: Final = frozenset({SystemType.TSS_16_AVAILABLE, SystemType.TSS_32_AVAILABLE})
BUSY_TSS_TYPES: Final = frozenset({SystemType.TSS_16_BUSY, SystemType.TSS_32_BUSY})


@frozen
class Descriptor:
    """A code, data or system segment descriptor.

    ``base`` is the linear address (64 bits wide for a 16-byte descriptor), ``limit`` the offset of the last byte,
    ``access_rights`` has the layout of `AccessRights` without the unusable bit.
    """

    base: int
    limit: int
    access_rights: int

    @property
    def dpl(self) -> int:
        """Descriptor privilege level."""
        return (self.access_rights >> 5) & 3

    @property
    def present(self) -> bool:
        """The P bit."""
        return bool(self.access_rights & _PRESENT)

    @property
    def system_type(self) -> int | None:
        """The type of a system descriptor (see `SystemType`), None for code and data."""
        return None if self.access_rights & _CODE_OR_DATA else self.access_rights & 0xF

    @property
    def is_code(self) -> bool:
        """Whether this is a code segment."""
        return self.access_rights & 0x18 == 0x18

    @property
    def is_conforming(self) -> bool:
        """Whether this is a conforming code segment."""
        return self.access_rights & 0x1C == 0x1C

    @property
    def is_writable_data(self) -> bool:
        """Whether this is a writable data segment: the only kind fit for a stack."""
        return self.access_rights & 0x1A == 0x12

    @property
    def is_readable(self) -> bool:
        """Whether this is a data segment or a readable code segment: fit for DS, ES, FS and GS."""
        return self.access_rights & 0x18 == 0x10 or self.access_rights & 0x1A == 0x1A

    @property
    def long(self) -> bool:
        """The L bit."""
        return bool(self.access_rights & _LONG)

    @property
    def big(self) -> bool:
        """The D/B bit."""
        return bool(self.access_rights & _DEFAULT_BIG)

    def segment(self, selector: int) -> Segment:
        """The contents of a segment register loaded from this descriptor."""
        return Segment(selector, self.base, self.limit, self.access_rights)


@frozen
class Gate:
    """A call, interrupt, trap or task gate.

    ``type`` has the S bit as bit 4, so no code or data descriptor passes for a gate. ``offset`` is 16, 32 or 64 bits
    wide. ``parameter_count`` is that of a call gate; ``ist`` the interrupt-stack-table index of a 64-bit gate.
    """

    selector: int
    offset: int
    type: int
    dpl: int
    present: bool
    ist: int = 0
    parameter_count: int = 0


@functools.lru_cache(maxsize=1024)
def parse_descriptor(low: int, high: int = 0) -> Descriptor:
    """The descriptor whose first 8 bytes are ``low`` and, if it is 16 bytes long, whose last are ``high``."""
    base = (low >> 16) & 0xFF_FFFF | (low >> 56) << 24 | (high & 0xFFFF_FFFF) << 32
    limit = low & 0xFFFF | (low >> 32) & 0xF_0000
    rights = (low >> 40) & _DESCRIPTOR_RIGHTS
    if rights & _GRANULARITY:
        limit = limit << 12 | 0xFFF
    return Descriptor(base, limit, rights)


def encode_descriptor(descriptor: Descriptor) -> tuple[int, int]:
    """The first and the last 8 bytes of ``descriptor``; the last are 0 for an 8-byte one. Inverse of the parser."""
    limit = descriptor.limit
    if descriptor.access_rights & _GRANULARITY:
        limit >>= 12
    low = limit & 0xFFFF | (limit & 0xF_0000) << 32
    low |= (descriptor.base & 0xFF_FFFF) << 16 | (descriptor.base >> 24 & 0xFF) << 56
    low |= (descriptor.access_rights & _DESCRIPTOR_RIGHTS) << 40
    return low, descriptor.base >> 32


@functools.lru_cache(maxsize=1024)
def parse_gate(low: int, high: int = 0) -> Gate:
    """The gate whose first 8 bytes are ``low`` and, in IA-32e mode, whose last are ``high``."""
    kind = (low >> 40) & 0x1F
    offset = low & 0xFFFF | (low >> 32) & 0xFFFF_0000 | (high & 0xFFFF_FFFF) << 32
    if kind in (SystemType.CALL_GATE_16, SystemType.INTERRUPT_GATE_16, SystemType.TRAP_GATE_16):
        offset &= 0xFFFF
    return Gate(
        selector=(low >> 16) & 0xFFFF,
        offset=offset,
        type=kind,
        dpl=(low >> 45) & 3,
        present=bool(low >> 47 & 1),
        ist=(low >> 32) & 7,
        parameter_count=(low >> 32) & 0x1F,
    )


def read_gate(state: CpuState, memory: LinearMemory, base: int, offset: int, size: int, external: int = 0) -> Gate:
    """The gate of ``size`` (8 or 16) bytes at ``offset`` of the table at ``base``; ``external`` is the EXT bit."""
    address = system_address(state, base, offset, external)
    if size == 8 or system_address(state, base, offset + 8, external) != address + 8:
        high = memory.read(system_address(state, base, offset + 8, external), 8) if size == 16 else 0
        return parse_gate(memory.read(address, 8), high)
    image = memory.read(address, 16)
    return parse_gate(image & MASK64, image >> 64)


def encode_gate(gate: Gate) -> tuple[int, int]:
    """The first and the last 8 bytes of ``gate``; the last are 0 for an 8-byte gate."""
    low = gate.offset & 0xFFFF | (gate.offset & 0xFFFF_0000) << 32 | gate.selector << 16
    low |= (gate.ist | gate.parameter_count) << 32 | gate.type << 40 | gate.dpl << 45 | int(gate.present) << 47
    return low, gate.offset >> 32


def selector_fault(vector: Vector, selector: int, external: int = 0) -> InstructionAborted:
    """An exception whose error code names ``selector``; ``external`` is the EXT bit. Ready to raise."""
    return InstructionAborted(Fault(vector, selector & 0xFFFC | external))


def is_null(selector: int) -> bool:
    """Whether ``selector`` is a null selector: index 0 of the GDT, whatever its RPL."""
    return selector & ~3 == 0


def null_segment(selector: int = 0, dpl: int = 0) -> Segment:
    """A segment register loaded with a null selector: unusable. For SS, ``dpl`` still holds the CPL."""
    return Segment(selector, 0, 0, _UNUSABLE | dpl << 5)


def real_mode_segment(selector: int, access_rights: int) -> Segment:
    """A 64-KiB segment at 16 times ``selector``, as in real-address (93H) and virtual-8086 mode (F3H)."""
    return Segment(selector, selector << 4, 0xFFFF, access_rights)


def descriptor_address(state: CpuState, selector: int, size: int = 8, external: int = 0) -> int | None:
    """Linear address of the ``size``-byte descriptor of ``selector``; None beyond the limit or without an LDT."""
    offset = selector & 0xFFF8
    if selector & TABLE_INDICATOR:
        base, limit = state.ldtr.base, state.ldtr.limit
        if not state.ldtr.usable:
            return None
    else:
        base, limit = state.gdtr.base, state.gdtr.limit
    if offset + size - 1 > limit:
        return None
    return system_address(state, base, offset, external)


def read_descriptor(state: CpuState, memory: LinearMemory, selector: int, external: int = 0) -> Descriptor | None:
    """The 8-byte descriptor of ``selector``, or None beyond its table; a null selector reads GDT entry 0."""
    address = descriptor_address(state, selector, external=external)
    return None if address is None else parse_descriptor(memory.read(address, 8))


def read_stack_descriptor(
    state: CpuState, memory: LinearMemory, selector: int, cpl: int, invalid: Vector, external: int = 0
) -> Descriptor:
    """The descriptor of a stack segment for privilege level ``cpl``; ``selector`` is not null.

    Raises the exception ``invalid`` for what cannot be one, #SS for a segment that is not present.
    """
    descriptor = read_descriptor(state, memory, selector)
    if descriptor is None or selector & 3 != cpl or not descriptor.is_writable_data or descriptor.dpl != cpl:
        raise selector_fault(invalid, selector, external)
    if not descriptor.present:
        raise selector_fault(Vector.SS, selector, external)
    return descriptor


def set_accessed(state: CpuState, memory: LinearMemory, selector: int, descriptor: Descriptor) -> Descriptor:
    """Set the accessed bit of the code or data descriptor of ``selector``, also in memory unless set already."""
    if descriptor.access_rights & _ACCESSED:
        return descriptor
    address = descriptor_address(state, selector)
    assert address is not None, "the descriptor was read from its table"
    rights = descriptor.access_rights | _ACCESSED
    memory.write(address + 5, 1, rights & 0xFF)
    return evolve(descriptor, access_rights=rights)


def set_tss_busy(state: CpuState, memory: LinearMemory, selector: int, *, busy: bool) -> None:
    """Set or clear the busy bit of the TSS descriptor of ``selector`` in the GDT, if the GDT holds it."""
    address = descriptor_address(state, selector)
    if address is None:
        return
    rights = memory.read(address + 5, 1)
    memory.write(address + 5, 1, rights | TSS_BUSY if busy else rights & ~TSS_BUSY)
