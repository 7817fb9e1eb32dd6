"""The save-state maps: offsets typed from the manuals, no two rows in one place, and what is written is read back."""

from __future__ import annotations

import pytest

from vtx.x86.memory import PhysicalMemory
from vtx.x86.smm_map import AMD64, INTEL_64, SaveMap

SMBASE = 0x3_0000

AMD = {
    "ES selector": 0xFE00,
    "CS attributes": 0xFE12,
    "SS limit": 0xFE24,
    "DS base": 0xFE38,
    "FS selector": 0xFE40,
    "GS base": 0xFE58,
    "GDTR limit": 0xFE64,
    "GDTR base": 0xFE68,
    "LDTR selector": 0xFE70,
    "IDTR limit": 0xFE84,
    "IDTR base": 0xFE88,
    "TR base": 0xFE98,
    "I/O instruction restart": 0xFEC8,
    "auto HALT restart": 0xFEC9,
    "EFER": 0xFED0,
    "revision": 0xFEFC,
    "SMBASE": 0xFF00,
    "CR4": 0xFF48,
    "CR3": 0xFF50,
    "CR0": 0xFF58,
    "DR7": 0xFF60,
    "DR6": 0xFF68,
    "RFLAGS": 0xFF70,
    "RIP": 0xFF78,
    "GPR 15": 0xFF80,
    "GPR 8": 0xFFB8,
    "GPR 7": 0xFFC0,
    "GPR 6": 0xFFC8,
    "GPR 5": 0xFFD0,
    "GPR 4": 0xFFD8,
    "GPR 3": 0xFFE0,
    "GPR 2": 0xFFE8,
    "GPR 1": 0xFFF0,
    "GPR 0": 0xFFF8,
}


@pytest.mark.parametrize("name", AMD)
def test_amd64(name: str) -> None:
    (row,) = [row for row in AMD64.rows if row.name == name]
    assert 0x8000 + row.offset == AMD[name]


@pytest.mark.parametrize("layout", [INTEL_64, AMD64], ids=["Intel 64", "AMD64"])
def test_rows_do_not_overlap(layout: SaveMap) -> None:
    taken: set[int] = set()
    for row in layout.rows:
        place = set(range(row.offset, row.offset + row.size))
        assert not place & taken, row
        taken |= place
    assert max(taken) == 0x7FFF


@pytest.mark.parametrize("layout", [INTEL_64, AMD64], ids=["Intel 64", "AMD64"])
def test_what_is_written_is_read_back(layout: SaveMap) -> None:
    sizes: dict[str, int] = {}
    for row in layout.rows:
        sizes[row.name] = max(sizes.get(row.name, 0), row.shift + 8 * row.size)
    values = {
        name: (0x0123_4567_89AB_CDEF + 977 * number) & ((1 << bits) - 1)
        for number, (name, bits) in enumerate(sizes.items())
    }
    memory = PhysicalMemory(1 << 20)
    layout.write(memory, SMBASE, values)
    assert layout.read(memory, SMBASE) == values
