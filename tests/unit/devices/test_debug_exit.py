"""The debug-exit port."""

import pytest

from vtx.devices.debug_exit import DebugExit


@pytest.mark.parametrize(
    ("size", "value", "seen"), [(1, 0x1FF, 0xFF), (2, 0x12345, 0x2345), (4, 0xDEADBEEF, 0xDEADBEEF), (4, 0, 0)]
)
def test_write_ends_the_run_with_the_value(size: int, value: int, seen: int) -> None:
    exits: list[int] = []
    DebugExit(exits.append).port_write(0, size, value)
    assert exits == [seen]


def test_read_does_not_end_the_run() -> None:
    exits: list[int] = []
    assert DebugExit(exits.append).port_read(0, 4) == 0
    assert exits == []
