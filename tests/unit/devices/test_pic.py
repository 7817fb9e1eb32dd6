"""The 8259 pair, programmed as PC system software programs it."""

import pytest

from vtx.devices.pic import PicPair


class Pc:
    """A PIC pair with the vectors 20H-2FH and helpers named like the words of the data sheet."""

    def __init__(self, icw4: int = 0x01) -> None:
        self.levels: list[bool] = []
        self.pics = PicPair(self.levels.append)
        for chip, icw2, icw3 in ((self.pics.master, 0x20, 0x04), (self.pics.slave, 0x28, 0x02)):
            chip.port_write(0, 1, 0x11)
            for word in (icw2, icw3, icw4):
                chip.port_write(1, 1, word)
            chip.port_write(1, 1, 0x00)  # OCW1: nothing masked

    def raise_irq(self, number: int) -> None:
        self.pics.line(number)(True)

    def lower_irq(self, number: int) -> None:
        self.pics.line(number)(False)

    def eoi(self, number: int) -> None:
        if number >= 8:
            self.pics.slave.port_write(0, 1, 0x20)
        self.pics.master.port_write(0, 1, 0x20)

    def in_service(self) -> tuple[int, int]:
        for chip in (self.pics.master, self.pics.slave):
            chip.port_write(0, 1, 0x0B)
        return self.pics.master.port_read(0, 1), self.pics.slave.port_read(0, 1)


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_masked_from_power_up() -> None:
    pics = PicPair()
    for number in range(16):
        pics.line(number)(True)
    assert not pics.pending()
    assert (pics.master.port_read(1, 1), pics.slave.port_read(1, 1)) == (0xFF, 0xFF)


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 6, 7])
def test_master_vectors(pc: Pc, number: int) -> None:
    pc.raise_irq(number)
    assert pc.pics.pending()
    assert pc.pics.acknowledge() == 0x20 + number
    assert not pc.pics.pending()


@pytest.mark.parametrize("number", range(8, 16))
def test_slave_vectors_through_the_cascade(pc: Pc, number: int) -> None:
    pc.raise_irq(number)
    assert pc.pics.acknowledge() == 0x28 + number - 8
    assert pc.in_service() == (0x04, 1 << number - 8)
    pc.eoi(number)
    assert pc.in_service() == (0, 0)


def test_mask_holds_back_and_unmask_releases(pc: Pc) -> None:
    pc.pics.master.port_write(1, 1, 0x10)
    pc.raise_irq(4)
    assert not pc.pics.pending()
    pc.pics.master.port_write(1, 1, 0x00)
    assert pc.pics.pending()


def test_priority_and_nesting(pc: Pc) -> None:
    pc.raise_irq(4)
    pc.raise_irq(1)
    assert pc.pics.acknowledge() == 0x21
    assert not pc.pics.pending()
    pc.raise_irq(0)
    assert pc.pics.acknowledge() == 0x20
    pc.eoi(0)
    assert not pc.pics.pending()
    pc.eoi(1)
    assert pc.pics.acknowledge() == 0x24


def test_two_slave_requests_both_arrive(pc: Pc) -> None:
    pc.raise_irq(9)
    pc.raise_irq(12)
    assert pc.pics.acknowledge() == 0x29
    pc.eoi(9)
    assert pc.pics.acknowledge() == 0x2C


def test_slave_with_automatic_eoi_pulses_the_cascade() -> None:
    pc = Pc(icw4=0x03)
    pc.raise_irq(9)
    pc.raise_irq(12)
    assert pc.pics.acknowledge() == 0x29
    assert pc.pics.acknowledge() == 0x2C
    assert not pc.pics.pending()


def test_edge_is_served_once_and_needs_a_new_edge(pc: Pc) -> None:
    pc.raise_irq(4)
    assert pc.pics.acknowledge() == 0x24
    pc.eoi(4)
    assert not pc.pics.pending()
    pc.lower_irq(4)
    pc.raise_irq(4)
    assert pc.pics.pending()


def test_level_triggered_input_requests_again_while_high(pc: Pc) -> None:
    pc.pics.edge_level.port_write(1, 1, 0x08)  # IRQ 11
    pc.raise_irq(11)
    assert pc.pics.acknowledge() == 0x2B
    pc.eoi(11)
    assert pc.pics.acknowledge() == 0x2B
    pc.lower_irq(11)
    pc.eoi(11)
    assert not pc.pics.pending()


def test_edge_level_registers_keep_system_inputs_edge(pc: Pc) -> None:
    pc.pics.edge_level.port_write(0, 2, 0xFFFF)
    assert pc.pics.edge_level.port_read(0, 2) == 0xDEF8


