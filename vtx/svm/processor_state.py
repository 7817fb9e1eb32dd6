"""Between the processor's registers and the state-save area: the guest's at VMRUN and #VMEXIT, the host's around it.

Spec: APM Vol. 2, "VMRUN Instruction", "RFLAGS Register", "#VMEXIT", "VMSAVE and VMLOAD Instructions", "Layout of VMCB".
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Final

from vtx.svm import places as at
from vtx.x86.instructions.control import CR0_DEFINED
from vtx.x86.linear import linear_address_width
from vtx.x86.msr_table import (
    IA32_CSTAR,
    IA32_FMASK,
    IA32_LSTAR,
    IA32_STAR,
    IA32_SYSENTER_CS,
    IA32_SYSENTER_EIP,
    IA32_SYSENTER_ESP,
)
from vtx.x86.state import (
    MASK32,
    MASK64,
    AccessRights,
    Activity,
    CpuState,
    Cr0,
    DescriptorTable,
    Efer,
    Rflags,
    Segment,
    Shadow,
)
from vtx.x86.virtualization import Processor

_PRESENT: Final = 0x80
_UNUSABLE: Final = int(AccessRights.UNUSABLE)
_DPL: Final = 3 << 5
_PE: Final = int(Cr0.PE)
_PG: Final = int(Cr0.PG)
_ET: Final = int(Cr0.ET)
_CR0: Final = CR0_DEFINED & ~_ET
_LME: Final = int(Efer.LME)
_LMA: Final = int(Efer.LMA)
_VM: Final = int(Rflags.VM)
_RFLAGS: Final = 0x3F_7FD5
_FIXED_1: Final = int(Rflags.FIXED_1)
_DR6_WRITABLE: Final = 0x1_E00F
_DR6_FIXED: Final = 0xFFFF_0FF0
_DR7_RESERVED: Final = 0xD800
DR7_DISABLED: Final = 0x400

# The MSRs of VMLOAD and VMSAVE, in the order of the fields from STAR on; None is KernelGsBase.
_SYSTEM_CALL_MSRS: Final = (
    *(IA32_STAR, IA32_LSTAR, IA32_CSTAR, IA32_FMASK, None),
    *(IA32_SYSENTER_CS, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP),
)


@cache
def _rights_of(attributes: int) -> int:
    """Access rights of a segment whose attributes are these 16 bits."""
    rights = attributes & 0xFF | (attributes & 0xF00) << 4
    return rights if attributes & _PRESENT else rights | _UNUSABLE


@lru_cache(maxsize=1 << 12)
def _attributes_of(rights: int) -> int:
    """The other way round: what is unusable is not present."""
    attributes = rights & 0xFF | rights >> 4 & 0xF00
    return attributes & ~_PRESENT if rights & _UNUSABLE else attributes


def _load_segment(segment: Segment, values: list[int], place: int, width: int) -> None:
    """A segment register from its four fields; bases are sign-extended from ``width`` bits."""
    segment.selector, attributes, segment.limit, base = values[place : place + 4]
    segment.access_rights = _rights_of(attributes)
    segment.base = _canonical(base, width) if base >> width - 1 else base


def _save_segment(segment: Segment, values: list[int], place: int) -> None:
    values[place : place + 4] = (
        segment.selector,
        _attributes_of(segment.access_rights),
        segment.limit,
        segment.base,
    )


def _canonical(address: int, width: int) -> int:
    sign = 1 << width - 1
    return ((address & (sign << 1) - 1 ^ sign) - sign) & MASK64


def _load_table(table: DescriptorTable, values: list[int], place: int, width: int) -> None:
    table.limit = values[place + 2] & 0xFFFF
    base = values[place + 3]
    table.base = _canonical(base, width) if base >> width - 1 else base


def _save_table(table: DescriptorTable, values: list[int], place: int) -> None:
    values[place + 2], values[place + 3] = table.limit, table.base


def _load_common(state: CpuState, values: list[int]) -> None:
    """What is loaded the same way for guest and host."""
    cr0 = values[at.CR0]
    state.cr0 = cr0 & _CR0 | _ET
    state.cr3 = values[at.CR3]
    state.cr4 = values[at.CR4]
    efer = values[at.EFER]
    state.efer = efer | _LMA if efer & _LME and cr0 & _PG else efer & ~_LMA
    state.rflags = values[at.RFLAGS] & _RFLAGS | _FIXED_1
    if state.efer & _LMA:
        state.rflags &= ~_VM  # long mode has no virtual-8086 mode, and ignores attempts to enter it
    state.rip = values[at.RIP]
    state.gpr[4] = values[at.RSP]
    state.gpr[0] = values[at.RAX]
    width = linear_address_width(state)
    place = at.ES
    for segment in state.segments[:4]:
        _load_segment(segment, values, place, width)
        place += at.SEGMENT_FIELDS
    if not state.in_64_bit_mode:
        state.rip &= MASK32
    _load_table(state.gdtr, values, at.GDTR, width)
    _load_table(state.idtr, values, at.IDTR, width)


def _save_common(state: CpuState, values: list[int]) -> None:
    es, cs, ss, ds = state.segments[:4]
    values[at.ES : at.ES + 4 * at.SEGMENT_FIELDS] = (
        *(es.selector, _attributes_of(es.access_rights), es.limit, es.base),
        *(cs.selector, _attributes_of(cs.access_rights), cs.limit, cs.base),
        *(ss.selector, _attributes_of(ss.access_rights), ss.limit, ss.base),
        *(ds.selector, _attributes_of(ds.access_rights), ds.limit, ds.base),
    )
    _save_table(state.gdtr, values, at.GDTR)
    _save_table(state.idtr, values, at.IDTR)
    values[at.CPL] = state.cpl
    values[at.EFER] = state.efer
    values[at.CR4], values[at.CR3], values[at.CR0] = state.cr4, state.cr3, state.cr0
    values[at.DR7], values[at.DR6] = state.dr7, state.dr6
    values[at.RFLAGS], values[at.RIP] = state.rflags, state.rip
    values[at.RSP], values[at.RAX] = state.gpr[4], state.gpr[0]


def load_guest(state: CpuState, values: list[int]) -> None:
    """Load the guest's registers; the consistency checks have passed."""
    _load_common(state, values)
    state.cr2 = values[at.CR2]
    state.dr6 = values[at.DR6] & _DR6_WRITABLE | _DR6_FIXED
    state.dr7 = values[at.DR7] & ~_DR7_RESERVED | DR7_DISABLED
    # The privilege level has a place of its own; here it is the DPL of SS.
    if not state.cr0 & _PE:
        cpl = 0
    elif state.rflags & _VM:
        cpl = 3
    else:
        cpl = values[at.CPL] & 3
    stack = state.segments[2]
    stack.access_rights = stack.access_rights & ~_DPL | cpl << 5
    state.shadow = Shadow.STI if values[at.INTERRUPT_STATE] & 1 else Shadow.NONE
    state.activity = Activity.ACTIVE
    state.pending_debug = 0


