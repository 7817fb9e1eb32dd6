"""What would have been legal, in words: the sets of values that demands accept.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vmcs.bits import bit_range, describe_bits, mask
from vmcs.fields import Field

_LONGEST_LIST: Final = 8


def zeros(field: Field, bits: int) -> str:
    """These bits of the field are 0."""
    return _all_equal(field, bits, 0)


def ones(field: Field, bits: int) -> str:
    """These bits of the field are 1."""
    return _all_equal(field, bits, 1)


def fixed(field: Field, must_be_1: int, may_be_1: int) -> str:
    """Bits fixed to 1 and bits fixed to 0."""
    parts = [ones(field, must_be_1) if must_be_1 else "", zeros(field, field.mask & ~may_be_1)]
    return "; ".join(filter(None, parts))


def canonical(field: Field, width: int) -> str:
    """A canonical address of ``width`` bits."""
    return f"{field.name} is at most {mask(width - 1):#x}, or at least {bit_range(63, width - 1):#x}"


def one_of(field: Field, bits: int, values: Iterable[int]) -> str:
    """The masked field is one of ``values``; long runs of numbers are shortened."""
    numbers = sorted(values)
    what = field.name if bits == field.mask else f"{describe_bits(bits)} of {field.name}"
    shift = (bits & -bits).bit_length() - 1
    shown = [f"{number >> shift:#x}" for number in numbers]
    if len(shown) == 1:
        return f"{what} is {shown[0]}" if bits == field.mask or not bits & (bits - 1) else f"{what} are {shown[0]}"
    if len(shown) > _LONGEST_LIST and numbers[-1] - numbers[0] == (len(numbers) - 1) << shift:
        return f"{what}: {shown[0]} to {shown[-1]}"
    return f"{what}: " + ", ".join(shown[:-1]) + f" or {shown[-1]}"


def _all_equal(field: Field, bits: int, value: int) -> str:
    bits &= field.mask
    if not bits:
        return ""
    if bits == field.mask and not value:
        return f"{field.name} is 0"
    verb = "are" if bits & (bits - 1) else "is"
    return f"{describe_bits(bits)} of {field.name} {verb} {value}"
