"""Several processors: start-up, turns, wake-ups."""

import pytest
from flat_guest import (
    COUNTER,
    EXIT_0,
    ICR,
    INIT_OTHERS,
    SOFTWARE_ENABLE,
    START,
    START_OTHERS_AT_8000,
    machine_with,
    store,
    wait_for,
)

from vtx.machine import StopReason
from vtx.x86.state import Activity


def test_others_wait_for_a_start_up_ipi():
    machine = machine_with(3, EXIT_0)
    assert machine.run().exit_value == 0
    assert [cpu.state.activity for cpu in machine.cpus[1:]] == [Activity.WAIT_FOR_SIPI] * 2


@pytest.mark.parametrize("cpus", [2, 3, 8])
def test_start_up__every_other_processor_runs_once(cpus):
    machine = machine_with(cpus, START + wait_for(cpus - 1) + EXIT_0)
    result = machine.run(max_instructions=1_000_000)
    assert (result.reason, result.exit_value) == (StopReason.DEBUG_EXIT, 0)
    assert machine.memory.read_u16(COUNTER) == cpus - 1
    assert all(cpu.state.segments[1].base == 0x8000 for cpu in machine.cpus[1:])


def test_start_up__without_init_is_ignored_by_a_running_processor():
    # The second start-up IPI finds the others halted after their first start: they must not count again.
    code = START + wait_for(1) + store(ICR, START_OTHERS_AT_8000) + wait_for(1) + EXIT_0
    machine = machine_with(2, code)
    assert machine.run(max_instructions=1_000_000).exit_value == 0
    assert machine.memory.read_u16(COUNTER) == 1


def test_init__restarts_a_processor():
    code = START + wait_for(1) + store(ICR, INIT_OTHERS) + store(ICR, START_OTHERS_AT_8000) + wait_for(2) + EXIT_0
    machine = machine_with(2, code)
    assert machine.run(max_instructions=1_000_000).exit_value == 0
    assert machine.memory.read_u16(COUNTER) == 2


def test_order_of_turns__depends_on_nothing_but_the_guest():
    def run() -> tuple[int, int, list[int]]:
        machine = machine_with(4, START + wait_for(3) + EXIT_0)
        result = machine.run()
        return result.ticks, result.instructions, [cpu.now() for cpu in machine.cpus]

    assert run() == run()


def test_code_written_by_one_processor__is_executed_by_another():
    # Processor 0 turns the trampoline's INC (FF /0) of the next start into a DEC (FF /1) after the first one ran.
    patch = b"\xc6\x05" + (0x8000 + 6).to_bytes(4, "little") + b"\x0e"  # MOV BYTE [8006H], 0EH: the ModRM byte
    code = (
        START + wait_for(1) + patch + store(ICR, INIT_OTHERS) + store(ICR, START_OTHERS_AT_8000) + wait_for(0) + EXIT_0
    )
    machine = machine_with(2, code)
    assert machine.run(max_instructions=1_000_000).exit_value == 0


def test_all_halted__is_the_end():
    machine = machine_with(2, START + wait_for(1) + b"\xfa\xf4")  # CLI; HLT
    assert machine.run(max_instructions=1_000_000).reason is StopReason.HALTED


@pytest.mark.parametrize("cpus", [1, 2])
def test_halted_under_a_timer_whose_interrupts_go_nowhere__is_the_end_of_a_limited_run(cpus, monkeypatch):
    """The test port holds line 0 active: the timer makes no edge on it, and no interrupt is ever requested."""
    monkeypatch.setattr("vtx.x86.processor.MOST_FRUITLESS", 200)
    # MOV DX, 2000H; MOV AL, 1; OUT DX, AL; initialize the 8259; unmask the timer; MOV AL, 36H; OUT 43H, AL;
    # XOR EAX, EAX; OUT 40H, AL twice; CLI; HLT
    initialize = bytes.fromhex("b011 e620 b008 e621 b004 e621 b001 e621 b0fe e621")
    code = bytes.fromhex("66ba0020 b001 ee") + initialize + bytes.fromhex("b036 e643 31c0 e640 e640 fa f4 ebfd")
    machine = machine_with(cpus, code)
    result = machine.run(max_instructions=1_000)
    assert (result.reason, result.instructions) == (StopReason.INSTRUCTION_LIMIT, 20)


