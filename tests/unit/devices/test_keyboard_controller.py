"""The keyboard controller with nothing connected."""

import pytest

from vtx.devices.keyboard_controller import KeyboardController

DATA, COMMAND = 0, 4
FULL, SYSTEM, WAS_COMMAND, AUXILIARY = 0x01, 0x04, 0x08, 0x20
NOT_LOCKED = 0x10


class Bench:
    """A controller, its lines, and how often it gave an INIT signal."""

    def __init__(self) -> None:
        self.inits = 0
        self.keyboard: list[bool] = []
        self.mouse: list[bool] = []
        self.device = KeyboardController(self._init, self.keyboard.append, self.mouse.append)

    def _init(self) -> None:
        self.inits += 1

    def command(self, value: int, *data: int) -> None:
        self.device.port_write(COMMAND, 1, value)
        for each in data:
            self.device.port_write(DATA, 1, each)

    def status(self) -> int:
        return self.device.port_read(COMMAND, 1)

    def data(self) -> int:
        return self.device.port_read(DATA, 1)

    def ask(self, value: int, *data: int) -> int:
        self.command(value, *data)
        assert self.status() & FULL
        answer = self.data()
        assert not self.status() & FULL
        return answer


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_power_up(bench: Bench) -> None:
    assert bench.status() == NOT_LOCKED
    assert bench.ask(0x20) == 0
    assert bench.ask(0xD0) == 0x03  # not in reset, A20 open


@pytest.mark.parametrize(("command", "answer"), [(0xAA, 0x55), (0xAB, 0), (0xA9, 0), (0xC0, 0x80), (0xE0, 0)])
def test_answers(bench: Bench, command: int, answer: int) -> None:
    assert bench.ask(command) == answer


def test_self_test_sets_the_system_flag(bench: Bench) -> None:
    bench.ask(0xAA)
    assert bench.status() & SYSTEM
    bench.command(0x60, 0x00)
    assert not bench.status() & SYSTEM


def test_ram(bench: Bench) -> None:
    for at in (0, 1, 0x1F):
        bench.command(0x60 + at, 0x40 + at)
    assert [bench.ask(0x20 + at) for at in (0, 1, 0x1F, 2)] == [0x40, 0x41, 0x5F, 0]


@pytest.mark.parametrize(("disable", "enable", "bit"), [(0xAD, 0xAE, 0x10), (0xA7, 0xA8, 0x20)])
def test_interfaces(bench: Bench, disable: int, enable: int, bit: int) -> None:
    bench.command(disable)
    assert bench.ask(0x20) == bit
    bench.command(enable)
    assert bench.ask(0x20) == 0


def test_status_tells_commands_from_data(bench: Bench) -> None:
    bench.command(0xAE)
    assert bench.status() & WAS_COMMAND
    bench.device.port_write(DATA, 1, 0xF4)
    assert not bench.status() & WAS_COMMAND


def test_keyboard_and_mouse_do_not_answer(bench: Bench) -> None:
    bench.device.port_write(DATA, 1, 0xFF)
    bench.command(0xD4, 0xFF)
    assert not bench.status() & FULL


def test_data_belongs_to_the_last_command_only(bench: Bench) -> None:
    bench.command(0x60, 0x12, 0x34)
    bench.command(0x60)
    bench.command(0xFF)
    bench.device.port_write(DATA, 1, 0x56)
    assert bench.ask(0x20) == 0x12


def test_output_buffer_reads_the_same_until_filled_again(bench: Bench) -> None:
    bench.command(0xD2, 0x77)
    assert [bench.data(), bench.data()] == [0x77, 0x77]
    assert bench.device.port_read(DATA, 2) == 0xFF77


def test_interrupts(bench: Bench) -> None:
    bench.command(0xD2, 0x11)
    bench.command(0xD3, 0x22)
    assert bench.keyboard == bench.mouse == []
    assert bench.status() & AUXILIARY
    bench.command(0x60, 0x03)
    assert (bench.keyboard, bench.mouse) == ([], [True])
    assert bench.data() == 0x22
    assert (bench.keyboard, bench.mouse) == ([], [True, False])
    bench.command(0xD2, 0x33)
    assert (bench.keyboard, bench.mouse) == ([True], [True, False])
    assert not bench.status() & AUXILIARY
    bench.data()
    assert (bench.keyboard, bench.mouse) == ([True, False], [True, False])


@pytest.mark.parametrize(("command", "inits"), [(0xFE, 1), (0xF0, 1), (0xFF, 0), (0xFD, 0), (0xEE, 0)])
def test_pulse(bench: Bench, command: int, inits: int) -> None:
    bench.command(command)
    assert bench.inits == inits


def test_output_port(bench: Bench) -> None:
    bench.command(0xD1, 0xDD)
    assert bench.ask(0xD0) == 0xDD
    assert bench.inits == 0
    bench.command(0xD1, 0xDE)
    assert bench.inits == 1
    assert bench.ask(0xD0) == 0xDF
