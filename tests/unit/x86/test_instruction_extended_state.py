"""XSAVE and XRSTOR, XSETBV and XGETBV, FXRSTOR and LDMXCSR, RDRAND and RDSEED as machine code.

Spec: SDM Vol. 1, "Managing State Using the XSAVE Feature Set", "MXCSR Control and Status Register"; Vol. 2, the
instructions' pages.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable

import pytest
from processor_bench import ABSENT, CODE, DATA, ProcessorBench, long_mode, protected_mode

from vtx.x86.event import Event
from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState

RAX, RCX, RDX = 0, 1, 2
GP0, UD, NM = (Vector.GP, 0), (Vector.UD, None), (Vector.NM, None)
OSFXSR, OSXSAVE, TS, EM = 1 << 9, 1 << 18, 1 << 3, 1 << 2
AREA, OTHER = DATA, DATA + 0x400
XSAVE, XRSTOR, XSAVE_OTHER = "480fae27", "480fae2f", "480fae26"  # at [RDI], and at [RSI]
X87, SSE = 1, 2


def enabled(xcr0: int = 3) -> CpuState:
    state = long_mode()
    state.cr4 |= OSXSAVE
    state.xcr0 = xcr0
    return state


def bench_of(code: str, state: CpuState | None = None, **registers: int) -> ProcessorBench:
    bench = ProcessorBench(code + "f4", state or enabled())
    values = {"rdi": AREA, "rsi": OTHER, "rax": 7, "rdx": 0, "rcx": 0} | registers
    for name, value in values.items():
        bench.state.gpr[("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi").index(name)] = value
    return bench


def fault(bench: ProcessorBench) -> tuple[object, object]:
    event: Event = bench.event()
    assert bench.places.pop() == bench.state.rip
    return event.vector, event.error_code


def image(*, xstate: int = 3, mxcsr: int = 0x1F80, fcw: int = 0x37F, xmm0: bytes = b"\x5a" * 16) -> bytes:
    """An XSAVE area in standard form."""
    area = bytearray(576)
    struct.pack_into("<H", area, 0, fcw)
    struct.pack_into("<I", area, 24, mxcsr)
    area[160:176] = xmm0
    struct.pack_into("<Q", area, 512, xstate)
    return bytes(area)


class TestXsave:
    def test_saves_what_is_loaded(self) -> None:
        bench = bench_of(XRSTOR + XSAVE_OTHER)
        bench.memory.write(AREA, image(mxcsr=0x3F80, fcw=0x27F))
        bench.run()
        saved = bench.memory.read(OTHER, 576)
        assert saved[160:176] == b"\x5a" * 16
        assert (saved[0:2], saved[24:28]) == (b"\x7f\x02", b"\x80\x3f\x00\x00")
        assert saved[512] & 3 == 3

    @pytest.mark.parametrize(("mask", "xcr0"), [(X87, 3), (7, X87)])
    def test_saves_only_what_is_asked_for_and_enabled(self, mask: int, xcr0: int) -> None:
        bench = bench_of(XSAVE, enabled(xcr0), rax=mask)
        bench.memory.write(AREA, b"\xee" * 576)
        bench.run()
        assert bench.memory.read(AREA + 160, 16) == b"\xee" * 16

    def test_restores_the_initial_state_of_what_is_not_in_the_area(self) -> None:
        bench = bench_of("0f2806" + XRSTOR + XSAVE_OTHER)  # MOVAPS XMM0, [RSI] first
        bench.memory.write(OTHER, b"\x77" * 16)
        bench.memory.write(AREA, image(xstate=X87))
        bench.run()
        assert bench.memory.read(OTHER + 160, 16) == bytes(16)

    @pytest.mark.parametrize("code", [XSAVE, XRSTOR])
    @pytest.mark.parametrize(
        ("cr0", "cr4", "rdi", "expected"),
        [
            pytest.param(0, 0, AREA, UD, id="not-enabled"),
            pytest.param(TS, OSXSAVE, AREA, NM, id="task-switched"),
            pytest.param(TS, OSXSAVE, AREA + 16, NM, id="task-switched-and-misaligned"),
            pytest.param(0, OSXSAVE, AREA + 16, GP0, id="misaligned"),
            pytest.param(0, OSXSAVE, 1 << 47, GP0, id="not-canonical"),
        ],
    )
    def test_faults(self, code: str, cr0: int, cr4: int, rdi: int, expected: tuple[object, object]) -> None:
        state = enabled()
        state.cr0, state.cr4 = state.cr0 | cr0, state.cr4 & ~OSXSAVE | cr4
        assert fault(bench_of(code, state, rdi=rdi)) == expected

    @pytest.mark.parametrize(
        ("area", "expected"),
        [
            pytest.param(image(xstate=4), GP0, id="not-enabled"),
            pytest.param(image(mxcsr=0x1_1F80), GP0, id="mxcsr"),
            pytest.param(image()[:520] + b"\x01" + image()[521:], GP0, id="header"),
        ],
    )
    def test_restore_of_bad_areas(self, area: bytes, expected: tuple[object, object]) -> None:
        bench = bench_of(XRSTOR)
        bench.memory.write(AREA, area)
        assert fault(bench) == expected

    def test_mxcsr_counts_only_with_sse(self) -> None:
        bench = bench_of(XRSTOR, rax=X87)
        bench.memory.write(AREA, image(mxcsr=0xFFFF_FFFF))
        bench.run()

    def test_segment_limit(self) -> None:
        state = protected_mode()
        state.cr4 |= OSXSAVE
        state.xcr0 = 3
        state.segments[3].limit = AREA + 575
        bench_of("0fae27", state).run()
        state = protected_mode()
        state.cr4 |= OSXSAVE
        state.segments[3].limit = AREA + 574
        assert fault(bench_of("0fae27", state)) == GP0

    def test_page_fault(self) -> None:
        bench = bench_of(XSAVE, rdi=ABSENT)
        bench.page(ABSENT, 0)
        event = bench.event()
        assert (event.vector, event.address) == (Vector.PF, ABSENT)


class TestXcr0:
    XSETBV, XGETBV = "0f01d1", "0f01d0"

    def test_write_and_read(self) -> None:
        bench = bench_of(self.XSETBV + "31c0" + self.XGETBV, enabled(1), rax=3)
        state = bench.run()
        assert (state.xcr0, state.gpr[RAX], state.gpr[RDX]) == (3, 3, 0)

    def test_both_components_of_mpx(self) -> None:
        assert bench_of(self.XSETBV, enabled(1), rax=0x19).run().xcr0 == 0x19

    def test_mpx_is_enabled_by_it(self) -> None:
        """BNDMK BND0, [RDI] before and BNDMK BND1, [RDI] after."""
        state = enabled(3)
        state.bndcfgs = 1
        bench = bench_of("f30f1b07" + self.XSETBV + "f30f1b0f", state, rax=0x1B)
        assert bench.run().lower_bounds == [0, AREA, 0, 0]

    @pytest.mark.parametrize(
        ("registers", "cpl"),
        [
            pytest.param({"rax": 2}, 0, id="without-x87"),
            pytest.param({"rax": 0xB}, 0, id="bndregs-without-bndcsr"),
            pytest.param({"rax": 0x13}, 0, id="bndcsr-without-bndregs"),
            pytest.param({"rax": 5}, 0, id="avx-without-sse"),
            pytest.param({"rax": 3, "rdx": 1 << 31}, 0, id="reserved"),
            pytest.param({"rax": 3, "rcx": 1}, 0, id="no-such-register"),
            pytest.param({"rax": 3}, 3, id="cpl-3"),
        ],
    )
    def test_bad_writes(self, registers: dict[str, int], cpl: int) -> None:
        state = enabled()
        for segment in state.segments:
            segment.access_rights |= cpl << 5
        assert fault(bench_of(self.XSETBV, state, **registers)) == GP0

    @pytest.mark.parametrize("code", [XSETBV, XGETBV])
    def test_needs_osxsave(self, code: str) -> None:
        assert fault(bench_of(code, long_mode())) == UD

    def test_high_halves_of_the_registers_do_not_count(self) -> None:
        bench = bench_of(self.XGETBV, rcx=1 << 32, rax=1 << 63)
        assert bench.run().gpr[RAX] == 3


class TestMxcsr:
    LDMXCSR, FXRSTOR = "0fae17", "0fae0f"

    @pytest.mark.parametrize("value", [0x1F80, 0xFFFF, 0])
    def test_load(self, value: int) -> None:
        bench = bench_of(self.LDMXCSR + "0fae1e", long_mode())  # STMXCSR [RSI]
        bench.memory.write(AREA, struct.pack("<I", value))
        bench.run()
        assert bench.memory.read_u32(OTHER) == value
        assert bench.processor.instructions == 3

    @pytest.mark.parametrize("bit", [16, 17, 31])
    @pytest.mark.parametrize("code", [LDMXCSR, FXRSTOR])
    def test_reserved_bits(self, code: str, bit: int) -> None:
        bench = bench_of(code, long_mode())
        value = struct.pack("<I", 0x1F80 | 1 << bit)
        bench.memory.write(AREA, value if code == self.LDMXCSR else image()[:24] + value + image()[28:512])
        assert fault(bench) == GP0

    @pytest.mark.parametrize(
        ("code", "cr0", "cr4", "expected"),
        [
            (LDMXCSR, EM, OSFXSR, UD),
            (LDMXCSR, EM | TS, OSFXSR, UD),
            (LDMXCSR, 0, 0, UD),
            (LDMXCSR, TS, OSFXSR, NM),
            (FXRSTOR, TS, OSFXSR, NM),
            (FXRSTOR, EM, OSFXSR, NM),
        ],
    )
    def test_not_available(self, code: str, cr0: int, cr4: int, expected: tuple[object, object]) -> None:
        state = long_mode()
        state.cr0, state.cr4 = state.cr0 & ~(TS | EM) | cr0, state.cr4 & ~OSFXSR | cr4
        assert fault(bench_of(code, state)) == expected

    def test_fxrstor(self) -> None:
        bench = bench_of(self.FXRSTOR + "0fae06", long_mode())  # FXSAVE [RSI]
        bench.memory.write(AREA, image()[:512])
        bench.run()
        assert bench.memory.read(OTHER + 160, 16) == b"\x5a" * 16

    def test_fxrstor_without_osfxsr__ignores_mxcsr(self) -> None:
        state = long_mode()
        state.cr4 &= ~OSFXSR
        bench = bench_of(self.FXRSTOR, state)
        bench.memory.write(AREA, image(mxcsr=0xFFFF_FFFF)[:512])
        bench.run()

    @pytest.mark.parametrize(
        ("start", "osfxsr", "stored"),
        [
            (long_mode, True, [(0, 416)]),
            (protected_mode, True, [(0, 288)]),
            (long_mode, False, [(0, 24), (32, 160)]),
            (protected_mode, False, [(0, 24), (32, 160)]),
        ],
    )
    def test_fxsave__what_is_stored(
        self, start: Callable[[], CpuState], osfxsr: bool, stored: list[tuple[int, int]]
    ) -> None:
        """SDM Vol. 2, "FXSAVE—Save x87 FPU, MMX Technology, and SSE State": the rest of memory stays as it was."""
        state = start()
        state.cr4 = state.cr4 | OSFXSR if osfxsr else state.cr4 & ~OSFXSR
        bench = bench_of("0fae06" + "0fae07", state)  # FXSAVE [RSI]; FXSAVE [RDI]
        bench.memory.write(OTHER, b"\x00" * 512)
        bench.memory.write(AREA, b"\xff" * 512)
        bench.run()
        one, other = bench.memory.read(OTHER, 512), bench.memory.read(AREA, 512)
        same = [position for position in range(512) if one[position] == other[position]]
        assert same == [position for begin, end in stored for position in range(begin, end)]

    # Whether FXSAVE and FXRSTOR leave the XMM registers out, where EFER.FFXSR is set.
    FAST = [(long_mode(), True), (long_mode(3), False), (long_mode(compatibility=True), False)]

    @pytest.mark.parametrize(("state", "fast"), FAST)
    @pytest.mark.parametrize("enable", [0, 1 << 14])
    def test_fast_fxsave_and_fxrstor(self, state: CpuState, fast: bool, enable: int) -> None:
        """APM Vol. 2, "Extended Feature Enable Register (EFER)": at CPL 0 of 64-bit mode, and MXCSR is not left out."""
        state = copy.deepcopy(state)
        state.efer |= enable
        bench = bench_of("0fae0f" + "0fae06", state)  # FXRSTOR [RDI]; FXSAVE [RSI]
        bench.memory.write(AREA, image(mxcsr=0x3F80, xmm0=b"\x5a" * 16)[:512])
        bench.memory.write(OTHER, b"\xcc" * 512)
        bench.processor.run_once()
        bench.processor.run_once()
        saved, xmm0 = bench.memory.read(OTHER, 512), bench.processor.engine.legacy_area()[160:176]
        assert saved[24:28] == b"\x80\x3f\x00\x00"
        assert (saved[160:176] == b"\xcc" * 16) == bool(fast and enable)
        assert (xmm0 == b"\x5a" * 16) != bool(fast and enable)

    def test_fxsave__pointers_have_32_bits_without_rex_w(self) -> None:
        load = "480fae0f"  # FXRSTOR64 [RDI]
        bench = bench_of(load + "0fae06" + "480fae07", long_mode())  # FXSAVE [RSI]; FXSAVE64 [RDI]
        area = bytearray(image()[:512])
        struct.pack_into("<QQ", area, 8, 0x1122_3344_5566_7788, 0x99AA_BBCC_DDEE_FF00)
        bench.memory.write(AREA, bytes(area))
        bench.run()
        assert bench.memory.read(OTHER + 8, 16) == struct.pack("<QQ", 0x5566_7788, 0xDDEE_FF00)
        assert bench.memory.read(AREA + 8, 16) == bytes(area[8:24])

    def test_fxsave__that_faults_stores_nothing(self) -> None:
        bench = bench_of("0fae06", long_mode(), rsi=ABSENT - 0x100)
        bench.page(ABSENT, 0)
        bench.memory.write(ABSENT - 0x100, b"\xcc" * 0x100)
        event = bench.event()
        assert (event.vector, event.address) == (Vector.PF, ABSENT)
        assert bench.memory.read(ABSENT - 0x100, 0x100) == b"\xcc" * 0x100

    @pytest.mark.parametrize("code", [LDMXCSR, "0fae1f", FXRSTOR, "0fae07"])
    def test_the_engine_is_not_asked(self, code: str) -> None:
        """They are executed by the model alone: it would take any value for MXCSR."""
        bench = bench_of(code, long_mode())
        bench.memory.write(AREA, image()[:512] if code == self.FXRSTOR else struct.pack("<I", 0x1F80))
        bench.processor.native = None  # type: ignore[method-assign, assignment]
        bench.run()
        assert bench.processor.instructions == 2


class TestRandom:
    RDRAND_RAX, RDSEED_RAX, RDRAND_EAX, RDRAND_AX = "480fc7f0", "480fc7f8", "0fc7f0", "660fc7f0"

    @pytest.mark.parametrize("code", [RDRAND_RAX, RDSEED_RAX])
    def test_number_and_flags(self, code: str) -> None:
        state = long_mode()
        state.rflags |= 0x8D4  # OF, SF, ZF, AF, PF
        bench = bench_of(code, state)
        bench.run()
        assert bench.state.rflags & 0x8D5 == 1
        assert bench.state.gpr[RAX] >> 32

    def test_same_seed_same_numbers(self) -> None:
        code = self.RDRAND_RAX + "4889c3" + self.RDRAND_RAX  # MOV RBX, RAX between
        first, second = (bench_of(code, long_mode()).run() for _ in range(2))
        assert (first.gpr[RAX], first.gpr[3]) == (second.gpr[RAX], second.gpr[3])
        assert first.gpr[RAX] != first.gpr[3]

    def test_other_seed_other_numbers(self) -> None:
        bench = bench_of(self.RDRAND_RAX, long_mode())
        bench.processor.random_state = 12345
        assert bench.run().gpr[RAX] != bench_of(self.RDRAND_RAX, long_mode()).run().gpr[RAX]

    @pytest.mark.parametrize(("code", "kept"), [(RDRAND_EAX, 0), (RDRAND_AX, 0xAAAA_BBBB_CCCC_0000)])
    def test_width(self, code: str, kept: int) -> None:
        state = bench_of(code, long_mode(), rax=0xAAAA_BBBB_CCCC_DDDD).run()
        bits = 32 if code == self.RDRAND_EAX else 16
        assert state.gpr[RAX] >> bits << bits == kept

    def test_steps_and_runs_agree(self) -> None:
        bench = bench_of(self.RDRAND_RAX * 3, long_mode())
        bench.state.rflags |= 0x100
        for _ in range(3):
            assert bench.event().vector == Vector.DB
        assert bench.state.rip == CODE + 12
        assert bench.state.gpr[RAX] == bench_of(self.RDRAND_RAX * 3, long_mode()).run().gpr[RAX]


def test_x87_exception_reports_at_the_next_waiting_instruction() -> None:
    """Divide by zero, unmasked; #MF with CR0.NE (SDM Vol. 3, "Interrupt 16—x87 FPU Floating-Point Error (#MF)")."""
    bench = bench_of("d92fd9eed9e8def1909bf4", long_mode())  # FLDCW; FLDZ; FLD1; FDIVRP; NOP; FWAIT
    bench.state.cr0 |= 1 << 5
    bench.memory.write(AREA, struct.pack("<H", 0x37B))
    assert fault(bench) == (Vector.MF, None)
    assert bench.state.rip == CODE + 9
