"""Loading MSRs on VM entry and VM exit, and storing them on VM exit: which entries of an MSR area must fail.

A failing entry of the VM-entry MSR-load area makes the VM entry fail with basic exit reason 34 and the entry's number,
counted from 1, as exit qualification. In the VM-exit areas it causes a VMX abort.

Spec: SDM Vol. 3, "VM Entries", "Loading MSRs"; "VM Exits", "Saving MSRs".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Final

from attrs import frozen

from vmcs import fields as f
from vmcs.bits import MASK32
from vmcs.exits import AbortIndicator, Reason
from vmcs.fields import Field
from vmcs.refs import Reference, sdm
from vmcs.rules.model import EntryContext, EntryFails

LOADING: Final = sdm("VM Entries", "Loading MSRs")
SAVING: Final = sdm("VM Exits", "Saving MSRs")

IA32_BIOS_UPDT_TRIG: Final = 0x79
IA32_BIOS_SIGN_ID: Final = 0x8B
IA32_SMM_MONITOR_CTL: Final = 0x9B
IA32_SMBASE: Final = 0x9E
IA32_FS_BASE: Final = 0xC000_0100
IA32_GS_BASE: Final = 0xC000_0101

ENTRY_SIZE: Final = 16


class Area(enum.Enum):
    """The three MSR areas: (address field, count field)."""

    ENTRY_LOAD = (f.VM_ENTRY_MSR_LOAD_ADDRESS, f.VM_ENTRY_MSR_LOAD_COUNT)
    EXIT_STORE = (f.VM_EXIT_MSR_STORE_ADDRESS, f.VM_EXIT_MSR_STORE_COUNT)
    EXIT_LOAD = (f.VM_EXIT_MSR_LOAD_ADDRESS, f.VM_EXIT_MSR_LOAD_COUNT)

    @property
    def address(self) -> Field:
        """The field with the physical address of the area."""
        return self.value[0]

    @property
    def count(self) -> Field:
        """The field with the number of entries."""
        return self.value[1]


@frozen
class MsrEntry:
    """One entry of an area: its number counted from 1, where it lies, and its three parts."""

    number: int
    address: int
    index: int
    reserved: int
    value: int


@frozen(eq=False)
class MsrRule:
    """A demand on one entry of certain areas; ``holds`` also sees the processor through the context."""

    id: str
    sentence: str
    areas: frozenset[Area]
    holds: Callable[[EntryContext, MsrEntry], bool]
    ref: Reference = LOADING


_ALL = frozenset(Area)
_LOADS = frozenset((Area.ENTRY_LOAD, Area.EXIT_LOAD))
_STORES = frozenset((Area.EXIT_STORE,))

RULES: Final[tuple[MsrRule, ...]] = (
    # The manual leaves longer lists undefined. Failing at the first entry too many is a behaviour software has seen,
    # and it keeps a list of four thousand million entries from hanging the processor.
    MsrRule(
        "msr-load.recommended-maximum",
        "the entry is within the recommended maximum number of entries",
        _ALL,
        lambda context, entry: entry.number <= context.capabilities.msr_list_maximum,
        sdm("VMX Capability Reporting Facility", "Miscellaneous Data"),
    ),
    MsrRule("msr-load.reserved", "bits 63:32 of the entry are 0", _ALL, lambda context, entry: not entry.reserved),
    MsrRule(
        "msr-load.segment-base",
        "the MSR is neither IA32_FS_BASE nor IA32_GS_BASE",
        _LOADS,
        lambda context, entry: entry.index not in (IA32_FS_BASE, IA32_GS_BASE),
    ),
    MsrRule(
        "msr-load.x2apic",
        "the MSR is not a local-APIC register in x2APIC mode",
        _ALL,
        lambda context, entry: entry.index >> 8 != 0x8,
    ),
    MsrRule(
        "msr-load.smm-only",
        "the MSR can be written outside SMM",
        _LOADS,
        lambda context, entry: entry.index != IA32_SMM_MONITOR_CTL or context.in_smm,
    ),
    MsrRule(
        "msr-store.smm-only",
        "the MSR can be read outside SMM",
        _STORES,
        lambda context, entry: entry.index != IA32_SMBASE or context.in_smm,
        SAVING,
    ),
    MsrRule(
        "msr-load.microcode",
        "the MSR is not one of the microcode update",
        _LOADS,
        lambda context, entry: entry.index not in (IA32_BIOS_UPDT_TRIG, IA32_BIOS_SIGN_ID),
    ),
    MsrRule(
        "msr-load.wrmsr",
        "WRMSR of the value at privilege level 0 would succeed",
        _LOADS,
        lambda context, entry: not context.wrmsr_faults(entry.index, entry.value),
    ),
)


def entries(context: EntryContext, area: Area) -> Iterator[MsrEntry]:
    """The entries of an area, read one by one as the processor would."""
    base = context.vmcs[area.address]
    for position in range(context.vmcs[area.count]):
        address = base + ENTRY_SIZE * position
        first = context.read(address, 8)
        yield MsrEntry(position + 1, address, first & MASK32, first >> 32, context.read(address + 8, 8))


@frozen
class MsrViolation:
    """An entry that cannot be processed."""

    rule: MsrRule
    entry: MsrEntry
    area: Area

    @property
    def outcome(self) -> EntryFails | AbortIndicator:
        """The failed VM entry or the VMX abort it causes."""
        if self.area is Area.ENTRY_LOAD:
            return EntryFails(Reason.ENTRY_FAILURE_MSR_LOADING, self.entry.number)
        if self.area is Area.EXIT_STORE:
            return AbortIndicator.SAVING_GUEST_MSRS
        return AbortIndicator.LOADING_HOST_MSRS

    def render(self) -> str:
        """The message: rule, entry and citation, one per line."""
        entry = self.entry
        return "\n".join(
            (
                f"{self.rule.id}: {self.rule.sentence}",
                f"  {self.area.address.name}: entry {entry.number} at {entry.address:#x}",
                f"  MSR {entry.index:#x}, value {entry.value:#x}, bits 63:32 {entry.reserved:#x}",
                f"  see {self.rule.ref}",
            )
        )

    def __str__(self) -> str:
        return self.render()


def violation(context: EntryContext, entry: MsrEntry, area: Area) -> MsrViolation | None:
    """The first rule an entry breaks, or None if it can be processed."""
    for rule in RULES:
        if area in rule.areas and not rule.holds(context, entry):
            return MsrViolation(rule, entry, area)
    return None
