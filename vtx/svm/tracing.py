"""The observer that counts #VMEXITs and turns what SVM does into trace events."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from vmcs.vmcb import layouts
from vmcs.vmcb.intercepts import Exit, name_of
from vtx import events as e
from vtx.svm import places as at
from vtx.svm.clean_bits import changed_though_clean
from vtx.svm.outcome import Completed, Entered, Exited, Outcome, ShutDown
from vtx.x86.outcome import Fault

if TYPE_CHECKING:
    from vmcs.vmcb.fields import Vmcb
    from vmcs.vmcb.model import Violation
    from vtx.svm.operation import VmrunFailure
    from vtx.svm.record import Vmexit
    from vtx.svm.svm import Svm
    from vtx.x86.state import CpuState


class TracedProcessor(Protocol):
    """What the observer reads of the processor."""

    index: int
    state: CpuState
    svm: Svm

    def now(self) -> int:
        """The virtual time in ticks."""
        ...


class SvmTracing:
    """An `Observer` that adds #VMEXITs to ``exit_counts``, by name, and reports to ``tracer`` if there is one."""

    def __init__(self, processor: TracedProcessor, exit_counts: Counter[str], tracer: e.Tracer | None) -> None:
        self.processor = processor
        self.operation = processor.svm.operation
        self.exit_counts = exit_counts
        self.tracer = tracer
        self.traces = tracer is not None

    def svm_instruction(self, name: str, outcome: Outcome) -> None:
        """See `Observer.svm_instruction`."""
        if self.tracer is not None:
            self.tracer.emit(e.VmInstruction(self.processor.index, self.processor.now(), name, describe(outcome)))

    def control_block_read(self, before: Vmcb, now: Vmcb) -> None:
        """See `Observer.control_block_read`."""
        fields = changed_though_clean(before.values, now.values)
        if self.tracer is not None and fields:
            values = tuple(e.FieldValue(field.name, now[field], before[field] ^ now[field]) for field in fields)
            stamp = self.processor.index, self.processor.now()
            self.tracer.emit(e.VmcbChangedThoughClean(*stamp, self.operation.address, values))

    def vmrun(self) -> None:
        """See `Observer.vmrun`."""
        if self.tracer is None:
            return
        operation, state = self.operation, self.processor.state
        values = operation.vmcb.values
        event = e.Vmrun(
            self.processor.index,
            self.processor.now(),
            operation.address,
            values[at.ASID],
            state.rip,
            state.cr3,
            operation.nested_paging,
            _event(values[at.EVENTINJ]),
        )
        self.tracer.emit(event)

    def vmrun_failed(self, failure: VmrunFailure) -> None:
        """See `Observer.vmrun_failed`."""
        self.exit_counts[name_of(Exit.INVALID)] += 1
        if self.tracer is None:
            return
        violations = () if failure.violation is None else (_violation(failure.violation),)
        stamp = self.processor.index, self.processor.now()
        self.tracer.emit(e.VmrunFailed(*stamp, failure.address, violations, failure.detail or None))

    def vmexit(self, record: Vmexit) -> None:
        """See `Observer.vmexit`."""
        self.exit_counts[name_of(record.code)] += 1
        if self.tracer is None:
            return
        event = e.Vmexit(
            self.processor.index,
            self.processor.now(),
            self.operation.address,
            record.code,
            name_of(record.code),
            record.info1,
            record.info2,
            self.operation.vmcb.values[at.RIP],
            self.processor.state.rip,
            _event(record.interrupted),
            record.next_rip or None,
        )
        self.tracer.emit(event)


def _event(word: int) -> e.Interruption | None:
    if not word & layouts.EVENT_VALID:
        return None
    kind = layouts.TYPE_NAMES.get(word >> layouts.EVENT_TYPE_SHIFT & 7, "reserved")
    return e.Interruption(word & 0xFF, kind, word >> 32 if word & layouts.EVENT_ERROR_CODE_VALID else None)


def _violation(violation: Violation) -> e.RuleViolation:
    rule = violation.rule
    values = tuple(e.FieldValue(field.name, value, bits) for field, value, bits in violation.values)
    return e.RuleViolation(rule.id, rule.statement(), str(rule.ref), values)


def describe(outcome: Outcome) -> str:
    """An outcome in the manual's words."""
    match outcome:
        case Completed():
            return "completed"
        case Entered():
            return "guest mode"
        case Exited(code=code):
            return f"#VMEXIT: {name_of(code)}"
        case ShutDown():
            return "shutdown"
        case Fault():
            return str(outcome)
