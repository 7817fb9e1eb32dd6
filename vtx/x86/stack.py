"""A stack while a frame is pushed on it or popped from it, before SS and RSP are committed.

Spec: SDM Vol. 1, "Stacks"; SDM Vol. 3, "Limit Checking", "Stack Switching in IA-32e Mode".
"""

from __future__ import annotations

from typing import Final

from attrs import define

from vtx.x86.linear import LinearMemory, is_canonical, linear_address_width
from vtx.x86.linear_masking import Widths, masked, masking
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import MASK32, MASK64, AccessRights, CpuState, Gpr, Rflags, Segment

_AC: Final = Rflags.AC.value
_BLOCK: Final = 128
"""Bytes of a sub-page, to which write permissions can be limited (SDM Vol. 3, "Sub-Page Write Permissions")."""

_EXPAND_DOWN: Final = AccessRights.EXPAND_DOWN_OR_CONFORMING.value


def within_limit(segment: Segment, offset: int, size: int) -> bool:
    """Whether ``size`` bytes at ``offset`` lie within the limit of ``segment``, expand-down segments included."""
    last = offset + size - 1
    if segment.access_rights & 0xC == _EXPAND_DOWN:
        return offset > segment.limit and last <= (MASK32 if segment.big else 0xFFFF)
    return last <= segment.limit


@define(slots=True)
class Stack:
    """The stack at ``pointer`` of ``segment``.

    ``bits`` is the stack-address size: 16, 32 or 64. ``user`` marks accesses made at CPL 3, ``ac`` those
    made below it with RFLAGS.AC set. A reference outside the segment, or to a non-canonical address, raises #SS with
    ``error_code``. ``masking`` is what 64-bit pointers are stripped of. ``ahead`` are values read already, the next one
    last.
    """

    memory: LinearMemory
    segment: Segment
    pointer: int
    bits: int
    user: bool
    ac: bool
    error_code: int
    linear_width: int
    masking: Widths | None = None
    ahead: list[int] | None = None

    @classmethod
    def of(
        cls,
        state: CpuState,
        memory: LinearMemory,
        *,
        segment: Segment | None = None,
        pointer: int | None = None,
        cpl: int | None = None,
        bits: int | None = None,
        error_code: int = 0,
    ) -> Stack:
        """The current stack of ``state``, with the parts a transfer of control replaces given by name."""
        segment = state.ss if segment is None else segment
        if bits is None:
            bits = 64 if state.in_64_bit_mode else 32 if segment.big else 16
        user = (state.cpl if cpl is None else cpl) == 3
        return cls(
            memory,
            segment,
            state.gpr[Gpr.RSP] if pointer is None else pointer,
            bits,
            user,
            not user and bool(state.rflags & _AC),
            error_code,
            linear_address_width(state),
            masking(state.cr3, state.cr4, state.efer) if bits == 64 else None,
        )

    def check_room(self, count: int, size: int) -> None:
        """Raise #SS unless ``count`` values of ``size`` bytes can be pushed as far as segmentation is concerned."""
        pointer = self.pointer
        if self.bits == 64:
            # What is not canonical is wider than any frame.
            self._linear((pointer - size) & MASK64, size)
            self._linear((pointer - count * size) & MASK64, size)
            return
        for _ in range(count):
            pointer = self._moved(pointer, -size)
            self._linear(pointer, size)

    def push(self, *values: int, size: int) -> None:
        """Push ``values``, the first one first, ``size`` bytes each; whatever does not fit is cut off."""
        mask, bits, total = (1 << size * 8) - 1, size * 8, len(values) * size
        if self.bits == 64 and self._is_one_block(self.pointer - total, total):
            image = 0
            for value in values:
                image = image << bits | value & mask
            try:
                self.memory.write(self.pointer - total, total, image, user=self.user, ac=self.ac)
            except InstructionAborted:
                pass  # it is the first one that faults, below, with its own address
            else:
                self.pointer -= total
                return
        for value in values:
            pointer = self._moved(self.pointer, -size)
            linear = self._linear(pointer, size)
            self.memory.write(linear, size, value & mask, user=self.user, ac=self.ac)
            self.pointer = pointer

    def read_ahead(self, count: int, size: int) -> None:
        """``count`` values of ``size`` bytes will be popped: read them at once, if one fault is that of all."""
        if self.bits == 64 and self._is_one_block(self.pointer, count * size):
            linear = self._linear(self.pointer, size)
            image = self.memory.read(linear, count * size, user=self.user, ac=self.ac)
            mask = (1 << size * 8) - 1
            self.ahead = [image >> at * size * 8 & mask for at in reversed(range(count))]

    @staticmethod
    def _is_one_block(linear: int, size: int) -> bool:
        """Whether any access to these bytes is refused if one is, for the same reason: nothing decides about less."""
        return linear >= 0 and linear // _BLOCK == (linear + size - 1) // _BLOCK

    def pop(self, size: int) -> int:
        """Pop a value of ``size`` bytes."""
        if self.ahead:
            self.pointer = self._moved(self.pointer, size)
            return self.ahead.pop()
        value = self.memory.read(self._linear(self._moved(self.pointer, 0), size), size, user=self.user, ac=self.ac)
        self.pointer = self._moved(self.pointer, size)
        return value

    def release(self, distance: int) -> None:
        """Move the pointer up over ``distance`` bytes."""
        self.pointer = self._moved(self.pointer, distance)

    def _moved(self, pointer: int, distance: int) -> int:
        """``pointer`` moved by ``distance`` bytes; a 16-bit stack leaves the bits above SP alone."""
        if self.bits == 64:
            return (pointer + distance) & MASK64
        if self.bits == 32:
            return (pointer + distance) & MASK32
        return pointer & ~0xFFFF | (pointer + distance) & 0xFFFF

    def _linear(self, pointer: int, size: int) -> int:
        if self.bits == 64:
            width = self.linear_width
            if self.masking is not None:
                pointer = masked(pointer, self.masking)
            if is_canonical(pointer, width) and is_canonical((pointer + size - 1) & MASK64, width):
                return pointer
        else:
            offset = pointer & (0xFFFF if self.bits == 16 else MASK32)
            if self.segment.usable and within_limit(self.segment, offset, size):
                return (self.segment.base + offset) & MASK32
        raise InstructionAborted(Fault(Vector.SS, self.error_code))
