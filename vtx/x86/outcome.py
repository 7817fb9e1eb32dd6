"""What can come of executing one instruction, and the one exception that unwinds a half-executed one.

Handlers return an `Outcome`. Deep inside a handler, a memory access may fault; threading that result through every
helper would hide the architecture behind plumbing, so memory accessors raise `InstructionAborted`, which exactly one
place (the commit function of the processor) catches and turns back into the outcome it carries.
"""

from __future__ import annotations

import enum

from attrs import field, frozen


class Vector(enum.IntEnum):
    """Exception vectors (SDM Vol. 3, "Exceptions and Interrupts", table of vectors)."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21


@frozen
class Fault:
    """A fault-class exception raised by the instruction; nothing of the instruction took effect.

    ``error_code`` is None for vectors that push none. ``address`` is the faulting linear address of a page fault (the
    new CR2), None otherwise. ``debug`` is the set of DR6 bits a debug exception reports, in the DR6 layout.
    ``shadow_stack_busy``: a supervisor's shadow stack was marked busy for a transfer that did not come about.
    """

    vector: Vector
    error_code: int | None = None
    address: int | None = None
    debug: int = 0
    shadow_stack_busy: bool = field(default=False, eq=False)

    def __str__(self) -> str:
        code = "" if self.error_code is None else f"({self.error_code:#x})"
        where = "" if self.address is None else f" at {self.address:#x}"
        return f"#{self.vector.name}{code}{where}"


@frozen
class Exited:
    """Something else, a VM exit for example, took the place of what was about to happen; nothing is left to commit."""


class InstructionAborted(Exception):  # noqa: N818 - not an error: the control transfer of a faulting access
    """Unwinds a handler whose memory access cannot complete; ``cause`` is the outcome to commit instead."""

    def __init__(self, cause: object) -> None:
        super().__init__(cause)
        self.cause = cause


class NotModelled(Exception):  # noqa: N818 - the architecture is fine, the model ends here
    """The guest needs something this model does not have; ``what`` names it in the manual's words."""

    def __init__(self, what: str) -> None:
        super().__init__(f"not modelled: {what}")
        self.what = what


def gp(error_code: int = 0) -> InstructionAborted:
    """A general-protection fault, ready to raise."""
    return InstructionAborted(Fault(Vector.GP, error_code))


def ud() -> InstructionAborted:
    """An invalid-opcode fault, ready to raise."""
    return InstructionAborted(Fault(Vector.UD))
