"""The EPT walk equals an oracle written from the manual's sentences, one entry and one condition at a time."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.vmx.ept import EptConfig, EptMisconfiguration, EptViolation, ExtendedPageTables
from vtx.x86.memory import PhysicalMemory
from vtx.x86.page_rights import EXECUTE_DISABLE, USER, WRITABLE
from vtx.x86.second_level import AccessKind, SecondLevelPage

PAGES = 16
WIDTH = 40


def bit(value, index):
    return bool(value >> index & 1)


class Oracle:
    """Works on a dictionary of entries, in sets of bit numbers; shares nothing with the walker."""

    def __init__(self, memory, config):
        self.memory, self.config = memory, config

    def run(self, address, *, read, write, fetch, user_page):
        """("misconfiguration",), ("violation", permission set) or ("page", physical, size, entries)."""
        config = self.config
        levels = {4: ["PML4E", "PDPTE", "PDE", "PTE"], 5: ["PML5E", "PML4E", "PDPTE", "PDE", "PTE"]}
        names = levels[(config.eptp >> 3 & 7) + 1]
        low = {"PML5E": 48, "PML4E": 39, "PDPTE": 30, "PDE": 21, "PTE": 12}
        if address >= 1 << low[names[0]] + 9:
            return "violation", set()
        table = config.eptp // 4096 * 4096 % (1 << WIDTH)
        seen = []
        for name in names:
            place = table + (address // (1 << low[name]) % 512) * 8
            entry = self.memory.read_u64(place)
            seen.append((place, entry))
            interesting = [0, 1, 2] + ([10] if config.mode_based_execute else [])
            if not any(bit(entry, index) for index in interesting):
                return "violation", set()
            leaf = name == "PTE" or (
                bit(entry, 7) and ((name == "PDE" and config.page_2mb) or (name == "PDPTE" and config.page_1gb))
            )
            if self.misconfigured(name, entry, leaf, low[name]):
                return ("misconfiguration",)
            if leaf:
                break
            table = entry // 4096 * 4096 % (1 << WIDTH)
        have = {index for index in interesting if all(bit(entry, index) for _, entry in seen)}
        need = set()
        if read:
            need.add(0)
        if write:
            need.add(1)
        if fetch:
            need.add(10 if config.mode_based_execute and user_page else 2)
        if not need <= have:
            return "violation", have
        size = 1 << low[name]
        return "page", entry % (1 << WIDTH) // size * size + address % size, size, seen, have

    def misconfigured(self, name, entry, leaf, low):
        readable, writable = bit(entry, 0), bit(entry, 1)
        executable = bit(entry, 2) or (self.config.mode_based_execute and bit(entry, 10))
        if writable and not readable:
            return True
        if executable and not readable and not self.config.execute_only:
            return True
        if any(bit(entry, index) for index in range(WIDTH, 52)):
            return True
        if leaf:
            if entry >> 3 & 7 in (2, 3, 7):
                return True
            return any(bit(entry, index) for index in range(12, low))
        must_be_zero = [3, 4, 5, 6, 7] if "PML" in name or bit(entry, 7) else [3, 4, 5, 6]
        return any(bit(entry, index) for index in must_be_zero)


def random_entry(source):
    """Mostly good entries, with every way to go wrong mixed in."""
    entry = source.randrange(PAGES + 1) << 12
    entry |= source.choice((0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7))
    entry |= source.choice((0, 0, 6 << 3, source.randrange(8) << 3))
    if source.random() < 0.25:
        entry = entry & ~(0x3FFFFFFF if source.random() < 0.3 else 0x1FF000) | entry & 7 | 0x80
    for index in (8, 9, 10, 11, 52, 63):
        entry |= source.getrandbits(1) << index
    if source.random() < 0.1:
        entry |= 1 << source.randrange(3, 64)
    return entry


def sparse_address(source, length):
    """An address whose indices are 0 or 1, so that a few entries decide."""
    address = source.randrange(4096)
    for shift in (12, 21, 30, 39, 48)[:length]:
        address |= source.getrandbits(1) << shift
    return address | (1 << (39 + 9 * (length - 3)) if source.random() < 0.02 else 0)


@settings(deadline=None)
@given(st.integers(0, 1 << 64), st.integers(0, 31), st.sampled_from([4, 5]), st.booleans())
def test_walk_equals_the_oracle(seed, capabilities, length, accessed_dirty):
    source = random.Random(seed)
    execute_only, page_2mb, page_1gb, mode_based, advanced = (bit(capabilities, index) for index in range(5))
    memory = PhysicalMemory(PAGES << 12)
    for page in range(PAGES):
        for index in range(2):
            memory.write_u64(page << 12 | index << 3, random_entry(source))
    eptp = 0x1000 | (length - 1) << 3 | 6 | accessed_dirty << 6
    config = EptConfig(eptp, WIDTH, execute_only, page_2mb, page_1gb, mode_based, advanced)
    ept = ExtendedPageTables(config, memory)
    for _ in range(20):
        check_translation(source, memory, config, ept, sparse_address(source, length))
        check_structure(source, memory, config, ept, sparse_address(source, length))


def qualification(have, access, extra):
    code = access | extra
    for index, place in ((0, 3), (1, 4), (2, 5), (10, 6)):
        code |= (index in have) << place
    return code


def check_flags(memory, config, seen, written):
    for position, (place, before) in enumerate(seen):
        leaf = position == len(seen) - 1
        expected = before
        if config.accessed_dirty:
            expected |= 1 << 8 | (leaf and written) << 9
        # Entries may serve several levels at once: then more than this one's flags are set.
        assert memory.read_u64(place) | 0x300 == expected | 0x300
        assert memory.read_u64(place) & expected == expected


def check_translation(source, memory, config, ept, address):
    kind = source.choice(list(AccessKind))
    rights = source.randrange(8)
    read, write, fetch = (kind is each for each in AccessKind)
    user_page = bool(rights & USER)
    wanted = Oracle(memory, config).run(address, read=read, write=write, fetch=fetch, user_page=user_page)
    result = ept.translate(address, kind, 0xABC, rights)
    if wanted[0] == "misconfiguration":
        assert result == EptMisconfiguration(address, 0xABC)
        return
    if wanted[0] == "violation":
        extra = 0x180
        if config.advanced_information:
            extra |= user_page << 9 | bool(rights & WRITABLE) << 10 | bool(rights & EXECUTE_DISABLE) << 11
        assert result == EptViolation(address, 0xABC, qualification(wanted[1], kind.value, extra))
        return
    _, physical, size, seen, have = wanted
    assert isinstance(result, SecondLevelPage)
    assert (result.physical, result.size) == (physical // 4096 * 4096, size)
    assert bool(result.permissions & 1) == (0 in have)
    assert bool(result.permissions & 4) == ((10 if user_page and config.mode_based_execute else 2) in have)
    dirty = bit(seen[-1][1], 9) or write
    assert bool(result.permissions & 2) == (1 in have and (dirty or not config.accessed_dirty))
    check_flags(memory, config, seen, write)


def check_structure(source, memory, config, ept, address):
    update = source.random() < 0.5
    linear = source.choice((None, 0xABC))
    write = update or config.accessed_dirty
    wanted = Oracle(memory, config).run(address, read=True, write=write, fetch=False, user_page=False)
    result = ept.paging_structure(address, update, linear)
    if wanted[0] == "misconfiguration":
        assert result == EptMisconfiguration(address, linear)
    elif wanted[0] == "violation":
        extra = 0 if linear is None else 0x80
        assert result == EptViolation(address, linear, qualification(wanted[1], 3 if write else 1, extra))
    else:
        assert result == wanted[1]
        check_flags(memory, config, wanted[3], write)


def test_random_generator_reaches_every_outcome():
    """The property above would be empty if its tables never mapped anything."""
    source = random.Random(1)
    outcomes = set()
    for _ in range(2000):
        memory = PhysicalMemory(PAGES << 12)
        for page in range(PAGES):
            for index in range(2):
                memory.write_u64(page << 12 | index << 3, random_entry(source))
        ept = ExtendedPageTables(EptConfig(0x101E, WIDTH), memory)
        result = ept.translate(sparse_address(source, 4), AccessKind.READ, 0, 0)
        outcomes.add(getattr(result, "size", type(result).__name__))
    assert outcomes == {4096, 1 << 21, 1 << 30, "EptViolation", "EptMisconfiguration"}
