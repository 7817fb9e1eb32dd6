"""SYSCALL, SYSRET, SYSENTER and SYSEXIT: calls between privilege levels with segments made from MSRs.

The descriptors are not read: the segments have fixed contents, and software keeps its GDT consistent with them.

Spec: SDM Vol. 2, "SYSCALL—Fast System Call", "SYSRET—Return From Fast System Call", "SYSENTER—Fast System Call",
"SYSEXIT—Fast Return from Fast System Call"; APM Vol. 2, "Fast System Call and Return".
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vtx.x86.flat_segments import flat_code, load_flat
from vtx.x86.linear import is_canonical, linear_address_width
from vtx.x86.outcome import gp, ud
from vtx.x86.shadow_stack import enter_fast, leave_fast
from vtx.x86.state import MASK32, MASK64, CpuState, Efer, Gpr, Rflags, SegmentRegister

_DPL_3: Final = 3 << 5
_IF: Final = Rflags.IF.value
_RF: Final = Rflags.RF.value
_FIXED_1: Final = Rflags.FIXED_1.value
_CLEARED_IN_LEGACY_MODE: Final = int(Rflags.IF | Rflags.VM)
_SYSRET_RFLAGS: Final = 0x3C_7FD7  # all but RF and VM


@frozen
class SyscallMsrs:
    """IA32_STAR, IA32_LSTAR, IA32_CSTAR and IA32_FMASK."""

    star: int = 0
    lstar: int = 0
    cstar: int = 0
    fmask: int = 0


@frozen
class SysenterMsrs:
    """IA32_SYSENTER_CS, IA32_SYSENTER_ESP and IA32_SYSENTER_EIP."""

    cs: int = 0
    esp: int = 0
    eip: int = 0


def syscall(state: CpuState, msrs: SyscallMsrs, instruction_length: int, *, amd: bool = False) -> None:
    """SYSCALL, to privilege level 0; the instruction is ``instruction_length`` bytes long.

    Raises #UD without EFER.SCE and, on Intel, outside 64-bit mode; with ``amd``, compatibility mode goes to CSTAR and
    protected mode to the EIP of STAR.
    """
    if not state.efer & Efer.SCE or not state.protected or not (amd or state.in_64_bit_mode):
        raise ud()
    enter_fast(state)
    rflags = state.rflags & ~_RF
    if state.long_mode:
        next_rip = (state.rip + instruction_length) & (MASK64 if state.in_64_bit_mode else MASK32)
        state.gpr[Gpr.RCX] = next_rip
        state.gpr[Gpr.R11] = rflags
        state.rip = msrs.lstar if state.in_64_bit_mode else msrs.cstar
        state.rflags = rflags & ~msrs.fmask & MASK64 | _FIXED_1
    else:
        state.gpr[Gpr.RCX] = (state.rip + instruction_length) & MASK32
        state.rip = msrs.star & MASK32
        state.rflags = rflags & ~_CLEARED_IN_LEGACY_MODE
    cs = msrs.star >> 32 & 0xFFFC
    load_flat(state, cs, cs + 8, 0, long=state.long_mode)


def sysret(state: CpuState, msrs: SyscallMsrs, operand_size: int, *, amd: bool = False) -> None:
    """SYSRET to privilege level 3, 64-bit mode if ``operand_size`` is 64, else compatibility mode.

    Raises #UD outside 64-bit mode or without EFER.SCE; #GP(0) above privilege level 0 or for a non-canonical RCX. With
    ``amd``, other modes have it too, a non-canonical target faults when it is fetched, and SS gets nothing but a
    selector and the new privilege level.
    """
    if not state.efer & Efer.SCE or not state.protected or not (amd or state.in_64_bit_mode):
        raise ud()
    if state.cpl:
        raise gp(0)
    target = state.gpr[Gpr.RCX]
    if not amd and operand_size == 64 and not is_canonical(target, linear_address_width(state)):
        raise gp(0)
    leave_fast(state)
    base = msrs.star >> 48
    state.rip = target if operand_size == 64 else target & MASK32
    if state.long_mode:
        state.rflags = state.gpr[Gpr.R11] & _SYSRET_RFLAGS | _FIXED_1
    else:
        state.rflags |= _IF
    cs = base + 16 if operand_size == 64 else base
    if amd:
        stack = state.segments[SegmentRegister.SS]
        stack.selector, stack.access_rights = base + 8 & 0xFFFF, stack.access_rights | _DPL_3
        state.segments[SegmentRegister.CS] = flat_code(cs, 3, long=operand_size == 64)
    else:
        load_flat(state, cs | 3, (base + 8) | 3, 3, long=operand_size == 64)


def sysenter(state: CpuState, msrs: SysenterMsrs, *, amd: bool = False) -> None:
    """SYSENTER, to privilege level 0 at the MSRs' entry point.

    Raises #GP(0) in real-address mode or with a null IA32_SYSENTER_CS; with ``amd``, #UD in long mode.
    """
    if amd and state.long_mode:
        raise ud()
    if not state.protected or not msrs.cs & 0xFFFC:
        raise gp(0)
    enter_fast(state)
    width = MASK64 if state.long_mode else MASK32
    state.rflags &= ~(_CLEARED_IN_LEGACY_MODE | _RF)
    state.gpr[Gpr.RSP] = msrs.esp & width
    state.rip = msrs.eip & width
    cs = msrs.cs & 0xFFFC
    load_flat(state, cs, cs + 8, 0, long=state.long_mode)


def sysexit(state: CpuState, msrs: SysenterMsrs, operand_size: int, *, amd: bool = False) -> None:
    """SYSEXIT to privilege level 3 at RDX with stack RCX, 64-bit mode if ``operand_size`` is 64.

    Raises #UD in long mode with ``amd``; #GP(0) in real-address mode, above privilege level 0, with a null
    IA32_SYSENTER_CS, and for a non-canonical target or stack.
    """
    if amd and state.long_mode:
        raise ud()
    if not state.protected or state.cpl or not msrs.cs & 0xFFFC:
        raise gp(0)
    target, stack = state.gpr[Gpr.RDX], state.gpr[Gpr.RCX]
    if operand_size == 64:
        width = linear_address_width(state)
        if not is_canonical(target, width) or not is_canonical(stack, width):
            raise gp(0)
    else:
        target, stack = target & MASK32, stack & MASK32
    leave_fast(state)
    state.rip, state.gpr[Gpr.RSP] = target, stack
    cs = (msrs.cs & 0xFFFC) + (32 if operand_size == 64 else 16)
    load_flat(state, cs | 3, (cs + 8) | 3, 3, long=operand_size == 64)
