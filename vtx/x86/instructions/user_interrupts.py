"""CLUI, STUI, TESTUI, UIRET and SENDUIPI, which any privilege level may use in 64-bit mode.

Interpretations. The accesses of SENDUIPI to its table and to descriptors are implicit supervisor accesses, whatever the
privilege level: RFLAGS.AC does not let them pass SMAP. A descriptor that must not be written faults before it is looked
at. In xAPIC mode the destination FFH is a broadcast, as it is in the interrupt-command register.

Spec: SDM Vol. 2, "CLUI—Clear User Interrupt Flag", "STUI—Set User Interrupt Flag", "TESTUI—Determine User Interrupt
Flag", "UIRET—User-Interrupt Return", "SENDUIPI—Send User Interprocessor Interrupt".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.alignment import checks_alignment
from vtx.x86.control_flow import ControlProtection, cp, has_shadow_stack
from vtx.x86.decode import Instruction, read_register
from vtx.x86.instructions.common import ARITHMETIC
from vtx.x86.iret import UNPRIVILEGED_FLAGS
from vtx.x86.linear import is_canonical, linear_address_width
from vtx.x86.msr_table import APIC_BASE_EXTD, IA32_APIC_BASE, IA32_UINTR_MISC, IA32_UINTR_TT
from vtx.x86.operations import SendUserIpi
from vtx.x86.outcome import Fault, InstructionAborted, Vector, gp, ud
from vtx.x86.shadow_stack import ShadowStack
from vtx.x86.stack import Stack
from vtx.x86.state import MASK32, MASK64, Gpr, Rflags
from vtx.x86.user_interrupts import (
    DESCRIPTOR_RESERVED,
    DESCRIPTOR_SIZE,
    OUTSTANDING,
    SUPPRESS,
    UINTR,
    Descriptor,
    read_descriptor,
)

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_TF: Final = int(Rflags.TF)
_STACK_ALIGNMENT: Final = 7
_FLAG_IMAGE: Final = 1 << 1  # of the RFLAGS that UIRET pops, where it updates UIF flexibly

# The user-interrupt target table (UITT): what IA32_UINTR_TT has beside its address, and an entry.
_ENABLED: Final = 1 << 0
_TABLE: Final = MASK64 & ~0xF
_ENTRY_SIZE: Final = 16
_VALID: Final = 1 << 0
_ENTRY_RESERVED: Final = 0x3F << 64 | MASK64 & ~0x3F01
_VECTOR_SHIFT: Final = 8


def _require_enabled(cpu: LogicalProcessor) -> None:
    """#UD outside 64-bit mode and while CR4.UINTR is clear."""
    if not cpu.state.cr4 & UINTR or not cpu.state.in_64_bit_mode:
        raise ud()


def clear_flag(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """CLUI."""
    _require_enabled(cpu)
    cpu.state.user_interrupt_flag = False
    cpu.retire(instruction)


def set_flag(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """STUI: a user interrupt may be delivered right after it."""
    _require_enabled(cpu)
    cpu.state.user_interrupt_flag = True
    cpu.retire(instruction)


def test_flag(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """TESTUI."""
    _require_enabled(cpu)
    state = cpu.state
    state.rflags = state.rflags & ~ARITHMETIC | (Rflags.CF if state.user_interrupt_flag else 0)
    cpu.retire(instruction)


def user_interrupt_return(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """UIRET; the handler has taken the vector off the stack."""
    _require_enabled(cpu)
    state = cpu.state
    if checks_alignment(state) and state.gpr[Gpr.RSP] & _STACK_ALIGNMENT:
        raise InstructionAborted(Fault(Vector.AC, 0))
    stack = Stack.of(state, cpu.mmu)
    stack.read_ahead(3, 8)
    rip, rflags, pointer = (stack.pop(8) for _ in range(3))
    if not is_canonical(rip, linear_address_width(state)):
        raise gp(0)
    if has_shadow_stack(state):
        shadow = ShadowStack.of(state, cpu.mmu)
        if shadow.pop(8) != rip:
            raise cp(ControlProtection.FAR_RET_IRET)
        state.ssp = shadow.pointer
    single_step = bool(state.rflags & _TF)
    state.rip, state.gpr[Gpr.RSP] = rip, pointer
    state.rflags = state.rflags & ~UNPRIVILEGED_FLAGS | rflags & UNPRIVILEGED_FLAGS
    state.user_interrupt_flag = not cpu.profile.has("UIRET_UIF") or bool(rflags & _FLAG_IMAGE)
    cpu.monitor = None
    cpu.changed_system_state()
    cpu.completed(single_step=single_step)


def send_user_ipi(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SENDUIPI: post a user interrupt in a descriptor, and notify the processor it names."""
    _require_enabled(cpu)
    state, register = cpu.state, instruction.registers[0]
    table = cpu.msrs.values[IA32_UINTR_TT]
    if not table & _ENABLED:
        raise ud()
    assert register is not None
    index = read_register(state, register)
    if index > cpu.msrs.values[IA32_UINTR_MISC] & MASK32:
        raise gp(0)
    address, vector = _target(cpu, (table & _TABLE) + _ENTRY_SIZE * index & MASK64)
    notification = _post(cpu, address, vector)
    if notification is not None:
        if cpu.intercepts(notification, instruction):
            return
        cpu.send_interrupt(notification.vector, _apic_id(cpu, notification.destination))
    cpu.retire(instruction)


def _check_address(cpu: LogicalProcessor, address: int) -> None:
    if not is_canonical(address, linear_address_width(cpu.state)):
        raise gp(0)


def _target(cpu: LogicalProcessor, entry_address: int) -> tuple[int, int]:
    """Address of the descriptor and the vector that an entry of the table names."""
    _check_address(cpu, entry_address)
    entry = cpu.mmu.read(entry_address, _ENTRY_SIZE)
    if not entry & _VALID or entry & _ENTRY_RESERVED:
        raise gp(0)
    return entry >> 64, entry >> _VECTOR_SHIFT & 0x3F


def _post(cpu: LogicalProcessor, address: int, vector: int) -> SendUserIpi | None:
    """Request ``vector`` in the descriptor; the notification due, unless one is outstanding or they are suppressed."""
    _check_address(cpu, address)
    descriptor = read_descriptor(cpu.mmu, address)
    if descriptor.control & DESCRIPTOR_RESERVED:
        raise gp(0)
    notifies = not descriptor.control & (OUTSTANDING | SUPPRESS)
    control = descriptor.control | (OUTSTANDING if notifies else 0)
    cpu.mmu.write(address, DESCRIPTOR_SIZE, Descriptor(control, descriptor.requests | 1 << vector).image)
    return SendUserIpi(descriptor.vector, descriptor.destination) if notifies else None


def _apic_id(cpu: LogicalProcessor, destination: int) -> int:
    """The APIC ID that NDST names in the mode in which the local APIC is."""
    if (cpu.msrs.read(IA32_APIC_BASE) or 0) & APIC_BASE_EXTD:
        return destination
    return destination >> 8 & 0xFF


HANDLERS: Final = {
    Mnemonic.CLUI: clear_flag,
    Mnemonic.STUI: set_flag,
    Mnemonic.TESTUI: test_flag,
    Mnemonic.UIRET: user_interrupt_return,
    Mnemonic.SENDUIPI: send_user_ipi,
}
