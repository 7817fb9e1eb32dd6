"""What a logical processor sees of the machine around it: ports, interrupts, time."""

from __future__ import annotations

from typing import Protocol


class Platform(Protocol):
    """The rest of the machine, from one processor's point of view."""

    def port_read(self, port: int, size: int) -> int:
        """Value of ``size`` (1, 2 or 4) bytes at an I/O port; ones where nothing answers."""
        ...

    def port_write(self, port: int, size: int, value: int) -> None:
        """Store ``size`` bytes at an I/O port."""
        ...

    def port_device(self, port: int) -> str:
        """Name of the device at an I/O port, for people; ``none`` where nothing answers."""
        ...

    def interrupt_pending(self) -> bool:
        """Whether an interrupt controller requests service for a vector above the task priority."""
        ...

    def acknowledge_interrupt(self) -> int:
        """Run an interrupt-acknowledge cycle; the vector to deliver."""
        ...

    def end_of_interrupt(self) -> None:
        """Dismiss the interrupt in service from the local APIC, as a write to its EOI register does."""
        ...

    def next_deadline(self) -> int | None:
        """Absolute tick at which a device next acts by itself, or None."""
        ...

    def advance(self, now: int) -> None:
        """Let devices do what is due at tick ``now``."""
        ...

    @property
    def apic_enabled(self) -> bool:
        """IA32_APIC_BASE.EN, which CPUID reports."""
        ...

    @property
    def task_priority(self) -> int:
        """CR8."""
        ...

    @task_priority.setter
    def task_priority(self, value: int) -> None: ...
