"""General registers, RIP and RFLAGS between a saved context and the model.

Every trap needs them both ways, so there are two of these: `Transfer` in Python, and the compiled `_transfer`, which
does the same in a tenth of the time. A test holds them together.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, Protocol

from vtx.engine import layout, native
from vtx.x86.state import MASK32, Rflags

try:
    from vtx.engine import _transfer  # type: ignore[attr-defined, unused-ignore]
except ImportError:
    _transfer = None

_DF: Final = int(Rflags.DF)
_LAZY: Final = layout.ARITHMETIC_FLAGS | _DF
"""RFLAGS bits that are not in EFLAGS while the engine runs."""


class RegisterTransfer(Protocol):
    """What both do."""

    def save(self) -> None:
        """Take the state out of the processor into the context."""
        ...

    def restore(self) -> None:
        """Put the context into the processor."""
        ...

    def take(self, gprs: list[int]) -> tuple[int, int, int, int]:
        """Fill the 16 ``gprs`` from the context; RIP, RFLAGS, the hidden flags and the linear address of the code."""
        ...

    def give(self, gprs: list[int], rip: int, rflags: int) -> None:
        """Put GPRs, RIP and RFLAGS into the context, and it into the processor, in the middle of a run."""
        ...


class Transfer:
    """The one in Python, for the ``context`` of the engine ``handle`` with its contents in ``image``."""

    def __init__(self, handle: ctypes.c_void_p, context: ctypes.c_void_p, image: memoryview) -> None:
        self._handle, self._context, self._image = handle, context, image
        self._library: Any = native.library
        self._flags = ctypes.c_uint64()
        self._flags_pointer = ctypes.byref(self._flags)
        self._rflags = 0

    def save(self) -> None:
        """See `RegisterTransfer.save`."""
        self._library.uc_context_save(self._handle, self._context)

    def restore(self) -> None:
        """See `RegisterTransfer.restore`."""
        self._library.uc_context_restore(self._handle, self._context)

    def take(self, gprs: list[int]) -> tuple[int, int, int, int]:
        """See `RegisterTransfer.take`."""
        head = layout.HEAD.unpack_from(self._image, layout.GPR)
        gprs[:] = head[:16]
        rip, eager, _, carried, _, operation, direction, hidden, _, base = head[16:]
        if operation == layout.CC_OP_EFLAGS:
            rflags = eager & ~_LAZY | carried & layout.ARITHMETIC_FLAGS | direction & _DF
        else:
            self._library.uc_reg_read(self._handle, native.REG_EFLAGS, self._flags_pointer)
            rflags = self._flags.value
        self._rflags = rflags
        return rip, rflags, hidden, rip if hidden & layout.CODE64 else rip + base & MASK32

    def give(self, gprs: list[int], rip: int, rflags: int) -> None:
        """See `RegisterTransfer.give`."""
        layout.REGISTERS.pack_into(self._image, layout.GPR, *gprs, rip)
        if rflags != self._rflags:
            # Nothing derives the lazy flags from EFLAGS in the middle of a run.
            eager, arithmetic = rflags & ~_LAZY | 2, rflags & layout.ARITHMETIC_FLAGS
            layout.LAZY_FLAGS.pack_into(
                self._image, layout.EFLAGS, eager, 0, arithmetic, 0, layout.CC_OP_EFLAGS, -1 if rflags & _DF else 1
            )
        self.restore()


def register_transfer(
    handle: ctypes.c_void_p, context: ctypes.c_void_p, image: memoryview, *, allow_compiled: bool
) -> RegisterTransfer:
    """The compiled transfer if it is there and allowed, else the one in Python."""
    if _transfer is None or not allow_compiled:
        return Transfer(handle, context, image)
    library: Any = native.library
    functions = (library.uc_context_save, library.uc_context_restore, library.uc_reg_read)
    addresses = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    compiled: RegisterTransfer = _transfer.Transfer(
        handle.value, context.value, layout.STATE, *addresses, native.REG_EFLAGS
    )
    return compiled
