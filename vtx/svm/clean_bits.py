"""Clean bits: what software calls unchanged since the last #VMEXIT, and what it changed all the same.

A processor may go on with what it has cached of a clean group, so a hypervisor that forgets to clear a bit works on one
processor and fails on the next. The model never caches; it can tell.

Spec: APM Vol. 2, "VMCB Clean Field".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from vmcs.vmcb.fields import BY_NAME, FIELDS, VmcbField
from vmcs.vmcb.layouts import CLEAN_BITS

_CLEAN: Final = BY_NAME["VMCB clean bits"].encoding
_GROUPS: Final[Mapping[int, tuple[VmcbField, ...]]] = {
    part.mask: tuple(field for field in FIELDS if field.clean == part.name) for part in CLEAN_BITS.slices
}


def changed_though_clean(before: Sequence[int], now: Sequence[int]) -> tuple[VmcbField, ...]:
    """The fields that differ between the last #VMEXIT and this VMRUN of a control block and are marked clean."""
    clean = now[_CLEAN]
    return tuple(
        field
        for mask, fields in _GROUPS.items()
        if clean & mask
        for field in fields
        if before[field.encoding] != now[field.encoding]
    )