def save_guest(state: CpuState, values: list[int]) -> None:
    """Save the guest's registers into ``values``."""
    _save_common(state, values)
    values[at.CR2] = state.cr2
    values[at.INTERRUPT_STATE] = values[at.INTERRUPT_STATE] & ~1 | (1 if state.shadow else 0)


def save_host(state: CpuState, values: list[int]) -> None:
    """Save the host's registers into ``values``; RIP is already that of the instruction after VMRUN."""
    _save_common(state, values)


def load_host(state: CpuState, values: list[int]) -> None:
    """Load the host's registers: at privilege level 0 in protected mode, without breakpoints."""
    _load_common(state, values)
    state.cr0 |= _PE
    state.rflags &= ~_VM
    state.dr7 = DR7_DISABLED
    state.segments[2].access_rights &= ~_DPL
    state.shadow = Shadow.NONE
    state.activity = Activity.ACTIVE
    state.pending_debug = 0


def load_more(processor: Processor, values: list[int]) -> None:
    """VMLOAD: FS, GS, LDTR and TR with their hidden parts, and the MSRs of SYSCALL, SYSENTER and SWAPGS."""
    state, msrs = processor.state, processor.msrs.values
    width = linear_address_width(state)
    for segment, place in ((state.segments[4], at.FS), (state.segments[5], at.GS), (state.ldtr, at.LDTR)):
        _load_segment(segment, values, place, width)
    _load_segment(state.tr, values, at.TR, width)
    for place, index in enumerate(_SYSTEM_CALL_MSRS, at.STAR):
        if index is None:
            state.kernel_gs_base = _canonical(values[place], width)
        else:
            msrs[index] = values[place] & MASK32 if index in (IA32_FMASK, IA32_SYSENTER_CS) else values[place]


def save_more(processor: Processor, values: list[int]) -> None:
    """VMSAVE: what VMLOAD loads."""
    state, msrs = processor.state, processor.msrs.values
    for segment, place in ((state.segments[4], at.FS), (state.segments[5], at.GS), (state.ldtr, at.LDTR)):
        _save_segment(segment, values, place)
    _save_segment(state.tr, values, at.TR)
    for place, index in enumerate(_SYSTEM_CALL_MSRS, at.STAR):
        values[place] = state.kernel_gs_base if index is None else msrs[index]
