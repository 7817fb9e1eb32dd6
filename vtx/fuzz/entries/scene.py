"""The valid VMCSs that near-valid ones are made from, and the memory that they point to.

All memory lies in one stretch of 2 MiB, away from everything that a flipped bit of an address in it could hit. The
guest has nothing but INT3 to execute, and every exception is a VM exit: whatever a change does to its mode, its paging
or its RIP, it is back soon.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from attrs import frozen

from vmcs import controls as c
from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.controls import Control
from vmcs.fields import CONTROL_FIELDS, FIELDS, Field
from vmcs.region import SHADOW_INDICATOR
from vmcs.template import template
from vtx.x86.state import Cr0, Cr4, Efer

START: Final = 0x0280_0000
PAGE: Final = 0x1000


def _page(number: int) -> int:
    return START + number * PAGE


# Paging structures of the guest.
PML4, PDPT, DIRECTORY, TABLE, LOW_TABLE = (_page(number) for number in (0, 1, 2, 3, 5))
PAE_POINTERS, DIRECTORY_32, TABLE_32, LOW_TABLE_32 = (_page(number) for number in range(6, 10))
# What the guest has: all of it is mapped one to one, and CODE in virtual-8086 mode also at LOW_CODE.
CODE, IDT, GDT, TSS, STACK = (_page(number) for number in range(16, 21))
LOW_CODE: Final = 0x2_0000
# What its hypervisor has.
EPT_TABLES: Final = _page(32)  # one page a level, from PML4 to page table
VIRTUAL_APIC, APIC_ACCESS, MSR_AREA, SHADOW_VMCS, PML_LOG, INFORMATION, EPTP_LIST, BITMAPS = (
    _page(number) for number in range(40, 48)
)

_PRESENT: Final = 0x63  # present, writable, accessed, dirty
_USER: Final = 0x4
_EPT_MEMORY: Final = 0x37  # read, write, execute; write-back
_EPT_TABLE: Final = 0x7
_GUEST_PAGES: Final = (CODE, IDT, GDT, TSS, STACK)
_TABLE_PAGES: Final = tuple(range(PML4, LOW_TABLE_32 + PAGE, PAGE))
_INT3: Final = b"\xcc"
_SYSENTER_CS, _FS_BASE = 0x174, 0xC000_0100
_MSR_ENTRIES: Final = 5  # that can be loaded; the one after them cannot


def memory(capabilities: Capabilities) -> dict[int, bytes]:
    """Pages by physical address, for a processor of these ``capabilities``; the rest of the stretch is zeros."""
    index = START >> 21 & 0x1FF
    leaves = {page >> 12 & 0x1FF: page | _PRESENT | _USER for page in _GUEST_PAGES}
    leaves_32 = {page >> 12 & 0x3FF: page | _PRESENT | _USER for page in _GUEST_PAGES}
    low = {LOW_CODE >> 12: CODE | _PRESENT | _USER}
    upper = _PRESENT | _USER
    ept = EPT_TABLES
    tables = {
        PML4: _table64({0: PDPT | upper}),
        PDPT: _table64({0: DIRECTORY | upper}),
        DIRECTORY: _table64({0: LOW_TABLE | upper, index: TABLE | upper}),
        TABLE: _table64(leaves),
        LOW_TABLE: _table64(low),
        PAE_POINTERS: _table64({0: DIRECTORY | 1}),
        DIRECTORY_32: _table32({0: LOW_TABLE_32 | upper, START >> 22: TABLE_32 | upper}),
        TABLE_32: _table32(leaves_32),
        LOW_TABLE_32: _table32(low),
        ept: _table64({0: ept + PAGE | _EPT_TABLE}),
        ept + PAGE: _table64({0: ept + 2 * PAGE | _EPT_TABLE}),
        ept + 2 * PAGE: _table64({index: ept + 3 * PAGE | _EPT_TABLE}),
        ept + 3 * PAGE: _table64(
            {page >> 12 & 0x1FF: page | _EPT_MEMORY for page in (*_GUEST_PAGES, *_TABLE_PAGES, APIC_ACCESS)}
        ),
        CODE: _INT3 * PAGE,
        MSR_AREA: b"".join(struct.pack("<2IQ", _SYSENTER_CS, 0, value) for value in range(_MSR_ENTRIES))
        + struct.pack("<2IQ", _FS_BASE, 0, 0),
        SHADOW_VMCS: struct.pack("<I", capabilities.revision_identifier | SHADOW_INDICATOR),
        EPTP_LIST: struct.pack("<Q", EPT_TABLES | _EPT_4_LEVELS),
    }
    written = dict.fromkeys((IDT, GDT, TSS, STACK, VIRTUAL_APIC, APIC_ACCESS, PML_LOG, INFORMATION), b"")
    return {address: data.ljust(PAGE, b"\0") for address, data in (tables | written).items()}


def _table64(entries: Mapping[int, int]) -> bytes:
    return struct.pack("<512Q", *(entries.get(index, 0) for index in range(512)))


def _table32(entries: Mapping[int, int]) -> bytes:
    return struct.pack("<1024I", *(entries.get(index, 0) for index in range(1024)))


_EPT_4_LEVELS: Final = 0x1E  # write-back, page-walk length 4
_ALL_ONES: Final = (1 << 64) - 1
_RIGHTS: Final = tuple(each for each in FIELDS if each.name.startswith("Guest") and "access rights" in each.name)
_DATA_SEGMENTS: Final = (
    (f.GUEST_SS_SELECTOR, f.GUEST_SS_BASE, f.GUEST_SS_LIMIT, f.GUEST_SS_ACCESS_RIGHTS),
    (f.GUEST_DS_SELECTOR, f.GUEST_DS_BASE, f.GUEST_DS_LIMIT, f.GUEST_DS_ACCESS_RIGHTS),
    (f.GUEST_ES_SELECTOR, f.GUEST_ES_BASE, f.GUEST_ES_LIMIT, f.GUEST_ES_ACCESS_RIGHTS),
    (f.GUEST_FS_SELECTOR, f.GUEST_FS_BASE, f.GUEST_FS_LIMIT, f.GUEST_FS_ACCESS_RIGHTS),
    (f.GUEST_GS_SELECTOR, f.GUEST_GS_BASE, f.GUEST_GS_LIMIT, f.GUEST_GS_ACCESS_RIGHTS),
)
_CR0: Final = int(Cr0.PG | Cr0.NE | Cr0.ET | Cr0.PE | Cr0.WP)
_CR4: Final = int(Cr4.VMXE | Cr4.PAE)
_EFER: Final = int(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE)
_VM86: Final = 1 << 17

# Common to all: where the memory is, and that everything exits.
_COMMON: Final[Mapping[Field, int]] = {
    f.EXCEPTION_BITMAP: 0xFFFF_FFFF,
    f.EPT_POINTER: EPT_TABLES | _EPT_4_LEVELS,
    f.IO_BITMAP_A_ADDRESS: BITMAPS,
    f.IO_BITMAP_B_ADDRESS: BITMAPS,
    f.MSR_BITMAP_ADDRESS: BITMAPS,
    f.VMREAD_BITMAP_ADDRESS: BITMAPS,
    f.VMWRITE_BITMAP_ADDRESS: BITMAPS,
    f.VM_ENTRY_MSR_LOAD_ADDRESS: MSR_AREA,
    f.VM_EXIT_MSR_LOAD_ADDRESS: MSR_AREA,
    f.VM_EXIT_MSR_STORE_ADDRESS: MSR_AREA,
    f.VIRTUAL_APIC_ADDRESS: VIRTUAL_APIC,
    f.APIC_ACCESS_ADDRESS: APIC_ACCESS,
    f.PML_ADDRESS: PML_LOG,
    f.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: INFORMATION,
    f.EPTP_LIST_ADDRESS: EPTP_LIST,
    f.TSC_MULTIPLIER: 1 << 48,
    f.HOST_CR0: _CR0,
    f.HOST_CR4: _CR4,
    f.HOST_IA32_EFER: _EFER,
    f.HOST_IA32_PAT: 0x0007_0406_0007_0406,
    f.GUEST_IA32_PAT: 0x0007_0406_0007_0406,
    f.GUEST_CR0: _CR0,
    f.GUEST_CR4: _CR4,
    f.GUEST_CR3: PML4,
    f.GUEST_RIP: CODE,
    f.GUEST_RSP: STACK + PAGE // 2,
    f.GUEST_IDTR_BASE: IDT,
    f.GUEST_GDTR_BASE: GDT,
    f.GUEST_TR_BASE: TSS,
}


@frozen
class Base:
    """A valid VMCS: what is changed of the common one; ``on`` and ``off`` are controls."""

    name: str
    on: tuple[Control, ...] = ()
    off: tuple[Control, ...] = ()
    fields: Mapping[Field, int] = {}


_WITHOUT_EPT: Final = (c.ENABLE_EPT, c.ENABLE_VPID, c.UNRESTRICTED_GUEST)
_PROTECTED: Final[Mapping[Field, int]] = {
    f.GUEST_IA32_EFER: 0,
    f.GUEST_CS_ACCESS_RIGHTS: 0xC09B,
    f.GUEST_CR3: PAE_POINTERS,
    f.GUEST_PDPTE0: DIRECTORY | 1,
}
_RING_3: Final[Mapping[Field, int]] = {
    f.GUEST_CS_SELECTOR: 0x0B,
    f.GUEST_SS_SELECTOR: 0x13,
    f.GUEST_CS_ACCESS_RIGHTS: 0xA0FB,
    **{rights: 0xC0F3 for _, _, _, rights in _DATA_SEGMENTS[:3]},
    f.GUEST_FS_ACCESS_RIGHTS: 1 << 16,
    f.GUEST_GS_ACCESS_RIGHTS: 1 << 16,
}


def _flat_16(base: int) -> dict[Field, int]:
    segments = ((f.GUEST_CS_SELECTOR, f.GUEST_CS_BASE, f.GUEST_CS_LIMIT, f.GUEST_CS_ACCESS_RIGHTS), *_DATA_SEGMENTS)
    return {
        each: value
        for segment in segments
        for each, value in zip(segment, (base >> 4 & 0xFFFF, base, 0xFFFF, 0x93), strict=True)
    }


_REAL: Final[Mapping[Field, int]] = {
    **_PROTECTED,
    **_flat_16(CODE),
    f.GUEST_CS_ACCESS_RIGHTS: 0x9B,
    f.GUEST_CR0: int(Cr0.NE | Cr0.ET),
    f.GUEST_CR4: int(Cr4.VMXE),
    f.GUEST_RIP: 0x100,
    f.GUEST_RSP: 0x200,
}
_VIRTUAL_8086: Final[Mapping[Field, int]] = {
    **_PROTECTED,
    **{each: 0xF3 if each in _RIGHTS else value for each, value in _flat_16(LOW_CODE).items()},
    f.GUEST_CR3: DIRECTORY_32,
    f.GUEST_CR4: int(Cr4.VMXE),
    f.GUEST_RIP: 0x100,
    f.GUEST_RSP: 0x200,
    f.GUEST_RFLAGS: _VM86 | 2,
}
_APIC: Final = (
    c.USE_TPR_SHADOW,
    c.VIRTUALIZE_X2APIC_MODE,
    c.APIC_REGISTER_VIRTUALIZATION,
    c.VIRTUAL_INTERRUPT_DELIVERY,
)
_INJECTION: Final = f.VM_ENTRY_INTERRUPTION_INFORMATION
_LENGTH: Final = f.VM_ENTRY_INSTRUCTION_LENGTH

BASES: Final[tuple[Base, ...]] = (
    Base("64-bit"),
    Base("64-bit, privilege level 3", fields=_RING_3),
    Base("64-bit, no EPT", off=_WITHOUT_EPT),
    Base("64-bit, no secondary controls", off=(c.ACTIVATE_SECONDARY_CONTROLS, *_WITHOUT_EPT)),
    Base("64-bit, timer", on=(c.ACTIVATE_VMX_PREEMPTION_TIMER,)),
    Base("compatibility mode", fields={f.GUEST_CS_ACCESS_RIGHTS: 0xC09B}),
    Base("PAE paging", off=(c.ENTRY_IA32E_MODE_GUEST,), fields=_PROTECTED),
    Base("PAE paging, no EPT", off=(c.ENTRY_IA32E_MODE_GUEST, *_WITHOUT_EPT), fields=_PROTECTED),
    Base(
        "32-bit paging",
        off=(c.ENTRY_IA32E_MODE_GUEST,),
        fields={**_PROTECTED, f.GUEST_CR3: DIRECTORY_32, f.GUEST_CR4: int(Cr4.VMXE)},
    ),
    Base(
        "no paging",
        off=(c.ENTRY_IA32E_MODE_GUEST,),
        fields={**_PROTECTED, f.GUEST_CR0: int(Cr0.NE | Cr0.ET | Cr0.PE), f.GUEST_CR4: int(Cr4.VMXE)},
    ),
    Base("real mode", off=(c.ENTRY_IA32E_MODE_GUEST,), fields=_REAL),
    Base("virtual-8086 mode", off=(c.ENTRY_IA32E_MODE_GUEST,), fields=_VIRTUAL_8086),
    Base("virtual-8086 mode, no EPT", off=(c.ENTRY_IA32E_MODE_GUEST, *_WITHOUT_EPT), fields=_VIRTUAL_8086),
    Base("TPR shadow", on=(c.USE_TPR_SHADOW,)),
    Base("virtual APIC", on=(*_APIC, c.EXTERNAL_INTERRUPT_EXITING)),
    Base("APIC accesses", on=(c.USE_TPR_SHADOW, c.VIRTUALIZE_APIC_ACCESSES, c.APIC_REGISTER_VIRTUALIZATION)),
    Base("virtual NMIs", on=(c.NMI_EXITING, c.VIRTUAL_NMIS), fields={f.GUEST_INTERRUPTIBILITY_STATE: 8}),
    Base("VMCS shadowing", on=(c.VMCS_SHADOWING,), fields={f.VMCS_LINK_POINTER: SHADOW_VMCS}),
    Base("page-modification log", on=(c.ENABLE_PML,), fields={f.EPT_POINTER: EPT_TABLES | _EPT_4_LEVELS | 1 << 6}),
    Base("virtualization exceptions", on=(c.EPT_VIOLATION_VE, c.ENABLE_VM_FUNCTIONS)),
    Base("MSR loading", fields={f.VM_ENTRY_MSR_LOAD_COUNT: _MSR_ENTRIES}),
    Base(
        "everything loaded",
        on=(
            c.ENTRY_LOAD_DEBUG_CONTROLS,
            c.ENTRY_LOAD_IA32_PAT,
            c.EXIT_LOAD_IA32_PAT,
            c.ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL,
            c.EXIT_LOAD_IA32_PERF_GLOBAL_CTRL,
        ),
    ),
    Base("#GP injected", fields={_INJECTION: 0x8000_0B0D}),
    Base("#DB injected", fields={_INJECTION: 0x8000_0301}),
    Base("NMI injected", fields={_INJECTION: 0x8000_0202}),
    Base("interrupt injected", fields={_INJECTION: 0x8000_0030, f.GUEST_RFLAGS: 0x202}),
    Base("software interrupt injected", fields={_INJECTION: 0x8000_0430, _LENGTH: 2}),
    Base("INT3 injected", fields={_INJECTION: 0x8000_0603, _LENGTH: 1}),
)


def fields_of(base: Base, capabilities: Capabilities) -> dict[Field, int]:
    """Every field that software can write, as ``base`` has it; controls the processor lacks stay off."""
    vmcs = template(capabilities)
    for each, value in (*_COMMON.items(), *base.fields.items()):
        if capabilities.has(each):
            vmcs[each] = value
    for control in base.on:
        if capabilities.allows(control):
            vmcs[CONTROL_FIELDS[control.word]] |= control.mask
    for control in base.off:
        if not capabilities.requires(control):
            vmcs[CONTROL_FIELDS[control.word]] &= ~control.mask
    return {each: vmcs[each] for each in FIELDS if capabilities.has(each) and not each.read_only}