def test_nmi_to_itself__is_taken_before_what_follows():
    # There is no IDT: the NMI is a shutdown, and the branch after it ends the code that one run may still complete.
    store_itself_nmi = store(0xFEE0_0310, 0) + store(ICR, 0x0000_4400)
    machine = machine_with(
        1, SOFTWARE_ENABLE + store_itself_nmi + b"\xeb\x00" + b"\xc6\x05\x00\x90\x00\x00\x01" + EXIT_0
    )
    machine.cpu.state.idtr.limit = 0
    assert machine.run(max_instructions=1_000).reason is StopReason.SHUTDOWN
    assert machine.memory.read_u8(COUNTER) == 0


LOCK, LAST, BAD, OTHERS, MINE = 0x9100, 0x9104, 0x9108, 0x910A, 0x910C
# Under a spin lock: RDTSC; compare with what was read last, by whomever; count if it is less; remember it.
READ_CLOCKS_16 = bytes.fromhex(
    "31c0 8ed8 b001 86060091 84c0 75f6 0f31 663b060491 7304 fe060891 66a30491 c606009100 fe060a91 ebda"
)
READ_CLOCKS_32 = bytes.fromhex(
    "b001 860500910000 84c0 75f4 0f31 3b0504910000 7306 fe0508910000 a304910000 c6050091000000"
    "ff050c910000 813d0c910000e8030000 72c6"
)


def test_time_stamp_counters__never_run_behind_what_another_processor_has_read():
    machine = machine_with(3, START + READ_CLOCKS_32 + EXIT_0, READ_CLOCKS_16)
    assert machine.run(max_instructions=5_000_000).exit_value == 0
    assert machine.memory.read_u8(OTHERS) > 0
    assert machine.memory.read_u8(BAD) == 0


def test_interrupt_of_the_8259s__wakes_any_processor_that_listens():
    machine = machine_with(2, EXIT_0)
    board, sleeper = machine.board, machine.cpus[1]
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xDF)):
        board.port_write(port, 1, value)
    sleeper.socket.apic.set_virtual_wire_mode()
    sleeper.state.activity, sleeper.state.rflags = Activity.HLT, 0x202
    assert not sleeper.awake
    board.lines.driver(5)(True)
    assert sleeper.awake
    assert list(machine.scheduler.turns.signalled) == [1]


@pytest.mark.parametrize(
    ("gif", "interrupt_flag", "awake"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_halted_processor__is_awake_only_for_what_it_would_take(gif, interrupt_flag, awake):
    machine = machine_with(2, EXIT_0, profile="everything-amd")
    cpu = machine.cpus[1]
    cpu.state.activity, cpu.state.rflags, cpu.state.gif = Activity.HLT, 0x202 if interrupt_flag else 2, gif
    cpu.socket.apic.set_virtual_wire_mode()
    cpu.socket.apic.send(0x41, cpu.socket.apic.apic_id)
    assert cpu.platform.interrupt_pending()
    assert cpu.awake == awake
    cpu._nmi = True
    assert cpu.awake == gif


def test_halting__leaves_the_clock_where_it_is():
    """A processor that halts while others run is not carried along to the end of its turn."""
    count_long = bytes.fromhex("b9ffff0000 49 75fd")  # MOV ECX, 0FFFFH; DEC ECX; JNZ
    machine = machine_with(2, START + wait_for(1) + count_long * 4 + EXIT_0)
    assert machine.run(max_instructions=5_000_000).exit_value == 0
    assert machine.cpus[1].now() < 100_000 < machine.cpu.now()


def test_nmi__leaves_a_guest_in_the_shutdown_state_to_its_hypervisor():
    """Among several processors as alone: a guest in the shutdown activity state is awake once an NMI is pending."""
    machine = machine_with(2, EXIT_0)
    cpu = machine.cpus[1]
    cpu.state.activity = Activity.SHUTDOWN
    assert not cpu.awake
    cpu.nmi()
    assert cpu.awake
    cpu.state.activity = Activity.WAIT_FOR_SIPI
    assert not cpu.awake
