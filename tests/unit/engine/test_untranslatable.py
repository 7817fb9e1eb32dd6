"""LOCK with a bit test of a register: the library would end the process where the processor has an invalid opcode."""

from __future__ import annotations

import os

import pytest
from engine_bench import CODE, DATA, REFUSAL, EngineBench

from vtx.engine.untranslatable import begins
from vtx.x86.execution import InstructionTrap, Stepped

LOCKED_BT = "f00fa3c9"  # lock bt ecx, ecx


@pytest.mark.parametrize(
    "code", [LOCKED_BT, "f00fbaf50f", "66f00fabc0", "f066480fb3c8", "f2f00fbbff", "f0410fbae103", "41f00fa3c9"]
)
def test_locked_bit_tests_of_registers__trap(code: str) -> None:
    bench = EngineBench("48ffc3" + code)
    assert bench.run() == InstructionTrap()
    assert bench.state.rip == CODE + 3
    bench.close()


def test_locked_bit_tests_of_memory__execute() -> None:
    bench = EngineBench(f"f00fab0c25{DATA.to_bytes(4, 'little').hex()} f4")  # lock bts [DATA], ecx
    bench.state.gpr[1] = 3
    assert bench.run() == InstructionTrap()
    assert bench.memory.read_u8(DATA) == 8
    bench.close()


def test_an_instruction_across_two_pages__traps() -> None:
    for room in (1, 2, 3):
        bench = EngineBench("")
        begin = CODE + 0x1000 - room
        bench.memory.write(begin - 3, bytes.fromhex("48ffc3" + LOCKED_BT))
        bench.state.rip = begin - 3
        for _ in range(5):
            event = bench.run()
            if event == InstructionTrap():
                break
        assert bench.state.rip == begin
        bench.close()


def test_code_written_later__traps_too() -> None:
    bench = EngineBench("48ffc3 48ffc3 90 f4")
    assert bench.run() == InstructionTrap()
    bench.memory.write(CODE + 3, bytes.fromhex(LOCKED_BT))
    bench.state.rip = CODE
    assert bench.run() == InstructionTrap()
    assert bench.state.rip == CODE + 3
    bench.close()


def test_begins__finds_every_prefix_from_which_it_is_locked() -> None:
    assert begins(bytes.fromhex("66f066 0fa3c0")) == {0, 1}
    assert begins(bytes.fromhex("660fa3c0")) == set()
    assert begins(bytes.fromhex("f0900fa3c0")) == set()
    assert begins(b"\xf0" * 64 + bytes.fromhex("0fa3c0")) == set(range(50, 64))


def test_the_process_survives() -> None:
    """The reason for all of this, in a process of its own: without the guard this is SIGABRT."""
    child = os.fork()
    if not child:
        EngineBench(LOCKED_BT + "f4").run()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_run_elsewhere__does_not_touch_the_page_of_such_code() -> None:
    bench = EngineBench("90f4" + LOCKED_BT)
    assert bench.run() == InstructionTrap()
    elsewhere = CODE + 0x2000
    bench.memory.write(elsewhere, bytes.fromhex("90f4"))
    bench.client.pages[CODE >> 12] = REFUSAL
    bench.engine.flush(None)
    for step, event in ((False, InstructionTrap()), (True, Stepped())):
        bench.client.fills.clear()
        bench.state.rip = elsewhere
        assert bench.run(step=step) == event
        assert {page for page, *_ in bench.client.fills} <= {elsewhere}
    bench.close()


def test_such_code_where_a_run_begins__takes_no_time() -> None:
    for answers in (True, False):
        bench = EngineBench("48ffc3 f4")
        bench.engine.answers = answers
        assert bench.run() == InstructionTrap()
        before = bench.engine.elapsed(), bench.engine.instructions()
        bench.memory.write(CODE + 0x1100, bytes.fromhex(LOCKED_BT))
        bench.state.rip = CODE + 0x1100
        assert bench.run() == InstructionTrap()
        assert (bench.engine.elapsed(), bench.engine.instructions()) == before == (3, 1)
        bench.close()
