"""The local APIC as software and the processor see it; numbers typed from SDM Vol. 3, not taken from the device."""

import pytest
from apic_machine import (
    BASE,
    BSP,
    CMCI,
    DFR,
    EN,
    EOI,
    ERROR,
    ESR,
    EXTD,
    ICR_HIGH,
    ICR_LOW,
    ID,
    INITIAL_COUNT,
    IRR,
    ISR,
    LDR,
    LINT0,
    LINT1,
    MASKED,
    PERFORMANCE,
    PPR,
    SVR,
    THERMAL,
    TIMER,
    TMR,
    TPR,
    VERSION,
    Machine,
)
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from vtx.devices.apic_registers import DeliveryMode, InterruptMessage, Register

LVTS = (CMCI, TIMER, THERMAL, PERFORMANCE, LINT0, LINT1, ERROR)


@pytest.fixture
def machine() -> Machine:
    return Machine()


# --- Reset state and registers ---


def test_power_up_state() -> None:
    machine = Machine(enable=False)
    assert machine.apic.state.apic_base == BASE | BSP | EN
    assert [machine.read(offset) for offset in LVTS] == [MASKED] * 7
    assert machine.read(SVR) == 0xFF
    assert machine.read(DFR) == 0xFFFF_FFFF
    for offset in (ID, TPR, PPR, LDR, ESR, ICR_LOW, ICR_HIGH, INITIAL_COUNT, 0x390, 0x3E0):
        assert machine.read(offset) == 0
    for offset in (ISR, TMR, IRR):
        assert [machine.read(offset + 16 * index) for index in range(8)] == [0] * 8


def test_version_counts_lvt_entries() -> None:
    assert Machine().read(VERSION) == 0x0106_0015
    assert Machine(cmci=False).read(VERSION) == 0x0105_0015


@pytest.mark.parametrize(
    ("offset", "read"),
    [
        (TPR, 0xFF),
        (LDR, 0xFF00_0000),
        (DFR, 0xFFFF_FFFF),
        (SVR, 0x13FF),
        (CMCI, 0x1_07FF),
        (TIMER, 0x7_00FF),
        (THERMAL, 0x1_07FF),
        (PERFORMANCE, 0x1_07FF),
        (LINT0, 0x1_A7FF),
        (LINT1, 0x1_A7FF),
        (ERROR, 0x1_00FF),
        (ICR_HIGH, 0xFF00_0000),
        (0x3E0, 0xB),
        (VERSION, 0x0106_0015),
    ],
)
def test_xapic_write_drops_reserved_bits(machine: Machine, offset: int, read: int) -> None:
    machine.write(offset, 0xFFFF_FFFF)
    assert machine.read(offset) == read


def test_page_answers_partial_reads_and_ignores_odd_writes(machine: Machine) -> None:
    machine.write(LDR, 0xAB00_0000)
    assert machine.apic.mmio_read(LDR + 3, 1) == 0xAB
    assert machine.apic.mmio_read(LDR, 8) == 0xAB00_0000
    assert machine.apic.mmio_read(LDR + 4, 4) == 0
    machine.apic.mmio_write(LDR, 1, 0)
    machine.apic.mmio_write(LDR + 4, 4, 0)
    machine.apic.mmio_write(LDR, 8, 0)
    assert machine.read(LDR) == 0xAB00_0000


@pytest.mark.parametrize("offset", [0x000, 0x040, 0x290, 0x3A0, 0x3F0, 0xFF0])
def test_reserved_address_is_an_error(machine: Machine, offset: int) -> None:
    assert machine.read(offset) == 0
    assert machine.read(ESR) == 0
    machine.write(ESR, 0)
    assert machine.read(ESR) == 0x80
    machine.write(ESR, 0)
    assert machine.read(ESR) == 0


def test_absent_cmci_register_is_reserved() -> None:
    machine = Machine(cmci=False)
    machine.write(CMCI, 0)
    machine.write(ESR, 0)
    assert machine.read(ESR) == 0x80


