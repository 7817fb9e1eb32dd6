"""PUSHF, POPF, IRET, SYSCALL, SYSRET, SYSENTER, SYSEXIT: by the engine or by the model, they do the same.

While single-stepping the model executes POPF and IRET itself, otherwise the engine does; both are held to the rules of
SDM Vol. 2, the instructions' pages.
"""

from __future__ import annotations

import random

import pytest
from processor_bench import ABSENT, CODE, STACK, ProcessorBench, long_mode, protected_mode, real_mode

from vtx.x86.msr_table import (
    IA32_FMASK,
    IA32_LSTAR,
    IA32_STAR,
    IA32_SYSENTER_CS,
    IA32_SYSENTER_EIP,
    IA32_SYSENTER_ESP,
)
from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState

CF, PF, AF, ZF, SF, TF, IF, DF, OF = (1 << n for n in (0, 2, 4, 6, 7, 8, 9, 10, 11))
IOPL, NT, RF, VM, AC, VIF, VIP, ID = 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21
NON_CANONICAL = 1 << 47

BY = pytest.mark.parametrize("stepped", [False, True], ids=["engine", "model"])


def popped(value: int, old: int, cpl: int, size: int) -> int:
    """RFLAGS after POPF of ``value``, by the table of SDM Vol. 2, "POPF/POPFD/POPFQ—Pop Stack Into EFLAGS Register"."""
    writable = CF | PF | AF | ZF | SF | TF | DF | OF | NT | AC | ID
    if cpl == 0:
        writable |= IOPL | IF
    elif cpl <= (old & IOPL) >> 12:
        writable |= IF
    if size == 2:
        writable &= 0xFFFF
    result = old & ~writable | value & writable
    return result & ~(RF | VM) | 2


def run_one(bench: ProcessorBench, stepped: bool) -> None:
    """Execute one instruction, with a CPUID behind it to stop at."""
    bench.processor.step_next = stepped
    bench.processor.run_once()


@BY
@pytest.mark.parametrize(("cpl", "size"), [(0, 8), (0, 2), (3, 8), (3, 2)])
def test_popf(cpl: int, size: int, stepped: bool) -> None:
    source = random.Random(cpl * 16 + size)
    for _ in range(60):
        value = source.getrandbits(22) & ~TF  # a trap would be another test
        state = long_mode(cpl)
        state.rflags = source.getrandbits(22) & ~(
            TF | VM | RF | VIF | VIP | IF if cpl == 0 else TF | VM | RF | VIF | VIP
        )
        state.rflags |= 2
        old = state.rflags
        bench = ProcessorBench(("66" if size == 2 else "") + "9d0fa2", state)
        bench.memory.write_u64(STACK, value)
        run_one(bench, stepped)
        assert state.rflags == popped(value, old, cpl, size), (hex(value), hex(old))
        assert state.gpr[4] == STACK + size
        bench.processor.engine.close()  # type: ignore[attr-defined]


@BY
def test_popf_in_real_mode(stepped: bool) -> None:
    state = real_mode()
    bench = ProcessorBench("9d0fa2", state)
    bench.memory.write_u16(STACK, 0x7ED7 & ~TF)
    run_one(bench, stepped)
    assert state.rflags == 0x7ED7 & ~TF
    assert state.gpr[4] == STACK + 2


@pytest.mark.parametrize(("code", "size"), [("9c", 8), ("669c", 2)])
def test_pushf__hides_rf_and_vm(code: str, size: int) -> None:
    state = long_mode()
    state.rflags = 0x3F_7ED7 & ~(TF | VM | VIF | VIP)
    bench = ProcessorBench(code + "f4", state)
    bench.put(STACK - 8, b"\xaa" * 8)
    bench.run()
    expected = 0x3F_7ED7 & ~(TF | VM | RF | VIF | VIP)
    assert bench.memory.read(STACK - size, size) == (expected & (1 << 8 * size) - 1).to_bytes(size, "little")
    assert state.gpr[4] == STACK - size


def iret_frame(bench: ProcessorBench, values: tuple[int, ...], size: int = 8) -> None:
    for i, value in enumerate(values):
        bench.memory.write(STACK + size * i, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))


