"""Virtual time is the number of code bytes executed; runs end in time; the compiled clock is no different."""

from __future__ import annotations

import pytest
from engine_bench import CODE, DATA, STACK, EngineBench

from vtx.engine import clock
from vtx.x86.execution import (
    BudgetSpent,
    EngineEvent,
    ExceptionTrap,
    InstructionTrap,
    Interrupted,
    OperandTrap,
    RefusedFill,
    Stepped,
    WindowOpen,
)
from vtx.x86.mmu import Grant
from vtx.x86.outcome import Vector
from vtx.x86.state import Shadow

COMPILED = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])


def test_the_compiled_clock_is_there() -> None:
    """Without it everything works, only slowly; a build that lost it should not go unnoticed."""
    if clock._blockclock is None:
        pytest.skip("no compiler at installation")
    assert EngineBench().engine.clock.compiled


@COMPILED
@pytest.mark.parametrize("budget", [0, 1, 2, 5, 6, 7, 11, 12, 100, 599])
def test_budget_is_never_overshot(budget: int, compiled: bool) -> None:
    """The block of six bytes is executed as a whole or not at all."""
    bench = EngineBench("ffc0ffc975faf4", compiled=compiled)
    bench.state.gpr[1] = 100
    assert bench.run(budget=budget) == BudgetSpent()
    assert bench.engine.elapsed() == budget // 6 * 6
    assert bench.engine.instructions() == budget // 6 * 3
    assert bench.state.rip == CODE
    bench.close()


@COMPILED
def test_budget_that_just_suffices(compiled: bool) -> None:
    bench = EngineBench("ffc0ffc975faf4", compiled=compiled)
    bench.state.gpr[1] = 100
    assert bench.run(budget=601) == InstructionTrap()
    assert bench.engine.elapsed() == 600
    bench.close()


