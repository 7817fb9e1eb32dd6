"""The page walk over random tables equals an oracle written bit by bit, in every mode, and never raises."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.x86.memory import PhysicalMemory
from vtx.x86.page_rights import Privilege
from vtx.x86.paging import PageFault, PagingContext, Translation, walk
from vtx.x86.second_level import AccessKind, IdentitySecondLevel

PAGES = 16
SHADOW_STACK = (Privilege.USER_SHADOW_STACK, Privilege.SUPERVISOR_SHADOW_STACK)
WIDTH = 38
PG, WP = 1 << 31, 1 << 16
PSE, PAE, PGE, LA57, SMEP, SMAP, PKE, PKS = 1 << 4, 1 << 5, 1 << 7, 1 << 12, 1 << 20, 1 << 21, 1 << 22, 1 << 24
LMA, NXE = 1 << 10, 1 << 11
MODES = {"none": (0, 0, 0), "32": (PG, 0, 0), "PAE": (PG, PAE, 0), "4": (PG, PAE, LMA), "5": (PG, PAE | LA57, LMA)}


def bit(value, index):
    return bool(value >> index & 1)


def structure_entries(mode, context, linear, memory):
    """(level letter, entry or None) from the root; ends where the walk ends. Letters: 5 4 3 2 1, PDPTE register R."""
    read = memory.read_u32 if mode == "32" else memory.read_u64
    shifts = {"32": {2: 22, 1: 12}, "PAE": {2: 21, 1: 12}}.get(mode, {5: 48, 4: 39, 3: 30, 2: 21, 1: 12})
    table = context.cr3 // 4096 * 4096 % (1 << WIDTH)
    if mode == "PAE":
        register = context.pdptrs[linear % (1 << 32) >> 30]
        yield "R", register
        table = register // 4096 * 4096 % (1 << WIDTH)
    elif mode == "4":
        del shifts[5]
    for level, shift in shifts.items():
        size, count = (4, 1024) if mode == "32" else (8, 512)
        entry = read(table + (linear >> shift) % count * size)
        yield level, entry
        table = entry // 4096 * 4096 % (1 << (32 if mode == "32" else WIDTH))


def maps_page(mode, context, level, entry):
    if level == 1:
        return True
    if level == 2:
        return bit(entry, 7) and (mode != "32" or bit(context.cr4, 4))
    return level == 3 and bit(entry, 7) and context.page1gb


def has_reserved_bit(mode, context, level, entry, leaf):
    if mode == "32":
        return leaf and level == 2 and any(bit(entry, index) for index in range(WIDTH - 19, 22))
    zero = list(range(WIDTH, 63 if mode == "PAE" else 52))
    zero += [] if bit(context.efer, 11) else [63]
    if leaf:
        zero += list(range(13, {1: 12, 2: 21, 3: 30}[level]))
    elif level in (5, 4, 3):
        zero.append(7)
    return any(bit(entry, index) for index in zero)


def oracle(mode, context, linear, kind, privilege, memory):
    """(error code, None) or (None, physical byte address)."""
    write, fetch = kind is AccessKind.WRITE, kind is AccessKind.EXECUTE
    user, shadow_stack = privilege in (Privilege.USER, Privilege.USER_SHADOW_STACK), privilege in SHADOW_STACK
    nxe, smep, smap, wp = bit(context.efer, 11), bit(context.cr4, 20), bit(context.cr4, 21), bit(context.cr0, 16)
    code = 2 * write + 4 * user + 64 * shadow_stack + 16 * (fetch and (smep or (nxe and bit(context.cr4, 5))))
    if mode == "none":
        return None, linear % (1 << 32)
    walked = []
    for level, entry in structure_entries(mode, context, linear, memory):
        if not bit(entry, 0):
            return code, None
        if level == "R":
            continue
        leaf = maps_page(mode, context, level, entry)
        if has_reserved_bit(mode, context, level, entry, leaf):
            return code + 9, None
        walked.append(entry)
        if leaf:
            break
    user_page = all(bit(entry, 2) for entry in walked)
    read_write = all(bit(entry, 1) for entry in walked)
    no_execute = mode != "32" and any(bit(entry, 63) for entry in walked)
    if shadow_stack:
        *tables, page = walked
        allowed = all(bit(entry, 1) for entry in tables) and not bit(page, 1) and bit(page, 6) and user_page == user
    elif user:
        allowed = user_page and (not write or read_write) and not (fetch and no_execute)
    elif fetch:
        allowed = not no_execute and not (user_page and smep)
    else:
        allowed = not (user_page and smap and privilege is Privilege.SUPERVISOR) and (not write or not wp or read_write)
    key_refuses = False
    if mode in ("4", "5") and not fetch and bit(context.cr4, 22 if user_page else 24):
        key = walked[-1] >> 59 & 15
        register = context.pkru if user_page else context.pkrs
        key_refuses = bit(register, 2 * key) or (bit(register, 2 * key + 1) and write and (user or wp))
    if key_refuses or not allowed:
        return code + 1 + 32 * key_refuses, None
    return None, physical_address(mode, level, walked[-1], linear)


def physical_address(mode, level, entry, linear):
    if mode == "32" and level == 2:
        return (entry >> 22 << 22 | (entry >> 13 & 0xFF) << 32) + linear % (1 << 22)
    size = {1: 1 << 12, 2: 1 << 21, 3: 1 << 30}[level]
    return entry % (1 << (32 if mode == "32" else WIDTH)) // size * size + linear % size


def random_entry(source):
    entry = source.randrange(PAGES + 1) << 12
    entry |= 7 if source.random() < 0.6 else source.randrange(8)
    if source.random() < 0.2:
        entry = entry & 0xFFF | 0x80
    for index in (3, 4, 5, 6, 8, 59, 60, 62, 63):
        entry |= (source.random() < 0.15) << index
    if source.random() < 0.15:
        entry |= 1 << source.choice((source.randrange(64), source.randrange(13, 32)))
    return entry


def random_memory(source):
    memory = PhysicalMemory(PAGES << 12)
    for page in range(PAGES):
        for index in range(2):
            memory.write_u64(page << 12 | index << 3, random_entry(source) | random_entry(source) % (1 << 32) << 32)
    if source.random() < 0.5:
        for page in range(PAGES):
            for index in range(2):
                memory.write_u64(page << 12 | index << 3, random_entry(source))
    return memory


def random_context(source, mode):
    cr0, cr4, efer = MODES[mode]
    cr4 |= sum(flag for flag in (PSE, PGE, SMEP, SMAP, PKE, PKS) if source.getrandbits(1))
    pdptrs = tuple(source.randrange(PAGES) << 12 | (source.random() < 0.9) for _ in range(4))
    return PagingContext(
        cr0 | source.choice((0, WP)),
        source.randrange(PAGES) << 12,
        cr4,
        efer | source.choice((0, NXE)),
        WIDTH,
        pdptrs,
        source.getrandbits(32),
        source.getrandbits(32) & source.getrandbits(32),
        source.random() < 0.8,
    )


def random_linear(source):
    linear = source.randrange(4096)
    for shift in (12, 21, 22, 30, 39, 48):
        linear |= source.getrandbits(1) << shift
    return linear


def check(source, mode):
    memory = random_memory(source)
    context = random_context(source, mode)
    privilege = source.choice(list(Privilege))
    kinds = list(AccessKind)[: 2 if privilege in SHADOW_STACK else 3]  # nothing is fetched from a shadow stack
    kind = source.choice(kinds)
    linear = random_linear(source)
    code, physical = oracle(mode, context, linear, kind, privilege, memory)
    result = walk(context, linear, kind, privilege, memory, IdentitySecondLevel())
    if code is not None:
        assert result == PageFault(linear, code)
        return code
    assert isinstance(result, Translation)
    assert result.physical | linear & 0xFFF == physical
    assert result.permissions(context, privilege) & kind
    for other in kinds:
        refused, _ = oracle(mode, context, linear, other, privilege, memory)
        if result.permissions(context, privilege) & other:
            assert refused is None
        elif other is not AccessKind.WRITE or result.dirty:
            assert refused is not None
    return result.size


@settings(deadline=None)
@given(st.integers(0, 1 << 64), st.sampled_from(list(MODES)))
def test_walk_equals_the_oracle(seed, mode):
    source = random.Random(seed)
    for _ in range(20):
        check(source, mode)


def test_random_generator_reaches_every_outcome():
    """The property above would be empty if its tables never mapped anything."""
    source = random.Random(1)
    outcomes = {mode: {check(source, mode) for _ in range(6000)} for mode in MODES}
    assert outcomes["none"] == {4096}
    assert {4096, 1 << 22, 0, 1, 9} <= outcomes["32"]
    assert {4096, 1 << 21, 0, 1, 9, 17} <= outcomes["PAE"]
    assert {4096, 1 << 21, 1 << 30, 0, 1, 9, 17, 33, 35, 37, 39} <= outcomes["4"]
    assert {4096, 1 << 21, 1 << 30, 0, 5, 9, 64, 65, 67, 69, 71} <= outcomes["5"]


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None)
@given(data=st.data())
def test_any_bytes_as_page_tables_never_raise(mode, data):
    memory = PhysicalMemory(PAGES << 12)
    memory.write(0, data.draw(st.binary(min_size=64, max_size=256)) * 64)
    cr0, cr4, efer = MODES[mode]
    context = PagingContext(
        cr0,
        data.draw(st.integers(0, (1 << 64) - 1)),
        cr4 | data.draw(st.integers(0, (1 << 32) - 1)) & ~(PAE | LA57) if mode != "none" else cr4,
        efer | data.draw(st.sampled_from((0, NXE))),
        data.draw(st.integers(32, 52)),
        tuple(data.draw(st.integers(0, (1 << 64) - 1)) for _ in range(4)),
    )
    linear = data.draw(st.integers(0, (1 << 64) - 1))
    kind, privilege = data.draw(st.sampled_from(AccessKind)), data.draw(st.sampled_from(Privilege))
    result = walk(context, linear, kind, privilege, memory, IdentitySecondLevel())
    assert isinstance(result, Translation | PageFault)
