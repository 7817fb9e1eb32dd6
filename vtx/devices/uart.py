"""The 16550A serial port (UART) with FIFOs, loopback and interrupts.

The line is ideal: it carries whole bytes in no time and without error, whatever baud rate, word length and parity the
guest programs. Hence the transmitter is always ready, the character time-out elapses at once, and input the receiver
has no room for waits on the line instead of being lost; only loopback can overrun the receiver.

Threats: the guest chooses every register and how much it prints. Memory is bounded by the 16-byte receive FIFO (what
waits on the line came from the host); each write hands at most four bytes to the sink, so flooding is the sink's to
limit.

Spec: PC16550D data sheet, "Registers" and "FIFO Interrupt Mode Operation".
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from attrs import define, field

from vtx.devices.ports import InterruptLine, read_as_bytes, unconnected, write_as_bytes

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)


class Offset(enum.IntEnum):
    """Registers by port offset; 0 and 1 hold the divisor latch while LCR.DLAB is set."""

    DATA = 0  # RBR on read, THR on write, DLL with DLAB
    IER = 1  # DLM with DLAB
    IIR_FCR = 2  # IIR on read, FCR on write
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7


class Ier:
    """Interrupt enable register."""

    RECEIVED_DATA = 1 << 0
    THR_EMPTY = 1 << 1
    LINE_STATUS = 1 << 2
    MODEM_STATUS = 1 << 3


class Iir(enum.IntEnum):
    """Interrupt identification, highest priority first; NONE is the one value with bit 0 set."""

    LINE_STATUS = 0x06
    RECEIVED_DATA = 0x04
    CHARACTER_TIMEOUT = 0x0C
    THR_EMPTY = 0x02
    MODEM_STATUS = 0x00
    NONE = 0x01


class Fcr:
    """FIFO control register; bits 7:6 choose the receiver trigger level."""

    ENABLE = 1 << 0
    RECEIVER_RESET = 1 << 1


LCR_DLAB = 1 << 7
IIR_FIFOS_ENABLED = 0xC0


class Mcr:
    """Modem control register. On a PC, OUT2 gates the interrupt line."""

    DTR = 1 << 0
    RTS = 1 << 1
    OUT1 = 1 << 2
    OUT2 = 1 << 3
    LOOPBACK = 1 << 4


class Lsr:
    """Line status register."""

    DATA_READY = 1 << 0
    OVERRUN = 1 << 1
    THR_EMPTY = 1 << 5
    TRANSMITTER_EMPTY = 1 << 6


class Msr:
    """Modem status register; the low half tells which inputs changed since the last read."""

    DELTA_CTS = 1 << 0
    DELTA_DSR = 1 << 1
    TRAILING_RI = 1 << 2
    DELTA_DCD = 1 << 3
    CTS = 1 << 4
    DSR = 1 << 5
    RI = 1 << 6
    DCD = 1 << 7


CONNECTED = Msr.CTS | Msr.DSR | Msr.DCD
LOOPBACK_WIRING = ((Mcr.DTR, Msr.DSR), (Mcr.RTS, Msr.CTS), (Mcr.OUT1, Msr.RI), (Mcr.OUT2, Msr.DCD))


@define(slots=True)
class UartState:
    """Everything of the UART a snapshot needs; ``waiting`` is input still on the line."""

    ier: int = 0
    fifo_control: int = 0
    lcr: int = 0
    mcr: int = 0
    line_errors: int = 0
    modem_status: int = CONNECTED
    scr: int = 0
    divisor: int = 0x0001
    received: bytearray = field(factory=bytearray)
    waiting: bytearray = field(factory=bytearray)
    thr_empty_pending: bool = False
    line_level: bool = False


class Uart16550:
    """One serial port: ``sink`` gets each transmitted byte, ``line`` is its interrupt request."""

    def __init__(self, sink: Callable[[bytes], None], line: InterruptLine = unconnected) -> None:
        self.state = UartState()
        self._sink = sink
        self._line = line

    def feed(self, data: bytes) -> None:
        """Input from the host; bytes the receiver has no room for wait."""
        self.state.waiting += data
        self._fill()
        self._update_line()

    def reset(self) -> None:
        """The master reset pin; input still on the line stays there."""
        self.state = UartState(waiting=self.state.waiting, line_level=self.state.line_level)
        self._fill()
        self._update_line()

    def port_read(self, offset: int, size: int) -> int:
        """Read registers, byte by byte; ones beyond the last."""
        return read_as_bytes(self._read, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Write registers, byte by byte; dropped beyond the last."""
        write_as_bytes(self._write, offset, size, value)

    @property
    def _fifos_enabled(self) -> bool:
        return bool(self.state.fifo_control & Fcr.ENABLE)

    @property
    def _capacity(self) -> int:
        return FIFO_SIZE if self._fifos_enabled else 1

    def _read(self, offset: int) -> int:
        state = self.state
        if state.lcr & LCR_DLAB and offset <= Offset.IER:
            return state.divisor >> (8 * offset) & 0xFF
        match offset:
            case Offset.DATA:
                return self._receive()
            case Offset.IER:
                return state.ier
            case Offset.IIR_FCR:
                return self._identify()
            case Offset.LCR:
                return state.lcr
            case Offset.MCR:
                return state.mcr
            case Offset.LSR:
                return self._line_status()
            case Offset.MSR:
                return self._modem_status()
            case Offset.SCR:
                return state.scr
        return 0xFF

    def _write(self, offset: int, value: int) -> None:
        state = self.state
        if state.lcr & LCR_DLAB and offset <= Offset.IER:
            shift = 8 * offset
            state.divisor = state.divisor & ~(0xFF << shift) | value << shift
            return
        match offset:
            case Offset.DATA:
                self._transmit(value)
            case Offset.IER:
                # Enabling the interrupt while the register is empty, as it always is, raises it.
                if value & ~state.ier & Ier.THR_EMPTY:
                    state.thr_empty_pending = True
                state.ier = value & 0x0F
            case Offset.IIR_FCR:
                self._control_fifos(value)
            case Offset.LCR:
                state.lcr = value
            case Offset.MCR:
                self._control_modem(value & 0x1F)
            case Offset.SCR:
                state.scr = value
        self._update_line()

    def _transmit(self, value: int) -> None:
        """The byte leaves at once; the interrupt line falls and, the register being empty again, rises."""
        state = self.state
        state.thr_empty_pending = False
        self._update_line()
        state.thr_empty_pending = True
        if not state.mcr & Mcr.LOOPBACK:
            self._sink(bytes((value,)))
        elif len(state.received) < self._capacity:
            state.received.append(value)
        else:
            state.line_errors |= Lsr.OVERRUN
            if not self._fifos_enabled:
                state.received[:] = bytes((value,))

    def _receive(self) -> int:
        state = self.state
        if not state.received:
            return 0
        value = state.received.pop(0)
        self._fill()
        self._update_line()
        return value

    def _fill(self) -> None:
        """Take from the line what the receiver has room for; loopback disconnects the line."""
        state = self.state
        room = self._capacity - len(state.received)
        if room > 0 and state.waiting and not state.mcr & Mcr.LOOPBACK:
            state.received += state.waiting[:room]
            del state.waiting[:room]

    def _control_fifos(self, value: int) -> None:
        state = self.state
        if (value ^ state.fifo_control) & Fcr.ENABLE or (value & Fcr.ENABLE and value & Fcr.RECEIVER_RESET):
            state.received.clear()
        state.fifo_control = value & 0xC1 if value & Fcr.ENABLE else 0
        self._fill()

    def _control_modem(self, value: int) -> None:
        state = self.state
        state.mcr = value
        inputs = CONNECTED
        if value & Mcr.LOOPBACK:
            inputs = sum(status for control, status in LOOPBACK_WIRING if value & control)
        changed = state.modem_status ^ inputs
        delta = state.modem_status & 0x0F
        delta |= changed >> 4 & ~Msr.TRAILING_RI
        if changed & Msr.RI and not inputs & Msr.RI:
            delta |= Msr.TRAILING_RI
        state.modem_status = inputs | delta
        self._fill()

    def _line_status(self) -> int:
        state = self.state
        status = Lsr.THR_EMPTY | Lsr.TRANSMITTER_EMPTY | state.line_errors
        if state.received:
            status |= Lsr.DATA_READY
        state.line_errors = 0
        self._update_line()
        return status

    def _modem_status(self) -> int:
        status = self.state.modem_status
        self.state.modem_status &= 0xF0
        self._update_line()
        return status

    def _pending(self) -> Iir:
        """The enabled interrupt of highest priority."""
        state = self.state
        if state.ier & Ier.LINE_STATUS and state.line_errors:
            return Iir.LINE_STATUS
        if state.ier & Ier.RECEIVED_DATA and state.received:
            if not self._fifos_enabled or len(state.received) >= TRIGGER_LEVELS[state.fifo_control >> 6]:
                return Iir.RECEIVED_DATA
            return Iir.CHARACTER_TIMEOUT
        if state.ier & Ier.THR_EMPTY and state.thr_empty_pending:
            return Iir.THR_EMPTY
        if state.ier & Ier.MODEM_STATUS and state.modem_status & 0x0F:
            return Iir.MODEM_STATUS
        return Iir.NONE

    def _identify(self) -> int:
        """Reading the identification also acknowledges the transmitter interrupt it reports."""
        pending = self._pending()
        if pending is Iir.THR_EMPTY:
            self.state.thr_empty_pending = False
            self._update_line()
        return pending | (IIR_FIFOS_ENABLED if self._fifos_enabled else 0)

    def _update_line(self) -> None:
        """Drive the request line; loopback forces OUT2, which gates it on a PC, inactive."""
        state = self.state
        gated_on = state.mcr & (Mcr.OUT2 | Mcr.LOOPBACK) == Mcr.OUT2
        level = gated_on and self._pending() is not Iir.NONE
        if level != state.line_level:
            state.line_level = level
            self._line(level)
