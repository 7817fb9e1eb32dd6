"""Both formats of the XSAVE area, with layouts typed from the manual: XSAVEOPT, XSAVEC, XRSTOR, XGETBV with ECX 1.

Spec: SDM Vol. 1, "Managing State Using the XSAVE Feature Set", "Processor Tracking of XSAVE-Managed State".
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import CODE, DATA, PRESENT, USER, ProcessorBench, long_mode, protected_mode

from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile
from vtx.x86.state import CpuState

XSAVE, XSAVEOPT, XSAVEC = "480fae26", "480fae36", "480fc726"  # to [RSI]
XRSTOR, XGETBV = "480fae2f", "0f01d0"  # XRSTOR from [RDI]
SET_XMM0, SET_MXCSR = "0f1003", "0fae13"  # MOVUPS and LDMXCSR from [RBX]
FNINIT, FLD1 = "dbe3", "d9e8"
PKE, OSXSAVE = 1 << 22, 1 << 18
X87, SSE, PKRU, ALL = 1, 2, 0x200, 0x203
COMPACTED = 1 << 63
FROM, TO, SOURCE = DATA, DATA + 0x1000, DATA + 0x3000
INTEL, AMD = "everything", "everything-amd"


def bench_of(
    code: str, *, profile: str = INTEL, asked: int = ALL, xcr0: int = ALL, state: CpuState | None = None, pkru: int = 0
) -> ProcessorBench:
    state = long_mode() if state is None else state
    state.cr4 |= PKE | OSXSAVE
    state.xcr0, state.pkru = xcr0, pkru
    state.gpr[0], state.gpr[1], state.gpr[2], state.gpr[3] = asked, 0, 0, SOURCE
    state.gpr[6], state.gpr[7] = TO, FROM
    bench = ProcessorBench(code + "f4", state, profile=load_profile(profile))
    bench.memory.write(TO, b"\xcc" * 0xB00)
    bench.memory.write(TO + 512, bytes(64))
    bench.memory.write(SOURCE, struct.pack("<I", 0x1FA0) + b"\x5a" * 12)  # an MXCSR, and something for XMM0
    return bench


def written(bench: ProcessorBench) -> list[tuple[int, int]]:
    """Where the area does not have what it was filled with, in runs of bytes."""
    area = bench.memory.read(TO, 512) + b"\xcc" * 64 + bench.memory.read(TO + 576, 0xB00 - 576)
    runs: list[tuple[int, int]] = []
    for position in (position for position, value in enumerate(area) if value != 0xCC):
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def header(bench: ProcessorBench) -> tuple[int, int]:
    return bench.memory.read_u64(TO + 512), bench.memory.read_u64(TO + 520)


@pytest.mark.parametrize(("profile", "offset"), [(INTEL, 2688), (AMD, 2432)])
@pytest.mark.parametrize("code", [XSAVE, XSAVEOPT])
def test_pkru_in_the_standard_format(profile: str, offset: int, code: str) -> None:
    bench = bench_of(code, profile=profile, asked=PKRU, pkru=0x5555_5554)
    bench.run()
    assert written(bench) == [(offset, offset + 8)]
    assert bench.memory.read_u64(TO + offset) == 0x5555_5554
    assert header(bench) == (PKRU, 0)


@pytest.mark.parametrize("profile", [INTEL, AMD])
def test_pkru_in_the_compacted_format__follows_the_header(profile: str) -> None:
    bench = bench_of(XSAVEC, profile=profile, asked=PKRU, pkru=0x5555_5554)
    bench.run()
    assert written(bench) == [(576, 584)]
    assert bench.memory.read_u64(TO + 576) == 0x5555_5554
    assert header(bench) == (PKRU, COMPACTED | PKRU)


@pytest.mark.parametrize(
    ("code", "runs"),
    [
        # XSAVE stores what is requested, and MXCSR with its mask; the others leave out what is not in use.
        (XSAVE, [(0, 416), (2688, 2696)]),
        (XSAVEOPT, [(24, 32)]),
        (XSAVEC, []),
    ],
)
def test_initial_configuration(code: str, runs: list[tuple[int, int]]) -> None:
    bench = bench_of(FNINIT + code)
    bench.run()
    assert written(bench) == runs
    assert header(bench) == (0, COMPACTED | ALL if code == XSAVEC else 0)


@pytest.mark.parametrize(
    ("before", "pkru", "in_use", "runs"),
    [
        (FLD1, 0, X87, [(0, 24), (32, 160)]),
        (SET_XMM0, 0, SSE, [(24, 32), (160, 416)]),
        ("", 4, PKRU, [(576, 584)]),
        (FLD1 + SET_XMM0, 4, ALL, [(0, 416), (576, 584)]),
        # MXCSR alone is no use of SSE state, but is stored with it
        (SET_MXCSR, 0, SSE, [(24, 32), (160, 416)]),
    ],
)
def test_compacted__stores_what_is_in_use(before: str, pkru: int, in_use: int, runs: list[tuple[int, int]]) -> None:
    bench = bench_of(FNINIT + before + XSAVEC, pkru=pkru)
    bench.run()
    assert written(bench) == runs
    assert header(bench) == (in_use, COMPACTED | ALL)


def test_mxcsr_alone__is_not_in_use() -> None:
    bench = bench_of(FNINIT + SET_MXCSR + XSAVE)
    bench.run()
    assert header(bench) == (0, 0)
    assert bench.memory.read_u32(TO + 24) == 0x1FA0
    assert bench_of(FNINIT + SET_MXCSR + "ffc1" + XGETBV).run().gpr[0] == 0  # INC ECX


def test_save_keeps_what_the_header_says_of_other_components() -> None:
    bench = bench_of(FLD1 + XSAVE, asked=X87)
    bench.memory.write_u64(TO + 512, 0xFF00_0000_0000_0006)
    bench.run()
    assert header(bench) == (0xFF00_0000_0000_0007, 0)


@pytest.mark.parametrize("code", [XSAVE, XSAVEOPT])
def test_save_clears_what_the_header_says_of_requested_components(code: str) -> None:
    """They are in their initial configuration now, and those that are not requested may still be present."""
    bench = bench_of(FNINIT + code, asked=X87 | PKRU)
    bench.memory.write_u64(TO + 512, 0xFFFF)
    bench.run()
    assert header(bench) == (0xFDFE, 0)


def test_registers_that_the_mode_has_not() -> None:
    """Outside 64-bit mode, XMM8 to XMM15 are neither stored nor loaded."""
    bench = bench_of("0fae26", state=protected_mode(), asked=SSE, xcr0=3)
    bench.run()
    assert written(bench) == [(24, 32), (160, 288)]
    load = bench_of("0fae2f", state=protected_mode(), asked=SSE, xcr0=3)
    area = bytearray(576)
    struct.pack_into("<I", area, 24, 0x1F80)
    area[160:416] = b"\x77" * 256
    struct.pack_into("<Q", area, 512, SSE)
    load.memory.write(FROM, bytes(area))
    load.run()
    assert load.processor.engine.legacy_area()[160:416] == b"\x77" * 128 + bytes(128)


@pytest.mark.parametrize(
    ("before", "pkru", "expected"), [("", 0, 0), (FLD1, 0, X87), (SET_XMM0, 0, SSE), (FLD1 + SET_XMM0, 4, ALL)]
)
def test_components_in_use(before: str, pkru: int, expected: int) -> None:
    state = bench_of(FNINIT + before + "ffc1" + XGETBV, pkru=pkru).run()
    assert (state.gpr[0], state.gpr[2]) == (expected, 0)


def test_components_in_use__are_those_enabled() -> None:
    assert bench_of(FLD1 + SET_XMM0 + "ffc1" + XGETBV, xcr0=X87, pkru=4).run().gpr[0] == X87


@pytest.mark.parametrize(("code", "vector"), [("ffc1" + XGETBV, Vector.GP), (XSAVEC, Vector.UD), (XSAVEOPT, Vector.UD)])
def test_not_on_a_processor_without_them(code: str, vector: Vector) -> None:
    bench = bench_of(code, profile="skylake-server")
    assert bench.event().vector == vector


def area(xstate: int, xcomp: int, pkru_at: int, pkru: int = 0x3C, reserved: tuple[int, int] = (16, 0)) -> bytes:
    """An area with FCW 27FH, MXCSR 3F80H, XMM0 full of 77H; ``reserved`` is a byte of the header and its value."""
    data = bytearray(max(pkru_at + 8, 2696))
    struct.pack_into("<H", data, 0, 0x27F)
    struct.pack_into("<I", data, 24, 0x3F80)
    data[160:176] = b"\x77" * 16
    struct.pack_into("<QQ", data, 512, xstate, xcomp)
    data[512 + reserved[0]] = reserved[1]
    struct.pack_into("<Q", data, pkru_at, pkru | 0xFFFF_FFFF << 32)  # the high half is padding
    return bytes(data)


@pytest.mark.parametrize(
    ("profile", "xcomp", "pkru_at"),
    [(INTEL, 0, 2688), (AMD, 0, 2432), (INTEL, COMPACTED | ALL, 576), (AMD, COMPACTED | ALL, 576)],
)
class TestRestore:
    @pytest.mark.parametrize(
        ("xstate", "fcw", "xmm0", "pkru"),
        [
            (ALL, 0x27F, b"\x77", 0x3C),
            (X87, 0x27F, b"\0", 0),
            (SSE, 0x37F, b"\x77", 0),
            (PKRU, 0x37F, b"\0", 0x3C),
            (0, 0x37F, b"\0", 0),
        ],
    )
    def test_loads_what_is_present__the_rest_is_initial(
        self, profile: str, xcomp: int, pkru_at: int, xstate: int, fcw: int, xmm0: bytes, pkru: int
    ) -> None:
        bench = bench_of(SET_XMM0 + FLD1 + XRSTOR, profile=profile, pkru=0x1110)
        bench.memory.write(FROM, area(xstate, xcomp, pkru_at))
        bench.run()
        legacy = bench.processor.engine.legacy_area()
        assert (int.from_bytes(legacy[:2], "little"), legacy[160:176], bench.state.pkru) == (fcw, xmm0 * 16, pkru)
        # In the standard format MXCSR is loaded whether or not SSE state is present.
        mxcsr = 0x3F80 if xstate & SSE or not xcomp else 0x1F80
        assert int.from_bytes(legacy[24:28], "little") == mxcsr

    @pytest.mark.parametrize("missing", [X87, SSE, PKRU])
    def test_leaves_alone_what_is_not_requested(self, profile: str, xcomp: int, pkru_at: int, missing: int) -> None:
        bench = bench_of(FNINIT + SET_XMM0 + XRSTOR, profile=profile, pkru=0x1110, asked=ALL & ~missing)
        bench.memory.write(FROM, area(ALL, xcomp, pkru_at))
        bench.run()
        legacy = bench.processor.engine.legacy_area()
        kept = {X87: legacy[:2] == b"\x7f\x03", PKRU: bench.state.pkru == 0x1110}
        kept[SSE] = legacy[160:176] == struct.pack("<I", 0x1FA0) + b"\x5a" * 12 and legacy[24:28] == b"\x80\x1f\0\0"
        assert [component for component, same in kept.items() if same] == [missing]


@pytest.mark.parametrize(
    ("xstate", "xcomp", "xcr0", "reserved"),
    [
        pytest.param(4, 0, ALL, (16, 0), id="standard-component-not-enabled"),
        pytest.param(PKRU, 0, 3, (16, 0), id="standard-pkru-not-enabled"),
        pytest.param(3, 1, ALL, (16, 0), id="format-without-bit-63"),
        pytest.param(3, 0, ALL, (23, 1), id="standard-reserved"),
        pytest.param(PKRU, COMPACTED | 3, ALL, (16, 0), id="present-and-not-in-the-format"),
        pytest.param(3, COMPACTED | ALL, 3, (16, 0), id="format-not-enabled"),
        pytest.param(3, COMPACTED | ALL | 1 << 62, ALL, (16, 0), id="format-bit-62"),
        pytest.param(3, COMPACTED | ALL | 1 << 13, ALL, (16, 0), id="supervisor-component"),
        pytest.param(3, COMPACTED | ALL, ALL, (63, 1), id="compacted-reserved"),
    ],
)
def test_restore__refuses_headers(xstate: int, xcomp: int, xcr0: int, reserved: tuple[int, int]) -> None:
    bench = bench_of(XRSTOR, xcr0=xcr0, pkru=8)
    bench.memory.write(FROM, area(xstate, xcomp, 2688, reserved=reserved))
    event = bench.event()
    assert (event.vector, event.error_code, bench.state.rip, bench.state.pkru) == (Vector.GP, 0, CODE, 8)


def test_restore__what_follows_the_third_quadword_does_not_count_in_the_standard_format() -> None:
    bench = bench_of(XRSTOR)
    bench.memory.write(FROM, area(PKRU, 0, 2688, reserved=(24, 1)))
    assert bench.run().pkru == 0x3C


def test_restore__compacted_format_is_unknown_without_xsavec() -> None:
    bench = bench_of(XRSTOR, profile="skylake-server")
    bench.memory.write(FROM, area(3, COMPACTED | 3, 2688))
    assert bench.event().vector == Vector.GP


@pytest.mark.parametrize("code", [XSAVE, XSAVEOPT, XSAVEC])
def test_nothing_is_stored_unless_all_can_be(code: str) -> None:
    """The end of the area is on a page that cannot be written."""
    bench = bench_of(FLD1 + code, state=long_mode(3), pkru=4)
    place = 576 if code == XSAVEC else 2688  # of PKRU: the first thing on the page after `boundary`
    boundary = TO + 0x1000
    bench.state.gpr[6] = boundary - place
    bench.memory.write(TO, b"\xcc" * 0x2000)
    bench.page(boundary, PRESENT | USER)
    event = bench.event()
    assert (event.vector, event.error_code, event.address) == (Vector.PF, 7, boundary)
    assert bench.memory.read(TO, 0x1000) == b"\xcc" * 0x1000


@pytest.mark.parametrize("limit", [2695, 2694])
def test_segment_limit__of_the_last_component(limit: int) -> None:
    state = protected_mode()
    bench = bench_of("0fae26", state=state, asked=PKRU)
    bench.state.segments[3].limit = TO + limit
    if limit == 2695:
        bench.run()
    else:
        assert bench.event().vector == Vector.GP


def test_restored_mxcsr_counts_at_once() -> None:
    """The area unmasks division by zero: the DIVPS that follows raises #XM."""
    state = long_mode()
    state.cr4 |= 1 << 10  # OSXMMEXCPT
    bench = bench_of(XRSTOR + "0f5ec1", state=state)  # DIVPS XMM0, XMM1
    data = bytearray(area(SSE, 0, 2688))
    struct.pack_into("<I", data, 24, 0x1D80)
    bench.memory.write(FROM, bytes(data))
    assert bench.event().vector == Vector.XM


