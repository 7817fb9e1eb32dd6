"""MSR areas: lists in memory of MSRs to load at VM entry, to store and to load at VM exit.

Which entries must fail is in `vmcs.rules.msr_load`; this module carries out the others, in order, up to the first that
fails.

Spec: SDM Vol. 3, "VM Entries", "Loading MSRs"; "VM Exits", "Saving MSRs" and "Loading MSRs".
"""

from __future__ import annotations

from typing import Final

from vmcs.rules import EntryContext
from vmcs.rules.msr_load import RULES, SAVING, Area, MsrRule, MsrViolation, entries, violation
from vtx.x86.virtualization import Processor

_VALUE_OFFSET: Final = 8  # of the MSR's value in an entry

_WRMSR: Final = next(rule for rule in RULES if rule.id == "msr-load.wrmsr")
_RDMSR: Final = MsrRule(
    "msr-store.rdmsr",
    "RDMSR at privilege level 0 would succeed",
    frozenset((Area.EXIT_STORE,)),
    lambda context, entry: False,
    SAVING,
)


def load_msrs(processor: Processor, context: EntryContext, area: Area) -> MsrViolation | None:
    """Load the MSRs of ``area``; the entry that fails, after those before it have been loaded."""
    for entry in entries(context, area):
        found = violation(context, entry, area)
        if found is not None:
            return found
        if not processor.msrs.write(entry.index, entry.value):
            return MsrViolation(_WRMSR, entry, area)
    return None


def store_msrs(processor: Processor, context: EntryContext) -> MsrViolation | None:
    """Store the MSRs of the VM-exit MSR-store area; the entry that fails, after those before it have been stored."""
    for entry in entries(context, Area.EXIT_STORE):
        found = violation(context, entry, Area.EXIT_STORE)
        if found is not None:
            return found
        value = processor.msrs.read(entry.index)
        if value is None:
            return MsrViolation(_RDMSR, entry, Area.EXIT_STORE)
        processor.memory.write_u64(entry.address + _VALUE_OFFSET, value)
    return None
