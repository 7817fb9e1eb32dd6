"""General registers, RIP and RFLAGS between a saved context and the model.

Every trap needs them both ways, so there are two of these: `Transfer` in Python, and the compiled `_transfer`, which
does the same in a tenth of the time. A test holds them together.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, Final, Protocol

from attrs import frozen

from vtx.engine import layout, native
from vtx.x86.state import MASK32, DescriptorTable, Rflags, Segment

try:
    from vtx.engine import _transfer  # type: ignore[attr-defined, unused-ignore]
except ImportError:
    _transfer = None

_INTERFACE: Final = 3
_QWORD: Final = struct.Struct("<Q")
_DF: Final = int(Rflags.DF)
_LAZY: Final = layout.ARITHMETIC_FLAGS | _DF
"""RFLAGS bits that are not in EFLAGS while the engine runs."""


Taken = tuple[int, int, int, int, int, bool]
"""RIP, RFLAGS, hidden flags, linear address of the code, kernel GS base; whether a segment or table register changed.

Changed, that is, since the last time they were put or taken.
"""


@frozen
class Hook:
    """What `vtx.engine.native.add_hook` takes: a callback and its data. ``keeps`` must live as long as the hook."""

    callback: Any
    data: int = 0
    keeps: object = None


class RegisterTransfer(Protocol):
    """What both do."""

    def save(self) -> None:
        """Take the state out of the processor into the context."""
        ...

    def restore(self) -> None:
        """Put the context into the processor."""
        ...

    def take(self, gprs: list[int]) -> Taken:
        """Fill the 16 ``gprs`` from the context; the other registers that traps need."""
        ...

    def put_system(self, *registers: Segment | DescriptorTable | int) -> None:
        """Put ES, CS, SS, DS, FS, GS, LDTR, TR, GDTR, IDTR, CR0, CR2, CR4, EFER, kernel GS base into the context."""
        ...

    def put(self, gprs: list[int], rip: int, rflags: int, hidden: int) -> None:
        """Put GPRs, RIP, RFLAGS and the hidden flags into the context, and it into the processor, before a run.

        Outside 64-bit mode only the low halves of the first eight GPRs: software must not depend on the
        others there, and a near jump of the library through such a register would.
        """
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
        self._segments = b""

    def save(self) -> None:
        """See `RegisterTransfer.save`."""
        self._library.uc_context_save(self._handle, self._context)

    def restore(self) -> None:
        """See `RegisterTransfer.restore`."""
        self._library.uc_context_restore(self._handle, self._context)

    def take(self, gprs: list[int]) -> Taken:
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
        linear = rip if hidden & layout.CODE64 else rip + base & MASK32
        (kernel_gs_base,) = _QWORD.unpack_from(self._image, layout.KERNEL_GS_BASE)
        segments = bytes(self._image[layout.SEGMENTS : layout.SEGMENTS_END])
        changed = segments != self._segments
        self._segments = segments
        return rip, rflags, hidden, linear, kernel_gs_base, changed

    def put_system(self, *registers: Segment | DescriptorTable | int) -> None:
        """See `RegisterTransfer.put_system`."""
        parts: list[int] = []
        controls: list[int] = []
        for register in registers:
            if isinstance(register, Segment):
                flags = layout.segment_flags(register.access_rights)
                parts += register.selector, register.base, register.limit, flags
            elif isinstance(register, DescriptorTable):
                parts += 0, register.base, register.limit, 0
            else:
                controls.append(register)
        for place, value in zip(layout.CONTROLS, controls, strict=True):
            _QWORD.pack_into(self._image, place, value)
        layout.ALL_SEGMENTS.pack_into(self._image, layout.SEGMENTS, *parts)
        self._segments = bytes(self._image[layout.SEGMENTS : layout.SEGMENTS_END])

    def put(self, gprs: list[int], rip: int, rflags: int, hidden: int) -> None:
        """See `RegisterTransfer.put`."""
        if not hidden & layout.CODE64:
            gprs = [value & MASK32 for value in gprs[:8]] + gprs[8:]
        layout.REGISTERS.pack_into(self._image, layout.GPR, *gprs, rip)
        layout.FLAGS.pack_into(
            self._image,
            layout.EFLAGS,
            rflags | 2,  # all of it: entering the engine derives the lazy flags from here
            0,
            rflags & layout.ARITHMETIC_FLAGS,
            0,
            layout.CC_OP_EFLAGS,
            -1 if rflags & _DF else 1,
            hidden,
            layout.GLOBAL_INTERRUPT_FLAG,
        )
        self.restore()

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
    if getattr(_transfer, "INTERFACE", 1) != _INTERFACE:
        raise native.EngineUnusable("the compiled register transfer does not match this version; reinstall vtx")
    library: Any = native.library
    functions = (library.uc_context_save, library.uc_context_restore, library.uc_reg_read)
    addresses = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    compiled: RegisterTransfer = _transfer.Transfer(
        handle.value,
        context.value,
        layout.STATE,
        *addresses,
        native.REG_EFLAGS,
        tuple(place - layout.STATE for place in layout.CONTROLS),
        Segment,
        DescriptorTable,
    )
    return compiled


def interrupt_hook(on_interrupt: Callable[[int], None], *, allow_compiled: bool) -> Hook:
    """The hook that calls ``on_interrupt``, which must not raise, with the number of each interrupt."""
    if _transfer is not None and allow_compiled:
        return Hook(_transfer.callback(), id(on_interrupt), on_interrupt)

    def callback(handle: int, number: int, data: int) -> None:
        on_interrupt(number)

    return Hook(native.InterruptCallback(callback))
