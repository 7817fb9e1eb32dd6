"""Exceptions during the delivery of an event: double faults, triple faults, and the loop that delivers them all.

Spec: SDM Vol. 3, "Interrupt 8—Double Fault Exception (#DF)", with its tables of exception classes and of the conditions
for generating a double fault; "Information for VM Exits That Occur During Event Delivery".
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from attrs import frozen

from vtx.x86.delivery import deliver, recognize
from vtx.x86.event import Event, EventKind
from vtx.x86.fred import is_enabled
from vtx.x86.linear import LinearMemory
from vtx.x86.outcome import Fault, InstructionAborted, NotModelled, Vector
from vtx.x86.state import CpuState
from vtx.x86.task import NO_HOOKS, TaskSwitchHooks

_LONGEST_CHAIN: Final = 16


class ExceptionClass(enum.Enum):
    """How an event combines with an exception during its delivery."""

    BENIGN = "benign"
    CONTRIBUTORY = "contributory"
    PAGE_FAULT = "page fault"
    DOUBLE_FAULT = "double fault"


_CLASS_OF_VECTOR: Final[dict[int, ExceptionClass]] = {
    Vector.DE: ExceptionClass.CONTRIBUTORY,
    Vector.DF: ExceptionClass.DOUBLE_FAULT,
    Vector.TS: ExceptionClass.CONTRIBUTORY,
    Vector.NP: ExceptionClass.CONTRIBUTORY,
    Vector.SS: ExceptionClass.CONTRIBUTORY,
    Vector.GP: ExceptionClass.CONTRIBUTORY,
    Vector.PF: ExceptionClass.PAGE_FAULT,
    Vector.VE: ExceptionClass.PAGE_FAULT,
    Vector.CP: ExceptionClass.CONTRIBUTORY,
}

# The pairs that are not handled one after the other, first exception first.
_COMBINING: Final = frozenset(
    {
        (ExceptionClass.CONTRIBUTORY, ExceptionClass.CONTRIBUTORY),
        (ExceptionClass.PAGE_FAULT, ExceptionClass.CONTRIBUTORY),
        (ExceptionClass.PAGE_FAULT, ExceptionClass.PAGE_FAULT),
        (ExceptionClass.DOUBLE_FAULT, ExceptionClass.CONTRIBUTORY),
        (ExceptionClass.DOUBLE_FAULT, ExceptionClass.PAGE_FAULT),
    }
)


@frozen
class Delivered:
    """Control is with the handler of ``event``: the original one, or the last exception met on the way."""

    event: Event


@frozen
class Intercepted:
    """Delivery of ``event`` stopped at ``cause``: an exception the observer took, or an outcome that is none."""

    event: Event
    cause: object


@frozen
class TripleFault:
    """A contributory exception or page fault during delivery of #DF: the processor shuts down."""

    event: Event
    fault: Fault


DeliveryOutcome = Delivered | Intercepted | TripleFault


def exception_class(vector: int, kind: EventKind = EventKind.HARDWARE_EXCEPTION) -> ExceptionClass:
    """The class of an event; interrupts and software events are benign whatever their vector."""
    if kind != EventKind.HARDWARE_EXCEPTION:
        return ExceptionClass.BENIGN
    return _CLASS_OF_VECTOR.get(vector, ExceptionClass.BENIGN)


def combine(first: Event, second: Fault, *, nested: bool = False) -> Event | TripleFault:
    """What is delivered when ``second`` occurs during delivery of ``first``: ``second`` itself, #DF, or nothing.

    ``nested`` marks ``second`` as FRED wants it.
    """
    first_class = exception_class(first.vector, first.kind)
    if (first_class, exception_class(second.vector)) not in _COMBINING:
        return Event.from_fault(second, nested=nested)
    if first_class == ExceptionClass.DOUBLE_FAULT:
        return TripleFault(first, second)
    return Event(Vector.DF, EventKind.HARDWARE_EXCEPTION, error_code=0)


def deliver_with_faults(
    state: CpuState,
    memory: LinearMemory,
    event: Event,
    on_fault: Callable[[Event, Fault], bool] | None = None,
    *,
    block_nmi: bool = True,
    hooks: TaskSwitchHooks = NO_HOOKS,
    star: int = 0,
) -> DeliveryOutcome:
    """Deliver ``event``, then whatever exceptions its delivery leads to. ``star`` is IA32_STAR.

    ``on_fault(event, fault)`` is asked about each exception during delivery of ``event`` before it is combined with
    it, and about a resulting double fault (``fault.vector`` is #DF); True stops there, with the registers as at the
    start of that delivery. Causes that are no `Fault` (a VM exit raised by the memory or by ``hooks``) stop in the same
    way. CR2, DR6, DR7 and blocking by NMI show every event and exception that was not stopped, even those that end in
    a double or triple fault.
    """
    for _ in range(_LONGEST_CHAIN):
        recognize(state, event, block_nmi=block_nmi)
        try:
            deliver(state, memory, event, block_nmi=block_nmi, hooks=hooks, star=star)
        except InstructionAborted as aborted:
            fault = aborted.cause
            if not isinstance(fault, Fault) or (on_fault is not None and on_fault(event, fault)):
                return Intercepted(event, fault)
            recognize(state, Event.from_fault(fault))
            combined = combine(event, fault, nested=is_enabled(state))
            if isinstance(combined, TripleFault):
                return combined
            if combined.vector == Vector.DF and on_fault is not None:
                double_fault = Fault(Vector.DF, 0)
                if on_fault(event, double_fault):
                    return Intercepted(event, double_fault)
            event = combined
        else:
            return Delivered(event)
    raise NotModelled("endless chain of benign exceptions during event delivery")
