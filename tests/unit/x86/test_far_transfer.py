"""Far CALL, JMP and RET as machine code: checks, call gates, stack switches, non-canonical targets.

Spec: SDM Vol. 2, "CALL—Call Procedure", "JMP—Jump", "RET—Return From Procedure"; Vol. 3, "Call Gates", "Stack
Switching".
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import CODE, DATA, GDT, STACK, TSS, ProcessorBench, long_mode, protected_mode

from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState, Segment

GP, NP, SS, TS = Vector.GP, Vector.NP, Vector.SS, Vector.TS
ENTRY = 0x3000
INNER_STACK = 0xE000
CODE_64, DATA_0, CODE_32 = 0x08, 0x10, 0x18  # of the bench
TARGET, GATE, INNER_SS = 0x28, 0x40, 0x50
CODE_32_0, CODE_32_3 = 0x00CF_9B00_0000_FFFF, 0x00CF_FB00_0000_FFFF
CODE_64_0, CODE_64_3 = 0x00AF_9B00_0000_FFFF, 0x00AF_FB00_0000_FFFF
CONFORMING = 4 << 40
STACK_0, STACK_3 = 0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF
NOT_PRESENT = 0x80 << 40
NON_CANONICAL = 0x8000_0000_0000


def gate(selector: int, offset: int, *, kind: int = 12, dpl: int = 3, count: int = 0, present: bool = True) -> int:
    low = offset & 0xFFFF | selector << 16 | (offset >> 16 & 0xFFFF) << 48
    return low | count << 32 | (kind | dpl << 5 | present << 7) << 40


def far_bench(code: str, state: CpuState, **descriptors: int) -> ProcessorBench:
    """``code`` and HLT; the code segment of ``state`` is in the GDT; HLT at `ENTRY`."""
    bench = ProcessorBench(code + "f4", state)
    bench.put(ENTRY, "f4")
    if not state.long_mode:
        state.segments[1].selector = CODE_32 | state.cpl
        bench.descriptor(CODE_32, CODE_32_3 if state.cpl else CODE_32_0)
    for name, value in descriptors.items():
        bench.descriptor({"target": TARGET, "gate": GATE, "gate_high": GATE + 8, "inner": INNER_SS}[name], value)
    return bench


def through_pointer(bench: ProcessorBench, selector: int, offset: int, size: int) -> ProcessorBench:
    bench.memory.write(DATA, offset.to_bytes(size, "little") + struct.pack("<H", selector))
    bench.state.gpr[7] = DATA
    return bench


def unchanged(bench: ProcessorBench) -> tuple[object, ...]:
    state = bench.state
    return (state.rip, state.cs.selector, state.ss.selector, state.gpr[4])


JMP_64, CALL_64 = "48ff2f", "48ff1f"  # JMP, CALL m16:64 at [RDI]


class TestLongMode:
    """64-bit mode; the pointers are in memory, there are no others."""

    @pytest.mark.parametrize("code", [JMP_64, CALL_64])
    @pytest.mark.parametrize(
        ("selector", "offset", "descriptor", "vector", "error"),
        [
            pytest.param(TARGET, NON_CANONICAL, CODE_64_0, GP, 0, id="non-canonical"),
            pytest.param(TARGET, 0x1_0000_0000, CODE_32_0, GP, 0, id="beyond-the-limit"),
            pytest.param(0, ENTRY, CODE_64_0, GP, 0, id="null"),
            pytest.param(TARGET, ENTRY, STACK_0, GP, TARGET, id="data"),
            pytest.param(TARGET, ENTRY, CODE_64_3, GP, TARGET, id="dpl-3"),
            pytest.param(TARGET | 3, ENTRY, CODE_64_0, GP, TARGET, id="rpl-3"),
            pytest.param(TARGET, ENTRY, CODE_64_0 | 0x40 << 48, GP, TARGET, id="both-widths"),
            pytest.param(TARGET, ENTRY, CODE_64_0 & ~NOT_PRESENT, NP, TARGET, id="not-present"),
            pytest.param(TARGET, ENTRY, 0x0000_8900_6000_0067, GP, TARGET, id="task"),
            pytest.param(TARGET, ENTRY, gate(CODE_64, ENTRY, kind=4), GP, TARGET, id="16-bit-gate"),
            pytest.param(0x7C, ENTRY, CODE_64_0, GP, 0x7C, id="no-ldt"),
            pytest.param(0x80, ENTRY, CODE_64_0, GP, 0x80, id="beyond-the-gdt"),
        ],
    )
    def test_faults_at_the_instruction(
        self, code: str, selector: int, offset: int, descriptor: int, vector: Vector, error: int
    ) -> None:
        bench = through_pointer(far_bench(code, long_mode(), target=descriptor), selector, offset, 8)
        before = unchanged(bench)
        event = bench.event()
        assert (event.vector, event.error_code, unchanged(bench)) == (vector, error, before)

    @pytest.mark.parametrize("code", [JMP_64, CALL_64])
    def test_to_compatibility_mode(self, code: str) -> None:
        bench = through_pointer(far_bench(code, long_mode(), target=CODE_32_0), TARGET, ENTRY, 8)
        state = bench.run()
        assert (state.rip, state.cs.selector, state.in_64_bit_mode) == (ENTRY + 1, TARGET, False)
        if code == CALL_64:
            assert state.gpr[4] == STACK - 16
            assert (bench.memory.read_u64(STACK - 16), bench.memory.read_u64(STACK - 8)) == (CODE + 3, CODE_64)

    def test_call_to_a_stack_that_is_not_canonical(self) -> None:
        bench = through_pointer(far_bench(CALL_64, long_mode(), target=CODE_64_0), TARGET, ENTRY, 8)
        bench.state.gpr[4] = NON_CANONICAL + 8
        event = bench.event()
        assert (event.vector, event.error_code, bench.state.rip) == (SS, 0, CODE)

    @pytest.mark.parametrize(
        ("descriptor", "high", "vector", "error"),
        [
            pytest.param(gate(TARGET, ENTRY), 0, None, 0, id="good"),
            pytest.param(gate(TARGET, ENTRY), NON_CANONICAL >> 32, GP, 0, id="non-canonical"),
            pytest.param(gate(TARGET, ENTRY), 1 << 40, GP, GATE, id="type-in-the-upper-half"),
            pytest.param(gate(TARGET, ENTRY, present=False), 0, NP, GATE, id="gate-not-present"),
            pytest.param(gate(DATA_0, ENTRY), 0, GP, DATA_0, id="to-data"),
            pytest.param(gate(CODE_32, ENTRY), 0, GP, CODE_32, id="to-32-bit-code"),
            pytest.param(gate(0, ENTRY), 0, GP, 0, id="to-null"),
        ],
    )
    @pytest.mark.parametrize("code", [JMP_64, CALL_64])
    def test_gate(self, code: str, descriptor: int, high: int, vector: Vector | None, error: int) -> None:
        bench = far_bench(code, long_mode(), target=CODE_64_0, gate=descriptor, gate_high=high)
        through_pointer(bench, GATE, 0x1234, 8)
        if vector is None:
            assert (bench.run().rip, bench.state.cs.selector) == (ENTRY + 1, TARGET)
        else:
            event = bench.event()
            assert (event.vector, event.error_code, bench.state.rip) == (vector, error, CODE)

    @pytest.mark.parametrize("code", [JMP_64, CALL_64])
    def test_gate_to_an_inner_level(self, code: str) -> None:
        """CALL switches to RSP0 and a null SS; JMP may not change the privilege level."""
        state = long_mode(3)
        bench = far_bench(code, state, target=CODE_64_0, gate=gate(TARGET | 3, ENTRY), gate_high=0)
        through_pointer(bench, GATE | 3, 0, 8)
        bench.memory.write_u64(TSS + 4, INNER_STACK)
        if code == JMP_64:
            event = bench.event()
            assert (event.vector, event.error_code) == (GP, TARGET)
            return
        bench.run()
        assert (state.rip, state.cs.selector, state.cpl) == (ENTRY + 1, TARGET, 0)
        assert (state.ss.selector, state.ss.usable, state.gpr[4]) == (0, False, INNER_STACK - 32)
        frame = [bench.memory.read_u64(INNER_STACK - 32 + 8 * i) for i in range(4)]
        assert frame == [CODE + 3, CODE_64 | 3, STACK, 0x13]

    def test_gate_privilege(self) -> None:
        bench = far_bench(CALL_64, long_mode(3), target=CODE_64_0, gate=gate(TARGET, ENTRY, dpl=2), gate_high=0)
        event = through_pointer(bench, GATE | 3, 0, 8).event()
        assert (event.vector, event.error_code) == (GP, GATE)

    @pytest.mark.parametrize(("dpl", "rpl", "good"), [(0, 0, True), (2, 2, True), (2, 3, False), (0, 1, False)])
    def test_gate_privilege__counts_the_selector_too(self, dpl: int, rpl: int, good: bool) -> None:
        bench = far_bench(CALL_64, long_mode(), target=CODE_64_0, gate=gate(TARGET, ENTRY, dpl=dpl), gate_high=0)
        through_pointer(bench, GATE | rpl, 0, 8)
        if good:
            assert bench.run().rip == ENTRY + 1
        else:
            event = bench.event()
            assert (event.vector, event.error_code) == (GP, GATE)

    def test_gate_with_a_short_tss(self) -> None:
        bench = far_bench(CALL_64, long_mode(3), target=CODE_64_0, gate=gate(TARGET, ENTRY), gate_high=0)
        bench.state.tr.limit = 10
        event = through_pointer(bench, GATE | 3, 0, 8).event()
        assert (event.vector, event.error_code) == (TS, bench.state.tr.selector)

    @pytest.mark.parametrize(
        ("rip", "cs", "vector", "error"),
        [
            pytest.param(ENTRY, CODE_64, None, 0, id="good"),
            pytest.param(NON_CANONICAL, CODE_64, GP, 0, id="non-canonical"),
            pytest.param(ENTRY, 0, GP, 0, id="null"),
            pytest.param(ENTRY, DATA_0, GP, DATA_0, id="data"),
            pytest.param(ENTRY, CODE_64 | 3, GP, CODE_64, id="outer-rpl-inner-dpl"),
        ],
    )
    def test_return(self, rip: int, cs: int, vector: Vector | None, error: int) -> None:
        bench = far_bench("48cb", long_mode())
        bench.memory.write(STACK, struct.pack("<QQ", rip, cs))
        before = unchanged(bench)
        if vector is None:
            state = bench.run()
            assert (state.rip, state.gpr[4]) == (ENTRY + 1, STACK + 16)
        else:
            event = bench.event()
            assert (event.vector, event.error_code, unchanged(bench)) == (vector, error, before)

    def test_return_to_an_outer_level(self) -> None:
        state = long_mode()
        state.segments[3] = Segment(DATA_0, 0, 0xFFFF_FFFF, 0xC093)  # DPL 0: not for the outer level
        bench = far_bench("48ca1000", state, target=CODE_64_3, inner=STACK_3)
        bench.memory.write(STACK, struct.pack("<QQ16xQQ", ENTRY, TARGET | 3, INNER_STACK, INNER_SS | 3))
        bench.processor.run_once()
        assert (state.rip, state.cpl, state.ss.selector, state.gpr[4]) == (ENTRY, 3, INNER_SS | 3, INNER_STACK + 16)
        assert not state.segments[3].usable


class TestProtectedMode:
    """32-bit protected mode."""

    @pytest.mark.parametrize(
        ("code", "vector", "error"),
        [
            ("ea003000002800", None, 0),
            ("66ea00302800", None, 0),  # 16-bit offset
            ("ea003000000000", GP, 0),
            ("ea003000001000", GP, DATA_0),
        ],
    )
    def test_jump(self, code: str, vector: Vector | None, error: int) -> None:
        bench = far_bench(code, protected_mode(), target=CODE_32_0)
        if vector is None:
            assert (bench.run().rip, bench.state.cs.selector) == (ENTRY + 1, TARGET)
        else:
            event = bench.event()
            assert (event.vector, event.error_code) == (vector, error)

    def test_beyond_the_limit(self) -> None:
        bench = far_bench("ea003000002800", protected_mode(), target=0x0040_9B00_0000_2FFF)
        event = bench.event()
        assert (event.vector, event.error_code, bench.state.rip) == (GP, 0, CODE)

    @pytest.mark.parametrize("rpl", [0, 3])
    def test_conforming_code_keeps_the_level(self, rpl: int) -> None:
        state = protected_mode(3)
        bench = far_bench(
            "ea00300000" + (TARGET | rpl).to_bytes(2, "little").hex(), state, target=CODE_32_0 | CONFORMING
        )
        bench.run_to(ENTRY)
        assert (state.cs.selector, state.cpl) == (TARGET | 3, 3)

    @pytest.mark.parametrize(("kind", "size"), [(12, 4), (4, 2)])
    def test_call_gate_copies_parameters(self, kind: int, size: int) -> None:
        state = protected_mode(3)
        descriptor = gate(TARGET, ENTRY, kind=kind, count=2)
        bench = far_bench("9a000000004300", state, target=CODE_32_0, gate=descriptor, inner=STACK_0)
        letter = "I" if size == 4 else "H"
        bench.memory.write(TSS + 4, struct.pack("<IH", INNER_STACK, INNER_SS))
        bench.memory.write(STACK, struct.pack("<2" + letter, 0x1111, 0x2222))
        bench.run_to(ENTRY)
        assert (state.cs.selector, state.cpl, state.ss.selector) == (TARGET, 0, INNER_SS)
        assert state.gpr[4] == INNER_STACK - 6 * size
        frame = struct.unpack("<6" + letter, bench.memory.read(INNER_STACK - 6 * size, 6 * size))
        assert frame == (CODE + 7, CODE_32 | 3, 0x1111, 0x2222, STACK, 0x13)

    @pytest.mark.parametrize(
        ("selector", "descriptor", "vector", "error"),
        [
            pytest.param(0, STACK_0, TS, 0, id="null"),
            pytest.param(INNER_SS | 1, STACK_0, TS, INNER_SS, id="rpl"),
            pytest.param(INNER_SS, STACK_3, TS, INNER_SS, id="dpl"),
            pytest.param(INNER_SS, STACK_0 & ~(2 << 40), TS, INNER_SS, id="read-only"),
            pytest.param(INNER_SS, STACK_0 & ~NOT_PRESENT, SS, INNER_SS, id="not-present"),
            pytest.param(INNER_SS, 0x0040_9300_0000_0FFF, SS, INNER_SS, id="too-small"),
        ],
    )
    def test_inner_stack(self, selector: int, descriptor: int, vector: Vector, error: int) -> None:
        bench = far_bench(
            "9a000000004300", protected_mode(3), target=CODE_32_0, gate=gate(TARGET, ENTRY), inner=descriptor
        )
        bench.memory.write(TSS + 4, struct.pack("<IH", INNER_STACK, selector))
        before = unchanged(bench)
        event = bench.event()
        assert (event.vector, event.error_code, unchanged(bench)) == (vector, error, before)

    def test_call_and_return_across_levels(self) -> None:
        state = protected_mode(3)
        bench = far_bench("9a00000000430090", state, target=CODE_32_0, gate=gate(TARGET, ENTRY, count=1), inner=STACK_0)
        state.ss.selector = INNER_SS + 8 | 3
        state.ss.access_rights = 0xC0F3
        bench.descriptor(INNER_SS + 8, STACK_3)
        bench.memory.write(TSS + 4, struct.pack("<IH", INNER_STACK, INNER_SS))
        bench.put(ENTRY, "ca0400")
        bench.run_to(CODE + 7)
        assert (state.cs.selector, state.cpl, state.ss.selector) == (CODE_32 | 3, 3, INNER_SS + 8 | 3)
        assert state.gpr[4] == STACK + 4

    def test_single_step(self) -> None:
        bench = far_bench("ea003000002800", protected_mode(), target=CODE_32_0)
        bench.state.rflags |= 0x100
        assert (bench.event().vector, bench.state.rip) == (Vector.DB, ENTRY)

    def test_accessed_bit(self) -> None:
        bench = far_bench("ea003000002800", protected_mode(), target=CODE_32_0 & ~(1 << 40))
        bench.run()
        assert bench.memory.read_u64(GDT + TARGET) == CODE_32_0
