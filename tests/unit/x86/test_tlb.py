"""The TLB: what each operation drops and keeps, and its bounds."""

import itertools

import pytest

from vtx.x86.paging import Translation
from vtx.x86.tlb import GLOBAL, NO_PAGING, Selection, Tlb, TlbTag

EPT_1, EPT_1_FLAGS, EPT_2 = 0x10_001E, 0x10_005E, 0x20_001E
ASIDS = (0, 1, 2)
ROOTS = (None, EPT_1, EPT_1_FLAGS, EPT_2)
PCIDS = (NO_PAGING, 0, 5)
PAGES = (0x400, 0x401)


def translation(physical=0x5000, size=0x1000, is_global=False):
    return Translation(physical, physical, size, 6, 7, True, is_global)


def full_tlb():
    """Every tag holds both pages, and every pair of identifier and root a global page as well."""
    tlb = Tlb()
    for asid, root, pcid in itertools.product(ASIDS, ROOTS, PCIDS):
        tlb.select(TlbTag(asid, root, pcid))
        for page in PAGES:
            tlb.insert(page, translation())
        if pcid == 0:
            for page in PAGES:
                tlb.insert(page + 0x100, translation(is_global=True))
    return tlb


def survivors(tlb):
    """(asid, root, pcid or GLOBAL, page) of all that can still be found."""
    found = set()
    for asid, root, pcid in itertools.product(ASIDS, ROOTS, PCIDS):
        tlb.select(TlbTag(asid, root, pcid))
        for page in PAGES:
            if tlb.find(page):
                found.add((asid, root, pcid, page))
            if tlb.find(page + 0x100):
                found.add((asid, root, GLOBAL, page))
    return found


EVERYTHING = survivors(full_tlb())


def test_everything_is_found():
    assert len(EVERYTHING) == 3 * 4 * (3 * 2 + 2)


CURRENT = TlbTag(1, EPT_1, 5)

