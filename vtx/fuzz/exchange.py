"""What a bundled guest that runs states reads and prints: the module with the states, and a line for each of them.

The format is described in ``guests/entries/README.md`` and ``guests/vmruns/README.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from attrs import field, frozen

from vtx.fuzz.drawing import Deltas, State

LAST_LINE: Final = "end"

R = TypeVar("R")


@frozen
class Format:
    """How a guest wants its states.

    ``magic`` is the first word of the module; ``place`` gives the word that names the field of an encoding; pieces of
    memory at the addresses ``watched`` are to be compared afterwards, None for a guest that does not compare.
    """

    magic: bytes
    place: Callable[[int], int]
    watched: frozenset[int] | None = None

    def module(
        self,
        memory: Mapping[int, bytes],
        bases: Iterable[Iterable[tuple[int, int]]],
        states: Sequence[State],
        first: int = 0,
    ) -> bytes:
        """The module for ``states``, of which the first has the number ``first``.

        ``memory`` maps addresses to bytes; each base is (encoding, value) of its fields.
        """
        parts = [self.magic, _words(len(memory))]
        for address, data in memory.items():
            parts += [_words(address, len(data), *self._flags(address)), data]
        lists = [self._pairs(base) for base in bases]
        parts += [_words(first, len(lists)), *lists, _words(len(states))]
        for state in states:
            parts += [_words(state.base), self._pairs(state.deltas)]
        return b"".join(parts)

    def _flags(self, address: int) -> tuple[int, ...]:
        return () if self.watched is None else (int(address in self.watched),)

    def _pairs(self, pairs: Iterable[tuple[int, int]]) -> bytes:
        flat = [word for encoding, value in pairs for word in (self.place(encoding), value)]
        return _words(len(flat) // 2, *flat)


def size_of(deltas: Deltas) -> int:
    """How many bytes a state with these changes takes."""
    return 16 * (len(deltas) + 1)


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


@frozen
class Report(Generic[R]):
    """What one run printed: the processor, results by number of the state, and whether it came to its end."""

    processor: Mapping[str, int]
    results: Mapping[int, R]
    complete: bool
    complaint: str = field(default="")


def parse(text: str, result: Callable[[str, list[int]], R]) -> Report[R]:
    """The report in the serial output ``text``; a last line that was cut off is left out.

    ``result`` makes a result of the second word of a line and the numbers that follow.
    """
    processor: dict[str, int] = {}
    results: dict[int, R] = {}
    complete, complaint = False, ""
    for line in text.split("\n")[:-1]:
        words = line.split()
        if words[:1] == ["msr"]:
            processor[f"MSR {words[1]}"] = int(words[2], 16)
        elif words[:1] == ["cpuid"]:
            for name, value in zip(("EAX", "EBX", "ECX", "EDX"), words[2:], strict=True):
                processor[f"CPUID {words[1]} {name}"] = int(value, 16)
        elif words[:1] == ["widths"]:
            processor["address widths"] = int(words[1], 16)
        elif words[:1] == [LAST_LINE]:
            complete = True
        elif words and words[0].isdecimal():
            results[int(words[0])] = result(words[1], [int(word, 16) for word in words[2:]])
        elif words:
            complaint = line.strip()
    return Report(processor, results, complete, complaint)
