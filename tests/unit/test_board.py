"""The board: devices at their ports and addresses, and deadlines that are planned only when they may change."""

import pytest

from vtx.board import Board, Socket
from vtx.devices.clock import ManualClock
from vtx.machine import Machine, StopReason
from vtx.x86.memory import PhysicalMemory

TICKS = 2_100_000_000
MIB = 1 << 20
IO_APIC, HPET = 0xFEC0_0000, 0xFED0_0000


@pytest.fixture
def machine() -> Machine:
    return Machine(memory=4 * MIB)


def out(machine: Machine, *writes: tuple[int, int]) -> None:
    for port, value in writes:
        machine.board.port_write(port, 1, value)


def redirect(machine: Machine, pin: int, low: int) -> None:
    machine.memory.write_u32(IO_APIC, 0x10 + 2 * pin)
    machine.memory.write_u32(IO_APIC + 0x10, low)


PIT_1_KHZ = (
    *((0x43, 0x34), (0x40, 1193 & 0xFF), (0x40, 1193 >> 8)),
    *((0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xFF)),
)


@pytest.mark.parametrize(
    ("port", "device"),
    [
        (0x20, "Pic8259"),
        (0xA1, "Pic8259"),
        (0x40, "Pit8254"),
        (0x61, "SystemControlPort"),
        (0x71, "Rtc"),
        (0x80, "PostPort"),
        (0xF4, "DebugExit"),
        (0x3F8, "Uart16550"),
        (0x511, "FwCfg"),
        (0x600, "AcpiPm"),
        (0xCFC, "PciConfig"),
        (0x2017, "InterruptTestLines"),
        (0x2018, "none"),
        (0x60, "KeyboardController"),
        (0x64, "KeyboardController"),
        (0x62, "none"),
        (0x92, "SystemControlPortA"),
        (0xCF8, "PciConfig"),
        (0xCF9, "ResetControlPort"),
        (0xCFA, "PciConfig"),
        (0x5A0, "BootPort"),
    ],
)
def test_ports(machine: Machine, port: int, device: str) -> None:
    assert machine.board.port_device(port) == device


def test_nothing_answers_elsewhere(machine: Machine) -> None:
    assert machine.board.port_read(0x62, 1) == 0xFF
    assert machine.board.port_read(0x1234, 4) == 0xFFFF_FFFF
    machine.board.port_write(0x1234, 4, 0)


def test_windows(machine: Machine) -> None:
    machine.memory.write_u32(IO_APIC, 1)
    assert machine.memory.read_u32(IO_APIC + 0x10) == 0x0017_0020
    assert machine.memory.read_u32(HPET + 4) == 10_000_000
    assert machine.memory.read_u32(0xFEE0_0030) >> 16 & 0xFF == 6


def test_masked_timer_has_no_deadline(machine: Machine) -> None:
    out(machine, *PIT_1_KHZ)
    assert machine.board.next_deadline() is None
    out(machine, (0x21, 0xFE))
    assert machine.board.next_deadline() is not None
    out(machine, (0x21, 0xFF))
    assert machine.board.next_deadline() is None
    redirect(machine, 2, 0x31)
    assert machine.board.next_deadline() is not None


def test_request_that_waits_has_no_deadline_until_it_is_taken(machine: Machine) -> None:
    out(machine, *PIT_1_KHZ, (0x21, 0xFE))
    board, socket = machine.board, machine.cpu.platform
    while (deadline := board.next_deadline()) is not None:
        machine.cpu.charge(deadline - machine.cpu.now())
        board.advance(machine.cpu.now())
    assert socket.interrupt_pending()
    machine.cpu.charge(TICKS)
    socket.acknowledge_interrupt()
    assert not socket.interrupt_pending()
    deadline = board.next_deadline()
    assert deadline is not None
    assert 0 < deadline - machine.cpu.now() <= TICKS // 1000 + 2000


def test_reset_of_the_local_apic_frees_a_line_that_waited(machine: Machine) -> None:
    out(machine, *PIT_1_KHZ)
    redirect(machine, 2, 0x31)
    board, apic = machine.board, machine.cpu.platform.apic
    while (deadline := board.next_deadline()) is not None:
        machine.cpu.charge(deadline - machine.cpu.now())
        board.advance(machine.cpu.now())
    assert apic.pending_vector() == 0x31
    apic.init_reset()
    assert board.next_deadline() is not None


