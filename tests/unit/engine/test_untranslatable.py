"""LOCK with a bit test of a register: the library would end the process where the processor has an invalid opcode."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from engine_bench import CODE, DATA, REFUSAL, EngineBench, state_for

from vtx.engine.untranslatable import begins
from vtx.x86.execution import ExceptionTrap, InstructionTrap, Interrupted, Stepped
from vtx.x86.mmu import Grant
from vtx.x86.outcome import Vector
from vtx.x86.second_level import ALL_PERMISSIONS

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
    for room in (0, 1, 2, 3):
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
    assert begins(bytes.fromhex("66f066 0fa3c0"), bits=64) == {0, 1}
    assert begins(bytes.fromhex("660fa3c0"), bits=64) == set()
    assert begins(bytes.fromhex("f0900fa3c0"), bits=64) == set()
    assert begins(b"\xf0" * 64 + bytes.fromhex("0fa3c0"), bits=64) == set(range(50, 64))


def test_outside_64_bit_mode__what_would_be_a_rex_prefix_executes() -> None:
    assert begins(bytes.fromhex("43" + LOCKED_BT), bits=32) == {1}
    bench = EngineBench("90 43" + LOCKED_BT, "compatibility32")  # NOP; INC EBX; LOCK BT ECX, ECX
    compatible, begin = bench.state, bench.state.gpr[3]
    for _ in range(2):
        bench.state = compatible
        bench.state.rip = CODE
        bench.reload()
        assert bench.run() == InstructionTrap()
        assert bench.state.rip == CODE + 2
        bench.state = state_for("long64")
        bench.reload()
        assert bench.run() == InstructionTrap()
        assert bench.state.rip == CODE + 1
    assert compatible.gpr[3] == begin + 2
    bench.close()


def survives(run: Callable[[], None]) -> bool:
    """Whether a process of its own comes to the end of ``run``."""
    child = os.fork()
    if not child:
        run()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_the_process_survives() -> None:
    """The reason for all of this: without the guard this is SIGABRT."""
    assert survives(lambda: bool(EngineBench(LOCKED_BT + "f4").run()))


# Pages of code and data: no model write may come between the store and the jump, because that has the page looked at.

ALIAS = 0x20000
ELSEWHERE = 0x7000
TARGET = CODE + 0x200
# L: MOV [RBX], EAX; CALL RSI; INC RSI; DEC ECX; JNZ L; MOV [RDI], EDX; JMP RDI. RSI runs along a row of RETs: each is
# translated after a store to its page.
CHANGES_SIDES = "8903 ffd6 48ffc6 ffc9 75f5 8917 ffe7"


def code_and_data(target: int, stored: str, *, mode: str = "long64") -> EngineBench:
    """A page of code and data that stores four bytes at ``target`` in the end and jumps there."""
    bench = EngineBench(CHANGES_SIDES, mode)
    bench.client.pages[ALIAS >> 12] = Grant(CODE >> 12, ALL_PERMISSIONS)
    bench.put(CODE + 0x120, "c3" * 0x40)
    bench.put(ELSEWHERE, "8917 ffe7")  # MOV [RDI], EDX; JMP RDI
    bench.put(TARGET, "909090f4f4")
    gpr = bench.state.gpr
    gpr[1], gpr[3], gpr[6], gpr[7] = 20, CODE + 0x300, CODE + 0x120, target
    gpr[2] = int.from_bytes(bytes.fromhex(stored), "little")
    return bench


def store_elsewhere(bench: EngineBench, stored: str) -> None:
    """Let code of another page store at the target and jump there."""
    bench.state.rip = ELSEWHERE
    bench.state.gpr[2] = int.from_bytes(bytes.fromhex(stored), "little")


@pytest.mark.parametrize("target", [TARGET, TARGET - CODE + ALIAS])
def test_one_stored_into_a_page_of_code_and_data__traps(target: int) -> None:
    def run() -> None:
        bench = code_and_data(target, LOCKED_BT)
        assert bench.run() == InstructionTrap()
        assert bench.state.rip == target

    assert survives(run)


def test_one_stored_at_another_privilege_level__traps() -> None:
    """The library keeps translations of user and supervisor mode apart."""

    def run() -> None:
        bench = code_and_data(TARGET, "909090f4", mode="long64-user")
        event = bench.run()
        assert (event, bench.state.rip) == (ExceptionTrap(Vector.GP, 0), TARGET + 3)
        user = bench.state.segments
        bench.state.segments = state_for("long64").segments
        store_elsewhere(bench, LOCKED_BT)
        bench.put(ELSEWHERE + 2, "f4")
        bench.reload()
        assert bench.run() == InstructionTrap()
        bench.state.segments, bench.state.rip = user, TARGET
        bench.reload()
        assert bench.run() == InstructionTrap()
        assert bench.state.rip == TARGET

    assert survives(run)


def test_code_stored_over_one__executes() -> None:
    bench = code_and_data(TARGET, LOCKED_BT)
    assert bench.run() == InstructionTrap()
    assert bench.state.rip == TARGET
    for stored, length in (("909090f4", 3), ("9090f490", 2), (LOCKED_BT, 0), ("90f49090", 1)):
        store_elsewhere(bench, stored)
        assert bench.run() == InstructionTrap()
        assert bench.state.rip == TARGET + length
    bench.close()


def test_code_stored_over_one_by_the_instruction_before_it__executes() -> None:
    """The library looks at exits again after each run, but not if the page may not be executed at that moment."""
    bench = code_and_data(TARGET - 2, "8917f4f4")
    assert bench.run() == InstructionTrap()
    for stored, length in (
        (LOCKED_BT, 0),
        (LOCKED_BT, 0),
        ("909090f4", 3),
        (LOCKED_BT, 0),
        (LOCKED_BT, 0),
        ("90f49090", 1),
    ):
        bench.state.rip, bench.state.gpr[7] = TARGET - 2, TARGET
        bench.state.gpr[2] = int.from_bytes(bytes.fromhex(stored), "little")
        event = bench.run()
        while event == Interrupted():
            event = bench.run()
        assert (event, bench.state.rip) == (InstructionTrap(), TARGET + length)
    bench.close()


def test_a_page_of_code_and_data__changes_sides_only_to_translate() -> None:
    bench = code_and_data(TARGET, "909090f4")
    bench.put(CODE + 4, "90 90 90")  # RSI stays
    bench.state.gpr[1] = 20_000
    while bench.run(budget=50_000) != InstructionTrap():
        pass
    assert len(bench.client.fills) < 50
    bench.close()


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