def test_software_disable_masks_the_lvt_for_good(machine: Machine) -> None:
    machine.write(TIMER, 0x40)
    machine.write(SVR, 0xFF)
    assert machine.read(TIMER) == MASKED | 0x40
    machine.write(TIMER, 0x41)
    assert machine.read(TIMER) == MASKED | 0x41
    machine.write(SVR, 0x1FF)
    machine.write(TIMER, 0x42)
    assert machine.read(TIMER) == 0x42


def test_software_disabled_apic_accepts_nothing_but_keeps_what_it_has(machine: Machine) -> None:
    machine.apic.accept_interrupt(0x50, False)
    machine.write(SVR, 0xFF)
    assert not machine.apic.accept_interrupt(0x60, False)
    assert machine.apic.pending_vector() == 0x50


def test_write_only_register_reads_as_zero(machine: Machine) -> None:
    assert machine.read(EOI) == 0
    machine.write(ESR, 0)
    assert machine.read(ESR) == 0


def test_xapic_id_is_the_low_byte_of_a_wide_id() -> None:
    machine = Machine()
    machine.apic.profile = evolve(machine.apic.profile, apic_id=0x123)
    machine.apic.reset()
    assert machine.read(ID) == 0x23 << 24
    machine.write(ID, 0x55 << 24)
    assert machine.apic.apic_base_write(BASE)
    assert machine.apic.apic_base_write(BASE | EN)
    assert machine.read(ID) == 0x23 << 24


@pytest.mark.parametrize("number", [0, 1])
def test_reset_restores_power_up(number: int) -> None:
    machine = Machine(2)
    apic = machine.apics[number]
    assert apic.apic_base_write(0xFED4_0000 | EN)
    apic.accept_interrupt(0x50, False)
    apic.cr8 = 7
    apic.mmio_write(ID, 4, 0x55 << 24)
    apic.reset()
    assert apic.state.apic_base == BASE | EN | (0 if number else BSP)
    assert apic.apic_id == number
    assert (apic.cr8, apic.pending_vector(), apic.software_enabled) == (0, None, False)


# --- Priorities, acceptance, EOI ---


def test_one_interrupt_from_request_to_eoi(machine: Machine) -> None:
    assert machine.apic.accept_interrupt(0x41, False)
    assert machine.read(IRR + 0x20) == 0x2
    assert machine.apic.pending_vector() == 0x41
    assert machine.apic.acknowledge() == 0x41
    assert machine.read(IRR + 0x20) == 0
    assert machine.read(ISR + 0x20) == 0x2
    assert machine.read(PPR) == 0x40
    machine.write(EOI, 0)
    assert machine.read(ISR + 0x20) == 0
    assert machine.read(PPR) == 0


def test_acknowledge_without_a_request_is_spurious(machine: Machine) -> None:
    machine.write(SVR, 0x1E7)
    assert machine.apic.acknowledge() == 0xE7
    assert machine.apic.state.isr == 0


@given(requested=st.sets(st.integers(16, 255)), in_service=st.sets(st.integers(16, 255)), task=st.integers(0, 255))
def test_priority_rules(requested: set[int], in_service: set[int], task: int) -> None:
    machine = Machine()
    for vector in requested:
        machine.apic.accept_interrupt(vector, False)
    machine.apic.state.isr = sum(1 << vector for vector in in_service)
    machine.write(TPR, task)
    service = max(in_service, default=0)
    priority_class = max(task >> 4, service >> 4)
    subclass = task & 0xF if task >> 4 >= service >> 4 else 0
    assert machine.read(PPR) == priority_class << 4 | subclass
    best = max(requested, default=0)
    assert machine.apic.pending_vector() == (best if best >> 4 > priority_class else None)


