"""Delivery of interrupts and exceptions, through the IVT or the IDT, in every mode; FRED has a module of its own.

`deliver` first finds out everything (gate, code segment, stack, frame), raising the fault the manual asks for, and only
then commits, so a delivery that faults has changed no register. The page of the stack may have been written, as on
hardware. The one exception is a task gate: past the commit point of the task switch the registers are the new task's.

Spec: SDM Vol. 3, "Interrupt and Exception Handling", "Exception and Interrupt Handling in 64-bit Mode", "Interrupt and
Exception Handling in Virtual-8086 Mode"; SDM Vol. 2, "INT n/INTO/INT3/INT1—Call to Interrupt Procedure", operation.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.x86 import control_flow, descriptors, fred, fred_delivery, shadow_stack
from vtx.x86.branches import BTF, LBR, record_event
from vtx.x86.descriptors import Descriptor, Gate, SystemType, is_null, null_segment, selector_fault
from vtx.x86.event import Event, EventKind
from vtx.x86.inner_stack import ia32e_stack_pointer, tss_stack
from vtx.x86.linear import LinearMemory, is_canonical, linear_address_width, linear_code_address, system_address
from vtx.x86.outcome import Fault, InstructionAborted, Vector, gp
from vtx.x86.stack import Stack
from vtx.x86.state import Activity, CpuState, Cr4, Gpr, Rflags, Segment, SegmentRegister, Shadow
from vtx.x86.task import NO_HOOKS, TaskSwitchHooks, TaskSwitchSource, task_switch

__all__ = ["Event", "EventKind", "deliver", "recognize"]

_IDT_BIT: Final = 2
_DR6_BREAKPOINTS: Final = 0xF
_DR6_CAUSES: Final = 0xE00F  # B0 to B3, BD, BS and BT
_DR7_GENERAL_DETECT: Final = 1 << 13
_DEBUGCTL_CLEARED: Final = LBR | BTF

_INTERRUPT_GATES: Final = frozenset({SystemType.INTERRUPT_GATE_16, SystemType.INTERRUPT_GATE_32})
_GATES_16: Final = frozenset({SystemType.INTERRUPT_GATE_16, SystemType.TRAP_GATE_16})
_GATES_32: Final = frozenset({SystemType.INTERRUPT_GATE_32, SystemType.TRAP_GATE_32})
_LEGACY_GATES: Final = _GATES_16 | _GATES_32 | {SystemType.TASK_GATE}

# Plain integers: arithmetic on flag enumerations is slow and drops the bits they do not name.
_IF: Final = Rflags.IF.value
_VIF: Final = Rflags.VIF.value
_IOPL: Final = Rflags.IOPL.value
_CLEARED_IN_REAL_MODE: Final = int(Rflags.IF | Rflags.TF | Rflags.AC | Rflags.RF)
_CLEARED_BY_REDIRECTION: Final = int(Rflags.TF | Rflags.RF)
_CLEARED_BY_GATE: Final = int(Rflags.TF | Rflags.VM | Rflags.RF | Rflags.NT)

# In the order they are pushed.
_V86_DATA_SEGMENTS: Final = (SegmentRegister.GS, SegmentRegister.FS, SegmentRegister.DS, SegmentRegister.ES)

_NO_SHADOW_STACK: Final = shadow_stack.SspChange()
_TSS_IO_MAP_BASE: Final = 102
_REDIRECTION_MAP_SIZE: Final = 32


@frozen
class _Delivery:
    """One delivery under way: what every step of it needs."""

    state: CpuState
    memory: LinearMemory
    event: Event

    @property
    def external(self) -> int:
        return self.event.external

    def gate_fault(self, vector: Vector) -> InstructionAborted:
        """An exception whose error code names the entry of the IDT."""
        return InstructionAborted(Fault(vector, self.event.vector << 3 | _IDT_BIT | self.external))

    def selector_fault(self, vector: Vector, selector: int) -> InstructionAborted:
        """An exception whose error code names a selector met during delivery."""
        return selector_fault(vector, selector, self.external)


@frozen
class _Handler:
    """Where control goes: the code segment (not yet accessed), the entry point and the privilege level."""

    gate: Gate
    code: Descriptor
    cpl: int
    inner: bool  # the stack changes with the privilege level


def deliver(
    state: CpuState,
    memory: LinearMemory,
    event: Event,
    *,
    block_nmi: bool = True,
    hooks: TaskSwitchHooks = NO_HOOKS,
    star: int = 0,
) -> None:
    """Transfer control to the handler of ``event``.

    ``block_nmi`` is False where delivery of an NMI does not block further ones. ``hooks`` are those of a task switch
    through a task gate, ``star`` is IA32_STAR, for FRED. Raises `InstructionAborted` with the exception met during
    delivery, ``state`` unchanged.
    """
    delivery, origin = _Delivery(state, memory, event), state.rip
    if not state.protected:
        _through_ivt(delivery, state.idtr.base, _saved_flags(delivery))
    elif fred.is_enabled(state):
        fred_delivery.deliver(state, memory, event, star)
    elif _is_redirected(delivery):
        _redirect(delivery)
    else:
        gate = _idt_gate(delivery)
        if gate.type == SystemType.TASK_GATE:
            _through_task_gate(delivery, gate, hooks)
        elif state.long_mode:
            _through_64_bit_gate(delivery, gate)
        else:
            _through_gate(delivery, gate)
    recognize(state, event, block_nmi=block_nmi)
    if state.debugctl & LBR:
        record_event(state, event, origin)
    state.shadow = Shadow.NONE
    state.activity = Activity.ACTIVE


def recognize(state: CpuState, event: Event, *, block_nmi: bool = True) -> None:
    """Record ``event`` where software can see it: CR2, DR6, DR7 and IA32_DEBUGCTL, blocking by NMI.

    The processor does this before it looks at the IDT, so the effects last even if delivery itself faults; they are
    idempotent. Spec: SDM Vol. 3, "Debug Status Register (DR6)", "Interrupt 14—Page-Fault Exception (#PF)", "Handling
    Multiple NMIs".
    """
    if event.kind == EventKind.NMI and block_nmi:
        state.nmi_blocked = True
    if event.kind == EventKind.PRIVILEGED_SOFTWARE_EXCEPTION and event.debug is not None:
        if event.debug:
            state.dr6 = state.dr6 & ~_DR6_BREAKPOINTS | event.debug
        state.debugctl &= ~_DEBUGCTL_CLEARED
    if event.kind != EventKind.HARDWARE_EXCEPTION:
        return
    if event.vector == Vector.PF and event.address is not None:
        state.cr2 = event.address
    if event.vector == Vector.DB and event.debug is not None:
        state.dr6 = state.dr6 & ~_DR6_BREAKPOINTS | event.debug & _DR6_CAUSES
        state.dr7 &= ~_DR7_GENERAL_DETECT
        state.debugctl &= ~_DEBUGCTL_CLEARED


def _saved_flags(delivery: _Delivery) -> int:
    return delivery.event.saved_rflags(delivery.state)


# Real-address mode and what virtual-8086 mode extensions make of it


def _through_ivt(delivery: _Delivery, base: int, flags: int) -> None:
    """Real-address mode: a 4-byte entry of the interrupt vector table, a 6-byte frame, no error code."""
    state, event = delivery.state, delivery.event
    if event.vector * 4 + 3 > state.idtr.limit:
        raise gp(0)
    _enter_8086_handler(delivery, base, flags)
    state.rflags &= ~_CLEARED_IN_REAL_MODE


def _enter_8086_handler(delivery: _Delivery, base: int, flags: int) -> None:
    state, event = delivery.state, delivery.event
    entry = delivery.memory.read(system_address(state, base, event.vector * 4), 4)
    stack = Stack.of(state, delivery.memory)
    stack.check_room(3, 2)
    stack.push(flags, state.cs.selector, event.saved_rip(state), size=2)
    selector = entry >> 16
    state.gpr[Gpr.RSP] = stack.pointer
    state.rip = entry & 0xFFFF
    # The hidden part keeps its limit and rights, as for every segment load outside protected mode.
    state.segments[SegmentRegister.CS] = Segment(selector, selector << 4, state.cs.limit, state.cs.access_rights)


def _is_redirected(delivery: _Delivery) -> bool:
    """Whether INT n in virtual-8086 mode goes to the 8086 program itself; #GP(0) where the monitor must see it."""
    state, event = delivery.state, delivery.event
    if not state.virtual_8086 or event.kind != EventKind.SOFTWARE_INTERRUPT:
        return False
    if state.cr4 & Cr4.VME and not _redirection_bit(delivery):
        return True
    if _iopl(state) < 3 and not event.injected:
        raise gp(0)
    return False


