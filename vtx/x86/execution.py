"""The execution engine as the processor sees it: something that runs code until the model must act.

`vtx.engine` implements this on Unicorn. An engine executes ordinary instructions by itself and stops, always between
instructions or before one, with one of the events below; ``CpuState`` then holds the exact state.
"""

from __future__ import annotations

from typing import Protocol

from attrs import frozen

from vtx.x86.mmu import Grant, Refusal
from vtx.x86.second_level import AccessKind
from vtx.x86.state import CpuState


@frozen
class InstructionTrap:
    """The instruction at RIP is one the model executes; nothing of it has happened."""


@frozen
class ExceptionTrap:
    """The instruction at RIP raised an exception (for #DB by single-step: the one before RIP).

    ``error_code`` is meaningful for the vectors that push one.
    """

    vector: int
    error_code: int


@frozen
class RefusedFill:
    """The client refused a translation; ``linear_page`` is the page's address, the instruction had no effect.

    For a refused fetch, ``origin`` is the linear address of the instruction executed before it, if there was one.
    """

    linear_page: int
    kind: AccessKind
    refusal: Refusal
    origin: int | None = None


@frozen
class BudgetSpent:
    """The next block of code would exceed the budget; approach the deadline by single steps."""


@frozen
class WindowOpen:
    """RFLAGS.IF became 1 while the processor waited for that."""


@frozen
class Stepped:
    """One instruction (or one iteration of a repeated one) was executed, as asked."""


@frozen
class Interrupted:
    """The client asked to stop from within a callback."""


EngineEvent = InstructionTrap | ExceptionTrap | RefusedFill | BudgetSpent | WindowOpen | Stepped | Interrupted


class EngineClient(Protocol):
    """What the engine asks while it runs."""

    def fill(self, linear_page: int, kind: AccessKind, cpl: int, ac: bool) -> Grant | Refusal:
        """Translate a page for an access at ``cpl`` with RFLAGS.AC as given, or refuse."""
        ...

    def port_in(self, port: int, size: int, linear: int, bits: int, cpl: int) -> int | None:
        """Value of a port read that needs no further checks; None to have the instruction trap instead.

        ``linear`` is the address of the instruction, ``bits`` the kind of code (16, 32 or 64).
        """
        ...

    def port_out(self, port: int, size: int, value: int, linear: int, bits: int, cpl: int) -> bool:
        """Perform a port write that needs no further checks; False to have the instruction trap instead."""
        ...


class ExecutionEngine(Protocol):
    """Runs one processor's code."""

    def run(
        self,
        state: CpuState,
        *,
        reload: bool,
        budget: int | None,
        step: bool = False,
        watch_if: bool = False,
        instruction_limit: int | None = None,
        osxsave: bool = False,
        native: bool = False,
    ) -> EngineEvent:
        """Run from ``state`` to the next event, leaving the exact state in ``state``.

        ``reload`` says that more than GPRs, RIP and RFLAGS changed since the last run. ``budget`` limits the bytes of
        code executed, ``instruction_limit`` the value of `instructions`; ``step`` executes one instruction;
        ``watch_if`` stops as soon as RFLAGS.IF is 1. ``osxsave`` lets the XSAVE family execute instead of trapping,
        ``native`` the instructions that the engine can execute, but leaves to the client to look at first.
        """
        ...

    def elapsed(self) -> int:
        """Bytes of code executed since creation; within a callback, including the current block as a whole."""
        ...

    def instructions(self) -> int:
        """Instructions executed since creation, counted like `elapsed`."""
        ...

    def fpu(self) -> bytes:
        """The x87/SSE state as opaque bytes."""
        ...

    def resume(self, elapsed: int, instructions: int, fpu: bytes) -> None:
        """Go on from another moment, whose counters and x87/SSE state these are."""
        ...

    def request_stop(self) -> None:
        """From within a callback: stop at the end of the current block with `Interrupted`."""
        ...

    def flush(self, page: int | None) -> None:
        """Forget the translation of linear page number ``page``, or all."""
        ...
