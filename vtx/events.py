"""What a machine reports while it runs: a closed union of events, and the tracer that takes them.

Every event is a plain record of numbers and words, complete in itself, so that a trace can be read without the machine
that wrote it. ``vcpu`` is the index of the logical processor, ``time`` the virtual time in ticks of its time-stamp
counter since power-up. Numbers are unsigned. A processor without a tracer builds no event at all: every place that
emits one asks ``if tracer is not None`` first.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import ClassVar, Protocol

from attrs import frozen


class Access(enum.Enum):
    """How memory or a device is accessed; the names are those of `vtx.x86.second_level.AccessKind`."""

    READ = "read"
    WRITE = "write"
    EXECUTE = "execute"


class AddressSpace(enum.Enum):
    """Where a device is reached."""

    PORT = "port"
    MEMORY = "memory"


class WalkResult(enum.Enum):
    """How a page walk ends."""

    PAGE = "page"
    PAGE_FAULT = "page fault"
    SECOND_LEVEL_FAULT = "second-level fault"


@frozen
class WalkStep:
    """One paging-structure entry: its name (``PML4E`` ...), its guest-physical address, and its value when read."""

    entry: str
    address: int
    value: int


@frozen
class Interruption:
    """An event in the words of the interruption-information fields; ``error_code`` is None if there is none."""

    vector: int
    kind: str
    error_code: int | None = None


@frozen
class FieldValue:
    """A VMCS field in a message: ``at_fault`` are the bits that broke the rule, 0 if they are not known."""

    field: str
    value: int
    at_fault: int = 0


@frozen
class RuleViolation:
    """A broken rule of VM entry: its stable id, what it demands, where the manual says so, and what it found."""

    rule: str
    statement: str
    citation: str
    values: tuple[FieldValue, ...]


@frozen
class InstructionIntercepted:
    """The model, not the engine, executes the instruction at ``rip``; ``why`` is the engine's reason to stop there.

    ``mnemonic`` is in capitals; ``(bad)`` for bytes that are no instruction.
    """

    name: ClassVar[str] = "instruction_intercepted"
    vcpu: int
    time: int
    rip: int
    mnemonic: str
    why: str


@frozen
class ExceptionRaised:
    """The instruction at ``rip`` raised an exception; whether it is delivered or causes a VM exit is told next.

    ``address`` is the linear address of a page fault, None for other exceptions.
    """

    name: ClassVar[str] = "exception_raised"
    vcpu: int
    time: int
    rip: int
    vector: int
    error_code: int | None = None
    address: int | None = None


@frozen
class EventDelivered:
    """Control passed to the handler at ``cs``:``rip``; ``kind`` is in the words of `vmcs.layouts.EVENT_TYPES`."""

    name: ClassVar[str] = "event_delivered"
    vcpu: int
    time: int
    vector: int
    kind: str
    cs: int
    rip: int
    error_code: int | None = None


@frozen
class InterruptAccepted:
    """An external interrupt was acknowledged at the boundary before ``rip``."""

    name: ClassVar[str] = "interrupt_accepted"
    vcpu: int
    time: int
    rip: int
    vector: int


@frozen
class UserInterruptsRequested:
    """A notification brought the user interrupts ``requests``, one bit for each vector, before ``rip``."""

    name: ClassVar[str] = "user_interrupts_requested"
    vcpu: int
    time: int
    rip: int
    requests: int


@frozen
class UserInterruptDelivered:
    """Control passed to the user's handler of user interrupts at ``rip``; ``vector`` is 0 to 63."""

    name: ClassVar[str] = "user_interrupt_delivered"
    vcpu: int
    time: int
    vector: int
    rip: int


@frozen
class SmmEntered:
    """A system-management interrupt was delivered at the boundary before ``rip``; state is saved below ``smbase``."""

    name: ClassVar[str] = "smm_entered"
    vcpu: int
    time: int
    rip: int
    smbase: int


@frozen
class SmmLeft:
    """RSM went back to ``rip``."""

    name: ClassVar[str] = "smm_left"
    vcpu: int
    time: int
    rip: int


@frozen
class VmInstruction:
    """A VMX instruction and what came of it: ``VMsucceed``, ``VMfailValid(7)``, ``#GP(0)`` ..."""

    name: ClassVar[str] = "vm_instruction"
    vcpu: int
    time: int
    mnemonic: str
    outcome: str


@frozen
class VmEntry:
    """VM entry succeeded, with the guest about to execute at ``rip`` under ``cr3``.

    ``rules_evaluated`` counts the checks made: all of them at first, then those whose fields changed and those that
    look at more than fields. ``injected`` is the event delivered as part of the entry.
    """

    name: ClassVar[str] = "vm_entry"
    vcpu: int
    time: int
    vmcs: int
    launch: bool
    rip: int
    cr3: int
    rules_evaluated: int
    injected: Interruption | None = None


@frozen
class VmEntryFailed:
    """VM entry failed, as an instruction error or as a VM exit; ``outcome`` is what software saw.

    ``detail`` explains a failure that no rule stands for.
    """

    name: ClassVar[str] = "vm_entry_failed"
    vcpu: int
    time: int
    vmcs: int
    outcome: str
    violations: tuple[RuleViolation, ...] = ()
    detail: str | None = None