def _redirection_bit(delivery: _Delivery) -> bool:
    """The bit of the vector in the software interrupt redirection bit map, just below the I/O permission bit map."""
    state, memory, vector = delivery.state, delivery.memory, delivery.event.vector
    if not state.tr.usable or state.tr.limit < _TSS_IO_MAP_BASE + 1:
        raise gp(0)
    io_map_base = memory.read(system_address(state, state.tr.base, _TSS_IO_MAP_BASE), 2)
    offset = io_map_base - _REDIRECTION_MAP_SIZE + (vector >> 3)
    if not 0 <= offset <= state.tr.limit:
        raise gp(0)
    return bool(memory.read(system_address(state, state.tr.base, offset), 1) >> (vector & 7) & 1)


def _redirect(delivery: _Delivery) -> None:
    """Call the 8086 program's own handler; below IOPL 3, VIF stands in for IF."""
    state = delivery.state
    flags = _saved_flags(delivery)
    interrupt_flag = _IF
    if _iopl(state) < 3:
        interrupt_flag = _VIF
        flags = (flags & ~_IF) | _IOPL | (_IF if flags & _VIF else 0)
    _enter_8086_handler(delivery, 0, flags)
    state.rflags &= ~(interrupt_flag | _CLEARED_BY_REDIRECTION)


