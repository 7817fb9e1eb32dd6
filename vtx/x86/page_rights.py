"""Who may do what with a page: the permission check of paging, as one table per setting of the control registers.

A translation carries the *rights* that its paging-structure entries give (the ones a TLB entry caches). What an access
may do with them depends on registers that can change without any invalidation (CPL, RFLAGS.AC, CR0.WP, PKRU), so
rights become *permissions* only at the moment of the access, by one table look-up.

Spec: SDM Vol. 3, "Access Rights", "Determination of Access Rights", "Protection Keys"; SDM Vol. 1, "Shadow Stacks".
"""

from __future__ import annotations

import enum
import functools
from typing import Final

from attrs import frozen

from vtx.x86.second_level import ALL_PERMISSIONS, AccessKind

EXECUTE_DISABLE: Final = 1 << 0
"""Some entry used has XD set."""
WRITABLE: Final = 1 << 1
"""Every entry used has R/W set (the position of that bit in an entry)."""
USER: Final = 1 << 2
"""Every entry used has U/S set, a "user-mode address" (the position of that bit in an entry)."""
SHADOW_STACK: Final = 1 << 3
"""A shadow-stack page: R/W is clear and the dirty flag set in the entry that maps it, R/W is set in all others."""
RIGHTS_MASK: Final = EXECUTE_DISABLE | WRITABLE | USER | SHADOW_STACK
KEY_SHIFT: Final = 4
"""Rights in bits 3:0 and the protection key in bits 7:4 make a page's ``attributes``, the index of the tables."""

FETCHED_BY_USER: Final = 1 << 8
"""The second level lets nobody but user mode fetch instructions from the page; only after `RIGHTS_MASK` and key."""
FETCHED_BY_SUPERVISOR: Final = 1 << 9
"""The second level lets nobody but supervisor mode fetch instructions from it."""

PROTECTION_KEYS: Final = 16


class Privilege(enum.IntEnum):
    """What the permission check needs to know about the one who accesses."""

    USER = 0
    """A user-mode access: explicit, with CPL 3."""
    SUPERVISOR = 1
    """A supervisor-mode access with RFLAGS.AC clear; also every implicit supervisor-mode access, at any CPL."""
    SUPERVISOR_AC = 2
    """An explicit supervisor-mode access with RFLAGS.AC set, which SMAP lets pass."""
    USER_SHADOW_STACK = 3
    """A shadow-stack access with CPL 3, or by WRUSS."""
    SUPERVISOR_SHADOW_STACK = 4
    """Any other shadow-stack access."""

    @property
    def user(self) -> bool:
        """Whether it is a user-mode access."""
        return self is _USER or self is _USER_SHADOW_STACK

    @property
    def shadow_stack(self) -> bool:
        """Whether it is a shadow-stack access."""
        return self is _USER_SHADOW_STACK or self is _SUPERVISOR_SHADOW_STACK

    @staticmethod
    def of(cpl: int, ac: bool, implicit: bool = False) -> Privilege:
        """The privilege of an access at ``cpl`` with RFLAGS.AC = ``ac``.

        Accesses to the descriptor tables, the TSS and the like are ``implicit``: supervisor-mode even at CPL 3.
        """
        if implicit:
            return _SUPERVISOR
        if cpl == 3:
            return _USER
        return _SUPERVISOR_AC if ac else _SUPERVISOR


# Members of an enumeration are slow to look up.
_USER, _SUPERVISOR, _SUPERVISOR_AC, _USER_SHADOW_STACK, _SUPERVISOR_SHADOW_STACK = Privilege


@frozen
class PermissionControls:
    """The control-register state of the permission check.

    ``paging`` is CR0.PG; ``pkru`` and ``pkrs`` are None when the protection keys of user-mode and supervisor-mode
    addresses are not in force.
    """

    paging: bool
    wp: bool
    smep: bool
    smap: bool
    pkru: int | None
    pkrs: int | None


PermissionTable = tuple[tuple[int, ...], ...]
"""``table[privilege][attributes]`` is the mask of `AccessKind` that is allowed."""


def key_permissions(controls: PermissionControls, privilege: Privilege, attributes: int) -> int:
    """Mask of `AccessKind` that the protection key of a page leaves; keys never restrict fetches.

    Spec: SDM Vol. 3, "Protection Keys".
    """
    key_rights = controls.pkru if attributes & USER else controls.pkrs
    if key_rights is None:
        return ALL_PERMISSIONS
    key = attributes >> KEY_SHIFT
    access_disable = key_rights >> 2 * key & 1
    write_disable = key_rights >> 2 * key & 2
    if access_disable:
        return AccessKind.EXECUTE.value
    if write_disable and (privilege.user or controls.wp):
        return AccessKind.READ | AccessKind.EXECUTE
    return ALL_PERMISSIONS


def _page_permissions(controls: PermissionControls, privilege: Privilege, rights: int) -> int:
    """Mask of `AccessKind` that the rights of a page give, protection keys aside."""
    if not controls.paging:
        return ALL_PERMISSIONS
    user_address = bool(rights & USER)
    if privilege.shadow_stack:
        allowed = rights & SHADOW_STACK and user_address is privilege.user
        return AccessKind.READ | AccessKind.WRITE if allowed else 0
    execute = not rights & EXECUTE_DISABLE
    if privilege is Privilege.USER:
        read = user_address
        write = read and bool(rights & WRITABLE)
        execute = execute and user_address
    else:
        read = not (user_address and controls.smap and privilege is not Privilege.SUPERVISOR_AC)
        write = read and bool(rights & WRITABLE or not controls.wp)
        execute = execute and not (user_address and controls.smep)
    return AccessKind.READ * read | AccessKind.WRITE * write | AccessKind.EXECUTE * execute


@functools.lru_cache(maxsize=256)
def permission_table(controls: PermissionControls) -> PermissionTable:
    """The permissions of every privilege for every combination of rights, protection key and who may fetch."""

    def by_key(privilege: Privilege) -> tuple[int, ...]:
        plain = tuple(_page_permissions(controls, privilege, rights) for rights in range(RIGHTS_MASK + 1))
        if controls.pkru is None and controls.pkrs is None:
            return plain * PROTECTION_KEYS
        return tuple(
            plain[attributes & RIGHTS_MASK] & key_permissions(controls, privilege, attributes)
            for attributes in range(PROTECTION_KEYS << KEY_SHIFT)
        )

    def row(privilege: Privilege) -> tuple[int, ...]:
        anyone = by_key(privilege)
        others = tuple(permissions & ~AccessKind.EXECUTE.value for permissions in anyone)
        by_user, by_supervisor = (anyone, others) if privilege is Privilege.USER else (others, anyone)
        return anyone + by_user + by_supervisor

    return tuple(row(privilege) for privilege in Privilege)
