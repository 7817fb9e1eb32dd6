"""The 8254 programmable interval timer of a PC, and the system control port that shares its counter 2.

Counter 0's output is the timer interrupt, counter 1 times the refresh of memory, counter 2 the speaker. The clock is
1.193182 MHz, derived from ticks without rounding errors that add up (`vtx.devices.clock.Oscillator`).

Interpretations. A latch command for a counter whose latch is full is ignored, and a control word empties it, as the
data sheet says. The count 1, which the data sheet forbids in modes 2 and 3, makes an output that never changes. Digits
above 9 of a BCD count stand for their value. In the system control port the two parity-check enables are stored, and no
memory or channel error ever occurs; the refresh bit changes every 18 pulses whatever counter 1 is programmed to.

Threats: the guest chooses modes, counts and rates up to one interrupt every two pulses. Counting is arithmetic, so a
long silence costs as much as a short one; state is three small records.

Spec: 8254 data sheet, "Programming the 8254", "Read Operations"; 82371AB (PIIX4) data
sheet, "NMI Status and Control Register" (port 61H).
"""

from __future__ import annotations

from attrs import define, field

from vtx.devices.clock import Clock, Oscillator
from vtx.devices.pit_channel import Counter, CounterState, Mode
from vtx.devices.ports import InterruptLine, read_as_bytes, unconnected, write_as_bytes

FREQUENCY = 1_193_182
CONTROL = 3
READ_BACK = 3
SPEAKER_COUNTER = 2
REFRESH_PULSES = 18
LATCH, LOW_BYTE, HIGH_BYTE, BOTH_BYTES = range(4)
READ_BACK_NO_COUNT = 1 << 5
READ_BACK_NO_STATUS = 1 << 4
STATUS_OUTPUT = 1 << 7
STATUS_NULL_COUNT = 1 << 6


@define(slots=True)
class ChannelState:
    """The bus side of one counter.

    ``access`` is how bytes are transferred. ``low_byte`` is the first byte of a count whose second is to come,
    ``high_next`` whether the next read is a second byte.
    """

    counter: CounterState
    access: int = BOTH_BYTES
    low_byte: int | None = None
    high_next: bool = False
    latched_count: int | None = None
    latched_status: int | None = None


class Channel:
    """One counter as its port shows it; ``clock`` is the latest pulse."""

    def __init__(self) -> None:
        self.counter = Counter()
        self._bus = ChannelState(self.counter.state)

    @property
    def state(self) -> ChannelState:
        """Everything a snapshot needs."""
        self._bus.counter = self.counter.state
        return self._bus

    @state.setter
    def state(self, state: ChannelState) -> None:
        self._bus = state
        self.counter.state = state.counter

    def control(self, clock: int, word: int) -> None:
        """A control word for this counter: program it, or latch its count."""
        access = word >> 4 & 3
        if access == LATCH:
            self.latch(clock, count=True, status=False)
            return
        mode = word >> 1 & 7
        self.counter.set_mode(clock, Mode(mode if mode <= Mode.HARDWARE_STROBE else mode & 3), bool(word & 1))
        self._bus = ChannelState(self.counter.state, access)

    def latch(self, clock: int, *, count: bool, status: bool) -> None:
        """Hold count or status for reading, unless one that was not read yet is held."""
        bus = self._bus
        if count and bus.latched_count is None:
            bus.latched_count = self.counter.value(clock)
        if status and bus.latched_status is None:
            bus.latched_status = self._status(clock)

    def read(self, clock: int) -> int:
        """The next byte: latched status, latched count, or the count as it runs."""
        bus = self._bus
        if bus.latched_status is not None:
            status, bus.latched_status = bus.latched_status, None
            return status
        value = self.counter.value(clock) if bus.latched_count is None else bus.latched_count
        high = bus.high_next if bus.access == BOTH_BYTES else bus.access == HIGH_BYTE
        bus.high_next = bus.access == BOTH_BYTES and not high
        if not bus.high_next:
            bus.latched_count = None
        return value >> 8 if high else value & 0xFF

    def write(self, clock: int, value: int) -> None:
        """The next byte of a count."""
        bus = self._bus
        if bus.access == BOTH_BYTES and bus.low_byte is None:
            bus.low_byte = value
            self.counter.suspend(clock)
            return
        low, bus.low_byte = bus.low_byte or 0, None
        self.counter.set_count(clock, value if bus.access == LOW_BYTE else value << 8 | low)

    def _status(self, clock: int) -> int:
        state = self.counter.state
        output = STATUS_OUTPUT if self.counter.output(clock) else 0
        null_count = STATUS_NULL_COUNT if self.counter.null_count(clock) else 0
        return output | null_count | self._bus.access << 4 | state.mode << 1 | int(state.bcd)


