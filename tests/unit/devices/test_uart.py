"""The 16550A, register by register; offsets and bits are typed from the data sheet, not taken from the device."""

import pytest

from vtx.devices.uart import Uart16550

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
OUT2, LOOP = 0x08, 0x10


class Port:
    """A UART with what it printed and its interrupt line."""

    def __init__(self) -> None:
        self.printed = bytearray()
        self.levels: list[bool] = []
        self.uart = Uart16550(self.printed.extend, self.levels.append)

    def read(self, offset: int) -> int:
        return self.uart.port_read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.port_write(offset, 1, value)

    @property
    def line(self) -> bool:
        return bool(self.levels) and self.levels[-1]


@pytest.fixture
def port() -> Port:
    return Port()


def test_transmits_and_is_always_ready(port: Port) -> None:
    for byte in b"ok\n":
        assert port.read(LSR) & 0x60 == 0x60
        port.write(THR, byte)
    assert port.printed == b"ok\n"


def test_divisor_latch_hides_data_and_interrupt_enable(port: Port) -> None:
    port.write(IER, 0x05)
    port.write(LCR, 0x83)
    port.write(DLL, 0x34)
    port.write(DLM, 0x12)
    assert (port.read(DLL), port.read(DLM)) == (0x34, 0x12)
    port.write(LCR, 0x03)
    assert port.read(IER) == 0x05
    assert port.printed == b""


@pytest.mark.parametrize(
    ("offset", "written", "read"), [(IER, 0xFF, 0x0F), (MCR, 0xFF, 0x1F), (LCR, 0x7F, 0x7F), (SCR, 0xA5, 0xA5)]
)
def test_read_back(port: Port, offset: int, written: int, read: int) -> None:
    port.write(offset, written)
    assert port.read(offset) == read


def test_receives_in_order_without_loss(port: Port) -> None:
    data = bytes(range(100))
    port.uart.feed(data)
    got = bytearray()
    while port.read(LSR) & 1:
        got.append(port.read(RBR))
    assert got == data
    assert not port.read(LSR) & 0x02


def test_receiver_interrupt_follows_data(port: Port) -> None:
    port.write(MCR, OUT2)
    port.write(IER, 0x01)
    assert not port.line
    port.uart.feed(b"x")
    assert port.line
    assert port.read(IIR) == 0x04
    assert port.read(RBR) == ord("x")
    assert not port.line
    assert port.read(IIR) == 0x01


def test_interrupt_line_needs_out2(port: Port) -> None:
    port.write(IER, 0x01)
    port.uart.feed(b"x")
    assert not port.line
    port.write(MCR, OUT2)
    assert port.line


def test_fifo_trigger_level_and_timeout(port: Port) -> None:
    port.write(FCR, 0x41)  # FIFOs on, trigger at 4
    port.write(IER, 0x01)
    port.uart.feed(b"abc")
    assert port.read(IIR) == 0xCC
    port.uart.feed(b"d")
    assert port.read(IIR) == 0xC4


def test_fifo_reset_drops_what_was_received(port: Port) -> None:
    port.write(FCR, 0x01)
    port.uart.feed(b"abc")
    port.write(FCR, 0x03)
    assert not port.read(LSR) & 1
    port.uart.feed(b"z")
    assert port.read(RBR) == ord("z")


def test_transmitter_interrupt_on_enable_and_cleared_by_identification(port: Port) -> None:
    port.write(MCR, OUT2)
    port.write(IER, 0x02)
    assert port.line
    assert port.read(IIR) == 0x02
    assert not port.line
    assert port.read(IIR) == 0x01


def test_transmitter_interrupt_gives_an_edge_per_byte(port: Port) -> None:
    port.write(MCR, OUT2)
    port.write(IER, 0x02)
    port.levels.clear()
    port.write(THR, 0x41)
    assert port.levels == [False, True]


def test_interrupt_priority(port: Port) -> None:
    port.write(MCR, LOOP)
    port.write(IER, 0x0F)
    port.write(MCR, LOOP | 0x01)  # DSR changes: modem status
    port.write(THR, 1)
    port.write(THR, 2)  # overrun: line status
    assert port.read(IIR) == 0x06
    assert port.read(LSR) & 0x02
    assert port.read(IIR) == 0x04
    assert port.read(RBR) == 2
    assert port.read(IIR) == 0x02
    assert port.read(IIR) == 0x00
    assert port.read(MSR) & 0x02
    assert port.read(IIR) == 0x01


def test_loopback_returns_bytes_and_prints_nothing(port: Port) -> None:
    port.write(MCR, LOOP)
    port.write(THR, 0xAE)
    assert port.read(RBR) == 0xAE
    assert port.printed == b""


@pytest.mark.parametrize(("control", "status"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)])
def test_loopback_wires_modem_lines(port: Port, control: int, status: int) -> None:
    port.write(MCR, LOOP)
    port.write(MCR, LOOP | control)
    assert port.read(MSR) & 0xF0 == status


