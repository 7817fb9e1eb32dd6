"""Records that cross the border between Python and SystemVerilog, declared once as attrs classes.

An attribute made with `bits` is a packed member of ``width`` bits, one made with `lanes` is ``count`` equal members
(lane 0 in the least significant bits), one made with `nested` is another record. The first attribute is the most
significant, as in a SystemVerilog packed struct.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import attrs

Record = TypeVar("Record")


def bits(width: int, text: str) -> Any:
    """A member of ``width`` bits, zero by default; ``text`` becomes the comment in the package."""
    return attrs.field(default=0, metadata={"width": width, "text": text})


def lanes(count: int, width: int, text: str) -> Any:
    """``count`` members of ``width`` bits, a tuple in Python; lane 0 is least significant."""
    return attrs.field(default=(0,) * count, metadata={"width": width, "lanes": count, "text": text})


def nested(record: type, text: str) -> Any:
    """A member that is itself a record."""
    return attrs.field(factory=record, metadata={"record": record, "text": text})


@cache
def width(record: type) -> int:
    """Bits of the packed form of ``record``."""
    return sum(_member_width(member) for member in attrs.fields(record))


def _member_width(member: attrs.Attribute[Any]) -> int:
    if "record" in member.metadata:
        return width(member.metadata["record"])
    return int(member.metadata["width"]) * int(member.metadata.get("lanes", 1))


@cache
def _plan(record: type) -> tuple[tuple[str, int, int, int, type | None], ...]:
    """Per member: name, total width, lane width, number of lanes (0: plain), nested record."""
    return tuple(
        (
            member.name,
            _member_width(member),
            member.metadata.get("width", 0),
            member.metadata.get("lanes", 0),
            member.metadata.get("record"),
        )
        for member in attrs.fields(record)
    )


def pack(record: object) -> int:
    """The packed form of ``record``. ValueError names a member whose value does not fit."""
    packed = 0
    for name, total, lane_width, lane_count, inner in _plan(type(record)):
        value = getattr(record, name)
        if inner is not None:
            value = pack(value)
        elif lane_count:
            joined = 0
            for lane in reversed(value):
                if lane >> lane_width:
                    raise ValueError(f"{type(record).__name__}.{name}: {lane:#x} does not fit in {lane_width} bits")
                joined = joined << lane_width | lane
            value = joined
        if value >> total:
            raise ValueError(f"{type(record).__name__}.{name}: {value:#x} does not fit in {total} bits")
        packed = packed << total | value
    return packed


def unpack(record: type[Record], packed: int) -> Record:
    """The ``record`` whose packed form is ``packed``; members are plain integers, lanes are tuples."""
    position = width(record)
    values: dict[str, Any] = {}
    for name, total, lane_width, lane_count, inner in _plan(record):
        position -= total
        value = packed >> position & (1 << total) - 1
        if inner is not None:
            values[name] = unpack(inner, value)
        elif lane_count:
            mask = (1 << lane_width) - 1
            values[name] = tuple(value >> lane * lane_width & mask for lane in range(lane_count))
        else:
            values[name] = value
    return record(**values)


def struct_declaration(record: type, type_name: str, type_names: dict[type, str]) -> str:
    """The SystemVerilog packed struct of ``record``; ``type_names`` names the records nested in it."""
    lines = ["  typedef struct packed {"]
    for member in attrs.fields(record):
        inner = member.metadata.get("record")
        size = _member_width(member)
        kind = type_names[inner] if inner else "logic" if size == 1 else f"logic [{size - 1}:0]"
        count = member.metadata.get("lanes", 0)
        detail = f", {count} lanes of {member.metadata['width']}" if count else ""
        lines.append(f"    {kind} {member.name};  // {member.metadata['text']}{detail}")
    lines.append(f"  }} {type_name};")
    return "\n".join(lines)
