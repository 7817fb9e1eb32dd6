"""The observer that counts #VMEXITs and turns what SVM does into trace events."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from vmcs.vmcb.intercepts import name_of
from vtx import events as e
from vtx.svm.outcome import Completed, Entered, Exited, Outcome, ShutDown
from vtx.x86.outcome import Fault

if TYPE_CHECKING:
    from vtx.svm.operation import VmrunFailure
    from vtx.svm.record import Vmexit


class TracedProcessor(Protocol):
    """What the observer reads of the processor."""

    index: int

    def now(self) -> int:
        """The virtual time in ticks."""
        ...


class SvmTracing:
    """An `Observer` that adds #VMEXITs to ``exit_counts``, by name, and reports to ``tracer`` if there is one."""

    def __init__(self, processor: TracedProcessor, exit_counts: Counter[str], tracer: e.Tracer | None) -> None:
        self.processor = processor
        self.exit_counts = exit_counts
        self.tracer = tracer

    def svm_instruction(self, name: str, outcome: Outcome) -> None:
        """See `Observer.svm_instruction`."""
        if self.tracer is not None:
            self.tracer.emit(e.VmInstruction(self.processor.index, self.processor.now(), name, describe(outcome)))

    def vmrun(self) -> None:
        """See `Observer.vmrun`."""

    def vmrun_failed(self, failure: VmrunFailure) -> None:
        """See `Observer.vmrun_failed`."""

    def vmexit(self, record: Vmexit) -> None:
        """See `Observer.vmexit`."""
        self.exit_counts[name_of(record.code)] += 1


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
