"""Interprocessor interrupts between several local APICs."""

import pytest
from apic_machine import DFR, ESR, ICR_HIGH, ICR_LOW, ID, IRR, LDR, SELF_IPI, SVR, TPR, Machine

LOGICAL = 1 << 11
SELF, ALL, OTHERS = 1 << 18, 2 << 18, 3 << 18


def send(machine: Machine, command: int, destination: int = 0) -> None:
    """Issue an IPI from processor 0 in whichever mode its APIC is."""
    if machine.apic.x2apic_mode:
        assert machine.apic.msr_write(0x830, destination << 32 | command)
    else:
        machine.write(ICR_HIGH, destination << 24)
        machine.write(ICR_LOW, command)


def receivers(machine: Machine, vector: int = 0x31) -> list[int]:
    return [number for number, apic in enumerate(machine.apics) if apic.state.irr == 1 << vector]


@pytest.mark.parametrize("x2apic", [False, True])
@pytest.mark.parametrize(("shorthand", "expected"), [(SELF, [0]), (ALL, [0, 1, 2, 3]), (OTHERS, [1, 2, 3])])
def test_shorthands(x2apic: bool, shorthand: int, expected: list[int]) -> None:
    machine = Machine(4)
    if x2apic:
        machine.enter_x2apic()
    send(machine, shorthand | 0x31)
    assert receivers(machine) == expected


@pytest.mark.parametrize("x2apic", [False, True])
@pytest.mark.parametrize("destination", [0, 2, 9])
def test_physical_destination(x2apic: bool, destination: int) -> None:
    machine = Machine(4)
    if x2apic:
        machine.enter_x2apic()
    send(machine, 0x31, destination)
    assert receivers(machine) == ([destination] if destination < 4 else [])


@pytest.mark.parametrize(("x2apic", "destination"), [(False, 0xFF), (True, 0xFFFF_FFFF)])
def test_broadcast(x2apic: bool, destination: int) -> None:
    machine = Machine(3)
    if x2apic:
        machine.enter_x2apic()
    send(machine, 0x31, destination)
    assert receivers(machine) == [0, 1, 2]


def test_xapic_broadcast_reaches_an_x2apic() -> None:
    machine = Machine(2)
    assert machine.apics[1].apic_base_write(machine.apics[1].state.apic_base | 1 << 10)
    send(machine, 0x31, 0xFF)
    assert receivers(machine) == [0, 1]


def test_xapic_id_written_by_software_is_the_destination() -> None:
    machine = Machine(2)
    machine.apics[1].mmio_write(ID, 4, 0x77 << 24)
    send(machine, 0x31, 0x77)
    assert receivers(machine) == [1]


@pytest.mark.parametrize(
    ("destination", "expected"), [(0x01, [0]), (0x30, [1, 2]), (0x21, [0, 2]), (0xFF, [0, 1, 2]), (0x80, [])]
)
def test_logical_flat(destination: int, expected: list[int]) -> None:
    machine = Machine(3)
    for apic, logical in zip(machine.apics, (0x01, 0x10, 0x20), strict=True):
        apic.mmio_write(LDR, 4, logical << 24)
    send(machine, LOGICAL | 0x31, destination)
    assert receivers(machine) == expected


@pytest.mark.parametrize(
    ("destination", "expected"), [(0x11, [0]), (0x13, [0, 1]), (0x21, [2]), (0xF1, [0, 2]), (0x31, []), (0x20, [])]
)
def test_logical_cluster(destination: int, expected: list[int]) -> None:
    machine = Machine(3)
    for apic, logical in zip(machine.apics, (0x11, 0x12, 0x21), strict=True):
        apic.mmio_write(DFR, 4, 0)
        apic.mmio_write(LDR, 4, logical << 24)
    send(machine, LOGICAL | 0x31, destination)
    assert receivers(machine) == expected


