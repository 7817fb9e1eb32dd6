"""The ports that restart a PC."""

import pytest

from vtx.devices.reset_ports import BootPort, ResetControlPort, SystemControlPortA
from vtx.pc_map import BOOT_WORD


class Told:
    """What the devices asked for, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.port_a = SystemControlPortA(lambda: self.events.append("init"))
        self.control = ResetControlPort(lambda: self.events.append("init"), lambda: self.events.append("reset"))
        self.boot = BootPort(lambda: self.events.append("boot"))


@pytest.fixture
def told() -> Told:
    return Told()


def test_port_a__rising_bit_0_is_an_init(told: Told) -> None:
    assert told.port_a.port_read(0, 1) == 2  # the A20 gate is open
    for value, inits in ((0x00, 0), (0x01, 1), (0x03, 1), (0x02, 1), (0x03, 2)):
        told.port_a.port_write(0, 1, value)
        assert told.port_a.port_read(0, 1) == value
        assert told.events == ["init"] * inits


def test_port_a__other_bits_do_not_exist(told: Told) -> None:
    told.port_a.port_write(0, 1, 0xFC)
    assert told.port_a.port_read(0, 1) == 0
    assert told.port_a.port_read(0, 2) == 0xFF00


@pytest.mark.parametrize(
    ("before", "value", "event"), [(0, 4, "init"), (0, 6, "reset"), (2, 6, "reset"), (2, 4, "init")]
)
def test_reset_control__rising_bit_2(told: Told, before: int, value: int, event: str) -> None:
    told.control.port_write(0, 1, before)
    assert told.events == []
    told.control.port_write(0, 1, value)
    assert told.events == [event]
    told.control.port_write(0, 1, value)
    assert told.events == [event]
    told.control.port_write(0, 1, 0)
    told.control.port_write(0, 1, 0x0E)
    assert told.events == [event, "reset"]


def test_reset_control__reads_as_written(told: Told) -> None:
    told.control.port_write(0, 1, 0xF9)
    assert told.control.port_read(0, 1) == 8
    told.control.port_write(1, 1, 0x04)
    assert told.control.port_read(0, 2) == 0xFF08
    assert told.events == []


@pytest.mark.parametrize(
    ("size", "value"), [(1, BOOT_WORD & 0xFF), (2, BOOT_WORD & 0xFFFF), (4, BOOT_WORD + 1), (4, 0)]
)
def test_boot_port__knows_one_word(told: Told, size: int, value: int) -> None:
    told.boot.port_write(0, size, value)
    assert told.events == []
    told.boot.port_write(0, 4, BOOT_WORD)
    assert told.events == ["boot"]
    assert told.boot.port_read(0, 4) == 0xFFFF_FFFF
