"""Intel MPX: where it is enabled, by which configuration, and what happens to the bound registers besides.

BNDCFGU configures privilege level 3, IA32_BNDCFGS all others. Where Intel MPX is not enabled its instructions are NOPs.

Interpretations. Real-address mode is privilege level 0 and virtual-8086 mode is level 3; the bound registers work there
as they do in 32-bit code. BOUND clears BNDSTATUS whether its #BR is delivered or causes a VM exit.

Spec: SDM Vol. 1, "Intel® Memory Protection Extensions", "Configuration and Status Registers", "CALL, RET, JMP and All
Jcc", "BOUND Instruction and Intel MPX".
"""

from __future__ import annotations

from typing import Final

from vmcs.bits import canonicalize
from vtx.x86.save_area import BNDCSR, BNDREGS
from vtx.x86.state import CpuState, Cr4

ENABLE: Final = 1 << 0
PRESERVE: Final = 1 << 1
"""BNDPRESERVE: near branches without the prefix BND leave the bound registers alone."""

BASE: Final = ((1 << 64) - 1) & ~0xFFF
"""Linear address of the bound directory."""

MPX_STATE: Final = 1 << BNDREGS.bit | 1 << BNDCSR.bit
"""The two state components of Intel MPX, which XCR0 enables together or not at all."""

_OSXSAVE: Final = int(Cr4.OSXSAVE)


def configuration(state: CpuState) -> int:
    """The configuration register that rules the running code."""
    return state.bndcfgu if state.cpl == 3 else state.bndcfgs


def enabled(state: CpuState) -> bool:
    """Whether Intel MPX is enabled for the running code."""
    if not state.cr4 & _OSXSAVE or state.xcr0 & MPX_STATE != MPX_STATE:
        return False
    return bool(configuration(state) & ENABLE)


def watches_branches(state: CpuState) -> bool:
    """Whether near branches of the running code may change the bound registers, all of which are 0 initially."""
    if not enabled(state) or configuration(state) & PRESERVE:
        return False
    return any(state.lower_bounds) or any(state.upper_bounds)


def initialize(state: CpuState) -> bool:
    """A near branch without the prefix BND was executed; whether that has changed the bound registers."""
    if not watches_branches(state):
        return False
    state.lower_bounds[:] = state.upper_bounds[:] = [0, 0, 0, 0]
    return True


def bound_range_exceeded(state: CpuState) -> None:
    """BOUND is about to raise #BR."""
    if enabled(state):
        state.bndstatus = 0


def legal_configuration(value: int, width: int) -> int:
    """``value`` without reserved bits, and with a base that is canonical for linear addresses of ``width`` bits.

    RSM and XRSTOR load that, where WRMSR and VM entry refuse what is not legal.
    """
    return canonicalize(value, width) & (BASE | PRESERVE | ENABLE)
