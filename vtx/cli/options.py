"""Option values of the commands that click has no type for."""

from __future__ import annotations

import math
import re
from typing import Final

import click

_UNITS: Final = {"": 20, "k": 10, "m": 20, "g": 30}
_SMALLEST: Final = 1 << 20
_LARGEST: Final = 1 << 40
_PAGE: Final = 4096


def memory_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """A size of memory in bytes: ``64`` and ``64M`` are MiB, ``2G`` is GiB, ``512K`` KiB; else `click.BadParameter`."""
    match = re.fullmatch(r"([0-9]{1,15})([kmg]?)(?:i?b)?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size such as 64M or 2G", ctx, param)
    size = int(match[1]) << _UNITS[match[2]]
    if not _SMALLEST <= size <= _LARGEST or size % _PAGE:
        raise click.BadParameter(f"{value!r} is not between 1M and 1024G in steps of 4K", ctx, param)
    return size


def wall_time(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A number of seconds above zero; `click.BadParameter` for what is no amount of time."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise click.BadParameter(f"{value} is not a number of seconds above 0", ctx, param)
    return value
