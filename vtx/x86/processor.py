"""One logical processor: the run loop around the engine, and the one place where outcomes are committed.

The engine runs ordinary instructions; everything else ends up here: instructions the model executes (see
`vtx.x86.instructions`), exceptions, refused translations, interrupts, time. Before each run the loop looks, in the
manual's order, at what is pending between instructions.

Spec: SDM Vol. 3, "Priority Among Concurrent Events".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vtx.x86 import operand_checks, refusal, user_interrupts, watch
from vtx.x86.bounds import bound_range_exceeded
from vtx.x86.core import Halt, ProcessorCore
from vtx.x86.decode import Instruction
from vtx.x86.event import Event, EventKind
from vtx.x86.execution import (
    ANSWERED,
    CONTINUED,
    NOT_ANSWERED,
    REPLANNED,
    STEP,
    UNPLANNED,
    BudgetSpent,
    EngineEvent,
    ExceptionTrap,
    ExecutionEngine,
    InstructionTrap,
    OperandTrap,
    Place,
    Plan,
    RefusedFill,
)
from vtx.x86.instructions.table import HANDLERS, has_earlier_fault, is_answered, is_quiet
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Basis, Grant, Refusal, Translations
from vtx.x86.monitor import CHECK_TICKS, LONGEST_WAIT, Wait
from vtx.x86.outcome import Exited, Fault, InstructionAborted, Vector
from vtx.x86.platform import Platform
from vtx.x86.profile import Profile
from vtx.x86.second_level import AccessKind
from vtx.x86.spinning import PAUSE_TICKS
from vtx.x86.state import Activity, Rflags, Shadow
from vtx.x86.task import PENDING_TASK_SWITCH
from vtx.x86.timing import IDLE_TICKS, TICKS_PER_BYTE, TRANSITION_TICKS, TRAP_TICKS
from vtx.x86.virtualization import Virtualization
from vtx.x86.watch import PENDING_SINGLE_STEP

MOST_FRUITLESS: Final = 10_000
"""Events in a row after which a limit of instructions counts as reached although no instruction is executed.

A handler that faults as it begins, on a stack that does not move, keeps a processor busy for ever; so does, while it is
halted, a timer whose interrupts go nowhere.
"""

_DELIVERABLE_DEBUG: Final = 1 << 12 | PENDING_SINGLE_STEP | PENDING_TASK_SWITCH
_DEBUG_CAUSES: Final = 0xF | PENDING_SINGLE_STEP | PENDING_TASK_SWITCH  # the bits it shares with DR6
_IF: Final = int(Rflags.IF)
_TF: Final = int(Rflags.TF)
_RF: Final = int(Rflags.RF)
_UINTR: Final = user_interrupts.UINTR


def _capped(budget: int) -> int:
    """A budget that fits the engine's 64 bits: the timer of a device can be due in thousands of years."""
    return min(budget, UNPLANNED)