def test_cr8_is_the_class_of_tpr(machine: Machine) -> None:
    machine.write(TPR, 0x5A)
    assert machine.apic.cr8 == 5
    machine.apic.cr8 = 0xC
    assert machine.read(TPR) == 0xC0


def test_eoi_ends_the_highest_in_service(machine: Machine) -> None:
    machine.apic.accept_interrupt(0x31, False)
    machine.apic.acknowledge()
    machine.apic.accept_interrupt(0x81, False)
    machine.apic.acknowledge()
    machine.write(EOI, 0)
    assert machine.apic.state.isr == 1 << 0x31


def test_eoi_of_level_interrupt_is_broadcast(machine: Machine) -> None:
    machine.apic.accept_interrupt(0x31, True)
    assert machine.read(TMR + 0x10) == 1 << 0x11
    machine.apic.acknowledge()
    assert machine.apic.end_of_interrupt() == 0x31
    assert machine.eois == [0x31]


@pytest.mark.parametrize(("level", "svr"), [(False, 0x1FF), (True, 0x11FF)])
def test_eoi_is_not_broadcast(machine: Machine, level: bool, svr: int) -> None:
    machine.write(SVR, svr)
    machine.apic.accept_interrupt(0x31, level)
    machine.apic.acknowledge()
    assert machine.apic.end_of_interrupt() is None
    assert machine.eois == []


def test_edge_acceptance_clears_the_trigger_mode(machine: Machine) -> None:
    machine.apic.accept_interrupt(0x31, True)
    machine.apic.accept_interrupt(0x31, False)
    assert machine.read(TMR + 0x10) == 0


def test_eoi_with_nothing_in_service_does_nothing(machine: Machine) -> None:
    machine.write(EOI, 0)
    assert machine.eois == []


# --- Errors ---


@pytest.mark.parametrize("vector", [0, 15])
def test_illegal_vector_received(machine: Machine, vector: int) -> None:
    assert not machine.apic.accept_interrupt(vector, False)
    machine.write(ESR, 0)
    assert machine.read(ESR) == 0x40
    assert machine.apic.state.irr == 0


def test_error_interrupt_once_until_esr_is_written(machine: Machine) -> None:
    machine.write(ERROR, 0x77)
    machine.read(0x040)
    assert machine.serve() == 0x77
    machine.read(0x040)
    assert machine.apic.pending_vector() is None
    machine.write(ESR, 0)
    machine.read(0x040)
    assert machine.serve() == 0x77


def test_error_interrupt_with_illegal_vector_ends(machine: Machine) -> None:
    machine.write(ERROR, 0x03)
    machine.read(0x040)
    machine.write(ESR, 0)
    assert machine.read(ESR) == 0xC0


# --- IA32_APIC_BASE ---

MODES = {"disabled": 0, "xapic": EN, "invalid": EXTD, "x2apic": EN | EXTD}
LEGAL = {
    ("disabled", "disabled"),
    ("disabled", "xapic"),
    ("xapic", "disabled"),
    ("xapic", "xapic"),
    ("xapic", "x2apic"),
    ("x2apic", "x2apic"),
    ("x2apic", "disabled"),
}


@pytest.mark.parametrize("new", MODES)
@pytest.mark.parametrize("old", ["disabled", "xapic", "x2apic"])
def test_mode_transitions(machine: Machine, old: str, new: str) -> None:
    assert machine.apic.apic_base_write(BASE | MODES[old])
    assert machine.apic.apic_base_write(BASE | MODES[new]) == ((old, new) in LEGAL)
    expected = new if (old, new) in LEGAL else old
    assert machine.apic.state.apic_base == BASE | MODES[expected]


@pytest.mark.parametrize("bit", [0, 7, 9, 46, 51, 63])
def test_apic_base_reserved_bits(machine: Machine, bit: int) -> None:
    assert not machine.apic.apic_base_write(BASE | EN | 1 << bit)
    assert machine.apic.state.apic_base == BASE | BSP | EN