def _iopl(state: CpuState) -> int:
    return (state.rflags & _IOPL) >> 12


# Protected mode and IA-32e mode: gate and code segment


def _idt_gate(delivery: _Delivery) -> Gate:
    """The gate of the vector, checked for limit, type, privilege and presence."""
    state, memory, event = delivery.state, delivery.memory, delivery.event
    size = 16 if state.long_mode else 8
    offset = event.vector * size
    if offset + size - 1 > state.idtr.limit:
        raise delivery.gate_fault(Vector.GP)
    gate = descriptors.read_gate(state, memory, state.idtr.base, offset, size, delivery.external)
    if gate.type not in (_GATES_32 if state.long_mode else _LEGACY_GATES):
        raise delivery.gate_fault(Vector.GP)
    if event.checks_gate_privilege and gate.dpl < state.cpl:
        raise delivery.gate_fault(Vector.GP)
    if not gate.present:
        raise delivery.gate_fault(Vector.NP)
    return gate


def _handler(delivery: _Delivery, gate: Gate) -> _Handler:
    """The code segment the gate leads to, and the privilege level it runs at."""
    state, selector = delivery.state, gate.selector
    if is_null(selector):
        raise gp(delivery.external)
    code = descriptors.read_descriptor(state, delivery.memory, selector, delivery.external)
    cpl = state.cpl
    if code is None or not code.is_code or code.dpl > cpl:
        raise delivery.selector_fault(Vector.GP, selector)
    if state.long_mode and (not code.long or code.big):
        raise delivery.selector_fault(Vector.GP, selector)
    if not code.present:
        raise delivery.selector_fault(Vector.NP, selector)
    inner = not code.is_conforming and code.dpl < cpl
    if state.virtual_8086 and not (inner and code.dpl == 0):
        raise delivery.selector_fault(Vector.GP, selector)
    return _Handler(gate, code, code.dpl if inner else cpl, inner)


def _through_task_gate(delivery: _Delivery, gate: Gate, hooks: TaskSwitchHooks) -> None:
    state, event = delivery.state, delivery.event
    task_switch(
        state,
        delivery.memory,
        gate.selector,
        TaskSwitchSource.TASK_GATE,
        rip=event.saved_rip(state),
        rflags=_saved_flags(delivery),
        external=delivery.external,
        error_code=event.error_code,
        hooks=hooks,
    )


# Protected mode, 16-bit and 32-bit gates


