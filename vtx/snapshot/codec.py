"""Records as JSON values and back, directed by their types: only what the types allow is ever built.

Records become objects, mappings lists of pairs (order counts, and keys need not be text), bytes base64, members of
enumerations their values. `shape` is the structure of a type as text: files are only read by a program whose types have
the same shape.
"""

from __future__ import annotations

import base64
import binascii
import collections.abc
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import attrs

_ATOMS = (bool, int, str)
_SEQUENCES = (list, tuple, set, frozenset)
_MAPPINGS = (dict, Mapping, collections.abc.Mapping)


class CodecError(ValueError):
    """A JSON value is not what its type asks for."""


def encode(value: Any) -> Any:
    """``value`` as something `json.dumps` takes. TypeError for what no type of a snapshot may contain."""
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, _ATOMS):
        return value
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return [[encode(key), encode(each)] for key, each in value.items()]
    if isinstance(value, set | frozenset):
        return [encode(each) for each in sorted(value)]
    if isinstance(value, list | tuple):
        return [encode(each) for each in value]
    if attrs.has(type(value)):
        return {each.name: encode(getattr(value, each.name)) for each in attrs.fields(type(value))}
    raise TypeError(f"a snapshot cannot hold {value!r}")


def decode(kind: Any, value: Any) -> Any:
    """The value of type ``kind`` that `encode` made ``value`` from; `CodecError` if it cannot have."""
    try:
        return _decoder(kind)(value)
    except (TypeError, ValueError, KeyError, binascii.Error) as error:
        raise CodecError(f"not a {kind}: {error}") from None


def shape(kind: Any) -> str:
    """The structure of ``kind`` down to its atoms: names and types of the fields of all records."""
    return _shape(kind, set())


def _expect(kind: type) -> Any:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise CodecError(f"{value!r} is not of type {kind.__name__}")
        return value

    return check


def _bytes(kind: type) -> Any:
    return lambda value: kind(base64.b64decode(_expect(str)(value), validate=True))


@functools.cache
def _decoder(kind: Any) -> Any:
    """The function that decodes values of ``kind``."""
    kind = _plain(kind)
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in _ATOMS or kind is type(None):
        return _expect(kind)
    if origin in (bytes, bytearray):
        return _bytes(origin)
    if origin in (typing.Union, types.UnionType):
        return _optional(arguments)
    if origin in _MAPPINGS:
        key, each = (_decoder(argument) for argument in arguments)
        return lambda value: {key(pair[0]): each(pair[1]) for pair in map(_pair, _expect(list)(value))}
    if origin is tuple and arguments[-1] is not ...:
        return _fixed_tuple(tuple(map(_decoder, arguments)), tuple)
    if origin in _SEQUENCES:
        each = _decoder(arguments[0])
        return lambda value: origin(map(each, _expect(list)(value)))
    if issubclass(kind, enum.Enum):
        return kind
    if issubclass(kind, tuple):
        hints = typing.get_type_hints(kind)
        return _fixed_tuple(tuple(map(_decoder, hints.values())), lambda values: kind(*values))
    return _record(kind)


def _plain(kind: Any) -> Any:
    """The type behind a ``NewType``."""
    return getattr(kind, "__supertype__", kind)


def _pair(value: Any) -> Any:
    if len(_expect(list)(value)) != 2:
        raise CodecError(f"{value!r} is not a pair")
    return value


def _optional(arguments: tuple[Any, ...]) -> Any:
    (something,) = (_decoder(argument) for argument in arguments if argument is not type(None))
    return lambda value: None if value is None else something(value)


def _fixed_tuple(decoders: tuple[Any, ...], build: Any) -> Any:
    def decode_tuple(value: Any) -> Any:
        if len(_expect(list)(value)) != len(decoders):
            raise CodecError(f"{value!r} does not have {len(decoders)} parts")
        return build(decoder(each) for decoder, each in zip(decoders, value, strict=True))

    return decode_tuple


def _record(kind: Any) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {each.name: _decoder(hints[each.name]) for each in attrs.fields(kind)}

    def decode_record(value: Any) -> Any:
        if _expect(dict)(value).keys() != fields.keys():
            raise CodecError(f"the fields of {kind.__name__} are {', '.join(fields)}")
        record = kind.__new__(kind)
        for name, decoder in fields.items():
            object.__setattr__(record, name, decoder(value[name]))
        return record

    return decode_record


def _shape(kind: Any, seen: set[Any]) -> str:
    kind = _plain(kind)
    name = getattr(typing.get_origin(kind) or kind, "__name__", str(kind))
    arguments = typing.get_args(kind)
    if arguments:
        parts = ", ".join("..." if argument is ... else _shape(argument, seen) for argument in arguments)
        return f"{name}[{parts}]"
    if kind in seen or not (attrs.has(kind) or hasattr(kind, "_fields")):
        return name
    seen.add(kind)
    hints = typing.get_type_hints(kind)
    names = [each.name for each in attrs.fields(kind)] if attrs.has(kind) else kind._fields
    return f"{name}({', '.join(f'{each}: {_shape(hints[each], seen)}' for each in names)})"
