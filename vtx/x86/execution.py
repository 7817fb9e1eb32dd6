"""The execution engine as the processor sees it: something that runs code until the model must act.

`vtx.engine` implements this on Unicorn. An engine executes ordinary instructions by itself and stops, always between
instructions or before one, with one of the events below; ``CpuState`` then holds the exact state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from attrs import define, frozen

from vtx.x86.decode import Instruction
from vtx.x86.mmu import Basis, Grant, Refusal, Translations
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

    For a refused fetch, ``origin`` is the linear address of the near branch executed before it, if there was one.
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


@frozen
class OperandTrap:
    """The instruction at RIP has memory operands that the engine cannot vouch for, or is beyond the limit of CS.

    Nothing of it has happened. ``origin`` is the linear address of the near branch that went beyond the limit, if one
    was executed right before.
    """

    origin: int | None = None


EngineEvent = (
    InstructionTrap | OperandTrap | ExceptionTrap | RefusedFill | BudgetSpent | WindowOpen | Stepped | Interrupted
)


@define(slots=True)
class Plan:
    """How far the engine may run.

    ``budget`` limits the bytes of code executed, ``instruction_limit`` the value of `ExecutionEngine.instructions`;
    None for no limit. ``step`` executes one instruction; ``watch_if`` stops as soon as RFLAGS.IF is 1.
    """

    budget: int | None = None
    instruction_limit: int | None = None
    step: bool = False
    watch_if: bool = False


STEP: Final = Plan(step=True)

NOT_ANSWERED: Final = -1
"""`EngineClient.answer` did nothing: the engine is to stop with the event."""

ANSWERED: Final = -2
"""`EngineClient.answer` executed the instruction, but the engine is to stop all the same."""

REPLANNED: Final = -3
"""It executed the instruction and changed more than GPRs, RIP and RFLAGS; `EngineClient.plan` says how to go on."""

CONTINUED: Final = -4
"""As `REPLANNED`, but nothing else changed."""

UNPLANNED: Final = 1 << 62
"""A budget of `EngineClient.answer` that no run uses up."""


@define(slots=True)
class Place:
    """A sensitive instruction; the same object as long as the code does not change.

    ``rest`` is the number of instructions from here to the end of the engine's block, ``known`` whether the engine
    knows the instruction at all. The other attributes are the client's: what it found here, whether it answers such
    instructions (None before it looked), whether they are quiet, and a quicker way to execute them.
    """

    rest: int
    known: bool
    instruction: Instruction | None = None
    answers: bool | None = None
    quiet: bool = False
    shortcut: Callable[[], bool] | None = None


class EngineClient(Protocol):
    """What the engine asks while it runs."""

    plan: Plan
    """How to go on after `REPLANNED`."""

    def answer(self, place: Place) -> int:
        """A sensitive instruction at ``place``: execute it at once and let the engine go on behind it, if possible.

        The state given to `ExecutionEngine.run` is exact, and taken from there again if the engine goes on, but only
        GPRs, RIP and RFLAGS. Returns the budget of code bytes from there on, or one of the constants above.
        """
        ...

    def fill(self, linear_page: int, kind: AccessKind, cpl: int, ac: bool) -> Grant | Refusal:
        """Translate a page for an access at ``cpl`` with RFLAGS.AC as given, or refuse."""
        ...

    def translations(self) -> Translations | None:
        """Where what fills rest on is kept from now on; None to be asked for each."""
        ...

    def basis(self, linear_page: int) -> Basis | None:
        """What the last fill for this page rests on, if it can be said."""
        ...

    def port_in(self, port: int, size: int, cpl: int) -> int | None:
        """Value of an IN at ``cpl`` that needs no further checks; None to have the instruction trap instead."""
        ...

    def port_out(self, port: int, size: int, value: int, cpl: int) -> bool:
        """Perform an OUT at ``cpl`` that needs no further checks; False to have the instruction trap instead."""
        ...


class ExecutionEngine(Protocol):
    """Runs one processor's code."""

    def run(
        self,
        state: CpuState,
        plan: Plan,
        *,
        reload: bool,
        native: bool = False,
    ) -> EngineEvent:
        """Run from ``state`` to the next event, leaving the exact state in ``state``.

        ``reload`` says that more than GPRs, RIP and RFLAGS changed since the last run. ``native`` lets execute what the
        engine can execute but leaves to the client to look at first.
        """
        ...

    def close(self) -> None:
        """Release what it holds of the host's memory; it cannot be used afterwards."""
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

    def legacy_area(self) -> bytes:
        """Between runs: the x87/SSE state in the layout of FXSAVE64, 416 bytes."""
        ...

    def simd_exceptions(self) -> int:
        """After a run that was ``native``: the SIMD floating-point exceptions met in it, as MXCSR has them."""
        ...

    def set_legacy_area(self, area: bytes) -> None:
        """Between runs: replace the x87/SSE state by that of ``area``."""
        ...

    def resume(self, elapsed: int, instructions: int, fpu: bytes) -> None:
        """Go on from another moment, whose counters and x87/SSE state these are."""
        ...

    def power_up_fpu(self) -> bytes:
        """The x87/SSE state of a processor that has just been switched on."""
        ...

    def request_stop(self) -> None:
        """From within a callback: stop at the end of the current block with `Interrupted`."""
        ...

    def flush(self, page: int | None) -> None:
        """Forget the translation of linear page number ``page``, or all."""
        ...
