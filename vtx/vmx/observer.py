"""What a tracer may watch of VMX: an optional observer, never consulted for a decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vmcs.region import Vmcs
    from vtx.vmx.ept import EptMisconfiguration
    from vtx.vmx.operation import EntryFailure
    from vtx.vmx.outcome import Outcome
    from vtx.vmx.record import VmExit


class Observer(Protocol):
    """Callbacks, each made after the fact; they must not change the machine."""

    @property
    def traces(self) -> bool:
        """Whether `vm_instruction` has to be told of instructions that succeed."""
        ...

    def vm_instruction(self, name: str, outcome: Outcome) -> None:
        """A VMX instruction was executed (or called from Python) with this outcome."""
        ...

    def vm_entry(self, vmcs: Vmcs) -> None:
        """VM entry through ``vmcs`` succeeded."""
        ...

    def vm_entry_failed(self, failure: EntryFailure) -> None:
        """VM entry failed, whichever way: error 7 or 8, or an exit that reports an entry failure."""
        ...

    def vm_exit(self, vmcs: Vmcs, record: VmExit) -> None:
        """A VM exit was performed: ``vmcs`` holds the saved guest, the processor has the host state."""
        ...

    def ept_misconfiguration(self, fault: EptMisconfiguration) -> None:
        """An access of the guest met a misconfigured EPT paging-structure entry; the VM exit is next."""
        ...