def test_modem_inputs_connected_and_deltas_clear_on_read(port: Port) -> None:
    assert port.read(MSR) == 0xB0
    port.write(MCR, LOOP)
    assert port.read(MSR) == 0x0B
    assert port.read(MSR) == 0x00


def test_ring_indicator_reports_trailing_edge_only(port: Port) -> None:
    port.write(MCR, LOOP)
    port.read(MSR)
    port.write(MCR, LOOP | 0x04)
    assert port.read(MSR) == 0x40
    port.write(MCR, LOOP)
    assert port.read(MSR) == 0x04


def test_wide_access_reaches_consecutive_registers(port: Port) -> None:
    port.uart.port_write(SCR, 4, 0x11223344)
    assert port.read(SCR) == 0x44
    assert port.uart.port_read(SCR, 2) == 0xFF44
    port.uart.port_write(THR, 2, 0x0141)
    assert port.printed == b"A"
    assert port.read(IER) == 0x01


@pytest.mark.parametrize("enabled", [0x01, 0x02, 0x04, 0x08])
def test_each_interrupt_has_its_enable(port: Port, enabled: int) -> None:
    port.write(MCR, LOOP)  # changes modem inputs: modem status
    port.write(IER, 0x02)
    port.write(THR, 1)
    port.write(THR, 2)  # received data, overrun, transmitter empty
    port.write(IER, enabled)
    identification = {0x01: 0x04, 0x02: 0x02, 0x04: 0x06, 0x08: 0x00}[enabled]
    assert port.read(IIR) == identification


def test_disabled_interrupts_stay_silent(port: Port) -> None:
    port.write(MCR, OUT2)
    port.uart.feed(b"x")
    port.write(THR, 1)
    assert port.read(IIR) == 0x01
    assert not port.line


def test_divisor_bytes_are_independent(port: Port) -> None:
    port.write(LCR, 0x80)
    port.write(DLL, 0xFF)
    port.write(DLM, 0xFF)
    port.write(DLL, 0x12)
    assert (port.read(DLL), port.read(DLM)) == (0x12, 0xFF)
    port.write(DLM, 0x34)
    assert (port.read(DLL), port.read(DLM)) == (0x12, 0x34)


def test_input_waits_while_looped_back(port: Port) -> None:
    port.write(MCR, LOOP)
    port.uart.feed(b"x")
    assert not port.read(LSR) & 1
    port.write(MCR, 0)
    assert port.read(LSR) & 1
    assert port.read(RBR) == ord("x")


@pytest.mark.parametrize(("fifo_control", "capacity"), [(0x00, 1), (0x01, 16)])
def test_overrun_in_loopback(port: Port, fifo_control: int, capacity: int) -> None:
    port.write(FCR, fifo_control)
    port.write(MCR, LOOP)
    for value in range(capacity):
        port.write(THR, value)
    assert not port.read(LSR) & 0x02
    port.write(THR, 0xEE)
    assert port.read(LSR) & 0x02
    assert not port.read(LSR) & 0x02
    # Without FIFO the new byte replaces the old; with FIFO what is queued stays.
    assert port.read(RBR) == (0 if fifo_control else 0xEE)


def test_switching_the_fifos_clears_the_receiver(port: Port) -> None:
    port.uart.feed(b"ab")  # "a" received, "b" on the line
    port.write(FCR, 0x01)
    assert port.read(RBR) == ord("b")
    port.uart.feed(b"cde")
    port.write(FCR, 0x00)
    assert not port.read(LSR) & 1
    assert port.read(IIR) == 0x01


def test_rewriting_fifo_control_keeps_what_was_received(port: Port) -> None:
    port.write(FCR, 0x01)
    port.uart.feed(b"a")
    port.write(FCR, 0xC1)
    assert port.read(RBR) == ord("a")


def test_receiver_reset_needs_enabled_fifos(port: Port) -> None:
    port.uart.feed(b"a")
    port.write(FCR, 0x02)
    assert port.read(RBR) == ord("a")


def test_fifo_reset_makes_room_for_what_waits(port: Port) -> None:
    port.write(FCR, 0x01)
    port.uart.feed(bytes(range(20)))
    port.write(FCR, 0x03)
    assert [port.read(RBR) for _ in range(4)] == [16, 17, 18, 19]


@pytest.mark.parametrize(("fifo_control", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(port: Port, fifo_control: int, level: int) -> None:
    port.write(FCR, fifo_control)
    port.write(IER, 0x01)
    for count in range(1, 16):
        port.uart.feed(b"x")
        assert port.read(IIR) == (0xC4 if count >= level else 0xCC)


def test_modem_deltas_accumulate_until_read(port: Port) -> None:
    port.write(MCR, LOOP)
    port.read(MSR)
    port.write(MCR, LOOP | 0x02)
    port.write(MCR, LOOP | 0x03)
    assert port.read(MSR) == 0x33
    port.write(MCR, LOOP | 0x03)
    assert port.read(MSR) == 0x30
