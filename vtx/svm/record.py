"""What a #VMEXIT reports: the record that the decision to exit hands to the code that performs the exit.

Spec: APM Vol. 2, "#VMEXIT", "State Saved on Exit".
"""

from __future__ import annotations

from typing import Final

from attrs import define

from vmcs.vmcb import layouts
from vmcs.vmcb.layouts import InjectedType
from vtx.x86.event import Event, EventKind

_TYPES: Final = {
    EventKind.EXTERNAL_INTERRUPT: InjectedType.EXTERNAL_INTERRUPT,
    EventKind.NMI: InjectedType.NMI,
    EventKind.HARDWARE_EXCEPTION: InjectedType.EXCEPTION,
    EventKind.SOFTWARE_INTERRUPT: InjectedType.SOFTWARE_INTERRUPT,
    EventKind.PRIVILEGED_SOFTWARE_EXCEPTION: InjectedType.EXCEPTION,
    EventKind.SOFTWARE_EXCEPTION: InjectedType.EXCEPTION,
}


@define(slots=True)
class Vmexit:
    """One #VMEXIT: ``code`` is EXITCODE, ``info1`` and ``info2`` are EXITINFO1 and EXITINFO2.

    ``next_rip`` is nRIP, 0 where none is defined. ``interrupted`` is EXITINTINFO, 0 unless an event was being
    delivered. ``instruction_bytes`` are what decode assists fetched at RIP.
    """

    code: int
    info1: int = 0
    info2: int = 0
    next_rip: int = 0
    interrupted: int = 0
    instruction_bytes: bytes = b""


def event_word(event: Event) -> int:
    """``event`` in the format of EXITINTINFO."""
    word = layouts.EVENT_VALID | _TYPES[event.kind] << layouts.EVENT_TYPE_SHIFT | event.vector
    if event.error_code is not None:
        word |= layouts.EVENT_ERROR_CODE_VALID | event.error_code << 32
    return word
