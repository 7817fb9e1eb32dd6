"""XSETBV and XGETBV, and the XSAVE family: x87, SSE, MPX, PKRU and supervisor state to and from memory.

The supervisor state components modelled are those of control-flow enforcement, HDC state, and UINTR state.

Interpretations. A component is in use unless it is in its initial configuration: nothing is remembered beyond that.
XSAVEOPT therefore leaves out what is in its initial configuration, and not what was left as it was restored. All of
what is stored must be writable before any of it is; all of what is loaded is read before any of it is. XRSTORS demands
that UINV be 0 if it loads UINTR state from memory, not if it initializes it.

Spec: SDM Vol. 1, "Managing State Using the XSAVE Feature Set", "Processor Tracking of XSAVE-Managed State",
"Operation of XSAVE", "Operation of XRSTOR", "Operation of XSAVEOPT", "Operation of XSAVEC", "Operation of XSAVES",
"Operation of XRSTORS".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from attrs import frozen
from iced_x86 import Mnemonic

from vtx.x86.bounds import MPX_STATE, legal_configuration
from vtx.x86.decode import Instruction
from vtx.x86.instructions.common import operand_address, require_feature, require_ring_0
from vtx.x86.instructions.sse_control import (
    MXCSR,
    X87_CONTROL,
    X87_REGISTERS,
    XMM,
    StateArea,
    check_mxcsr,
    load_registers,
    narrow,
    require_not_task_switched,
    xmm_registers,
)
from vtx.x86.msr_table import (
    IA32_PL0_SSP,
    IA32_PM_CTL1,
    IA32_U_CET,
    IA32_UINTR_HANDLER,
    IA32_UINTR_MISC,
    IA32_UINTR_PD,
    IA32_UINTR_RR,
    IA32_UINTR_STACKADJUST,
    IA32_UINTR_TT,
    IA32_XSS,
)
from vtx.x86.operations import SIMPLE, ExtendedStateTransfer, Plain
from vtx.x86.outcome import gp, ud
from vtx.x86.save_area import (
    ALIGNMENT,
    BNDCSR,
    BNDREGS,
    CET_SUPERVISOR,
    CET_USER,
    COMPACTED,
    HDC,
    HEADER,
    HEADER_SIZE,
    LEGACY_AND_HEADER_SIZE,
    PKRU,
    SSE_STATE,
    USER_INTERRUPTS,
    X87_STATE,
    Header,
    StateComponent,
    compacted_offset,
    standard_offset,
)
from vtx.x86.state import MASK32, MASK64, Cr4, Gpr
from vtx.x86.user_interrupts import notification_vector, set_notification_vector

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_USER_INTERRUPTS: Final = 1 << USER_INTERRUPTS.bit
_MXCSR_AND_MASK: Final = slice(MXCSR.start, MXCSR.stop + 4)
_INITIAL_X87: Final = struct.pack("<H", 0x037F).ljust(24, b"\0")
_INITIAL_MXCSR: Final = struct.pack("<I", 0x1F80)
_XCR0, _XINUSE = 0, 1  # what ECX names for XGETBV
_WIDE: Final = frozenset(
    (Mnemonic.XSAVE64, Mnemonic.XSAVEOPT64, Mnemonic.XSAVEC64, Mnemonic.XSAVES64, Mnemonic.XRSTOR64, Mnemonic.XRSTORS64)
)


@frozen
class _Register:
    """A state component whose registers are as good as one. ``store`` says whether they take the value."""

    component: StateComponent
    initial: int
    load: Callable[[LogicalProcessor], int]
    store: Callable[[LogicalProcessor, int], bool]

    @property
    def mask(self) -> int:
        return 1 << self.component.bit


def _load_bounds(cpu: LogicalProcessor) -> int:
    pairs = zip(cpu.state.lower_bounds, cpu.state.upper_bounds, strict=True)
    return sum((lower | upper << 64) << 128 * number for number, (lower, upper) in enumerate(pairs))


def _store_bounds(cpu: LogicalProcessor, value: int) -> bool:
    cpu.state.lower_bounds[:] = (value >> 128 * number & MASK64 for number in range(4))
    cpu.state.upper_bounds[:] = (value >> 128 * number + 64 & MASK64 for number in range(4))
    cpu.changed_system_state()
    return True


def _load_bounds_configuration(cpu: LogicalProcessor) -> int:
    return cpu.state.bndcfgu | cpu.state.bndstatus << 64


def _store_bounds_configuration(cpu: LogicalProcessor, value: int) -> bool:
    cpu.state.bndcfgu = legal_configuration(value & MASK64, cpu.profile.linear_address_width)
    cpu.state.bndstatus = value >> 64 & MASK64
    cpu.changed_system_state()
    return True


def _load_pkru(cpu: LogicalProcessor) -> int:
    return cpu.state.pkru


def _store_pkru(cpu: LogicalProcessor, value: int) -> bool:
    cpu.state.pkru = value & MASK32
    cpu.mmu.update(cpu.state)
    return True


def _load_hdc(cpu: LogicalProcessor) -> int:
    return cpu.msrs.values[IA32_PM_CTL1]


def _store_hdc(cpu: LogicalProcessor, value: int) -> bool:
    return cpu.msrs.write(IA32_PM_CTL1, value)


def _msrs(component: StateComponent, *indices: int) -> _Register:
    """A component of 64-bit MSRs, in the order in which the save area has them."""

    def load(cpu: LogicalProcessor) -> int:
        return sum((cpu.msrs.read(index) or 0) << 64 * place for place, index in enumerate(indices))

    def store(cpu: LogicalProcessor, value: int) -> bool:
        return all(cpu.msrs.write(index, value >> 64 * place & MASK64) for place, index in enumerate(indices))

    return _Register(component, 0, load, store)


# UIF is bit 63 of the part that IA32_UINTR_MISC has otherwise.
_USER_INTERRUPT_MSRS: Final = (
    *(IA32_UINTR_HANDLER, IA32_UINTR_STACKADJUST, IA32_UINTR_MISC),
    *(IA32_UINTR_PD, IA32_UINTR_RR, IA32_UINTR_TT),
)
_UIF: Final = 1 << 64 * _USER_INTERRUPT_MSRS.index(IA32_UINTR_MISC) + 63
_msrs_of_user_interrupts: Final = _msrs(USER_INTERRUPTS, *_USER_INTERRUPT_MSRS)


def _load_user_interrupts(cpu: LogicalProcessor) -> int:
    return _msrs_of_user_interrupts.load(cpu) | (_UIF if cpu.state.user_interrupt_flag else 0)


def _store_user_interrupts(cpu: LogicalProcessor, value: int) -> bool:
    if not _msrs_of_user_interrupts.store(cpu, value & ~_UIF):
        return False
    cpu.state.user_interrupt_flag = bool(value & _UIF)
    return True


_REGISTERS: Final = (
    _Register(BNDREGS, 0, _load_bounds, _store_bounds),
    _Register(BNDCSR, 0, _load_bounds_configuration, _store_bounds_configuration),
    _Register(PKRU, 0, _load_pkru, _store_pkru),
    _msrs(CET_USER, IA32_U_CET, IA32_PL0_SSP + 3),
    _msrs(CET_SUPERVISOR, IA32_PL0_SSP, IA32_PL0_SSP + 1, IA32_PL0_SSP + 2),
    _Register(HDC, 1, _load_hdc, _store_hdc),
    _Register(USER_INTERRUPTS, 0, _load_user_interrupts, _store_user_interrupts),
)


# XSETBV and XGETBV


def _require_osxsave(cpu: LogicalProcessor, feature: str = "XSAVE") -> None:
    require_feature(cpu, feature)
    if not cpu.state.cr4 & Cr4.OSXSAVE:
        raise ud()


def xsetbv(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XSETBV: the intercept of SVM comes before the check of privilege, the VM exit of VMX after it."""
    state, is_amd = cpu.state, cpu.profile.is_amd
    _require_osxsave(cpu)
    if is_amd and cpu.intercepts(SIMPLE[Plain.XSETBV], instruction):
        return
    require_ring_0(cpu)
    if not is_amd and cpu.intercepts(SIMPLE[Plain.XSETBV], instruction):
        return
    value = _mask_operand(cpu)
    if state.gpr[Gpr.RCX] & MASK32 != _XCR0 or value & ~cpu.profile.xcr0_supported or not value & X87_STATE:
        raise gp(0)
    if value & MPX_STATE not in (0, MPX_STATE):
        raise gp(0)
    state.xcr0 = value
    cpu.changed_system_state()
    cpu.retire(instruction)


