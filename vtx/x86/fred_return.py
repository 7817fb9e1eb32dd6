"""Returns from events by FRED: ERETS to ring 0, ERETU to ring 3.

The frame is popped and checked before anything is committed: a return that faults changes no register.

Interpretations. Where ERETU loads descriptors, it checks them as IRET does, and what IRET does to data segments is not
done. A single-step trap follows a return if the frame asks for it, or if the return itself was single-stepped.

Spec: SDM Vol. 2, "ERETS—Event Return to Supervisor", "ERETU—Event Return to User", operation.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.x86 import control_flow, descriptors, fred
from vtx.x86.control_flow import ControlProtection, cp
from vtx.x86.flat_segments import load_flat
from vtx.x86.iret import check_target, outer_stack_segment, return_segment
from vtx.x86.linear import LinearMemory, is_canonical, linear_address_width
from vtx.x86.outcome import gp, ud
from vtx.x86.shadow_stack import ShadowStack
from vtx.x86.stack import Stack
from vtx.x86.state import MASK32, CpuState, Gpr, Rflags, SegmentRegister, Shadow

_WORD: Final = 8
_SAVED: Final = 3 << fred.CS_LEVEL_SHIFT | fred.CS_WAITS_FOR_ENDBRANCH
_EVENT: Final = fred.SS_BLOCKING_BY_STI | fred.SS_SOFTWARE_EVENT | fred.SS_NMI
_SELECTOR: Final = 0xFFFF
_RESERVED_RFLAGS: Final = 0xFFFF_FFFF_FFC2_802A
"""Reserved bits of RFLAGS, bit 1 and VM."""
_IF: Final = Rflags.IF.value
_TF: Final = Rflags.TF.value
_IOPL: Final = Rflags.IOPL.value
_FIXED_1: Final = Rflags.FIXED_1.value


@frozen
class _Frame:
    """What a return pops; ``ss`` without the event information above it."""

    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int


@frozen
class Returned:
    """What a return leaves to the processor: whether NMIs are unblocked, and whether a single-step trap follows."""

    unblocks_nmi: bool
    traps: bool


def _pop(state: CpuState, memory: LinearMemory) -> _Frame:
    stack = Stack.of(state, memory, bits=64)
    stack.release(_WORD)  # the error code
    rip, cs, rflags, rsp, ss = (stack.pop(_WORD) for _ in range(5))
    return _Frame(rip, cs, rflags, rsp, ss & MASK32)


def _require_enabled(state: CpuState) -> None:
    if not fred.is_enabled(state) or not state.in_64_bit_mode or state.cpl:
        raise ud()


def erets(state: CpuState, memory: LinearMemory) -> Returned:
    """Return to ring 0. Raises `InstructionAborted` with the fault."""
    _require_enabled(state)
    frame, level = _pop(state, memory), state.fred_config & fred.STACK_LEVEL
    if (
        not is_canonical(frame.rip, linear_address_width(state))
        or frame.cs & ~_SAVED != state.cs.selector
        or frame.rflags & _RESERVED_RFLAGS != _FIXED_1
        or frame.ss & ~_EVENT != state.ss.selector
    ):
        raise gp(0)
    new_level = min(level, frame.cs >> fred.CS_LEVEL_SHIFT & fred.STACK_LEVEL)
    ssp = None
    if control_flow.shadow_stack_enabled(state, 0):
        ssp = _pop_shadow_frame(state, memory, frame, level if new_level < level else None)

    if ssp is not None:
        state.ssp = ssp
    if frame.cs & fred.CS_WAITS_FOR_ENDBRANCH:
        control_flow.resume_tracker(state)
    fred.set_stack_level(state, new_level)
    was_blocked = bool(state.shadow & Shadow.STI)
    returned = _commit(state, frame)
    if frame.ss & fred.SS_BLOCKING_BY_STI and state.rflags & _IF and not was_blocked:
        state.shadow = Shadow.STI
    return returned


def _pop_shadow_frame(state: CpuState, memory: LinearMemory, frame: _Frame, left: int | None) -> int:
    """The SSP to return to; ``left`` is the stack level that is left, whose shadow stack must be empty then."""
    stack = ShadowStack(memory, state.ssp, user=False)
    ssp = stack.pop_frame(frame.cs, frame.rip, long=True)
    if not is_canonical(ssp, linear_address_width(state)):
        raise gp(0)
    if left is not None and fred.stack_pointer(state, left)[1] != stack.pointer:
        raise cp(ControlProtection.FAR_RET_IRET)
    return ssp


def eretu(state: CpuState, memory: LinearMemory, star: int) -> Returned:
    """Return to ring 3, ``star`` being IA32_STAR; as `erets`."""
    _require_enabled(state)
    if state.fred_config & fred.STACK_LEVEL:
        raise gp(0)
    frame = _pop(state, memory)
    if (
        frame.cs & ~(_SELECTOR & ~3) != 3
        or frame.rflags & (_RESERVED_RFLAGS | _IOPL) != _FIXED_1
        or frame.ss & ~(_SELECTOR & ~3 | _EVENT) != 3
    ):
        raise gp(0)
    cs, ss, base = frame.cs, frame.ss & _SELECTOR, star >> 48
    if ss == base + 8 & _SELECTOR and cs in (base, base + 16 & _SELECTOR):
        long = cs != base
        if long and not is_canonical(frame.rip, linear_address_width(state)):
            raise gp(0)
        _check_shadow_stacks(state, long=long)
        load_flat(state, cs, ss, 3, long=long)
    else:
        long = _load_descriptors(state, memory, frame)
    returned = _commit(state, frame)
    if not long:
        state.rip &= MASK32
        state.gpr[Gpr.RSP] &= MASK32
    fred.swap_gs(state)
    if control_flow.shadow_stack_enabled(state, 3):
        state.ssp = state.pl_ssp[3]
    return returned


def _load_descriptors(state: CpuState, memory: LinearMemory, frame: _Frame) -> bool:
    """Load CS and SS as IRET does; whether CS is one of 64-bit code."""
    cs, ss = frame.cs, frame.ss & _SELECTOR
    code = return_segment(state, memory, cs, 0, by_fred=True)
    stack = outer_stack_segment(state, memory, ss, code, 3)
    check_target(state, code, frame.rip if code.long else frame.rip & MASK32)
    _check_shadow_stacks(state, long=code.long)
    code = descriptors.set_accessed(state, memory, cs, code)
    state.segments[SegmentRegister.CS] = code.segment(cs)
    state.segments[SegmentRegister.SS] = stack
    return code.long


def _check_shadow_stacks(state: CpuState, *, long: bool) -> None:
    """#GP(0) if SSP of ring 3 is too wide for code that is not ``long``, #CP unless the one of ring 0 is empty."""
    if control_flow.shadow_stack_enabled(state, 3) and not long and state.pl_ssp[3] >> 32:
        raise gp(0)
    if control_flow.shadow_stack_enabled(state, 0) and state.ssp != fred.stack_pointer(state, 0)[1]:
        raise cp(ControlProtection.FAR_RET_IRET)


def _commit(state: CpuState, frame: _Frame) -> Returned:
    """Load RIP, RFLAGS and RSP."""
    stepped = state.rflags & _TF
    state.rip, state.rflags = frame.rip, frame.rflags
    state.gpr[Gpr.RSP] = frame.rsp
    state.shadow = Shadow.NONE
    traps = bool(stepped or (frame.ss & fred.SS_SOFTWARE_EVENT and frame.rflags & _TF))
    return Returned(bool(frame.ss & fred.SS_NMI), traps)
