"""Fetches against the limit of CS: #GP(0) at the instruction that reaches beyond it, or at the near branch to there.

Spec: SDM Vol. 3, "Limit Checking"; Vol. 2, "JMP—Jump", "CALL—Call Procedure", "RET—Return From Procedure".
"""

from __future__ import annotations

import pytest
from processor_bench import ABSENT, CODE, DATA, STACK, ProcessorBench, long_mode, protected_mode, real_mode

from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState

A, C, D, B, SP, BP, SI, DI = range(8)
BEYOND = CODE + 0x800
COMPILED = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])


def bench_with(code: str, last: int, state: CpuState | None = None, *, compiled: bool = True) -> ProcessorBench:
    """``code`` at `CODE` in a code segment whose last byte is at offset ``last``."""
    bench = ProcessorBench(code, state or protected_mode(), compiled=compiled)
    bench.state.cs.limit = last
    bench.processor.load_control_state()
    return bench


@COMPILED
@pytest.mark.parametrize(
    ("code", "last", "place", "increments"),
    [
        ("40 90 b801020304", CODE + 5, CODE + 2, 1),  # INC EAX; NOP; MOV EAX, imm32 across the limit
        ("40 90 b801020304", CODE + 2, CODE + 2, 1),
        ("40 40 40", CODE + 1, CODE + 2, 2),  # the third is beyond it
        ("40 0fa2", CODE + 1, CODE + 1, 1),  # CPUID, which the model executes
        ("40 eb00 40", CODE + 2, CODE + 1, 1),  # a branch is beyond it, although the next instruction is all it goes to
        ("40 0f", CODE + 1, CODE + 1, 1),  # the begin of some instruction
        ("40 8b08", CODE + 1, CODE + 1, 1),
    ],
)
def test_instruction_that_reaches_beyond_the_limit__faults(
    code: str, last: int, place: int, increments: int, compiled: bool
) -> None:
    bench = bench_with(code, last, compiled=compiled)
    before = bench.state.gpr[A]
    event = bench.event()
    assert (event.vector, event.error_code, bench.state.rip) == (Vector.GP, 0, place)
    assert bench.state.gpr[A] == before + increments


@COMPILED
def test_code_up_to_the_limit__executes(compiled: bool) -> None:
    bench = bench_with("40 eb00 b801020304 0fa2 f4", CODE + 0xA, compiled=compiled)
    bench.run()
    assert bench.state.rip == CODE + 0xB


def test_invalid_opcode_up_to_the_limit__is_invalid() -> None:
    bench = bench_with("40 0f0b", CODE + 2)
    assert (bench.event().vector, bench.state.rip) == (Vector.UD, CODE + 1)


BRANCHES = {
    "jump": ("e9fa070000", {}),
    "jump-register": ("ffe7", {DI: BEYOND}),
    "jump-memory": ("ff26", {SI: DATA}),
    "call": ("e8fa070000", {}),
    "call-register": ("ffd7", {DI: BEYOND}),
    "call-memory": ("ff16", {SI: DATA}),
    "return": ("c3", {SP: DATA}),
    "return-with-pop": ("c21000", {SP: DATA}),
    "taken": ("0f84f9070000", {}),  # JE, with ZF set
    "loop": ("e27f", {C: 9}),
    "jecxz": ("e37f", {C: 0}),
}


@COMPILED
@pytest.mark.parametrize("step", [False, True], ids=["run", "step"])
@pytest.mark.parametrize("small_stack", [False, True], ids=["ESP", "SP"])
@pytest.mark.parametrize(("code", "registers"), BRANCHES.values(), ids=BRANCHES)
def test_near_branch_beyond_the_limit__faults_without_effect(
    code: str, registers: dict[int, int], small_stack: bool, step: bool, compiled: bool
) -> None:
    bench = bench_with("90" + code, CODE + 0x50, compiled=compiled)
    bench.memory.write_u32(DATA, BEYOND)
    state = bench.state
    if small_stack:
        state.ss.access_rights &= ~0x4000
        state.gpr[SP] |= 0x5_0000
    state.rflags |= 0x40
    for number, value in registers.items():
        state.gpr[number] = state.gpr[number] & 0xFFFF_0000 | value if number == SP else value
    before = list(state.gpr)
    if step:
        state.rip += 1
        bench.processor.step_next = True
    event = bench.event()
    assert (event.vector, event.error_code, state.rip) == (Vector.GP, 0, CODE + 1)
    assert state.gpr == before


def test_branch_that_is_not_taken__goes_on() -> None:
    bench = bench_with("0f84f9070000 f4", CODE + 0x50)
    bench.state.rflags &= ~0x40
    bench.run()
    assert bench.state.rip == CODE + 7


def test_real_mode__does_not_wrap_at_64_kib() -> None:
    bench = ProcessorBench(state=real_mode())
    bench.put(0xFFFD, "4040 40 40")
    bench.state.rip = 0xFFFD
    event = bench.event()
    assert (event.vector, event.error_code, bench.state.rip) == (Vector.GP, 0, 0x1_0000)


def test_real_mode__far_jumps_move_the_segment() -> None:
    """The library knows the base of CS by itself there."""
    bench = ProcessorBench("ea00000010", real_mode())  # JMP 1000:0
    bench.put(0x1_0000, "eb0e")
    bench.put(0x1_0010, "40 f4")
    bench.run()
    assert bench.state.rip == 0x12


@pytest.mark.parametrize("code", ["e9fb7f0000", "ffe7"])
def test_limit__comes_before_paging(code: str) -> None:
    bench = bench_with(code, ABSENT - 1, long_mode(compatibility=True))
    bench.page(ABSENT, 0)
    bench.state.gpr[DI] = ABSENT
    event = bench.event()
    assert (event.vector, bench.state.rip) == (Vector.GP, CODE)


def test_instruction_across_the_limit_and_into_an_absent_page() -> None:
    bench = bench_with("", ABSENT - 1, long_mode(compatibility=True))
    bench.page(ABSENT, 0)
    bench.put(ABSENT - 3, "40 b801")
    bench.state.rip = ABSENT - 3
    event = bench.event()
    assert (event.vector, bench.state.rip) == (Vector.GP, ABSENT - 2)


def test_64_bit_mode__has_no_limit() -> None:
    bench = bench_with("90 ebff f4".replace("ff", "00"), 0, long_mode())
    bench.run()
    assert bench.state.rip == CODE + 4


def test_other_registers_of_the_stack__stay() -> None:
    """A CALL that faults has not moved the stack pointer, and what is pushed by it lies below."""
    bench = bench_with("90 e8fa070000", CODE + 0x50)
    bench.memory.write_u32(STACK, 0x1234_5678)
    bench.event()
    assert (bench.state.gpr[SP], bench.memory.read_u32(STACK)) == (STACK, 0x1234_5678)
