"""The execution engine on Unicorn: load a state, run to the next event, read the state.

Unicorn's core still carries the AMD-SVM interception code of the emulator it came from. With the guest-mode flag set in
the processor state and every interception bit on, each sensitive instruction reaches our interrupt hook before it
executes, in every mode; every translation reaches our fill hook. Nothing else of that SVM code is used: no VMRUN is
executed, because the state, guest-mode flag included, can be written straight into a context and restored.

What Unicorn does not intercept (port I/O, SYSCALL, SYSENTER) calls a hook in the middle of a block. Where the model
must act before the instruction, the rest of the block is run to nowhere: the state is saved, every further translation
refused, and the saved state restored after the run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from vtx.addresses import PAGE_SHIFT, PAGE_SIZE
from vtx.engine import layout, native
from vtx.engine.address_map import OWN_PAGE, ROM_FRAME, VMCB_FRAME, VOID_CODE, VOID_DATA, SlowStores, map_memory
from vtx.engine.clock import (
    ADDRESS,
    ELAPSED,
    INSTRUCTION_LIMIT,
    INSTRUCTIONS,
    KIND,
    LIMIT,
    SIZE,
    STOPPED,
    STOPPED_BY_BLOCK,
    UNLIMITED,
    BlockClock,
)
from vtx.engine.code_kind import SHORT_CODE, width
from vtx.engine.code_view import BOUNDARY, COUNT, CodeView, StoppedBefore, ends_with_another_pass
from vtx.engine.coherence import Coherence
from vtx.engine.context import Context
from vtx.engine.fills import fill_memory
from vtx.engine.guards import GuardTable
from vtx.engine.selfcheck import require_known_library
from vtx.engine.stops import stop_of
from vtx.engine.transfer import Hook, interrupt_hook
from vtx.engine.untranslatable import Exits
from vtx.x86.execution import (
    ANSWERED,
    CONTINUED,
    NOT_ANSWERED,
    REPLANNED,
    STEP,
    BudgetSpent,
    EngineClient,
    EngineEvent,
    ExceptionTrap,
    InstructionTrap,
    Interrupted,
    OperandTrap,
    Plan,
    RefusedFill,
    Stepped,
)
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Grant, Refusal
from vtx.x86.outcome import Fault, Vector
from vtx.x86.second_level import AccessKind
from vtx.x86.state import MASK32, CpuState, Rflags, Shadow

PROBE: Final = 1 << 62
"""A linear address that is canonical in no paging mode."""

_KINDS: Final = {
    native.MEM_READ: AccessKind.READ,
    native.MEM_WRITE: AccessKind.WRITE,
    native.MEM_FETCH: AccessKind.EXECUTE,
}
_WRITE: Final = AccessKind.WRITE
_EXECUTE: Final = AccessKind.EXECUTE
_TF: Final = int(Rflags.TF)
_TF_AND_IF: Final = int(Rflags.TF | Rflags.IF)
_MOST_NOTED: Final = 1 << 16
_FLUSH: Final = ctypes.c_int(native.CTL_TLB_FLUSH)
_INSTRUCTION_TRAP: Final = InstructionTrap()
_AGAIN: Final = Fault(Vector.PF, 0)  # a refusal of what the client allows: it will try again


class UnicornEngine:
    """One processor's execution engine (see `vtx.x86.execution.ExecutionEngine`).

    Engines of one machine share its ``coherence``. Without ``answers``, every sensitive instruction ends the run
    instead of being offered to the client on the spot; nothing else differs.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        client: EngineClient,
        *,
        coherence: Coherence | None = None,
        allow_compiled: bool = True,
        answers: bool = True,
    ) -> None:
        require_known_library()
        self._library = native.library
        self._client = client
        self._memory = memory
        self._handle, self._close = native.open_processor(self)
        native.control(self._handle, native.CTL_CPU_MODEL, native.CPU_MODEL)
        native.control(self._handle, native.CTL_TLB_TYPE, native.TLB_VIRTUAL)
        native.control(self._handle, native.CTL_USE_EXITS, 1)
        self._keep: list[Any] = []
        self._ram = map_memory(self._handle, memory, self._on_device_read, self._on_device_write, self._keep)
        self._context = Context(self._handle, VMCB_FRAME, allow_compiled=allow_compiled)
        self.coherence = coherence or Coherence()
        slow_stores = SlowStores(self._handle)
        self._member = self.coherence.join(self._flush_now, self._retranslate, self._code_changed, slow_stores.at)
        self._guards = guards = GuardTable()
        self._code = CodeView(memory, guards, self._code_changed)
        self._exits = Exits(self._handle, self._code.read)
        segments = self._context.address() + layout.SEGMENTS
        self.clock = BlockClock(self._handle, self._examine, guards, segments, allow_compiled=allow_compiled)
        self._noted: dict[int, tuple[int, bool]] = {}  # the code granted last, by linear page number
        where = self._handle, self._context.saved, self._context.address(), self.clock, self._ram
        self._fills, fill_hook = fill_memory(
            self._on_fill, memory, self.coherence, self._member, self._noted, where, allow_compiled=allow_compiled
        )
        self._fills.most = native.FIRST_FILLS
        self._install_hooks(interrupt_hook(self._on_interrupt, allow_compiled=allow_compiled), fill_hook)
        memory.code_pages = self.coherence.executed
        memory.code_written = self.coherence.written
        self._flush_wanted = False
        self._running = False
        self._stop_requested = False
        self._trap: int | None = None
        self._error_code = 0
        self._refused: tuple[int, AccessKind, Refusal] | None = None
        self._failure: BaseException | None = None
        self._aborted: tuple[bytes, tuple[int, int, int, int]] | None = None
        self._callback_address: int | None = None
        self._probed: int | None = None
        self.answers = answers
        self._answers = self._answered = self._answering = False
        self._state: CpuState

    def close(self) -> None:
        """Release the library's resources, as happens when nobody has the engine; it cannot be used afterwards."""
        self._context.close()
        self._close()

    # Construction.

    def _install_hooks(self, interrupt: Hook, fill: Hook) -> None:
        def install(kind: int, callback: Any, instruction: int | None = None) -> None:
            self._keep.append(callback)
            native.add_hook(self._handle, kind, callback, instruction=instruction)

        for kind, hook in ((native.HOOK_INTR, interrupt), (native.HOOK_TLB_FILL, fill)):
            self._keep.append(hook)
            native.add_hook(self._handle, kind, hook.callback, data=hook.data)
        install(native.HOOK_INSN, native.PortInCallback(self._on_port_in), native.INSN_IN)
        install(native.HOOK_INSN, native.PortOutCallback(self._on_port_out), native.INSN_OUT)
        install(native.HOOK_INSN, native.SyscallCallback(self._on_syscall), native.INSN_SYSCALL)
        install(native.HOOK_INSN, native.SyscallCallback(self._on_syscall), native.INSN_SYSENTER)

    def _on_device_read(self, read: Callable[[int, int], int], offset: int, size: int) -> int:
        return 0 if self._aborted else int(self._guarded(0, read, offset, size))

    def _on_device_write(self, write: Callable[[int, int, int], None], offset: int, size: int, value: int) -> None:
        if not self._aborted:
            self._guarded(None, write, offset, size, value)

    # Hooks. An exception must never cross the library's frames: `_guarded` keeps it for after the run.

    def _guarded(self, default: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BaseException as failure:
            self._failure = self._failure or failure
            self._end_run()
            return default

    def _end_run(self) -> None:
        """Stop the library; until it has, the fills it asks for are none of the code that runs."""
        self._fills.active = False
        self._library.uc_emu_stop(self._handle)

    def _on_interrupt(self, number: int) -> None:
        if self._aborted or self._trap is not None:
            self._library.uc_emu_stop(self._handle)
            return
        self._context.save()
        if self._answers and number in layout.TRAPS_OF_INSTRUCTIONS:
            try:
                self._answering = True
                if self._answer(number != layout.TRAP_UNDEFINED):
                    return
            except BaseException as failure:
                self._failure = self._failure or failure
            finally:
                self._answering = False
        self._end_run()
        self._trap = number
        if layout.TRAP_EXCEPTION <= number < layout.TRAP_EXCEPTION_END:
            self._error_code = self._context.error_code()

    def _answer(self, known: bool) -> bool:
        """Have the client execute the intercepted instruction at once, and go on behind it if it says so."""
        context, words, state = self._context, self.clock.words, self._state
        linear, kind = context.take(state)
        left = 0
        if size := words[SIZE]:  # a trap at an exit has no block
            left = words[ADDRESS] + size - linear
            if not 0 < left <= size:
                left = self.clock.remaining_block(linear)
        place = self._code.place(linear, left, kind, known)
        if place.instruction is None and self._exits.is_left(linear + self._context.beyond_4_gib(), width(kind)):
            return False
        if place.answers is False or context.take_shadow(state):
            return False
        if left:
            words[ELAPSED] -= left
            words[SIZE] -= left
            words[INSTRUCTIONS] -= place.rest
        budget = self._client.answer(place)
        if budget == NOT_ANSWERED:
            return False
        if budget == ANSWERED or self._stop_requested:
            self._answered = True
            return False
        if budget in (REPLANNED, CONTINUED):
            self._prepare(state, self._client.plan, reload=budget == REPLANNED)
            self._answers = not state.shadow  # as at the beginning of a run
            return True
        if self._flush_wanted:
            self._flush_now()
        if words[INSTRUCTION_LIMIT] != UNLIMITED:
            words[INSTRUCTION_LIMIT] -= 1
            if words[INSTRUCTIONS] >= words[INSTRUCTION_LIMIT]:  # what follows may trap without entering a block
                self._answered = True
                return False
        words[LIMIT] = words[ELAPSED] + budget
        context.give(state)
        return True

    def _on_fill(self, address: int, access: int) -> int:
        if self._probed is not None:
            return self._probed << PAGE_SHIFT | AccessKind.EXECUTE
        if self._aborted or self._failure or self._trap is not None or self._refused or self.clock.words[STOPPED]:
            return 0  # the run is over: the library only drops what it translated at exits
        try:
            return self._fill(address, _KINDS[access])
        except BaseException as failure:
            self._failure = failure
            self._end_run()
            return 0

    def _fill(self, address: int, kind: AccessKind) -> int:
        if self._fills.count > self._fills.most:
            self._fills.most = min(2 * self._fills.most, native.MOST_FILLS)
            self._flush_now()
        if self.clock.words[SIZE]:  # before the first block of a run, the context is what the run began with
            self._context.save()
        cpl, alignment_check = self._context.access()
        linear = address if address <= MASK32 or kind is not _EXECUTE else self._context.wrapped(address)
        grant = self._client.fill(linear, kind, cpl, alignment_check)
        if not isinstance(grant, Grant):
            self._refused, self._fills.active = (linear, kind, grant), False
            return 0
        frame, permissions = grant
        physical = frame << PAGE_SHIFT
        own = frame == self._memory.own_page
        if not own and self._memory.ram_offset(physical) is not None:
            view = cpl, alignment_check
            permissions = self.coherence.grant(self._member, frame, address >> PAGE_SHIFT, kind, permissions, view)
        elif not own and self._memory.is_rom(frame):
            written = kind is _WRITE
            permissions &= _WRITE if written else ~_WRITE
            physical = VOID_DATA if written else ROM_FRAME
        elif kind is _EXECUTE:
            permissions, physical = _EXECUTE, VOID_CODE
        else:
            permissions &= ~_EXECUTE
            window = self._memory.window_at(physical)
            physical = OWN_PAGE if own else physical if window else VOID_DATA
        if permissions & _EXECUTE:
            shared = frame in self.coherence.shared
            page = address >> PAGE_SHIFT
            if shared or self._noted.get(page) != (frame, shared):
                self._noted[page] = frame, shared
                self._note_code(page, frame, shared)
                if linear != address:
                    self._note_code(linear >> PAGE_SHIFT, frame, shared)
                if self._exits.granted(page, width(self._context.kind)):
                    self._refused, self._fills.active = (linear, kind, _AGAIN), False
                    return 0
        if self._fills.wanted and linear == address:
            self._remember(address, frame, kind, physical | permissions)
        return physical | permissions  # AccessKind uses the library's own bits: read 1, write 2, execute 4

    def _remember(self, address: int, frame: int, kind: AccessKind, grant: int) -> None:
        """The fill may be wanted again: note what it rests on, unless that is more than `vtx.engine.fills` knows."""
        coherence = self.coherence
        if frame == self._memory.own_page or self._memory.ram_offset(frame << PAGE_SHIFT) is None:
            return
        if frame in coherence.shared or (kind is not _EXECUTE and frame in coherence.executed):
            return
        basis = self._client.basis(address)
        if basis is not None:
            self._fills.remember(grant, frame, *basis)

    def _note_code(self, page: int, frame: int, writable: bool) -> None:
        if len(self._noted) > _MOST_NOTED:
            self._noted.clear()
        self._code.granted(page, frame, writable=writable)
        offset = self._memory.ram_offset(frame << PAGE_SHIFT) if writable else None
        content = 0 if offset is None else self._ram + offset
        self.clock.code_granted(page, frame, content)

    def _on_port_in(self, handle: int, port: int, size: int, data: int) -> int:
        if self._aborted:
            return 0
        value = self._guarded(None, self._port, self._client.port_in, port, size)
        if value is None:
            self._abort()
            return 0
        return int(value)

    def _on_port_out(self, handle: int, port: int, size: int, value: int, data: int) -> None:
        if self._aborted:
            return
        if not self._guarded(False, self._port, self._client.port_out, port, size, value):
            self._abort()

    def _port(self, access: Callable[..., Any], *arguments: int) -> Any:
        context = self._context
        context.save()
        self._callback_address = context.linear_rip()
        try:
            return access(*arguments, context.cpl())
        finally:
            self._callback_address = None

    def _on_syscall(self, handle: int, data: int) -> None:
        if not self._aborted:
            self._context.save()
            self._abort()

    def _examine(self, linear: int, size: int) -> int:
        """The facts about a block of code about to be executed, or whether an instruction begins there."""
        return int(self._guarded(1, self._facts, linear, size))

    def _facts(self, linear: int, size: int) -> int:
        if self._trap is None and not self._aborted:
            self._context.save()
        if size & BOUNDARY:
            return self._code.has_boundary(linear, size & ~BOUNDARY, self._context.kind)
        return self._code.facts(linear, size, self._context.kind)

    def _abort(self) -> None:
        """Undo the rest of the block: nothing after the saved state may have an effect."""
        shared = self.clock.shared
        counters = (shared.elapsed, shared.instructions, shared.address, shared.size)
        self._aborted = (self._context.copy(), counters)
        self._flush_now()
        self._end_run()

    # Running.

    def run(self, state: CpuState, plan: Plan, *, reload: bool, native: bool = False) -> EngineEvent:
        """Run to the next event (see `ExecutionEngine.run`)."""
        self._answers = self.answers and not (plan.step or native or state.shadow)
        event = self._run_once(state, plan, reload, native=native)
        return self._approach(state, event) if isinstance(event, StoppedBefore) else event

    def _approach(self, state: CpuState, stopped: StoppedBefore) -> EngineEvent:
        """Execute what comes before an instruction that must not run, one by one."""
        shared = self.clock.shared
        limit, instruction_limit = shared.limit, shared.instruction_limit
        self._answers = False
        if shared.stopped == STOPPED_BY_BLOCK and self._stops_by_itself(stopped):
            return Interrupted()
        while stopped.block <= self._context.linear_rip() < stopped.instruction:
            if shared.elapsed > limit or shared.instructions > instruction_limit:
                return BudgetSpent()
            event = self._run_once(state, STEP, False)
            if not isinstance(event, Stepped | StoppedBefore):
                return event
        there = self._context.linear_rip() == stopped.instruction
        return _INSTRUCTION_TRAP if there and stopped.traps else Interrupted()

    def _stops_by_itself(self, stopped: StoppedBefore) -> bool:
        """Have an instruction guarded by itself, or trap by itself, from now on; whether it can be done."""
        address, place = stopped.instruction, stopped.instruction + self._context.beyond_4_gib()
        if stopped.traps:
            arranged = self._code.may_be_exit(address, self._context.kind) and self._exits.add(place)
        elif arranged := self.clock.guard_instruction(place):
            self._code.guarded(stopped.block, address)
        if arranged:
            self._retranslate_at(stopped.block, address - stopped.block + 1)
        return arranged

    def _prepare(self, state: CpuState, plan: Plan, *, reload: bool, native: bool = False) -> None:
        """Make everything ready for running from ``state`` as planned."""
        if self._flush_wanted:
            self._flush_now()
        limit, most, step = UNLIMITED, UNLIMITED, plan.step
        if self._stop_requested:
            limit = 0
        elif plan.budget is not None and not step:
            limit = self.clock.shared.elapsed + plan.budget
        if plan.instruction_limit is not None and not step:
            most = max(plan.instruction_limit, 0)
        self.clock.begin(limit, most, single=step, native=native, watch_if=plan.watch_if and not step)
        self._context.load(state, reload=reload, step=step)
        kind = self._context.kind
        if reload and self._exits.depend_on_width and (kind ^ self.clock.words[KIND]) & 64:
            self._noted.clear()
            self._flush_now()
        self.clock.words[KIND] = kind

    def _run_once(
        self, state: CpuState, plan: Plan, reload: bool, *, native: bool = False
    ) -> EngineEvent | StoppedBefore:
        self._trap = self._refused = self._aborted = None
        self._answered, self._state, step = False, state, plan.step
        arranged_tf = step and not state.rflags & _TF
        if native:
            self._context.settle_mxcsr()
        self._prepare(state, plan, reload=reload, native=native)
        self._running = self._fills.active = True
        status = self._library.uc_emu_start(self._handle, state.rip, 0, 0, 0)
        self._running = self._fills.active = False
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._answered:
            self._stop_requested = False
            return Interrupted()
        event = self._event(status)
        before, shadow, flags = state.gpr[1], state.shadow, state.rflags
        if self._context.store(state, hide_trap_flag=arranged_tf) and flags & _TF_AND_IF != _TF_AND_IF:
            # STI has none where interrupts were enabled already: known of the one instruction that is single-stepped.
            state.shadow = Shadow.STI
        if native:
            self._context.follow_mxcsr()
        if arranged_tf and isinstance(event, ExceptionTrap) and event.vector == Vector.DB:
            event = Stepped()
            if self._context.kind & SHORT_CODE and state.rip > state.cs.limit:
                origin = self._code.near_branch(self.clock.words[ADDRESS], self.clock.words[SIZE], self._context.kind)
                event = event if origin is None else OperandTrap(origin)
        # In a shadow, the engine ends a repeated instruction as it does in a step.
        self._settle(event, state, state.gpr[1] if shadow else before)
        # A trap flag has no effect after MOV SS and POP SS; there the clock ends the step.
        return Stepped() if step and isinstance(event, BudgetSpent) else event

    def _settle(self, event: EngineEvent | StoppedBefore, state: CpuState, before: int) -> None:
        """The run ended at RIP: what is left of the block entered last was counted but not executed.

        ``before`` is RCX as it was before the run. A block that a trap follows, or a fetch, was executed to its end.
        """
        if isinstance(event, RefusedFill) and event.kind is AccessKind.EXECUTE:
            return
        if isinstance(event, Stepped):
            self._count_last_pass(state, before)
            return
        if isinstance(event, ExceptionTrap) and event.vector == Vector.DB:
            return
        address = self._context.linear_rip()
        left = self.clock.remaining_block(address)
        if left:
            self.clock.take_back(address, self._code.facts(address, left, self._context.kind) & COUNT)

    def _count_last_pass(self, state: CpuState, before: int) -> None:
        """A repeated instruction ends one pass earlier in a single step than in a run: count alike."""
        shared = self.clock.shared
        after = state.gpr[1]
        if after != before and self._context.linear_rip() == shared.address + shared.size:
            code = self._code.read(shared.address, shared.size)
            if ends_with_another_pass(code, width(self._context.kind), after, state.rflags):
                self.clock.count_pass(shared.size)

    def _event(self, status: int) -> EngineEvent | StoppedBefore:
        """What ended the run; afterwards the context image holds the state at the event."""
        shared = self.clock.shared
        if self._aborted is not None:
            image, counters = self._aborted
            self._aborted = None
            self._context.restore_copy(image)
            shared.elapsed, shared.instructions, shared.address, shared.size = counters
            return InstructionTrap()
        if self._trap is not None:
            number = self._trap
            if layout.TRAP_EXCEPTION <= number < layout.TRAP_EXCEPTION_END:
                return ExceptionTrap(number - layout.TRAP_EXCEPTION, self._error_code)
            if number == layout.TRAP_HLT and self._exit_is_left():
                return Interrupted()
            return _INSTRUCTION_TRAP if number >= layout.TRAP_BASE else ExceptionTrap(number, self._error_code)
        self._context.save()
        if status == native.ERR_EXCEPTION and self._refused is not None:
            page, kind, refusal = self._refused
            fetched = kind is AccessKind.EXECUTE
            origin = self._code.near_branch(shared.address, shared.size, self._context.kind) if fetched else None
            return RefusedFill(page, kind, refusal, origin)
        stopped = stop_of(self.clock, self._context, self._code)
        if isinstance(stopped, BudgetSpent) and self._stop_requested:
            self._stop_requested = False
            return Interrupted()
        if stopped is not None:
            return stopped
        native.check(status, f"running at {self._context.linear_rip():#x}")
        raise native.EngineUnusable(f"Unicorn stopped at {self._context.linear_rip():#x} without saying why")

    def _exit_is_left(self) -> bool:
        address = self._context.linear_rip()
        place = address + self._context.beyond_4_gib()
        if left := self._exits.is_left(place, width(self._context.kind)):
            self._exits.remove(place)
            self._retranslate_at(address, 1)
        return left

    def elapsed(self) -> int:
        """Bytes of code executed since creation."""
        elapsed = self.clock.words[ELAPSED]
        if self._callback_address is not None:
            elapsed -= self.clock.remaining_block(self._callback_address)
        return elapsed

    def instructions(self) -> int:
        """Instructions executed since creation."""
        return int(self.clock.shared.instructions)

    def request_stop(self) -> None:
        """From within a callback or another thread: stop at the end of the current block."""
        self._stop_requested = True
        self.clock.shared.limit = 0  # the library's own stop would make it execute the store to a device a second time

    def power_up_fpu(self) -> bytes:
        """The x87/SSE state of a processor that has just been switched on."""
        return self._context.power_up_fpu

    def fpu(self) -> bytes:
        """The x87/SSE state as opaque bytes, as the last run left it."""
        return self._context.fpu()

    def legacy_area(self) -> bytes:
        """The x87/SSE state as FXSAVE64 stores it, as the last run left it."""
        return self._context.legacy_area()

    def simd_exceptions(self) -> int:
        """The SIMD floating-point exceptions met in the last run, which was native."""
        return self._context.simd_exceptions()

    def set_legacy_area(self, area: bytes) -> None:
        """Replace the x87/SSE state by that of ``area``."""
        self._context.set_legacy_area(area)

    def resume(self, elapsed: int, instructions: int, fpu: bytes) -> None:
        """Go on from another moment: with these counters and this x87/SSE state."""
        self.clock.set_counters(elapsed, instructions)
        self._context.set_fpu(fpu)

    # Translations.

    def flush(self, page: int | None) -> None:
        """Forget translations; the library can only forget all of them."""
        if self._running and not self._answering:
            self._flush_now()
        else:
            self._flush_wanted = True

    def _flush_now(self) -> None:
        self._flush_wanted = False
        self._library.uc_ctl(self._handle, _FLUSH)
        self.coherence.tlb_flushed(self._member)
        self._fills.emptied(self._client.translations())

    def _retranslate(self, frame: int, by_store: bool) -> bool:
        """Drop the translations of a frame (see `vtx.engine.coherence.Member`)."""
        self._code_changed()
        shared = self.clock.shared
        if by_store and self._running and frame in self._code.frames(shared.address, shared.size):
            return False
        # The library wants a linear address: one that no guest can use, which `_fill` answers with the frame.
        self._probed, active, self._fills.active = frame, self._fills.active, False
        first, last = (ctypes.c_uint64(PROBE + offset) for offset in (0, PAGE_SIZE))
        status = self._library.uc_ctl(self._handle, ctypes.c_int(native.CTL_REMOVE_BLOCKS), first, last)
        self._probed, self._fills.active = None, active
        self._flush_now()
        native.check(status, "dropping translations")
        return True

    def _retranslate_at(self, address: int, size: int) -> None:
        for frame in self._code.frames(address, size):
            if frame is not None:
                self._retranslate(frame, False)

    def _code_changed(self) -> None:
        self.clock.code_changed()
        self._code.changed()
        self._guards.clear()
        self._noted.clear()
