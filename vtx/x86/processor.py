"""One logical processor: the run loop around the engine, and the one place where outcomes are committed.

The engine runs ordinary instructions; everything else ends up here: instructions the model executes (see
`vtx.x86.instructions`), exceptions, refused translations, interrupts, time. Before each run the loop looks, in the
manual's order, at what is pending between instructions.

Spec: SDM Vol. 3, "Priority Among Concurrent Events".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import frozen

from vtx.addresses import PAGE_OFFSET_MASK, PAGE_SIZE
from vtx.events import Access
from vtx.x86 import refusal, watch
from vtx.x86.decode import MAX_INSTRUCTION_LENGTH, Instruction, decode
from vtx.x86.double_fault import Delivered, Intercepted, TripleFault, deliver_with_faults
from vtx.x86.event import Event, EventKind
from vtx.x86.execution import (
    BudgetSpent,
    EngineEvent,
    ExceptionTrap,
    ExecutionEngine,
    InstructionTrap,
    RefusedFill,
)
from vtx.x86.instructions.table import HANDLERS, has_earlier_fault
from vtx.x86.instructions.tasks import task_switch_hooks
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Grant, Mmu, Refusal
from vtx.x86.msrs import MsrFile, bind_clock, bind_registers, tsc_of
from vtx.x86.outcome import Exited, Fault, InstructionAborted, Vector
from vtx.x86.platform import Platform
from vtx.x86.profile import Profile
from vtx.x86.second_level import AccessKind, SecondLevelFault
from vtx.x86.state import MASK32, MASK64, Activity, CpuState, Rflags, Shadow
from vtx.x86.timing import EVENT_TICKS, IDLE_TICKS, TICKS_PER_BYTE, TRANSITION_TICKS, TRAP_TICKS
from vtx.x86.tracing import ProcessorTracing
from vtx.x86.virtualization import Virtualization

# Layout of CpuState.pending_debug, which is that of the VMCS field.
_PENDING_BS: Final = 1 << 14
_DELIVERABLE_DEBUG: Final = 1 << 12 | _PENDING_BS
_DEBUG_CAUSES: Final = 0xF | _PENDING_BS  # the bits it shares with DR6
_IF: Final = int(Rflags.IF)
_TF: Final = int(Rflags.TF)
_RF: Final = int(Rflags.RF)


@frozen
class Halt:
    """Why `LogicalProcessor.run` returned although time was left.

    ``shutdown`` tells a processor that shut down from one that waits for an interrupt that will never come.
    """

    reason: str
    shutdown: bool


class LogicalProcessor:
    """A processor with its registers, MSRs, MMU and engine. Implements `Processor` and `EngineClient`.

    ``engine_factory`` makes the engine for (memory, client). Set ``virtualization`` before running.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        profile: Profile,
        platform: Platform,
        engine_factory: Callable[[PhysicalMemory, LogicalProcessor], ExecutionEngine],
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
        self.mmu = Mmu(memory, profile.physical_address_width, page1gb=profile.has("PAGE1GB"))
        self.virtualization: Virtualization | None = None
        self.tracing: ProcessorTracing | None = None
        self.random_state = seed & MASK64
        self.halt: Halt | None = None
        self.stop_requested = False
        self.spinning = (0, 0)  # RIP of the last PAUSE and how often it has been repeated
        self._gives_way = False
        self.instruction_limit: int | None = None
        self.retired = 0
        self._nmi = False
        self._extra_ticks = 0
        self.reload = True
        self.step_next = False
        self._approached: int | None = None  # the deadline that whole blocks would overshoot
        self.transitions_seen = 0  # VM entries and VM exits whose time has passed
        self._planned: int | None = None  # the deadline of the current run, and the caller's part in it
        self._until: int | None = None
        self._planned_waiting = False  # whether the current run knew of an interrupt that waits
        self.implicit_pages: set[int] = set()
        bind_registers(self.msrs, lambda: self.state, self.control_registers_written)
        bind_clock(self.msrs, self.now, lambda: None)
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

    @property
    def instructions(self) -> int:
        """Instructions executed since power-up, by the engine and by the model."""
        return self.engine.instructions() + self.retired

    # EngineClient.

    def fill(self, linear_page: int, kind: AccessKind, cpl: int, ac: bool) -> Grant | Refusal:
        """Translate a page for the engine."""
        return self.mmu.fill(linear_page, kind, cpl, ac, implicit=linear_page in self.implicit_pages)

    def port_in(self, port: int, size: int, linear: int, bits: int, cpl: int) -> int | None:
        """A port read the engine may make on the spot: outside non-root operation, at CPL 0."""
        if cpl or self._needs_port_checks(linear, bits):
            return None
        return self.port_read(port, size)

    def port_out(self, port: int, size: int, value: int, linear: int, bits: int, cpl: int) -> bool:
        """A port write the engine may make on the spot."""
        if cpl or self._needs_port_checks(linear, bits):
            return False
        self.port_write(port, size, value)
        self.device_written()
        return True

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

    def device_written(self) -> None:
        """The running code wrote to a device: stop soon if that changed what the current run was planned for."""
        due = self._next_deadline(self._until)
        if self.stop_requested or due != self._planned or self._interrupt_waits() != self._planned_waiting:
            self.engine.request_stop()

    def _needs_port_checks(self, linear: int, bits: int) -> bool:
        extension = self.virtualization
        if extension is not None and extension.non_root:
            return True
        # The engine calls back for INS and OUTS too, whose memory side is the model's.
        try:
            instruction = self._decode_at(linear, bits, user=False)
        except InstructionAborted:
            return True
        return instruction is None or instruction.memory is not None

    # Processor.

    def load_control_state(self) -> None:
        """Registers beyond GPRs, RIP and RFLAGS changed."""
        self.reload = True
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
        self.halt = Halt(reason, shutdown=True)

    def deliver(self, event: Event) -> None:
        """Deliver ``event`` through the IDT."""
        self.reload = True
        extension = self.virtualization
        on_fault = extension.delivery_fault if extension is not None and extension.non_root else None
        hooks = task_switch_hooks(self, None, event)
        outcome = deliver_with_faults(self.state, self.mmu, event, on_fault, hooks=hooks)
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
                state.pending_debug |= _PENDING_BS
            state.rflags &= ~_RF
        state.shadow = Shadow.NONE

    def completed(self, *, single_step: bool) -> None:
        """An instruction that set RIP itself completed; ``single_step`` as RFLAGS.TF was when it began."""
        if single_step:
            self.state.pending_debug |= _PENDING_BS
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
        state = self.state
        return self._decode_at(state.linear_rip, state.code_bits, user=state.cpl == 3)

    def _decode_at(self, linear: int, bits: int, *, user: bool) -> Instruction | None:
        room = PAGE_SIZE - (linear & PAGE_OFFSET_MASK)
        physical = self.mmu.translate(linear, AccessKind.EXECUTE, user=user)
        code = self.memory.read(physical, min(room, MAX_INSTRUCTION_LENGTH))
        instruction = decode(code, bits)
        if instruction is None and room < MAX_INSTRUCTION_LENGTH:
            physical = self.mmu.translate(linear + room, AccessKind.EXECUTE, user=user)
            code += self.memory.read(physical, MAX_INSTRUCTION_LENGTH - room)
            instruction = decode(code, bits)
        return instruction

    # The run loop.

    def limit_instructions(self, most: int | None) -> None:
        """Let `run` return after ``most`` instructions since power-up, or never for that reason."""
        self.instruction_limit = most
        self._approached = None  # it may have been the former limit that was close

    def run(self, until: int | None = None) -> None:
        """Run until tick ``until`` or the instruction limit, or until ``halt`` or ``stop_requested`` is set."""
        self._gives_way = False
        while not self.stop_requested and self.halt is None:
            if (self._gives_way or (until is not None and self.now() >= until)) and not self._takes_nmi_next():
                return
            if self.at_instruction_limit:
                return
            self.run_once(until)

    def _takes_nmi_next(self) -> bool:
        """Whether an NMI is taken at this very boundary: one that comes during another's turn would merge with it."""
        state = self.state
        return self._nmi and not state.nmi_blocked and not state.shadow and state.activity in _WAKEABLE

    # Among other processors (`vtx.scheduler.Scheduled`).

    @property
    def awake(self) -> bool:
        """Whether it executes instructions or may take an event that is pending."""
        state = self.state
        if state.activity is Activity.ACTIVE:
            return True
        if state.activity is not Activity.HLT:
            return False
        extension = self.virtualization
        non_root = extension is not None and extension.non_root
        timer = extension.next_deadline() if extension is not None else None
        return bool(
            (self._nmi and (non_root or not state.nmi_blocked))
            or state.pending_debug & _DELIVERABLE_DEBUG
            or ((state.rflags & _IF or non_root) and self.platform.interrupt_pending())
            or (extension is not None and non_root and extension.wants_boundary())
            or (timer is not None and timer <= self.now())
        )

    @property
    def at_instruction_limit(self) -> bool:
        """Whether as many instructions as allowed have been executed."""
        return self.instruction_limit is not None and self.instructions >= self.instruction_limit

    @property
    def finished(self) -> bool:
        """Whether it must not run any more."""
        return self.stop_requested or self.halt is not None or self.at_instruction_limit

    def give_way(self) -> None:
        """Make `run` return soon."""
        self._gives_way = True
        self.engine.request_stop()

    def sleep_until(self, tick: int) -> None:
        """Let time pass without executing."""
        if tick > self.now():
            self.charge(tick - self.now())
        self.platform.advance(self.now())

    def wake_time(self) -> int | None:
        """The tick at which something may wake it by itself, or None."""
        return self._next_deadline(None) if self.state.activity in _WAKEABLE else None

    def run_once(self, until: int | None = None) -> None:
        """Handle what is pending between instructions, then run the engine to its next event."""
        extension = self.virtualization
        if extension is not None and extension.transitions != self.transitions_seen:
            self.charge((extension.transitions - self.transitions_seen) * TRANSITION_TICKS)
            self.transitions_seen = extension.transitions
        self._pass_deadline(self.now())
        if extension is not None and extension.boundary():
            self.reload = True
            return
        if self.state.pending_debug and self._raise_pending_debug():
            return
        if self._accept_interrupt():
            return
        if self.state.activity is not Activity.ACTIVE:
            self._idle(until)
            return
        if watch.is_needed(self.state):
            watch.step(self)
        else:
            self.handle(self._run_engine(until), until)

    def _raise_pending_debug(self) -> bool:
        """Deliver the debug traps of the previous instruction, unless MOV SS holds them back."""
        state = self.state
        pending = state.pending_debug
        if state.shadow & Shadow.MOV_SS or not pending & _DELIVERABLE_DEBUG:
            return False
        state.pending_debug = 0
        self.raise_fault(Fault(Vector.DB, debug=pending & _DEBUG_CAUSES))
        return True

    def _pass_deadline(self, now: int) -> None:
        deadline = self.platform.next_deadline()
        if deadline is not None and deadline <= now:
            self.platform.advance(now)

    def _next_deadline(self, until: int | None) -> int | None:
        deadlines = [self.platform.next_deadline(), until]
        if self.virtualization is not None:
            deadlines.append(self.virtualization.next_deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _accept_interrupt(self) -> bool:
        state = self.state
        if self._nmi and not state.nmi_blocked and not state.shadow:
            self._nmi = False
            self.deliver(Event(Vector.NMI, EventKind.NMI))
            return True
        if state.rflags & _IF and not state.shadow and self.platform.interrupt_pending():
            vector = self.platform.acknowledge_interrupt()
            if self.tracing is not None:
                self.tracing.interrupt(vector)
            self.deliver(Event(vector, EventKind.EXTERNAL_INTERRUPT))
            return True
        return False

    def _idle(self, until: int | None) -> None:
        deadline = self._next_deadline(until)
        if deadline is None:
            if self.count == 1:
                self.halt = Halt(f"halted at {self._where()} with nothing to wake it", shutdown=False)
            self.give_way()
            self.charge(IDLE_TICKS)
        elif deadline > self.now():
            self.charge(deadline - self.now())

    def _run_engine(self, until: int | None) -> EngineEvent:
        state, extension = self.state, self.virtualization
        self._until = until
        self._planned = deadline = self._next_deadline(until)
        budget = None if deadline is None else max(deadline - self.now(), 0) // TICKS_PER_BYTE
        self._planned_waiting = waiting = self._interrupt_waits()
        watch_if = waiting and not state.rflags & _IF
        step = (
            self.step_next
            or (deadline is not None and deadline == self._approached)
            or (extension is not None and extension.wants_boundary())
            or (waiting and not watch_if)
            or (self._nmi and not state.nmi_blocked)
        )
        reload, self.reload, self.step_next = self.reload, False, False
        limit = None if self.instruction_limit is None else self.instruction_limit - self.retired
        event = self.engine.run(
            state, reload=reload, budget=budget, step=step, watch_if=watch_if, instruction_limit=limit
        )
        self.forget_implicit_accesses()
        return event

    def forget_implicit_accesses(self) -> None:
        """The instruction that was granted implicit supervisor-mode accesses is over; so are the grants."""
        if self.implicit_pages:
            self.implicit_pages.clear()
            self.engine.flush(None)

    def _note_port_breakpoints(self, port: int, size: int) -> None:
        """An IN, OUT, INS or OUTS is completing: its I/O breakpoints become pending."""
        hits = watch.port_hits(self.state, port, size)
        if hits:
            self.state.pending_debug |= hits | watch.ENABLED_BREAKPOINT

    def _interrupt_waits(self) -> bool:
        extension = self.virtualization
        if extension is not None and extension.wants_interrupt_window():
            return True
        return self.platform.interrupt_pending()

    def handle(self, event: EngineEvent, until: int | None = None) -> None:
        """Do what the engine stopped for."""
        if isinstance(event, InstructionTrap):
            self.execute()
        elif isinstance(event, ExceptionTrap):
            if event.vector == Vector.UD:
                self.execute("not known to the engine")
            elif event.vector == Vector.DB:
                self.state.pending_debug |= _PENDING_BS
            elif event.vector == Vector.GP and self.state.cpl and self._has_earlier_fault():
                self.execute("privileged instruction")
            else:
                self.raise_fault(_fault(event))
        elif isinstance(event, RefusedFill):
            refusal.handle(self, event)
        elif isinstance(event, BudgetSpent):
            self._approached = self._next_deadline(until)
            self.step_next = True  # the limit may also be that of instructions

    def _has_earlier_fault(self) -> bool:
        try:
            instruction = self.fetch()
        except InstructionAborted:
            return False
        return instruction is None or has_earlier_fault(instruction)

    def execute(self, why: str = "sensitive instruction") -> None:
        """Execute the instruction at RIP in the model."""
        try:
            instruction = self.fetch()
            if self.tracing is not None:
                self.tracing.intercepted(instruction, why)
            self.charge(TRAP_TICKS)
            if instruction is None:
                raise InstructionAborted(Fault(Vector.UD))
            extension = self.virtualization
            if extension is not None and extension.non_root and extension.is_disabled(instruction):
                raise InstructionAborted(Fault(Vector.UD))
            handler = HANDLERS.get(instruction.mnemonic)
            if handler is not None:
                self.retired += 1
                self._extra_ticks += instruction.length * TICKS_PER_BYTE
                handler(self, instruction)
            elif extension is not None and self._execute_extension(extension, instruction):
                self.retired += 1
                self._extra_ticks += instruction.length * TICKS_PER_BYTE
            else:
                raise InstructionAborted(Fault(Vector.UD))
        except InstructionAborted as aborted:
            self.abort(aborted.cause)

    def _execute_extension(self, extension: Virtualization, instruction: Instruction) -> bool:
        transitions, single_step = extension.transitions, self.state.rflags & _TF
        if not extension.execute(instruction):
            return False
        if extension.transitions != transitions:
            self.reload = True
        elif single_step:
            self.state.pending_debug |= _PENDING_BS
        return True

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

    def native(self, instruction: Instruction, *, osxsave: bool = False) -> None:
        """Let the engine execute the instruction at RIP after all, with CR4.OSXSAVE as it is in the machine."""
        self.retired -= 1  # the engine counts it
        self._extra_ticks -= instruction.length * TICKS_PER_BYTE
        event = self.engine.run(self.state, reload=True, budget=None, step=True, osxsave=osxsave, native=True)
        self.forget_implicit_accesses()
        self.reload = True
        if isinstance(event, InstructionTrap):
            raise InstructionAborted(Fault(Vector.UD))
        self.handle(event)


_WAKEABLE: Final = (Activity.ACTIVE, Activity.HLT)


def _fault(event: ExceptionTrap) -> Fault:
    vector = Vector(event.vector)
    with_code = vector in (Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.AC, Vector.DF)
    return Fault(vector, event.error_code & 0xFFFF if with_code else None)
