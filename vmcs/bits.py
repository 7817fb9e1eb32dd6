"""Bits, slices and layouts: the vocabulary in which every table of this package is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from attrs import field, frozen

MASK16: Final = (1 << 16) - 1
MASK32: Final = (1 << 32) - 1
MASK64: Final = (1 << 64) - 1


def mask(width: int) -> int:
    """The ``width`` lowest bits, set."""
    return (1 << width) - 1


def bit_range(high: int, low: int) -> int:
    """A mask of bits ``high`` to ``low``, both included, in the manual's order."""
    return mask(high - low + 1) << low


def is_aligned(value: int, alignment: int) -> bool:
    """Whether ``value`` is a multiple of ``alignment``, a power of two."""
    return not value & (alignment - 1)


def is_canonical(address: int, width: int) -> bool:
    """Whether bits 63 to ``width`` of a 64-bit linear address all equal bit ``width`` - 1 (``width`` is 48 or 57).

    Spec: SDM Vol. 1, "Canonical Addressing".
    """
    return address >> (width - 1) in (0, (1 << (65 - width)) - 1)


def canonicalize(address: int, width: int) -> int:
    """The canonical 64-bit address that shares the low ``width`` bits of ``address``."""
    low = address & mask(width)
    return low | (MASK64 & ~mask(width)) if low >> (width - 1) else low


def bit_numbers(value: int) -> list[int]:
    """Positions of the set bits of ``value``, lowest first."""
    return [number for number in range(value.bit_length()) if value >> number & 1]


def describe_bits(value: int) -> str:
    """The set bits of ``value`` as the manual would list them: ``bits 31:12, 7 and 0``; empty without any."""
    runs: list[str] = []
    numbers = bit_numbers(value)
    while numbers:
        high = low = numbers.pop()
        while numbers and numbers[-1] == low - 1:
            low = numbers.pop()
        runs.append(f"{high}:{low}" if high != low else f"{high}")
    if not runs:
        return ""
    noun = "bits" if value & (value - 1) else "bit"
    return f"{noun} " + (" and ".join([", ".join(runs[:-1]), runs[-1]]) if len(runs) > 1 else runs[0])


@frozen
class Slice:
    """Bits ``low`` to ``low + width - 1`` of a value; ``values`` names the meanings of an enumerated slice."""

    name: str
    low: int
    width: int = 1
    values: Mapping[int, str] = field(factory=dict, eq=False)

    @property
    def mask(self) -> int:
        """The slice's bits in place."""
        return mask(self.width) << self.low

    def get(self, value: int) -> int:
        """The slice of ``value``, shifted down."""
        return value >> self.low & mask(self.width)

    def put(self, part: int) -> int:
        """``part`` shifted into place; ValueError when it does not fit."""
        if not 0 <= part <= mask(self.width):
            raise ValueError(f"{self.name} is {self.width} bits wide, {part:#x} does not fit")
        return part << self.low


@frozen
class Layout:
    """A named division of a ``width``-bit value into slices; what no slice covers is reserved."""

    name: str
    width: int
    slices: tuple[Slice, ...]
    by_name: Mapping[str, Slice] = field(init=False, eq=False, repr=False)
    defined: int = field(init=False, eq=False, repr=False)
    reserved: int = field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        defined = 0
        for part in self.slices:
            if part.mask & defined or part.mask >> self.width:
                raise ValueError(f"{self.name}: {part.name} overlaps another slice or lies outside the value")
            defined |= part.mask
        object.__setattr__(self, "by_name", {part.name: part for part in self.slices})
        object.__setattr__(self, "defined", defined)
        object.__setattr__(self, "reserved", mask(self.width) & ~defined)

    def decode(self, value: int) -> dict[str, int]:
        """Every slice of ``value`` by name, in the order of the table; reserved bits are ignored."""
        return {part.name: part.get(value) for part in self.slices}

    def encode(self, parts: Mapping[str, int] | None = None, /, **more: int) -> int:
        """The value with the given slices; the rest, reserved bits included, is zero.

        KeyError for an unknown slice, ValueError for a part that does not fit.
        """
        value = 0
        for source in (parts or {}, more):
            for name, part in source.items():
                value |= self.by_name[name].put(part)
        return value

    def get(self, value: int, name: str) -> int:
        """One slice of ``value``."""
        return self.by_name[name].get(value)

    def describe(self, value: int) -> str:
        """``value`` in words: the slices that are not zero, enumerated ones by meaning, then reserved bits if set."""
        words: list[str] = []
        for part in self.slices:
            number = part.get(value)
            if part.values:
                words.append(f"{part.name}={part.values.get(number, f'reserved {number:#x}')}")
            elif number and part.width == 1:
                words.append(part.name)
            elif number:
                words.append(f"{part.name}={number:#x}")
        if value & self.reserved:
            words.append(f"reserved {describe_bits(value & self.reserved)}")
        return ", ".join(words) or "0"


def flags(names: Iterable[tuple[int, str]]) -> tuple[Slice, ...]:
    """One-bit slices from (bit, name) pairs."""
    return tuple(Slice(name, number) for number, name in names)
