"""What a VM exit reports: the record that the decision to exit hands to the code that performs the exit.

Spec: SDM Vol. 3, "VM Exits", "Recording VM-Exit Information and Updating VM-entry Control Fields".
"""

from __future__ import annotations

from typing import Final

from attrs import define

from vmcs import layouts
from vtx.x86.outcome import Vector

VALID: Final = 1 << 31
ERROR_CODE_VALID: Final = 1 << 11
NMI_UNBLOCKING: Final = 1 << 12
NESTED_EXCEPTION: Final = 1 << 13
ENTRY_FAILURE: Final = 1 << 31
SHADOW_STACK_BUSY: Final = 1 << 25


@define(slots=True)
class VmExit:
    """One VM exit.

    ``reason`` is the 32-bit exit reason. Fields that are None are not defined for this exit and keep their old value in
    the VMCS. ``interruption`` and ``vectoring`` are interruption-information words, 0 (invalid) without an event; their
    error codes count only if the word says so. ``resume_flag`` is the value of RFLAGS.RF to save, None to save it as
    it is. ``event_data`` is what FRED would have pushed, None if an event was not being delivered by it.
    ``shadow_stack_busy``: the delivery or call that the exit took the place of had marked a shadow stack busy.
    """

    reason: int
    qualification: int = 0
    instruction_length: int | None = None
    instruction_information: int | None = None
    guest_linear: int | None = None
    guest_physical: int | None = None
    interruption: int = 0
    interruption_error: int = 0
    vectoring: int = 0
    vectoring_error: int = 0
    resume_flag: int | None = None
    event_data: int | None = None
    shadow_stack_busy: bool = False

    @property
    def is_debug_exception(self) -> bool:
        """Whether a debug exception caused the exit."""
        return bool(self.interruption & VALID) and self.interruption & 0xFF == Vector.DB

    @property
    def is_nmi(self) -> bool:
        """Whether an NMI caused the exit."""
        return self.interruption == NMI_WORD


def interruption_word(vector: int, event_type: int, *, error_code: bool = False) -> int:
    """A valid interruption-information word."""
    return VALID | event_type << 8 | vector | (ERROR_CODE_VALID if error_code else 0)


NMI_WORD: Final = interruption_word(2, layouts.NON_MASKABLE_INTERRUPT)
