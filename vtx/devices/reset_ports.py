"""The ports that restart a PC: system control port A, the reset control register, and the firmware's own.

System control port A (92H) and the reset control register (0CF9H) can give every processor an INIT signal, as a rising
edge of their bit; the latter can also reset the whole machine. Neither register is changed by an INIT, so firmware can
tell one from the other. The firmware's port has the machine boot its image; firmware alone knows the word for it.

Interpretations. Bit 1 of port A, the A20 gate, is kept and has no effect: processors have had no such pin for long.

Threats: the guest restarts itself as often as it likes; each restart is a bounded amount of work between two runs.

Spec: IBM Personal System/2 Hardware Interface Technical Reference, "System Control Port A"; Intel 82371SB (PIIX3) data
sheet, "Reset Control Register".
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import define

from vtx.devices.ports import read_as_bytes, write_as_bytes
from vtx.pc_map import BOOT_WORD


class PortA:
    """Bits of system control port A."""

    FAST_INIT = 1 << 0
    A20_GATE = 1 << 1
    WRITABLE = FAST_INIT | A20_GATE


class ResetControl:
    """Bits of the reset control register."""

    HARD = 1 << 1
    RESET = 1 << 2
    FULL = 1 << 3
    WRITABLE = HARD | RESET | FULL


@define(slots=True)
class LatchState:
    """The bits written last."""

    value: int = 0


class SystemControlPortA:
    """Port 92H; ``init`` gives every processor an INIT signal."""

    def __init__(self, init: Callable[[], None]) -> None:
        self.state = LatchState(PortA.A20_GATE)
        self._init = init

    def port_read(self, offset: int, size: int) -> int:
        """The bits written last; ones beyond the port."""
        return read_as_bytes(lambda at: 0xFF if at else self.state.value, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Set the bits; bit 0 going from 0 to 1 is an INIT."""
        rising = value & ~self.state.value
        self.state.value = value & PortA.WRITABLE
        if rising & PortA.FAST_INIT:
            self._init()


class ResetControlPort:
    """Port 0CF9H; ``init`` gives every processor an INIT signal, ``reset`` resets the machine."""

    def __init__(self, init: Callable[[], None], reset: Callable[[], None]) -> None:
        self.state = LatchState()
        self._init = init
        self._reset = reset

    def port_read(self, offset: int, size: int) -> int:
        """The bits written last; ones beyond the port."""
        return read_as_bytes(lambda at: 0xFF if at else self.state.value, offset, size)

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Set the bits; bit 2 going from 0 to 1 is a reset, or an INIT while bit 1 is 0."""
        write_as_bytes(self._write, offset, size, value)

    def _write(self, offset: int, value: int) -> None:
        if offset:
            return
        rising = value & ~self.state.value
        self.state.value = value & ResetControl.WRITABLE
        if rising & ResetControl.RESET:
            (self._reset if value & ResetControl.HARD else self._init)()


class BootPort:
    """The port through which firmware has the image booted."""

    def __init__(self, boot: Callable[[], None]) -> None:
        self._boot = boot

    def port_read(self, offset: int, size: int) -> int:
        """Ones."""
        return (1 << 8 * size) - 1

    def port_write(self, offset: int, size: int, value: int) -> None:
        """The word, all four bytes of it at once, boots."""
        if offset == 0 and size == 4 and value == BOOT_WORD:
            self._boot()
