"""An event on its way to a handler: an interrupt or exception with what its delivery needs to know.

Spec: SDM Vol. 3, "Sources of Interrupts", "Sources of Exceptions", "Exception Classifications", "Error Code".
"""

from __future__ import annotations

import enum
from typing import Final

from attrs import frozen

from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import CpuState, Rflags


class EventKind(enum.IntEnum):
    """What kind of event it is, with the VMCS encoding of the interruption type."""

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4  # INT n
    PRIVILEGED_SOFTWARE_EXCEPTION = 5  # INT1
    SOFTWARE_EXCEPTION = 6  # INT3 and INTO
    OTHER = 7  # SYSCALL and SYSENTER, which are events with FRED


_RF: Final = Rflags.RF.value
_SOFTWARE_KINDS: Final = frozenset(
    {
        EventKind.SOFTWARE_INTERRUPT,
        EventKind.PRIVILEGED_SOFTWARE_EXCEPTION,
        EventKind.SOFTWARE_EXCEPTION,
        EventKind.OTHER,
    }
)

BREAKPOINTS: Final = 0xF
"""B0 to B3 of DR6 and of the pending debug exceptions."""

GENERAL_DETECT: Final = 1 << 13
"""DR6.BD: access to a debug register while DR7.GD is set, the debug fault that is not an instruction breakpoint."""

# #DF is an abort, yet it saves the state of the fault that led to it.
_RESUMING_FAULTS: Final = frozenset(
    {
        Vector.DE,
        Vector.BR,
        Vector.UD,
        Vector.NM,
        Vector.DF,
        Vector.TS,
        Vector.NP,
        Vector.SS,
        Vector.GP,
        Vector.PF,
        Vector.MF,
        Vector.AC,
        Vector.XM,
        Vector.VE,
        Vector.CP,
    }
)


@frozen
class Event:
    """An interrupt or exception to be delivered.

    ``error_code`` is None unless delivery pushes one. ``instruction_length`` is that of the INT n, INT1, INT3 or INTO
    instruction that RIP still points to; other kinds ignore it. ``address`` is what delivery of a page fault writes to
    CR2 and ``debug`` the bits that delivery of a debug exception, INT1 included, sets in DR6; None (an injected event)
    leaves the registers alone. ``resume_flag`` overrides the value pushed for RF, for events between the iterations of
    a repeated string instruction; None follows the class of the event. ``injected`` marks an event injected by a VM
    entry: the value pushed for RF is that of the guest-state area, and INT n ignores IOPL in virtual-8086 mode.
    ``nested`` and ``data`` are for FRED alone: it is an exception met while another event was delivered, and the event
    data if they do not follow from the rest.
    Spec: SDM Vol. 3, "Vectored-Event Injection".
    """

    vector: int
    kind: EventKind = EventKind.HARDWARE_EXCEPTION
    error_code: int | None = None
    instruction_length: int = 0
    address: int | None = None
    debug: int | None = None
    resume_flag: bool | None = None
    injected: bool = False
    nested: bool = False
    data: int | None = None

    @classmethod
    def from_fault(cls, fault: Fault, *, nested: bool = False) -> Event:
        """The hardware exception that delivers ``fault``."""
        debug = fault.debug if fault.vector == Vector.DB else None
        kind = EventKind.HARDWARE_EXCEPTION
        return cls(fault.vector, kind, fault.error_code, address=fault.address, debug=debug, nested=nested)

    @property
    def is_software(self) -> bool:
        """Whether an instruction asked for the event: the return address is that of the next instruction."""
        return self.kind in _SOFTWARE_KINDS

    @property
    def checks_gate_privilege(self) -> bool:
        """Whether the gate's DPL must admit the CPL: INT n, INT3 and INTO, but not INT1."""
        return self.kind in (EventKind.SOFTWARE_INTERRUPT, EventKind.SOFTWARE_EXCEPTION)

    @property
    def external(self) -> int:
        """The EXT bit of error codes of exceptions during delivery: 0 for what an instruction asks for, but INT1."""
        return 0 if self.checks_gate_privilege or self.kind == EventKind.OTHER else 1

    def saved_rip(self, state: CpuState) -> int:
        """The return address that delivery pushes, before it is cut to the width of the gate."""
        if not self.is_software:
            return state.rip
        width = 64 if state.in_64_bit_mode else 32
        return (state.rip + self.instruction_length) & ((1 << width) - 1)

    def saved_rflags(self, state: CpuState) -> int:
        """The RFLAGS image that delivery pushes.

        RF is 1 for a fault, so that the instruction can resume past its instruction breakpoint; 0 for a software event;
        as it is for an interrupt, a trap and an instruction breakpoint.
        Spec: SDM Vol. 3, "Instruction-Breakpoint Exception Condition".
        """
        if self.injected:
            return state.rflags
        if self.resume_flag is not None:
            resume = self.resume_flag
        elif self.is_software:
            resume = False
        elif self.kind == EventKind.HARDWARE_EXCEPTION and self._is_resuming_fault:
            resume = True
        else:
            return state.rflags
        return state.rflags | _RF if resume else state.rflags & ~_RF

    @property
    def _is_resuming_fault(self) -> bool:
        if self.vector == Vector.DB:
            return bool(self.debug and self.debug & GENERAL_DETECT)
        return self.vector in _RESUMING_FAULTS
