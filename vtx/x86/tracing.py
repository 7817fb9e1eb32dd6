"""Turning what a processor does into trace events; only built when somebody listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vtx import events
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import Fault
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import PageFault, Translation
from vtx.x86.second_level import AccessKind, SecondLevelFault
from vtx.x86.state import Rflags

if TYPE_CHECKING:
    from vtx.x86.decode import Instruction
    from vtx.x86.processor import LogicalProcessor

_KINDS: Final = {
    EventKind.EXTERNAL_INTERRUPT: "external interrupt",
    EventKind.NMI: "non-maskable interrupt",
    EventKind.HARDWARE_EXCEPTION: "hardware exception",
    EventKind.SOFTWARE_INTERRUPT: "software interrupt",
    EventKind.PRIVILEGED_SOFTWARE_EXCEPTION: "privileged software exception",
    EventKind.SOFTWARE_EXCEPTION: "software exception",
}
_ACCESS: Final = {
    AccessKind.READ: events.Access.READ,
    AccessKind.WRITE: events.Access.WRITE,
    AccessKind.EXECUTE: events.Access.EXECUTE,
}


class ProcessorTracing:
    """Emits the events of ``processor`` to ``tracer``."""

    def __init__(self, processor: LogicalProcessor, tracer: events.Tracer) -> None:
        self._processor = processor
        self._emit = tracer.emit
        self._state = processor.state

    def _now(self) -> tuple[int, int]:
        return self._processor.index, self._processor.now()

    def intercepted(self, instruction: Instruction | None, why: str) -> None:
        """The model executes the instruction at RIP."""
        name = "(bad)" if instruction is None else instruction.name
        self._emit(events.InstructionIntercepted(*self._now(), self._state.rip, name, why))

    def exception(self, fault: Fault) -> None:
        """The instruction at RIP raised an exception."""
        event = events.ExceptionRaised(
            *self._now(), self._state.rip, int(fault.vector), fault.error_code, fault.address
        )
        self._emit(event)

    def delivered(self, event: Event) -> None:
        """``event`` was delivered: CS and RIP are those of its handler."""
        state = self._state
        self._emit(
            events.EventDelivered(
                *self._now(), event.vector, _KINDS[event.kind], state.cs.selector, state.rip, event.error_code
            )
        )

    def interrupt(self, vector: int) -> None:
        """An external interrupt was acknowledged."""
        self._emit(events.InterruptAccepted(*self._now(), self._state.rip, vector))

    def user_interrupts_requested(self, requests: int) -> None:
        """A user-interrupt notification was processed at the boundary before RIP."""
        self._emit(events.UserInterruptsRequested(*self._now(), self._state.rip, requests))

    def user_interrupt_delivered(self, vector: int) -> None:
        """A user interrupt was delivered: RIP is that of its handler."""
        self._emit(events.UserInterruptDelivered(*self._now(), vector, self._state.rip))

    def smm_entered(self, rip: int) -> None:
        """A system-management interrupt was delivered at the boundary before ``rip``."""
        self._emit(events.SmmEntered(*self._now(), rip, self._state.smbase))

    def smm_left(self) -> None:
        """RSM has restored the registers."""
        self._emit(events.SmmLeft(*self._now(), self._state.rip))

    def second_level_fault(self, fault: SecondLevelFault) -> None:
        """The second level refused an access."""
        kind = "".join(" " + c.lower() if c.isupper() else c for c in type(fault).__name__).strip()
        kind = kind.replace("ept", "EPT", 1)
        self._emit(events.SecondLevelFault(*self._now(), kind, fault.guest_physical, fault.linear))

    def control_write(self, register: str, old: int, new: int) -> None:
        """Software wrote a control register."""
        self._emit(events.ControlRegisterWrite(*self._now(), register, old, new))

    def port(self, port: int, size: int, access: events.Access, value: int) -> None:
        """A port was read or written."""
        device = self._processor.platform.port_device(port)
        space = events.AddressSpace.PORT
        self._emit(events.DeviceAccess(*self._now(), device, space, port, size, access, value))

    def walk(self, linear: int, kind: AccessKind, cpl: int) -> None:
        """A walk for an access that was just refused: repeated, this time noting every entry."""
        privilege = Privilege.of(cpl, bool(self._state.rflags & Rflags.AC), False)
        steps, result = self._processor.mmu.trace_walk(linear, kind, privilege)
        noted = tuple(events.WalkStep(step.name, step.address, step.value) for step in steps)
        physical = error_code = None
        if isinstance(result, Translation):
            outcome, physical = events.WalkResult.PAGE, int(result.physical)
        elif isinstance(result, PageFault):
            outcome, error_code = events.WalkResult.PAGE_FAULT, result.error_code
        else:
            outcome = events.WalkResult.SECOND_LEVEL_FAULT
        self._emit(events.PageWalk(*self._now(), linear, _ACCESS[kind], noted, outcome, physical, error_code))
