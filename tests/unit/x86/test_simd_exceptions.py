"""SIMD floating-point exceptions: flags where they are masked, #XM and no other effect where they are not.

Spec: SDM Vol. 1, "SIMD Floating-Point Exception Conditions"; Vol. 3, "Interrupt 19—SIMD Floating-Point Exception
(#XM)".
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import CODE, DATA, ProcessorBench, long_mode

from vtx.x86.outcome import Vector

IE, DE, ZE, OE, UE, PE = (1 << bit for bit in range(6))
MASKED = 0x1F80
FLUSH_TO_ZERO, DENORMALS_ARE_ZEROS = 1 << 15, 1 << 6
STMXCSR = "0fae1c2500800000"  # [DATA]

HUGE, TINY, SNAN, QNAN, INFINITY = 0x7F00_0000, 0x0080_0000, 0x7FA0_0000, 0x7FC0_0000, 0x7F80_0000
ONE, TWO, THREE, HALF = (int.from_bytes(struct.pack("<f", value), "little") for value in (1, 2, 3, 0.5))
THREE_64, HUGE_64 = 0x4008_0000_0000_0000, 0x7FE0_0000_0000_0000


def bench_with(code: str, xmm0: int, xmm1: int, mxcsr: int) -> ProcessorBench:
    bench = ProcessorBench(code + STMXCSR + "f4", long_mode())
    area = bytearray(bench.processor.engine.legacy_area())
    area[24:28] = mxcsr.to_bytes(4, "little")
    area[160:176], area[176:192] = xmm0.to_bytes(16, "little"), xmm1.to_bytes(16, "little")
    bench.processor.engine.set_legacy_area(bytes(area))
    return bench


def xmm0_of(bench: ProcessorBench) -> int:
    return int.from_bytes(bench.processor.engine.legacy_area()[160:176], "little")


def mxcsr_of(bench: ProcessorBench) -> int:
    return int.from_bytes(bench.processor.engine.legacy_area()[24:28], "little")


# Code, XMM0, XMM1, exceptions met, the result if they are masked (None: XMM0 is no destination).
CASES = {
    "addss": ("f30f58c1", ONE, TWO, 0, THREE),
    "divss inexact": ("f30f5ec1", ONE, THREE, PE, 0x3EAA_AAAB),
    "divss by zero": ("f30f5ec1", ONE, 0, ZE, INFINITY),
    "divss zero by zero": ("f30f5ec1", 0, 0, IE, 0xFFC0_0000),
    "mulss overflow": ("f30f59c1", HUGE, HUGE, OE | PE, INFINITY),
    "mulss underflow": ("f30f59c1", TINY, TINY, UE | PE, 0),
    "addss signalling NaN": ("f30f58c1", SNAN, ONE, IE, 0x7FE0_0000),
    "addss quiet NaN": ("f30f58c1", QNAN, ONE, 0, QNAN),
    "sqrtss": ("f30f51c1", 0, 0xBF80_0000, IE, 0xFFC0_0000),
    "minss": ("f30f5dc1", QNAN, ONE, IE, ONE),
    "cmpss": ("f30fc2c101", QNAN, ONE, IE, 0),
    # The upper bits of the predicate are reserved.
    "cmpeqss, bit 7": ("f30fc2c180", ONE, ONE, 0, 0xFFFF_FFFF),
    "cmpltss, bit 3": ("f30fc2c109", QNAN, ONE, IE, 0),
    "cmpunordss, bit 4": ("f30fc2c113", QNAN, ONE, 0, 0xFFFF_FFFF),
    "cmpneqss, bit 5": ("f30fc2c124", SNAN, ONE, IE, 0xFFFF_FFFF),
    "cmpnltss, bit 6": ("f30fc2c145", TWO, ONE, 0, 0xFFFF_FFFF),
    "cmpordss, all": ("f30fc2c1ff", QNAN, ONE, 0, 0),
    "cmplesd, bit 4": ("f20fc2c112", THREE_64 | 7 << 64, HUGE_64, 0, 0xFFFF_FFFF_FFFF_FFFF | 7 << 64),
    "cmpnleps, bit 3": ("0fc2c10e", ONE | TWO << 32 | ONE << 64, TWO | ONE << 32, 0, (1 << 96) - (1 << 32)),
    "cmppd, bit 7": ("660fc2c181", THREE_64 << 64, THREE_64 | HUGE_64 << 64, 0, (1 << 128) - 1),
    "ucomiss": ("0f2ec1", QNAN, ONE, 0, None),
    "comiss": ("0f2fc1", QNAN, ONE, IE, None),
    "cvtss2si": ("f30f2dc0", HUGE, 0, IE, None),
    "cvtss2si inexact": ("f3480f2dc0", HALF, 0, PE, None),
    "cvtsd2ss": ("f20f5ac1", 0, HUGE_64, OE | PE, INFINITY),
    "divsd": ("f20f5ec1", THREE_64, 0, ZE, 0x7FF0_0000_0000_0000),
    "divps in the third": ("0f5ec1", 0, ONE | ONE << 32 | ONE << 96, IE, 0xFFC0_0000 << 64),
    "roundss": ("660f3a0ac000", HALF, 0, PE, 0),
}


@pytest.mark.parametrize(("code", "xmm0", "xmm1", "met", "result"), CASES.values(), ids=CASES)
def test_masked__sets_flags_that_stay(code: str, xmm0: int, xmm1: int, met: int, result: int | None) -> None:
    bench = bench_with(code, xmm0, xmm1, MASKED | DE)
    bench.run()
    assert bench.memory.read_u32(DATA) == MASKED | DE | met == mxcsr_of(bench)
    assert xmm0_of(bench) == (xmm0 if result is None else result)


@pytest.mark.parametrize(("code", "xmm0", "xmm1", "met", "result"), CASES.values(), ids=CASES)
def test_unmasked__is_an_exception_without_effect(
    code: str, xmm0: int, xmm1: int, met: int, result: int | None
) -> None:
    for unmasked in (IE, ZE, OE, UE, PE):
        mxcsr = MASKED & ~(unmasked << 7)
        bench = bench_with("48ffc0" + code, xmm0, xmm1, mxcsr)  # INC RAX before it
        if not met & unmasked:
            bench.run()
            assert bench.memory.read_u32(DATA) == mxcsr | met
            continue
        registers = list(bench.state.gpr)
        event = bench.event()
        assert (event.vector, event.error_code, bench.state.rip) == (Vector.XM, None, CODE + 3)
        registers[0] += 1
        assert (bench.state.gpr, bench.state.rflags & 0x8D5) == (registers, 4)  # parity, of INC
        assert (xmm0_of(bench), mxcsr_of(bench)) == (xmm0, mxcsr | met)


def test_exceptions_before_the_computation__hide_those_after_it() -> None:
    bench = bench_with("0f59c1", HUGE | SNAN << 32, HUGE | ONE << 32, MASKED & ~(IE << 7))
    assert bench.event().vector == Vector.XM
    assert mxcsr_of(bench) == MASKED & ~(IE << 7) | IE


def test_exception_that_happened_before__is_not_raised_again() -> None:
    bench = bench_with("f30f58c1", ONE, TWO, MASKED & ~(ZE << 7) | ZE)
    bench.run()
    assert xmm0_of(bench) == THREE


def test_without_osxmmexcpt__is_an_invalid_opcode() -> None:
    bench = bench_with("f30f5ec1", ONE, 0, MASKED & ~(ZE << 7))
    bench.state.cr4 &= ~0x400
    bench.processor.load_control_state()
    bench.processor.reload = True
    assert (bench.event().vector, bench.state.rip) == (Vector.UD, CODE)


@pytest.mark.parametrize(("bit", "vector"), [(1 << 2, Vector.UD), (1 << 3, Vector.NM)])
def test_emulation_and_task_switched__come_first(bit: int, vector: Vector) -> None:
    bench = bench_with("f30f5ec1", ONE, 0, MASKED & ~(ZE << 7))
    bench.state.cr0 |= bit
    bench.processor.reload = True
    assert bench.event().vector == vector


def test_memory_operand__faults_before_it_is_divided_by() -> None:
    bench = bench_with("f30f5e042500900000", ONE, 0, MASKED & ~(ZE << 7))  # DIVSS XMM0, [9000H]
    bench.page(0x9000, 0)
    event = bench.event()
    assert (event.vector, event.address, xmm0_of(bench)) == (Vector.PF, 0x9000, ONE)


def test_unmasked_by_ldmxcsr_in_the_same_block() -> None:
    bench = bench_with("0fae142500800000 f30f5ec1", ONE, 0, MASKED)
    bench.memory.write_u32(DATA, MASKED & ~(ZE << 7))
    assert (bench.event().vector, bench.state.rip) == (Vector.XM, CODE + 8)


def test_strings_compared__are_no_arithmetic() -> None:
    bench = bench_with("be00800000 bf00800000 a7", 0, 0, 0x1F00 & ~(ZE << 7) | DE << 7)
    bench.run()
    assert bench.state.rip > CODE


DENORMAL, DENORMAL_64 = 0x0040_0000, 1 << 50
DENORMALS = {
    "source": ("f30f58c1", ONE, DENORMAL, DE),
    "destination": ("f30f58c1", DENORMAL, ONE, DE),
    "negative": ("f30f58c1", ONE, DENORMAL | 1 << 31, DE),
    "other elements of a scalar": ("f30f58c1", ONE | DENORMAL << 32, ONE | DENORMAL << 64, 0),
    "last element": ("0f58c1", 0, DENORMAL << 96, DE),
    "second element of two": ("660f58c1", 0, DENORMAL_64 << 64, DE),
    "low halves are no numbers": ("660f58c1", DENORMAL, THREE_64, DE),
    "beside a quiet NaN": ("f30f58c1", QNAN, DENORMAL, 0),
    "beside a signalling NaN": ("f30f58c1", DENORMAL, SNAN, IE),
    "divided by zero": ("f30f5ec1", DENORMAL, 0, ZE),
    "root": ("f30f51c1", DENORMAL, ONE, 0),
    "root of it": ("f30f51c1", ONE, DENORMAL, DE),
    "root of a negative one": ("f30f51c1", ONE, DENORMAL | 1 << 31, IE),
    "compared": ("0f2ec1", DENORMAL, ONE, DE),
    "widened": ("f30f5ac1", 0, DENORMAL, DE),
    "widened two": ("0f5ac1", 0, DENORMAL << 32, DE),
    "not widened": ("0f5ac1", 0, DENORMAL << 64, 0),
    "to an integer": ("f30f2dc1", 0, DENORMAL, 0),
    "rounded": ("660f3a0ac100", 0, DENORMAL, 0),
    "in memory": ("0f58042500900000", 0, 0, DE),
}


@pytest.mark.parametrize(("code", "xmm0", "xmm1", "met"), DENORMALS.values(), ids=DENORMALS)
def test_denormal_operand(code: str, xmm0: int, xmm1: int, met: int) -> None:
    """With the exception unmasked it is raised; with another one unmasked the flag is set."""
    for unmasked in (DE, OE):
        mxcsr = MASKED & ~(unmasked << 7)
        bench = bench_with(code, xmm0, xmm1, mxcsr)
        bench.memory.write_u64(0x9000, DENORMAL << 32)
        if met & unmasked:
            assert (bench.event().vector, bench.state.rip) == (Vector.XM, CODE)
            assert (xmm0_of(bench), mxcsr_of(bench)) == (xmm0, mxcsr | met)
        else:
            bench.run()
            assert mxcsr_of(bench) & 0x0F == met
            assert bench.memory.read_u32(DATA) == mxcsr_of(bench)


def test_denormals_are_zeros__hides_denormal_operands() -> None:
    bench = bench_with("f30f58c1", ONE, DENORMAL, MASKED & ~(DE << 7) | DENORMALS_ARE_ZEROS)
    bench.run()
    assert xmm0_of(bench) == ONE


def test_memory_operand__must_be_aligned_all_the_same() -> None:
    bench = bench_with("0f58042501900000", 0, 0, MASKED & ~(OE << 7))
    event = bench.event()
    assert (event.vector, event.error_code, bench.state.rip) == (Vector.GP, 0, CODE)


@pytest.mark.parametrize(
    ("mxcsr", "met", "result"),
    [
        (MASKED, 0, 0x0040_0000),
        (MASKED | FLUSH_TO_ZERO, UE | PE, 0),
        (MASKED & ~(UE << 7) | FLUSH_TO_ZERO, 0, 0x0040_0000),
    ],
)
def test_flush_to_zero__works_while_underflow_is_masked(mxcsr: int, met: int, result: int) -> None:
    bench = bench_with("f30f59c1", TINY, HALF, mxcsr)
    bench.run()
    assert (xmm0_of(bench), mxcsr_of(bench)) == (result, mxcsr | met)


def test_flush_to_zero__is_not_about_x87_arithmetic() -> None:
    # LDMXCSR from DATA; FLD, FMUL and FSTP at the third, fourth and fifth doubleword
    bench = ProcessorBench("0fae142500800000 d9042508800000 d80c250c800000 d91c2510800000 f4", long_mode())
    bench.memory.write_u32(DATA, MASKED | FLUSH_TO_ZERO)
    bench.memory.write_u32(DATA + 8, TINY)
    bench.memory.write_u32(DATA + 12, HALF)
    bench.run()
    assert bench.memory.read_u32(DATA + 16) == 0x0040_0000


def test_fxsave__stores_the_flags() -> None:
    bench = bench_with("f30f5ec1 480fae042500800000", ONE, 0, MASKED)  # FXSAVE64 [DATA]
    bench.put(CODE + 13, "f4")
    bench.run()
    assert bench.memory.read_u32(DATA + 24) == MASKED | ZE


def test_denormals_are_zeros__meets_no_exception() -> None:
    bench = bench_with("f30f58c1", 1, ONE, MASKED | DENORMALS_ARE_ZEROS)
    bench.run()
    assert (xmm0_of(bench), mxcsr_of(bench)) == (ONE, MASKED | DENORMALS_ARE_ZEROS)
