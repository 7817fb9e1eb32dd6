"""A virtual-machine control structure: field values, launch state, and the image of it in memory.

Software must not touch a VMCS region while the VMCS is active, and its layout is the processor's own affair. Here the
values live in a dictionary while the VMCS is active and are laid out deterministically when it is written out.

Spec: SDM Vol. 3, "Virtual Machine Control Structures", "Format of the VMCS Region" and "Overview".
"""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import Final

from vmcs.bits import MASK32
from vmcs.capabilities import Capabilities
from vmcs.fields import FIELDS, HIGH_ACCESS, Field

SHADOW_INDICATOR: Final = 1 << 31  # of the first word, which holds the revision identifier below it

HEADER_SIZE: Final = 16  # revision identifier, VMX-abort indicator, launch state, zero


# Bytes that hold a VMCS with every field the manual knows; `image_size` is what one processor's fields take.
IMAGE_SIZE: Final = HEADER_SIZE + sum(each.bits // 8 for each in FIELDS)


def image_size(capabilities: Capabilities) -> int:
    """Bytes of the region that carry information on this processor; the rest of the region is zero."""
    return HEADER_SIZE + sum(each.bits // 8 for each in FIELDS if capabilities.has(each))


@lru_cache(maxsize=32)
def slots(capabilities: Capabilities) -> tuple[tuple[int, int, int], ...]:
    """Where the image keeps each field this processor has: (encoding, byte offset, bytes), one after the other.

    ValueError if the fields do not fit the region size the processor reports.
    """
    # Widest fields first, so that every slot is naturally aligned without padding.
    present = [each for each in FIELDS if capabilities.has(each)]
    present.sort(key=lambda each: -each.bits)
    offset = HEADER_SIZE
    layout: list[tuple[int, int, int]] = []
    for each in present:
        layout.append((each.encoding, offset, each.bits // 8))
        offset += each.bits // 8
    if offset > capabilities.region_size:
        raise ValueError(f"the VMCS needs {offset} bytes, IA32_VMX_BASIC reports {capabilities.region_size}")
    return tuple(layout)


_ZEROS: Final = {each.encoding: 0 for each in FIELDS}
_MASKS: Final = {each.encoding: each.mask for each in FIELDS}


class LaunchState(enum.IntEnum):
    """The launch state of a VMCS, with its encoding in the image."""

    CLEAR = 0
    LAUNCHED = 1


class Vmcs:
    """One VMCS: ``vmcs[GUEST_RIP]`` reads, ``vmcs[GUEST_RIP] = value`` writes and cuts to the field's width.

    ``values`` holds every field the manual knows, by full-access encoding; which of them software can reach depends
    on ``capabilities``. ``changed`` maps encodings to the bits that may differ from when it was last cleared; whoever
    has checked the VMCS clears it. A new VMCS is all zeros, and all of it counts as changed.
    """

    __slots__ = ("abort_indicator", "capabilities", "changed", "launch_state", "shadow", "values")

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self.values: dict[int, int] = _ZEROS.copy()
        self.changed: dict[int, int] = _MASKS.copy()
        self.launch_state = LaunchState.CLEAR
        self.shadow = False
        self.abort_indicator = 0

    def __getitem__(self, field: Field) -> int:
        return self.values[field.encoding]

    def __setitem__(self, field: Field, value: int) -> None:
        value &= field.mask
        encoding = field.encoding
        if difference := self.values[encoding] ^ value:
            self.values[encoding] = value
            self.changed[encoding] = self.changed.get(encoding, 0) | difference

    def read(self, encoding: int) -> int | None:
        """What VMREAD of ``encoding`` gives; None if this processor's VMCS has no such field."""
        field = self.capabilities.fields.get(encoding)
        if field is None:
            return None
        value = self.values[field.encoding]
        return value >> 32 if encoding & HIGH_ACCESS else value

    def write(self, encoding: int, value: int) -> bool:
        """What VMWRITE of ``value`` does; False, and nothing written, if the VMCS has no such field.

        A high access replaces bits 63:32 with the low 32 bits of ``value``; a full access replaces the whole field,
        clearing the bits ``value`` is too narrow for. Read-only fields are the caller's concern.
        """
        field = self.capabilities.fields.get(encoding)
        if field is None:
            return False
        if encoding & HIGH_ACCESS:
            value = (value & MASK32) << 32 | self.values[field.encoding] & MASK32
        self[field] = value
        return True

    def copy(self) -> Vmcs:
        """An independent copy, ``changed`` included."""
        other = Vmcs(self.capabilities)
        other.values = dict(self.values)
        other.changed = dict(self.changed)
        other.launch_state, other.shadow, other.abort_indicator = self.launch_state, self.shadow, self.abort_indicator
        return other

    def to_image(self) -> bytes:
        """The region as VMCLEAR leaves it in memory: `Capabilities.region_size` bytes."""
        capabilities = self.capabilities
        image = bytearray(capabilities.region_size)
        first = capabilities.revision_identifier | (SHADOW_INDICATOR if self.shadow else 0)
        image[0:4] = first.to_bytes(4, "little")
        image[4:8] = (self.abort_indicator & MASK32).to_bytes(4, "little")
        image[8:12] = self.launch_state.to_bytes(4, "little")
        for encoding, offset, size in slots(capabilities):
            image[offset : offset + size] = self.values[encoding].to_bytes(size, "little")
        return bytes(image)

    @classmethod
    def from_image(cls, image: bytes, capabilities: Capabilities) -> Vmcs:
        """The VMCS whose region holds ``image``.

        Any bytes give some VMCS: what is missing reads as zero, a launch state that is neither clear nor launched
        counts as clear, and fields the processor does not have stay zero. The revision identifier is the caller's to
        judge, before.
        """
        vmcs = cls(capabilities)
        data = image.ljust(capabilities.region_size, b"\0")
        vmcs.shadow = bool(int.from_bytes(data[0:4], "little") & SHADOW_INDICATOR)
        vmcs.abort_indicator = int.from_bytes(data[4:8], "little")
        if int.from_bytes(data[8:12], "little") == LaunchState.LAUNCHED:
            vmcs.launch_state = LaunchState.LAUNCHED
        for encoding, offset, size in slots(capabilities):
            vmcs.values[encoding] = int.from_bytes(data[offset : offset + size], "little")
        return vmcs
