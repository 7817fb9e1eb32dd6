"""RDPKRU, WRPKRU and the PKRU state of XSAVE as machine code, and what keys leave of the accesses to a page.

Spec: SDM Vol. 2, "RDPKRU—Read Protection Key Rights for User Pages", "WRPKRU—Write Data to User Page Key Register";
SDM Vol. 3, "Protection Keys"; SDM Vol. 1, "Managing State Using the XSAVE Feature Set".
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import CODE, DATA, PRESENT, USER, WRITABLE, ProcessorBench, long_mode

from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile
from vtx.x86.state import CpuState

RDPKRU, WRPKRU = "0f01ee", "0f01ef"
XSAVE, XRSTOR = "480fae26", "480fae2f"  # to [RSI], from [RDI]
LOAD, STORE = "488b07", "488907"  # RAX from [RDI], to [RDI]
PKE, OSXSAVE = 1 << 22, 1 << 18
PKRU_STATE = 1 << 9
RAX, RCX, RDX = 0, 1, 2
KEY = 5
ACCESS_DISABLE, WRITE_DISABLE = 1 << 2 * KEY, 2 << 2 * KEY


def state_with(cr4: int = PKE, cpl: int = 0, pkru: int = 0, **registers: int) -> CpuState:
    state = long_mode(cpl)
    state.cr4 |= cr4
    state.pkru = pkru
    for name, value in ({"rax": 0, "rcx": 0, "rdx": 0, "rdi": DATA, "rsi": DATA + 0x1000} | registers).items():
        state.gpr[("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi").index(name)] = value
    return state


def bench_of(code: str, state: CpuState) -> ProcessorBench:
    return ProcessorBench(code + "f4", state, profile=load_profile("skylake-server"))


def test_read__gives_the_register_and_clears_rdx() -> None:
    state = bench_of(RDPKRU, state_with(pkru=0x8765_4321, rax=1 << 63, rcx=1 << 32, rdx=7)).run()
    assert (state.gpr[RAX], state.gpr[RDX]) == (0x8765_4321, 0)


def test_write__takes_the_low_half_of_rax() -> None:
    state = bench_of(WRPKRU, state_with(rax=0x1_2345_6789, rcx=1 << 32, rdx=1 << 32)).run()
    assert state.pkru == 0x2345_6789


@pytest.mark.parametrize(
    ("code", "changes", "vector"),
    [
        pytest.param(RDPKRU, {"cr4": 0, "rcx": 1}, Vector.UD, id="read-not-enabled"),
        pytest.param(WRPKRU, {"cr4": 0, "rcx": 1}, Vector.UD, id="write-not-enabled"),
        pytest.param("f0" + RDPKRU, {}, Vector.UD, id="read-lock"),
        pytest.param("f0" + WRPKRU, {}, Vector.UD, id="write-lock"),
        pytest.param(RDPKRU, {"rcx": 1}, Vector.GP, id="read-rcx"),
        pytest.param(WRPKRU, {"rcx": 1}, Vector.GP, id="write-rcx"),
        pytest.param(WRPKRU, {"rdx": 1}, Vector.GP, id="write-rdx"),
    ],
)
def test_faults(code: str, changes: dict[str, int], vector: Vector) -> None:
    bench = bench_of(code, state_with(**changes, pkru=3))
    assert bench.event().vector == vector
    assert (bench.state.rip, bench.state.pkru) == (CODE, 3)


def test_at_any_privilege_level() -> None:
    bench = bench_of(WRPKRU + RDPKRU, state_with(cpl=3, rax=0x30))
    bench.run_to(CODE + 6)
    assert (bench.state.gpr[RAX], bench.state.pkru) == (0x30, 0x30)


@pytest.mark.parametrize(
    ("rights", "cpl", "access", "error"),
    [
        (ACCESS_DISABLE, 3, LOAD, 0b10_0101),
        (ACCESS_DISABLE, 0, LOAD, 0b10_0001),
        (ACCESS_DISABLE, 3, STORE, 0b10_0111),
        (WRITE_DISABLE, 3, LOAD, None),
        (WRITE_DISABLE, 3, STORE, 0b10_0111),
        (WRITE_DISABLE, 0, STORE, 0b10_0011),  # CR0.WP is set
        ((ACCESS_DISABLE | WRITE_DISABLE) << 2, 3, STORE, None),  # another key
    ],
)
def test_write_changes_what_the_next_instruction_may_access(
    rights: int, cpl: int, access: str, error: int | None
) -> None:
    """The page has been accessed with every right just before."""
    bench = bench_of(LOAD + STORE + "89d8" + WRPKRU + access, state_with(cpl=cpl, rbx=rights))
    bench.page(DATA, PRESENT | WRITABLE | USER | KEY << 59)
    at = CODE + len(LOAD + STORE + "89d8" + WRPKRU) // 2
    bench.run_to(at)
    event = bench.event()
    if error is None:  # on to the HLT, which faults at CPL 3
        assert (event.vector, bench.places) == (Vector.GP, [at + 3])
        return
    assert (event.vector, event.error_code, event.address) == (Vector.PF, error, DATA)


def test_keys_do_not_count_without_cr4_pke() -> None:
    bench = bench_of(LOAD + STORE, state_with(cr4=0, pkru=0xFFFF_FFFF))
    bench.page(DATA, PRESENT | WRITABLE | USER | KEY << 59)
    bench.run()


class TestExtendedState:
    """PKRU is state component 9: 8 bytes at offset 2688 of the standard format, as CPUID leaf 0DH says."""

    OFFSET = 2688

    def area(self, xstate: int, pkru: int) -> bytes:
        area = bytearray(self.OFFSET + 8)
        struct.pack_into("<H", area, 0, 0x37F)
        struct.pack_into("<I", area, 24, 0x1F80)
        struct.pack_into("<Q", area, 512, xstate)
        struct.pack_into("<Q", area, self.OFFSET, pkru)
        return bytes(area)

    def bench(self, code: str, asked: int = PKRU_STATE, xcr0: int = PKRU_STATE | 3, pkru: int = 0x3C) -> ProcessorBench:
        state = state_with(cr4=PKE | OSXSAVE, pkru=pkru, rax=asked)
        state.xcr0 = xcr0
        return bench_of(code, state)

    def test_saved(self) -> None:
        bench = self.bench(XSAVE)
        bench.run()
        assert bench.memory.read_u64(DATA + 0x1000 + self.OFFSET) == 0x3C
        assert bench.memory.read_u64(DATA + 0x1000 + 512) == PKRU_STATE

    @pytest.mark.parametrize(("asked", "xcr0"), [(3, PKRU_STATE | 3), (PKRU_STATE, 3)])
    def test_not_saved_unless_asked_for_and_enabled(self, asked: int, xcr0: int) -> None:
        bench = self.bench(XSAVE, asked, xcr0)
        bench.memory.write_u64(DATA + 0x1000 + self.OFFSET, 0x1234)
        bench.run()
        assert bench.memory.read_u64(DATA + 0x1000 + self.OFFSET) == 0x1234
        assert not bench.memory.read_u64(DATA + 0x1000 + 512) & PKRU_STATE

    @pytest.mark.parametrize(("xstate", "expected"), [(PKRU_STATE, 0x5555_5554), (0, 0)])
    def test_restored__or_initial(self, xstate: int, expected: int) -> None:
        bench = self.bench(XRSTOR + "31c0" + RDPKRU)
        bench.memory.write(DATA, self.area(xstate, 0x5555_5554))
        state = bench.run()
        assert (state.pkru, state.gpr[RAX]) == (expected, expected)

    def test_restored_keys_count_at_once(self) -> None:
        bench = self.bench(LOAD + "4889d8" + XRSTOR + LOAD, pkru=0)
        bench.state.gpr[3] = PKRU_STATE
        bench.memory.write(DATA, self.area(PKRU_STATE, ACCESS_DISABLE))
        bench.page(DATA, PRESENT | WRITABLE | USER | KEY << 59)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 0b10_0001, DATA)
        assert bench.state.pkru == ACCESS_DISABLE

    def test_left_alone_by_a_restore_of_other_state(self) -> None:
        bench = self.bench(XRSTOR, asked=3)
        bench.memory.write(DATA, self.area(PKRU_STATE | 3, 0x77))
        assert bench.run().pkru == 0x3C
