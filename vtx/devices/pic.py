"""The pair of 8259A interrupt controllers of a PC: master with the slave cascaded on its input 2.

`PicPair.master`, `.slave` and `.edge_level` are port devices (two ports each); `line` gives the sixteen inputs;
`pending` and `acknowledge` are what the processor sees. The MCS-80/85 call sequence and buffered mode, which a PC never
wires, do not exist: the mode bits that select them are ignored. So is ICW1's level-triggered mode, which the edge/level
registers of a PC replace.

Interpretation. An edge requests until it is acknowledged even if the input falls before. The data sheet asks for an
input held high until then and calls what follows a shorter pulse a default interrupt; virtual machines in use latch the
edge, and their guests send pulses. The cascade input follows the slave, so a request the slave withdraws is gone.

Threats: the guest chooses every command word in any order, including during initialization. State is eleven small
integers a chip, no command loops, and an acknowledge with nothing requested is the spurious interrupt, not an error.

Spec: 8259A data sheet, "Interrupt Sequence", "Initialization Command Words", "Operation Command Words".
"""

from __future__ import annotations

from attrs import define

from vtx.devices.ports import InterruptLine, read_as_bytes, unconnected, write_as_bytes

CASCADE_INPUT = 2
SPURIOUS_INPUT = 7

ICW1_INITIALIZE = 1 << 4
ICW1_SINGLE = 1 << 1
ICW1_NEEDS_ICW4 = 1 << 0
ICW4_AUTOMATIC_EOI = 1 << 1
ICW4_SPECIAL_FULLY_NESTED = 1 << 4
OCW3_SELECT = 1 << 3
OCW3_POLL = 1 << 2
OCW3_READ_REGISTER = 1 << 1
OCW3_READ_ISR = 1 << 0
OCW3_ENABLE_SPECIAL_MASK = 1 << 6
OCW3_SPECIAL_MASK = 1 << 5


@define(slots=True)
class PicState:
    """One 8259A. ``expected_icw`` is the initialization word the next write to port 1 is, 0 when initialized."""

    irr: int = 0
    isr: int = 0
    imr: int = 0
    lines: int = 0
    level_triggered: int = 0
    vector_base: int = 0
    lowest_priority: int = 7
    expected_icw: int = 0
    single: bool = False
    needs_icw4: bool = False
    automatic_eoi: bool = False
    rotate_on_automatic_eoi: bool = False
    special_fully_nested: bool = False
    special_mask: bool = False
    read_isr: bool = False
    poll: bool = False
    output: bool = False


