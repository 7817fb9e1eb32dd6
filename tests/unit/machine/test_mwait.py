"""MONITOR and MWAIT, and those of AMD: a wait ends with a store, an interrupt, or time; it takes no turns meanwhile."""

import pytest
from flat_guest import COUNTER, EXIT_0, START, machine_with, store, wait_for

from vtx.machine import Machine, StopReason
from vtx.x86.event import Event, EventKind
from vtx.x86.monitor import CHECK_TICKS, LONGEST_WAIT
from vtx.x86.state import Activity

MONITOR_COUNTER = bytes.fromhex("b800900000 31c9 31d2 0f01c8")  # MOV EAX, COUNTER; XOR ECX, ECX; XOR EDX, EDX; MONITOR
MWAIT = bytes.fromhex("31c0 31c9 0f01c9")  # XOR EAX, EAX; XOR ECX, ECX; MWAIT
SETUP = 7  # instructions up to the MWAIT, it included

# 16-bit: wait for COUNTER to become 1 by MONITOR and MWAIT, then make it 2 and halt.
WAITING_PROCESSOR = bytes.fromhex(
    "31c0 8ed8 31c9 31d2"  # XOR AX, AX; MOV DS, AX; XOR CX, CX; XOR DX, DX
    "b80090 0f01c8"  # again: MOV AX, 9000H; MONITOR
    "833e009001 740b"  # CMP WORD [9000H], 1; JE done
    "31c0 0f01c9 fe060091 ebe8"  # XOR AX, AX; MWAIT; INC BYTE [9100H]; JMP again
    "f0ff060090 f4"  # done: LOCK INC WORD [9000H]; HLT
)


def waiting(code: bytes = MONITOR_COUNTER + MWAIT + EXIT_0, cpus: int = 1) -> Machine:
    machine = machine_with(cpus, code)
    machine.run(max_instructions=SETUP)
    return machine


def test_waits_for_as_long_as_nothing_happens() -> None:
    machine = waiting()
    assert machine.cpu.state.activity is Activity.MWAIT
    begin = machine.now()
    assert machine.run().exit_value == 0
    assert LONGEST_WAIT <= machine.now() - begin <= LONGEST_WAIT + 10_000


def test_a_store_to_the_line_ends_the_wait() -> None:
    machine = waiting()
    begin = machine.now()
    machine.memory.write_u8(COUNTER + 63, 1)
    assert machine.run().exit_value == 0
    assert machine.now() - begin < CHECK_TICKS


def test_a_store_beside_the_line_does_not() -> None:
    machine = waiting()
    begin = machine.now()
    machine.memory.write_u8(COUNTER + 64, 1)
    machine.memory.write_u8(COUNTER - 1, 1)
    assert machine.run().exit_value == 0
    assert machine.now() - begin >= LONGEST_WAIT


def test_a_store_between_monitor_and_mwait_leaves_nothing_to_wait_for() -> None:
    machine = machine_with(1, MONITOR_COUNTER + store(COUNTER, 5) + MWAIT + EXIT_0)
    assert machine.run().exit_value == 0
    assert machine.now() < CHECK_TICKS


@pytest.mark.parametrize("smi", [False, True])
def test_an_event_between_monitor_and_mwait_leaves_nothing_to_wait_for(smi: bool) -> None:
    machine = machine_with(1, MONITOR_COUNTER + MWAIT + EXIT_0)
    machine.run(max_instructions=4)
    cpu = machine.cpu
    assert cpu.monitor is not None
    if smi:
        cpu.enter_smm()
    else:
        cpu.state.idtr.limit = 0  # the NMI is not even delivered
        cpu.deliver(Event(2, EventKind.NMI))
    assert cpu.monitor is None


@pytest.mark.parametrize("code", [MWAIT + EXIT_0, MONITOR_COUNTER + MWAIT + MWAIT + EXIT_0])
def test_every_mwait_needs_a_monitor(code: bytes) -> None:
    machine = machine_with(1, code)
    assert machine.run().exit_value == 0
    assert machine.now() < LONGEST_WAIT + 10_000