def test_edge_is_latched_though_the_pulse_ends(pc: Pc) -> None:
    for number in (4, 11):
        pc.raise_irq(number)
        pc.lower_irq(number)
    assert pc.pics.acknowledge() == 0x2B
    pc.eoi(11)
    assert pc.pics.acknowledge() == 0x24


def test_spurious_master(pc: Pc) -> None:
    pc.pics.edge_level.port_write(0, 1, 0x20)
    pc.raise_irq(5)
    pc.lower_irq(5)
    assert not pc.pics.pending()
    assert pc.pics.acknowledge() == 0x27
    assert pc.in_service() == (0, 0)


def test_spurious_slave_leaves_the_cascade_in_service(pc: Pc) -> None:
    pc.pics.edge_level.port_write(1, 1, 0x02)
    pc.raise_irq(9)
    # Between the two acknowledge pulses the request goes away: only the master has latched it.
    assert pc.pics.master.acknowledge() == 2
    pc.lower_irq(9)
    assert pc.pics.slave.acknowledge() == 7
    assert pc.in_service() == (0x04, 0)


def test_masked_slave_request_leaves_nothing_in_the_master(pc: Pc) -> None:
    pc.raise_irq(9)
    assert pc.pics.pending()
    pc.pics.slave.port_write(1, 1, 0xFF)
    assert not pc.pics.pending()


def test_specific_eoi(pc: Pc) -> None:
    pc.raise_irq(4)
    pc.pics.acknowledge()
    pc.raise_irq(1)
    pc.pics.acknowledge()
    pc.pics.master.port_write(0, 1, 0x64)
    assert pc.in_service() == (0x02, 0)


def test_rotation_on_non_specific_eoi(pc: Pc) -> None:
    pc.raise_irq(4)
    pc.pics.acknowledge()
    pc.pics.master.port_write(0, 1, 0xA0)
    pc.raise_irq(3)
    pc.raise_irq(5)
    assert pc.pics.acknowledge() == 0x25


def test_set_priority(pc: Pc) -> None:
    pc.pics.master.port_write(0, 1, 0xC3)  # 3 lowest, so 4 highest
    pc.raise_irq(0)
    pc.raise_irq(4)
    assert pc.pics.acknowledge() == 0x24


def test_special_mask_mode_lets_lower_priority_in(pc: Pc) -> None:
    pc.raise_irq(1)
    pc.pics.acknowledge()
    pc.raise_irq(4)
    assert not pc.pics.pending()
    pc.pics.master.port_write(1, 1, 0x02)
    pc.pics.master.port_write(0, 1, 0x68)
    assert pc.pics.acknowledge() == 0x24


def test_special_fully_nested_mode_nests_the_slave() -> None:
    pc = Pc(icw4=0x11)
    pc.raise_irq(12)
    assert pc.pics.acknowledge() == 0x2C
    pc.raise_irq(9)
    assert pc.pics.acknowledge() == 0x29


def test_poll_acknowledges(pc: Pc) -> None:
    pc.raise_irq(4)
    pc.pics.master.port_write(0, 1, 0x0C)
    assert pc.pics.master.port_read(0, 1) == 0x84
    assert pc.in_service() == (0x10, 0)
    pc.pics.master.port_write(0, 1, 0x0C)
    assert pc.pics.master.port_read(0, 1) == 0


def test_reads_irr_after_ocw3(pc: Pc) -> None:
    pc.pics.master.port_write(1, 1, 0xFF)
    pc.raise_irq(6)
    pc.pics.master.port_write(0, 1, 0x0A)
    assert pc.pics.master.port_read(0, 1) == 0x40


def test_initialization_clears_mask_and_service(pc: Pc) -> None:
    pc.raise_irq(4)
    pc.pics.acknowledge()
    pc.pics.master.port_write(1, 1, 0xAA)
    pc.pics.master.port_write(0, 1, 0x11)
    for word in (0x60, 0x04, 0x01):
        pc.pics.master.port_write(1, 1, word)
    assert pc.pics.master.port_read(1, 1) == 0
    assert pc.in_service() == (0, 0)
    pc.raise_irq(3)
    assert pc.pics.acknowledge() == 0x63


def test_output_line_reports_changes_only(pc: Pc) -> None:
    pc.levels.clear()
    pc.raise_irq(4)
    pc.raise_irq(5)
    assert pc.levels == [True]
    pc.pics.acknowledge()
    assert pc.levels == [True, False]


def initialize(pc: Pc, *words: int) -> None:
    """ICW1 to the master's first port, the other words to its second, and then unmask everything."""
    pc.pics.master.port_write(0, 1, words[0])
    for word in words[1:]:
        pc.pics.master.port_write(1, 1, word)
    pc.pics.master.port_write(1, 1, 0x00)


