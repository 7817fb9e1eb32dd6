"""The I/O APIC: 24 interrupt inputs, each with an entry that says which message it sends to the local APICs.

Offset 00H selects a register, 10H is its window, 40H takes the vector of an EOI (version 20H).

Interpretations. The pins are logical levels, so the polarity bits are stored and have no effect. An edge on a masked
input is lost; an active level is sent when the mask goes. A level-triggered entry sets remote IRR when a local APIC
accepted the message; one nobody accepted is sent again at the next change of its entry or pin. Making an entry
edge-triggered clears its remote IRR, on which software for I/O APICs without an EOI register relies. Delivery modes
other than fixed and lowest priority are edge-triggered whatever the entry says. Start-up and the reserved mode send
nothing. Messages are delivered at once, so delivery status always reads as idle.

Threats: the guest chooses entries and addresses. State is 24 integers; an EOI that leads to another message of a pin
still active leads to one, not to a loop, because remote IRR is set before anything else can happen.

Spec: 82093AA data sheet, "Register Description".
"""

from __future__ import annotations

from typing import Protocol

from attrs import define, field

from vtx.devices.apic_registers import BROADCAST, DeliveryMode, InterruptMessage
from vtx.devices.ports import InterruptLine

PINS = 24
VERSION = 0x20
SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
ID_REGISTER, VERSION_REGISTER, ARBITRATION_REGISTER, FIRST_ENTRY = 0x00, 0x01, 0x02, 0x10
ID_BITS = 0x0F00_0000
MASK32 = 0xFFFF_FFFF
SENT = frozenset(DeliveryMode) - {DeliveryMode.RESERVED, DeliveryMode.START_UP}
WITH_LEVEL = (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY)


class Entry:
    """Bits of a redirection entry; 7:0 are the vector, 10:8 the delivery mode, 63:56 the destination."""

    LOGICAL = 1 << 11
    REMOTE_IRR = 1 << 14
    LEVEL_TRIGGERED = 1 << 15
    MASKED = 1 << 16
    WRITABLE = 0xFF00_0000_0001_AFFF


class MessageBus(Protocol):
    """Where the messages go."""

    def send_ipi(self, message: InterruptMessage) -> bool:
        """Deliver ``message``; whether a local APIC accepted it."""
        ...

    def is_requested(self, message: InterruptMessage) -> bool:
        """Whether a fixed ``message`` would change nothing, because its vector is requested already."""
        ...


@define(slots=True)
class IoApicState:
    """Everything a snapshot needs; ``lines`` are the levels of the pins, ``entries`` 64 bits each."""

    identity: int = 0
    selected: int = 0
    lines: int = 0
    entries: list[int] = field(factory=lambda: [int(Entry.MASKED)] * PINS)


class IoApic:
    """The device; ``bus`` takes its messages and should tell `end_of_interrupt` of every broadcast EOI."""

    def __init__(self, bus: MessageBus, *, identity: int = 0) -> None:
        self.state = IoApicState(identity=identity << 24 & ID_BITS)
        self._bus = bus

    def line(self, pin: int) -> InterruptLine:
        """The input ``pin``, 0 to 23."""
        return lambda level: self.set_pin(pin, level)

    def set_pin(self, pin: int, level: bool) -> None:
        """Drive an input; a rising edge or an active level sends its message."""
        state = self.state
        bit = 1 << pin
        rising = level and not state.lines & bit
        state.lines = state.lines | bit if level else state.lines & ~bit
        entry = state.entries[pin]
        if entry & Entry.MASKED or not level:
            return
        if _is_level_triggered(entry):
            self._sense(pin)
        elif rising:
            self._send(entry, level_triggered=False)

    def masks(self, pin: int) -> bool:
        """Whether the entry of ``pin`` is masked."""
        return bool(self.state.entries[pin] & Entry.MASKED)

    def is_requested(self, pin: int) -> bool:
        """Whether a request on ``pin`` would change nothing: the one before it still waits for a processor."""
        entry = self.state.entries[pin]
        if entry & Entry.REMOTE_IRR:
            return True
        return _mode(entry) in WITH_LEVEL and self._bus.is_requested(_message(entry, level_triggered=False))

    def end_of_interrupt(self, vector: int) -> None:
        """Service of ``vector`` ended; a level-triggered pin with that vector that is still active sends again."""
        for pin, entry in enumerate(self.state.entries):
            if entry & Entry.REMOTE_IRR and entry & 0xFF == vector:
                self.state.entries[pin] = entry & ~Entry.REMOTE_IRR
                self._sense(pin)

    def mmio_read(self, offset: int, size: int) -> int:
        """Read the select register or the window; the byte lanes of an access decide what of it is seen."""
        base = offset & ~3
        value = self.state.selected if base == SELECT else self._read() if base == WINDOW else 0
        return value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Write the select register, the window or the EOI register; data registers take 4-byte accesses."""
        if offset == SELECT:
            self.state.selected = value & 0xFF
        elif offset == WINDOW and size >= 4:
            self._write(value & MASK32)
        elif offset == EOI:
            self.end_of_interrupt(value & 0xFF)

    def _read(self) -> int:
        state = self.state
        match state.selected:
            case 0x00 | 0x02:  # ID_REGISTER, ARBITRATION_REGISTER: writing the ID sets the arbitration ID
                return state.identity
            case 0x01:  # VERSION_REGISTER
                return VERSION | PINS - 1 << 16
        pin, high = divmod(state.selected - FIRST_ENTRY, 2)
        return state.entries[pin] >> 32 * high & MASK32 if 0 <= pin < PINS else 0

    def _write(self, value: int) -> None:
        state = self.state
        if state.selected == ID_REGISTER:
            state.identity = value & ID_BITS
        pin, high = divmod(state.selected - FIRST_ENTRY, 2)
        if not 0 <= pin < PINS:
            return
        old = state.entries[pin]
        other = MASK32 if high else MASK32 << 32
        entry = (old & other | value << 32 * high) & Entry.WRITABLE | old & Entry.REMOTE_IRR
        if not entry & Entry.LEVEL_TRIGGERED:
            entry &= ~Entry.REMOTE_IRR
        state.entries[pin] = entry
        self._sense(pin)

    def _sense(self, pin: int) -> None:
        """Send the message of a level-triggered pin that is active, unless the one before awaits its EOI."""
        state = self.state
        entry = state.entries[pin]
        if not state.lines >> pin & 1 or not _is_level_triggered(entry) or entry & (Entry.MASKED | Entry.REMOTE_IRR):
            return
        if self._send(entry, level_triggered=True):
            state.entries[pin] |= Entry.REMOTE_IRR

    def _send(self, entry: int, *, level_triggered: bool) -> bool:
        if _mode(entry) not in SENT:
            return False
        return self._bus.send_ipi(_message(entry, level_triggered=level_triggered))


def _message(entry: int, *, level_triggered: bool) -> InterruptMessage:
    destination, logical = entry >> 56, bool(entry & Entry.LOGICAL)
    if destination == 0xFF and not logical:
        destination = BROADCAST
    return InterruptMessage(_mode(entry), entry & 0xFF, destination, logical, level_triggered=level_triggered)


def _mode(entry: int) -> DeliveryMode:
    return DeliveryMode(entry >> 8 & 7)


def _is_level_triggered(entry: int) -> bool:
    return bool(entry & Entry.LEVEL_TRIGGERED) and _mode(entry) in WITH_LEVEL
