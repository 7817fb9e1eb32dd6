"""The virtual-APIC page: what the processor itself reads and writes there while a guest runs.

Virtualization of the task priority, of end of interrupt and of self-IPIs; recognition and delivery of virtual
interrupts. What a guest does that leads here is in `vtx.vmx.apic_access` (the APIC-access page) and
`vtx.vmx.apic_instructions` (MOV CR8, RDMSR, WRMSR).

Interpretation. The end of service of a virtual user-interrupt notification virtualizes the PPR and evaluates pending
virtual interrupts, as end of interrupt does, but causes no VM exit whatever the EOI-exit bitmap says.

Spec: SDM Vol. 3, "APIC Virtualization and Virtual Interrupts".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.region import Vmcs
from vtx.vmx.record import VmExit
from vtx.vmx.view import ControlView
from vtx.x86 import apic_page
from vtx.x86.apic_page import ApicPage
from vtx.x86.event import Event, EventKind
from vtx.x86.memory import PhysicalMemory

# Offsets of virtual registers in the page ("Virtualized APIC Registers").
VTPR: Final = apic_page.TPR
VPPR: Final = apic_page.PPR
VEOI: Final = apic_page.EOI
VISR: Final = apic_page.ISR
VIRR: Final = apic_page.IRR
VICR_LOW: Final = apic_page.ICR_LOW
VICR_HIGH: Final = apic_page.ICR_HIGH
VSELF_IPI: Final = apic_page.SELF_IPI

_STATUS: Final = f.GUEST_INTERRUPT_STATUS.encoding
_THRESHOLD: Final = f.TPR_THRESHOLD.encoding
_EOI_EXITS: Final = tuple(
    each.encoding for each in (f.EOI_EXIT_BITMAP_0, f.EOI_EXIT_BITMAP_1, f.EOI_EXIT_BITMAP_2, f.EOI_EXIT_BITMAP_3)
)
_CLASS: Final = apic_page.PRIORITY_CLASS

# Bits of VICR_LO that must be 0 for a self-IPI (reserved ones, delivery status, level trigger, a delivery mode other
# than fixed), and the destination shorthand that must be "self".
_ICR_ZERO: Final = 0xFFF3_0000 | 1 << 15 | 1 << 13 | 1 << 12 | 7 << 8
_ICR_SHORTHAND: Final = 3 << 18
_ICR_SELF: Final = 1 << 18


class VirtualApic(ApicPage):
    """The virtual-APIC page of a guest whose ``view`` has "use TPR shadow".

    ``pending`` says whether a pending virtual interrupt is recognized. Methods that return a `VmExit` return the
    trap-like exit that follows, or None.
    """

    def __init__(self, memory: PhysicalMemory, vmcs: Vmcs, view: ControlView) -> None:
        super().__init__(memory, vmcs[f.VIRTUAL_APIC_ADDRESS])
        self.vmcs = vmcs
        self.interrupt_delivery = bool(view.secondary & c.VIRTUAL_INTERRUPT_DELIVERY.mask)
        self.register_virtualization = bool(view.secondary & c.APIC_REGISTER_VIRTUALIZATION.mask)
        self.ipi_virtualization = bool(view.tertiary & c.IPI_VIRTUALIZATION.mask)
        self.pending = False
        self._checks_threshold = bool(view.secondary & c.VIRTUALIZE_APIC_ACCESSES.mask) and not self.interrupt_delivery
        self._window_exiting = bool(view.primary & c.INTERRUPT_WINDOW_EXITING.mask)

    # Virtual registers

    @property
    def requesting(self) -> int:
        """RVI: the highest vector requested, 0 without one."""
        return self.vmcs.values[_STATUS] & 0xFF

    @requesting.setter
    def requesting(self, vector: int) -> None:
        self.vmcs[f.GUEST_INTERRUPT_STATUS] = self.vmcs.values[_STATUS] & 0xFF00 | vector

    @property
    def servicing(self) -> int:
        """SVI: the highest vector in service, 0 without one."""
        return self.vmcs.values[_STATUS] >> 8

    @servicing.setter
    def servicing(self, vector: int) -> None:
        self.vmcs[f.GUEST_INTERRUPT_STATUS] = self.vmcs.values[_STATUS] & 0xFF | vector << 8

    # What the guest's accesses lead to

    def enter(self) -> VmExit | None:
        """VM entry: look at what software left in the page; the exit due at once if the TPR is below its threshold.

        Spec: "Evaluation of Pending Virtual Interrupts"; "VM Entries", "VM Exits Induced by the TPR Threshold".
        """
        self.pending = False
        if self.interrupt_delivery:
            self._virtualize_ppr()
            self._evaluate()
        return self._below_threshold() if self._checks_threshold else None

    def task_priority_written(self) -> VmExit | None:
        """TPR virtualization, after a write to VTPR."""
        if not self.interrupt_delivery:
            return self._below_threshold()
        self._virtualize_ppr()
        self._evaluate()
        return None

    def _below_threshold(self) -> VmExit | None:
        if self.read(VTPR, 1) >> 4 < self.vmcs.values[_THRESHOLD] & 0xF:
            return VmExit(Reason.TPR_BELOW_THRESHOLD)
        return None

    def _virtualize_ppr(self) -> None:
        """PPR virtualization."""
        self.write(VPPR, apic_page.priority(self.read(VTPR, 1), self.servicing))

    def end_of_interrupt(self) -> VmExit | None:
        """EOI virtualization."""
        vector = self.servicing
        self.servicing = self.clear(VISR, vector)
        self._virtualize_ppr()
        if self.vmcs.values[_EOI_EXITS[vector >> 6]] >> (vector & 63) & 1:
            return VmExit(Reason.VIRTUALIZED_EOI, vector)
        self._evaluate()
        return None

    def self_ipi(self, vector: int) -> None:
        """Self-IPI virtualization."""
        self.set(VIRR, vector)
        self.requesting = max(self.requesting, vector)
        self._evaluate()

    def register_written(self, offset: int) -> VmExit | None:
        """APIC-write emulation, after a virtualized write to ``offset`` of the APIC-access page.

        Spec: "APIC-Write Emulation".
        """
        register = offset & ~3
        if register == VTPR:
            self.write(VTPR, self.read(VTPR, 1))
            return self.task_priority_written()
        if register == VICR_HIGH:
            self.write(VICR_HIGH, self.read(VICR_HIGH) & 0xFF00_0000)
            return None
        if self.interrupt_delivery and register == VEOI:
            self.write(VEOI, 0)
            return self.end_of_interrupt()
        if self.interrupt_delivery and register == VICR_LOW:
            command = self.read(VICR_LOW)
            if not command & _ICR_ZERO and command & _ICR_SHORTHAND == _ICR_SELF and command & _CLASS:
                self.self_ipi(command & 0xFF)
                return None
        return VmExit(Reason.APIC_WRITE, offset)

    # Virtual interrupts

    def _evaluate(self) -> None:
        """Recognize a pending virtual interrupt, or cease to ("Evaluation of Pending Virtual Interrupts")."""
        self.pending = not self._window_exiting and self.requesting & _CLASS > self.read(VPPR, 1) & _CLASS

    def deliver(self) -> Event:
        """Virtual-interrupt delivery: move the pending interrupt into service; the event to deliver."""
        vector = self.requesting
        self.set(VISR, vector)
        self.servicing = vector
        self.write(VPPR, vector & _CLASS)
        self.requesting = self.clear(VIRR, vector)
        self.pending = False
        return Event(vector, EventKind.EXTERNAL_INTERRUPT)

    def dismiss(self) -> None:
        """End service of the interrupt just delivered, a user-interrupt notification, as no write of software does."""
        self.servicing = self.clear(VISR, self.servicing)
        self._virtualize_ppr()
        self._evaluate()

    def post(self, requests: int) -> None:
        """Request the interrupts whose vectors are set in ``requests`` (256 bits), as posted interrupts do."""
        for number in range(8):
            address = self.page + VIRR + (number << 4)
            word = requests >> (number << 5) & 0xFFFF_FFFF
            if word:
                self.memory.write_u32(address, self.memory.read_u32(address) | word)
        if requests:
            self.requesting = max(self.requesting, requests.bit_length() - 1)
        self._evaluate()