def test_read_that_acknowledges_an_interrupt_makes_the_next_one_due(machine: Machine) -> None:
    out(machine, (0xA1, 0xFE), (0x21, 0xFB), (0x70, 0x0B), (0x71, 0x42))
    assert machine.board.next_deadline() is not None
    machine.cpu.charge(TICKS)
    machine.board.advance(machine.cpu.now())
    assert machine.cpu.platform.interrupt_pending()
    machine.cpu.platform.acknowledge_interrupt()
    assert machine.board.next_deadline() is None
    out(machine, (0x70, 0x0C))
    assert machine.board.port_read(0x71, 1) & 0xC0 == 0xC0
    assert machine.board.next_deadline() is not None


def test_hpet_takes_over_the_legacy_lines(machine: Machine) -> None:
    out(machine, *PIT_1_KHZ, (0x21, 0xFE))
    machine.memory.write_u64(HPET + 0x100, 1 << 2)
    machine.memory.write_u64(HPET + 0x108, 100_000_000)
    machine.memory.write_u64(HPET + 0x10, 3)
    assert not machine.cpu.platform.interrupt_pending()
    deadline = machine.board.next_deadline()
    assert deadline is not None
    assert abs(deadline - machine.cpu.now() - machine.profile.tsc_frequency) < 100
    machine.memory.write_u64(HPET + 0x10, 0)
    machine.cpu.platform.acknowledge_interrupt()  # the line rises as it goes back to the 8254
    deadline = machine.board.next_deadline()
    assert deadline is not None
    assert deadline - machine.cpu.now() <= machine.profile.tsc_frequency // 1000 + 5000


def test_8259_reaches_the_processor_through_lint0_and_the_io_apic(machine: Machine) -> None:
    out(machine, (0x21, 0xEF), (0x2004, 1))
    assert machine.cpu.platform.interrupt_pending()
    machine.memory.write_u32(0xFEE0_0350, 1 << 16)
    assert not machine.cpu.platform.interrupt_pending()
    out(machine, (0x20, 0x0C))
    machine.board.port_read(0x20, 1)  # poll: takes the request away
    out(machine, (0x20, 0x20), (0x2004, 0))
    redirect(machine, 0, 7 << 8)
    out(machine, (0x2004, 1))
    assert machine.cpu.platform.interrupt_pending()


def test_eoi_of_the_local_apic_reaches_the_io_apic(machine: Machine) -> None:
    redirect(machine, 20, 0x41 | 1 << 15)
    out(machine, (0x2000 + 20, 1))
    socket = machine.cpu.platform
    assert socket.acknowledge_interrupt() == 0x41
    out(machine, (0x2000 + 20, 0))
    machine.memory.write_u32(0xFEE0_00B0, 0)
    machine.memory.write_u32(IO_APIC, 0x10 + 40)
    assert machine.memory.read_u32(IO_APIC + 0x10) == 0x41 | 1 << 15


def test_every_socket_hears_the_8259() -> None:
    machine = Machine(memory=4 * MIB, cpus=2)
    out(machine, (0x21, 0xEF), (0x2004, 1))
    assert [cpu.platform.apic.state.local_pins[0] for cpu in machine.cpus] == [True, True]
    assert [cpu.platform.interrupt_pending() for cpu in machine.cpus] == [True, False]


def test_guest_switches_the_machine_off() -> None:
    machine = Machine(memory=4 * MIB)
    # mov dx, 604h; mov ax, 3400h; out dx, ax; jmp $
    code = bytes.fromhex("ba 04 06 b8 00 34 ef eb fe")
    machine.load(code.ljust(510, b"\0") + b"\x55\xaa")
    result = machine.run(max_instructions=1000)
    assert result.reason is StopReason.HALTED
    assert result.message == "the guest switched the machine off"


def test_cmos_tells_the_memory_size() -> None:
    machine = Machine(memory=64 * MIB)
    size = 0
    for index in (0x18, 0x17):
        out(machine, (0x70, index))
        size = size << 8 | machine.board.port_read(0x71, 1)
    assert size == 63 * 1024


