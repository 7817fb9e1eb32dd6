"""AVIC: the virtual APIC of a running guest, in its backing page.

When pending interrupts are evaluated: at VMRUN, when a doorbell rings, and when the guest writes the task priority or
ends an interrupt. The guest's accesses are in `vtx.svm.avic_access`, interrupts to others in `vtx.svm.avic_ipi`.

Interpretations. VMRUN leaves V_TPR and the task priority in the backing page as they are, even if they differ: reads
of CR8 give the one, priorities follow the other. An end of a level-triggered interrupt exits with the interrupt still
in service. The intercept of virtual interrupts is about those of the backing page, too. A doorbell for a processor in
host mode has no effect.

Spec: APM Vol. 2, "Advanced Virtual Interrupt Controller", "AVIC Backing Page", "VMCB Changes for AVIC", "Interrupt
Delivery", "Doorbell Mechanism".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmcs.vmcb import layouts
from vmcs.vmcb.avic import LAST_INDEX, NOACCEL_WRITE, TABLE_ADDRESS
from vmcs.vmcb.intercepts import Exit
from vtx.addresses import PAGE_SHIFT
from vtx.svm import places as at
from vtx.svm.nested_paging import APIC_ACCESS
from vtx.svm.record import Vmexit
from vtx.x86 import apic_page
from vtx.x86.apic_page import ApicPage
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import NotModelled

if TYPE_CHECKING:
    from vtx.svm.operation import SvmOperation

_TASK_PRIORITY_SHIFT: Final = 4  # from CR8 and V_TPR to the register


class Avic(ApicPage):
    """The virtual APIC of the guest that ``operation`` runs; ``pending`` is whether an interrupt is recognized.

    ``x2apic`` is whether the guest accesses it by MSRs, in x2AVIC mode.
    """

    def __init__(self, operation: SvmOperation) -> None:
        values = operation.vmcb.values
        super().__init__(operation.processor.memory, values[at.AVIC_BACKING_PAGE] & TABLE_ADDRESS)
        self.operation = operation
        self.x2apic = operation.uses_x2avic
        self.physical_table = values[at.AVIC_PHYSICAL_TABLE] & TABLE_ADDRESS
        self.last_index = values[at.AVIC_PHYSICAL_TABLE] & LAST_INDEX
        self.logical_table = values[at.AVIC_LOGICAL_TABLE] & TABLE_ADDRESS
        self.pending = False

    def evaluate(self) -> None:
        """Recognize the highest requested interrupt if its priority is above the processor's, or cease to."""
        requested = self.highest(apic_page.IRR)
        task, in_service = self.read(apic_page.TPR, 1), self.highest(apic_page.ISR)
        current = apic_page.priority(task, in_service)
        self.write(apic_page.PPR, current)
        self.pending = requested & apic_page.PRIORITY_CLASS > current & apic_page.PRIORITY_CLASS

    def deliver(self) -> Event:
        """Move the pending interrupt into service; the event to deliver."""
        vector = self.highest(apic_page.IRR)
        self.clear(apic_page.IRR, vector)
        self.set(apic_page.ISR, vector)
        self.evaluate()
        return Event(vector, EventKind.EXTERNAL_INTERRUPT)

    def request(self, vector: int) -> None:
        """An interrupt that the guest sends to itself."""
        self.set(apic_page.IRR, vector)
        self.evaluate()

    def task_priority_written(self) -> None:
        """The guest has written the register: V_TPR follows."""
        values = self.operation.vmcb.values
        priority = self.read(apic_page.TPR, 1) >> _TASK_PRIORITY_SHIFT
        values[at.VIRTUAL] = values[at.VIRTUAL] & ~layouts.V_TPR | priority
        self.evaluate()

    def set_task_priority(self, value: int) -> None:
        """The guest has written ``value`` to CR8."""
        self.write(apic_page.TPR, value << _TASK_PRIORITY_SHIFT)
        self.task_priority_written()

    def end_of_interrupt(self) -> Vmexit | None:
        """The guest has written the register: the exit that a level-triggered interrupt asks for."""
        vector = self.highest(apic_page.ISR)
        if vector and self.is_set(apic_page.TMR, vector):
            return not_accelerated(apic_page.EOI, write=True, vector=vector)
        if vector:
            self.clear(apic_page.ISR, vector)
        self.evaluate()
        return None


def not_accelerated(offset: int, *, write: bool, vector: int = 0) -> Vmexit:
    """The exit of an access to the register at ``offset``."""
    return Vmexit(Exit.AVIC_NOACCEL, (offset & 0xFF0) | (NOACCEL_WRITE if write else 0), vector)


def access_page(operation: SvmOperation) -> int | None:
    """The guest-physical page number of the APIC registers; None if the guest has none in memory."""
    if not operation.uses_avic or operation.uses_x2avic:
        return None
    return (operation.vmcb.values[at.AVIC_APIC_BAR] & TABLE_ADDRESS) >> PAGE_SHIFT


def start(operation: SvmOperation) -> None:
    """The guest runs: give it its virtual APIC, if it has one."""
    if not operation.uses_avic:
        return
    if not operation.nested_paging:
        raise NotModelled("AVIC without nested paging")
    operation.avic = Avic(operation)
    operation.avic.evaluate()
    operation.processor.mmu.reserved_page = APIC_ACCESS


def stop(operation: SvmOperation) -> None:
    """The guest does not run any more."""
    if operation.avic is not None:
        operation.avic = None
        operation.processor.mmu.reserved_page = None
