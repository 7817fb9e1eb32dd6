"""The valid VMCBs that near-valid ones are made from, and the memory that they point to.

All memory lies in one stretch of 2 MiB, away from everything that a flipped bit of an address in it could hit. Guests
execute the programs of `vtx.fuzz.vmruns.programs`, and VMMCALL wherever else they get to: every exception that is not
intercepted has a handler that is nothing but that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Final

from attrs import frozen

from vmcs.vmcb import layouts
from vmcs.vmcb.fields import BY_NAME, FIELDS, VmcbField
from vmcs.vmcb.intercepts import Exit
from vtx.fuzz.vmruns.programs import BLOCK, PROGRAMS, SAFE_MSRS, SAFE_PORTS, SLOT, VMMCALL
from vtx.x86.state import MASK64, Cr0, Cr4, Efer, Gpr

START: Final = 0x0280_0000
PAGE: Final = 0x1000


def _page(number: int) -> int:
    return START + number * PAGE


# Paging structures of the guest.
PML4, PDPT, DIRECTORY, TABLE, LOW_TABLE, PAE_POINTERS, DIRECTORY_32, TABLE_32, LOW_TABLE_32 = map(_page, range(9))
# What the guest has. All of it is mapped one to one; all of it also from LOW on, for virtual-8086 mode.
CODE: Final = _page(16)
CODE_PAGES: Final = 2
HANDLERS, IDT_64, IDT_32, IDT_16, GDT, TSS, STACK, DATA, READ_ONLY, NOT_THERE, NOT_NESTED = map(_page, range(18, 29))
LOW: Final = 0x2_0000
TSS_32: Final = TSS + PAGE // 2
# What its hypervisor has.
NESTED_TABLES: Final = _page(32)  # one page a level, from PML4 to page table
NESTED_LOW_TABLE: Final = _page(36)
IOPM, MSRPM, ANOTHER_BLOCK = _page(40), _page(43), BLOCK
TABLES: Final = frozenset(_page(number) for number in (*range(9), *range(32, 37)))
WATCHED: Final = frozenset((STACK, DATA))

_PRESENT, _WRITABLE, _USER, _ACCESSED, _DIRTY = 1, 2, 4, 0x20, 0x40
_ALL: Final = _PRESENT | _WRITABLE | _USER | _ACCESSED | _DIRTY
_POINTER: Final = _PRESENT | _WRITABLE | _USER | _ACCESSED
_LEAVES: Final[Mapping[int, int]] = {
    **{page: page | _ALL for page in range(CODE, READ_ONLY, PAGE)},
    READ_ONLY: READ_ONLY | _ALL & ~_WRITABLE,
    NOT_NESTED: NOT_NESTED | _ALL,
}
_GUEST_PAGES: Final = tuple(range(CODE, NOT_NESTED, PAGE))
_TABLE_PAGES: Final = tuple(range(PML4, LOW_TABLE_32 + PAGE, PAGE))

# Selectors of the guest's GDT.
CODE_64, DATA_0, CODE_32, CODE_64_USER, DATA_USER, NOT_PRESENT, TSS_SELECTOR = range(8, 64, 8)
_DESCRIPTORS: Final = (
    *(0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_9B00_0000_FFFF, 0x00AF_FB00_0000_FFFF),
    *(0x00CF_F300_0000_FFFF, 0x00CF_1300_0000_FFFF, 0x0000_8900_0000_0067 | (TSS & 0xFF_FFFF) << 16 | TSS >> 24 << 56),
)
_GATE_64, _GATE_32 = 0x8E, 0xEE  # the latter may be called from privilege level 3
HANDLER_SIZE: Final = 16


def memory() -> dict[int, bytes]:
    """Pages by physical address; the rest of the stretch is zeros."""
    index = START >> 21 & 0x1FF
    leaves = {page >> 12 & 0x1FF: entry for page, entry in _LEAVES.items()}
    low = {LOW + page - CODE >> 12: entry for page, entry in _LEAVES.items()}
    nested = NESTED_TABLES
    tables = {
        PML4: _table64({0: PDPT | _POINTER}),
        PDPT: _table64({0: DIRECTORY | _POINTER}),
        DIRECTORY: _table64({0: LOW_TABLE | _POINTER, index: TABLE | _POINTER}),
        TABLE: _table64(leaves),
        LOW_TABLE: _table64(low),
        PAE_POINTERS: _table64({0: DIRECTORY | 1}),
        DIRECTORY_32: _table32({0: LOW_TABLE_32 | _POINTER, START >> 22: TABLE_32 | _POINTER}),
        TABLE_32: _table32({page >> 12 & 0x3FF: entry for page, entry in _LEAVES.items()}),
        LOW_TABLE_32: _table32(low),
        nested: _table64({0: nested + PAGE | _POINTER}),
        nested + PAGE: _table64({0: nested + 2 * PAGE | _POINTER}),
        nested + 2 * PAGE: _table64({0: NESTED_LOW_TABLE | _POINTER, index: nested + 3 * PAGE | _POINTER}),
        NESTED_LOW_TABLE: _table64({LOW + page - CODE >> 12: page | _ALL for page in _GUEST_PAGES}),
        nested + 3 * PAGE: _table64({page >> 12 & 0x1FF: page | _ALL for page in (*_GUEST_PAGES, *_TABLE_PAGES)}),
    }
    return {address: data.ljust(PAGE, b"\0") for address, data in (tables | _guest_pages() | _maps()).items()}


def _guest_pages() -> dict[int, bytes]:
    code = bytearray((VMMCALL * PAGE)[: CODE_PAGES * PAGE])
    for number, program in enumerate(PROGRAMS):
        slot = program.code + VMMCALL * (SLOT // len(VMMCALL))
        code[number * SLOT : number * SLOT + SLOT] = slot[:SLOT]
    handler_code = (VMMCALL + bytes(HANDLER_SIZE - len(VMMCALL))) * 256
    handlers = [HANDLERS + vector * HANDLER_SIZE for vector in range(256)]
    tss_64 = struct.pack("<I3Q", 0, *[STACK + PAGE // 4] * 3)
    tss_32 = struct.pack("<3I", 0, STACK + PAGE // 4, DATA_0)
    return {
        **{CODE + offset: bytes(code[offset : offset + PAGE]) for offset in range(0, CODE_PAGES * PAGE, PAGE)},
        HANDLERS: handler_code,
        LOW + HANDLERS - CODE: handler_code,  # real mode knows no other place for them
        0: (VMMCALL * PAGE)[:PAGE],  # where many ways lead
        IDT_64: b"".join(
            struct.pack("<HHBBHII", each & 0xFFFF, CODE_64, 0, _GATE_64, each >> 16 & 0xFFFF, 0, 0) for each in handlers
        ),
        IDT_32: b"".join(struct.pack("<HHBBH", each & 0xFFFF, CODE_32, 0, _GATE_32, each >> 16) for each in handlers),
        IDT_16: b"".join(struct.pack("<HH", each - CODE & 0xFFFF, LOW >> 4) for each in handlers),
        GDT: struct.pack(f"<{len(_DESCRIPTORS)}Q", *_DESCRIPTORS),
        TSS: tss_64.ljust(TSS_32 - TSS, b"\0") + tss_32,
        **dict.fromkeys((STACK, DATA, READ_ONLY, NOT_THERE, NOT_NESTED), b""),
    }


def _maps() -> dict[int, bytes]:
    """Permission maps: everything is intercepted but what does no harm."""
    ports = bytearray(b"\xff" * (3 * PAGE))
    for port in SAFE_PORTS:
        ports[port >> 3] &= ~(1 << (port & 7))
    msrs = bytearray(b"\xff" * (2 * PAGE))
    for index in SAFE_MSRS:
        bit = 2 * (index & 0x1FFF) + (0x4000 if index >> 16 == 0xC000 else 0)
        msrs[bit >> 3] &= ~(3 << (bit & 7))
    pages = {IOPM: ports, MSRPM: msrs, ANOTHER_BLOCK: bytearray(PAGE)}
    return {
        start + offset: bytes(data[offset : offset + PAGE])
        for start, data in pages.items()
        for offset in range(0, len(data), PAGE)
    }


def _table64(entries: Mapping[int, int]) -> bytes:
    return struct.pack("<512Q", *(entries.get(index, 0) for index in range(512)))


def _table32(entries: Mapping[int, int]) -> bytes:
    return struct.pack("<1024I", *(entries.get(index, 0) for index in range(1024)))


# Fields: those of the control block, and the registers that it does not hold.

BLOCK_SIZE: Final = PAGE
RIP, RSP, RAX, RFLAGS = (BY_NAME[name] for name in ("RIP", "RSP", "RAX", "RFLAGS"))
REGISTERS: Final[Mapping[Gpr, VmcbField]] = {
    register: VmcbField(register.name, len(FIELDS) + register, BLOCK_SIZE + 8 * register, 8) for register in Gpr
} | {Gpr.RAX: RAX, Gpr.RSP: RSP}
HOST: Final = tuple(
    VmcbField(name, len(FIELDS) + len(Gpr) + number, BLOCK_SIZE + 8 * (len(Gpr) + number), 8)
    for number, name in enumerate(("debug exceptions in the host", "host CR0", "host CR4", "host EFER"))
)
"""What the harness adds: how the host was found, where it is not as it should be."""
BY_ENCODING: Final[Mapping[int, VmcbField]] = {each.encoding: each for each in (*FIELDS, *REGISTERS.values(), *HOST)}
ENCODINGS: Final = max(BY_ENCODING) + 1

# What #VMEXIT writes, what is about earlier VMRUNs, and what no profile here has.
_NOT_WRITTEN: Final = frozenset(
    BY_NAME[name]
    for name in (
        *("EXITCODE", "EXITINFO1", "EXITINFO2", "EXITINTINFO", "VMCB clean bits", "number of bytes fetched"),
        *("AVIC APIC_BAR", "AVIC APIC_BACKING_PAGE pointer", "AVIC LOGICAL_TABLE pointer"),
        *("AVIC PHYSICAL_TABLE pointer", "GDTR selector", "GDTR attributes", "IDTR selector", "IDTR attributes"),
    )
)
WRITTEN: Final = tuple(each for each in BY_ENCODING.values() if each not in _NOT_WRITTEN and each not in HOST)
# Which translations of the guest before this one would be used is nobody's business.
CHANGED: Final = tuple(each for each in WRITTEN if each is not BY_NAME["TLB_CONTROL"])

CR0, CR3, CR4, EFER, CPL = (BY_NAME[name] for name in ("CR0", "CR3", "CR4", "EFER", "CPL"))
NESTED_CONTROL: Final = BY_NAME["nested paging and encryption control"]
EVENTINJ: Final = BY_NAME["EVENTINJ"]
NEXT_RIP: Final = BY_NAME["nRIP"]
VIRTUAL: Final = BY_NAME["virtual interrupt control"]
INTERRUPT_STATE: Final = BY_NAME["interrupt state"]
INTERCEPTS: Final = FIELDS[:6]

_CR0_PAGED: Final = int(Cr0.PG | Cr0.ET | Cr0.PE | Cr0.WP)
_CR0_FLAT: Final = int(Cr0.ET | Cr0.PE)
_LONG: Final = int(Efer.SVME | Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE)
_LEGACY: Final = int(Efer.SVME | Efer.NXE)
_PAE: Final = int(Cr4.PAE)
_IF, _VM, _TF = 1 << 9, 1 << 17, 1 << 8
_SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS")


@frozen
class Base:
    """A valid VMCB: what is changed of the common one, by the name of the field.

    ``origin`` is what the guest's instructions know `CODE` as.
    """

    name: str
    fields: Mapping[str, int]
    origin: int = CODE


def _intercepts(numbers: Iterable[int]) -> dict[VmcbField, int]:
    words = dict.fromkeys(INTERCEPTS, 0)
    for number in numbers:
        words[INTERCEPTS[number >> 5]] |= 1 << (number & 31)
    return words


# What gets a guest back whatever it does, and keeps it from doing what emulators do not survive.
ALWAYS_INTERCEPTED: Final = _intercepts(
    (Exit.VMRUN, Exit.VMMCALL, Exit.SHUTDOWN, Exit.HLT, Exit.MWAIT, Exit.MWAIT_CONDITIONAL, Exit.SKINIT)
)
_MAPS_IN_USE: Final = _intercepts((Exit.IOIO, Exit.MSR))


def _segments(selectors: Mapping[str, int], attributes: Mapping[str, int], base: int = 0) -> dict[str, int]:
    values = {}
    for name in _SEGMENTS:
        values[f"{name} selector"] = selectors.get(name, selectors[""])
        values[f"{name} attributes"] = attributes.get(name, attributes[""])
        values[f"{name} limit"] = 0xFFFF if base else 0xFFFF_FFFF
        values[f"{name} base"] = base
    return values


_FLAT: Final = _segments({"": DATA_0, "CS": CODE_64}, {"": 0xC93, "CS": 0xA9B})
_COMMON: Final[Mapping[str, int]] = {
    **_FLAT,
    "IOPM_BASE_PA": IOPM,
    "MSRPM_BASE_PA": MSRPM,
    "guest ASID": 1,
    "TLB_CONTROL": layouts.TlbControl.ALL_ASIDS,
    "N_CR3": NESTED_TABLES,
    "GDTR limit": 8 * len(_DESCRIPTORS) - 1,
    "GDTR base": GDT,
    "IDTR limit": PAGE - 1,
    "IDTR base": IDT_64,
    "LDTR attributes": 0x82,
    "TR selector": TSS_SELECTOR,
    "TR attributes": 0x89,  # not busy, as QEMU uses no other
    "TR limit": 0x67,
    "TR base": TSS,
    "EFER": _LONG,
    "CR4": _PAE,
    "CR3": PML4,
    "CR0": _CR0_PAGED,
    "DR7": 0x400,
    "DR6": 0xFFFF_0FF0,
    "RFLAGS": 2,
    "RIP": 0,
    "RSP": STACK - CODE + PAGE // 2,
    "G_PAT": 0x0007_0406_0007_0406,
    "LSTAR": HANDLERS,
    "CSTAR": HANDLERS,
    "STAR": CODE_64 << 32 | (CODE_64_USER - 16 | 3) << 48,
    "SYSENTER_CS": CODE_64,
    "SYSENTER_ESP": STACK + PAGE // 4,
    "SYSENTER_EIP": HANDLERS,
}
_PROTECTED: Final[Mapping[str, int]] = {
    **_segments({"": DATA_0, "CS": CODE_32}, {"": 0xC93, "CS": 0xC9B}),
    "EFER": _LEGACY,
    "IDTR base": IDT_32,
    "TR base": TSS_32,
}
_PAE_PAGING: Final = {**_PROTECTED, "CR3": PAE_POINTERS}
_32_BIT_PAGING: Final = {**_PROTECTED, "CR3": DIRECTORY_32, "CR4": 0}
_NO_PAGING: Final = {**_PROTECTED, "CR4": 0, "CR0": _CR0_FLAT}
_REAL: Final[Mapping[str, int]] = {
    **_NO_PAGING,
    **_segments({"": 0x2000}, {"": 0x93, "CS": 0x9B}, CODE),
    "CR0": int(Cr0.ET),
    "IDTR base": IDT_16,
    "IDTR limit": 0x3FF,
}
_VIRTUAL_8086: Final[Mapping[str, int]] = {
    **_32_BIT_PAGING,
    **_segments({"": LOW >> 4}, {"": 0xF3}, LOW),
    "RFLAGS": _VM | 2,
    "CPL": 3,
}
_USER_MODE: Final[Mapping[str, int]] = {
    **_segments({"": DATA_USER | 3, "CS": CODE_64_USER | 3}, {"": 0xCF3, "CS": 0xAFB}),
    "CPL": 3,
}
_NP: Final = {"nested paging and encryption control": layouts.NP_ENABLE}


def _event(kind: layouts.InjectedType, vector: int, error_code: int | None = None) -> dict[str, int]:
    word = layouts.EVENT_VALID | kind << layouts.EVENT_TYPE_SHIFT | vector
    if error_code is not None:
        word |= layouts.EVENT_ERROR_CODE_VALID | error_code << 32
    return {"EVENTINJ": word}


_VIRTUAL_IRQ: Final = layouts.V_IRQ | 0x30 << layouts.V_INTR_VECTOR_SHIFT | 5 << layouts.V_INTR_PRIO_SHIFT
_TYPE = layouts.InjectedType

BASES: Final[tuple[Base, ...]] = (
    Base("64-bit", {}),
    Base("64-bit, nested paging", _NP),
    Base("64-bit, privilege level 3", _USER_MODE),
    Base("64-bit, privilege level 3, nested paging", {**_USER_MODE, **_NP}),
    Base("compatibility mode", {"CS selector": CODE_32, "CS attributes": 0xC9B}),
    Base("PAE paging", _PAE_PAGING),
    Base("PAE paging, nested paging", {**_PAE_PAGING, **_NP}),
    Base("32-bit paging", _32_BIT_PAGING),
    Base("32-bit paging, nested paging", {**_32_BIT_PAGING, **_NP}),
    Base("no paging", _NO_PAGING),
    Base("no paging, nested paging", {**_NO_PAGING, **_NP}),
    Base("real mode", _REAL, 0),
    Base("real mode, nested paging", {**_REAL, **_NP}, 0),
    Base("virtual-8086 mode", _VIRTUAL_8086, 0),
    Base("virtual-8086 mode, nested paging", {**_VIRTUAL_8086, **_NP}, 0),
    Base("64-bit, interrupts enabled", {"RFLAGS": _IF | 2}),
    Base("virtual interrupt", {"RFLAGS": _IF | 2, "virtual interrupt control": _VIRTUAL_IRQ}),
    Base("virtual interrupt, disabled", {"virtual interrupt control": _VIRTUAL_IRQ | layouts.V_INTR_MASKING | 3}),
    Base(
        "virtual interrupt, in a shadow",
        {"RFLAGS": _IF | 2, "virtual interrupt control": _VIRTUAL_IRQ, "interrupt state": 1},
    ),
    Base("single step", {"RFLAGS": _TF | 2}),
    Base("#GP injected", _event(_TYPE.EXCEPTION, 13, 0x18)),
    Base("#UD injected, nested paging", {**_event(_TYPE.EXCEPTION, 6), **_NP}),
    Base("#PF injected in 32-bit code", {**_32_BIT_PAGING, **_event(_TYPE.EXCEPTION, 14, 2)}),
    Base("NMI injected", _event(_TYPE.NMI, 2)),
    Base("interrupt injected", _event(_TYPE.EXTERNAL_INTERRUPT, 0x31)),
    Base("interrupt injected at privilege level 3", {**_USER_MODE, **_event(_TYPE.EXTERNAL_INTERRUPT, 0x32)}),
    Base("software interrupt injected", {**_event(_TYPE.SOFTWARE_INTERRUPT, 0x33), "nRIP": 2}),
    Base("interrupt injected in real mode", {**_REAL, **_event(_TYPE.EXTERNAL_INTERRUPT, 0x34)}, 0),
)


def canonical(address: int) -> int:
    """The low 48 bits of ``address`` with their sign extended."""
    return (address & (1 << 48) - 1 ^ 1 << 47) - (1 << 47) & MASK64


def fields_of(base: Base) -> dict[VmcbField, int]:
    """Every field that is written, as ``base`` has it."""
    named = {**_COMMON, **base.fields}
    values = {each: named.get(each.name, 0) for each in WRITTEN}
    for words in (ALWAYS_INTERCEPTED, _MAPS_IN_USE):
        for each, mask in words.items():
            values[each] |= mask
    for each in (RIP, RSP):
        values[each] += base.origin
    if values[NEXT_RIP]:
        values[NEXT_RIP] += base.origin
    return values