@define(slots=True)
class PitState:
    """What the timer needs besides its channels: the pulse seen last and the level of the interrupt line."""

    clock: int = 0
    line_level: bool = False


class Pit8254:
    """The timer; ``line`` is the output of counter 0, ``tick_frequency`` the ticks of ``clock`` in a second."""

    def __init__(self, clock: Clock, tick_frequency: int, line: InterruptLine = unconnected) -> None:
        self.state = PitState()
        self.channels = (Channel(), Channel(), Channel())
        self.channels[SPEAKER_COUNTER].counter.set_gate(0, False)
        self._clock = clock
        self._oscillator = Oscillator(FREQUENCY, tick_frequency)
        self._line = line

    def pulse(self) -> int:
        """Number of the latest clock pulse."""
        return self._oscillator.edges(self._clock.now())

    def port_read(self, offset: int, size: int) -> int:
        """Read counters at offsets 0 to 2; ones from the write-only control word."""
        self.advance(self._clock.now())
        return read_as_bytes(self._read, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Write counts at offsets 0 to 2, control words at offset 3."""
        self.advance(self._clock.now())
        write_as_bytes(self._write, offset, size, value)
        self._drive(self.channels[0].counter.output(self.state.clock))

    def set_speaker_gate(self, level: bool) -> None:
        """Drive the gate of counter 2."""
        self.channels[SPEAKER_COUNTER].counter.set_gate(self.pulse(), level)

    def speaker_output(self) -> bool:
        """Output of counter 2."""
        return self.channels[SPEAKER_COUNTER].counter.output(self.pulse())

    def next_deadline(self) -> int | None:
        """The tick at which counter 0's output changes next, or None."""
        change = self.channels[0].counter.next_change(self.state.clock)
        return None if change is None else self._oscillator.tick_of(change)

    def advance(self, now: int) -> None:
        """Drive the interrupt line to what it is at ``now``; changes in between show as one edge."""
        counter, state = self.channels[0].counter, self.state
        clock = self._oscillator.edges(now)
        change = counter.next_change(state.clock)
        state.clock = max(clock, state.clock)
        if change is None or change > clock:
            return
        level = counter.output(clock)
        if level == state.line_level:
            self._drive(not level)
        self._drive(level)

    def _drive(self, level: bool) -> None:
        if level != self.state.line_level:
            self.state.line_level = level
            self._line(level)

    def _read(self, offset: int) -> int:
        return self.channels[offset].read(self.state.clock) if offset < CONTROL else 0xFF

    def _write(self, offset: int, value: int) -> None:
        clock = self.state.clock
        if offset < CONTROL:
            self.channels[offset].write(clock, value)
        elif offset == CONTROL and value >> 6 != READ_BACK:
            self.channels[value >> 6].control(clock, value)
        elif offset == CONTROL:
            for number, channel in enumerate(self.channels):
                if value >> number + 1 & 1:
                    count, status = not value & READ_BACK_NO_COUNT, not value & READ_BACK_NO_STATUS
                    channel.latch(clock, count=count, status=status)


class SystemControl:
    """Bits of system control port B."""

    SPEAKER_GATE = 1 << 0
    SPEAKER_DATA = 1 << 1
    REFRESH = 1 << 4
    SPEAKER_OUTPUT = 1 << 5
    WRITABLE = 0x0F


@define(slots=True)
class SystemControlState:
    """The bits written last."""

    control: int = 0


@define
class SystemControlPort:
    """System control port B (one port): gate and output of the timer's counter 2, the speaker, refresh."""

    pit: Pit8254
    state: SystemControlState = field(factory=SystemControlState)

    def port_read(self, offset: int, size: int) -> int:
        """The control bits with the two that time drives; ones beyond the port."""
        return read_as_bytes(self._read, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Set the control bits."""
        if offset == 0:
            self.state.control = value & SystemControl.WRITABLE
            self.pit.set_speaker_gate(bool(value & SystemControl.SPEAKER_GATE))

    @property
    def speaker(self) -> bool:
        """Level of the speaker."""
        return bool(self.state.control & SystemControl.SPEAKER_DATA) and self.pit.speaker_output()

    def _read(self, offset: int) -> int:
        if offset:
            return 0xFF
        refresh = SystemControl.REFRESH if self.pit.pulse() // REFRESH_PULSES & 1 else 0
        output = SystemControl.SPEAKER_OUTPUT if self.pit.speaker_output() else 0
        return self.state.control | refresh | output