@COMPILED
@pytest.mark.parametrize("limit", [0, 1, 3, 4, 299, 301])
def test_instruction_limit_is_never_overshot(limit: int, compiled: bool) -> None:
    bench = EngineBench("ffc0ffc975faf4", compiled=compiled)
    bench.state.gpr[1] = 100
    event = bench.run(instruction_limit=limit)
    assert event == (InstructionTrap() if limit == 301 else BudgetSpent())
    assert bench.engine.instructions() == min(limit // 3 * 3, 300)
    bench.close()


@COMPILED
@pytest.mark.parametrize("code", ["ebfe", "90ebfd", "f3a4ebfc", "75fe"], ids=["self", "pair", "rep", "jcc"])
def test_time_passes_in_single_steps(code: str, compiled: bool) -> None:
    """A step that ends where it began was a step: otherwise a deadline would be approached for ever."""
    bench = EngineBench(code, compiled=compiled)
    bench.state.gpr[1], bench.state.gpr[6], bench.state.gpr[7] = 100, DATA, DATA + 0x100
    before = 0
    for i in range(1, 50):
        assert bench.run(step=True) == Stepped()
        assert bench.engine.elapsed() > before
        assert bench.engine.instructions() == i
        before = bench.engine.elapsed()
    bench.close()


@COMPILED
def test_time_passes_for_a_guest_that_steps_itself(compiled: bool) -> None:
    bench = EngineBench("ebfe", compiled=compiled)
    bench.state.rflags |= 0x100
    for i in range(1, 10):
        event = bench.run()
        assert isinstance(event, ExceptionTrap)
        assert event.vector == Vector.DB
        assert (bench.engine.elapsed(), bench.engine.instructions()) == (2 * i, i)
    bench.close()


@COMPILED
@pytest.mark.parametrize("mode", ["protected32", "protected16"])
@pytest.mark.parametrize("bits", range(12, 32, 6))
def test_where_the_base_of_cs_and_eip_pass_4_gib__the_rest_of_a_block_is_not_counted(
    mode: str, bits: int, compiled: bool
) -> None:
    """The library's linear address of such a block does not wrap; the one that a trap is at does."""
    bench = EngineBench("43 0fa2 43 43 f4", mode, compiled=compiled)  # INC EBX; CPUID; INC EBX twice; HLT
    bench.state.cs.base = -(1 << bits) & 0xFFFF_FFFF
    bench.state.cs.limit = 0xFFFF_FFFF
    bench.state.rip += 1 << bits
    bench.reload()
    begin = bench.state.rip
    for length, instructions in ((1, 1), (3, 3)):
        assert bench.run() == InstructionTrap()
        assert bench.state.rip == begin + (length if instructions == 1 else 5)
        assert (bench.engine.elapsed(), bench.engine.instructions()) == (length, instructions)
        bench.state.rip += 2
    bench.close()


@COMPILED
@pytest.mark.parametrize(
    ("code", "behind", "expected"),
    [
        ("43 6c", 1, InstructionTrap()),  # INC EBX; INS
        ("43 8e18", 1, InstructionTrap()),  # INC EBX; MOV DS, [EAX]
        ("43 8b0b", 1, OperandTrap()),  # INC EBX; MOV ECX, [EBX]
        ("8b1e 8b0b", 2, OperandTrap()),  # MOV EBX, [ESI]; MOV ECX, [EBX]: guarded by itself
        ("43 f00fa3c9", 1, InstructionTrap()),  # INC EBX; LOCK BT ECX, ECX
    ],
)
def test_where_the_base_of_cs_and_eip_pass_4_gib__the_engine_comes_to_where_it_must_stop(
    code: str, behind: int, expected: EngineEvent, compiled: bool
) -> None:
    bench = EngineBench(code + "f4", "protected32", compiled=compiled)
    bench.state.cs.base = 0xFFFF_0000
    bench.state.cs.limit = 0xFFFF_FFFF
    bench.state.segments[3].limit = 0xFFFF
    bench.state.rip += 0x1_0000
    bench.state.gpr[3], bench.state.gpr[6] = 0x2_0000, DATA
    bench.put(DATA, "00000200")
    bench.reload()
    begin = bench.state.rip
    for _ in range(3):
        event = bench.run()
        if event != Interrupted():
            break
    assert (event, bench.state.rip) == (expected, begin + behind)
    assert (bench.engine.elapsed(), bench.engine.instructions()) == (behind, 1)
    bench.close()


def test_refused_fetch__counts_what_was_executed() -> None:
    """JMP to a page that refuses: the jump is done, the block it ended is over."""
    bench = EngineBench("90ffe7", "long64")
    bench.client.pages[DATA >> 12] = Grant(DATA >> 12, 3)
    bench.state.gpr[7] = DATA
    assert isinstance(bench.run(), RefusedFill)
    assert (bench.state.rip, bench.engine.elapsed(), bench.engine.instructions()) == (DATA, 3, 2)
    bench.close()


def test_refused_fetch_of_the_second_page_of_a_block() -> None:
    bench = EngineBench("", "long64")
    start = CODE + 0x1000 - 5
    bench.put(start, "909048b81122334455667788f4")
    bench.client.pages[CODE + 0x1000 >> 12] = Grant(CODE + 0x1000 >> 12, 3)
    bench.state.rip = start
    event = bench.run()
    assert isinstance(event, RefusedFill)
    assert event.linear_page == CODE + 0x1000
    executed = bench.state.rip - start
    assert executed in (0, 2)
    assert bench.engine.elapsed() == executed
    assert bench.engine.instructions() == executed
    bench.close()


@COMPILED
@pytest.mark.parametrize("mode", ["real16", "protected32", "long64"])
def test_window_opens_one_instruction_after_sti(mode: str, compiled: bool) -> None:
    """SDM Vol. 2, "STI—Set Interrupt Flag": interrupts are blocked until the next instruction has executed.

    The engine may stop in the shadow (it says so in the state) or behind it, but not later.
    """
    # CLI; INC EBX; STI; INC EBX; INC EBX; HLT
    bench = EngineBench("fa66ffc3fb66ffc366ffc3f4", mode, compiled=compiled)
    bench.state.gpr[3] = 0
    assert bench.run(watch_if=True) == WindowOpen()
    in_shadow = bench.state.rip == CODE + 5
    assert in_shadow or bench.state.rip == CODE + 8
    assert bench.state.shadow is (Shadow.STI if in_shadow else Shadow.NONE)
    assert bench.state.gpr[3] == (1 if in_shadow else 2)
    assert bench.engine.elapsed() == bench.state.rip - CODE
    if in_shadow:
        assert bench.run(step=True) == Stepped()
        assert bench.state.rip == CODE + 8
        assert bench.state.shadow is Shadow.NONE
    bench.close()


@COMPILED
@pytest.mark.parametrize("mode", ["real16", "protected32", "long64"])
def test_window_opens_right_after_popf(mode: str, compiled: bool) -> None:
    # POPF; INC EBX; HLT
    bench = EngineBench("9d66ffc3f4", mode, compiled=compiled)
    bench.put(STACK, (0x202).to_bytes(8, "little"))
    bench.state.gpr[3] = 0
    assert bench.run(watch_if=True) == WindowOpen()
    assert (bench.state.rip, bench.state.gpr[3]) == (CODE + 1, 0)
    assert bench.state.rflags & 0x200
    assert bench.state.shadow is Shadow.NONE
    bench.close()


def test_window_does_not_open_while_interrupts_stay_off() -> None:
    bench = EngineBench("faffc0ffc975faf4")
    bench.state.gpr[1] = 10
    assert bench.run(watch_if=True) == InstructionTrap()
    bench.close()


def test_shadow_of_sti() -> None:
    """SDM Vol. 3, "Masking Exceptions and Interrupts When Switching Stacks"."""
    bench = EngineBench("fb9090f4", "real16")
    assert bench.run(step=True) == Stepped()
    assert (bench.state.shadow, bench.state.rip) == (Shadow.STI, CODE + 1)
    assert bench.run(step=True) == Stepped()
    assert bench.state.shadow is Shadow.NONE
    bench.close()


@pytest.mark.parametrize(("flags", "shadow"), [(0x102, Shadow.STI), (0x302, Shadow.NONE)])
def test_shadow_of_sti_that_is_single_stepped(flags: int, shadow: Shadow) -> None:
    """APM Vol. 3, "System Instruction Reference", "STI": none if interrupts were enabled before."""
    bench = EngineBench("fb9090f4", "real16")
    bench.state.rflags = flags
    assert isinstance(bench.run(), ExceptionTrap)
    assert (bench.state.shadow, bench.state.rip, bench.state.rflags & 0x200) == (shadow, CODE + 1, 0x200)
    bench.close()


def test_loads_of_ss_are_the_clients() -> None:
    for mode, codes in (("real16", ("8ed0", "17", "0fb21f")), ("long64", ("8ed0", "8e17", "0fb227"))):
        for code in codes:
            bench = EngineBench("90" + code, mode)
            assert bench.run() == InstructionTrap()
            assert (bench.state.rip, bench.state.shadow) == (CODE + 1, Shadow.NONE)
            bench.close()


def test_elapsed_within_a_callback_is_exact() -> None:
    """A device that reads the clock in the middle of a block sees the instructions before, not those after."""
    bench = EngineBench("ffc0e410ffc0e410f4", "protected32")
    bench.client.port_values = {0x10: 0}
    seen = []
    original = bench.client.port_in

    def port_in(port: int, size: int, cpl: int) -> int | None:
        seen.append(bench.engine.elapsed())
        return original(port, size, cpl)

    bench.client.port_in = port_in  # type: ignore[method-assign]
    assert bench.run() == InstructionTrap()
    assert seen == [2, 6]
    assert bench.engine.elapsed() == 8
    bench.close()


def test_request_to_stop__ends_the_run_at_the_next_block() -> None:
    # L: OUT 10h, AL; INC EBX; JMP L
    bench = EngineBench("e610ffc3ebfa", "protected32")
    bench.client.port_values = {0x10: 0}
    bench.state.gpr[3] = 0
    original = bench.client.port_out

    def port_out(port: int, size: int, value: int, cpl: int) -> bool:
        if bench.state.gpr[3] == 0 and len(bench.client.port_writes) == 2:
            bench.engine.request_stop()
        return original(port, size, value, cpl)

    bench.client.port_out = port_out  # type: ignore[method-assign]
    assert bench.run() == Interrupted()
    assert bench.state.rip == CODE
    assert bench.state.gpr[3] == 3
    assert len(bench.client.port_writes) == 3
    assert bench.engine.elapsed() == 18
    bench.close()


@COMPILED
def test_ins_in_a_block__is_reached_by_steps_within_the_budget(compiled: bool) -> None:
    bench = EngineBench("ffc0" * 4 + "6c" + "f4", compiled=compiled)
    bench.state.gpr[0] = 0
    assert bench.run(budget=8) == BudgetSpent()
    assert bench.engine.elapsed() == 0
    assert bench.run(budget=100) == InstructionTrap()
    assert (bench.state.rip, bench.state.gpr[0]) == (CODE + 8, 4)
    assert (bench.engine.elapsed(), bench.engine.instructions()) == (8, 4)
    assert bench.run(budget=100) == InstructionTrap()
    assert bench.state.rip == CODE + 8
    assert bench.run(step=True) == InstructionTrap()
    assert (bench.engine.elapsed(), bench.engine.instructions()) == (8, 4)
    bench.close()