@pytest.mark.parametrize("words", [(0x13, 0x67, 0x01), (0x12, 0x67), (0x10, 0x67, 0x04), (0x11, 0x67, 0x04, 0x01)])
def test_initialization_takes_the_words_icw1_announces(pc: Pc, words: tuple[int, ...]) -> None:
    initialize(pc, *words)
    assert pc.pics.master.port_read(1, 1) == 0
    pc.raise_irq(3)
    assert pc.pics.acknowledge() == 0x63
    assert pc.in_service()[0] == 0x08


def test_initialization_keeps_active_levels_and_forgets_edges(pc: Pc) -> None:
    pc.pics.edge_level.port_write(0, 1, 0x20)
    pc.raise_irq(4)
    pc.raise_irq(5)
    initialize(pc, 0x11, 0x20, 0x04, 0x01)
    assert pc.pics.acknowledge() == 0x25
    pc.lower_irq(5)
    pc.eoi(5)
    assert not pc.pics.pending()


def test_making_an_active_input_level_triggered_requests(pc: Pc) -> None:
    pc.raise_irq(5)
    pc.pics.acknowledge()
    pc.eoi(5)
    assert not pc.pics.pending()
    pc.pics.edge_level.port_write(0, 1, 0x20)
    assert pc.pics.pending()


def test_rotation_in_automatic_eoi_mode() -> None:
    pc = Pc(icw4=0x03)
    pc.pics.master.port_write(0, 1, 0x80)
    pc.raise_irq(4)
    assert pc.pics.acknowledge() == 0x24
    pc.raise_irq(3)
    pc.raise_irq(5)
    assert pc.pics.acknowledge() == 0x25
    pc.pics.master.port_write(0, 1, 0x00)
    assert pc.pics.acknowledge() == 0x23
    pc.lower_irq(5)
    pc.raise_irq(5)
    pc.raise_irq(6)
    assert pc.pics.acknowledge() == 0x26  # 5 is still the lowest: 3 did not rotate


def test_rotation_on_specific_eoi(pc: Pc) -> None:
    pc.raise_irq(4)
    pc.pics.acknowledge()
    pc.pics.master.port_write(0, 1, 0xE4)
    assert pc.in_service() == (0, 0)
    pc.raise_irq(3)
    pc.raise_irq(5)
    assert pc.pics.acknowledge() == 0x25


def test_set_priority_to_the_default_order(pc: Pc) -> None:
    pc.pics.master.port_write(0, 1, 0xC3)
    pc.pics.master.port_write(0, 1, 0xC7)
    pc.raise_irq(4)
    pc.raise_irq(0)
    assert pc.pics.acknowledge() == 0x20


def test_no_operation_commands_change_nothing(pc: Pc) -> None:
    pc.raise_irq(4)
    pc.pics.acknowledge()
    pc.pics.master.port_write(0, 1, 0x40)
    pc.pics.master.port_write(0, 1, 0x44)
    assert pc.in_service() == (0x10, 0)
    pc.raise_irq(3)
    assert pc.pics.acknowledge() == 0x23


def test_operation_word_changes_only_what_it_selects(pc: Pc) -> None:
    pc.raise_irq(1)
    pc.pics.acknowledge()
    pc.raise_irq(4)
    pc.pics.master.port_write(1, 1, 0x02)
    pc.pics.master.port_write(0, 1, 0x68)
    assert pc.pics.pending()
    pc.pics.master.port_write(0, 1, 0x0B)  # read ISR; special mask mode stays
    pc.pics.master.port_write(0, 1, 0x28)  # special mask bit without its enable; ISR stays selected
    assert pc.pics.pending()
    assert pc.pics.master.port_read(0, 1) == 0x02
    pc.pics.master.port_write(0, 1, 0x48)
    assert not pc.pics.pending()


def test_poll_is_for_one_read(pc: Pc) -> None:
    pc.pics.master.port_write(1, 1, 0x5A)
    pc.pics.master.port_write(0, 1, 0x0C)
    assert pc.pics.master.port_read(1, 1) == 0
    assert pc.pics.master.port_read(1, 1) == 0x5A


def test_special_fully_nested_slave_in_service_holds_off_lower_inputs() -> None:
    pc = Pc(icw4=0x11)
    pc.raise_irq(12)
    pc.pics.acknowledge()
    pc.raise_irq(3)
    assert not pc.pics.pending()


def test_ports_beyond_the_device_do_not_answer(pc: Pc) -> None:
    assert pc.pics.master.port_read(1, 2) == 0xFF00
    assert pc.pics.edge_level.port_read(1, 2) == 0xFF00
    pc.pics.master.port_write(2, 1, 0xFF)
    assert pc.pics.master.port_read(1, 1) == 0