@pytest.mark.parametrize("reserved", [EXTD, 1, 1 << 9])
def test_apic_base_without_x2apic_reserves_extd(reserved: int) -> None:
    assert not Machine(x2apic=False).apic.apic_base_write(BASE | EN | reserved)


@pytest.mark.parametrize("address", [0xFED4_1000, 0x2000_0000_0000])
def test_relocation(machine: Machine, address: int) -> None:
    assert machine.apic.apic_base_write(address | EN)
    assert machine.apic.page_address == address
    assert machine.read(VERSION) == 0x0106_0015
    assert machine.pins[0].moves == 1


def test_moves_are_told(machine: Machine) -> None:
    """Of the page: its address, and whether it answers at all."""
    for value, moves in ((BASE | EN, 0), (BASE | EN | EXTD, 1), (BASE, 1), (0x1000, 1), (0x1000 | EN, 2)):
        assert machine.apic.apic_base_write(value)
        assert machine.pins[0].moves == moves
    machine.apic.init_reset()
    assert machine.pins[0].moves == 2
    machine.apic.reset()
    assert machine.pins[0].moves == 3


@pytest.mark.parametrize("via_x2apic", [False, True])
def test_survives_disable_and_enable(machine: Machine, via_x2apic: bool) -> None:
    machine.write(ID, 0x55 << 24)
    if via_x2apic:
        machine.enter_x2apic()
    machine.apic.accept_interrupt(0x50, False)
    assert machine.apic.apic_base_write(BASE)
    assert machine.apic.page_address is None
    assert machine.read(VERSION) == 0xFFFF_FFFF
    assert machine.apic.mmio_read(VERSION, 8) == (1 << 64) - 1
    assert machine.apic.pending_vector() is None
    machine.apic.cr8 = 3
    assert machine.apic.cr8 == 3
    machine.write(LDR, 0xFF00_0000)
    assert machine.apic.apic_base_write(BASE | EN)
    assert machine.read(VERSION) == 0x0106_0015
    assert machine.read(ID) == 0
    assert machine.read(LDR) == 0
    assert machine.read(SVR) == 0xFF
    machine.write(SVR, 0x1FF)
    assert machine.apic.accept_interrupt(0x60, False)
    assert machine.serve() == 0x60


def test_page_does_not_answer_in_x2apic_mode(machine: Machine) -> None:
    machine.enter_x2apic()
    assert machine.read(VERSION) == 0xFFFF_FFFF
    machine.write(TPR, 0x50)
    assert machine.apic.cr8 == 0


def test_init_keeps_mode_and_id(machine: Machine) -> None:
    machine.enter_x2apic()
    machine.apic.msr_write(0x808, 0x50)
    machine.apic.accept_interrupt(0x90, False)
    machine.apic.init_reset()
    assert machine.apic.x2apic_mode
    assert machine.apic.msr_read(0x808) == 0
    assert machine.apic.msr_read(0x80F) == 0xFF
    assert machine.apic.pending_vector() is None
    machine.apic.reset()
    assert machine.apic.state.apic_base == BASE | BSP | EN


# --- x2APIC MSRs ---

READ_ONLY = {0x802, 0x803, 0x80A, 0x80D, 0x839, *range(0x810, 0x828)}
WRITE_ONLY = {0x80B, 0x83F}
READ_WRITE = {0x808, 0x80F, 0x828, 0x82F, 0x830, *range(0x832, 0x839), 0x83E}


def test_x2apic_availability() -> None:
    machine = Machine()
    machine.enter_x2apic()
    indices = range(0x800, 0x900)
    assert {index for index in indices if machine.apic.msr_read(index) is not None} == READ_ONLY | READ_WRITE
    legal = {index: 0x20 if index == 0x83F else 0 for index in indices}
    assert {index for index in indices if machine.apic.msr_write(index, legal[index])} == WRITE_ONLY | READ_WRITE