def _through_gate(delivery: _Delivery, gate: Gate) -> None:
    state = delivery.state
    handler = _handler(delivery, gate)
    stack, stack_segment = _stack(delivery, handler)
    frame = _frame(delivery, with_stack=handler.inner, with_data_segments=state.virtual_8086)
    size = 2 if gate.type in _GATES_16 else 4
    stack.check_room(len(frame), size)
    if gate.offset > handler.code.limit:
        raise gp(delivery.external)
    code = descriptors.set_accessed(state, delivery.memory, gate.selector, handler.code)
    if stack_segment is not None:
        selector = stack.segment.selector
        stack.segment = descriptors.set_accessed(state, delivery.memory, selector, stack_segment).segment(selector)
    stack.push(*frame, size=size)
    ssp = _shadow_stack(delivery, handler)

    ssp.commit(state)
    if state.virtual_8086:
        for register in _V86_DATA_SEGMENTS:
            state.segments[register] = null_segment()
    state.segments[SegmentRegister.SS] = stack.segment
    _enter_handler(state, handler, code, stack.pointer)


def _stack(delivery: _Delivery, handler: _Handler) -> tuple[Stack, Descriptor | None]:
    """The stack of the handler, and its descriptor if it comes from the TSS."""
    state, memory = delivery.state, delivery.memory
    if not handler.inner:
        return Stack.of(state, memory, cpl=handler.cpl, error_code=delivery.external), None
    return tss_stack(state, memory, handler.cpl, delivery.external)


# IA-32e mode


def _through_64_bit_gate(delivery: _Delivery, gate: Gate) -> None:
    state = delivery.state
    handler = _handler(delivery, gate)
    width = linear_address_width(state)
    pointer = _ia32e_stack_pointer(delivery, handler)
    if (gate.ist or handler.inner) and not is_canonical(pointer, width):  # the current one counts where it is used
        raise InstructionAborted(Fault(Vector.SS, delivery.external))
    stack = Stack.of(
        state,
        delivery.memory,
        pointer=pointer & ~0xF,
        cpl=handler.cpl,
        bits=64,
        error_code=delivery.external,
    )
    frame = _frame(delivery, with_stack=True)
    stack.check_room(len(frame), 8)
    if not is_canonical(gate.offset, width):
        raise gp(delivery.external)
    code = descriptors.set_accessed(state, delivery.memory, gate.selector, handler.code)
    stack.push(*frame, size=8)
    ssp = _shadow_stack(delivery, handler)

    ssp.commit(state)
    if handler.inner:
        state.segments[SegmentRegister.SS] = null_segment(handler.cpl, handler.cpl)
    _enter_handler(state, handler, code, stack.pointer)


def _ia32e_stack_pointer(delivery: _Delivery, handler: _Handler) -> int:
    """RSP before alignment: of the interrupt stack table, of the new privilege level, or the current one."""
    state = delivery.state
    if not handler.gate.ist and not handler.inner:
        return state.gpr[Gpr.RSP]
    return ia32e_stack_pointer(state, delivery.memory, handler.cpl, ist=handler.gate.ist, external=delivery.external)


# Both


def _frame(delivery: _Delivery, *, with_stack: bool, with_data_segments: bool = False) -> list[int]:
    """What is pushed, in that order."""
    state, event = delivery.state, delivery.event
    frame: list[int] = []
    if with_data_segments:
        frame += [state.segments[register].selector for register in _V86_DATA_SEGMENTS]
    if with_stack:
        frame += [state.ss.selector, state.gpr[Gpr.RSP]]
    frame += [_saved_flags(delivery), state.cs.selector, event.saved_rip(state)]
    if event.error_code is not None:
        frame.append(event.error_code)
    return frame


def _shadow_stack(delivery: _Delivery, handler: _Handler) -> shadow_stack.SspChange:
    state, event = delivery.state, delivery.event
    if not state.cr4 & Cr4.CET:
        return _NO_SHADOW_STACK
    return shadow_stack.enter(
        state,
        delivery.memory,
        handler.cpl,
        cs=state.cs.selector,
        lip=linear_code_address(state, event.saved_rip(state)),
        long=state.long_mode,
        ist=handler.gate.ist if state.long_mode else 0,
    )


def _enter_handler(state: CpuState, handler: _Handler, code: Descriptor, pointer: int) -> None:
    """Commit CS, RIP, RSP and RFLAGS."""
    state.segments[SegmentRegister.CS] = code.segment(handler.gate.selector & ~3 | handler.cpl)
    state.rip = handler.gate.offset
    state.gpr[Gpr.RSP] = pointer
    state.rflags &= ~_CLEARED_BY_GATE
    control_flow.expect_endbranch(state, handler.cpl)
    if handler.gate.type in _INTERRUPT_GATES:
        state.rflags &= ~_IF
