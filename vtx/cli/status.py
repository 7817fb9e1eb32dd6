"""Exit statuses of ``vtx run``.

A run that the guest ended gives the guest's own value. The other statuses are those that the shell, timeout(1) and
container tools use for the same situations.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Final

CANNOT_START: Final = 2
INTERNAL_ERROR: Final = 70
LIMIT_REACHED: Final = 124
GUEST_DIED: Final = 125
INTERRUPTED: Final = 130
TERMINATED: Final = 143
OUTPUT_CLOSED: Final = 141

_BYTE: Final = 0xFF


class ExitConvention(enum.Enum):
    """How the value that the guest wrote becomes the status of the process."""

    VALUE = "value"
    QEMU = "qemu"


def _by_value(value: int) -> int:
    # A process has eight bits for its status; what the guest calls a failure must not come out as a pass.
    return value & _BYTE or (_BYTE if value else 0)


def _by_qemu(value: int) -> int:
    return (value << 1 | 1) & _BYTE


_CONVENTIONS: Final[Mapping[ExitConvention, Callable[[int], int]]] = {
    ExitConvention.VALUE: _by_value,
    ExitConvention.QEMU: _by_qemu,
}


def guest_status(value: int, convention: ExitConvention) -> int:
    """The status for a guest that wrote ``value`` (32 bits) to the debug-exit port.

    By value: its low 8 bits, but 255 for a value other than 0 whose low 8 bits are 0. As QEMU's isa-debug-exit: the
    low 8 bits of (value << 1) | 1.
    """
    return _CONVENTIONS[convention](value)
