"""Every field of the VMCB: its name, where it is, how wide, and which clean bit covers it.

A `Vmcb` is the values of these fields in this order. Positions are what the code uses; offsets are what memory has.

Spec: APM Vol. 2, "Layout of VMCB", "VMCB Clean Field".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from attrs import define, field, frozen

from vmcs.bits import Layout, mask
from vmcs.vmcb import layouts

CONTROL_SIZE: Final = 0x400
SAVE_AREA: Final = 0x400
VMCB_SIZE: Final = 0x1000


@frozen(eq=False)
class VmcbField:
    """A field of ``size`` bytes at ``offset`` in the VMCB; ``encoding`` is its position among the fields.

    ``clean`` is the name of the clean bit that covers it, empty for one that VMRUN always reads. ``layout`` divides it.
    """

    name: str
    encoding: int
    offset: int
    size: int
    clean: str = ""
    layout: Layout | None = None

    @property
    def mask(self) -> int:
        """All bits of the field."""
        return mask(8 * self.size)

    def describe(self, value: int) -> str:
        """``value`` in hexadecimal, and in words if the field has a layout."""
        number = f"{value:#x}"
        return f"{number} ({self.layout.describe(value)})" if self.layout and value else number

    def __str__(self) -> str:
        return self.name


_Row = tuple[int, int, str, str] | tuple[int, int, str, str, Layout]

_CONTROL_AREA: Final[tuple[_Row, ...]] = (
    (0x000, 4, "CR intercepts", "I"),
    (0x004, 4, "DR intercepts", "I"),
    (0x008, 4, "exception intercepts", "I"),
    (0x00C, 4, "intercept vector 3", "I"),
    (0x010, 4, "intercept vector 4", "I"),
    (0x014, 4, "intercept vector 5", "I"),
    (0x03C, 2, "PAUSE filter threshold", "I"),
    (0x03E, 2, "PAUSE filter count", "I"),
    (0x040, 8, "IOPM_BASE_PA", "IOPM"),
    (0x048, 8, "MSRPM_BASE_PA", "IOPM"),
    (0x050, 8, "TSC_OFFSET", "I"),
    (0x058, 4, "guest ASID", "ASID"),
    (0x05C, 1, "TLB_CONTROL", ""),
    (0x060, 8, "virtual interrupt control", "TPR", layouts.VIRTUAL_INTERRUPTS),
    (0x068, 8, "interrupt state", "", layouts.INTERRUPT_STATE),
    (0x070, 8, "EXITCODE", ""),
    (0x078, 8, "EXITINFO1", ""),
    (0x080, 8, "EXITINFO2", ""),
    (0x088, 8, "EXITINTINFO", "", layouts.EVENT),
    (0x090, 8, "nested paging and encryption control", "NP", layouts.NESTED_CONTROL),
    (0x098, 8, "AVIC APIC_BAR", "AVIC"),
    (0x0A8, 8, "EVENTINJ", "", layouts.EVENT),
    (0x0B0, 8, "N_CR3", "NP"),
    (0x0B8, 8, "virtualization of LBR, VMLOAD and VMSAVE", "LBR", layouts.VIRTUALIZATION_EXTENSIONS),
    (0x0C0, 4, "VMCB clean bits", "", layouts.CLEAN_BITS),
    (0x0C8, 8, "nRIP", ""),
    (0x0D0, 1, "number of bytes fetched", ""),
    (0x0E0, 8, "AVIC APIC_BACKING_PAGE pointer", "AVIC"),
    (0x0F0, 8, "AVIC LOGICAL_TABLE pointer", "AVIC"),
    (0x0F8, 8, "AVIC PHYSICAL_TABLE pointer", "AVIC"),
)


def _segment(offset: int, name: str, clean: str) -> tuple[_Row, ...]:
    return (
        (offset, 2, f"{name} selector", clean),
        (offset + 2, 2, f"{name} attributes", clean),
        (offset + 4, 4, f"{name} limit", clean),
        (offset + 8, 8, f"{name} base", clean),
    )


# Offsets within the state-save area.
_STATE_SAVE_AREA: Final[tuple[_Row, ...]] = (
    *_segment(0x000, "ES", "SEG"),
    *_segment(0x010, "CS", "SEG"),
    *_segment(0x020, "SS", "SEG"),
    *_segment(0x030, "DS", "SEG"),
    *_segment(0x040, "FS", ""),
    *_segment(0x050, "GS", ""),
    *_segment(0x060, "GDTR", "DT"),
    *_segment(0x070, "LDTR", ""),
    *_segment(0x080, "IDTR", "DT"),
    *_segment(0x090, "TR", ""),
    (0x0CB, 1, "CPL", "SEG"),
    (0x0D0, 8, "EFER", "CRx"),
    (0x148, 8, "CR4", "CRx"),
    (0x150, 8, "CR3", "CRx"),
    (0x158, 8, "CR0", "CRx"),
    (0x160, 8, "DR7", "DRx"),
    (0x168, 8, "DR6", "DRx"),
    (0x170, 8, "RFLAGS", ""),
    (0x178, 8, "RIP", ""),
    (0x1D8, 8, "RSP", ""),
    (0x1F8, 8, "RAX", ""),
    (0x200, 8, "STAR", ""),
    (0x208, 8, "LSTAR", ""),
    (0x210, 8, "CSTAR", ""),
    (0x218, 8, "SFMASK", ""),
    (0x220, 8, "KernelGsBase", ""),
    (0x228, 8, "SYSENTER_CS", ""),
    (0x230, 8, "SYSENTER_ESP", ""),
    (0x238, 8, "SYSENTER_EIP", ""),
    (0x240, 8, "CR2", "CR2"),
    (0x268, 8, "G_PAT", "NP"),
    (0x270, 8, "DBGCTL", "LBR"),
    (0x278, 8, "BR_FROM", "LBR"),
    (0x280, 8, "BR_TO", "LBR"),
    (0x288, 8, "LASTEXCPFROM", "LBR"),
    (0x290, 8, "LASTEXCPTO", "LBR"),
)


def _fields() -> Iterator[VmcbField]:
    rows = [*_CONTROL_AREA, *((SAVE_AREA + row[0], *row[1:]) for row in _STATE_SAVE_AREA)]
    for encoding, (offset, size, name, clean, *layout) in enumerate(rows):
        yield VmcbField(name, encoding, offset, size, clean, layout[0] if layout else None)


FIELDS: Final[tuple[VmcbField, ...]] = tuple(_fields())
BY_NAME: Final = {each.name: each for each in FIELDS}


def packing(fields: Sequence[VmcbField]) -> struct.Struct:
    """The structure in memory of ``fields``, in ascending order, from the first one on."""
    codes = {1: "B", 2: "H", 4: "I", 8: "Q"}
    text, position = "<", fields[0].offset
    for each in fields:
        text += f"{each.offset - position}x{codes[each.size]}"
        position = each.offset + each.size
    return struct.Struct(text)


IMAGE: Final = packing(FIELDS)
"""A whole VMCB, from its beginning to the end of the last field."""


@define(slots=True, eq=False)
class Vmcb:
    """The values of all fields, by `VmcbField.encoding`. Without arguments, every field is zero."""

    values: list[int] = field(factory=lambda: [0] * len(FIELDS))

    @classmethod
    def from_image(cls, image: bytes) -> Vmcb:
        """The VMCB that memory holds as ``image``, of at least `IMAGE`.size bytes."""
        return cls(list(IMAGE.unpack_from(image)))

    def to_image(self) -> bytes:
        """The VMCB as it is in memory, reserved bytes zero."""
        return IMAGE.pack(*self.values)

    def __getitem__(self, key: VmcbField) -> int:
        return self.values[key.encoding]

    def __setitem__(self, key: VmcbField, value: int) -> None:
        self.values[key.encoding] = value & key.mask
