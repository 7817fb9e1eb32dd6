"""The devices of a few registers: PCI configuration, POST port, ACPI fixed hardware."""

import pytest

from vtx.devices.acpi_pm import AcpiPm
from vtx.devices.clock import ManualClock
from vtx.devices.pci_config import PciConfig
from vtx.devices.post_port import PostPort

TICKS = 2_100_000_000
PM_HZ = 3_579_545
STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8


def test_pci_address_is_read_back_and_nothing_answers() -> None:
    device = PciConfig()
    device.port_write(0, 4, 0x8000_0000)
    assert device.port_read(0, 4) == 0x8000_0000
    assert device.port_read(4, 4) == 0xFFFF_FFFF
    assert device.port_read(6, 2) == 0xFFFF
    assert device.port_read(5, 1) == 0xFF
    device.port_write(4, 4, 0)
    assert device.port_read(4, 4) == 0xFFFF_FFFF


def test_pci_address_takes_only_whole_writes_and_existing_bits() -> None:
    device = PciConfig()
    device.port_write(0, 4, 0xFFFF_FFFF)
    assert device.port_read(0, 4) == 0x80FF_FFFC
    for offset, size in ((0, 1), (0, 2), (1, 1), (3, 1)):
        device.port_write(offset, size, 0)
        assert device.port_read(offset, size) == (1 << 8 * size) - 1
    assert device.port_read(0, 4) == 0x80FF_FFFC


def test_post_port_is_a_latch() -> None:
    device = PostPort()
    assert device.port_read(0, 1) == 0
    device.port_write(0, 1, 0x5A)
    assert device.port_read(0, 1) == 0x5A
    device.port_write(0, 2, 0x1234)
    assert device.port_read(0, 4) == 0xFFFF_FF34


class Pm:
    """The fixed hardware with its line."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.levels: list[bool] = []
        self.offs = 0
        self.device = AcpiPm(self.clock, TICKS, self.levels.append, self._off)

    def _off(self) -> None:
        self.offs += 1

    def at(self, pulse: int) -> None:
        self.clock.ticks = -(-pulse * TICKS // PM_HZ)
        self.device.advance(self.clock.ticks)


@pytest.fixture
def pm() -> Pm:
    return Pm()


def test_timer_counts_at_its_frequency(pm: Pm) -> None:
    pm.clock.ticks = TICKS
    assert pm.device.port_read(TIMER, 4) == PM_HZ
    pm.at((1 << 32) + 5)
    assert pm.device.port_read(TIMER, 4) == 5
    pm.device.port_write(TIMER, 4, 0)
    assert pm.device.port_read(TIMER, 4) == 5


def test_carry_sets_status_and_interrupts_if_enabled(pm: Pm) -> None:
    pm.at(1 << 31)
    assert pm.device.port_read(STATUS, 2) == 1
    assert pm.levels == []
    pm.device.port_write(ENABLE, 2, 1)
    assert pm.levels == [True]
    assert pm.device.next_deadline() is None
    pm.device.port_write(STATUS, 2, 1)
    assert pm.levels == [True, False]
    assert pm.device.next_deadline() == -(-(1 << 32) * TICKS // PM_HZ)
    pm.at((1 << 32) - 1)
    assert pm.levels == [True, False]
    pm.at(1 << 32)
    assert pm.levels == [True, False, True]


def test_power_button(pm: Pm) -> None:
    pm.device.port_write(ENABLE, 2, 1 << 8)
    pm.device.press_power_button()
    assert pm.levels == [True]
    assert pm.device.port_read(STATUS, 2) == 1 << 8
    pm.device.port_write(STATUS + 1, 1, 1)
    assert pm.levels == [True, False]


def test_control_is_in_acpi_mode_and_switches_off(pm: Pm) -> None:
    assert pm.device.port_read(CONTROL, 2) == 1
    pm.device.port_write(CONTROL, 2, 3 << 10 | 1 << 13)
    assert pm.offs == 0
    assert pm.device.port_read(CONTROL, 2) == 3 << 10 | 1
    pm.device.port_write(CONTROL, 2, 5 << 10)
    assert pm.offs == 0
    pm.device.port_write(CONTROL, 2, 5 << 10 | 1 << 13)
    assert pm.offs == 1


def test_registers_take_bytes(pm: Pm) -> None:
    pm.device.port_write(ENABLE, 1, 0xFF)
    pm.device.port_write(ENABLE + 1, 1, 0xFF)
    assert pm.device.port_read(ENABLE, 2) == 0x0521
    assert pm.device.port_read(STATUS, 4) == 0x0521_0000
    pm.device.port_write(ENABLE + 1, 1, 0)
    assert pm.device.port_read(ENABLE, 2) == 0x0021
    assert pm.device.port_read(12, 1) == 0xFF
