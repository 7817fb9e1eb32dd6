"""A VMCS as JSON, with as much of the processor around it as VM entry looks at.

An object with these members, all optional:

``fields``
    field names as in the manual, or encodings, with values; fields left out are 0.
``launch state``
    ``clear`` (if left out) or ``launched``.
``instruction``
    ``VMLAUNCH`` or ``VMRESUME``; if left out, the one that fits the launch state.
``VMCS address``, ``shadow VMCS``
    where the region is (if left out, where no pointer of the VMCS points), and whether it is a shadow VMCS.
``IA-32e mode``, ``blocking by MOV SS``
    of the processor that executes the instruction: true and false if left out.
``about``
    words for the reader.
``memory``
    physical addresses with 64-bit values: all that is known of memory.

Numbers are JSON numbers, or strings as Python and C write them (``0x2000``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Final, TypeVar

from attrs import field as attribute
from attrs import frozen

from vmcs.bits import MASK64
from vmcs.capabilities import Capabilities
from vmcs.fields import BY_ENCODING, FIELDS, Field
from vmcs.region import LaunchState, Vmcs

_BY_NAME: Final[Mapping[str, Field]] = {each.name.lower(): each for each in FIELDS}
_LAUNCH_STATES: Final = {"clear": LaunchState.CLEAR, "launched": LaunchState.LAUNCHED}
_WORD: Final = 8  # bytes of a value in memory

T = TypeVar("T")


class DocumentError(ValueError):
    """A document that cannot be understood; the message is one line."""


@frozen(eq=False)
class VmcsDocument:
    """A VMCS and its surroundings; ``memory`` maps physical addresses to the bytes known there."""

    vmcs: Vmcs
    launching: bool = True
    vmcs_address: int = MASK64
    ia32e_mode: bool = True
    blocking_by_mov_ss: bool = False
    memory: Mapping[int, int] = attribute(factory=dict)

    @property
    def instruction(self) -> str:
        """The instruction that enters."""
        return "VMLAUNCH" if self.launching else "VMRESUME"


def parse(text: bytes | str, capabilities: Capabilities) -> VmcsDocument:
    """The document in ``text`` for a processor of these ``capabilities``; DocumentError for anything wrong with it."""
    try:
        members = json.loads(text, object_pairs_hook=_no_duplicates)
    except DocumentError:
        raise
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"not JSON: {error}") from None
    if not isinstance(members, dict):
        raise DocumentError("not a JSON object")
    if unknown := sorted(set(members) - set(_MEMBERS)):
        raise DocumentError(f"unknown member {unknown[0]!r}{_hint(unknown[0], _MEMBERS)}")
    vmcs = Vmcs(capabilities)
    for name, value in _object("fields", members.get("fields", {})).items():
        field = _field(name, capabilities)
        vmcs[field] = _number(name, value, field.mask)
    vmcs.launch_state = _take(members, "launch state", _one_of(_LAUNCH_STATES), LaunchState.CLEAR)
    vmcs.shadow = _take(members, "shadow VMCS", _flag, False)
    _take(members, "about", _words, "")
    memory: dict[int, int] = {}
    for address, value in _object("memory", members.get("memory", {})).items():
        start = _number("address in memory", address, MASK64)
        data = _number(f"memory at {address}", value, MASK64).to_bytes(_WORD, "little")
        memory.update(enumerate(data, start))
    return VmcsDocument(
        vmcs,
        _take(
            members,
            "instruction",
            _one_of({"VMLAUNCH": True, "VMRESUME": False}),
            vmcs.launch_state is LaunchState.CLEAR,
        ),
        _take(members, "VMCS address", lambda name, value: _number(name, value, MASK64), MASK64),
        _take(members, "IA-32e mode", _flag, True),
        _take(members, "blocking by MOV SS", _flag, False),
        memory,
    )


def from_region(image: bytes, capabilities: Capabilities) -> VmcsDocument:
    """The VMCS in a region as VMCLEAR leaves it; DocumentError if this processor would not load it."""
    needed = capabilities.region_size
    if len(image) < needed:
        raise DocumentError(f"neither a JSON object nor a VMCS region: {len(image)} bytes, a region has {needed}")
    revision = int.from_bytes(image[:4], "little") & (1 << 31) - 1
    if revision != capabilities.revision_identifier:
        raise DocumentError(
            f"VMCS revision identifier {revision:#x} is not this processor's, {capabilities.revision_identifier:#x}"
        )
    vmcs = Vmcs.from_image(image[:needed], capabilities)
    return VmcsDocument(vmcs, vmcs.launch_state is LaunchState.CLEAR)


def to_json(vmcs: Vmcs) -> str:
    """A document for ``vmcs``, one field a line; fields that are 0 among them, but none that software cannot write."""
    fields = {each.name: f"{vmcs[each]:#x}" for each in FIELDS if vmcs.capabilities.has(each) and not each.read_only}
    state = vmcs.launch_state.name.lower()
    return json.dumps({"launch state": state, "IA-32e mode": True, "fields": fields}, indent=2)


def _field(name: str, capabilities: Capabilities) -> Field:
    field = _BY_NAME.get(name.lower())
    if field is None:
        try:
            field = BY_ENCODING[int(name, 0)]
        except (ValueError, KeyError):
            raise DocumentError(f"no VMCS field is called {name!r}{_hint(name, [f.name for f in FIELDS])}") from None
    if not capabilities.has(field):
        raise DocumentError(f"this processor has no field {field.name!r}; it exists on {field.exists}")
    return field


def _hint(name: str, known: Mapping[str, object] | list[str]) -> str:
    close = get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _number(name: str, value: object, largest: int) -> int:
    number = value
    if isinstance(value, str):
        try:
            number = int(value, 0)
        except ValueError:
            raise DocumentError(f"{name}: {value[:40]!r} is not a number") from None
    if not isinstance(number, int) or isinstance(number, bool):
        raise DocumentError(f"{name}: expected a number such as 0x2000")
    if not 0 <= number <= largest:
        raise DocumentError(f"{name}: not a number of {largest.bit_length()} bits")
    return number


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise DocumentError(f"{name}: expected true or false")
    return value


def _words(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DocumentError(f"{name}: expected a string")
    return value


def _object(name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DocumentError(f"{name}: expected an object")
    return value


def _one_of(choices: Mapping[str, T]) -> Callable[[str, object], T]:
    def convert(name: str, value: object) -> T:
        if not isinstance(value, str) or value not in choices:
            raise DocumentError(f"{name}: expected " + " or ".join(choices))
        return choices[value]

    return convert


def _take(members: Mapping[str, object], name: str, convert: Callable[[str, object], T], default: T) -> T:
    return convert(name, members[name]) if name in members else default


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise DocumentError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return result


_MEMBERS: Final[Mapping[str, None]] = dict.fromkeys(
    (
        "fields",
        "launch state",
        "instruction",
        "VMCS address",
        "shadow VMCS",
        "IA-32e mode",
        "blocking by MOV SS",
        "memory",
        "about",
    )
)
