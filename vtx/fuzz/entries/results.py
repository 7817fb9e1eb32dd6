"""How a VM entry ended, as the bundled guest ``entries`` reports it."""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vmcs.exits import BY_NUMBER, InstructionError

_ENTRY_FAILURE: Final = 1 << 31
_VALID: Final = 1 << 31


@frozen
class Result:
    """How a VM entry ended.

    ``kind`` is ``invalid`` (VMfailInvalid), ``valid`` (VMfailValid; ``number`` is the error), ``exit`` (``number`` is
    the exit reason with its bit 31) or ``nothing``: no answer, the harness was not heard of again. Event information
    that is not valid, or not written, is 0.
    """

    kind: str
    number: int = 0
    qualification: int = 0
    interruption: int = 0
    vectoring: int = 0

    @property
    def entry_failure(self) -> bool:
        """Whether the VM entry failed after its checks of controls and host state."""
        return self.kind == "exit" and bool(self.number & _ENTRY_FAILURE)

    @property
    def name(self) -> str:
        """Kind and number in words."""
        if self.kind == "valid":
            return f"VMfailValid({self.number})"
        if self.kind == "exit":
            reason = BY_NUMBER.get(self.number & 0xFFFF)
            name = reason.name if reason else f"reason {self.number & 0xFFFF}"
            return f"entry fails: {name}" if self.entry_failure else f"exit: {name}"
        return "VMfailInvalid" if self.kind == "invalid" else "no answer"

    def __str__(self) -> str:
        if self.kind == "valid":
            return f"{self.name} {_error(self.number)}"
        if self.kind != "exit":
            return self.name
        text = f"{self.name} ({self.number & 0xFFFF}), qualification {self.qualification:#x}"
        if self.interruption:
            text += f", interruption information {self.interruption:#x}"
        return text + (f", IDT-vectoring information {self.vectoring:#x}" if self.vectoring else "")


def _error(number: int) -> str:
    try:
        return InstructionError(number).name.lower().replace("_", " ")
    except ValueError:
        return "unknown error"


NO_ANSWER: Final = Result("nothing")


def result_of(kind: str, numbers: list[int]) -> Result:
    """The result that a line says."""
    if kind != "exit":
        return Result(kind, *numbers)
    reason, qualification, interruption, vectoring = numbers
    if reason & _ENTRY_FAILURE:
        return Result(kind, reason, qualification)
    interruption, vectoring = (each if each & _VALID else 0 for each in (interruption, vectoring))
    return Result(kind, reason, qualification, interruption, vectoring)