class Pic8259:
    """One controller; ``output`` is its INT pin."""

    def __init__(self, is_master: bool, output: InterruptLine) -> None:
        self.state = PicState()
        self._is_master = is_master
        self._output = output

    def set_input(self, number: int, level: bool) -> None:
        """Drive input ``number`` (0 to 7): a rising edge or an active level requests, a level that ends withdraws."""
        state = self.state
        bit = 1 << number
        if not level:
            state.lines &= ~bit
            if state.level_triggered & bit or (self._is_master and number == CASCADE_INPUT):
                state.irr &= ~bit
        elif not state.lines & bit:
            state.lines |= bit
            state.irr |= bit
        self.update()

    def request(self) -> int | None:
        """The input to serve now, or None: the highest request that is not masked and not held off by service."""
        state = self.state
        requests = state.irr & ~state.imr
        if not requests:
            return None
        in_service = state.isr & ~state.imr if state.special_mask else state.isr
        for number in self._by_priority():
            bit = 1 << number
            # In special fully nested mode the slave may interrupt its own service routine.
            nests = state.special_fully_nested and self._is_master and number == CASCADE_INPUT
            if in_service & bit and not (nests and requests & bit):
                return None
            if requests & bit:
                return number
        return None

    def acknowledge(self) -> int:
        """Serve the request and return its input; the spurious input 7, without service, if there is none."""
        number = self.request()
        if number is None:
            return SPURIOUS_INPUT
        state = self.state
        bit = 1 << number
        if not (state.level_triggered & bit and state.lines & bit):
            state.irr &= ~bit
        if not state.automatic_eoi:
            state.isr |= bit
        elif state.rotate_on_automatic_eoi:
            state.lowest_priority = number
        # The pin falls with the acknowledge even if more is requested: an edge-triggered master must see the next one.
        self._drive(False)
        self.update()
        return number

    def update(self) -> None:
        """Drive the INT pin as the state demands."""
        self._drive(self.request() is not None)

    def _drive(self, level: bool) -> None:
        if level != self.state.output:
            self.state.output = level
            self._output(level)

    def port_read(self, offset: int, size: int) -> int:
        """IRR or ISR at offset 0, IMR at offset 1, or the result of a poll command at either."""
        return read_as_bytes(self._read, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """A command word."""
        write_as_bytes(self._write, offset, size, value)

    def _by_priority(self) -> tuple[int, ...]:
        first = self.state.lowest_priority + 1
        return tuple((first + step) % 8 for step in range(8))

    def _read(self, offset: int) -> int:
        state = self.state
        if state.poll and offset <= 1:
            state.poll = False
            return self._poll()
        if offset == 0:
            return state.isr if state.read_isr else state.irr
        return state.imr if offset == 1 else 0xFF

    def _poll(self) -> int:
        """A poll acknowledges without the processor: bit 7 tells of a request, bits 2:0 which."""
        return 0x80 | self.acknowledge() if self.request() is not None else 0

    def _write(self, offset: int, value: int) -> None:
        if offset == 0:
            if value & ICW1_INITIALIZE:
                self._initialize(value)
            elif value & OCW3_SELECT:
                self._operate(value)
            else:
                self._end_of_interrupt(value)
        elif offset == 1:
            if self.state.expected_icw:
                self._initialization_word(value)
            else:
                self.state.imr = value
        self.update()

    def _initialize(self, icw1: int) -> None:
        """ICW1 restarts the controller; edge detection starts anew, so a high edge input needs a new edge."""
        old = self.state
        self.state = PicState(
            irr=old.lines & old.level_triggered,
            lines=old.lines,
            level_triggered=old.level_triggered,
            vector_base=old.vector_base,
            output=old.output,
            expected_icw=2,
            single=bool(icw1 & ICW1_SINGLE),
            needs_icw4=bool(icw1 & ICW1_NEEDS_ICW4),
        )

    def _initialization_word(self, value: int) -> None:
        """ICW2 to ICW4; ICW3 names the cascade input, which a PC has wired already."""
        state = self.state
        if state.expected_icw == 2:
            state.vector_base = value & 0xF8
            state.expected_icw = 4 if state.single else 3
        elif state.expected_icw == 3:
            state.expected_icw = 4
        else:
            state.automatic_eoi = bool(value & ICW4_AUTOMATIC_EOI)
            state.special_fully_nested = bool(value & ICW4_SPECIAL_FULLY_NESTED)
            state.expected_icw = 0
        if state.expected_icw == 4 and not state.needs_icw4:
            state.expected_icw = 0

    def _operate(self, ocw3: int) -> None:
        state = self.state
        if ocw3 & OCW3_ENABLE_SPECIAL_MASK:
            state.special_mask = bool(ocw3 & OCW3_SPECIAL_MASK)
        if ocw3 & OCW3_READ_REGISTER:
            state.read_isr = bool(ocw3 & OCW3_READ_ISR)
        state.poll = bool(ocw3 & OCW3_POLL)

    def _end_of_interrupt(self, ocw2: int) -> None:
        """OCW2: bits 7:5 are rotate, specific and EOI; bits 2:0 the input of a specific command."""
        state = self.state
        rotate, specific, end = bool(ocw2 & 0x80), bool(ocw2 & 0x40), bool(ocw2 & 0x20)
        number: int | None = ocw2 & 7
        if end:
            if not specific:
                number = self._highest_in_service()
            if number is not None:
                state.isr &= ~(1 << number)
                if rotate:
                    state.lowest_priority = number
        elif rotate and specific:
            state.lowest_priority = ocw2 & 7
        elif not specific:
            state.rotate_on_automatic_eoi = rotate

    def _highest_in_service(self) -> int | None:
        """What a non-specific EOI ends; masked inputs do not count in special mask mode."""
        in_service = self.state.isr & ~self.state.imr if self.state.special_mask else self.state.isr
        return next((number for number in self._by_priority() if in_service >> number & 1), None)


class _EdgeLevelRegisters:
    """The edge/level control registers; inputs 0, 1, 2, 8 and 13 are always edge-triggered."""

    WRITABLE = (0xF8, 0xDE)

    def __init__(self, chips: tuple[Pic8259, Pic8259]) -> None:
        self._chips = chips

    def port_read(self, offset: int, size: int) -> int:
        return read_as_bytes(self._read, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        write_as_bytes(self._write, offset, size, value)

    def _read(self, offset: int) -> int:
        return self._chips[offset].state.level_triggered if offset <= 1 else 0xFF

    def _write(self, offset: int, value: int) -> None:
        if offset <= 1:
            state = self._chips[offset].state
            state.level_triggered = value & self.WRITABLE[offset]
            state.irr |= state.lines & state.level_triggered
            self._chips[offset].update()


class PicPair:
    """Both controllers; ``line`` is the INTR output to the processor."""

    def __init__(self, line: InterruptLine = unconnected) -> None:
        self.master = Pic8259(True, line)
        self.slave = Pic8259(False, self.line(CASCADE_INPUT))
        self.edge_level = _EdgeLevelRegisters((self.master, self.slave))
        # A machine that boots without firmware starts with everything masked.
        self.master.state.imr = self.slave.state.imr = 0xFF

    def line(self, number: int) -> InterruptLine:
        """The line of ISA interrupt ``number``, 0 to 15; 2 is the slave's."""
        return lambda level: (self.master if number < 8 else self.slave).set_input(number & 7, level)

    def masks(self, number: int) -> bool:
        """Whether ISA interrupt ``number`` is masked, at its controller or at the master's cascade input."""
        if number < 8:
            return bool(self.master.state.imr >> number & 1)
        return bool(self.slave.state.imr >> (number & 7) & 1 or self.master.state.imr >> CASCADE_INPUT & 1)

    def requests(self, number: int) -> bool:
        """Whether ISA interrupt ``number`` is requested and not acknowledged yet."""
        chip = self.master if number < 8 else self.slave
        return bool(chip.state.irr >> (number & 7) & 1)

    def pending(self) -> bool:
        """Whether INTR is asserted."""
        return self.master.state.output

    def acknowledge(self) -> int:
        """The vector of the interrupt-acknowledge cycle; a spurious vector if the request went away."""
        number = self.master.acknowledge()
        if number != CASCADE_INPUT:
            return self.master.state.vector_base | number
        return self.slave.state.vector_base | self.slave.acknowledge()
