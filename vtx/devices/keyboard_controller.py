"""The 8042 keyboard controller of a PC, with neither keyboard nor mouse connected.

Offset 0 is the data port (60H), offset 4 the status and command port (64H). It is here for what software uses it for
besides the keyboard: a pulse on its output line 0, or that line written low, gives every processor an INIT signal.

Interpretations. The controller answers at once, so its input buffer is never full. What is sent to the keyboard or the
mouse is lost; no answer comes. Data that commands D2H and D3H make look like a device's raise that device's interrupt,
as the controller's own answers do that of the keyboard. The A20 gate, output line 1, is kept and has no effect.

Threats: the guest fills one buffer of one byte.

Spec: IBM Personal Computer AT Technical Reference, "Keyboard Controller"; IBM Personal System/2 Hardware Interface
Technical Reference, "Keyboard and Auxiliary Device Controller".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Final

from attrs import define

from vtx.devices.ports import InterruptLine, unconnected

DATA, STATUS_AND_COMMAND = 0, 4

SELF_TEST_PASSED: Final = 0x55
INTERFACE_TEST_PASSED: Final = 0x00
RAM_SIZE: Final = 0x20


class Status:
    """Bits of the status port."""

    OUTPUT_FULL = 1 << 0
    SYSTEM = 1 << 2
    LAST_WAS_COMMAND = 1 << 3
    NOT_LOCKED = 1 << 4
    AUXILIARY = 1 << 5


class CommandByte:
    """Bits of the command byte, byte 0 of the controller's RAM."""

    KEYBOARD_INTERRUPT = 1 << 0
    AUXILIARY_INTERRUPT = 1 << 1
    SYSTEM = 1 << 2
    KEYBOARD_DISABLED = 1 << 4
    AUXILIARY_DISABLED = 1 << 5


class OutputPort:
    """Lines of the output port that software drives; while the first is low, processors are held in reset."""

    NOT_RESET = 1 << 0
    A20_GATE = 1 << 1


class Command(enum.IntEnum):
    """Commands; 20H-3FH and 60H-7FH read and write the controller's RAM, F0H-FFH pulse output lines."""

    READ_RAM = 0x20
    WRITE_RAM = 0x60
    DISABLE_AUXILIARY = 0xA7
    ENABLE_AUXILIARY = 0xA8
    TEST_AUXILIARY = 0xA9
    SELF_TEST = 0xAA
    TEST_KEYBOARD = 0xAB
    DISABLE_KEYBOARD = 0xAD
    ENABLE_KEYBOARD = 0xAE
    READ_INPUT_PORT = 0xC0
    READ_OUTPUT_PORT = 0xD0
    WRITE_OUTPUT_PORT = 0xD1
    WRITE_KEYBOARD_OUTPUT = 0xD2
    WRITE_AUXILIARY_OUTPUT = 0xD3
    WRITE_AUXILIARY = 0xD4
    READ_TEST_INPUTS = 0xE0
    PULSE = 0xF0


INPUT_PORT: Final = 0x80  # the keyboard is not locked


@define(slots=True)
class KeyboardControllerState:
    """Everything a snapshot needs.

    ``output`` is the byte written to the output buffer last, ``full`` whether it has not been read yet, ``auxiliary``
    whether it is the mouse's.
    ``awaiting`` is the command whose data byte comes next, None if the next one is for the keyboard.
    """

    ram: bytearray
    output: int = 0
    full: bool = False
    auxiliary: bool = False
    output_port: int = OutputPort.NOT_RESET | OutputPort.A20_GATE
    awaiting: int | None = None
    last_was_command: bool = False
    keyboard_line: bool = False
    auxiliary_line: bool = False


