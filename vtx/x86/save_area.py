"""The XSAVE area: which state components there are, and where each lies in the standard and the compacted format.

A component is named here by its bit in XCR0 or IA32_XSS, and a set of them is a mask of such bits.

Spec: SDM Vol. 1, "Managing State Using the XSAVE Feature Set", "XSAVE Area"; APM Vol. 2, "XSAVE/XRSTOR
Instructions".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from attrs import frozen

LEGACY_SIZE: Final = 416
"""What the x87 and SSE state fill of the legacy region."""

HEADER: Final = 512
"""Offset of the XSAVE header: XSTATE_BV, XCOMP_BV, 48 bytes that are reserved."""

HEADER_SIZE: Final = 64
LEGACY_AND_HEADER_SIZE: Final = 576
ALIGNMENT: Final = 64
COMPACTED: Final = 1 << 63  # of XCOMP_BV


@frozen
class StateComponent:
    """A state component beyond the legacy region: its bit, its size, its place in the standard format, in bytes.

    ``amd_offset`` is the place on AMD processors, which leave less room before it. A supervisor component, which
    IA32_XSS enables, has a place in the compacted format alone.
    """

    bit: int
    size: int
    offset: int = 0
    amd_offset: int = 0
    supervisor: bool = False


X87_STATE: Final = 1 << 0
SSE_STATE: Final = 1 << 1
BNDREGS: Final = StateComponent(3, 64, offset=960)
BNDCSR: Final = StateComponent(4, 64, offset=1024)
PKRU: Final = StateComponent(9, 8, offset=2688, amd_offset=2432)
CET_USER: Final = StateComponent(11, 16, supervisor=True)
CET_SUPERVISOR: Final = StateComponent(12, 24, supervisor=True)
HDC: Final = StateComponent(13, 8, supervisor=True)
USER_INTERRUPTS: Final = StateComponent(14, 48, supervisor=True)
COMPONENTS: Final = (BNDREGS, BNDCSR, PKRU, CET_USER, CET_SUPERVISOR, HDC, USER_INTERRUPTS)
"""Those beyond the legacy region, in the order of their bits. None needs to be aligned in the compacted format."""

USER_COMPONENT_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {"x87": 0, "SSE": 1, "BNDREGS": BNDREGS.bit, "BNDCSR": BNDCSR.bit, "PKRU": PKRU.bit}
)
"""Bits of XCR0 by the names that profiles give the components."""

SUPERVISOR_COMPONENTS: Final[Mapping[str, tuple[StateComponent, ...]]] = MappingProxyType(
    {
        "CET_SS": (CET_USER, CET_SUPERVISOR),
        "CET_IBT": (CET_USER, CET_SUPERVISOR),
        "HDC": (HDC,),
        "UINTR": (USER_INTERRUPTS,),
    }
)
"""The components that IA32_XSS enables, by CPUID feature."""


def standard_offset(component: StateComponent, *, amd: bool) -> int:
    """Where a user component lies in the standard format."""
    return component.amd_offset if amd else component.offset


def standard_size(components: int, *, amd: bool = False) -> int:
    """Bytes of the standard format with ``components``."""
    ends = [standard_offset(each, amd=amd) + each.size for each in COMPONENTS if components >> each.bit & 1]
    return max([LEGACY_AND_HEADER_SIZE, *ends])


def compacted_offset(component: StateComponent, format_: int) -> int:
    """Where ``component`` lies in the compacted format of the components in ``format_``, or would lie: after those
    of lower bits.
    """
    return compacted_size(format_ & (1 << component.bit) - 1)


def compacted_size(components: int) -> int:
    """Bytes of the compacted format with ``components``."""
    return LEGACY_AND_HEADER_SIZE + sum(each.size for each in COMPONENTS if components >> each.bit & 1)


@frozen
class Header:
    """The XSAVE header: ``present`` is XSTATE_BV, ``format`` is XCOMP_BV, ``reserved`` the other 48 bytes."""

    present: int
    format: int
    reserved: bytes

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """The header whose 64 bytes ``data`` are."""
        present, format_ = struct.unpack_from("<QQ", data)
        return cls(present, format_, data[16:HEADER_SIZE])

    @property
    def compacted(self) -> bool:
        """Whether the area is in the compacted format."""
        return bool(self.format & COMPACTED)

    def is_valid(self, enabled: int, *, compaction: bool) -> bool:
        """Whether XRSTOR and XRSTORS take it for the ``enabled`` components; ``compaction``: the format is known.

        Spec: SDM Vol. 1, "Operation of XRSTOR", "Operation of XRSTORS".
        """
        if self.compacted and compaction:
            return not (self.format & ~(COMPACTED | enabled) or self.present & ~self.format or any(self.reserved))
        return not (self.format or self.present & ~enabled or any(self.reserved[:8]))
