"""What the guest can ask of the machine as a whole: to be switched off, reset, or booted again.

A reset and a boot replace the state of running processors, so they are done between two runs: what asks for them has
the running processor give way first.

Spec: SDM Vol. 3, "Processor State After Reset"; "Multiple-Processor (MP) Initialization".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vtx.x86.core import Halt

if TYPE_CHECKING:
    from vtx.machine import Machine


class Power:
    """The power and reset logic of ``machine``. Implements `vtx.board.PowerControl`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._wanted: Callable[[], None] | None = None

    @property
    def wanted(self) -> bool:
        """Whether `act` has something to do."""
        return self._wanted is not None

    def power_off(self) -> None:
        """Switch the machine off: the run is over."""
        self._machine.running.halt = Halt("the guest switched the machine off", shutdown=False)

    def init_processors(self) -> None:
        """Give every processor an INIT signal."""
        for cpu in self._machine.cpus:
            cpu.init()

    def reset(self) -> None:
        """Put processors and devices into their power-up states; memory stays as it is."""
        self._want(self._reset)

    def boot(self) -> None:
        """Boot the image, at the request of firmware; only the bootstrap processor's counts."""
        machine = self._machine
        if machine.running is machine.cpu and machine.image is not None:
            self._want(self._boot)

    def act(self) -> bool:
        """Between two runs: do what was asked for. Whether there was something, so that the machine goes on."""
        action, self._wanted = self._wanted, None
        if action is None:
            return False
        action()
        return True

    def _want(self, action: Callable[[], None]) -> None:
        # A reset cannot be taken back by a boot that was on its way.
        if self._wanted != self._reset:
            self._wanted = action
        self._machine.running.give_way()

    def _reset(self) -> None:
        self._machine.board.reset()
        for cpu in self._machine.cpus:
            cpu.reset()

    def _boot(self) -> None:
        """As firmware does: the other processors wait for a start-up IPI again."""
        for cpu in self._machine.cpus[1:]:
            cpu.init()
        self._machine.boot()
