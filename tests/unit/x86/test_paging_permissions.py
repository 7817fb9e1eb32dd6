"""The permission check and its error codes, all cases, against the manual's prose typed as plain conditions."""

import itertools

import pytest

from vtx.x86.memory import PhysicalMemory
from vtx.x86.page_rights import PermissionControls, Privilege, permission_table
from vtx.x86.paging import PageFault, PagingContext, walk
from vtx.x86.second_level import AccessKind, IdentitySecondLevel

PG, WP = 1 << 31, 1 << 16
PAE, SMEP, SMAP, PKE, PKS = 1 << 5, 1 << 20, 1 << 21, 1 << 22, 1 << 24
LMA, NXE = 1 << 10, 1 << 11
A, D, XD = 0x20, 0x40, 1 << 63
KEY = 5

FLAGS = list(itertools.product((0, 2), (0, 4), (0, XD)))
SHADOW_STACK = (Privilege.USER_SHADOW_STACK, Privilege.SUPERVISOR_SHADOW_STACK)
ACCESSES = [
    (kind, privilege)
    for kind in AccessKind
    for privilege in Privilege
    if kind is not AccessKind.EXECUTE or privilege not in SHADOW_STACK
]


def expected_error(
    kind, privilege, *, user_page, writable, shadow_stack_page, execute_disable, wp, smep, smap, nxe, pkru, pkrs
):
    """Error code, or None when the access is allowed."""
    user = privilege in (Privilege.USER, Privilege.USER_SHADOW_STACK)
    refused = False
    if privilege in SHADOW_STACK:
        refused = not shadow_stack_page or user is not user_page
    elif kind is AccessKind.EXECUTE:
        refused |= execute_disable
        refused |= user and not user_page
        refused |= not user and user_page and smep
    else:
        refused |= user and not user_page
        refused |= not user and user_page and smap and privilege is not Privilege.SUPERVISOR_AC
        if kind is AccessKind.WRITE:
            refused |= not writable and (user or wp)
    key_refuses = False
    key_register = pkru if user_page else pkrs
    if kind is not AccessKind.EXECUTE and key_register is not None:
        access_disable, write_disable = key_register >> 2 * KEY & 1, key_register >> (2 * KEY + 1) & 1
        key_refuses = bool(access_disable or (kind is AccessKind.WRITE and write_disable and (user or wp)))
    if not (refused or key_refuses):
        return None
    code = 1
    code |= 2 if kind is AccessKind.WRITE else 0
    code |= 4 if user else 0
    code |= 64 if privilege in SHADOW_STACK else 0
    code |= 16 if kind is AccessKind.EXECUTE and (smep or nxe) else 0
    return code | (32 if key_refuses else 0)


class TwoEntries:
    """Linear 0 through four levels; the PML4E and the PTE have the given flags, the others allow everything."""

    def __init__(self, top, leaf, dirty=D):
        self.memory = PhysicalMemory(1 << 16)
        self.memory.write_u64(0x1000, 0x2001 | A | top)
        self.memory.write_u64(0x2000, 0x3007 | A)
        self.memory.write_u64(0x3000, 0x4007 | A)
        self.memory.write_u64(0x4000, 0x5001 | A | dirty | KEY << 59 | leaf)

    def walk(self, context, kind, privilege):
        return walk(context, 0, kind, privilege, self.memory, IdentitySecondLevel())


def check(tables, flags, context_bits, pkru=None, pkrs=None, *, dirty=True):
    wp, smep, smap = context_bits
    top, leaf = flags
    nxe = bool((top | leaf) & XD) or wp
    cr4 = PAE | smep * SMEP | smap * SMAP | (pkru is not None) * PKE | (pkrs is not None) * PKS
    context = PagingContext(PG | wp * WP, 0x1000, cr4, LMA | nxe * NXE, 46, pkru=pkru or 0, pkrs=pkrs or 0)
    for kind, privilege in ACCESSES:
        expected = expected_error(
            kind,
            privilege,
            user_page=bool(top & leaf & 4),
            writable=bool(top & leaf & 2),
            shadow_stack_page=dirty and bool(top & 2) and not leaf & 2,
            execute_disable=bool((top | leaf) & XD),
            wp=wp,
            smep=smep,
            smap=smap,
            nxe=nxe,
            pkru=pkru,
            pkrs=pkrs,
        )
        result = tables.walk(context, kind, privilege)
        actual = result.error_code if isinstance(result, PageFault) else None
        assert actual == expected, f"{kind!r} {privilege!r}"
        if dirty and not isinstance(result, PageFault):
            # What is granted for one kind must be what the check says about every kind.
            for other in AccessKind:
                allowed = not isinstance(tables.walk(context, other, privilege), PageFault)
                assert bool(result.permissions(context, privilege) & other) == allowed


@pytest.mark.parametrize("wp", [False, True])
@pytest.mark.parametrize("smep", [False, True])
@pytest.mark.parametrize("smap", [False, True])
def test_permissions(wp, smep, smap):
    for top, leaf in itertools.product(FLAGS, FLAGS):
        flags = (sum(top), sum(leaf))
        check(TwoEntries(*flags), flags, (wp, smep, smap))


def test_a_clean_page_is_no_shadow_stack_page():
    for leaf in FLAGS:
        check(TwoEntries(6, sum(leaf), dirty=0), (6, sum(leaf)), (True, False, False), dirty=False)
        check(TwoEntries(6, sum(leaf)), (6, sum(leaf)), (True, False, False))


@pytest.mark.parametrize("rights", range(4))
@pytest.mark.parametrize("wp", [False, True])
@pytest.mark.parametrize("smap", [False, True])
@pytest.mark.parametrize(("user_keys", "supervisor_keys"), [(True, False), (False, True), (True, True)])
def test_protection_keys(rights, wp, smap, user_keys, supervisor_keys):
    # Every other key forbids everything: only the page's own key may count.
    register = (~(3 << 2 * KEY) | rights << 2 * KEY) & 0xFFFF_FFFF
    for leaf in FLAGS:
        flags = (6, sum(leaf))
        pkru = register if user_keys else None
        pkrs = register if supervisor_keys else None
        check(TwoEntries(*flags), flags, (wp, False, smap), pkru, pkrs)


def test_implicit_access_ignores_ac_and_cpl():
    assert Privilege.of(3, True, implicit=True) is Privilege.SUPERVISOR
    assert Privilege.of(0, True, implicit=True) is Privilege.SUPERVISOR
    assert Privilege.of(3, True) is Privilege.USER
    assert Privilege.of(0, True) is Privilege.SUPERVISOR_AC
    assert Privilege.of(2, False) is Privilege.SUPERVISOR


def test_tables_have_one_row_per_privilege_and_one_column_per_attribute():
    for pkru in (None, 0x5555_5555):
        table = permission_table(PermissionControls(True, True, True, True, pkru, None))
        assert len(table) == len(Privilege)
        assert all(len(row) == 3 * 256 for row in table)  # anyone may fetch; user mode alone; supervisor mode alone


@pytest.mark.parametrize("pkru", [None, 0x5555_5555])
def test_who_may_fetch_takes_away_nothing_but_the_fetch(pkru):
    table = permission_table(PermissionControls(True, True, False, False, pkru, None))
    for privilege, row in zip(Privilege, table, strict=True):
        for attributes in range(256):
            plain = row[attributes]
            without = plain & ~4  # execution, of the values of AccessKind
            by_user, by_supervisor = row[attributes | 1 << 8], row[attributes | 1 << 9]
            expected = (plain, without) if privilege is Privilege.USER else (without, plain)
            assert (by_user, by_supervisor) == expected