@pytest.mark.parametrize("index", [0x802, 0x808, 0x830])
def test_msrs_fault_outside_x2apic_mode(machine: Machine, index: int) -> None:
    assert machine.apic.msr_read(index) is None
    assert not machine.apic.msr_write(index, 0)


WRITABLE = {
    0x808: 0xFF,
    0x80B: 0,
    0x80F: 0x13FF,
    0x828: 0,
    0x82F: 0x1_17FF,
    0x832: 0x7_10FF,
    0x833: 0x1_17FF,
    0x834: 0x1_17FF,
    0x835: 0x1_F7FF,
    0x836: 0x1_F7FF,
    0x837: 0x1_10FF,
    0x838: 0xFFFF_FFFF,
    0x83E: 0xB,
    0x83F: 0xFF,
    0x830: 0xFFFF_FFFF_000C_DFFF,
}


@pytest.mark.parametrize("index", WRITABLE)
def test_x2apic_reserved_bits_fault(index: int) -> None:
    accepted = 0
    for bit in range(64):
        machine = Machine()
        machine.enter_x2apic()
        before = machine.apic.msr_read(index)
        if machine.apic.msr_write(index, 1 << bit):
            accepted |= 1 << bit
        else:
            assert machine.apic.msr_read(index) == before
    assert accepted == WRITABLE[index]


def test_tsc_deadline_mode_bit_is_reserved_without_the_feature() -> None:
    machine = Machine(tsc_deadline=False)
    machine.enter_x2apic()
    assert not machine.apic.msr_write(0x832, 1 << 18)


@pytest.mark.parametrize(
    ("apic_id", "logical"), [(0, 0x0000_0001), (15, 0x0000_8000), (16, 0x0001_0001), (0x123, 0x0012_0008)]
)
def test_x2apic_logical_id(apic_id: int, logical: int) -> None:
    machine = Machine()
    machine.apic.profile = evolve(machine.apic.profile, apic_id=apic_id)
    machine.enter_x2apic()
    assert machine.apic.msr_read(0x802) == apic_id
    assert machine.apic.msr_read(0x80D) == logical


def test_x2apic_icr_is_one_register(machine: Machine) -> None:
    machine.enter_x2apic()
    assert machine.apic.msr_write(0x830, 0x0000_0007_0000_0031)
    assert machine.apic.msr_read(0x830) == 0x0000_0007_0000_0031
    machine.enter_x2apic()
    assert machine.apic.msr_read(0x830) == 0x0000_0007_0000_0031


def test_x2apic_mode_keeps_state_but_not_the_destination(machine: Machine) -> None:
    machine.write(ICR_HIGH, 0x0500_0000)
    machine.write(TPR, 0x30)
    machine.apic.accept_interrupt(0x90, False)
    machine.enter_x2apic()
    assert machine.apic.msr_read(0x830) == 0
    assert machine.apic.cr8 == 3
    assert machine.apic.pending_vector() == 0x90


# --- Local interrupts ---


@pytest.mark.parametrize(("mode", "event"), [(0x200, "smi"), (0x400, "nmi"), (0x500, "init")])
def test_lvt_delivery_modes(machine: Machine, mode: int, event: str) -> None:
    machine.write(PERFORMANCE, mode)
    machine.apic.signal(Register.LVT_PERFORMANCE)
    assert machine.pins[0].events == [event]


def test_performance_interrupt_masks_itself(machine: Machine) -> None:
    machine.write(PERFORMANCE, 0x45)
    machine.apic.signal(Register.LVT_PERFORMANCE)
    assert machine.read(PERFORMANCE) == MASKED | 0x45
    assert machine.serve() == 0x45
    machine.apic.signal(Register.LVT_PERFORMANCE)
    assert machine.apic.pending_vector() is None


def test_local_interrupts_are_edge_triggered(machine: Machine) -> None:
    machine.write(THERMAL, 0x45)
    machine.apic.signal(Register.LVT_THERMAL)
    assert machine.serve() == 0x45
    assert machine.eois == []


