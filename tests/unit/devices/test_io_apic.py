"""The I/O APIC with local APICs behind it; register numbers and bits are typed from the data sheet."""

import pytest
from apic_machine import EOI, IRR, ISR, SVR, TMR, Machine

from vtx.devices.apic_registers import DeliveryMode, InterruptMessage
from vtx.devices.io_apic import IoApic

LOGICAL, REMOTE_IRR, LEVEL, MASKED = 1 << 11, 1 << 14, 1 << 15, 1 << 16


class Pc:
    """One I/O APIC in front of ``count`` local APICs."""

    def __init__(self, count: int = 1) -> None:
        self.machine = Machine(count)
        self.io_apic = IoApic(self.machine.bus, identity=5)
        self.machine.bus.eoi_listeners.append(self.io_apic.end_of_interrupt)

    def read(self, register: int) -> int:
        self.io_apic.mmio_write(0x00, 4, register)
        return self.io_apic.mmio_read(0x10, 4)

    def write(self, register: int, value: int) -> None:
        self.io_apic.mmio_write(0x00, 4, register)
        self.io_apic.mmio_write(0x10, 4, value)

    def redirect(self, pin: int, low: int, destination: int = 0) -> None:
        self.write(0x11 + 2 * pin, destination << 24)
        self.write(0x10 + 2 * pin, low)

    def pulse(self, pin: int) -> None:
        self.io_apic.set_pin(pin, True)
        self.io_apic.set_pin(pin, False)

    def requested(self, cpu: int = 0) -> list[int]:
        return [vector for vector in range(256) if self.machine.apics[cpu].state.irr >> vector & 1]

    def remote_irr(self, pin: int) -> bool:
        return bool(self.read(0x10 + 2 * pin) & REMOTE_IRR)


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_identification(pc: Pc) -> None:
    assert pc.read(0) == 0x0500_0000
    assert pc.read(1) == 0x0017_0020
    pc.write(0, 0xFFFF_FFFF)
    assert pc.read(0) == pc.read(2) == 0x0F00_0000
    pc.write(1, 0)
    pc.write(2, 0)
    assert pc.read(1) == 0x0017_0020
    assert pc.read(2) == 0x0F00_0000


def test_entries_reset_masked_and_keep_read_only_bits(pc: Pc) -> None:
    assert all(pc.read(0x10 + 2 * pin) == MASKED for pin in range(24))
    pc.write(0x10, 0xFFFF_FFFF)
    assert pc.read(0x10) == 0x0001_AFFF
    pc.write(0x11, 0xFFFF_FFFF)
    assert pc.read(0x11) == 0xFF00_0000
    assert pc.read(0x10) == 0x0001_AFFF


def test_registers_that_do_not_exist(pc: Pc) -> None:
    for register in (3, 0xF, 0x40, 0xFF):
        pc.write(register, 0xFFFF_FFFF)
        assert pc.read(register) == 0
    assert pc.io_apic.mmio_read(0x20, 4) == 0


def test_select_register_is_read_back(pc: Pc) -> None:
    pc.io_apic.mmio_write(0, 4, 0xFFFF_FF12)
    assert pc.io_apic.mmio_read(0, 4) == 0x12
    assert pc.io_apic.mmio_read(0, 1) == 0x12


def test_narrow_access_to_the_window(pc: Pc) -> None:
    pc.write(0x11, 0x0300_0000)
    pc.io_apic.mmio_write(0x10, 1, 0x77)
    assert [pc.io_apic.mmio_read(0x10 + lane, 1) for lane in range(4)] == [0, 0, 0, 3]
    assert pc.io_apic.mmio_read(0x12, 2) == 0x0300
    assert pc.read(0x11) == 0x0300_0000


def test_edge_is_sent_once(pc: Pc) -> None:
    pc.redirect(4, 0x31)
    pc.io_apic.set_pin(4, True)
    pc.io_apic.set_pin(4, True)
    assert pc.requested() == [0x31]
    assert pc.machine.serve() == 0x31
    pc.io_apic.set_pin(4, True)
    assert pc.requested() == []
    pc.io_apic.set_pin(4, False)
    assert pc.requested() == []
    pc.io_apic.set_pin(4, True)
    assert pc.requested() == [0x31]
    assert not pc.remote_irr(4)


def test_edge_on_a_masked_pin_is_lost(pc: Pc) -> None:
    pc.redirect(4, 0x31 | MASKED)
    pc.io_apic.set_pin(4, True)
    pc.redirect(4, 0x31)
    assert pc.requested() == []


def test_level_waits_for_its_eoi(pc: Pc) -> None:
    pc.redirect(9, 0x41 | LEVEL)
    pc.io_apic.set_pin(9, True)
    assert pc.requested() == [0x41]
    assert pc.remote_irr(9)
    assert pc.machine.read(TMR + 0x20) == 1 << 1
    assert pc.machine.apic.acknowledge() == 0x41
    pc.pulse(9)
    assert pc.requested() == []
    pc.io_apic.set_pin(9, True)
    pc.machine.write(EOI, 0)
    assert pc.requested() == [0x41]
    pc.machine.apic.acknowledge()
    pc.io_apic.set_pin(9, False)
    pc.machine.write(EOI, 0)
    assert pc.requested() == []
    assert not pc.remote_irr(9)


def test_level_on_a_masked_pin_is_sent_when_unmasked(pc: Pc) -> None:
    pc.redirect(9, 0x41 | LEVEL | MASKED)
    pc.io_apic.set_pin(9, True)
    assert pc.requested() == []
    pc.redirect(9, 0x41 | LEVEL)
    assert pc.requested() == [0x41]