@pytest.mark.parametrize(("extensions", "waits"), [(0, True), (1, False)])
def test_masked_interrupts_end_the_wait_on_request(extensions: int, waits: bool) -> None:
    # The timer interrupt of the 8254 is pending at the 8259, with RFLAGS.IF = 0.
    machine = machine_with(1, MONITOR_COUNTER + MWAIT.replace(b"\x31\xc9", bytes((0xB1, extensions))) + EXIT_0)
    for port, value in (
        (0x20, 0x11),
        (0x21, 8),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xFE),
        (0x43, 0x34),
        (0x40, 2),
        (0x40, 0),
    ):
        machine.board.port_write(port, 1, value)
    machine.cpu.charge(10_000)
    assert machine.run().exit_value == 0
    assert (machine.now() > LONGEST_WAIT) == waits


def test_another_processor_ends_the_wait() -> None:
    code = START + b"\xb9\x00\x00\x01\x00" + b"\xe2\xfe" + store(COUNTER, 1) + wait_for(2) + EXIT_0  # LOOP 65536 times
    machine = machine_with(2, code, WAITING_PROCESSOR)
    result = machine.run(max_instructions=2_000_000)
    assert result.exit_value == 0
    assert machine.memory.read_u8(0x9100) >= 1
    others = machine.cpus[1].instructions
    assert others < 200, "it does not execute while it waits"


MONITORX_COUNTER = MONITOR_COUNTER.replace(b"\x0f\x01\xc8", b"\x0f\x01\xfa")


def mwaitx(extensions: int, timer: int) -> bytes:
    """XOR EAX, EAX; MOV ECX; MOV EBX; MWAITX."""
    return b"\x31\xc0\xb9" + extensions.to_bytes(4, "little") + b"\xbb" + timer.to_bytes(4, "little") + b"\x0f\x01\xfb"


def time_of_wait(code: bytes) -> int:
    machine = machine_with(1, MONITORX_COUNTER + code + EXIT_0, profile="zen-server")
    assert machine.run().exit_value == 0
    return machine.now()


@pytest.mark.parametrize("ticks", [10_000, 300_000, 5_000_000])
def test_timer_of_mwaitx(ticks: int) -> None:
    assert ticks <= time_of_wait(mwaitx(2, ticks)) <= ticks + 10_000


@pytest.mark.parametrize(("extensions", "timer"), [(0, 10_000), (2, 0)])
def test_mwaitx_without_a_timer(extensions: int, timer: int) -> None:
    assert LONGEST_WAIT <= time_of_wait(mwaitx(extensions, timer)) <= LONGEST_WAIT + 10_000


def test_mwaitx_without_a_monitor__does_not_wait() -> None:
    assert time_of_wait(mwaitx(2, 1) + mwaitx(2, 300_000)) < 10_000


def test_a_store_ends_mwaitx_before_its_timer() -> None:
    machine = machine_with(1, MONITORX_COUNTER + mwaitx(2, 5_000_000) + EXIT_0, profile="zen-server")
    machine.run(max_instructions=SETUP + 1)
    assert machine.cpu.state.activity is Activity.MWAIT
    machine.memory.write_u8(COUNTER, 1)
    assert machine.run().exit_value == 0
    assert machine.now() < 1_000_000


def test_timer_of_mwaitx__among_processors() -> None:
    """The other one never sleeps, so that time passes by its turns."""
    code = START + MONITORX_COUNTER + mwaitx(2, 50_000) + EXIT_0
    machine = machine_with(2, code, bytes.fromhex("ebfe"), profile="zen-server")  # JMP to itself
    assert machine.run(max_instructions=2_000_000).exit_value == 0
    assert 50_000 <= machine.cpu.now() <= 50_000 + CHECK_TICKS // 2


def test_a_snapshot_holds_the_wait() -> None:
    machine = waiting()
    snapshot = machine.snapshot()
    ends = []
    for each in (machine, machine_with(1, b"")):
        each.restore(snapshot)
        assert each.cpu.state.activity is Activity.MWAIT
        ends.append(each.run())
    assert ends[0] == ends[1]
    assert ends[0].reason is StopReason.DEBUG_EXIT