@pytest.mark.parametrize(
    ("destination", "expected"), [(0x0000_0003, [0, 1]), (0x0001_0001, [16]), (0x0001_0003, [16, 17])]
)
def test_logical_x2apic(destination: int, expected: list[int]) -> None:
    machine = Machine(18)
    machine.enter_x2apic()
    send(machine, LOGICAL | 0x31, destination)
    assert receivers(machine) == expected


@pytest.mark.parametrize(
    ("command", "event"),
    [
        (0x4200, "smi"),
        (0x4400, "nmi"),
        (0x4500, "init"),
        (0xC500, "init"),
        (0x0500, "init"),
        (0x4612, ("start-up", 0x12)),
    ],
)
def test_delivery_modes(command: int, event: object) -> None:
    machine = Machine(2)
    send(machine, command, 1)
    assert machine.pins[1].events == [event]
    assert machine.pins[0].events == []


def test_nmi_to_self_by_shorthand() -> None:
    machine = Machine(2)
    send(machine, SELF | 0x4400)
    assert machine.pins[0].events == ["nmi"]


@pytest.mark.parametrize("command", [0x8500, 0x4300, 0x4700])
def test_nothing_is_sent(command: int) -> None:
    machine = Machine(2)
    send(machine, command, 1)
    assert machine.pins[1].events == []
    assert machine.apics[1].state.irr == 0
    assert not machine.apics[1].external_interrupt_pending()


@pytest.mark.parametrize("command", [0x000F, SELF | 0x0000, 0x0105])
def test_illegal_vector_sent(command: int) -> None:
    machine = Machine(2)
    send(machine, command, 1)
    machine.write(ESR, 0)
    assert machine.read(ESR) == 0x20
    machine.apics[1].mmio_write(ESR, 4, 0)
    assert machine.apics[1].mmio_read(ESR, 4) == 0


def test_lowest_legal_vector() -> None:
    machine = Machine(2)
    send(machine, 0x0010, 1)
    assert receivers(machine, 0x10) == [1]


def test_self_ipi_register() -> None:
    machine = Machine(2)
    machine.enter_x2apic()
    assert machine.apic.msr_write(0x800 + (SELF_IPI >> 4), 0x31)
    assert receivers(machine) == [0]
    assert machine.serve() == 0x31
    assert machine.apic.msr_write(0x83F, 0x0F)
    machine.apic.msr_write(0x828, 0)
    assert machine.apic.msr_read(0x828) == 0x20


def test_ipis_are_edge_triggered_whatever_the_level_bits() -> None:
    machine = Machine(2)
    send(machine, 0x8031, 1)
    assert machine.apics[1].state.tmr == 0
    assert machine.apics[1].mmio_read(IRR + 0x10, 4) == 1 << 0x11


def test_lowest_priority_picks_the_least_busy_then_the_lowest_id() -> None:
    machine = Machine(4)
    machine.apics[0].mmio_write(TPR, 4, 0x40)
    machine.apics[1].mmio_write(TPR, 4, 0x20)
    machine.apics[2].mmio_write(TPR, 4, 0x20)
    machine.apics[3].mmio_write(SVR, 4, 0xFF)
    send(machine, 0x0131, 0xFF)
    assert receivers(machine) == [1]


def test_disabled_apic_is_out_of_reach() -> None:
    machine = Machine(2)
    assert machine.apics[1].apic_base_write(0xFEE0_0000)
    send(machine, 0x4500, 1)
    send(machine, OTHERS | 0x4400)
    assert machine.pins[1].events == []


def test_software_disabled_apic_still_takes_init_and_start_up() -> None:
    machine = Machine(2)
    machine.apics[1].mmio_write(SVR, 4, 0xFF)
    send(machine, 0x4500, 1)
    send(machine, 0x4608, 1)
    send(machine, 0x0031, 1)
    assert machine.pins[1].events == ["init", ("start-up", 8)]
    assert machine.apics[1].state.irr == 0