def xgetbv(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XGETBV of XCR0, or of those of its components that are in use."""
    _require_osxsave(cpu)
    state, number = cpu.state, cpu.state.gpr[Gpr.RCX] & MASK32
    value = state.xcr0
    if number == _XINUSE and cpu.profile.has("XGETBV_1"):
        value &= _in_use(cpu, cpu.engine.legacy_area())
    elif number != _XCR0:
        raise gp(0)
    state.gpr[Gpr.RAX], state.gpr[Gpr.RDX] = value & MASK32, value >> 32
    cpu.retire(instruction)


# What all of the family have in common


@frozen
class _Area(StateArea):
    """A save area; ``requested`` are the components that the instruction is about.

    ``enabled`` are those that it could be about.
    """

    instruction: Instruction
    enabled: int
    requested: int

    @property
    def wide(self) -> bool:
        """Whether the x87 pointers are 64 bits each."""
        return self.instruction.mnemonic in _WIDE

    def reach(self, end: int, *, write: bool) -> None:
        """The faults of segmentation, and for not being canonical, of an area of ``end`` bytes."""
        if end > LEGACY_AND_HEADER_SIZE:
            operand_address(self.cpu, self.instruction, end, write=write)


def _mask_operand(cpu: LogicalProcessor) -> int:
    """EDX:EAX."""
    gpr = cpu.state.gpr
    return (gpr[Gpr.RDX] & MASK32) << 32 | gpr[Gpr.RAX] & MASK32


def _area(cpu: LogicalProcessor, instruction: Instruction, enabled: int, *, save: bool) -> _Area:
    linear = operand_address(cpu, instruction, LEGACY_AND_HEADER_SIZE, write=save)
    if linear % ALIGNMENT:
        raise gp(0)
    return _Area(cpu, linear, instruction, enabled, _mask_operand(cpu) & enabled)


def _user_area(cpu: LogicalProcessor, instruction: Instruction, feature: str, *, save: bool) -> _Area:
    _require_osxsave(cpu, feature)
    require_not_task_switched(cpu)
    return _area(cpu, instruction, cpu.state.xcr0, save=save)


def _supervisor_area(cpu: LogicalProcessor, instruction: Instruction, *, save: bool) -> _Area | None:
    """None after a VM exit."""
    _require_osxsave(cpu, "XSAVES")
    require_not_task_switched(cpu)
    require_ring_0(cpu)
    supervisor = cpu.msrs.values.get(IA32_XSS, 0)
    if cpu.intercepts(ExtendedStateTransfer(save, _mask_operand(cpu) & supervisor), instruction):
        return None
    return _area(cpu, instruction, cpu.state.xcr0 | supervisor, save=save)


def _in_use(cpu: LogicalProcessor, legacy: bytes) -> int:
    """XINUSE, of all components whether enabled or not. MXCSR does not count."""
    used = sum(each.mask for each in _REGISTERS if _exists(cpu, each) and each.load(cpu) != each.initial)
    if legacy[X87_CONTROL] != _INITIAL_X87 or any(legacy[X87_REGISTERS]):
        used |= X87_STATE
    return used | SSE_STATE if any(legacy[xmm_registers(cpu)]) else used


def _exists(cpu: LogicalProcessor, register: _Register) -> bool:
    return bool((cpu.profile.xcr0_supported | cpu.profile.xss_supported) & register.mask)


# XSAVE, XSAVEOPT, XSAVEC, XSAVES


def _offset(area: _Area, component: StateComponent, format_: int) -> int:
    if format_ & COMPACTED:
        return compacted_offset(component, format_)
    return standard_offset(component, amd=area.cpu.profile.is_amd)


def _parts(area: _Area, legacy: bytes, saved: int, format_: int) -> list[tuple[int, bytes]]:
    """Offset and content of what is stored of the components ``saved``, in the format that XCOMP_BV ``format_`` says.

    MXCSR is part of SSE state in the compacted format; in the standard format it is stored whenever that is requested.
    """
    cpu, parts = area.cpu, []
    if saved & X87_STATE:
        pointers = legacy[X87_CONTROL]
        parts.append((0, pointers if area.wide else narrow(pointers)))
        parts.append((X87_REGISTERS.start, legacy[X87_REGISTERS]))
    if (saved if format_ else area.requested) & SSE_STATE:
        parts.append((MXCSR.start, legacy[_MXCSR_AND_MASK]))
    if saved & SSE_STATE:
        parts.append((XMM, legacy[xmm_registers(cpu)]))
    for each in _REGISTERS:
        if saved & each.mask:
            size = each.component.size
            parts.append((_offset(area, each.component, format_), each.load(cpu).to_bytes(size, "little")))
    return parts


def _save(area: _Area, *, omit_initial: bool, compact: bool) -> None:
    """Store the requested components, all or those in use; the header says which of them are in use."""
    cpu, legacy = area.cpu, area.cpu.engine.legacy_area()
    in_use = _in_use(cpu, legacy) & area.requested
    if compact and area.requested & SSE_STATE and legacy[MXCSR] != _INITIAL_MXCSR:
        in_use |= SSE_STATE
    format_ = area.requested | COMPACTED if compact else 0
    parts = _parts(area, legacy, in_use if omit_initial else area.requested, format_)
    area.reach(max((offset + len(data) for offset, data in parts), default=0), write=True)
    for offset, data in parts:
        area.check_writable(offset, len(data))
    area.check_writable(HEADER, 16 if compact else 8)
    if compact:
        parts.append((HEADER, struct.pack("<QQ", in_use, format_)))
    else:
        present = int.from_bytes(area.read(HEADER, 8), "little") & ~area.requested | in_use
        parts.append((HEADER, present.to_bytes(8, "little")))
    for offset, data in parts:
        area.write(offset, data)
    if omit_initial and in_use & _USER_INTERRUPTS:
        set_notification_vector(cpu.msrs.values, 0)
    cpu.retire(area.instruction)


def xsave(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XSAVE."""
    _save(_user_area(cpu, instruction, "XSAVE", save=True), omit_initial=False, compact=False)


def xsaveopt(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XSAVEOPT."""
    _save(_user_area(cpu, instruction, "XSAVEOPT", save=True), omit_initial=True, compact=False)


def xsavec(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XSAVEC."""
    _save(_user_area(cpu, instruction, "XSAVEC", save=True), omit_initial=True, compact=True)


def xsaves(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XSAVES."""
    area = _supervisor_area(cpu, instruction, save=True)
    if area is not None:
        _save(area, omit_initial=True, compact=True)


# XRSTOR, XRSTORS


def xrstor(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XRSTOR."""
    area = _user_area(cpu, instruction, "XSAVE", save=False)
    header = Header.parse(area.read(HEADER, HEADER_SIZE))
    if not header.is_valid(area.enabled, compaction=cpu.profile.has("XSAVEC")):
        raise gp(0)
    _restore(area, header)


def xrstors(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """XRSTORS."""
    area = _supervisor_area(cpu, instruction, save=False)
    if area is None:
        return
    header = Header.parse(area.read(HEADER, HEADER_SIZE))
    if not (header.compacted and header.is_valid(area.enabled, compaction=True)):
        raise gp(0)
    if area.requested & header.present & _USER_INTERRUPTS and notification_vector(cpu.msrs.values):
        raise gp(0)
    _restore(area, header)


def _restore(area: _Area, header: Header) -> None:
    """Load the requested components that are present, and give the others their initial configuration."""
    cpu, loaded = area.cpu, area.requested & header.present
    legacy = _loaded_legacy(area, header)
    values = []
    for each in _REGISTERS:
        if loaded & each.mask:
            offset = _offset(area, each.component, header.format)
            area.reach(offset + each.component.size, write=False)
            values.append((each, int.from_bytes(area.read(offset, each.component.size), "little")))
        elif area.requested & each.mask:
            values.append((each, each.initial))
    # Supervisor state can be refused; it comes last in the order of bits, and before all that cannot be.
    former: list[tuple[_Register, int]] = []
    for register, value in reversed(values):
        former.append((register, register.load(cpu)))
        if not register.store(cpu, value):
            for changed, old in former:
                changed.store(cpu, old)
            raise gp(0)
    if area.requested & (X87_STATE | SSE_STATE):
        load_registers(cpu, legacy)
    cpu.retire(area.instruction)


def _loaded_legacy(area: _Area, header: Header) -> bytearray:
    """The x87 and SSE registers as they will be; #GP(0) for bits that MXCSR has not."""
    loaded, initial = area.requested & header.present, area.requested & ~header.present
    legacy, xmm = bytearray(area.cpu.engine.legacy_area()), xmm_registers(area.cpu)
    if loaded & X87_STATE:
        pointers = area.read(0, X87_CONTROL.stop)
        legacy[X87_CONTROL] = pointers if area.wide else narrow(pointers)
        legacy[X87_REGISTERS] = area.read(X87_REGISTERS.start, 128)
    elif initial & X87_STATE:
        legacy[X87_CONTROL], legacy[X87_REGISTERS] = _INITIAL_X87, bytes(128)
    if (loaded if header.compacted else area.requested) & SSE_STATE:
        legacy[MXCSR] = area.read(MXCSR.start, 4)
        check_mxcsr(legacy)
    elif initial & SSE_STATE:
        legacy[MXCSR] = _INITIAL_MXCSR
    if loaded & SSE_STATE:
        legacy[xmm] = area.read(XMM, xmm.stop - xmm.start)
    elif initial & SSE_STATE:
        legacy[xmm] = bytes(xmm.stop - xmm.start)
    return legacy


HANDLERS: Final = {
    Mnemonic.XSETBV: xsetbv,
    Mnemonic.XGETBV: xgetbv,
    Mnemonic.XSAVE: xsave,
    Mnemonic.XSAVE64: xsave,
    Mnemonic.XSAVEOPT: xsaveopt,
    Mnemonic.XSAVEOPT64: xsaveopt,
    Mnemonic.XSAVEC: xsavec,
    Mnemonic.XSAVEC64: xsavec,
    Mnemonic.XSAVES: xsaves,
    Mnemonic.XSAVES64: xsaves,
    Mnemonic.XRSTOR: xrstor,
    Mnemonic.XRSTOR64: xrstor,
    Mnemonic.XRSTORS: xrstors,
    Mnemonic.XRSTORS64: xrstors,
}
