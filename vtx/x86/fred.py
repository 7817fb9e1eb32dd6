"""Flexible return and event delivery: how it is configured, and where in the processor that is kept.

While CR4.FRED is set, which it can be in IA-32e mode alone, events and system calls reach one of two entry points
instead of a gate of the IDT, with a frame that has the same form for all of them. Stacks have *levels*, 0 to 3; the
current one is part of IA32_FRED_CONFIG.

Interpretation. CR0.PG cannot be cleared while CR4.FRED is set, because neither CR4.FRED nor supervisor code in
compatibility mode may be outside 64-bit mode.

Spec: SDM Vol. 3, "Flexible Return and Event Delivery (FRED)"; SDM Vol. 4, "Architectural MSRs".
"""

from __future__ import annotations

from typing import Final

from vtx.x86.state import CpuState, Cr4, SegmentRegister

STACK_LEVEL: Final = 0b11
"""Of IA32_FRED_CONFIG: the current stack level."""
SHADOW_STACK_DECREMENT: Final = 1 << 3
"""What an event that stays on its stack leaves free of the shadow stack, in bytes."""
STACK_DECREMENT: Final = 0b111 << 6
"""The same of the stack."""
INTERRUPT_LEVEL_SHIFT: Final = 9
"""Where the stack level of maskable interrupts is."""
ENTRY_POINT: Final = ((1 << 64) - 1) & ~0xFFF
"""Address of the page with the entry points."""
DEFINED: Final = STACK_LEVEL | SHADOW_STACK_DECREMENT | STACK_DECREMENT | 0b11 << INTERRUPT_LEVEL_SHIFT | ENTRY_POINT

SYSCALL: Final = 1
SYSENTER: Final = 2
"""Vectors of the events of type 7."""

# Of the CS that a frame holds, and of its SS.
CS_LEVEL_SHIFT: Final = 16
CS_WAITS_FOR_ENDBRANCH: Final = 1 << 18
SS_BLOCKING_BY_STI: Final = 1 << 16
SS_SOFTWARE_EVENT: Final = 1 << 17
SS_NMI: Final = 1 << 18

_FRED: Final = int(Cr4.FRED)


def is_enabled(state: CpuState) -> bool:
    """Whether events are delivered this way, and transfers between privilege levels by other means are faults."""
    return bool(state.cr4 & _FRED) and state.long_mode


def stack_level(state: CpuState) -> int:
    """The current stack level; privilege level 3 has none but 0."""
    return 0 if state.cpl == 3 else state.fred_config & STACK_LEVEL


def stack_pointer(state: CpuState, level: int) -> tuple[int, int]:
    """RSP and SSP at the top of the stacks of ``level``; the shadow stack of level 0 is that of IA32_PL0_SSP."""
    return state.fred_rsp[level], state.fred_ssp[level - 1] if level else state.pl_ssp[0]


def set_stack_level(state: CpuState, level: int) -> None:
    """Make ``level`` the current one."""
    state.fred_config = state.fred_config & ~STACK_LEVEL | level


def swap_gs(state: CpuState) -> None:
    """Exchange the base of GS with IA32_KERNEL_GS_BASE."""
    segment = state.segments[SegmentRegister.GS]
    segment.base, state.kernel_gs_base = state.kernel_gs_base, segment.base