def test_eoi_ends_every_pin_with_the_vector(pc: Pc) -> None:
    for pin in (9, 10):
        pc.redirect(pin, 0x41 | LEVEL)
        pc.pulse(pin)
    pc.redirect(11, 0x51 | LEVEL)
    pc.pulse(11)
    assert pc.machine.serve() == 0x51
    assert [pc.remote_irr(pin) for pin in (9, 10, 11)] == [True, True, False]
    assert pc.machine.serve() == 0x41
    assert [pc.remote_irr(pin) for pin in (9, 10, 11)] == [False, False, False]


def test_eoi_register(pc: Pc) -> None:
    pc.machine.write(SVR, 0x11FF)  # software suppresses the broadcast
    pc.redirect(9, 0x41 | LEVEL)
    pc.pulse(9)
    assert pc.machine.serve() == 0x41
    assert pc.remote_irr(9)
    pc.io_apic.mmio_write(0x40, 4, 0x42)
    pc.io_apic.mmio_write(0x20, 4, 0x41)
    pc.io_apic.mmio_write(0x44, 4, 0x41)
    assert pc.remote_irr(9)
    pc.io_apic.mmio_write(0x40, 4, 0x41)
    assert not pc.remote_irr(9)


def test_edge_trigger_clears_remote_irr(pc: Pc) -> None:
    pc.redirect(9, 0x41 | LEVEL)
    pc.pulse(9)
    pc.write(0x10 + 18, 0x41 | MASKED)
    assert not pc.remote_irr(9)


def test_nobody_accepts_so_it_is_sent_again(pc: Pc) -> None:
    pc.machine.write(SVR, 0xFF)
    pc.redirect(9, 0x41 | LEVEL)
    pc.io_apic.set_pin(9, True)
    assert not pc.remote_irr(9)
    pc.machine.write(SVR, 0x1FF)
    pc.io_apic.set_pin(9, True)
    assert pc.requested() == [0x41]
    assert pc.remote_irr(9)


@pytest.mark.parametrize(("destination", "receivers"), [(0, [0]), (2, [2]), (0xFF, [0, 1, 2]), (7, [])])
def test_physical_destination(destination: int, receivers: list[int]) -> None:
    pc = Pc(3)
    pc.redirect(3, 0x31, destination)
    pc.pulse(3)
    assert [cpu for cpu in range(3) if pc.requested(cpu)] == receivers


def test_logical_destination() -> None:
    pc = Pc(3)
    for cpu, apic in enumerate(pc.machine.apics):
        apic.mmio_write(0xD0, 4, 1 << 24 + cpu)
    pc.redirect(3, 0x31 | LOGICAL, 0b101)
    pc.pulse(3)
    assert [cpu for cpu in range(3) if pc.requested(cpu)] == [0, 2]


def test_lowest_priority_chooses_one() -> None:
    pc = Pc(3)
    pc.machine.apics[0].cr8 = 4
    pc.redirect(3, 0x31 | 1 << 8, 0xFF)
    pc.pulse(3)
    assert [cpu for cpu in range(3) if pc.requested(cpu)] == [1]


@pytest.mark.parametrize(("mode", "event"), [(2, "smi"), (4, "nmi"), (5, "init")])
def test_delivery_modes_without_vector(pc: Pc, mode: int, event: str) -> None:
    pc.redirect(3, mode << 8 | LEVEL)
    pc.pulse(3)
    assert pc.machine.pins[0].events == [event]
    assert not pc.remote_irr(3)


def test_external_interrupt(pc: Pc) -> None:
    pc.redirect(0, 7 << 8)
    assert not pc.machine.apic.external_interrupt_pending()
    pc.pulse(0)
    assert pc.machine.apic.external_interrupt_pending()


@pytest.mark.parametrize("mode", [3, 6])
def test_reserved_delivery_modes_send_nothing(pc: Pc, mode: int) -> None:
    pc.redirect(3, mode << 8 | 0x31)
    pc.pulse(3)
    assert pc.machine.pins[0].events == []
    assert pc.requested() == []


def test_tells_whether_another_request_would_change_anything() -> None:
    pc = Pc(2)
    pc.redirect(3, 0x31, 0xFF)
    assert not pc.io_apic.is_requested(3)
    pc.pulse(3)
    assert pc.io_apic.is_requested(3)
    pc.machine.serve()
    assert not pc.io_apic.is_requested(3)
    pc.redirect(3, 4 << 8 | 0x31, 1)  # an NMI is not held back
    assert not pc.io_apic.is_requested(3)
    pc.redirect(3, 0x41 | LEVEL)
    pc.pulse(3)
    pc.machine.apic.acknowledge()
    assert pc.io_apic.is_requested(3)  # remote IRR
    pc.redirect(3, 0x41, 9)
    assert not pc.io_apic.is_requested(3)


def test_messages_name_no_sender() -> None:
    sent: list[InterruptMessage] = []

    class Bus:
        def send_ipi(self, message: InterruptMessage) -> bool:
            sent.append(message)
            return True

        def is_requested(self, message: InterruptMessage) -> bool:
            return False

    io_apic = IoApic(Bus())
    io_apic.mmio_write(0, 4, 0x10)
    io_apic.mmio_write(0x10, 4, 0x31 | LEVEL)
    io_apic.line(0)(True)
    assert sent == [InterruptMessage(DeliveryMode.FIXED, 0x31, 0, level_triggered=True)]


def test_isr_takes_part(pc: Pc) -> None:
    pc.redirect(9, 0x41 | LEVEL)
    pc.io_apic.set_pin(9, True)
    pc.machine.apic.acknowledge()
    assert pc.machine.read(ISR + 0x20) == 1 << 1
    assert pc.machine.read(IRR + 0x20) == 0
