"""What the bundled guest ``entries`` reads and prints: the module with the states, and a line for each of them.

The format is described in ``guests/entries/README.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attrs import field, frozen

from vmcs.exits import BY_NUMBER, InstructionError
from vmcs.fields import Field
from vtx.fuzz.states import State

_MAGIC: Final = b"VMCSTTES"
_ENTRY_FAILURE: Final = 1 << 31
_VALID: Final = 1 << 31
LAST_LINE: Final = "end"


def module(
    memory: Mapping[int, bytes], bases: Sequence[Mapping[Field, int]], states: Sequence[State], first: int = 0
) -> bytes:
    """The module for ``states``, of which the first has the number ``first``; ``memory`` maps addresses to bytes."""
    parts = [_MAGIC, _words(len(memory))]
    for address, data in memory.items():
        parts += [_words(address, len(data)), data]
    parts.append(_words(first, len(bases)))
    parts += [_pairs((each.encoding, value) for each, value in base.items()) for base in bases]
    parts.append(_words(len(states)))
    for state in states:
        parts += [_words(state.base), _pairs(state.deltas)]
    return b"".join(parts)


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def _pairs(pairs: Iterable[tuple[int, int]]) -> bytes:
    flat = [word for pair in pairs for word in pair]
    return _words(len(flat) // 2, *flat)


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


@frozen
class Report:
    """What one run printed: the processor, results by number of the state, and whether it came to its end."""

    processor: Mapping[str, int]
    results: Mapping[int, Result]
    complete: bool
    complaint: str = field(default="")


def parse(text: str) -> Report:
    """The report in the serial output ``text``; a last line that was cut off is left out."""
    processor: dict[str, int] = {}
    results: dict[int, Result] = {}
    complete, complaint = False, ""
    for line in text.split("\n")[:-1]:
        words = line.split()
        if words[:1] == ["msr"]:
            processor[f"MSR {words[1]}"] = int(words[2], 16)
        elif words[:1] == ["widths"]:
            processor["address widths"] = int(words[1], 16)
        elif words[:1] == [LAST_LINE]:
            complete = True
        elif words and words[0].isdecimal():
            results[int(words[0])] = _result(words[1], [int(word, 16) for word in words[2:]])
        elif words:
            complaint = line.strip()
    return Report(processor, results, complete, complaint)


def _result(kind: str, numbers: list[int]) -> Result:
    if kind != "exit":
        return Result(kind, *numbers)
    reason, qualification, interruption, vectoring = numbers
    if reason & _ENTRY_FAILURE:
        return Result(kind, reason, qualification)
    interruption, vectoring = (each if each & _VALID else 0 for each in (interruption, vectoring))
    return Result(kind, reason, qualification, interruption, vectoring)
