"""Placement in physical memory, at its edges."""

import pytest

from vtx.boot.image import BootError
from vtx.boot.layout import Layout, lower_and_upper_kib, memory_map
from vtx.x86.memory import PhysicalMemory

MIB = 1 << 20
PAGE = 4096


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (PAGE, [(0, PAGE, 1)]),
        (0x9F000, [(0, 0x9F000, 1)]),
        (0xA0000, [(0, 0x9FC00, 1), (0x9FC00, 0x400, 2)]),
        (MIB, [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2)]),
        (MIB + PAGE, [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (MIB, PAGE, 1)]),
    ],
)
def test_memory_map_of_small_machines(size: int, expected: list[tuple[int, int, int]]) -> None:
    entries = [(entry.start, entry.size, int(entry.type)) for entry in memory_map(PhysicalMemory(size))]
    assert entries[: len(expected)] == expected
    assert entries[len(expected) :] == [(0xFEC0_0000, PAGE, 2), (0xFEE0_0000, PAGE, 2)]


@pytest.mark.parametrize(("size", "kib"), [(PAGE, (4, 0)), (MIB, (639, 0)), (MIB + PAGE, (639, 4))])
def test_lower_and_upper_memory(size: int, kib: tuple[int, int]) -> None:
    assert lower_and_upper_kib(PhysicalMemory(size)) == kib


def test_image_may_fill_memory_to_the_last_byte() -> None:
    layout = Layout(PhysicalMemory(2 * MIB))
    layout.place(MIB, b"x" * MIB, MIB, "image")
    layout.place(0, b"y", 0x9FC00, "low image")
    with pytest.raises(BootError, match="no room in memory for more"):
        layout.allocate_from(PAGE, 1, "more")


def test_image_one_byte_too_large() -> None:
    layout = Layout(PhysicalMemory(2 * MIB))
    with pytest.raises(BootError, match="image needs RAM up to 0x200000, machine has RAM up to 0x1fffff"):
        layout.place(MIB, b"", MIB + 1, "image")


def test_neighbours_do_not_overlap() -> None:
    layout = Layout(PhysicalMemory(2 * MIB))
    layout.place(MIB + PAGE, b"", PAGE, "middle")
    layout.place(MIB, b"", PAGE, "before")
    layout.place(MIB + 2 * PAGE, b"", PAGE, "after")
    assert [used.what for used in layout.ranges] == ["before", "middle", "after"]


@pytest.mark.parametrize(
    ("start", "size"), [(MIB, PAGE + 1), (MIB + 2 * PAGE - 1, 1), (MIB + PAGE + 5, 1), (MIB, 4 * PAGE)]
)
def test_any_common_byte_is_an_overlap(start: int, size: int) -> None:
    layout = Layout(PhysicalMemory(2 * MIB))
    layout.place(MIB + PAGE, b"", PAGE, "used")
    with pytest.raises(BootError, match="new overlaps used at"):
        layout.place(start, b"", size, "new")


def test_low_allocation_is_the_highest_aligned_place_in_conventional_memory() -> None:
    layout = Layout(PhysicalMemory(2 * MIB))
    assert layout.allocate_low(0x20, "a") == 0x9FBE0
    assert layout.allocate_low(1, "b") == 0x9FBD0
    assert layout.allocate_low(PAGE, "c", PAGE) == 0x9E000
    assert layout.allocate_low(0x10, "d") == 0x9FBC0


def test_low_allocation_fits_exactly_or_goes_above() -> None:
    layout = Layout(PhysicalMemory(2 * MIB))
    assert layout.allocate_low(0x9FC00 - PAGE, "all") == PAGE
    assert layout.allocate_low(1, "more") == MIB


def test_allocation_fits_exactly_between() -> None:
    layout = Layout(PhysicalMemory(2 * MIB))
    layout.place(MIB, b"", PAGE, "before")
    layout.place(MIB + 2 * PAGE, b"", PAGE, "after")
    assert layout.allocate_from(MIB, PAGE + 1, "large") == MIB + 3 * PAGE
    assert layout.allocate_from(MIB, PAGE, "small") == MIB + PAGE


def test_page_zero_is_left_to_the_vectors() -> None:
    layout = Layout(PhysicalMemory(PAGE))
    with pytest.raises(BootError):
        layout.allocate_from(PAGE, 1, "anything")


def test_end_of_image() -> None:
    layout = Layout(PhysicalMemory(2 * MIB))
    assert layout.image_end() == 0
    layout.place(MIB, b"", 5, "image")
    layout.place(0x8000, b"", 5, "low part")
    assert layout.image_end() == MIB + 5


def test_data_then_zeros() -> None:
    memory = PhysicalMemory(4 * MIB)
    memory.write(MIB, b"\xff" * (2 * MIB + PAGE))
    Layout(memory).place(MIB, b"data", 2 * MIB, "image")
    assert memory.read(MIB, 2 * MIB) == b"data" + bytes(2 * MIB - 4)
    assert memory.read(3 * MIB, 1) == b"\xff"
