"""Processor state and tables of every mode, with something wrong in them more often than not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import hostile_places as at
from hostile_state import stack_ends

from vtx.x86.memory import PhysicalMemory
from vtx.x86.state import CpuState, DescriptorTable, Segment

MODES = (
    "real",
    "virtual-8086",
    "protected-16",
    "protected-32",
    "32-bit paging",
    "PAE paging",
    "compatibility",
    "64-bit",
    "5-level",
)
LONG_MODES = ("compatibility", "64-bit", "5-level")

PRESENT, WRITABLE, USER, DIRTY, LARGE, GLOBAL, NO_EXECUTE = 1, 2, 4, 0x40, 0x80, 0x100, 1 << 63
_ALL = PRESENT | WRITABLE | USER
_CR0 = {"real": 0x30, "virtual-8086": 0x33, "protected-16": 0x33, "protected-32": 0x33}

_CODE_0, _DATA_0, _CODE_3, _DATA_3 = 0x08, 0x10, 0x1B, 0x23
_CODE_16, _DATA_16, _CODE_64, _CODE_64_3 = 0x28, 0x30, 0x38, 0x43
_TSS, _OTHER_TSS, _LDT, _CALL_GATE, _TASK_GATE = 0x48, 0x58, 0x68, 0x78, 0x88


def bits_of(mode: str) -> int:
    """Width of the mode's code."""
    return 64 if mode in ("64-bit", "5-level") else 16 if mode in ("real", "virtual-8086", "protected-16") else 32


