"""Events as JSON objects and back: one table, a row per kind of event, in the order in which a line lists the fields.

Addresses, register values and everything else one reads in hexadecimal are strings such as ``"0x1020f1"``, for JSON's
numbers end at 2**53; counts, vectors and reasons are numbers. A field that is None is left out of the line.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Final

from attrs import frozen

from vtx import events as e


@frozen
class Codec:
    """How one field becomes a JSON value and is read back; reading raises ValueError for anything else."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def _expect(kind: type) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        # JSON's true is not a number, though Python's True is one.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"expected {kind.__name__}, not {value!r}")
        return value

    return decode


def _from_hex(value: Any) -> int:
    text = _expect(str)(value)
    if not text.startswith("0x"):
        raise ValueError(f"expected a hexadecimal number, not {value!r}")
    return int(text, 16)


def _word(kind: type[enum.Enum]) -> Codec:
    return Codec(lambda member: member.value, kind)


def _records(kind: Callable[..., Any], fields: Mapping[str, Codec]) -> Codec:
    """A tuple of records."""
    one = _record(kind, fields)
    return Codec(
        lambda values: [one.encode(value) for value in values],
        lambda values: tuple(one.decode(value) for value in _expect(list)(values)),
    )


def _record(kind: Callable[..., Any], fields: Mapping[str, Codec]) -> Codec:
    return Codec(lambda value: encode_fields(value, fields), lambda value: decode_fields(kind, value, fields))


def encode_fields(record: Any, fields: Mapping[str, Codec]) -> dict[str, Any]:
    """The fields of ``record`` that are not None, in the order of the table."""
    values = ((name, getattr(record, name), codec) for name, codec in fields.items())
    return {name: codec.encode(value) for name, value, codec in values if value is not None}


def decode_fields(kind: Callable[..., Any], values: Any, fields: Mapping[str, Codec]) -> Any:
    """The record that `encode_fields` made ``values`` from; ValueError if it cannot have."""
    unknown = set(_expect(dict)(values)) - set(fields)
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    try:
        return kind(**{name: codec.decode(values[name]) for name, codec in fields.items() if name in values})
    except TypeError as error:
        raise ValueError(str(error)) from None


TEXT: Final = Codec(str, _expect(str))
NUMBER: Final = Codec(int, _expect(int))
FLAG: Final = Codec(bool, _expect(bool))
HEX: Final = Codec(lambda value: f"{value:#x}", _from_hex)
PARTS: Final = Codec(dict, _expect(dict))

_INTERRUPTION: Final = _record(e.Interruption, {"vector": NUMBER, "kind": TEXT, "error_code": HEX})
_STEPS: Final = _records(e.WalkStep, {"entry": TEXT, "address": HEX, "value": HEX})
_VALUES: Final = _records(e.FieldValue, {"field": TEXT, "value": HEX, "at_fault": HEX})
_VIOLATIONS: Final = _records(e.RuleViolation, {"rule": TEXT, "statement": TEXT, "citation": TEXT, "values": _VALUES})
_ACCESS: Final = _word(e.Access)
_STAMP: Final[Mapping[str, Codec]] = {"vcpu": NUMBER, "time": NUMBER}


def _event(**fields: Codec) -> Mapping[str, Codec]:
    return {**_STAMP, **fields}


FIELDS: Final[Mapping[type[e.TraceEvent], Mapping[str, Codec]]] = {
    e.InstructionIntercepted: _event(rip=HEX, mnemonic=TEXT, why=TEXT),
    e.ExceptionRaised: _event(rip=HEX, vector=NUMBER, error_code=HEX, address=HEX),
    e.EventDelivered: _event(vector=NUMBER, kind=TEXT, cs=HEX, rip=HEX, error_code=HEX),
    e.InterruptAccepted: _event(rip=HEX, vector=NUMBER),
    e.UserInterruptsRequested: _event(rip=HEX, requests=HEX),
    e.UserInterruptDelivered: _event(vector=NUMBER, rip=HEX),
    e.SmmEntered: _event(rip=HEX, smbase=HEX),
    e.SmmLeft: _event(rip=HEX),
    e.VmInstruction: _event(mnemonic=TEXT, outcome=TEXT),
    e.VmEntry: _event(vmcs=HEX, launch=FLAG, rip=HEX, cr3=HEX, rules_evaluated=NUMBER, injected=_INTERRUPTION),
    e.VmEntryFailed: _event(vmcs=HEX, outcome=TEXT, violations=_VIOLATIONS, detail=TEXT),
    e.VmExit: _event(
        vmcs=HEX,
        reason=NUMBER,
        reason_name=TEXT,
        qualification=HEX,
        decoded=PARTS,
        rip=HEX,
        host_rip=HEX,
        interruption=_INTERRUPTION,
        vectoring=_INTERRUPTION,
        instruction_length=NUMBER,
        instruction_information=HEX,
        guest_linear=HEX,
        guest_physical=HEX,
    ),
    e.Vmrun: _event(vmcb=HEX, asid=NUMBER, rip=HEX, cr3=HEX, nested=FLAG, injected=_INTERRUPTION),
    e.VmrunFailed: _event(vmcb=HEX, violations=_VIOLATIONS, detail=TEXT),
    e.VmcbChangedThoughClean: _event(vmcb=HEX, fields=_VALUES),
    e.Vmexit: _event(
        vmcb=HEX,
        code=HEX,
        code_name=TEXT,
        info1=HEX,
        info2=HEX,
        rip=HEX,
        host_rip=HEX,
        interrupted=_INTERRUPTION,
        next_rip=HEX,
    ),
    e.PageWalk: _event(
        linear=HEX, access=_ACCESS, steps=_STEPS, result=_word(e.WalkResult), physical=HEX, error_code=HEX
    ),
    e.SecondLevelFault: _event(kind=TEXT, guest_physical=HEX, linear=HEX),
    e.DeviceAccess: _event(
        device=TEXT, space=_word(e.AddressSpace), address=HEX, size=NUMBER, access=_ACCESS, value=HEX
    ),
    e.ControlRegisterWrite: _event(register=TEXT, old=HEX, new=HEX),
    e.MachineStopped: _event(reason=TEXT, message=TEXT, instructions=NUMBER, exit_value=HEX),
}

BY_NAME: Final[Mapping[str, type[e.TraceEvent]]] = {kind.name: kind for kind in FIELDS}


def to_json(event: e.TraceEvent) -> dict[str, Any]:
    """The JSON object of ``event``: its kind under ``event``, then its fields."""
    return {"event": event.name, **encode_fields(event, FIELDS[type(event)])}


def from_json(value: Any) -> e.TraceEvent:
    """The event of a JSON object; ValueError if it is none."""
    fields = dict(_expect(dict)(value))
    kind = BY_NAME.get(str(fields.pop("event", None)))
    if kind is None:
        raise ValueError("no known event")
    event: e.TraceEvent = decode_fields(kind, fields, FIELDS[kind])
    return event