# operation, and which (asid, root, pcid, page) it drops, in the manual's terms. The current tag is CURRENT; the page
# operated on is the first of PAGES (globals: the one 0x100 above).
OPERATIONS = {
    "INVLPG": (
        lambda tlb: tlb.invalidate_page(PAGES[0]),
        lambda asid, root, pcid, page: asid == 1 and pcid == 5 and page == PAGES[0],
    ),
    "INVLPG of a global page": (
        lambda tlb: tlb.invalidate_page(PAGES[0] + 0x100),
        lambda asid, root, pcid, page: asid == 1 and pcid == GLOBAL and page == PAGES[0],
    ),
    "INVPCID individual-address": (
        lambda tlb: tlb.invalidate_pcid_page(0, PAGES[0]),
        lambda asid, root, pcid, page: asid == 1 and pcid == 0 and page == PAGES[0],
    ),
    "INVPCID individual-address of a global page": (
        lambda tlb: tlb.invalidate_pcid_page(0, PAGES[0] + 0x100),
        lambda asid, root, pcid, page: False,
    ),
    "INVPCID single-context": (
        lambda tlb: tlb.invalidate_pcid(0),
        lambda asid, root, pcid, page: asid == 1 and pcid == 0,
    ),
    "INVPCID all-context": (
        lambda tlb: tlb.invalidate_asid(1),
        lambda asid, root, pcid, page: asid == 1 and pcid != NO_PAGING,
    ),
    "INVPCID all-context, retaining globals": (
        lambda tlb: tlb.invalidate_asid(1, keep_global=True),
        lambda asid, root, pcid, page: asid == 1 and pcid in (0, 5),
    ),
    "INVVPID individual-address": (
        lambda tlb: tlb.invalidate_asid_page(2, PAGES[0]),
        lambda asid, root, pcid, page: asid == 2 and pcid in (0, 5) and page == PAGES[0],
    ),
    "INVVPID individual-address of a global page": (
        lambda tlb: tlb.invalidate_asid_page(2, PAGES[0] + 0x100),
        lambda asid, root, pcid, page: asid == 2 and pcid == GLOBAL and page == PAGES[0],
    ),
    "INVVPID single-context": (
        lambda tlb: tlb.invalidate_asid(2),
        lambda asid, root, pcid, page: asid == 2 and pcid != NO_PAGING,
    ),
    "INVVPID all-context": (
        lambda tlb: tlb.invalidate_asids(),
        lambda asid, root, pcid, page: asid != 0 and pcid != NO_PAGING,
    ),
    "INVVPID single-context, retaining globals": (
        lambda tlb: tlb.invalidate_asid(2, keep_global=True),
        lambda asid, root, pcid, page: asid == 2 and pcid in (0, 5),
    ),
    "INVEPT single-context": (
        lambda tlb: tlb.invalidate_root(EPT_1),
        lambda asid, root, pcid, page: root in (EPT_1, EPT_1_FLAGS),
    ),
    "INVEPT all-context": (
        lambda tlb: tlb.invalidate_roots(),
        lambda asid, root, pcid, page: root is not None,
    ),
    "everything": (lambda tlb: tlb.clear(), lambda *entry: True),
    "INVLPGB of everything but globals": (
        lambda tlb: tlb.forget(Selection(None, None, None, include_global=False, include_nested=False)),
        lambda asid, root, pcid, page: pcid != GLOBAL,
    ),
    "INVLPGB of everything": (
        lambda tlb: tlb.forget(Selection(None, None, None, include_global=True, include_nested=False)),
        lambda *entry: True,
    ),
    "INVLPGB of an ASID": (
        lambda tlb: tlb.forget(Selection(2, None, None, include_global=False, include_nested=False)),
        lambda asid, root, pcid, page: asid == 2 and pcid != GLOBAL,
    ),
    "INVLPGB of a PCID": (
        lambda tlb: tlb.forget(Selection(None, 5, None, include_global=False, include_nested=False)),
        lambda asid, root, pcid, page: pcid == 5,
    ),
    "INVLPGB of PCID 0, which is that of no paging": (
        lambda tlb: tlb.forget(Selection(1, 0, None, include_global=False, include_nested=False)),
        lambda asid, root, pcid, page: asid == 1 and pcid in (0, NO_PAGING),
    ),
    "INVLPGB of a PCID and globals": (
        lambda tlb: tlb.forget(Selection(1, 5, None, include_global=True, include_nested=False)),
        lambda asid, root, pcid, page: asid == 1 and pcid in (5, GLOBAL),
    ),
    "INVLPGB of a page": (
        lambda tlb: tlb.forget(Selection(None, None, PAGES[:1], include_global=True, include_nested=False)),
        lambda asid, root, pcid, page: pcid != GLOBAL and page == PAGES[0],
    ),
    "INVLPGB of pages, one of which is global": (
        lambda tlb: tlb.forget(
            Selection(1, 5, (PAGES[0], PAGES[1] + 0x100), include_global=True, include_nested=False)
        ),
        lambda asid, root, pcid, page: asid == 1 and (pcid, page) in ((5, PAGES[0]), (GLOBAL, PAGES[1])),
    ),
    "INVLPGB of a global page without globals": (
        lambda tlb: tlb.forget(Selection(1, 5, (PAGES[1] + 0x100,), include_global=False, include_nested=False)),
        lambda asid, root, pcid, page: False,
    ),
    "INVLPGB of nested translations": (
        lambda tlb: tlb.forget(Selection(1, 5, PAGES[:1], include_global=False, include_nested=True)),
        lambda asid, root, pcid, page: asid == 1 and (root is not None or (pcid == 5 and page == PAGES[0])),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_invalidation(name):
    operation, drops = OPERATIONS[name]
    tlb = full_tlb()
    tlb.select(CURRENT)
    operation(tlb)
    assert tlb.tag == CURRENT
    assert survivors(tlb) == {entry for entry in EVERYTHING if not drops(*entry)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_look_up_sees_an_invalidation_at_once(name):
    operation, drops = OPERATIONS[name]
    tlb = full_tlb()
    tlb.select(CURRENT)
    operation(tlb)
    assert (tlb.find(PAGES[0]) is None) == bool(drops(*CURRENT, PAGES[0]))
    tlb.insert(PAGES[0], translation(0x7000))
    assert tlb.find(PAGES[0]) == translation(0x7000)


def test_global_translation_replaces_a_local_one():
    tlb = Tlb()
    tlb.select(TlbTag(0, None, 1))
    tlb.insert(7, translation(0x1000))
    tlb.insert(7, translation(0x2000, is_global=True))
    assert tlb.find(7) == translation(0x2000, is_global=True)


@pytest.mark.parametrize("size", [1 << 21, 1 << 22, 1 << 30])
def test_one_invlpg_drops_all_pieces_of_a_large_page(size):
    tlb = Tlb()
    tlb.select(TlbTag(0, None, 0))
    first = 3 * size >> 12
    last = first + (size >> 12) - 1
    for page in (first - 1, first, first + 5, last, last + 1):
        tlb.insert(page, translation(size=size))
    tlb.insert(first + 6, translation())
    tlb.invalidate_page(first + 9)
    assert [bool(tlb.find(page)) for page in (first - 1, first, first + 5, last, last + 1)] == [1, 0, 0, 0, 1]
    assert tlb.find(first + 6) is not None


def test_pieces_of_a_large_page_are_still_known_after_an_eviction():
    tlb = Tlb(capacity=4)
    tlb.select(TlbTag(0, None, 0))
    for page in range(5):
        tlb.insert(page, translation(size=1 << 21))
    assert [bool(tlb.find(page)) for page in range(5)] == [0, 0, 1, 1, 1]
    tlb.invalidate_page(100)
    assert len(tlb) == 0


def test_capacity_is_bounded_and_the_newest_survive():
    tlb = Tlb(capacity=64)
    tlb.select(TlbTag(0, None, 0))
    for page in range(1000):
        tlb.insert(page, translation(page << 12))
        assert len(tlb) <= 64
        assert tlb.find(page) is not None
    kept = [page for page in range(1000) if tlb.find(page)]
    assert kept == list(range(1000 - len(kept), 1000))


def test_tags_are_bounded_and_those_in_use_survive():
    tlb = Tlb(tags=8)
    for pcid in range(100):
        tlb.select(TlbTag(0, None, pcid))
        tlb.insert(1, translation(pcid << 12))
        tlb.insert(2, translation(0xABC000, is_global=True))
    found = []
    for pcid in range(99, -1, -1):
        tlb.select(TlbTag(0, None, pcid))
        found.append(tlb.find(1))
        assert tlb.find(2) is not None
    assert found[0] == translation(99 << 12)
    assert 0 < sum(entry is not None for entry in found) <= 8


@pytest.mark.parametrize(("capacity", "tags"), [(1, 8), (8, 1), (0, 0)])
def test_too_small(capacity, tags):
    with pytest.raises(ValueError, match="too small"):
        Tlb(capacity, tags)