def _descriptor(base: int, limit: int, access: int, flags: int) -> int:
    return (
        (limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )


def gdt(mode: str) -> list[int]:
    """The descriptors of `_CODE_0` and so on."""
    entries = [0] * 19
    flat = (_CODE_0, 0x9B, 0xC), (_DATA_0, 0x93, 0xC), (_CODE_3, 0xFB, 0xC), (_DATA_3, 0xF3, 0xC)
    for selector, access, flags in (*flat, (_CODE_64, 0x9B, 0xA), (_CODE_64_3, 0xFB, 0xA)):
        entries[selector >> 3] = _descriptor(0, 0xF_FFFF, access, flags)
    entries[_CODE_16 >> 3] = _descriptor(at.CODE, 0xFFFF, 0x9B, 0)
    entries[_DATA_16 >> 3] = _descriptor(at.CODE, 0xFFFF, 0x93, 0)
    entries[_TSS >> 3] = _descriptor(at.TSS, 0x2067, 0x8B if mode != "protected-16" else 0x83, 0)
    entries[_OTHER_TSS >> 3] = _descriptor(at.OTHER_TSS, 0x67, 0x89, 0)
    entries[_LDT >> 3] = _descriptor(at.LDT, 0xFF, 0x82, 0)
    gate = at.CODE & 0xFFFF | _CODE_0 << 16 | 0xEC << 40 | at.CODE >> 16 << 48
    entries[_CALL_GATE >> 3] = gate
    entries[_TASK_GATE >> 3] = _OTHER_TSS << 16 | 0xE5 << 40
    return entries


def _spoil(source: random.Random, values: list[int], chance: float) -> None:
    """Turn over bits, or replace a few of the values."""
    if not values or source.random() > chance:
        return
    for _ in range(source.choice((1, 1, 2, 4, 12))):
        i = source.randrange(len(values))
        if source.random() < 0.7:
            values[i] ^= 1 << source.randrange(64)
        else:
            values[i] = source.choice((source.getrandbits(64), 0, (1 << 64) - 1, source.choice(at.ADDRESSES) | _ALL))


def _store(memory: PhysicalMemory, address: int, values: Sequence[int]) -> None:
    for i, value in enumerate(values):
        memory.write_u64(address + 8 * i, value)


def _gate(source: random.Random, mode: str, target: int) -> list[int]:
    kind = source.choice((0xE, 0xE, 0xE, 0xF))
    privilege = source.choice((0, 3)) << 5
    if mode in LONG_MODES:
        selector = _CODE_64 if source.random() < 0.9 else source.randrange(0, 0x90)
        stack = source.choice((0, 0, 0, 1, 2, 7))
        low = target & 0xFFFF | selector << 16 | stack << 32 | (0x80 | privilege | kind) << 40 | target >> 16 << 48
        return [low, 0]
    if source.random() < 0.05:
        return [source.choice((_OTHER_TSS, _TSS)) << 16 | (0x85 | privilege) << 40]
    selector = _CODE_0 if source.random() < 0.85 else source.choice((_CODE_16, _CODE_3, _DATA_0, 0, 0x500))
    if mode == "protected-16" and source.random() < 0.8:
        return [target & 0xFFFF | _CODE_16 << 16 | (0x80 | privilege | kind & 7) << 40]
    return [target & 0xFFFF | selector << 16 | (0x80 | privilege | kind) << 40 | target >> 16 << 48]


def install_descriptors(memory: PhysicalMemory, source: random.Random, mode: str, starts: Sequence[int]) -> None:
    """GDT, LDT, IDT, and two TSSs; handlers begin at one of ``starts`` in the code."""
    entries = gdt(mode)
    _spoil(source, entries, 0.2)
    _store(memory, at.GDT, entries)
    _store(memory, at.LDT, entries)
    if mode == "real":
        for vector in range(256):
            memory.write_u32(4 * vector, at.CODE >> 4 << 16 | source.choice(starts))
        return
    first = [_gate(source, mode, at.CODE + source.choice(starts)) for _ in range(48)]
    gates = [part for i in range(256) for part in first[i if i < 32 else i % 48]]
    _spoil(source, gates, 0.3)
    _store(memory, at.IDT, gates)
    _install_tss(memory, source, mode, starts)


def install_host_tables(memory: PhysicalMemory, source: random.Random) -> None:
    """GDT and IDT of a 64-bit host whose guest has others; its handlers are somewhere in its code."""
    _store(memory, at.HOST_GDT, gdt("64-bit"))
    for vector in range(32):
        gate = _gate(source, "64-bit", at.HOST_CODE + source.randrange(0x800))
        for i in range(vector, 256, 32):
            _store(memory, at.HOST_IDT + 16 * i, gate)


def _install_tss(memory: PhysicalMemory, source: random.Random, mode: str, starts: Sequence[int]) -> None:
    stack = at.STACK if source.random() < 0.9 else source.choice(at.ADDRESSES)
    if mode in LONG_MODES:
        for offset in range(4, 0x5C, 8):
            memory.write_u64(at.TSS + offset, stack)
    elif mode == "protected-16":
        memory.write_u32(at.TSS + 2, stack & 0xFFFF | _DATA_16 << 16)
    else:
        for offset in range(4, 0x1C, 8):
            memory.write_u64(at.TSS + offset, stack | _DATA_0 << 32)
    memory.write_u16(at.TSS + 0x66, source.choice((0x68, 0x68, 0x88, 0xFFFF)))
    if source.random() < 0.5:
        memory.write(at.TSS + 0x68, source.randbytes(0x400))
    other = [0] * 26
    other[7], other[8], other[9] = at.TABLES, at.CODE + source.choice(starts), 2
    other[14] = at.STACK - 0x800
    other[18:24] = [_DATA_0, _CODE_0, _DATA_0, _DATA_0, _DATA_0, _DATA_0]
    if source.random() < 0.3:
        other[source.randrange(26)] = source.getrandbits(32)
    for i, value in enumerate(other):
        memory.write_u32(at.OTHER_TSS + 4 * i, value)


def _last_level(source: random.Random, entry: int) -> list[int]:
    """The first 4 MiB in 4-KByte pages, mapped to itself but for a few."""
    pages = at.MEMORY >> 12
    entries = [i << 12 | _ALL for i in range(pages)]
    for _ in range(source.choice((0, 0, 2, 10))):
        i = source.randrange(0x10, 0x64)
        entries[i] = source.choice(
            (
                *(0, i << 12 | PRESENT, i << 12 | PRESENT | WRITABLE, i << 12 | PRESENT | USER),
                *(at.CODE | _ALL, at.CODE + 0x1000 | _ALL, at.LOCAL_APIC | _ALL, at.IO_APIC | _ALL, at.NOWHERE | _ALL),
                *(at.TABLES | _ALL, at.STACK | _ALL | GLOBAL, source.getrandbits(32) | PRESENT),
            )
        )
        if entry == 8 and source.random() < 0.2:
            entries[i] |= source.choice((NO_EXECUTE, 1 << 51, 1 << 46, 1 << 59))
    return entries


def install_page_tables(memory: PhysicalMemory, source: random.Random, mode: str) -> int:
    """The page tables of ``mode``; what CR3 is."""
    devices = at.IO_APIC, at.LOCAL_APIC, at.NOWHERE, at.ROM
    if mode == "32-bit paging":
        entries = _last_level(source, 4)
        directory = [0] * 1024
        directory[0] = at.TABLES + 0x1000 | _ALL
        directory[0x2FF] = at.TABLES | _ALL  # the tables themselves
        for device in devices:
            directory[device >> 22] = device >> 22 << 22 | _ALL | LARGE
        for address, values in ((at.TABLES, directory), (at.TABLES + 0x1000, entries)):
            low, high = values[0::2], values[1::2]
            pairs = [(a & 0xFFFF_FFFF) | (b & 0xFFFF_FFFF) << 32 for a, b in zip(low, high, strict=True)]
            _spoil(source, pairs, 0.2)
            _store(memory, address, pairs)
        return at.TABLES
    return install_long_tables(memory, source, at.TABLES, levels={"PAE paging": 3, "5-level": 5}.get(mode, 4))


def _shadow_stacks(memory: PhysicalMemory, source: random.Random, entries: list[int]) -> None:
    """Pages that are shadow stacks, with tokens that are free or busy, or restore tokens."""
    for page, user in ((at.SHADOW_STACK, 0), (at.USER_SHADOW_STACK, USER)):
        entries[page >> 12] = page | PRESENT | DIRTY | user
        memory.write_u64(page + 0xFF8, page + 0xFF8 | source.choice((0, 0, 1)))
        memory.write_u64(page + 0x400, page + 0x408 | source.choice((0, 1, 1, 3)))
        for offset in range(0x7C0, 0x800, 8):
            memory.write_u64(page + offset, source.choice((at.CODE + source.randrange(0x40), page + 0x800, 0x08, 2)))


def _control_flow(state: CpuState, source: random.Random, mode: str) -> None:
    """Shadow stacks and trackers enabled, with pointers to the pages for them; pointers to data masked."""
    state.cr0, state.cr4 = state.cr0 | 1 << 16, state.cr4 | 1 << 23
    controls = (1, 1, 1, 3, 3, 3, 3, 5, 7, 4, 4 | 1 << 10, 0x1F, 0xC | at.DATA, 0)
    state.u_cet, state.s_cet = source.choice(controls), source.choice(controls)
    page = at.SHADOW_STACK if state.cpl < 3 else at.USER_SHADOW_STACK
    state.ssp = source.choice((page + 0x7C0, page + 0x800, page + 0x7FC, page + 0xFF8, source.getrandbits(32) & ~3))
    state.pl_ssp = [at.SHADOW_STACK + 0xFF8, page, source.getrandbits(32) & ~3, at.USER_SHADOW_STACK + 0x800]
    state.interrupt_ssp_table = source.choice((at.SHADOW_STACK + 0xFF0, at.DATA, source.getrandbits(47)))
    if mode in LONG_MODES:
        state.cr3 |= source.choice((0, 1, 2, 3)) << 61
        state.cr4 |= source.randrange(2) << 28


def _event_delivery(state: CpuState, source: random.Random) -> None:
    """FRED, with stacks and entry points where something is."""
    state.cr4 |= 1 << 32
    entry = source.choice((at.CODE, at.CODE + 0x1000, at.CODE + 0x1000, source.getrandbits(47) & ~0xFFF))
    state.fred_config = entry | source.choice((0, 8)) | source.choice((0, 64)) | source.randrange(4) << 9
    state.fred_config |= source.choice((0, 0, 1, 2, 3)) if state.cpl < 3 else 0
    state.fred_stack_levels = source.choice((0, source.getrandbits(64), (1 << 64) - 1))
    pages = (at.STACK, at.STACK - 0x400, at.DATA, at.DATA + 0x1000, source.getrandbits(47))
    state.fred_rsp = [source.choice(pages) & ~63 for _ in range(4)]
    state.fred_ssp = [source.choice((at.SHADOW_STACK + 0x800, source.getrandbits(47))) & ~7 for _ in range(3)]


def _bounds(memory: PhysicalMemory, source: random.Random, state: CpuState) -> None:
    """Intel MPX enabled, with bounds in use, and a directory of which some entries are valid."""
    state.cr4, state.xcr0 = state.cr4 | 1 << 18, source.choice((0x1B, 0x1B, 0x21B, 0x19))
    configurations = (1, 1, 3, 3, *4 * (at.BOUNDS | 1,), *3 * (at.BOUNDS | 3,), 2, 0, (1 << 47) - 0x1000 | 1)
    state.bndcfgu, state.bndcfgs = source.choice(configurations), source.choice(configurations)
    values = (0, 0, at.DATA, at.DATA + 0xFFF, at.CODE, (1 << 64) - 1 ^ at.DATA, 0xFFFF_FFFF ^ at.DATA, 1, 1 << 63)
    state.lower_bounds = [source.choice(values) for _ in range(4)]
    state.upper_bounds = [source.choice(values) for _ in range(4)]
    for offset in range(0, 0x1000, 8):
        table = source.choice((at.BOUND_TABLE | 1, at.BOUND_TABLE | 1, 0, at.NOWHERE | 1, 1 << 47 | 1))
        memory.write_u64(at.BOUNDS + offset, table | (table & 0xFFFF_FFFF) << 32 if source.random() < 0.3 else table)


def install_long_tables(memory: PhysicalMemory, source: random.Random, root: int, levels: int) -> int:
    """Tables of 8-byte entries at ``root``: last level first in memory, so that one layout serves all."""
    entries = _last_level(source, 8)
    if source.random() < 0.8:
        _shadow_stacks(memory, source, entries)
    if levels >= 4 and source.random() < 0.3:  # protection keys
        for i in source.sample(range(0x10, 0x64), 20):
            entries[i] |= source.randrange(16) << 59
    directory = [0] * 512
    for i in range(2):
        directory[i] = root + 0x1000 * i | _ALL
    devices = [0] * 512
    for device in (at.IO_APIC, at.LOCAL_APIC, at.NOWHERE, at.ROM):
        devices[device >> 21 & 511] = device >> 21 << 21 | _ALL | LARGE
    upper = PRESENT if levels == 3 else _ALL
    pointers = [root + 0x2000 | upper, 0, 0, root + 0x3000 | upper] + [0] * 508
    tables = [entries[:512], entries[512:], directory, devices, pointers]
    if levels == 4:
        # The last quarter is the tables themselves.
        tables.append([root + 0x4000 | _ALL, *[0] * 510, root + 0x5000 | _ALL])
    elif levels == 5:
        tables += [[root + 0x4000 | _ALL, *[0] * 511], [root + 0x5000 | _ALL, *[0] * 511]]
    for i, table in enumerate(tables):
        _spoil(source, table, 0.05)
        _store(memory, root + 0x1000 * i, table)
    return root + 0x1000 * (len(tables) - 1)


def _flat(state: CpuState, cpl: int, code: int, code_rights: int) -> None:
    data = _DATA_3 if cpl == 3 else _DATA_0 | cpl
    state.segments = [Segment(data, 0, 0xFFFF_FFFF, 0xC093 | cpl << 5) for _ in range(6)]
    state.segments[1] = Segment(code, 0, 0xFFFF_FFFF, code_rights | cpl << 5)


def _segments(state: CpuState, mode: str, cpl: int) -> None:
    if mode == "real":
        state.segments = [Segment(0x1000, 0x1_0000, 0xFFFF, 0x93) for _ in range(6)]
        state.segments[1].access_rights = 0x9B
    elif mode == "virtual-8086":
        state.segments = [Segment(0x1000, 0x1_0000, 0xFFFF, 0xF3) for _ in range(6)]
        state.rflags |= 1 << 17
    elif mode == "protected-16":
        state.segments = [Segment(_DATA_16, at.CODE, 0xFFFF, 0x93) for _ in range(6)]
        state.segments[1] = Segment(_CODE_16, at.CODE, 0xFFFF, 0x9B)
    elif bits_of(mode) == 64:
        _flat(state, cpl, _CODE_64_3 if cpl else _CODE_64, 0xA09B)
    else:
        _flat(state, cpl, _CODE_3 if cpl else _CODE_0, 0xC09B)


def _shorten(state: CpuState, source: random.Random, mode: str) -> None:
    """Give some segments limits that the program may cross."""
    bits = bits_of(mode)
    if bits == 64 or mode == "virtual-8086" or source.random() > 0.25:
        return
    code, data = (0, 0) if bits == 16 else (at.CODE, at.DATA)
    limits = {
        1: code + source.randrange(0x40, at.CODE_SIZE),
        2: source.choice(stack_ends(bits)),
        3: data + source.randrange(0x1000),
        0: data + source.choice((0xFFC, 0x1001, 0x3F)),
    }
    for number in source.sample(sorted(limits), source.randrange(1, 4)):
        segment = state.segments[number]
        segment.limit, segment.access_rights = limits[number], segment.access_rights & ~0x8000
        if number != 1 and source.random() < 0.3:  # expand-down: what is above the limit
            segment.access_rights |= 4
            segment.limit -= source.randrange(0x20)
        elif source.random() < 0.2:
            segment.limit, segment.access_rights = segment.limit | 0xFFF, segment.access_rights | 0x8000


def new_state(
    memory: PhysicalMemory,
    source: random.Random,
    mode: str,
    cr3: int,
    cpl: int,
    *,
    with_control_flow: bool = False,
    with_bounds: bool = False,
) -> CpuState:
    """A consistent state of ``mode`` that is about to execute the code; what is free in it is random."""
    state = CpuState()
    state.cr0 = _CR0.get(mode, 0x8000_0033 | source.choice((0, 1)) << 16)
    state.cr4 = 0x600 if source.random() < 0.8 else 0
    if mode in LONG_MODES:
        state.efer = 0xD01
        state.cr4 |= 0x1020 if mode == "5-level" else 0x20
    elif mode == "PAE paging":
        state.cr4 |= 0x20
        state.efer = 0x800
    elif mode == "32-bit paging":
        state.cr4 |= 0x10
    state.cr3 = cr3 if state.cr0 >> 31 else 0
    if mode == "PAE paging":
        state.pdptrs = [memory.read_u64(cr3 + 8 * i) for i in range(4)]
    for bit in (2, 3, 7, 8, 11, 16, 20, 21, 22, 24):
        state.cr4 |= (source.random() < 0.1) << bit
    if source.random() < 0.3:
        state.cr4 |= 1 << 18
        state.xcr0 = source.choice((3, 3, 0x203, 1))
    state.cr0 |= (source.random() < 0.1) << 18 | (source.random() < 0.05) << 3 | (source.random() < 0.05) << 2
    state.rflags = 2 | source.choice((0, 0, 0x200, 0x200, 0x3000, 0x3200, 0x100, 0x400, 0x4_0000, 0x4000))
    _segments(state, mode, cpl)
    _shorten(state, source, mode)
    tss = 0x83 if mode == "protected-16" else 0x8B
    state.tr = Segment(_TSS, at.TSS, 0x2067, tss)
    state.ldtr = Segment(_LDT, at.LDT, 0xFF, 0x82) if source.random() < 0.7 else Segment(0, 0, 0, 0x1_0000)
    state.gdtr = DescriptorTable(at.GDT, 0x97)
    state.idtr = DescriptorTable(0, 0x3FF) if mode == "real" else DescriptorTable(at.IDT, 0xFFF)
    wide = bits_of(mode) == 64
    for i in range(16 if wide else 8):
        values = [source.getrandbits(32), source.getrandbits(16), source.choice(at.ADDRESSES), source.randrange(4)]
        if wide:
            values += source.choice(at.WIDE_ADDRESSES), source.getrandbits(64)
        state.gpr[i] = source.choice(values)
    if with_control_flow:
        _control_flow(state, source, mode)
        if mode in LONG_MODES and source.random() < 0.4:
            _event_delivery(state, source)
    if with_bounds:
        _bounds(memory, source, state)
    based = mode in ("real", "virtual-8086", "protected-16")
    state.rip = 0 if based else at.CODE
    state.gpr[4] = 0x8000 if based else at.STACK
    return state
