"""What a logical processor consists of, and what it offers to its instructions and to its virtualization extension.

Here outcomes are committed: results of instructions, exceptions, events and their delivery, the passing of time. The
run loop around it is in `vtx.x86.processor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from attrs import evolve, frozen

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SIZE
from vtx.events import Access
from vtx.x86 import user_interrupts, watch
from vtx.x86.decode import MAX_INSTRUCTION_LENGTH, Instruction, decode, is_cut_short
from vtx.x86.double_fault import Delivered, Intercepted, TripleFault, deliver_with_faults
from vtx.x86.event import Event, EventKind
from vtx.x86.execution import ExecutionEngine
from vtx.x86.fred import is_enabled
from vtx.x86.instructions.tasks import task_switch_hooks
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Mmu
from vtx.x86.monitor import Monitor, Wait
from vtx.x86.msr_table import IA32_STAR
from vtx.x86.msrs import (
    MsrFile,
    bind_clock,
    bind_control_flow,
    bind_effective_frequency,
    bind_fred,
    bind_protection_keys,
    bind_registers,
    tsc_of,
)
from vtx.x86.outcome import Exited, Fault, InstructionAborted, Vector
from vtx.x86.platform import Platform
from vtx.x86.profile import Profile
from vtx.x86.second_level import AccessKind, SecondLevelFault
from vtx.x86.spinning import Spin
from vtx.x86.state import MASK32, MASK64, Activity, CpuState, Rflags, Shadow
from vtx.x86.task import NO_HOOKS
from vtx.x86.timing import EVENT_TICKS, TICKS_PER_BYTE
from vtx.x86.tracing import ProcessorTracing
from vtx.x86.virtualization import Virtualization
from vtx.x86.watch import PENDING_SINGLE_STEP

_TF: Final = int(Rflags.TF)
_RF: Final = int(Rflags.RF)


@frozen
class Halt:
    """Why `LogicalProcessor.run` returned although time was left.

    ``shutdown`` tells a processor that shut down from one that waits for an interrupt that will never come.
    """

    reason: str
    shutdown: bool


class ProcessorCore:
    """A processor with its registers, MSRs, MMU and engine. Implements `Processor`.

    ``engine_factory`` makes the engine for (memory, client). Set ``virtualization`` before running.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        profile: Profile,
        platform: Platform,
        engine_factory: Callable[[PhysicalMemory, Any], ExecutionEngine],
        *,
        index: int = 0,
        count: int = 1,
        seed: int = 0,
    ) -> None:
        self.index = index
        self.count = count
        self.state = CpuState()
        self.memory = memory
        self.profile = profile
        self.platform = platform
        self.msrs = MsrFile(profile, bootstrap=index == 0)
        page1gb, width = profile.has("PAGE1GB"), profile.physical_address_width
        self.mmu = Mmu(memory, width, page1gb=page1gb, amd=profile.is_amd)
        self.virtualization: Virtualization | None = None
        self.tracing: ProcessorTracing | None = None
        self.random_state = seed & MASK64
        self.halt: Halt | None = None
        self.spin = Spin()
        self.monitor: Monitor | None = None
        self.wait: Wait | None = None
        self.retired = 0
        self.halted = 0  # ticks
        self._nmi = False
        self._extra_ticks = 0
        self._fruitless, self._noted_at = 0, -1  # events in a row with no instruction between them
        self.reload = True
        bind_registers(self.msrs, lambda: self.state, self.control_registers_written)
        bind_control_flow(self.msrs, lambda: self.state, self.changed_system_state)
        bind_fred(self.msrs, lambda: self.state)
        bind_protection_keys(self.msrs, self._protection_keys_written)
        bind_clock(self.msrs, self.observed_time, lambda: None)
        bind_effective_frequency(self.msrs, lambda: self.now() - self.halted)
        self.engine = engine_factory(memory, self)
        self.mmu.flush_engine = self.engine.flush

    # Time.

    def now(self) -> int:
        """Ticks since power-up, exact to the current instruction."""
        return self.engine.elapsed() * TICKS_PER_BYTE + self._extra_ticks

    def charge(self, ticks: int) -> None:
        """Let time pass without executing code."""
        self._extra_ticks += ticks

    def tsc(self) -> int:
        """The time-stamp counter without any guest offset."""
        return tsc_of(self.msrs, self.now())

    def observed_time(self) -> int:
        """`now`, when software looks: never before what another processor has seen."""
        return self.now()

    def read_tsc(self) -> int:
        """The time-stamp counter, when software looks."""
        return tsc_of(self.msrs, self.observed_time())

    @property
    def instructions(self) -> int:
        """Instructions executed since power-up, by the engine and by the model."""
        return self.engine.instructions() + self.retired

    def all_mmus(self) -> Iterable[Mmu]:
        """The MMUs that a broadcast of this processor reaches: its own and those of all others."""
        return (self.mmu,)

    # Ports.

    def port_read(self, port: int, size: int) -> int:
        """Read an I/O port; all checks have been made."""
        value = self.platform.port_read(port, size)
        self._note_port_breakpoints(port, size)
        if self.tracing is not None:
            self.tracing.port(port, size, Access.READ, value)
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write an I/O port; all checks have been made."""
        self._note_port_breakpoints(port, size)
        if self.tracing is not None:
            self.tracing.port(port, size, Access.WRITE, value)
        self.platform.port_write(port, size, value)

    def _note_port_breakpoints(self, port: int, size: int) -> None:
        """An IN, OUT, INS or OUTS is completing: its I/O breakpoints become pending."""
        hits = watch.port_hits(self.state, port, size)
        if hits and not watch.are_discarded(self.state, self.profile):
            self.state.pending_debug |= hits | watch.ENABLED_BREAKPOINT

    # Processor.

    def load_control_state(self) -> None:
        """Registers beyond GPRs, RIP and RFLAGS changed."""
        self.reload = True
        self.mmu.update(self.state)

    def _protection_keys_written(self, value: int) -> None:
        """IA32_PKRS has a new value."""
        self.mmu.pkrs = value
        self.mmu.update(self.state)

    def control_registers_written(self) -> None:
        """CR0, CR4, IA32_EFER or a segment base was written by software."""
        self.reload = True
        self.mmu.controls_written(self.state)

    def interrupt_pending(self) -> bool:
        """Whether an interrupt waits, ignoring RFLAGS.IF."""
        return self.platform.interrupt_pending()

    def acknowledge_interrupt(self) -> int:
        """Acknowledge it and return its vector."""
        return self.platform.acknowledge_interrupt()

    def end_of_interrupt(self) -> None:
        """Dismiss the interrupt in service from the local APIC."""
        self.platform.end_of_interrupt()

    def send_interrupt(self, vector: int, destination: int) -> None:
        """Have the local APIC, if there is one, send a fixed interrupt to the APIC ID ``destination``."""

    def nmi(self) -> None:
        """A non-maskable interrupt arrives."""
        self._nmi = True

    def nmi_pending(self) -> bool:
        """Whether a non-maskable interrupt waits."""
        return self._nmi

    def acknowledge_nmi(self) -> None:
        """It is being delivered."""
        self._nmi = False

    def task_priority(self) -> int:
        """CR8."""
        return self.platform.task_priority

    def set_task_priority(self, value: int) -> None:
        """Write CR8."""
        self.platform.task_priority = value

    def shut_down(self, reason: str) -> None:
        """Enter the shutdown state."""
        self.state.activity = Activity.SHUTDOWN
        self.reload = True
        self.halt = Halt(reason, shutdown=True)

    # Events.

    def note_event(self) -> None:
        """Something came for the processor to act on, to no effect if no instruction was executed since the last."""
        instructions = self.instructions
        self._fruitless = self._fruitless + 1 if instructions == self._noted_at else 0
        self._noted_at = instructions

    def deliver(self, event: Event) -> None:
        """Deliver ``event``, through the IDT or by FRED, or take it as the user-interrupt notification it is."""
        if user_interrupts.is_notification(self.state, self.msrs.values, event):
            self._process_notification(event)
            return
        self.reload = True
        self.monitor = None
        self.note_event()
        extension = self.virtualization
        on_fault = extension.delivery_fault if extension is not None and extension.non_root else None
        hooks = NO_HOOKS if self.state.long_mode else task_switch_hooks(self, None, event)
        star = self.msrs.values[IA32_STAR] if is_enabled(self.state) else 0
        outcome = deliver_with_faults(self.state, self.mmu, event, on_fault, hooks=hooks, star=star)
        self.mmu.update(self.state)
        self.charge(EVENT_TICKS)
        if isinstance(outcome, Intercepted) and isinstance(outcome.cause, SecondLevelFault):
            assert extension is not None
            self._second_level_fault(extension, outcome.cause, outcome.event)
        elif isinstance(outcome, Delivered):
            if self.tracing is not None:
                self.tracing.delivered(outcome.event)
        elif isinstance(outcome, TripleFault):
            if extension is not None and extension.non_root and extension.delivery_fault(event, None):
                return
            self.shut_down(f"triple fault at {self._where()}: {outcome.fault} during delivery of a double fault")

    def _process_notification(self, event: Event) -> None:
        """User-interrupt notification processing; what goes wrong does so during delivery of ``event``."""
        self.reload = True
        self.note_event()
        if self.state.activity is Activity.MWAIT:
            self.state.activity = Activity.ACTIVE
        try:
            requests = user_interrupts.process_notification(self.state, self.mmu, self.msrs.values)
        except InstructionAborted as aborted:
            self._abort_notification(event, aborted.cause)
            return
        self.charge(EVENT_TICKS)
        if self.tracing is not None:
            self.tracing.user_interrupts_requested(requests)

    def _abort_notification(self, event: Event, cause: object) -> None:
        extension = self.virtualization
        if isinstance(cause, SecondLevelFault):
            assert extension is not None
            self._second_level_fault(extension, cause, event)
        elif isinstance(cause, Fault):
            if self.tracing is not None:
                self.tracing.exception(cause)
            if extension is None or not extension.non_root or not extension.delivery_fault(event, cause):
                self.deliver(Event.from_fault(cause, nested=is_enabled(self.state)))

    def deliver_user_interrupt(self) -> bool:
        """Deliver a user interrupt if one is due and not blocked; CR4.UINTR is set. Whether there was one."""
        state, values = self.state, self.msrs.values
        if not user_interrupts.is_due(state, values) or user_interrupts.is_blocked(state):
            return False
        self.reload = True
        self.note_event()
        try:
            vector = user_interrupts.deliver(state, self.mmu, values)
        except InstructionAborted as aborted:
            cause = aborted.cause
            self.abort(evolve(cause, asynchronous=True) if isinstance(cause, SecondLevelFault) else cause)
            return True
        self.charge(EVENT_TICKS)
        if self.tracing is not None:
            self.tracing.user_interrupt_delivered(vector)
        return True

    def raise_fault(self, fault: Fault) -> None:
        """Raise an exception at the current instruction: a VM exit, or delivery."""
        if self.tracing is not None:
            self.tracing.exception(fault)
        event = Event.from_fault(fault)
        extension = self.virtualization
        if extension is not None and extension.non_root and extension.intercept_event(event, fault):
            self.reload = True
            return
        self.deliver(event)

    def raise_software(self, event: Event) -> None:
        """Deliver what INT n, INT1, INT3 or INTO asks for."""
        extension = self.virtualization
        exits = event.kind is not EventKind.SOFTWARE_INTERRUPT
        if exits and extension is not None and extension.non_root and extension.intercept_event(event, None):
            self.reload = True
            return
        self.deliver(event)

    def abort(self, cause: object) -> None:
        """Commit what unwound an instruction: an exception or an event of the second level."""
        if isinstance(cause, Fault):
            self.raise_fault(cause)
        elif isinstance(cause, Exited):
            self.reload = True
        elif isinstance(cause, SecondLevelFault):
            self.reload = True
            assert self.virtualization is not None
            self._second_level_fault(self.virtualization, cause, None)
        else:
            raise TypeError(f"an instruction was aborted with {cause!r}")

    def _second_level_fault(self, extension: Virtualization, fault: SecondLevelFault, delivering: Event | None) -> None:
        if self.tracing is not None:
            self.tracing.second_level_fault(fault)
        extension.second_level_fault(fault, delivering)

    def _where(self) -> str:
        return f"{self.state.segments[1].selector:#x}:{self.state.rip:#x}"

    # What instruction handlers use.

    def intercepts(self, operation: object, instruction: Instruction) -> bool:
        """Whether the virtualization extension took care of ``operation`` (VM exit or virtualized)."""
        extension = self.virtualization
        return extension is not None and extension.non_root and extension.intercept(operation, instruction)  # type: ignore[arg-type]

    def retire(self, instruction: Instruction) -> None:
        """Commit an instruction that completed: RIP, RF, the interrupt shadow, single-step."""
        state = self.state
        self.advance_rip(instruction.length)
        if state.rflags & (_TF | _RF):
            if state.rflags & _TF:
                state.pending_debug |= PENDING_SINGLE_STEP
            state.rflags &= ~_RF
        state.shadow = Shadow.NONE

    def completed(self, *, single_step: bool) -> None:
        """An instruction that set RIP itself completed; ``single_step`` as RFLAGS.TF was when it began."""
        if single_step:
            self.state.pending_debug |= PENDING_SINGLE_STEP
        self.state.shadow = Shadow.NONE

    def advance_rip(self, length: int) -> None:
        """Move RIP past an instruction of ``length`` bytes."""
        state = self.state
        state.rip = (state.rip + length) & (MASK64 if state.in_64_bit_mode else MASK32)

    def changed_system_state(self) -> None:
        """A handler changed segments, descriptor tables or other state the engine loads only on request."""
        self.reload = True

    def fetch(self) -> Instruction | None:
        """Fetch and decode the instruction at RIP; None if the bytes are no instruction.

        Raises `InstructionAborted` with the fault of the fetch.
        """
        state, bits = self.state, self.state.code_bits
        most = MAX_INSTRUCTION_LENGTH
        if bits != 64 and state.cs.limit - state.rip < most:
            most = state.cs.limit - state.rip + 1
            if most <= 0:
                raise InstructionAborted(Fault(Vector.GP, 0))
        return self._decode_at(state.linear_rip, bits, most, user=state.cpl == 3)

    def _decode_at(self, linear: int, bits: int, most: int, *, user: bool) -> Instruction | None:
        """The instruction in the first ``most`` bytes at ``linear``, all that the code segment holds."""
        room = PAGE_SIZE - (linear & PAGE_OFFSET_MASK)
        physical = self.mmu.translate(linear, AccessKind.EXECUTE, user=user)
        code = self.memory.read(physical, min(room, most))
        instruction = decode(code, bits)
        if instruction is None and room < most:
            following = linear + room if bits == 64 else linear + room & MASK32
            physical = self.mmu.translate(following, AccessKind.EXECUTE, user=user)
            code += self.memory.read(physical, most - room)
            instruction = decode(code, bits)
        if instruction is None and most < MAX_INSTRUCTION_LENGTH and is_cut_short(code, bits):
            raise InstructionAborted(Fault(Vector.GP, 0))
        return instruction
