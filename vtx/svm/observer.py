"""What a tracer may watch of SVM: an optional observer, never consulted for a decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vmcs.vmcb.fields import Vmcb
    from vtx.svm.operation import VmrunFailure
    from vtx.svm.outcome import Outcome
    from vtx.svm.record import Vmexit


class Observer(Protocol):
    """Callbacks, each made after the fact; they must not change the machine.

    ``traces`` tells whether `svm_instruction` and `control_block_read` are of interest.
    """

    traces: bool

    def svm_instruction(self, name: str, outcome: Outcome) -> None:
        """An SVM instruction was executed with this outcome."""
        ...

    def control_block_read(self, before: Vmcb, now: Vmcb) -> None:
        """VMRUN reads ``now`` the control block that it ran last, and that was as ``before`` at the #VMEXIT."""
        ...

    def vmrun(self) -> None:
        """VMRUN entered the guest."""
        ...

    def vmrun_failed(self, failure: VmrunFailure) -> None:
        """VMRUN ended in VMEXIT_INVALID."""
        ...

    def vmexit(self, record: Vmexit) -> None:
        """A #VMEXIT was performed: the VMCB holds the saved guest, the processor has the host's state."""
        ...
