"""Where the processor's state is in SMRAM: the save-state maps of Intel 64 and AMD64 processors, as data.

Offsets count from SMBASE + 8000H. Quadwords of which a map has the halves in different places have two rows.

Spec: SDM Vol. 3, "SMRAM State Save Map"; APM Vol. 2, "SMRAM State-Save Area".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from vtx.x86.memory import PhysicalMemory

AREA: Final = 0x8000
"""Offset from SMBASE of the handler's entry point, from which the maps count."""


@frozen
class Row:
    """``size`` bytes at ``offset`` hold ``name``, from bit ``shift`` on."""

    offset: int
    size: int
    name: str
    shift: int = 0


@frozen
class SaveMap:
    """A save-state map. ``revision`` is the SMM revision identifier: bit 17 says that SMBASE can be relocated."""

    rows: tuple[Row, ...]
    revision: int

    def write(self, memory: PhysicalMemory, smbase: int, values: Mapping[str, int]) -> None:
        """Store the values of the map's rows; those that ``values`` lacks are 0."""
        for row in self.rows:
            data = values.get(row.name, 0) >> row.shift & ((1 << 8 * row.size) - 1)
            memory.write(smbase + AREA + row.offset, data.to_bytes(row.size, "little"))

    def read(self, memory: PhysicalMemory, smbase: int) -> dict[str, int]:
        """All values, by name."""
        values: dict[str, int] = {}
        for row in self.rows:
            data = int.from_bytes(memory.read(smbase + AREA + row.offset, row.size), "little")
            values[row.name] = values.get(row.name, 0) | data << row.shift
        return values


# In the order in which Intel's map has them, downwards from 7F94H. The names are those of the encoding order.
_INTEL_GPRS: Final = (7, 6, 5, 4, 3, 2, 1, 0, 8, 9, 10, 11, 12, 13, 14, 15)
_SELECTORS: Final = ("TR", "LDTR", "GS", "FS", "DS", "SS", "CS", "ES")

INTEL_64: Final = SaveMap(
    (
        Row(0x7FF8, 8, "CR0"),
        Row(0x7FF0, 8, "CR3"),
        Row(0x7FE8, 8, "RFLAGS"),
        Row(0x7FE0, 8, "EFER"),
        Row(0x7FD8, 8, "RIP"),
        Row(0x7FD0, 8, "DR6"),
        Row(0x7FC8, 8, "DR7"),
        *(Row(0x7FC4 - 4 * n, 4, f"{name} selector") for n, name in enumerate(_SELECTORS)),
        *(Row(0x7F94 - 8 * n, 8, f"GPR {number}") for n, number in enumerate(_INTEL_GPRS)),
        Row(0x7F02, 2, "auto HALT restart"),
        Row(0x7F00, 2, "I/O instruction restart"),
        Row(0x7EFC, 4, "revision"),
        Row(0x7EF8, 4, "SMBASE"),
        Row(0x7EE0, 4, "enable EPT"),
        Row(0x7ED8, 8, "EPTP"),
        Row(0x7ED0, 8, "BNDCFGS"),
        Row(0x7E9C, 4, "LDTR base"),
        Row(0x7E94, 4, "IDTR base"),
        Row(0x7E8C, 4, "GDTR base"),
        Row(0x7E40, 4, "CR4"),
        Row(0x7DD8, 4, "IDTR base", 32),
        Row(0x7DD4, 4, "LDTR base", 32),
        Row(0x7DD0, 4, "GDTR base", 32),
    ),
    0x0002_0100,
)


def _amd_segment(offset: int, name: str) -> tuple[Row, ...]:
    return (
        Row(offset, 2, f"{name} selector"),
        Row(offset + 2, 2, f"{name} attributes"),
        Row(offset + 4, 4, f"{name} limit"),
        Row(offset + 8, 8, f"{name} base"),
    )


AMD64: Final = SaveMap(
    (
        *_amd_segment(0x7E00, "ES"),
        *_amd_segment(0x7E10, "CS"),
        *_amd_segment(0x7E20, "SS"),
        *_amd_segment(0x7E30, "DS"),
        *_amd_segment(0x7E40, "FS"),
        *_amd_segment(0x7E50, "GS"),
        Row(0x7E64, 2, "GDTR limit"),
        Row(0x7E68, 8, "GDTR base"),
        *_amd_segment(0x7E70, "LDTR"),
        Row(0x7E84, 2, "IDTR limit"),
        Row(0x7E88, 8, "IDTR base"),
        *_amd_segment(0x7E90, "TR"),
        Row(0x7EC8, 1, "I/O instruction restart"),
        Row(0x7EC9, 1, "auto HALT restart"),
        Row(0x7ED0, 8, "EFER"),
        Row(0x7ED8, 8, "SVM guest"),
        Row(0x7EE0, 8, "guest VMCB"),
        Row(0x7EFC, 4, "revision"),
        Row(0x7F00, 4, "SMBASE"),
        Row(0x7F48, 8, "CR4"),
        Row(0x7F50, 8, "CR3"),
        Row(0x7F58, 8, "CR0"),
        Row(0x7F60, 8, "DR7"),
        Row(0x7F68, 8, "DR6"),
        Row(0x7F70, 8, "RFLAGS"),
        Row(0x7F78, 8, "RIP"),
        *(Row(0x7F80 + 8 * (15 - number), 8, f"GPR {number}") for number in (*range(8, 16), 7, 6, 5, 4, 3, 2, 1, 0)),
    ),
    0x0002_0064,
)
