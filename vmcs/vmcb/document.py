"""A VMCB as JSON, with as much of the processor around it as VMRUN looks at.

An object with these members, all optional:

``fields``
    field names as in `vmcs.vmcb.fields`, with values; fields left out are 0.
``host paging``
    whether CR0.PG is 1 in the host: true if left out.
``about``
    words for the reader.

Numbers are JSON numbers, or strings as Python and C write them (``0x2000``).
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any, Final

from attrs import frozen

from vmcs.document import DocumentError
from vmcs.vmcb.fields import FIELDS, IMAGE, Vmcb, VmcbField
from vmcs.vmcb.intercepts import Exit

_BY_NAME: Final = {each.name.lower(): each for each in FIELDS}
_MEMBERS: Final = ("about", "fields", "host paging")

# A 64-bit guest at privilege level 0, without nested paging.
_TEMPLATE: Final = {
    "intercept vector 4": 1 << (Exit.VMRUN & 31),
    "guest ASID": 1,
    "ES selector": 0x10,
    "ES attributes": 0xC93,
    "ES limit": 0xFFFF_FFFF,
    "CS selector": 0x08,
    "CS attributes": 0x29B,
    "CS limit": 0xFFFF_FFFF,
    "SS selector": 0x10,
    "SS attributes": 0xC93,
    "SS limit": 0xFFFF_FFFF,
    "DS selector": 0x10,
    "DS attributes": 0xC93,
    "DS limit": 0xFFFF_FFFF,
    "EFER": 0x1D01,
    "CR4": 0x20,
    "CR3": 0x1000,
    "CR0": 0x8005_0033,
    "DR7": 0x400,
    "DR6": 0xFFFF_0FF0,
    "RFLAGS": 0x2,
    "RIP": 0x10_0000,
    "RSP": 0x20_0000,
    "G_PAT": 0x0007_0406_0007_0406,
}


@frozen(eq=False)
class VmcbDocument:
    """A VMCB, and whether the host that runs it has paging enabled."""

    vmcb: Vmcb
    host_paging: bool = True


def parse(text: bytes | str) -> VmcbDocument:
    """The document in ``text``; DocumentError, one line, for anything wrong with it."""
    try:
        members = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"not JSON: {error}") from None
    if not isinstance(members, dict):
        raise DocumentError("not a JSON object")
    for name in members:
        if name not in _MEMBERS:
            raise DocumentError(f"unknown member {name!r}; the members are {', '.join(_MEMBERS)}")
    fields, paging = members.get("fields", {}), members.get("host paging", True)
    if not isinstance(fields, dict):
        raise DocumentError("fields: not a JSON object")
    if not isinstance(paging, bool):
        raise DocumentError("host paging: neither true nor false")
    vmcb = Vmcb()
    for name, value in fields.items():
        field = _field(name)
        vmcb[field] = _number(field, value)
    return VmcbDocument(vmcb, paging)


def _field(name: str) -> VmcbField:
    field = _BY_NAME.get(name.lower())
    if field is None:
        close = get_close_matches(name.lower(), _BY_NAME, 1)
        raise DocumentError(
            f"unknown field {name!r}" + (f"; did you mean {_BY_NAME[close[0]].name!r}?" if close else "")
        )
    return field


def _number(field: VmcbField, value: Any) -> int:
    try:
        number = int(value, 0) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= field.mask:
        raise DocumentError(f"{field.name}: not a number of {8 * field.size} bits: {value!r}")
    return number


def from_image(image: bytes) -> VmcbDocument:
    """The VMCB that memory holds as ``image``; DocumentError if that is too short for one."""
    if len(image) < IMAGE.size:
        raise DocumentError(f"{len(image)} bytes are no VMCB, which has {IMAGE.size:#x} at least")
    return VmcbDocument(Vmcb.from_image(image))


def template() -> str:
    """A VMCB that VMRUN accepts, as JSON to start from."""
    fields = {name: f"{value:#x}" for name, value in _TEMPLATE.items()}
    return json.dumps({"fields": fields, "host paging": True}, indent=2)