class LogicalProcessor(ProcessorCore):
    """The processor core with the run loop. Implements `EngineClient` and `vtx.scheduler.Scheduled`."""

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
        super().__init__(memory, profile, platform, engine_factory, index=index, count=count, seed=seed)
        self.stop_requested = False
        self.init_pending = self.smi_pending = False
        self.instruction_limit: int | None = None
        self.step_next = False
        self.transitions_seen = 0  # VM entries and VM exits whose time has passed
        self.implicit_pages: set[int] = set()
        self.plan = Plan()
        self.spins = self.contended = False
        self._gives_way = False
        self._approached: int | None = None  # the deadline that whole blocks would overshoot
        self._planned: int | None = None  # the deadline of the current run, and the caller's part in it
        self._until: int | None = None
        self._planned_waiting = False  # whether the current run knew of an interrupt that waits

    synchronous_ports: frozenset[int] = frozenset()
    """Ports to which a write has an effect on the processor before the next instruction."""

    # EngineClient.

    def fill(self, linear_page: int, kind: AccessKind, cpl: int, ac: bool) -> Grant | Refusal:
        """Translate a page for the engine."""
        return self.mmu.fill(linear_page, kind, cpl, ac, implicit=linear_page in self.implicit_pages)

    def translations(self) -> Translations | None:
        """See `EngineClient.translations`."""
        return self.mmu.translations(self.implicit_pages)

    def basis(self, linear_page: int) -> Basis | None:
        """See `EngineClient.basis`. What is granted for one access only rests on that."""
        return None if self.implicit_pages else self.mmu.basis(linear_page)

    def port_in(self, port: int, size: int, cpl: int) -> int | None:
        """A port read the engine may make on the spot: outside non-root operation, at CPL 0."""
        if self._needs_port_checks(cpl):
            return None
        return self.port_read(port, size)

    def port_out(self, port: int, size: int, value: int, cpl: int) -> bool:
        """A port write the engine may make on the spot; after other ones it must not execute another instruction."""
        if port in self.synchronous_ports or self._needs_port_checks(cpl):
            return False
        self.port_write(port, size, value)
        self.device_written()
        return True

    def device_written(self) -> None:
        """The running code wrote to a device: stop soon if that changed what the current run was planned for."""
        due = self._next_deadline(self._until)
        if self.stop_requested or due != self._planned or self._interrupt_waits() != self._planned_waiting:
            self.engine.request_stop()

    def _needs_port_checks(self, cpl: int) -> bool:
        extension = self.virtualization
        return bool(cpl) or (extension is not None and extension.non_root)

    # The run loop.

    def limit_instructions(self, most: int | None) -> None:
        """Let `run` return after ``most`` instructions since power-up, or never for that reason."""
        self.instruction_limit = most
        self._fruitless = 0
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
        if state.activity is Activity.WAIT_FOR_SIPI:
            return False
        extension = self.virtualization
        non_root = extension is not None and extension.non_root
        timer = extension.next_deadline() if extension is not None else None
        nmi = self._nmi and (non_root or not (state.nmi_blocked or self._holds_nmis()))
        if nmi or (timer is not None and timer <= self.now()):
            return True
        if state.activity is Activity.MWAIT and self._wait_is_over():
            return True
        return state.activity in _WAKEABLE and bool(
            state.pending_debug & _DELIVERABLE_DEBUG
            or (
                (state.rflags & _IF or (extension is not None and extension.interrupts_ignore_if))
                and self._interrupt_due()
            )
            or (extension is not None and non_root and extension.wants_boundary())
        )

    @property
    def at_instruction_limit(self) -> bool:
        """Whether as many instructions as allowed have been executed, or no other ever will, it seems."""
        limit = self.instruction_limit
        return limit is not None and (self.instructions >= limit or self._fruitless >= MOST_FRUITLESS)

    @property
    def finished(self) -> bool:
        """Whether it must not run any more."""
        return self.stop_requested or self.halt is not None or self.at_instruction_limit

    def give_way(self) -> None:
        """Make `run` return soon."""
        self._gives_way = True
        self.engine.request_stop()

    def registers(self) -> tuple[int, ...]:
        """The general-purpose registers."""
        return tuple(self.state.gpr)

    def idle_until(self, tick: int) -> None:
        """Let time pass to where something may wake it."""
        self.note_event()
        self.sleep_until(tick)

    def sleep_until(self, tick: int) -> None:
        """Let time pass without executing."""
        self._sleep(tick - self.now())
        self.platform.advance(self.now())

    def _sleep(self, ticks: int) -> None:
        if ticks > 0:
            self.charge(ticks)
            self.spin.ended += ticks
            if self.state.activity is not Activity.ACTIVE:
                self.halted += ticks

    def wake_time(self) -> int | None:
        """The tick at which something may wake it by itself, or None."""
        if self.state.activity is Activity.WAIT_FOR_SIPI:
            return None
        deadline = self._next_deadline(None)
        if self.state.activity is not Activity.MWAIT:
            return deadline
        look = self.now() + CHECK_TICKS
        if self.wait is not None:
            look = min(look, self.wait.until)
        return look if deadline is None else min(look, deadline)

    def begin_wait(self, *, masked_too: bool, ticks: int = LONGEST_WAIT) -> None:
        """MWAIT was executed: wait, if MONITOR armed something and the wait is not over already (see `Wait`)."""
        monitor, self.monitor, extension = self.monitor, None, self.virtualization
        if monitor is None or self.state.pending_debug or (extension is not None and extension.wants_boundary()):
            return
        self.wait = Wait(monitor, self.now() + ticks, masked_too)
        if not self._wait_is_over():
            self.state.activity = Activity.MWAIT

    def _wait_is_over(self) -> bool:
        wait = self.wait
        return (
            wait is None
            or self.now() >= wait.until
            or wait.monitor.triggered(self.memory)
            or (wait.masked_too and self.platform.interrupt_pending())
        )

    def pause(self) -> None:
        """Let the time of a PAUSE pass; one that is repeated lets other processors run first, if there are any."""
        now, state = self.now(), self.state
        if self.spin.pause(now, state.rip, state.gpr, longer=not self.contended) and self.contended:
            self.spins = self._gives_way = True
        ticks = self.spin.ticks
        if self._planned is not None:
            ticks = min(ticks, max(self._planned - now, PAUSE_TICKS))
        self._extra_ticks += ticks

    def run_once(self, until: int | None = None) -> None:
        """Handle what is pending between instructions, then run the engine to its next event."""
        if not self._is_ready():
            return
        if self.state.activity is Activity.MWAIT and self._wait_is_over():
            self.state.activity = Activity.ACTIVE
        if self.state.activity is not Activity.ACTIVE:
            self._idle(until)
        elif watch.is_needed(self.state):
            watch.step(self)
        else:
            self.handle(self._run_engine(until), until)

    def _is_ready(self) -> bool:
        """Handle what is pending between instructions; whether nothing was, so that the next may execute."""
        if (self.init_pending or self.smi_pending) and self._take_signal():
            return False
        extension = self.virtualization
        if extension is not None and extension.transitions != self.transitions_seen:
            self._extra_ticks += (extension.transitions - self.transitions_seen) * TRANSITION_TICKS
            self.transitions_seen = extension.transitions
        deadline = self.platform.next_deadline()
        if deadline is not None and deadline <= (now := self.now()):
            self.platform.advance(now)
        if extension is not None and extension.boundary():
            self.reload = True
            return False
        if self.state.pending_debug and self._raise_pending_debug():
            return False
        return not self._accept_interrupt()

    def _take_signal(self) -> bool:
        """Act on a pending SMI or INIT unless it is blocked; whether it was acted on."""
        return False

    def _raise_pending_debug(self) -> bool:
        """Deliver the debug traps of the previous instruction, unless MOV SS holds them back."""
        state = self.state
        pending = state.pending_debug
        if state.shadow & Shadow.MOV_SS or not pending & _DELIVERABLE_DEBUG:
            return False
        state.pending_debug = 0
        self.raise_fault(Fault(Vector.DB, debug=pending & _DEBUG_CAUSES))
        return True

    def _next_deadline(self, until: int | None) -> int | None:
        due = self.platform.next_deadline()
        if due is None or (until is not None and until < due):
            due = until
        if self.virtualization is not None:
            timer = self.virtualization.next_deadline()
            if timer is not None and (due is None or timer < due):
                return timer
        return due

    def _accept_interrupt(self) -> bool:
        state = self.state
        if self._nmi and not state.nmi_blocked and not state.shadow and not self._holds_nmis():
            self._nmi = False
            self.deliver(Event(Vector.NMI, EventKind.NMI))
            return True
        if state.rflags & _IF and not state.shadow and self._interrupt_due():
            vector = self.platform.acknowledge_interrupt()
            if self.tracing is not None:
                self.tracing.interrupt(vector)
            event = Event(vector, EventKind.EXTERNAL_INTERRUPT)
            if user_interrupts.is_notification(state, self.msrs.values, event):
                self.end_of_interrupt()
            self.deliver(event)
            return True
        return bool(state.cr4 & _UINTR) and self.deliver_user_interrupt()

    def _idle(self, until: int | None) -> None:
        if self.count > 1:
            self._gives_way = True  # time passes while others run
            if self.awake:
                self.note_event()
                self._sleep(IDLE_TICKS)
            return
        deadline = self._next_deadline(until)
        if self.state.activity is Activity.MWAIT and self.wait is not None:
            deadline = self.wait.until if deadline is None else min(self.wait.until, deadline)
        if deadline is None:
            self.halt = Halt(f"halted at {self._where()} with nothing to wake it", shutdown=False)
        else:
            self.note_event()
            self._sleep(deadline - self.now())

    def _run_engine(self, until: int | None) -> EngineEvent:
        self._until = until
        plan = self._plan()
        plan.step = plan.step or self.step_next
        reload, self.reload, self.step_next = self.reload, False, False
        event = self.engine.run(self.state, plan, reload=reload)
        self.forget_implicit_accesses()
        return event

    def _plan(self) -> Plan:
        """How the engine may run from here to the next thing known to happen."""
        state, extension = self.state, self.virtualization
        self._planned = deadline = self._next_deadline(self._until)
        self._planned_waiting = waiting = self._interrupt_waits()
        watch_if = waiting and not state.rflags & _IF
        plan = self.plan
        plan.watch_if = watch_if
        plan.step = (
            (deadline is not None and deadline == self._approached)
            or (waiting and not watch_if)
            or (self._nmi and not state.nmi_blocked and not self._holds_nmis())
            or (extension is not None and extension.wants_boundary())
            or (bool(state.cr4 & _UINTR) and user_interrupts.is_due(state, self.msrs.values))
        )
        plan.budget = None if deadline is None else _capped(max(deadline - self.now(), 0) // TICKS_PER_BYTE)
        plan.instruction_limit = None if self.instruction_limit is None else self.instruction_limit - self.retired
        return plan

    def forget_implicit_accesses(self) -> None:
        """The instruction that was granted implicit supervisor-mode accesses is over; so are the grants."""
        if self.implicit_pages:
            self.implicit_pages.clear()
            self.engine.flush(None)

    def _interrupt_waits(self) -> bool:
        extension = self.virtualization
        if extension is not None and extension.wants_interrupt_window():
            return True
        return self._interrupt_due()

    def _interrupt_due(self) -> bool:
        """Whether an interrupt waits for nothing but RFLAGS.IF and the end of a shadow."""
        extension = self.virtualization
        return self.platform.interrupt_pending() and not (extension is not None and extension.holds_interrupts)

    def _holds_nmis(self) -> bool:
        return self.virtualization is not None and self.virtualization.holds_nmis

    def handle(self, event: EngineEvent, until: int | None = None) -> bool:
        """Do what the engine stopped for; False if the instruction at RIP ran into a fault, or is to be tried again."""
        if isinstance(event, InstructionTrap):
            return self.execute()
        if isinstance(event, OperandTrap):
            return operand_checks.execute(self, until, event.origin)
        if isinstance(event, ExceptionTrap):
            if event.vector == Vector.UD:
                return self.execute("not known to the engine")
            if event.vector == Vector.DB:
                self.state.pending_debug |= PENDING_SINGLE_STEP
            elif event.vector == Vector.GP and self.state.cpl and self._has_earlier_fault():
                return self.execute("privileged instruction")
            else:
                if event.vector == Vector.BR:
                    bound_range_exceeded(self.state)
                self.raise_fault(_fault(event))
                return False
        elif isinstance(event, RefusedFill):
            refusal.handle(self, event)
            return False
        elif isinstance(event, BudgetSpent):
            self._approached = self._next_deadline(until)
            self.step_next = True  # the limit may also be that of instructions
        return True

    def _has_earlier_fault(self) -> bool:
        try:
            instruction = self.fetch()
        except InstructionAborted:
            return False
        return instruction is None or has_earlier_fault(instruction)

    def execute(self, why: str = "sensitive instruction") -> bool:
        """Execute the instruction at RIP in the model; False if it ran into a fault."""
        try:
            self._perform(self.fetch(), why)
        except InstructionAborted as aborted:
            self.abort(aborted.cause)
            return False
        return True

    def _perform(self, instruction: Instruction | None, why: str) -> None:
        if self.tracing is not None:
            self.tracing.intercepted(instruction, why)
        self._extra_ticks += TRAP_TICKS
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

    def answer(self, place: Place) -> int:
        """Execute the instruction at ``place`` in the middle of a run (see `EngineClient.answer`).

        After a quiet instruction the rest of the run needs no new planning as long as time stays short of what the run
        was planned for.
        """
        instruction = place.instruction or self._look_at(place)
        if not place.answers or instruction is None:
            return NOT_ANSWERED
        if place.shortcut is not None and self.tracing is None and place.shortcut():
            self.retired += 1
            self._extra_ticks += TRAP_TICKS + instruction.length * TICKS_PER_BYTE
            return self._budget_left()
        try:
            self._perform(instruction, "sensitive instruction" if place.known else "not known to the engine")
        except InstructionAborted as aborted:
            self.abort(aborted.cause)
            return self._replan()
        if self.reload or not place.quiet or self.state.pending_debug or self._gives_way:
            return self._replan()
        return self._budget_left()

    def _look_at(self, place: Place) -> Instruction | None:
        """Note what is at ``place``; None if its fetch faults, for the ordinary way to find out."""
        try:
            instruction = place.instruction = self.fetch()
        except InstructionAborted:
            return None
        place.answers = (
            instruction is not None
            and is_answered(instruction)
            and (not place.known or self._is_executed(instruction.mnemonic))  # else the engine has stopped for nothing
        )
        if instruction is not None and place.answers:
            place.quiet = is_quiet(instruction)
            if self.virtualization is not None:
                place.shortcut = self.virtualization.shortcut(instruction)
        return instruction

    def _is_executed(self, mnemonic: int) -> bool:
        extension = self.virtualization
        return mnemonic in HANDLERS or (extension is not None and mnemonic in extension.mnemonics)

    def _budget_left(self) -> int:
        """What is left of the budget of the current run, in bytes of code."""
        planned = self._planned
        if planned is None:
            return UNPLANNED
        left = (planned - self._extra_ticks) // TICKS_PER_BYTE - self.engine.elapsed()
        return _capped(left) if left > 0 else ANSWERED

    def _replan(self) -> int:
        """What `run` does between two runs of the engine, if that is all there is to do: go on in the same run."""
        extension, until = self.virtualization, self._until
        if self.finished or self._gives_way or self.implicit_pages or (until is not None and self.now() >= until):
            return ANSWERED
        if (extension is not None and extension.wants_boundary()) or not self._is_ready():
            return ANSWERED
        if self.state.activity is not Activity.ACTIVE or watch.is_needed(self.state):
            return ANSWERED
        if self._plan().step:
            return ANSWERED
        reload, self.reload = self.reload, False
        return REPLANNED if reload else CONTINUED

    def _execute_extension(self, extension: Virtualization, instruction: Instruction) -> bool:
        transitions, single_step = extension.transitions, self.state.rflags & _TF
        if not extension.execute(instruction):
            return False
        if extension.transitions != transitions:
            self.reload = True
        elif single_step:
            self.state.pending_debug |= PENDING_SINGLE_STEP
        return True

    def native(self, instruction: Instruction) -> None:
        """Let the engine execute the instruction at RIP after all."""
        self.retired -= 1  # the engine counts it
        self._extra_ticks -= instruction.length * TICKS_PER_BYTE
        event = self.engine.run(self.state, STEP, reload=True, native=True)
        self.forget_implicit_accesses()
        self.reload = True
        if isinstance(event, InstructionTrap):
            raise InstructionAborted(Fault(Vector.UD))
        if not self.handle(event):
            raise InstructionAborted(Exited())


_WAKEABLE: Final = (Activity.ACTIVE, Activity.HLT, Activity.MWAIT)


def _fault(event: ExceptionTrap) -> Fault:
    vector = Vector(event.vector)
    with_code = vector in (Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.AC, Vector.DF)
    return Fault(vector, event.error_code & 0xFFFF if with_code else None)
