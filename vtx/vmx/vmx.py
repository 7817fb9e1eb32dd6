"""`Vmx`: Intel's virtualization extension of one logical processor.

Two doors: the seam through which the processor executes VMX instructions and asks what exits
(`vtx.x86.virtualization.Virtualization`), and the VMX instructions as methods, for driving VMX from Python without
guest code. Behind both is the same code.

Spec: SDM Vol. 3, "Introduction to Virtual Machine Extensions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from iced_x86 import Mnemonic

from vmcs import controls as c
from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import LaunchState, Vmcs
from vmcs.rules import Violation, explain
from vtx.vmx import (
    apic_access,
    apic_instructions,
    events,
    instructions,
    msr_virtualization,
    pause_loop,
    smm,
    sub_page,
    virtualization_exception,
)
from vtx.vmx.boundary import boundary_event, interrupts_ignore_if, wants_boundary, wants_interrupt_window
from vtx.vmx.entry import enter
from vtx.vmx.ept import EptMisconfiguration
from vtx.vmx.execution import ROWS, execute_directly, execute_instruction, shortcut
from vtx.vmx.exit import perform_exit
from vtx.vmx.guest_state import always_saved_msrs
from vtx.vmx.intercepts import Guest, exit_of
from vtx.vmx.observer import Observer
from vtx.vmx.operation import ActiveVmcs, EntryFailure, VmxOperation
from vtx.vmx.outcome import Outcome
from vtx.vmx.record import VmExit
from vtx.vmx.view import ControlView
from vtx.vmx.vm_functions import vmfunc
from vtx.x86.decode import Instruction
from vtx.x86.event import Event
from vtx.x86.operations import Operation, TaskSwitch, WriteMsrList
from vtx.x86.outcome import Fault, Vector
from vtx.x86.second_level import SecondLevelFault, SubPageWrite
from vtx.x86.state import MASK64, Activity
from vtx.x86.virtualization import Processor, RefusedInstruction, SmmSuspension

_CR0_MASK: Final = f.CR0_GUEST_HOST_MASK.encoding
_CR4_MASK: Final = f.CR4_GUEST_HOST_MASK.encoding
_CR0_SHADOW: Final = f.CR0_READ_SHADOW.encoding
_CR4_SHADOW: Final = f.CR4_READ_SHADOW.encoding
_TSC_FRACTION_BITS: Final = 48

_TERTIARY: Final = 32  # where the tertiary controls begin, above the secondary ones
# Instructions that a clear secondary or tertiary control turns into invalid opcodes.
_ENABLED_BY: Final[dict[int, int]] = {
    Mnemonic.RDTSCP: c.ENABLE_RDTSCP.mask,
    Mnemonic.RDPID: c.ENABLE_RDTSCP.mask,
    Mnemonic.INVPCID: c.ENABLE_INVPCID.mask,
    Mnemonic.XSAVES: c.ENABLE_XSAVES_XRSTORS.mask,
    Mnemonic.XSAVES64: c.ENABLE_XSAVES_XRSTORS.mask,
    Mnemonic.XRSTORS: c.ENABLE_XSAVES_XRSTORS.mask,
    Mnemonic.XRSTORS64: c.ENABLE_XSAVES_XRSTORS.mask,
    Mnemonic.TPAUSE: c.ENABLE_USER_WAIT_AND_PAUSE.mask,
    Mnemonic.UMONITOR: c.ENABLE_USER_WAIT_AND_PAUSE.mask,
    Mnemonic.UMWAIT: c.ENABLE_USER_WAIT_AND_PAUSE.mask,
    Mnemonic.RDMSRLIST: c.ENABLE_MSR_LIST_INSTRUCTIONS.mask << _TERTIARY,
    Mnemonic.WRMSRLIST: c.ENABLE_MSR_LIST_INSTRUCTIONS.mask << _TERTIARY,
}


class Vmx:
    """VMX of ``processor``, with the capabilities of its profile; outside VMX operation to begin with.

    ``observer`` is told of VMX instructions, entries and exits; None costs nothing. ``iret_unblocked_nmi`` is for the
    processor to set while it executes an IRET that ended blocking by NMI.
    """

    intercepts_flow = False
    mnemonics = ROWS.keys()
    holds_nmis = False

    def __init__(self, processor: Processor, observer: Observer | None = None) -> None:
        capabilities = Capabilities(processor.profile.vmx_capabilities)
        self.operation = VmxOperation(
            processor, capabilities, observer=observer, always_saved_msrs=always_saved_msrs(capabilities)
        )
        self.iret_unblocked_nmi = False

    def reset(self) -> None:
        """See `Virtualization.reset`: no VMCS is active, and none that was is written to memory."""
        old = self.operation
        self.operation = VmxOperation(
            old.processor,
            old.capabilities,
            observer=old.observer,
            always_saved_msrs=old.always_saved_msrs,
            transitions=old.transitions,
        )

    # State, for reading

    @property
    def non_root(self) -> bool:
        """VMX non-root operation: a guest is running."""
        return self.operation.non_root

    @property
    def interrupts_ignore_if(self) -> bool:
        """See `Virtualization.interrupts_ignore_if`."""
        return interrupts_ignore_if(self.operation)

    @property
    def holds_interrupts(self) -> bool:
        """See `Virtualization.holds_interrupts`: only VM entry makes the shutdown state one of the registers'."""
        return self.operation.processor.state.activity is Activity.SHUTDOWN

    @property
    def transitions(self) -> int:
        """How many VM entries and VM exits there have been."""
        return self.operation.transitions

    @property
    def in_vmx_operation(self) -> bool:
        """Between VMXON and VMXOFF."""
        return self.operation.vmxon_pointer is not None

    @property
    def current_vmcs(self) -> Vmcs | None:
        """The current VMCS, for reading and for direct changes by tools; None if there is none."""
        active = self.operation.current
        return active.vmcs if active else None

    @property
    def current_pointer(self) -> int:
        """The current-VMCS pointer; all ones without a current VMCS."""
        return self.operation.current_pointer

    @property
    def last_failure(self) -> EntryFailure | None:
        """Why the last failing VM entry failed."""
        return self.operation.last_failure

    def explain(self) -> list[Violation]:
        """Every rule that VM entry through the current VMCS would break now; empty if there is no current VMCS."""
        active = self.operation.current
        if active is None:
            return []
        context = self.operation.new_context(active)
        context.launching = active.vmcs.launch_state is LaunchState.CLEAR
        context.host_long_mode = self.operation.processor.state.long_mode
        return explain(context)

    # VMX instructions, called from Python. RFLAGS and state change as for guest code, but RIP stays.

    def vmxon(self, address: int) -> Outcome:
        """VMXON with the VMXON region at physical ``address``."""
        return execute_directly(self.operation, "VMXON", lambda: instructions.vmxon(self.operation, address))

    def vmxoff(self) -> Outcome:
        """VMXOFF."""
        return execute_directly(self.operation, "VMXOFF", lambda: instructions.vmxoff(self.operation))

    def vmclear(self, address: int) -> Outcome:
        """VMCLEAR of the VMCS at physical ``address``."""
        return execute_directly(self.operation, "VMCLEAR", lambda: instructions.vmclear(self.operation, address))

    def vmptrld(self, address: int) -> Outcome:
        """VMPTRLD of the VMCS at physical ``address``."""
        return execute_directly(self.operation, "VMPTRLD", lambda: instructions.vmptrld(self.operation, address))

    def vmptrst(self) -> Outcome:
        """VMPTRST; the pointer is the value of the outcome."""
        return execute_directly(self.operation, "VMPTRST", lambda: instructions.vmptrst(self.operation))

    def vmread(self, field: Field | int) -> Outcome:
        """VMREAD of a field or encoding; what it reads is the value of the outcome."""
        encoding = field.encoding if isinstance(field, Field) else field
        return execute_directly(
            self.operation, "VMREAD", lambda: instructions.vmread(self.operation, encoding), encoding
        )

    def vmwrite(self, field: Field | int, value: int) -> Outcome:
        """VMWRITE of a 64-bit ``value`` to a field or encoding."""
        encoding = field.encoding if isinstance(field, Field) else field
        return execute_directly(
            self.operation,
            "VMWRITE",
            lambda: instructions.vmwrite(self.operation, encoding, lambda: value & MASK64),
            encoding,
        )

    def vmlaunch(self) -> Outcome:
        """VMLAUNCH."""
        return execute_directly(self.operation, "VMLAUNCH", lambda: enter(self.operation, launching=True))

    def vmresume(self) -> Outcome:
        """VMRESUME."""
        return execute_directly(self.operation, "VMRESUME", lambda: enter(self.operation, launching=False))

    def vmcall(self) -> Outcome:
        """VMCALL."""
        return execute_directly(self.operation, "VMCALL", lambda: instructions.vmcall(self.operation))

    def invept(self, kind: int, eptp: int = 0) -> Outcome:
        """INVEPT of type ``kind`` with a descriptor that names ``eptp``."""
        return execute_directly(
            self.operation, "INVEPT", lambda: instructions.invept(self.operation, kind, lambda: eptp)
        )

    def invvpid(self, kind: int, vpid: int = 0, linear: int = 0) -> Outcome:
        """INVVPID of type ``kind`` with a descriptor of ``vpid`` (64 bits, the upper 48 reserved) and ``linear``."""
        descriptor = linear << 64 | vpid
        return execute_directly(
            self.operation, "INVVPID", lambda: instructions.invvpid(self.operation, kind, lambda: descriptor)
        )

    def vmfunc(self, function: int, index: int) -> Outcome:
        """VMFUNC with EAX = ``function`` and ECX = ``index``."""
        return execute_directly(self.operation, "VMFUNC", lambda: vmfunc(self.operation, function, index, None))

    def exit(self, record: VmExit) -> Outcome:
        """Perform the VM exit that ``record`` describes; non-root only. For tools that stand in for a guest."""
        return self._exit(record)

    # The seam

    def execute(self, instruction: Instruction) -> bool:
        """See `Virtualization.execute`."""
        return execute_instruction(self.operation, instruction)

    def shortcut(self, instruction: Instruction) -> Callable[[], bool] | None:
        """See `Virtualization.shortcut`."""
        return shortcut(self.operation, instruction)

    def is_disabled(self, instruction: Instruction) -> bool:
        """See `Virtualization.is_disabled`."""
        needed = _ENABLED_BY.get(instruction.mnemonic)
        view = self.operation.view
        return needed is not None and view is not None and not (view.secondary | view.tertiary << _TERTIARY) & needed

    def intercept(self, operation: Operation, instruction: Instruction) -> bool:
        """See `Virtualization.intercept`."""
        vmx = self.operation
        active, view = self._running()
        guest = Guest(active.vmcs.values, view, vmx.processor.memory, vmx.processor.state)
        record = exit_of(guest, operation, instruction)
        if record is None:
            return (
                pause_loop.virtualize(vmx, operation, instruction)
                or apic_instructions.virtualize(vmx, operation, instruction)
                or (view.tertiary != 0 and msr_virtualization.virtualize(vmx, operation, instruction))
            )
        if type(operation) is TaskSwitch:
            record = events.task_switch_exit(vmx, record, operation.delivering)
        elif type(operation) is WriteMsrList:
            active.vmcs[f.MSR_DATA] = operation.value
        self._exit(record)
        return True

    def control_register_written(self, number: int) -> None:
        """VMX has exits before writes, none after them."""

    def efer_written(self) -> None:
        """VMX has exits before writes, none after them."""

    def intercept_event(self, event: Event, fault: Fault | None) -> bool:
        """See `Virtualization.intercept_event`."""
        return self._exit_if(events.event_exit(self.operation, event, fault))

    def delivery_fault(self, delivering: Event, fault: Fault | None) -> bool:
        """See `Virtualization.delivery_fault`."""
        return self._exit_if(events.delivery_exit(self.operation, delivering, fault), delivering)

    def second_level_fault(self, fault: SecondLevelFault, delivering: Event | None) -> bool:
        """See `Virtualization.second_level_fault`."""
        if virtualization_exception.convert(self.operation, fault, delivering):
            exception = Fault(Vector.VE)
            event = Event.from_fault(exception)
            if self.intercept_event(event, exception):
                return True
            self.operation.processor.deliver(event)
            return False
        if isinstance(fault, EptMisconfiguration) and self.operation.observer is not None:
            self.operation.observer.ept_misconfiguration(fault)
        return self._exit_if(events.second_level_exit(self.operation, fault, delivering), delivering)

    def virtualize_access(self, refused: RefusedInstruction) -> SecondLevelFault | None:
        """See `Virtualization.virtualize_access`."""
        access = refused.access
        if isinstance(access, SubPageWrite):
            return sub_page.virtualize(self.operation, refused, access)
        apic_access.virtualize(self.operation, refused, access)
        return None

    @property
    def init_is_blocked(self) -> bool:
        """INIT is blocked in VMX root operation."""
        return self.in_vmx_operation and not self.non_root

    def init(self) -> bool:
        """See `Virtualization.init`."""
        if self.operation.processor.state.activity is not Activity.WAIT_FOR_SIPI:
            self._exit(VmExit(Reason.INIT_SIGNAL))
        return True

    def start_up(self, vector: int) -> bool:
        """See `Virtualization.start_up`."""
        self._exit(VmExit(Reason.STARTUP_IPI, qualification=vector))
        return True

    def boundary(self) -> bool:
        """See `Virtualization.boundary`."""
        self.iret_unblocked_nmi = False
        if not self.operation.non_root:
            return False
        due = boundary_event(self.operation)
        if isinstance(due, Event):
            self.operation.processor.deliver(due)
            return True
        return self._exit_if(due)

    def next_deadline(self) -> int | None:
        """See `Virtualization.next_deadline`."""
        return self.operation.timer_deadline

    def wants_boundary(self) -> bool:
        """See `Virtualization.wants_boundary`."""
        return wants_boundary(self.operation)

    def wants_interrupt_window(self) -> bool:
        """See `Virtualization.wants_interrupt_window`."""
        return wants_interrupt_window(self.operation)

    def enter_smm(self) -> SmmSuspension | None:
        """See `Virtualization.enter_smm`."""
        return smm.suspend(self.operation)

    def leave_smm(self, suspended: tuple[int, ...]) -> None:
        """See `Virtualization.leave_smm`."""
        smm.resume(self.operation, suspended)

    def read_control_register(self, number: int) -> int:
        """See `Virtualization.read_control_register`."""
        active, _ = self._running()
        values, state = active.vmcs.values, self.operation.processor.state
        if number == 0:
            mask = values[_CR0_MASK]
            return state.cr0 & ~mask | values[_CR0_SHADOW] & mask
        mask = values[_CR4_MASK]
        return state.cr4 & ~mask | values[_CR4_SHADOW] & mask

    def merge_control_register(self, number: int, value: int) -> int:
        """See `Virtualization.merge_control_register`."""
        active, _ = self._running()
        values, state = active.vmcs.values, self.operation.processor.state
        current, mask = (state.cr0, values[_CR0_MASK]) if number == 0 else (state.cr4, values[_CR4_MASK])
        return current & mask | value & ~mask

    def control_register_fixed_ok(self, number: int, value: int) -> bool:
        """See `Virtualization.control_register_fixed_ok`."""
        return self.operation.vmxon_pointer is None or self.operation.fixed_bits_ok(number, value)

    def iret_unblocks_nmi(self) -> bool:
        """See `Virtualization.iret_unblocks_nmi`.

        Spec: SDM Vol. 3, "VMX Non-Root Operation", "Changes to Instruction Behavior in VMX Non-Root Operation" (IRET).
        """
        _, view = self._running()
        return not view.pin & c.NMI_EXITING.mask or bool(view.pin & c.VIRTUAL_NMIS.mask)

    def guest_tsc(self, tsc: int) -> int:
        """See `Virtualization.guest_tsc`."""
        view = self.operation.view
        if view is None:
            return tsc
        if view.tsc_multiplier is not None:
            tsc = tsc * view.tsc_multiplier >> _TSC_FRACTION_BITS
        return (tsc + view.tsc_offset) & MASK64

    # Behind the seam

    def _running(self) -> tuple[ActiveVmcs, ControlView]:
        active, view = self.operation.current, self.operation.view
        assert active is not None and view is not None, "asked about a guest while none is running"
        return active, view

    def _exit(self, record: VmExit) -> Outcome:
        return perform_exit(self.operation, record)

    def _exit_if(self, record: VmExit | None, delivering: Event | None = None) -> bool:
        if record is None:
            return False
        if self.iret_unblocked_nmi and delivering is None:
            events.note_nmi_unblocking(self._running()[1], record)
        self._exit(record)
        return True
