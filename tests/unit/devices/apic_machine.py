"""Local APICs on one bus with recording processors, for the tests of this folder."""

from vtx.devices.apic_bus import InterruptBus
from vtx.devices.clock import ManualClock
from vtx.devices.local_apic import ApicProfile, LocalApic

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x020, 0x030, 0x080, 0x0A0, 0x0B0, 0x0D0, 0x0E0, 0x0F0
ISR, TMR, IRR, ESR = 0x100, 0x180, 0x200, 0x280
CMCI, ICR_LOW, ICR_HIGH = 0x2F0, 0x300, 0x310
TIMER, THERMAL, PERFORMANCE, LINT0, LINT1, ERROR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
INITIAL_COUNT, CURRENT_COUNT, DIVIDE, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0

BSP, EXTD, EN = 1 << 8, 1 << 10, 1 << 11
BASE = 0xFEE0_0000
MASKED = 1 << 16


class RecordingPins:
    """A processor that writes down what its local APIC asks."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.moves = self.requests = 0

    def nmi(self) -> None:
        self.events.append("nmi")

    def smi(self) -> None:
        self.events.append("smi")

    def init(self) -> None:
        self.events.append("init")

    def interrupt_requested(self) -> None:
        self.requests += 1

    def local_apic_moved(self) -> None:
        self.moves += 1

    def start_up(self, vector: int) -> None:
        self.events.append(("start-up", vector))


class Machine:
    """``count`` processors with APIC IDs 0, 1, 2 ...; all software-enabled unless told otherwise."""

    def __init__(self, count: int = 1, *, enable: bool = True, **profile: object) -> None:
        self.clock = ManualClock()
        self.bus = InterruptBus()
        self.eois: list[int] = []
        self.bus.eoi_listeners.append(self.eois.append)
        self.pins = [RecordingPins() for _ in range(count)]
        self.apics = []
        for number in range(count):
            apic_profile = ApicProfile(apic_id=number, bootstrap=number == 0, **profile)  # type: ignore[arg-type]
            apic = LocalApic(apic_profile, self.clock, self.bus, self.pins[number])
            self.bus.attach(apic)
            self.apics.append(apic)
            if enable:
                apic.mmio_write(SVR, 4, 0x1FF)

    @property
    def apic(self) -> LocalApic:
        return self.apics[0]

    def read(self, offset: int) -> int:
        return self.apic.mmio_read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.apic.mmio_write(offset, 4, value)

    def enter_x2apic(self) -> None:
        for apic in self.apics:
            assert apic.apic_base_write(apic.state.apic_base | EXTD)

    def wait(self, ticks: int) -> None:
        self.clock.ticks += ticks
        for apic in self.apics:
            apic.advance(self.clock.ticks)

    def serve(self) -> int:
        """Take the pending interrupt and end it; its vector."""
        vector = self.apic.acknowledge()
        self.apic.end_of_interrupt()
        return vector
