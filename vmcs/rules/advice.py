"""Explanations of failing VM entries: a violation, and what this processor would have accepted instead.

What is legal comes from the demand, an example of it from the rule's repair, tried out on a copy.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

from attrs import evolve

from vmcs.explanation import Explanation, Finding
from vmcs.fields import FIELDS
from vmcs.rules.model import EntryContext, Rule, Violation
from vmcs.rules.msr_load import MsrViolation


def explain_violation(violation: Violation, context: EntryContext) -> Explanation:
    """``violation``, which was found in ``context``; neither is changed."""
    rule = violation.rule
    return Explanation(
        rule.id,
        rule.statement(),
        str(violation.outcome),
        str(rule.ref),
        tuple(Finding(field.name, value, field.describe(value), bits) for field, value, bits in violation.values),
        rule.demand.legal(context),
        example(rule, context),
    )


def example(rule: Rule, context: EntryContext) -> tuple[tuple[str, int], ...]:
    """Values of VMCS fields, by name, with which ``rule`` holds; empty if it is about something else."""
    trial = evolve(context, vmcs=context.vmcs.copy())
    rule.repair(trial)
    if not rule.holds(trial):
        return ()
    return tuple((field.name, trial.vmcs[field]) for field in FIELDS if trial.vmcs[field] != context.vmcs[field])


def explain_msr_violation(violation: MsrViolation) -> Explanation:
    """An entry of an MSR area that cannot be processed."""
    entry, area = violation.entry, violation.area
    return Explanation(
        violation.rule.id,
        violation.rule.sentence,
        str(violation.outcome),
        str(violation.rule.ref),
        (
            Finding(f"{area.address.name}, entry", entry.number, f"{entry.number} at {entry.address:#x}"),
            Finding("MSR index", entry.index, f"{entry.index:#x}"),
            Finding("bits 63:32 of the entry", entry.reserved, f"{entry.reserved:#x}", entry.reserved),
            Finding("MSR data", entry.value, f"{entry.value:#x}"),
        ),
    )
