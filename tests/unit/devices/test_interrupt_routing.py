"""The board's interrupt lines between their drivers and the two controllers."""

import pytest
from apic_machine import Machine

from vtx.devices.interrupt_routing import Hearing, InterruptLines, LineSwitch
from vtx.devices.io_apic import IoApic
from vtx.devices.pic import PicPair


class Pc:
    """Lines in front of an initialized 8259 pair and an I/O APIC."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.pic = PicPair()
        for chip, base in ((self.pic.master, 0x20), (self.pic.slave, 0x28)):
            for offset, word in ((0, 0x11), (1, base), (1, 4), (1, 1), (1, 0xFF)):
                chip.port_write(offset, 1, word)
        self.io_apic = IoApic(self.machine.bus)
        self.lines = InterruptLines(self.pic, self.io_apic)

    def redirect(self, pin: int, low: int) -> None:
        self.io_apic.mmio_write(0, 4, 0x10 + 2 * pin)
        self.io_apic.mmio_write(0x10, 4, low)

    def heard(self, hearing: Hearing = Hearing.OPEN) -> list[int]:
        return [line for line in range(24) if self.lines.hearing(line) is hearing]

    def pins(self) -> list[int]:
        return [pin for pin in range(24) if self.io_apic.state.lines >> pin & 1]

    def pic_inputs(self) -> list[int]:
        lines = self.pic.master.state.lines | self.pic.slave.state.lines << 8
        return [number for number in range(16) if lines >> number & 1]


@pytest.fixture
def pc() -> Pc:
    return Pc()


@pytest.mark.parametrize(
    ("line", "inputs", "pins"),
    [
        (0, [0], [2]),
        (1, [1], [1]),
        (2, [], []),
        (3, [3], [3]),
        (8, [8], [8]),
        (15, [15], [15]),
        (16, [], [16]),
        (23, [], [23]),
    ],
)
def test_wiring(pc: Pc, line: int, inputs: list[int], pins: list[int]) -> None:
    pc.lines.driver(line)(True)
    assert (pc.pic_inputs(), pc.pins()) == (inputs, pins)


def test_line_is_active_while_a_driver_is(pc: Pc) -> None:
    first, second = pc.lines.driver(5), pc.lines.driver(5)
    first(True)
    second(True)
    first(False)
    assert pc.pins() == [5]
    second(False)
    assert pc.pins() == []


def test_shared_edge_is_one_edge(pc: Pc) -> None:
    pc.redirect(5, 0x31)
    first, second = pc.lines.driver(5), pc.lines.driver(5)
    first(True)
    assert pc.machine.serve() == 0x31
    second(True)
    assert pc.machine.apic.pending_vector() is None


def test_is_heard_by_either_controller(pc: Pc) -> None:
    assert pc.heard(Hearing.NONE) == list(range(24))
    pc.redirect(2, 0x31)
    assert pc.heard() == [0]
    pc.redirect(2, 0x31 | 1 << 16)
    pc.pic.master.port_write(1, 1, 0xFE)
    assert pc.heard() == [0]
    pc.redirect(20, 0x31)
    pc.redirect(9, 0x32)
    assert pc.heard() == [0, 9, 20]


def test_slave_is_heard_through_the_cascade(pc: Pc) -> None:
    pc.pic.slave.port_write(1, 1, 0xFE)
    assert pc.heard() == []
    pc.pic.master.port_write(1, 1, 0xFB)
    assert pc.heard() == [8]


def test_request_that_waits(pc: Pc) -> None:
    """Another request changes nothing until both controllers have passed the first one on."""
    pc.pic.master.port_write(1, 1, 0xFE)
    drive = pc.lines.driver(0)
    drive(True)
    assert pc.heard(Hearing.WAITING) == [0]
    pc.redirect(2, 0x31)
    assert pc.heard() == [0]
    drive(False)
    drive(True)
    assert pc.heard(Hearing.WAITING) == [0]
    pc.pic.acknowledge()
    assert pc.heard() == [0]


def test_switch() -> None:
    levels: list[bool] = []
    switch = LineSwitch(levels.append)
    switch.drive(True)
    switch.close(False)
    switch.drive(False)
    switch.drive(True)
    assert levels == [True, False]
    switch.close(True)
    switch.close(True)
    assert levels == [True, False, True]
