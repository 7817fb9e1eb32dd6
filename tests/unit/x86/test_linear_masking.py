"""Linear-address masking: which bits of which addresses, for which accesses, and what faults say.

Spec: SDM Vol. 3, "Linear-Address Pre-Processing".
"""

from __future__ import annotations

import pytest
from processor_bench import ABSENT, CODE, DATA, PRESENT, STACK, TABLES, USER, WRITABLE, ProcessorBench, long_mode

from vtx.x86.linear_masking import masked, masking
from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile
from vtx.x86.state import CpuState

LMA, LA57, LAM_SUP = 1 << 10, 1 << 12, 1 << 28
U57, U48 = 1 << 61, 1 << 62
LOAD, STORE, PUSH_POP, HLT = "488b07", "488907", "5058", "f4"  # RAX from [RDI], to [RDI]
RAX, RSP, RDI = 0, 4, 7
TAG_48, TAG_57 = 0x7FFF << 48, 0x3F << 57
TAG_15 = 0x2AAA << 48


@pytest.mark.parametrize(
    ("cr3", "cr4", "efer", "widths"),
    [
        (0, 0, LMA, None),
        (U57 | U48, LAM_SUP, 0, None),
        (U48, 0, LMA, (48, 64)),
        (U57, 0, LMA, (57, 64)),
        (U57 | U48, 0, LMA, (57, 64)),
        (0, LAM_SUP, LMA, (64, 48)),
        (0, LAM_SUP | LA57, LMA, (64, 57)),
        (U48, LAM_SUP | LA57, LMA, (48, 57)),
    ],
)
def test_which_bits(cr3: int, cr4: int, efer: int, widths: tuple[int, int] | None) -> None:
    assert masking(cr3, cr4, efer) == widths


@pytest.mark.parametrize(
    ("widths", "address", "expected"),
    [
        ((48, 64), 0x1234_0000_5678_9ABC, 0x0000_0000_5678_9ABC),
        ((48, 64), 0x1234_8000_5678_9ABC, 0x7FFF_8000_5678_9ABC),  # not canonical: bit 63 is kept
        ((48, 64), 0x9234_8000_5678_9ABC, 0x9234_8000_5678_9ABC),  # a supervisor address
        ((57, 64), 0x7E00_1234_5678_9ABC, 0x0000_1234_5678_9ABC),
        ((57, 64), 0x7F12_1234_5678_9ABC, 0x7F12_1234_5678_9ABC),
        ((64, 48), 0x9234_8000_5678_9ABC, 0xFFFF_8000_5678_9ABC),
        ((64, 48), 0x9234_0000_5678_9ABC, 0x8000_0000_5678_9ABC),
        ((64, 57), 0x81FF_8000_0000_0000, 0xFFFF_8000_0000_0000),
        ((64, 57), 0x1234_0000_0000_0000, 0x1234_0000_0000_0000),
    ],
)
def test_masked(widths: tuple[int, int], address: int, expected: int) -> None:
    assert masked(address, widths) == expected


def bench_of(code: str, cr3: int = U48, cr4: int = 0, **registers: int) -> ProcessorBench:
    state: CpuState = long_mode()
    state.cr3 |= cr3
    state.cr4 |= cr4
    for name, value in registers.items():
        state.gpr[("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi").index(name)] = value
    bench = ProcessorBench(code + HLT, state, profile=load_profile("everything"))
    # The upper half of the address space is the lower half once more.
    bench.memory.write_u64(TABLES + 8 * 511, TABLES + 0x1000 | PRESENT | WRITABLE | USER)
    bench.memory.write_u64(TABLES + 0x1000 + 8 * 511, TABLES + 0x2000 | PRESENT | WRITABLE | USER)
    bench.memory.write_u64(TABLES + 0x2000 + 8 * 511, TABLES + 0x3000 | PRESENT | WRITABLE | USER)
    return bench


def test_loads_and_stores() -> None:
    bench = bench_of(STORE + "31c0" + LOAD, rax=0x1234, rdi=DATA | TAG_15)
    assert bench.run().gpr[RAX] == 0x1234
    assert bench.memory.read_u64(DATA) == 0x1234