def exercise(machine: Machine) -> list[object]:
    """Touch every device and let time pass; what the guest sees of it."""
    seen: list[object] = []
    out(machine, (0x80, 7), (0x61, 3), (0x43, 0xB6), (0x42, 100), (0x42, 0), (0x21, 0xEA), (0x2004, 1))
    redirect(machine, 9, 0x51 | 1 << 15)
    redirect(machine, 20, 0x41)
    out(machine, (0x602, 1), (0x2009, 1), (0x70, 0x0B), (0x71, 0x42))
    machine.board.port_write(0xCF8, 4, 0x8000_1234)
    machine.board.port_write(0x510, 2, 5)
    machine.memory.write_u64(HPET + 0x100, 20 << 9 | 1 << 2)
    machine.memory.write_u64(HPET + 0x108, machine.memory.read_u64(HPET + 0xF0) + 5_000_000)
    machine.memory.write_u64(HPET + 0x10, 1)
    for _ in range(20):
        deadline = machine.board.next_deadline()
        machine.cpu.charge(TICKS // 100 if deadline is None else deadline - machine.cpu.now() + 5)
        machine.board.advance(machine.cpu.now())
        seen += [machine.cpu.now(), machine.cpu.platform.interrupt_pending()]
        if machine.cpu.platform.interrupt_pending():
            seen.append(machine.cpu.platform.acknowledge_interrupt())
            machine.memory.write_u32(0xFEE0_00B0, 0)
            out(machine, (0x20, 0x20), (0xA0, 0x20))
        for port in (0x20, 0x21, 0x40, 0x42, 0x61, 0x71, 0x80, 0x3F9, 0x511, 0x600, 0x608):
            seen.append(machine.board.port_read(port, 1))
        seen += [machine.board.port_read(0xCF8, 4), machine.memory.read_u64(HPET + 0xF0)]
    return seen


def test_restored_board_continues_as_the_saved_one() -> None:
    machine, other = Machine(memory=4 * MIB), Machine(memory=4 * MIB)
    out(machine, *PIT_1_KHZ)
    exercise(machine)
    machine.feed(b"abc")
    saved, now = machine.board.save(), machine.cpu.now()
    first = exercise(machine)
    assert machine.board.states() != saved.states()
    other.cpu.charge(now - other.cpu.now())
    other.board.restore(saved)
    assert exercise(other) == first


def test_reset_is_power_up_but_for_what_has_its_own_supply(machine: Machine) -> None:
    board = machine.board
    at_power_up = board.save().states()
    exercise(machine)
    out(machine, (0x70, 0x0B), (0x71, 0x42), (0x70, 0x3F), (0x71, 0x5A), (0x3FB, 3), (0x92, 3), (0x60, 1), (0x64, 0xD2))
    machine.memory.write_u32(HPET + 0x10, 1)
    machine.feed(b"abc")
    board.lines.driver(5)(True)
    time = board.acpi_pm.port_read(8, 4)
    waiting = board.uart.state.waiting
    assert time > 0
    board.reset()
    state = board.save().states()
    changed = {name for name in state if state[name] != at_power_up[name]}
    assert changed <= {"rtc", "acpi pm", "uart", "local apic 0"}
    assert board.rtc.state.cmos[0x3F] == 0x5A
    assert board.rtc.state.cmos[0x0B] == 0x02  # 24 hours; no periodic interrupt
    assert board.acpi_pm.port_read(8, 4) >= time
    assert (board.uart.state.lcr, bytes(board.uart.state.received)) == (0, b"b")
    assert board.uart.state.waiting is waiting
    assert not board.pic.pending()


def test_every_device_with_state_is_saved(machine: Machine) -> None:
    """Found by walking the objects, not by asking the board."""
    found, queue, seen = set(), [machine.board, machine.memory.windows], set()
    while queue:
        each = queue.pop()
        if id(each) in seen or not type(each).__module__.startswith(
            ("vtx.devices", "vtx.board", "vtx.x86.memory", "builtins")
        ):
            continue
        seen.add(id(each))
        if type(each).__module__.startswith("vtx.devices") and hasattr(each, "state"):
            found.add(id(each.state))
        queue += each.values() if isinstance(each, dict) else each if isinstance(each, list | tuple) else []
        queue += vars(each).values() if hasattr(each, "__dict__") else []
        queue += [getattr(each, name) for name in getattr(type(each), "__slots__", ()) if hasattr(each, name)]
    channels = {id(channel.state.counter) for channel in machine.board.pit.channels}  # parts of the channels' states
    assert found - channels == {id(part.state) for part in machine.board._parts().values()}


def test_due_changed_is_told_of_window_writes() -> None:
    told: list[int] = []
    memory, clock = PhysicalMemory(4 * MIB), ManualClock()
    board = Board(
        memory,
        clock,
        TICKS,
        cpus=1,
        serial=lambda data: None,
        exit_run=lambda value: None,
        power=Machine(memory=4 * MIB).power,
        due_changed=lambda: told.append(1),
    )
    assert isinstance(Socket(board), Socket)
    memory.write_u32(IO_APIC, 0x10)
    memory.write_u32(HPET + 0x10, 1)
    assert len(told) == 2
    memory.read_u32(HPET + 0xF0)
    assert len(told) == 2