class TestIret:
    """IRET by the engine and by the model."""

    @BY
    @pytest.mark.parametrize("flags", [0x202, 0x3002, 0x40_0D7 & ~TF, 0x1_0002, 0x4_4CD7 & ~NT])
    def test_to_the_same_level(self, flags: int, stepped: bool) -> None:
        bench = ProcessorBench("48cf")
        bench.put(0x2000, "0fa2")
        iret_frame(bench, (0x2000, 0x08, flags, 0xB000, 0x10))
        run_one(bench, stepped)
        state = bench.state
        assert state.rip == 0x2000
        assert state.rflags == flags | 2
        assert state.gpr[4] == 0xB000
        assert state.segments[2].selector == 0x10

    @BY
    def test_to_user_mode__nulls_segments_it_may_not_have(self, stepped: bool) -> None:
        bench = ProcessorBench("48cf")
        bench.descriptor(0x28, 0x00AF_FB00_0000_FFFF)
        bench.state.segments[3].selector = 0x20  # user data stays
        bench.state.segments[3].access_rights = 0xC0F3
        bench.put(0x2000, "0fa2")
        iret_frame(bench, (0x2000, 0x2B, 0x202, 0xB000, 0x23))
        run_one(bench, stepped)
        state = bench.state
        assert state.cpl == 3
        assert (state.segments[1].selector, state.segments[2].selector) == (0x2B, 0x23)
        assert state.segments[3].selector == 0x20
        assert state.segments[0].selector & ~3 == 0
        assert not state.segments[0].usable

    @BY
    @pytest.mark.parametrize("target", [NON_CANONICAL, 1 << 63])
    def test_to_a_non_canonical_address__faults_at_the_iret(self, target: int, stepped: bool) -> None:
        bench = ProcessorBench("48cf")
        bench.processor.step_next = stepped
        iret_frame(bench, (target, 0x08, 0x2, 0xB000, 0x10))
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.GP, 0)
        assert bench.state.rip == CODE

    @BY
    @pytest.mark.parametrize(
        ("frame", "vector", "code"),
        [
            pytest.param((0x2000, 0x00, 2, 0xB000, 0x10), Vector.GP, 0, id="null-CS"),
            pytest.param((0x2000, 0x78 + 8, 2, 0xB000, 0x10), Vector.GP, 0x80, id="CS-beyond-GDT"),
            pytest.param((0x2000, 0x10, 2, 0xB000, 0x10), Vector.GP, 0x10, id="CS-is-data"),
            pytest.param((0x2000, 0x08, 2, 0xB000, 0x0B), Vector.GP, 0x08, id="SS-RPL"),
        ],
    )
    def test_bad_frame(self, frame: tuple[int, ...], vector: Vector, code: int, stepped: bool) -> None:
        bench = ProcessorBench("48cf")
        bench.processor.step_next = stepped
        iret_frame(bench, frame)
        event = bench.event()
        assert (event.vector, event.error_code) == (vector, code)
        assert (bench.state.rip, bench.state.gpr[4]) == (CODE, STACK)

    @BY
    def test_in_protected_mode(self, stepped: bool) -> None:
        bench = ProcessorBench("cf", protected_mode())
        bench.descriptor(0x08, 0x00CF_9B00_0000_FFFF)
        bench.put(0x2000, "0fa2")
        iret_frame(bench, (0x2000, 0x08, 0x0000_0246), 4)
        run_one(bench, stepped)
        assert bench.state.rip in (0x2000, 0x2002)
        assert bench.state.gpr[4] == STACK + 12
        assert bench.state.rflags & ~RF == 0x246

    @BY
    def test_in_real_mode(self, stepped: bool) -> None:
        bench = ProcessorBench("cf", real_mode())
        bench.put(0x3456, "0fa2")
        iret_frame(bench, (0x0456, 0x0300, 0x0246), 2)
        run_one(bench, stepped)
        state = bench.state
        assert state.rip in (0x456, 0x458)
        assert (state.segments[1].selector, state.segments[1].base) == (0x300, 0x3000)
        assert (state.gpr[4], state.rflags) == (STACK + 6, 0x246)


def fast_call_bench(code: str, state: CpuState | None = None) -> ProcessorBench:
    bench = ProcessorBench(code, state)
    values = bench.processor.msrs.values
    values[IA32_STAR] = 0x0018_0008 << 32  # SYSCALL: CS 08h, SS 10h; SYSRET: CS 18h + 16, SS 18h + 8
    values[IA32_LSTAR] = 0x2000
    values[IA32_FMASK] = IF | DF | TF
    values[IA32_SYSENTER_CS], values[IA32_SYSENTER_ESP], values[IA32_SYSENTER_EIP] = 0x08, 0xB000, 0x2100
    bench.put(0x2000, "0fa2f4")
    bench.put(0x2100, "0fa2f4")
    bench.state.efer |= 1
    bench.processor.load_control_state()
    return bench