def test_rewriting_level_lint0_in_service_keeps_its_remote_irr(machine: Machine) -> None:
    machine.write(LINT0, 0x8055)
    machine.apic.set_local_pin(0, True)
    machine.apic.acknowledge()
    machine.write(LINT0, 0x8056)
    assert machine.read(LINT0) == 0xC056
    machine.write(LINT0, 0x0055)
    assert machine.read(LINT0) == 0x0055
    machine.write(LINT0, 0x8055)
    machine.write(LINT0, 0x8455)
    assert machine.read(LINT0) == 0x8455


def test_edge_lint_interrupts_once(machine: Machine) -> None:
    machine.write(LINT1, 0x400)
    machine.apic.set_local_pin(1, True)
    machine.apic.set_local_pin(1, True)
    machine.apic.set_local_pin(1, False)
    machine.apic.set_local_pin(1, True)
    assert machine.pins[0].events == ["nmi", "nmi"]


def test_level_lint0_repeats_after_eoi_while_asserted(machine: Machine) -> None:
    machine.write(LINT0, 0x8055)
    machine.apic.set_local_pin(0, True)
    assert machine.read(LINT0) == 0xC055
    assert machine.apic.acknowledge() == 0x55
    assert machine.apic.pending_vector() is None
    machine.write(EOI, 0)
    assert machine.apic.acknowledge() == 0x55
    machine.apic.set_local_pin(0, False)
    machine.write(EOI, 0)
    assert machine.apic.pending_vector() is None
    assert machine.read(LINT0) == 0x8055


def test_level_lint0_is_level_triggered_for_the_io_apics_too(machine: Machine) -> None:
    machine.write(LINT0, 0x8055)
    machine.apic.set_local_pin(0, True)
    machine.apic.acknowledge()
    machine.apic.set_local_pin(0, False)
    assert machine.apic.end_of_interrupt() == 0x55


def test_level_lint0_waits_for_its_own_eoi(machine: Machine) -> None:
    machine.write(LINT0, 0x8055)
    machine.apic.set_local_pin(0, True)
    machine.apic.acknowledge()
    machine.apic.accept_interrupt(0x95, False)
    machine.serve()
    assert machine.read(LINT0) == 0xC055
    assert machine.apic.pending_vector() is None


def test_masked_level_lint0_interrupts_when_unmasked(machine: Machine) -> None:
    machine.write(LINT0, MASKED | 0x8055)
    machine.apic.set_local_pin(0, True)
    assert machine.apic.pending_vector() is None
    machine.write(LINT0, 0x8055)
    assert machine.serve() == 0x55


@pytest.mark.parametrize(("offset", "number", "entry"), [(LINT1, 1, 0x8055), (LINT0, 0, 0x0055)])
def test_lint_that_is_not_level_sensitive_interrupts_once(
    machine: Machine, offset: int, number: int, entry: int
) -> None:
    machine.write(offset, entry)
    machine.apic.set_local_pin(number, True)
    assert machine.serve() == 0x55
    assert machine.apic.pending_vector() is None
    machine.write(offset, entry)
    assert machine.apic.pending_vector() is None


def test_nmi_on_lint0_is_edge_triggered_whatever_its_trigger_mode(machine: Machine) -> None:
    machine.write(LINT0, 0x8400)
    machine.apic.set_local_pin(0, True)
    machine.write(LINT0, 0x8400)
    assert machine.pins[0].events == ["nmi"]
    assert not machine.apic.external_interrupt_pending()


@pytest.mark.parametrize(("offset", "number"), [(LINT0, 0), (LINT1, 1)])
def test_external_interrupt_follows_its_pin(machine: Machine, offset: int, number: int) -> None:
    machine.write(offset, 0x700)
    machine.apic.set_local_pin(number, True)
    assert machine.apic.external_interrupt_pending()
    machine.apic.set_local_pin(number, False)
    assert not machine.apic.external_interrupt_pending()


