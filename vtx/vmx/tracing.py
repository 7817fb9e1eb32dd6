"""The observer that counts VM exits and turns what VMX does into trace events."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Final, Protocol

from vmcs import fields as f
from vmcs.bits import Layout
from vmcs.exits import BY_NUMBER, Reason
from vmcs.layouts import EVENT_TYPES
from vmcs.region import Vmcs
from vmcs.rules import RULES, Violation
from vtx import events as e
from vtx.vmx.ept import EptMisconfiguration, ExtendedPageTables
from vtx.vmx.explanations import (
    MISCONFIGURATION,
    Explain,
    broken_rule,
    explain_entry_failure,
    explain_instruction,
    explain_misconfiguration,
)
from vtx.vmx.operation import EntryFailure
from vtx.vmx.outcome import (
    Completed,
    EntryFailed,
    Outcome,
    VmEntered,
    VmExited,
    VmFailInvalid,
    VmFailValid,
    VmSucceed,
    VmxAborted,
)
from vtx.vmx.record import ERROR_CODE_VALID, VALID, VmExit
from vtx.vmx.vmx import Vmx
from vtx.x86.outcome import Fault
from vtx.x86.state import CpuState

_BASIC_REASON: Final = 0xFFFF


class TracedProcessor(Protocol):
    """What the observer reads of the processor."""

    index: int
    state: CpuState
    vmx: Vmx

    def now(self) -> int:
        """The virtual time in ticks."""
        ...


class VmxTracing:
    """An `Observer` that adds VM exits to ``exit_counts``, by name, and reports to ``tracer`` if there is one.

    ``explain`` is told of every failing VM entry and VMX instruction and of EPT misconfigurations.
    """

    def __init__(
        self,
        processor: TracedProcessor,
        exit_counts: Counter[str],
        tracer: e.Tracer | None,
        explain: Explain | None = None,
    ) -> None:
        self.processor = processor
        self.explain = explain
        self.operation = processor.vmx.operation
        self.exit_counts = exit_counts
        self.tracer = tracer

    @property
    def traces(self) -> bool:
        """See `Observer.traces`."""
        return self.tracer is not None

    def vm_instruction(self, name: str, outcome: Outcome) -> None:
        """See `Observer.vm_instruction`."""
        if self.explain is not None and isinstance(outcome, VmFailInvalid | VmFailValid):
            rule, failed = outcome.rule, outcome  # a VM entry has rules of its own
            if rule is not None:
                self.explain(rule.id, lambda: explain_instruction(self.operation, rule, failed))
        if self.tracer is not None:
            self.tracer.emit(e.VmInstruction(self.processor.index, self.processor.now(), name, describe(outcome)))

    def vm_entry(self, vmcs: Vmcs) -> None:
        """See `Observer.vm_entry`."""
        if self.tracer is None:
            return
        state, active = self.processor.state, self.operation.current
        assert active is not None
        self.tracer.emit(
            e.VmEntry(
                self.processor.index,
                self.processor.now(),
                active.pointer,
                active.context is not None and active.context.launching,
                state.rip,
                state.cr3,
                sum(len(rules.affected_by(active.checked)) for rules in RULES.values()),
                injected=_interruption(
                    vmcs[f.VM_ENTRY_INTERRUPTION_INFORMATION], vmcs[f.VM_ENTRY_EXCEPTION_ERROR_CODE]
                ),
            )
        )

    def vm_entry_failed(self, failure: EntryFailure) -> None:
        """See `Observer.vm_entry_failed`."""
        if self.explain is not None:
            self.explain(broken_rule(failure), lambda: explain_entry_failure(self.operation, failure))
        if self.tracer is None:
            return
        self.tracer.emit(
            e.VmEntryFailed(
                self.processor.index,
                self.processor.now(),
                self.operation.current_pointer,
                describe(failure.outcome),
                tuple(_violation(violation) for violation in failure.violations),
                failure.detail or None,
            )
        )

    def vm_exit(self, vmcs: Vmcs, record: VmExit) -> None:
        """See `Observer.vm_exit`."""
        number = record.reason & _BASIC_REASON
        name = _reason_name(number)
        self.exit_counts[name] += 1
        if self.tracer is None:
            return
        self.tracer.emit(
            e.VmExit(
                self.processor.index,
                self.processor.now(),
                self.operation.current_pointer,
                number,
                name,
                record.qualification,
                _decode(record),
                vmcs[f.GUEST_RIP],
                self.processor.state.rip,
                _interruption(record.interruption, record.interruption_error),
                _interruption(record.vectoring, record.vectoring_error),
                record.instruction_length,
                record.instruction_information,
                record.guest_linear,
                record.guest_physical,
            )
        )

    def ept_misconfiguration(self, fault: EptMisconfiguration) -> None:
        """See `Observer.ept_misconfiguration`."""
        active = self.operation.current
        if self.explain is not None and active is not None and isinstance(active.second_level, ExtendedPageTables):
            config = active.second_level.config
            self.explain(MISCONFIGURATION, lambda: explain_misconfiguration(config, fault))


def describe(outcome: Outcome) -> str:
    """An outcome in the manual's words."""
    match outcome:
        case Completed():
            return "completed"
        case VmSucceed():
            return "VMsucceed"
        case VmFailInvalid():
            return "VMfailInvalid"
        case VmFailValid(error=error):
            return f"VMfailValid({int(error)})"
        case VmEntered():
            return "VM entry"
        case EntryFailed(reason=reason) | VmExited(reason=reason):
            return f"VM exit: {_reason_name(reason & _BASIC_REASON)}"
        case VmxAborted(indicator=indicator):
            return f"VMX abort {int(indicator)}"
        case Fault():
            return str(outcome)


@functools.cache
def _reason_name(number: int) -> str:
    return BY_NUMBER[Reason(number)].name


def _decode(record: VmExit) -> Mapping[str, int | str]:
    """The parts of the exit qualification; flags that are clear are left out."""
    reason = BY_NUMBER[Reason(record.reason & _BASIC_REASON)]
    layout: Layout | None = reason.qualification
    if reason.number is Reason.EXCEPTION_OR_NMI and not record.is_debug_exception:
        layout = None
    if layout is None:
        return {}
    parts: dict[str, int | str] = {}
    for part in layout.slices:
        value = part.get(record.qualification)
        if part.values:
            parts[part.name] = part.values.get(value, f"reserved {value:#x}")
        elif value or part.width > 1:
            parts[part.name] = value
    return parts


def _interruption(word: int, error_code: int) -> e.Interruption | None:
    if not word & VALID:
        return None
    kind = EVENT_TYPES.get(word >> 8 & 7, "reserved")
    return e.Interruption(word & 0xFF, kind, error_code if word & ERROR_CODE_VALID else None)


def _violation(violation: Violation) -> e.RuleViolation:
    rule = violation.rule
    values = tuple(e.FieldValue(field.name, value, bits) for field, value, bits in violation.values)
    return e.RuleViolation(rule.id, rule.statement(), str(rule.ref), values)
