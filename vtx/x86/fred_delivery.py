"""Delivery of events and system calls by FRED: one frame for all of them, and a stack level instead of a gate.

Everything is found out and stored before any register changes, so that a delivery that faults has changed none.

Interpretations. The CS that is pushed on the shadow stack is that of the frame, with the stack level and the tracker.
Blocking by STI is saved for every kind of event that finds it. An exception in the delivery has EXT in its error code
as it has in one through the IDT.

Spec: SDM Vol. 3, "FRED Event Delivery"; SDM Vol. 2, "ERETS—Event Return to Supervisor" (the frame that it pops);
"Vectored-Event Injection" (augmented CS and SS).
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.x86 import control_flow, fred, shadow_stack
from vtx.x86.event import Event, EventKind
from vtx.x86.flat_segments import load_flat
from vtx.x86.linear import LinearMemory, is_canonical, linear_address_width
from vtx.x86.outcome import Vector, gp
from vtx.x86.stack import Stack
from vtx.x86.state import CpuState, Cr4, Gpr, Rflags, Shadow

_RING_0_ENTRY: Final = 256
_ALIGNMENT: Final = 64
_WORD: Final = 8
_FRAME: Final = 8  # words
_RFLAGS: Final = Rflags.FIXED_1.value
_CET: Final = int(Cr4.CET)

# Of the event information, the upper half of the SS slot.
_TYPE_SHIFT: Final = 48
_VECTOR_SHIFT: Final = 32
_IN_64_BIT_MODE: Final = 1 << 57
_NESTED: Final = 1 << 58
_LENGTH_SHIFT: Final = 60

# B0 to B3, BD and BS. There is no bus-lock detection and no RTM.
_DEBUG_CAUSES: Final = 0x600F
_BY_VECTOR: Final = frozenset(
    {
        EventKind.NMI,
        EventKind.HARDWARE_EXCEPTION,
        EventKind.PRIVILEGED_SOFTWARE_EXCEPTION,
        EventKind.SOFTWARE_EXCEPTION,
    }
)
_SYSTEM_CALLS: Final = frozenset({EventKind.SOFTWARE_INTERRUPT, EventKind.OTHER})


@frozen
class _Stacks:
    """Where the frame goes: stack level, RSP and SSP before anything is pushed; SSP is None without shadow stack."""

    level: int
    rsp: int
    ssp: int | None


def event_data(event: Event) -> int:
    """The 64 bits that the frame has for what an event says besides its error code.

    Spec: SDM Vol. 3, "FRED Event Delivery", event data.
    """
    if event.data is not None:
        return event.data
    if event.kind == EventKind.HARDWARE_EXCEPTION and event.vector == Vector.PF:
        return event.address or 0
    if event.vector == Vector.DB and event.kind in _BY_VECTOR:
        return (event.debug or 0) & _DEBUG_CAUSES
    return 0


def deliver(state: CpuState, memory: LinearMemory, event: Event, star: int) -> None:
    """Transfer control to the entry point for ``event``; ``star`` is IA32_STAR, which names CS and SS of ring 0.

    Raises `InstructionAborted` with the exception met on the way, ``state`` unchanged.
    """
    user = state.cpl == 3
    entry = state.fred_config & fred.ENTRY_POINT
    if not user:
        entry += _RING_0_ENTRY
    if not is_canonical(entry, linear_address_width(state)):
        raise gp(event.external)
    stacks = _stacks(state, event, user)
    code = _saved_code(state, user)
    stack = Stack.of(state, memory, pointer=stacks.rsp, cpl=0, bits=64, error_code=event.external)
    stack.check_room(_FRAME, _WORD)
    stack.push(
        *(0, event_data(event), _saved_stack(state, event), state.gpr[Gpr.RSP], event.saved_rflags(state)),
        *(code, event.saved_rip(state), event.error_code or 0),
        size=_WORD,
    )
    shadow = None
    if stacks.ssp is not None:
        shadow = shadow_stack.ShadowStack(memory, stacks.ssp, user=False)
        if not user:
            shadow.push_frame(code, event.saved_rip(state), state.ssp)

    if user:
        shadow_stack.leave_user_stack(state)
        load_flat(state, star >> 32 & 0xFFFC, (star >> 32 & 0xFFFC) + 8, 0, long=True)
        fred.swap_gs(state)
    if shadow is not None:
        state.ssp = shadow.pointer
    state.rip, state.rflags = entry, _RFLAGS
    state.gpr[Gpr.RSP] = stack.pointer
    fred.set_stack_level(state, stacks.level)
    control_flow.reset_tracker(state)


def _stacks(state: CpuState, event: Event, user: bool) -> _Stacks:
    """The stack level of the handler, and where its stacks are."""
    current = fred.stack_level(state)
    level = max(current, _event_level(state, event, user))
    enabled = control_flow.shadow_stack_enabled(state, 0)
    if user or level > current:
        rsp, ssp = fred.stack_pointer(state, level)
        if enabled and ssp & 7:
            raise gp(event.external)
    else:
        rsp = state.gpr[Gpr.RSP] - (state.fred_config & fred.STACK_DECREMENT) & ~(_ALIGNMENT - 1)
        ssp = state.ssp - (state.fred_config & fred.SHADOW_STACK_DECREMENT)
    mask = (1 << 64) - 1
    return _Stacks(level, rsp & mask, ssp & mask if enabled else None)


def _event_level(state: CpuState, event: Event, user: bool) -> int:
    """The stack level that the event asks for. What ring 3 causes is for level 0, but not faults on the way to it."""
    if user and not event.nested and event.vector != Vector.DF:
        return 0
    if event.kind == EventKind.EXTERNAL_INTERRUPT:
        return state.fred_config >> fred.INTERRUPT_LEVEL_SHIFT & fred.STACK_LEVEL
    if event.kind in _BY_VECTOR:
        return state.fred_stack_levels >> 2 * event.vector & fred.STACK_LEVEL
    return 0


def _saved_code(state: CpuState, user: bool) -> int:
    """CS with the stack level and, of ring 0, whether the tracker waits for ENDBR64."""
    saved = state.cs.selector | fred.stack_level(state) << fred.CS_LEVEL_SHIFT
    waiting = control_flow.ENDBR_EN | control_flow.TRACKER
    if not user and state.cr4 & _CET and state.s_cet & waiting == waiting:
        saved |= fred.CS_WAITS_FOR_ENDBRANCH
    return saved


def _saved_stack(state: CpuState, event: Event) -> int:
    """SS with what the event was and what it found."""
    saved = state.ss.selector | event.vector << _VECTOR_SHIFT | int(event.kind) << _TYPE_SHIFT
    if state.shadow & Shadow.STI:
        saved |= fred.SS_BLOCKING_BY_STI
    if event.kind in _SYSTEM_CALLS:
        saved |= fred.SS_SOFTWARE_EVENT
    if event.kind == EventKind.NMI:
        saved |= fred.SS_NMI
    if state.in_64_bit_mode:
        saved |= _IN_64_BIT_MODE
    if event.nested:
        saved |= _NESTED
    if event.is_software:
        saved |= event.instruction_length << _LENGTH_SHIFT
    return saved
