"""The conditions of branches, against what the engine does with them."""

from __future__ import annotations

import itertools

import pytest
from processor_bench import CODE, ProcessorBench, protected_mode

from vtx.x86 import conditions
from vtx.x86.decode import decode

FLAGS = (0x001, 0x004, 0x040, 0x080, 0x800)  # CF, PF, ZF, SF, OF
COUNTERS = (0, 1, 2, 0xFFFF, 0x1_0000, 0x1_0001, 0xFFFF_FFFF)


def agrees(bench: ProcessorBench, code: bytes, flags: int, counter: int) -> bool:
    """Execute ``code``, a branch over one NOP, and compare."""
    state = bench.state
    state.rip, state.rflags, state.gpr[1] = CODE, 2 | flags, counter
    bench.processor.step_next = True
    while state.rip == CODE:
        bench.processor.run_once()
    instruction = decode(code, state.code_bits)
    assert instruction is not None
    assert state.rip in (CODE + len(code), CODE + len(code) + 1)
    return conditions.holds(instruction, state) == (state.rip == CODE + len(code) + 1)


@pytest.mark.parametrize("condition", range(16))
def test_jcc(condition: int) -> None:
    code = bytes((0x70 | condition, 1))
    bench = ProcessorBench(code + b"\x90" * 8)
    for number in range(len(FLAGS) + 1):
        for flags in itertools.combinations(FLAGS, number):
            assert agrees(bench, code, sum(flags), 0), flags


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("opcode", [0xE0, 0xE1, 0xE2, 0xE3], ids=["LOOPNE", "LOOPE", "LOOP", "JrCXZ"])
@pytest.mark.parametrize("prefix", [b"", b"\x67"], ids=["", "address-size"])
def test_counters(bits: int, opcode: int, prefix: bytes) -> None:
    code = prefix + bytes((opcode, 1))
    bench = ProcessorBench(code + b"\x90" * 8, protected_mode() if bits == 32 else None)
    for counter in COUNTERS:
        for flags in (0, 0x40):
            assert agrees(bench, code, flags, counter), (hex(counter), flags)
