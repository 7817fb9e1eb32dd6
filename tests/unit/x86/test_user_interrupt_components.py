"""XSAVES and XRSTORS of UINTR state: state component 14.

Spec: SDM Vol. 1, "UINTR State", "Operation of XSAVES", "Operation of XRSTORS".
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import CODE, DATA
from user_interrupt_bench import (
    ENTRY,
    HANDLER,
    MISC,
    PD,
    RR,
    STACKADJUST,
    TT,
    UINV,
    UITT,
    UPID,
    UserInterruptBench,
    state_with,
)

from vtx.x86.outcome import Vector

COMPONENT, XSS = 1 << 14, 0xDA0
HEADER, STATE = DATA + 512, DATA + 576
UD2 = "0f0b"
XSAVES, XRSTORS, XSAVEC = (f"480fc7{modrm:02x}25{struct.pack('<I', DATA).hex()}" for modrm in (0x2C, 0x1C, 0x24))
UIF = 1 << 63
REQUESTS = 1 << 60 | 3
# UIHANDLER, UISTACKADJUST, UITTSZ with UINV and UIF, UPIDADDR, UIRR, UITTADDR and the bit that enables SENDUIPI.
FULL = (ENTRY, 128, UIF | UINV << 32 | 0x1234, UPID, REQUESTS, UITT | 1)
ORDER = (HANDLER, STACKADJUST, MISC, PD, RR, TT)


def bench_of(code: str, *, uif: bool = True, xss: int = COMPONENT, mask: int = COMPONENT) -> UserInterruptBench:
    state = state_with(cpl=0, uif=uif, rax=mask, rdx=0)
    state.cr4 |= 1 << 18
    state.xcr0 = 3
    bench = UserInterruptBench(code + UD2, state, rr=REQUESTS, stackadjust=128, misc=UINV << 32 | 0x1234)
    assert bench.processor.msrs.write(XSS, xss)
    return bench


def finish(bench: UserInterruptBench) -> UserInterruptBench:
    """Run to the end behind the instruction."""
    assert bench.event().vector == Vector.UD
    assert bench.state.rip > CODE
    return bench


def image(bench: UserInterruptBench) -> tuple[int, ...]:
    return tuple(bench.quadwords(STATE, 6))


def registers(bench: UserInterruptBench) -> tuple[int, ...]:
    return tuple(bench.msr(index) for index in ORDER)


class TestXsaves:
    @pytest.mark.parametrize("uif", [False, True])
    def test_layout(self, uif: bool) -> None:
        bench = finish(bench_of(XSAVES, uif=uif))
        assert bench.quadwords(HEADER, 2) == [COMPONENT, COMPONENT | 1 << 63]
        assert image(bench) == (*FULL[:2], FULL[2] & ~(0 if uif else UIF), *FULL[3:])

    def test_clears_uinv_and_nothing_else(self) -> None:
        bench = finish(bench_of(XSAVES))
        assert registers(bench) == (ENTRY, 128, 0x1234, UPID, REQUESTS, UITT | 1)
        assert bench.state.user_interrupt_flag

    @pytest.mark.parametrize(("xss", "mask"), [(0, COMPONENT), (COMPONENT, 3)])
    def test_what_is_not_enabled_or_requested_keeps_uinv(self, xss: int, mask: int) -> None:
        bench = finish(bench_of(XSAVES, xss=xss, mask=mask))
        assert bench.msr(MISC) >> 32 == UINV
        assert not bench.quadwords(HEADER, 1)[0] & COMPONENT

    def test_xsavec_knows_no_supervisor_state(self) -> None:
        bench = finish(bench_of(XSAVEC))
        assert bench.quadwords(HEADER, 2) == [0, 1 << 63]
        assert bench.msr(MISC) >> 32 == UINV

    def test_initial_state_is_not_stored(self) -> None:
        bench = bench_of(XSAVES, uif=False)
        for index in ORDER:
            assert bench.processor.msrs.write(index, 0)
        bench.put(STATE, b"\xcc" * 48)
        finish(bench)
        assert bench.quadwords(HEADER, 2) == [0, COMPONENT | 1 << 63]
        assert set(image(bench)) == {0xCCCC_CCCC_CCCC_CCCC}

    @pytest.mark.parametrize("alone", [*ORDER, "UIF"])
    def test_any_part_of_it_is_in_use(self, alone: int | str) -> None:
        bench = bench_of(XSAVES, uif=alone == "UIF")
        for index in ORDER:
            assert bench.processor.msrs.write(index, 0 if index != alone else 0x40 if index != TT else 1)
        finish(bench)
        assert bench.quadwords(HEADER, 1) == [COMPONENT]


class TestXrstors:
    def bench(self, *values: int, present: int = COMPONENT, uinv: int = 0) -> UserInterruptBench:
        bench = bench_of(XRSTORS, uif=False)
        for index in ORDER:
            assert bench.processor.msrs.write(index, uinv << 32 if index == MISC else 0)
        for place, value in enumerate((present, COMPONENT | 1 << 63, *[0] * 6, *(values or FULL))):
            bench.memory.write_u64(HEADER + 8 * place, value)
        return bench

    def test_loads(self) -> None:
        bench = finish(self.bench())
        assert registers(bench) == (*FULL[:2], FULL[2] & ~UIF, *FULL[3:])
        assert bench.state.user_interrupt_flag

    def test_initializes(self) -> None:
        bench = self.bench(present=0)
        for index, value in zip(ORDER, FULL, strict=True):
            assert bench.processor.msrs.write(index, value & ~UIF & ~(0xFF << 32 if index == MISC else 0))
        bench.state.user_interrupt_flag = True
        finish(bench)
        assert registers(bench) == (0,) * 6
        assert not bench.state.user_interrupt_flag

    def refused(self, bench: UserInterruptBench) -> None:
        before = registers(bench)
        event = bench.event()
        assert (event.vector, event.error_code, bench.state.rip) == (Vector.GP, 0, CODE)
        assert registers(bench) == before
        assert not bench.state.user_interrupt_flag

    def test_uinv_must_be_0_before(self) -> None:
        self.refused(self.bench(uinv=1))

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            *((0, 1 << 50), (1, 1 << 50)),
            *((2, 1 << 40), (2, 1 << 62)),
            *((3, UPID | 0x20), (3, 1 << 50), (5, UITT | 2), (5, 1 << 50)),
        ],
    )
    def test_values_that_the_msrs_would_not_take(self, place: int, value: int) -> None:
        self.refused(self.bench(*FULL[:place], value, *FULL[place + 1 :]))

    def test_what_was_saved_can_be_restored(self) -> None:
        bench = finish(bench_of(XSAVES + XRSTORS))
        assert registers(bench) == (*FULL[:2], FULL[2] & ~UIF, *FULL[3:])
        assert bench.state.user_interrupt_flag