def test_different_tags_are_the_same_memory() -> None:
    bench = bench_of(STORE + "488b0e", rax=0x1234, rdi=DATA | TAG_15, rsi=DATA | TAG_48)
    assert bench.run().gpr[1] == 0x1234


def test_supervisor_addresses() -> None:
    address = 0xFFFF_FFFF_FFE0_0000 + DATA
    bench = bench_of(STORE, 0, LAM_SUP, rax=0x1234, rdi=address & ~TAG_15)
    bench.run()
    assert bench.memory.read_u64(DATA) == 0x1234
    bench = bench_of(STORE, U48, 0, rdi=address & ~TAG_15)
    assert bench.event().vector == Vector.GP


@pytest.mark.parametrize(
    ("cr3", "cr4", "address"),
    [
        pytest.param(0, LAM_SUP, DATA | TAG_15, id="not-of-user-addresses"),
        pytest.param(U57, 0, DATA | 1 << 50, id="bits-between"),
        pytest.param(U48, 0, DATA | 1 << 63, id="bit-63"),
        pytest.param(U48, 0, DATA | 1 << 47, id="bit-47"),
    ],
)
def test_what_stays_not_canonical(cr3: int, cr4: int, address: int) -> None:
    event = bench_of(LOAD, cr3, cr4, rdi=address).event()
    assert (event.vector, event.error_code) == (Vector.GP, 0)


def test_the_stack() -> None:
    bench = bench_of(PUSH_POP + "9c", rax=0x77, rsp=STACK | TAG_15)  # PUSHFQ, with the model's help or not
    state = bench.run()
    assert (state.gpr[RSP], bench.memory.read_u64(STACK - 8) & 0xFFFF) == ((STACK | TAG_15) - 8, 2)


def test_page_faults_report_the_masked_address() -> None:
    bench = bench_of(LOAD, rdi=ABSENT | 0x10 | TAG_15)
    bench.page(ABSENT, 0)
    event = bench.event()
    assert (event.vector, event.error_code, event.address) == (Vector.PF, 0, ABSENT | 0x10)


def test_fetches_are_not_masked() -> None:
    event = bench_of("ffe0", rax=CODE | TAG_15).event()
    assert (event.vector, event.error_code) == (Vector.GP, 0)


def test_operands_of_the_models_own_instructions() -> None:
    bench = bench_of("480fae07" + "0f0117", rdi=DATA | TAG_15)  # FXSAVE64 and LGDT [RDI]
    bench.run()
    assert bench.memory.read_u32(DATA + 24) == 0x1F80


def test_invlpg_of_a_tagged_address_is_of_no_page() -> None:
    """It neither faults nor invalidates: it is not masked."""
    bench = bench_of(LOAD + "c70600000000" + "0f013f" + LOAD, rdi=DATA | TAG_15, rsi=TABLES + 0x3000 + 8 * (DATA >> 12))
    bench.memory.write_u64(DATA, 0x55)
    assert bench.run().gpr[RAX] == 0x55


@pytest.mark.parametrize(
    ("profile", "value", "accepted"), [("everything", U57 | U48, True), ("skylake-server", U48, False)]
)
def test_cr3_has_the_bits(profile: str, value: int, accepted: bool) -> None:
    state = long_mode()
    state.gpr[RAX] = TABLES | value
    bench = ProcessorBench("0f22d8" + HLT, state, profile=load_profile(profile))
    if accepted:
        assert bench.run().cr3 == TABLES | value
    else:
        assert bench.event().vector == Vector.GP


@pytest.mark.parametrize(("profile", "accepted"), [("everything", True), ("skylake-server", False)])
def test_cr4_has_the_bit(profile: str, accepted: bool) -> None:
    state = long_mode()
    state.gpr[RAX] = state.cr4 | LAM_SUP
    bench = ProcessorBench("0f22e0" + HLT, state, profile=load_profile(profile))
    if accepted:
        assert bench.run().cr4 & LAM_SUP
    else:
        assert bench.event().vector == Vector.GP


def test_data_breakpoints_match_the_masked_address() -> None:
    bench = bench_of(STORE, rdi=DATA | TAG_15)
    bench.state.dr[0], bench.state.dr7 = DATA, 0x400 | 1 | 0b1001 << 16
    event = bench.event()
    assert (event.vector, event.debug) == (Vector.DB, 1)