class TestFastCalls:
    """SYSCALL and its relatives."""

    def test_syscall(self) -> None:
        state = long_mode(3)
        state.rflags = 0x4_0E93 & ~TF
        bench = fast_call_bench("0f05", state)
        bench.processor.run_once()
        assert (state.rip, state.cpl) == (0x2000, 0)
        assert (state.gpr[1], state.gpr[11]) == (CODE + 2, 0x4_0E93 & ~TF)
        assert state.rflags == 0x4_0E93 & ~(TF | IF | DF)
        assert (state.segments[1].selector, state.segments[2].selector) == (0x08, 0x10)

    def test_syscall_without_sce(self) -> None:
        bench = ProcessorBench("0f05")
        bench.state.efer &= ~1
        bench.processor.load_control_state()
        event = bench.event()
        assert event.vector == Vector.UD

    def test_sysret(self) -> None:
        """RFLAGS from R11, but RF, VM and reserved bits are cleared, bit 1 is set."""
        bench = fast_call_bench("480f07")
        state = bench.state
        state.gpr[1], state.gpr[11] = 0x2200, (1 << 64) - 1 - TF
        bench.processor.run_once()
        assert (state.rip, state.cpl) == (0x2200, 3)
        assert state.rflags == 0x3C_7FD7 - TF
        assert (state.segments[1].selector, state.segments[2].selector) == (0x2B, 0x23)
        assert state.segments[1].long

    def test_sysret_to_a_non_canonical_address__faults_in_the_kernel(self) -> None:
        """SDM Vol. 2, "SYSRET—Return From Fast System Call": #GP(0) with CPL 0."""
        bench = fast_call_bench("480f07")
        bench.state.gpr[1], bench.state.gpr[11] = NON_CANONICAL, 2
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.GP, 0)
        assert (bench.state.rip, bench.state.cpl) == (CODE, 0)

    def test_sysret_in_user_mode(self) -> None:
        bench = fast_call_bench("480f07", long_mode(3))
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.GP, 0)

    def test_sysenter(self) -> None:
        state = long_mode(3)
        state.rflags |= IF
        bench = fast_call_bench("0f34", state)
        bench.processor.run_once()
        assert (state.rip, state.gpr[4], state.cpl) == (0x2100, 0xB000, 0)
        assert (state.segments[1].selector, state.segments[2].selector) == (0x08, 0x10)
        assert not state.rflags & IF

    def test_sysenter_without_a_segment(self) -> None:
        bench = fast_call_bench("0f34", long_mode(3))
        bench.processor.msrs.values[IA32_SYSENTER_CS] = 0
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.GP, 0)

    def test_sysexit(self) -> None:
        bench = fast_call_bench("480f35")
        state = bench.state
        bench.put(0x2200, "0fa2")
        state.gpr[1], state.gpr[2] = 0xBBB0, 0x2200
        bench.processor.run_once()
        assert state.cpl == 3
        assert state.gpr[4] == 0xBBB0
        assert (state.segments[1].selector, state.segments[2].selector) == (0x08 + 32 + 3, 0x08 + 40 + 3)

    @pytest.mark.parametrize("register", [1, 2])
    def test_sysexit_to_a_non_canonical_address(self, register: int) -> None:
        bench = fast_call_bench("480f35")
        bench.state.gpr[1], bench.state.gpr[2] = 0xBBB0, 0x2200
        bench.state.gpr[register] = NON_CANONICAL
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.GP, 0)
        assert (bench.state.rip, bench.state.cpl) == (CODE, 0)


class TestSoftwareInterrupts:
    """INT n, INT3, INT1, INTO."""

    @pytest.mark.parametrize(
        ("code", "vector", "length"),
        [("cd21", 0x21, 2), ("cd03", 3, 2), ("cc", 3, 1), ("f1", 1, 1), ("f2cd55", 0x55, 3)],
    )
    def test_return_address_is_behind_the_instruction(self, code: str, vector: int, length: int) -> None:
        for cpl in (0, 3):
            state = long_mode(cpl)
            bench = ProcessorBench(code, state)
            event = bench.event()
            assert event.vector == vector
            assert event.saved_rip(state) == CODE + length

    def test_into_in_64_bit_mode_is_invalid(self) -> None:
        state = long_mode()
        state.rflags |= OF
        assert ProcessorBench("ce", state).event().vector == Vector.UD

    def test_stack_fault_of_pushf_has_the_right_address(self) -> None:
        bench = ProcessorBench("9c")
        bench.page(ABSENT, 0)
        bench.state.gpr[4] = ABSENT + 8
        event = bench.event()
        assert (event.vector, event.address) == (Vector.PF, ABSENT)
        assert bench.state.gpr[4] == ABSENT + 8
