"""Random bytes as code, with random registers and tables, in every mode: no exception of Python, no hang."""

from __future__ import annotations

import random

import pytest
from processor_bench import (
    ABSENT,
    CODE,
    IDT,
    KERNEL_CODE_64,
    STACK,
    TSS,
    ProcessorBench,
    long_mode,
    protected_mode,
    real_mode,
)

from vtx.x86.outcome import NotModelled
from vtx.x86.state import CpuState

INSTRUCTIONS = 2000
BOUNDARIES = 3000
MODES = ("long", "long-user", "compatibility", "protected32", "protected16", "protected-user", "real")
# Prefixes, two-byte opcodes, string I/O, far transfers, returns, ENTER, HLT.
SPICE = bytes.fromhex("0f f3 66 cd f4 9d cf e8 ff 8e ea c8 6c 6e c4 62")


def _state(mode: str, source: random.Random) -> CpuState:
    if mode.startswith("long"):
        state = long_mode(3 if mode == "long-user" else 0)
    elif mode == "compatibility":
        state = long_mode(source.choice((0, 3)), compatibility=True)
    elif mode == "real":
        state = real_mode()
    else:
        state = protected_mode(3 if mode == "protected-user" else 0, bits=16 if mode == "protected16" else 32)
    for i in range(16):
        if source.random() < 0.7:
            state.gpr[i] = source.choice((source.getrandbits(64), source.getrandbits(16), source.getrandbits(21), 0))
    if not mode.startswith("long"):
        state.gpr[:] = [value & 0xFFFF_FFFF for value in state.gpr[:8]] + [0] * 8
    state.rflags |= source.choice((0, 0x100, 0x200, 0x3000, 0x4000, 0x10000, 0x40000))
    if source.random() < 0.3:
        state.gpr[4] = STACK
    return state


def _code(source: random.Random) -> bytes:
    code = bytearray(source.randbytes(256))
    if source.random() < 0.5:
        for i in range(0, 250, source.choice((3, 5, 9))):
            code[i] = source.choice(SPICE)
    return bytes(code)


def _fill_idt(bench: ProcessorBench, mode: str, source: random.Random) -> None:
    if source.random() < 0.5:
        bench.memory.write(IDT, source.randbytes(0x1000))
        return
    for vector in range(256):
        offset = CODE + source.randrange(200)
        if mode.startswith("long") or mode == "compatibility":
            bench.memory.write_u64(IDT + 16 * vector, offset | 8 << 16 | 0x8E00 << 32)
        elif mode != "real":
            kind = 0x8600 if mode == "protected16" else 0x8E00
            bench.memory.write_u64(IDT + 8 * vector, offset | 8 << 16 | kind << 32)


def _run(seed: int) -> tuple[object, ...]:
    source = random.Random(seed)
    mode = source.choice(MODES)
    bench = ProcessorBench(_code(source), _state(mode, source), deliver=True)
    _fill_idt(bench, mode, source)
    if mode != "real":
        bench.memory.write_u64(TSS + 4, STACK)
    processor = bench.processor
    processor.instruction_limit = INSTRUCTIONS
    boundaries = 0
    try:
        while not processor.finished and boundaries < BOUNDARIES:
            processor.run_once()
            boundaries += 1
    except NotModelled:
        pass  # says what is missing; that is an answer
    state = processor.state
    result = (tuple(state.gpr), state.rip, state.rflags, processor.instructions, processor.now(), boundaries)
    processor.engine.close()  # type: ignore[attr-defined]
    return result


@pytest.mark.parametrize("block", range(8))
def test_random_code(block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        _run(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(16))
def test_random_code__at_length(block: int) -> None:
    for seed in range(1000 + block * 50, 1050 + block * 50):
        _run(seed)


def test_random_code__is_reproducible() -> None:
    for seed in range(2000, 2030):
        assert _run(seed) == _run(seed)


def test_a_handler_that_faults_as_it_begins__ends_at_the_limit_of_instructions() -> None:
    bench = ProcessorBench("0f0b", deliver=True)  # ud2
    handler, stack_table = ABSENT, 1
    bench.page(ABSENT, 0)
    for vector in range(32):
        gate = handler & 0xFFFF | 8 << 16 | stack_table << 32 | 0x8E00 << 32
        bench.memory.write_u64(IDT + 16 * vector, gate)
    bench.memory.write_u64(TSS + 0x24, STACK)
    bench.descriptor(8, KERNEL_CODE_64)
    bench.processor.limit_instructions(50)
    bench.processor.run()
    assert bench.processor.at_instruction_limit
    assert bench.processor.instructions < 50


@pytest.mark.parametrize("compiled", [True, False])
def test_the_base_of_a_64_bit_code_segment__is_ignored_and_kept(*, compiled: bool) -> None:
    state = long_mode()
    state.cs.base = 0x20_0000
    bench = ProcessorBench("8ed8 48ffc3 f4", state, compiled=compiled)  # mov ds, ax; inc rbx; hlt
    state.gpr[0], state.gpr[3] = 0x10, 1
    bench.run()
    assert (state.gpr[3], state.rip, state.cs.base) == (2, CODE + 6, 0x20_0000)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_jump_into_the_middle_of_its_own_block__is_counted_as_another_block(*, compiled: bool) -> None:
    # mov eax, 0f4909090h; jmp back to its immediate: nop, nop, nop, hlt
    bench = ProcessorBench("b8909090f4 ebfa", protected_mode(), compiled=compiled)
    bench.run()
    assert bench.state.rip == CODE + 5
    assert bench.processor.instructions == 6
    assert bench.processor.engine.elapsed() == 7 + 3


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bits", [32, 16])
def test_a_near_jump_outside_64_bit_mode__goes_to_the_low_half_of_a_register(*, bits: int, compiled: bool) -> None:
    state = protected_mode(bits=bits)
    bench = ProcessorBench("66ffe7" if bits == 16 else "ffe7", state, compiled=compiled)  # jmp edi
    bench.put(CODE + 0x10, "90f4")
    state.gpr[7] = 0x4A84_EB03_0000_0000 | CODE + 0x10
    bench.run()
    assert state.rip == CODE + 0x12


@pytest.mark.parametrize("compiled", [True, False])
def test_rip_and_base_of_cs_outside_64_bit_mode__count_with_their_low_halves(*, compiled: bool) -> None:
    state = protected_mode()
    state.rip |= 1 << 44
    state.cs.base = 0xFFFF_8000_0000_0000
    bench = ProcessorBench("8ed8 f4", state, compiled=compiled)  # mov ds, eax; hlt
    state.gpr[0] = 0x10
    bench.run()
    assert (state.rip, state.cs.base) == (CODE + 3, 0xFFFF_8000_0000_0000)
