"""A guest's interprocessor interrupt: into the backing pages of its destinations, with a doorbell for those that run.

All destinations are looked up before anything is delivered; a broadcast passes over entries that are not valid.

Interpretations. "All but self" leaves out the entry with the sender's own backing page. The index of a destination
that does not run is that of the first one; in x2AVIC mode, which has no logical table, it is the physical one's. In
x2AVIC mode a broadcast is destination FFFF_FFFFH. Every message but a fixed, edge-triggered one is of an invalid type.

Spec: APM Vol. 2, "Interrupt Delivery", "Physical APIC ID Table", "Logical APIC ID Table", "AVIC IPI Delivery Not
Completed".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attrs import frozen

from vmcs.vmcb.avic import (
    IPI_FAILURE_SHIFT,
    LOGICAL_ENTRY_SIZE,
    LOGICAL_GUEST_ID,
    LOGICAL_VALID,
    PHYSICAL_ENTRY_SIZE,
    PHYSICAL_HOST_ID,
    PHYSICAL_IS_RUNNING,
    PHYSICAL_VALID,
    TABLE_ADDRESS,
    IpiFailure,
)
from vmcs.vmcb.intercepts import Exit
from vtx.svm.avic import Avic
from vtx.svm.record import Vmexit
from vtx.x86 import apic_page
from vtx.x86.apic_page import ApicPage

# Of the interrupt command register.
_VECTOR: Final = 0xFF
_NOT_FIXED_OR_LEVEL: Final = 7 << 8 | 1 << 15
_LOGICAL: Final = 1 << 11
_SHORTHAND: Final = 3 << 18
_SELF: Final = 1 << 18
_ALL_BUT_SELF: Final = 3 << 18
_FIRST_LEGAL_VECTOR: Final = 16

_XAPIC_DESTINATION_SHIFT: Final = 24
_XAPIC_BROADCAST: Final = 0xFF
_X2APIC_BROADCAST: Final = 0xFFFF_FFFF
_FLAT: Final = 0xF  # bits 31:28 of the destination format register
_CLUSTER_SIZE: Final = 4
_X2APIC_CLUSTER_SIZE: Final = 16
_INDEX: Final = 0xFFF  # of EXITINFO2


@frozen
class _Failed:
    """What keeps the interrupt from being complete; ``index`` is that of the entry at fault."""

    failure: IpiFailure
    index: int = 0


@frozen
class _Target:
    """A destination: the entry of the physical table, and the index to report of it."""

    entry: int
    index: int

    @property
    def page(self) -> int:
        return self.entry & TABLE_ADDRESS


def send(avic: Avic) -> Vmexit | None:
    """Carry out what the interrupt command register says; the exit if that is not complete."""
    low, high = avic.read(apic_page.ICR_LOW), avic.read(apic_page.ICR_HIGH)
    return _exit(_send(avic, low, high), low, high)


def send_to_self(avic: Avic, vector: int) -> Vmexit | None:
    """The same for the self-IPI register of x2APIC mode."""
    command = _SELF | vector
    return _exit(_send(avic, command, 0), command, 0)


def _exit(failed: _Failed | None, low: int, high: int) -> Vmexit | None:
    if failed is None:
        return None
    return Vmexit(Exit.AVIC_INCOMPLETE_IPI, high << 32 | low, failed.failure << IPI_FAILURE_SHIFT | failed.index)


def _send(avic: Avic, low: int, high: int) -> _Failed | None:
    vector = low & _VECTOR
    if low & _NOT_FIXED_OR_LEVEL:
        return _Failed(IpiFailure.INVALID_TYPE)
    if vector < _FIRST_LEGAL_VECTOR:
        return _Failed(IpiFailure.INVALID_VECTOR)
    if low & _SHORTHAND == _SELF:
        avic.request(vector)
        return None
    targets = _targets(avic, low, high)
    return targets if isinstance(targets, _Failed) else _deliver(avic, vector, targets)


def _deliver(avic: Avic, vector: int, targets: list[_Target]) -> _Failed | None:
    """Request ``vector`` of all ``targets``, and tell those that run."""
    not_running = None
    for target in targets:
        ApicPage(avic.memory, target.page).set(apic_page.IRR, vector)
        if target.entry & PHYSICAL_IS_RUNNING:
            avic.operation.processor.ring_doorbell(target.entry & PHYSICAL_HOST_ID)
        elif not_running is None:
            not_running = _Failed(IpiFailure.TARGET_NOT_RUNNING, target.index)
    return not_running


def _targets(avic: Avic, low: int, high: int) -> list[_Target] | _Failed:
    destination = high if avic.x2apic else high >> _XAPIC_DESTINATION_SHIFT
    broadcast = _X2APIC_BROADCAST if avic.x2apic else _XAPIC_BROADCAST
    if low & _SHORTHAND or destination == broadcast:
        return _everyone(avic, but_self=low & _SHORTHAND == _ALL_BUT_SELF)
    if not low & _LOGICAL:
        return _directed(avic, [(destination, destination)])
    if avic.x2apic:
        first = (destination >> 16) * _X2APIC_CLUSTER_SIZE
        return _directed(avic, [(first + bit, first + bit) for bit in _bits(destination & 0xFFFF)])
    members = _logical(avic, destination)
    return members if isinstance(members, _Failed) else _directed(avic, members)


def _bits(value: int) -> Iterator[int]:
    return (bit for bit in range(value.bit_length()) if value >> bit & 1)


def _entry(avic: Avic, identity: int) -> int:
    return avic.memory.read_u64(avic.physical_table + PHYSICAL_ENTRY_SIZE * identity)


def _has_page(avic: Avic, target: _Target) -> bool:
    return not target.page >> avic.operation.processor.profile.physical_address_width


def _everyone(avic: Avic, *, but_self: bool) -> list[_Target] | _Failed:
    """Every virtual processor of the guest."""
    targets = []
    for identity in range(avic.last_index + 1):
        if identity == _XAPIC_BROADCAST and not avic.x2apic:
            continue  # reserved
        target = _Target(_entry(avic, identity), identity)
        if not target.entry & PHYSICAL_VALID or (but_self and target.page == avic.page):
            continue
        if not _has_page(avic, target):
            return _Failed(IpiFailure.INVALID_BACKING_PAGE, identity)
        targets.append(target)
    return targets


def _directed(avic: Avic, members: list[tuple[int, int]]) -> list[_Target] | _Failed:
    """Those with certain APIC IDs; ``members`` has each with the index to report of it."""
    targets = []
    for identity, index in members:
        target = _Target(_entry(avic, identity) if identity <= avic.last_index else 0, index)
        if not target.entry & PHYSICAL_VALID:
            return _Failed(IpiFailure.INVALID_TARGET, index & _INDEX)
        if not _has_page(avic, target):
            return _Failed(IpiFailure.INVALID_BACKING_PAGE, index)
        targets.append(target)
    return targets


def _logical(avic: Avic, destination: int) -> list[tuple[int, int]] | _Failed:
    """APIC ID and index of those that an 8-bit logical ``destination`` matches, by the logical table."""
    first, members = 0, destination
    if avic.read(apic_page.DFR) >> 28 != _FLAT:
        first, members = (destination >> 4) * _CLUSTER_SIZE, destination & 0xF
    found = []
    for bit in _bits(members):
        index = first + bit
        entry = avic.memory.read_u32(avic.logical_table + LOGICAL_ENTRY_SIZE * index)
        identity = entry & LOGICAL_GUEST_ID
        if not entry & LOGICAL_VALID or identity > _XAPIC_BROADCAST:
            return _Failed(IpiFailure.INVALID_TARGET, index)
        found.append((identity, index))
    return found