class TestMpx:
    """Four pairs of bounds; BNDCFGU and BNDSTATUS. 64 bytes each, of which the second component uses 16."""

    BNDREGS, BNDCSR = 8, 16
    BOTH, WITH_MPX = 24, 0x21B
    BOUNDS = struct.pack("<8Q", *range(1, 9))
    CONFIGURATION = struct.pack("<2Q", 0x7000_0003, 0x8001).ljust(64, b"\0")

    def bench(self, code: str, *, profile: str = INTEL, asked: int = BOTH, xcr0: int = WITH_MPX) -> ProcessorBench:
        bench = bench_of(code, profile=profile, asked=asked, xcr0=xcr0)
        bench.memory.write(FROM, bytes(0xB00))
        return bench

    def used(self, code: str, **options: int) -> ProcessorBench:
        bench = self.bench(code, **options)
        state = bench.state
        state.lower_bounds[:], state.upper_bounds[:] = [1, 3, 5, 7], [2, 4, 6, 8]
        state.bndcfgu, state.bndstatus = 0x7000_0003, 0x8001
        return bench

    @pytest.mark.parametrize("profile", [INTEL, "skylake-server"])
    def test_standard_format(self, profile: str) -> None:
        bench = self.used(XSAVE, profile=profile)
        bench.run()
        assert bench.memory.read(TO + 960, 128) == self.BOUNDS + self.CONFIGURATION
        assert written(bench) == [(960, 1088)]
        assert header(bench) == (self.BOTH, 0)

    def test_compacted_format(self) -> None:
        bench = self.used(XSAVEC)
        bench.run()
        assert bench.memory.read(TO + 576, 128) == self.BOUNDS + self.CONFIGURATION
        assert header(bench) == (self.BOTH, COMPACTED | self.BOTH)

    @pytest.mark.parametrize("asked", [BNDREGS, BNDCSR])
    def test_one_component(self, asked: int) -> None:
        bench = self.used(XSAVEC, asked=asked)
        bench.run()
        expected = self.BOUNDS if asked == self.BNDREGS else self.CONFIGURATION
        assert bench.memory.read(TO + 576, 64) == expected
        assert written(bench) == [(576, 640)]

    @pytest.mark.parametrize("code", [XSAVEOPT, XSAVEC])
    def test_initial_state_is_not_stored(self, code: str) -> None:
        bench = self.bench(code)
        bench.run()
        assert (written(bench), header(bench)[0]) == ([], 0)

    @pytest.mark.parametrize(
        ("name", "value", "in_use"),
        [("upper_bounds", [0, 0, 0, 1], BNDREGS), ("bndcfgu", 2, BNDCSR), ("bndstatus", 1, BNDCSR)],
    )
    def test_in_use(self, name: str, value: object, in_use: int) -> None:
        bench = self.bench(XGETBV)
        bench.state.gpr[1] = 1
        setattr(bench.state, name, value)
        assert bench.run().gpr[0] & self.BOTH == in_use

    def test_not_enabled(self) -> None:
        bench = self.used(XSAVE, xcr0=ALL)
        bench.run()
        assert (written(bench), header(bench)) == ([], (0, 0))

    @pytest.mark.parametrize("compacted", [False, True])
    def test_restore(self, compacted: bool) -> None:
        bench = self.bench(XRSTOR)
        bench.memory.write(FROM + (576 if compacted else 960), self.BOUNDS + self.CONFIGURATION)
        bench.memory.write(FROM + 512, struct.pack("<QQ", self.BOTH, COMPACTED | self.BOTH if compacted else 0))
        state = bench.run()
        assert (state.lower_bounds, state.upper_bounds) == ([1, 3, 5, 7], [2, 4, 6, 8])
        assert (state.bndcfgu, state.bndstatus) == (0x7000_0003, 0x8001)

    def test_restore_of_initial_state(self) -> None:
        state = self.used(XRSTOR).run()
        assert (state.lower_bounds, state.upper_bounds, state.bndcfgu, state.bndstatus) == ([0] * 4, [0] * 4, 0, 0)

    def test_restore_of_what_is_not_asked_for(self) -> None:
        state = self.used(XRSTOR, asked=SSE).run()
        assert (state.lower_bounds, state.bndcfgu) == ([1, 3, 5, 7], 0x7000_0003)

    def test_restored_configuration_is_in_force_at_once(self) -> None:
        """At privilege level 3: BNDMK BND0, [RDI] before and BNDMK BND1, [RDI] after; then an invalid opcode."""
        bench = bench_of("f30f1b07" + XRSTOR + "f30f1b0f" + "0f0b", state=long_mode(3), asked=self.BNDCSR, xcr0=0x1B)
        bench.memory.write(FROM, bytes(0xB00))
        bench.memory.write_u64(FROM + 1024, 1)
        bench.memory.write_u64(FROM + 512, self.BNDCSR)
        assert bench.event().vector == Vector.UD
        assert bench.state.lower_bounds == [0, FROM, 0, 0]

    def test_reserved_bits_of_the_configuration(self) -> None:
        """What RSM does to IA32_BNDCFGS: they are cleared, and the highest bit of a linear address is extended."""
        bench = self.bench(XRSTOR)
        bench.memory.write_u64(FROM + 1024, 0x8000_0000_5FFF)
        bench.memory.write_u64(FROM + 512, self.BNDCSR)
        assert bench.run().bndcfgu == 0xFFFF_8000_0000_5003
