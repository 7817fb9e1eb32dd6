"""The interconnect between local APICs and I/O APICs: finds the targets of a message.

Threats: a message reaches each target at most once, in the order the APICs were attached; lowest-priority arbitration
is deterministic (lowest processor priority, then lowest APIC ID).

Spec: SDM Vol. 3, "Determining IPI Destination", "Lowest Priority Delivery Mode".
"""

from __future__ import annotations

from collections.abc import Callable

from vtx.devices.apic_registers import DeliveryMode, InterruptMessage, Shorthand
from vtx.devices.local_apic import LocalApic


class InterruptBus:
    """Connects what is attached.

    ``eoi_listeners`` (I/O APICs) are called with each broadcast EOI's vector, ``dropped`` when an APIC was reset.
    """

    def __init__(self, dropped: Callable[[], None] = lambda: None) -> None:
        self._dropped = dropped
        self.apics: list[LocalApic] = []
        self.eoi_listeners: list[Callable[[int], None]] = []

    def attach(self, apic: LocalApic) -> None:
        """Make ``apic`` reachable."""
        self.apics.append(apic)

    def send_ipi(self, message: InterruptMessage) -> bool:
        """Deliver ``message`` to every APIC it addresses, or to one of them in lowest-priority mode.

        Whether one of them accepted it.
        """
        targets = [apic for apic in self.apics if self._is_target(apic, message)]
        if message.delivery_mode is DeliveryMode.LOWEST_PRIORITY and targets:
            able = [apic for apic in targets if apic.software_enabled] or targets
            targets = [min(able, key=lambda apic: (apic.processor_priority(), apic.profile.apic_id))]
        accepted = [apic.receive(message) for apic in targets]
        return any(accepted)

    def is_requested(self, message: InterruptMessage) -> bool:
        """Whether all whom a fixed ``message`` addresses have its vector requested: sending it would change nothing."""
        targets = [apic for apic in self.apics if self._is_target(apic, message)]
        return bool(targets) and all(apic.state.irr >> message.vector & 1 for apic in targets)

    def requests_dropped(self) -> None:
        """A local APIC was reset."""
        self._dropped()

    def broadcast_eoi(self, vector: int) -> None:
        """Tell every I/O APIC that service of ``vector`` ended."""
        for listener in self.eoi_listeners:
            listener(vector)

    @staticmethod
    def _is_target(apic: LocalApic, message: InterruptMessage) -> bool:
        match message.shorthand:
            case Shorthand.NONE:
                return apic.is_addressed(message.destination, message.logical)
            case Shorthand.SELF:
                return apic.profile.apic_id == message.source
            case Shorthand.ALL_INCLUDING_SELF:
                return apic.enabled
        return apic.enabled and apic.profile.apic_id != message.source
