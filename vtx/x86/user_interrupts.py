"""User interrupts: notifications that move requests from memory into the processor, and delivery at privilege level 3.

An ordinary interrupt whose vector is UINV is a *notification*. It has no handler: the processor takes the requests
posted in a descriptor in memory, the UPID, into its request register, UIRR. A request there is delivered to the user's
handler between two instructions, without a change of privilege, unless the user-interrupt flag, UIF, is clear.

The registers are MSRs, apart from UIF. There is a *pending* user interrupt whenever UIRR is not zero: nothing else is
remembered.

Interpretations. Clearing ON and taking PIR are one access: if it faults, the descriptor is unchanged. A processor in
the HLT state is back there after a notification, one in the state of MWAIT is active. An external interrupt injected by
VM entry is a notification like any other, with nothing to dismiss from a local APIC. Errors of a notification happen
during delivery of an external interrupt, and are nested exceptions with FRED. INIT clears UIF; an SMI, RSM, VM entry
and VM exit leave it as it is.

Spec: SDM Vol. 3, "User Interrupts", "User-Interrupt State", "User-Interrupt Delivery", "User-Interrupt Notification
Identification", "User-Interrupt Notification Processing".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from vtx.x86.branches import LBR, record_event
from vtx.x86.control_flow import expect_endbranch, has_shadow_stack
from vtx.x86.event import Event, EventKind
from vtx.x86.linear import LinearMemory, is_canonical, linear_address_width
from vtx.x86.mmu import Mmu
from vtx.x86.msr_table import (
    IA32_UINTR_HANDLER,
    IA32_UINTR_MISC,
    IA32_UINTR_PD,
    IA32_UINTR_RR,
    IA32_UINTR_STACKADJUST,
    UINV,
    UINV_SHIFT,
)
from vtx.x86.outcome import gp
from vtx.x86.second_level import AccessKind
from vtx.x86.shadow_stack import ShadowStack
from vtx.x86.stack import Stack
from vtx.x86.state import MASK64, Activity, CpuState, Cr4, Efer, Gpr, Rflags, Shadow

UINTR: Final = int(Cr4.UINTR)
"""Of CR4; nothing here happens while it is clear."""

_LMA: Final = int(Efer.LMA)
_CLEARED: Final = int(Rflags.TF | Rflags.RF)
_LOAD_STACK_POINTER: Final = 1 << 0  # of UISTACKADJUST: it is the stack pointer, not a distance
_STACK_ALIGNMENT: Final = 0xF
_EXTERNAL: Final = 1  # EXT of an error code

DESCRIPTOR_SIZE: Final = 16
_REQUESTS_SHIFT: Final = 64
OUTSTANDING: Final = 1 << 0
"""ON of a descriptor: a notification is under way."""
SUPPRESS: Final = 1 << 1
"""SN of a descriptor: none shall be sent."""
DESCRIPTOR_RESERVED: Final = 0xFF00_FFFC


@frozen
class Descriptor:
    """A user posted-interrupt descriptor (UPID), 16 bytes in memory.

    ``control`` has the notification's state, vector and destination, ``requests`` (PIR) a bit for each user interrupt.

    Spec: SDM Vol. 3, "User-Interrupt Notification Identification and Processing".
    """

    control: int
    requests: int

    @classmethod
    def parse(cls, image: int) -> Descriptor:
        """The descriptor whose bytes, as a little-endian number, are ``image``."""
        return cls(image & MASK64, image >> _REQUESTS_SHIFT)

    @property
    def image(self) -> int:
        """Its bytes as a little-endian number."""
        return self.requests << _REQUESTS_SHIFT | self.control

    @property
    def vector(self) -> int:
        """NV: vector of the notification."""
        return self.control >> 16 & 0xFF

    @property
    def destination(self) -> int:
        """NDST: whom to notify; an 8-bit APIC ID is in bits 15:8."""
        return self.control >> 32


def read_descriptor(mmu: Mmu, address: int) -> Descriptor:
    """The descriptor at linear ``address``, about to be written, too: it faults as a write does."""
    mmu.check(address, DESCRIPTOR_SIZE, AccessKind.WRITE)
    return Descriptor.parse(mmu.read(address, DESCRIPTOR_SIZE))


# Notifications


def notification_vector(msrs: Mapping[int, int]) -> int:
    """UINV."""
    return msrs.get(IA32_UINTR_MISC, 0) >> UINV_SHIFT & 0xFF


def set_notification_vector(msrs: dict[int, int], vector: int) -> None:
    """Replace UINV, and leave the rest of its MSR alone."""
    msrs[IA32_UINTR_MISC] = msrs[IA32_UINTR_MISC] & ~UINV | vector << UINV_SHIFT


def is_notification(state: CpuState, msrs: Mapping[int, int], event: Event) -> bool:
    """Whether ``event`` is a user-interrupt notification, which has no handler in the IDT."""
    return (
        bool(state.cr4 & UINTR)
        and bool(state.efer & _LMA)
        and event.kind is EventKind.EXTERNAL_INTERRUPT
        and event.vector == notification_vector(msrs)
    )


def process_notification(state: CpuState, mmu: Mmu, msrs: dict[int, int]) -> int:
    """Move the requests posted in memory to UIRR; which they were.

    Raises `InstructionAborted` with what keeps the processor from the descriptor.
    """
    address = msrs[IA32_UINTR_PD]
    if not is_canonical(address, linear_address_width(state)):
        raise gp(_EXTERNAL)
    descriptor = read_descriptor(mmu, address)
    mmu.write(address, DESCRIPTOR_SIZE, Descriptor(descriptor.control & ~OUTSTANDING, 0).image)
    msrs[IA32_UINTR_RR] |= descriptor.requests
    return descriptor.requests


# Delivery


def is_due(state: CpuState, msrs: Mapping[int, int]) -> bool:
    """Whether a pending user interrupt waits for nothing but the end of blocking by MOV SS; CR4.UINTR is set.

    VM entry can put a user into the shutdown state, from which no user interrupt wakes.
    """
    return (
        state.user_interrupt_flag
        and state.cpl == 3
        and state.in_64_bit_mode
        and state.activity is Activity.ACTIVE
        and bool(msrs[IA32_UINTR_RR])
    )


def is_blocked(state: CpuState) -> bool:
    """Blocking by MOV SS or POP SS; blocking by STI is none of user interrupts."""
    return state.shadow is not Shadow.NONE and bool(state.shadow & Shadow.MOV_SS)


def deliver(state: CpuState, memory: LinearMemory, msrs: dict[int, int]) -> int:
    """Transfer control to the user's handler of the highest user interrupt requested; its vector.

    Raises `InstructionAborted` with the fault of the stack or the handler's address, ``state`` and ``msrs`` unchanged.
    """
    handler, adjustment = msrs[IA32_UINTR_HANDLER], msrs[IA32_UINTR_STACKADJUST]
    if not is_canonical(handler, linear_address_width(state)):
        raise gp(0)
    origin, interrupted = state.rip, state.gpr[Gpr.RSP]
    pointer = adjustment if adjustment & _LOAD_STACK_POINTER else interrupted - adjustment & MASK64
    vector = msrs[IA32_UINTR_RR].bit_length() - 1
    stack = Stack.of(state, memory, pointer=pointer & ~_STACK_ALIGNMENT)
    stack.push(interrupted, state.rflags, origin, vector, size=8)
    if has_shadow_stack(state):
        shadow = ShadowStack.of(state, memory)
        shadow.push(origin, 8)
        state.ssp = shadow.pointer

    expect_endbranch(state, 3)
    msrs[IA32_UINTR_RR] &= ~(1 << vector)
    state.user_interrupt_flag = False
    state.gpr[Gpr.RSP], state.rip = stack.pointer, handler
    state.rflags &= ~_CLEARED
    state.shadow = Shadow.NONE
    if state.debugctl & LBR:
        record_event(state, Event(vector, EventKind.EXTERNAL_INTERRUPT), origin)
    return vector