@frozen
class VmExit:
    """A VM exit: why, where the guest was, and every information field that the exit defines.

    ``reason`` is the basic exit reason. ``decoded`` are the parts of the exit qualification by name, empty if it has
    none. Fields that are None are not defined for this exit. ``vectoring`` is the event whose delivery was
    interrupted. ``host_rip`` is where the hypervisor goes on.
    """

    name: ClassVar[str] = "vm_exit"
    vcpu: int
    time: int
    vmcs: int
    reason: int
    reason_name: str
    qualification: int
    decoded: Mapping[str, int | str]
    rip: int
    host_rip: int
    interruption: Interruption | None = None
    vectoring: Interruption | None = None
    instruction_length: int | None = None
    instruction_information: int | None = None
    guest_linear: int | None = None
    guest_physical: int | None = None


@frozen
class Vmrun:
    """VMRUN entered the guest of the control block at ``vmcb``, which is about to execute at ``rip`` under ``cr3``.

    ``nested`` tells whether nested paging is on. ``injected`` is the event delivered before the first instruction.
    """

    name: ClassVar[str] = "vmrun"
    vcpu: int
    time: int
    vmcb: int
    asid: int
    rip: int
    cr3: int
    nested: bool
    injected: Interruption | None = None


@frozen
class VmrunFailed:
    """VMRUN ended in VMEXIT_INVALID; ``detail`` explains a failure that no rule stands for."""

    name: ClassVar[str] = "vmrun_failed"
    vcpu: int
    time: int
    vmcb: int
    violations: tuple[RuleViolation, ...] = ()
    detail: str | None = None


@frozen
class VmcbChangedThoughClean:
    """VMRUN of a control block whose clean bits cover fields that software changed since the last #VMEXIT.

    A processor may go on with the old values; the model uses the new ones. ``fields`` have the new values, ``at_fault``
    the bits that differ.
    """

    name: ClassVar[str] = "vmcb_changed_though_clean"
    vcpu: int
    time: int
    vmcb: int
    fields: tuple[FieldValue, ...]


@frozen
class Vmexit:
    """A #VMEXIT: why, where the guest was, and what the control block says about it.

    ``info1`` and ``info2`` are EXITINFO1 and EXITINFO2, ``interrupted`` is the event of EXITINTINFO, ``next_rip`` is
    nRIP where the exit defines it. ``host_rip`` is where the hypervisor goes on.
    """

    name: ClassVar[str] = "vmexit"
    vcpu: int
    time: int
    vmcb: int
    code: int
    code_name: str
    info1: int
    info2: int
    rip: int
    host_rip: int
    interrupted: Interruption | None = None
    next_rip: int | None = None


@frozen
class PageWalk:
    """A walk of the paging structures for one access, with every entry read.

    ``physical`` is the page's physical address if ``result`` is `WalkResult.PAGE`; ``error_code`` that of the page
    fault if it is one.
    """

    name: ClassVar[str] = "page_walk"
    vcpu: int
    time: int
    linear: int
    access: Access
    steps: tuple[WalkStep, ...]
    result: WalkResult
    physical: int | None = None
    error_code: int | None = None


@frozen
class SecondLevelFault:
    """Second-level translation refused an access; ``kind`` in the vendor's words (``EPT violation`` ...)."""

    name: ClassVar[str] = "second_level_fault"
    vcpu: int
    time: int
    kind: str
    guest_physical: int
    linear: int | None = None


@frozen
class DeviceAccess:
    """A device was read or written; ``address`` is the port, or the physical address."""

    name: ClassVar[str] = "device_access"
    vcpu: int
    time: int
    device: str
    space: AddressSpace
    address: int
    size: int
    access: Access
    value: int


@frozen
class ControlRegisterWrite:
    """Software wrote a control register: ``CR0``, ``CR3``, ``CR4``, ``CR8``, ``EFER`` or ``XCR0``."""

    name: ClassVar[str] = "control_register_write"
    vcpu: int
    time: int
    register: str
    old: int
    new: int


@frozen
class MachineStopped:
    """The run ended: the last event of a trace. ``reason`` and ``message`` are those of the run's result."""

    name: ClassVar[str] = "machine_stopped"
    vcpu: int
    time: int
    reason: str
    message: str
    instructions: int
    exit_value: int | None = None


TraceEvent = (
    InstructionIntercepted
    | ExceptionRaised
    | EventDelivered
    | InterruptAccepted
    | UserInterruptsRequested
    | UserInterruptDelivered
    | SmmEntered
    | SmmLeft
    | VmInstruction
    | VmEntry
    | VmEntryFailed
    | VmExit
    | Vmrun
    | VmrunFailed
    | VmcbChangedThoughClean
    | Vmexit
    | PageWalk
    | SecondLevelFault
    | DeviceAccess
    | ControlRegisterWrite
    | MachineStopped
)


class Tracer(Protocol):
    """Takes events as they happen; it must not change the machine."""

    def emit(self, event: TraceEvent) -> None:
        """Take one event."""
        ...