def test_external_interrupt_by_message_lasts_until_acknowledged(machine: Machine) -> None:
    machine.apic.receive(InterruptMessage(DeliveryMode.EXTINT, vector=0))
    assert machine.apic.external_interrupt_pending()
    machine.apic.external_interrupt_acknowledged()
    assert not machine.apic.external_interrupt_pending()


def test_external_interrupt_needs_extint_and_no_mask(machine: Machine) -> None:
    machine.apic.set_local_pin(0, True)
    assert not machine.apic.external_interrupt_pending()
    machine.write(LINT0, 0x700)
    assert machine.apic.external_interrupt_pending()
    machine.write(LINT0, MASKED | 0x700)
    assert not machine.apic.external_interrupt_pending()
    machine.write(LINT0, 0x700)
    machine.apic.set_local_pin(0, False)
    assert not machine.apic.external_interrupt_pending()


def test_disabled_apic_passes_its_pins_through(machine: Machine) -> None:
    assert machine.apic.apic_base_write(BASE)
    machine.apic.set_local_pin(0, True)
    assert machine.apic.external_interrupt_pending()
    assert machine.pins[0].events == []
    machine.apic.set_local_pin(1, True)
    machine.apic.set_local_pin(1, True)
    assert machine.pins[0].events == ["nmi"]


def test_virtual_wire_mode_passes_the_8259_through() -> None:
    machine = Machine(enable=False)
    machine.apic.set_virtual_wire_mode()
    machine.apic.set_local_pin(0, True)
    assert machine.apic.external_interrupt_pending()
    machine.apic.set_local_pin(1, True)
    assert machine.pins[0].events == ["nmi"]
    assert machine.read(SVR) == 0x10F


# --- Anything goes ---

ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(("mmio", "msr", "base", "cr8", "deadline", "take", "pin", "wait")),
        st.integers(0, 0x1000),
        st.integers(0, (1 << 64) - 1),
    ),
    max_size=60,
)


@given(accesses=ACCESSES)
def test_no_sequence_of_accesses_breaks_the_model(accesses: list[tuple[str, int, int]]) -> None:
    machine = Machine(2)
    apic = machine.apic
    for kind, where, value in accesses:
        match kind:
            case "mmio":
                apic.mmio_write(where & 0xFF0, 4, value & 0xFFFF_FFFF)
                apic.mmio_read(where & 0xFFF, 1 << (value & 3))
            case "msr":
                apic.msr_write(0x800 + (where & 0xFF), value >> (value & 63))
                apic.msr_read(0x800 + (where & 0xFF))
            case "base":
                apic.apic_base_write(BASE | value & 0xC00)
            case "cr8":
                apic.cr8 = value & 0xF
            case "deadline":
                apic.tsc_deadline = value
            case "take":
                if apic.pending_vector() is not None:
                    assert apic.acknowledge() >= 16
            case "pin":
                apic.set_local_pin(value & 1, bool(value & 2))
            case "wait":
                machine.wait(where)
        state = apic.state
        assert 0 <= state.irr < 1 << 256
        assert not (state.irr | state.isr | state.tmr) & 0xFFFF
        assert all(0 <= register < 1 << 32 for register in state.registers)
        deadline = apic.next_deadline()
        assert deadline is None or deadline >= 0


def test_processor_is_told_of_requests(machine: Machine) -> None:
    apic, pins = machine.apic, machine.pins[0]
    assert apic.accept_interrupt(0x50, False)
    assert pins.requests == 1
    assert not apic.accept_interrupt(0x0F, False)
    assert pins.requests == 1
    for level, requests in ((True, 2), (True, 2), (False, 2), (True, 3)):
        apic.set_local_pin(0, level)
        assert pins.requests == requests
    machine.write(ICR_HIGH, 0)
    apic.receive(InterruptMessage(DeliveryMode.EXTINT, 0))
    assert pins.requests == 4