class KeyboardController:
    """The device; ``init`` gives every processor an INIT signal. The lines are the interrupt requests."""

    def __init__(
        self,
        init: Callable[[], None],
        keyboard_line: InterruptLine = unconnected,
        auxiliary_line: InterruptLine = unconnected,
    ) -> None:
        self.state = KeyboardControllerState(bytearray(RAM_SIZE))
        self._init = init
        self._keyboard_line = keyboard_line
        self._auxiliary_line = auxiliary_line

    def port_read(self, offset: int, size: int) -> int:
        """The status, or the byte in the output buffer, which is empty then; it reads the same until the next."""
        value = self._status() if offset == STATUS_AND_COMMAND else self._take() if offset == DATA else 0xFF
        return value | (1 << 8 * size) - 0x100

    def port_write(self, offset: int, size: int, value: int) -> None:
        """A command, or data for the last one."""
        state, value = self.state, value & 0xFF
        if offset == STATUS_AND_COMMAND:
            state.awaiting, state.last_was_command = None, True
            self._command(value)
        elif offset == DATA:
            command, state.awaiting, state.last_was_command = state.awaiting, None, False
            if command is not None:
                self._data_for(command, value)
        self._update_lines()

    def _status(self) -> int:
        state = self.state
        return (
            Status.NOT_LOCKED
            | (Status.OUTPUT_FULL if state.full else 0)
            | (Status.AUXILIARY if state.auxiliary else 0)
            | (Status.LAST_WAS_COMMAND if state.last_was_command else 0)
            | (Status.SYSTEM if state.ram[0] & CommandByte.SYSTEM else 0)
        )

    def _take(self) -> int:
        state = self.state
        state.full = state.auxiliary = False
        self._update_lines()
        return state.output

    def _command(self, command: int) -> None:
        ram = self.state.ram
        if command >= Command.PULSE:
            if not command & OutputPort.NOT_RESET:
                self._init()
        elif Command.READ_RAM <= command < Command.READ_RAM + RAM_SIZE:
            self._answer(ram[command - Command.READ_RAM])
        elif command in _TAKES_DATA:
            self.state.awaiting = command
        elif command in _SWITCHES:
            bit, disabled = _SWITCHES[command]
            ram[0] = ram[0] | bit if disabled else ram[0] & ~bit
        elif command == Command.SELF_TEST:
            ram[0] |= CommandByte.SYSTEM
            self._answer(SELF_TEST_PASSED)
        elif command == Command.READ_OUTPUT_PORT:
            self._answer(self.state.output_port)
        elif command in _ANSWERS:
            self._answer(_ANSWERS[command])

    def _data_for(self, command: int, value: int) -> None:
        if command == Command.WRITE_OUTPUT_PORT:
            self.state.output_port = value
            if not value & OutputPort.NOT_RESET:
                # The line goes low and, the processors having been told, high again.
                self.state.output_port |= OutputPort.NOT_RESET
                self._init()
        elif command == Command.WRITE_KEYBOARD_OUTPUT:
            self._answer(value)
        elif command == Command.WRITE_AUXILIARY_OUTPUT:
            self._answer(value, auxiliary=True)
        elif command != Command.WRITE_AUXILIARY:
            self.state.ram[command - Command.WRITE_RAM] = value

    def _answer(self, value: int, *, auxiliary: bool = False) -> None:
        state = self.state
        state.output, state.full, state.auxiliary = value, True, auxiliary

    def _update_lines(self) -> None:
        state = self.state
        enabled = state.ram[0]
        keyboard = state.full and not state.auxiliary and bool(enabled & CommandByte.KEYBOARD_INTERRUPT)
        auxiliary = state.full and state.auxiliary and bool(enabled & CommandByte.AUXILIARY_INTERRUPT)
        if keyboard != state.keyboard_line:
            state.keyboard_line = keyboard
            self._keyboard_line(keyboard)
        if auxiliary != state.auxiliary_line:
            state.auxiliary_line = auxiliary
            self._auxiliary_line(auxiliary)


_TAKES_DATA: Final = frozenset(
    {
        *range(Command.WRITE_RAM, Command.WRITE_RAM + RAM_SIZE),
        Command.WRITE_OUTPUT_PORT,
        Command.WRITE_KEYBOARD_OUTPUT,
        Command.WRITE_AUXILIARY_OUTPUT,
        Command.WRITE_AUXILIARY,
    }
)
_SWITCHES: Final[Mapping[int, tuple[int, bool]]] = {
    Command.DISABLE_AUXILIARY: (CommandByte.AUXILIARY_DISABLED, True),
    Command.ENABLE_AUXILIARY: (CommandByte.AUXILIARY_DISABLED, False),
    Command.DISABLE_KEYBOARD: (CommandByte.KEYBOARD_DISABLED, True),
    Command.ENABLE_KEYBOARD: (CommandByte.KEYBOARD_DISABLED, False),
}
_ANSWERS: Final[Mapping[int, int]] = {
    Command.TEST_AUXILIARY: INTERFACE_TEST_PASSED,
    Command.TEST_KEYBOARD: INTERFACE_TEST_PASSED,
    Command.READ_INPUT_PORT: INPUT_PORT,
    Command.READ_TEST_INPUTS: 0,
}
