"""MOV SS, POP SS and LSS as machine code: what they check, what they load, and what they hold back.

Spec: SDM Vol. 2, "MOV—Move", "POP—Pop a Value From the Stack", "LDS/LES/LFS/LGS/LSS—Load Far Pointer"; Vol. 3, "Masking
Exceptions and Interrupts When Switching Stacks".
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import CODE, DATA, STACK, ProcessorBench, long_mode, protected_mode, real_mode

from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState, Segment, Shadow

MOV_SS_AX, MOV_SS_AT_RDI, POP_SS, LSS_ESP_AT_EDI = "8ed0", "8e17", "17", "0fb227"
DATA_0, DATA_3 = 0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF
SLOT = 0x28
SMALL_NOT_ACCESSED = 0x0040_9212_3456_0FFF  # base 123456H, limit FFFH, big, writable


def segment_bench(code: str, state: CpuState, selector: int, descriptor: int = DATA_0) -> ProcessorBench:
    """``code`` with ``selector`` in AX, at `DATA` (where RDI points, as a far pointer too) and on the stack."""
    state.gpr[0], state.gpr[7] = selector, DATA
    bench = ProcessorBench(code + "f4", state)
    bench.descriptor(SLOT, descriptor)
    bench.memory.write(DATA, struct.pack("<HHH", selector, 0x1234, selector))
    bench.memory.write(STACK, struct.pack("<I", selector))
    return bench


FORMS = [
    pytest.param(MOV_SS_AX, long_mode, id="mov-64"),
    pytest.param(MOV_SS_AT_RDI, long_mode, id="mov-memory-64"),
    pytest.param(MOV_SS_AX, protected_mode, id="mov-32"),
    pytest.param(POP_SS, protected_mode, id="pop-32"),
    pytest.param(LSS_ESP_AT_EDI, protected_mode, id="lss-32"),
]


@pytest.mark.parametrize(("code", "mode"), FORMS)
def test_loads_the_descriptor_and_sets_its_accessed_bit(code: str, mode: type[CpuState]) -> None:
    bench = segment_bench(code, mode(), SLOT, SMALL_NOT_ACCESSED)
    state = bench.state
    bench.run_to(CODE + len(code) // 2)
    ss = state.ss
    assert (ss.selector, ss.base, ss.limit, ss.access_rights) == (SLOT, 0x12_3456, 0xFFF, 0x4093)
    assert bench.memory.read_u64(0x4000 + SLOT) == SMALL_NOT_ACCESSED | 1 << 40
    assert state.gpr[4] == {POP_SS: STACK + 4, LSS_ESP_AT_EDI: SLOT | 0x1234 << 16}.get(code, STACK)


@pytest.mark.parametrize(("code", "mode"), FORMS)
@pytest.mark.parametrize(
    ("selector", "descriptor", "vector"),
    [
        pytest.param(SLOT | 3, DATA_0, Vector.GP, id="rpl-above-cpl"),
        pytest.param(SLOT | 3, DATA_3, Vector.GP, id="rpl-and-dpl-above-cpl"),
        pytest.param(SLOT, DATA_3, Vector.GP, id="dpl-above-cpl"),
        pytest.param(SLOT, DATA_0 & ~(2 << 40), Vector.GP, id="read-only"),
        pytest.param(SLOT, DATA_0 | 8 << 40, Vector.GP, id="code"),
        pytest.param(SLOT, DATA_0 & ~(0x10 << 40), Vector.GP, id="system"),
        pytest.param(SLOT, DATA_0 & ~(0x80 << 40), Vector.SS, id="not-present"),
        pytest.param(SLOT | 3, DATA_0 & ~(0x80 << 40), Vector.GP, id="not-present-and-rpl"),
        pytest.param(0x80, DATA_0, Vector.GP, id="beyond-gdt"),
        pytest.param(SLOT | 4, DATA_0, Vector.GP, id="no-ldt"),
    ],
)
def test_rejects_unfit_descriptors(
    code: str, mode: type[CpuState], selector: int, descriptor: int, vector: Vector
) -> None:
    bench = segment_bench(code, mode(), selector, descriptor)
    event = bench.event()
    assert (event.vector, event.error_code) == (vector, selector & ~3)
    assert (bench.state.rip, bench.state.ss.selector, bench.state.gpr[4]) == (CODE, 0x10, STACK)
    assert bench.state.shadow is Shadow.NONE


@pytest.mark.parametrize(
    ("mode", "cpl", "selector", "allowed"),
    [
        ("64", 0, 0, True),
        ("64", 0, 1, False),
        ("64", 0, 3, False),
        ("64", 1, 1, True),
        ("64", 2, 2, True),
        ("64", 2, 0, False),
        ("64", 3, 3, False),
        ("64", 3, 0, False),
        ("compatibility", 0, 0, False),
        ("32", 0, 0, False),
        ("32", 3, 3, False),
    ],
)
def test_null_selector(mode: str, cpl: int, selector: int, allowed: bool) -> None:
    """A null SS is for 64-bit mode below privilege level 3, and its RPL must be the CPL."""
    state = protected_mode(cpl) if mode == "32" else long_mode(cpl, compatibility=mode == "compatibility")
    bench = segment_bench(MOV_SS_AX, state, selector)
    if allowed:
        bench.run_to(CODE + 2)
        assert (state.ss.selector, state.ss.usable, state.cpl) == (selector, False, cpl)
    else:
        event = bench.event()
        assert (event.vector, event.error_code, state.ss.selector) == (Vector.GP, 0, 0x10 | cpl)


@pytest.mark.parametrize("mode", [real_mode, pytest.param(None, id="virtual-8086")])
@pytest.mark.parametrize(("code", "pointer"), [(MOV_SS_AX, STACK), (POP_SS, STACK + 2)])
def test_8086_modes__only_selector_and_base(code: str, pointer: int, mode: type[CpuState] | None) -> None:
    state = real_mode()
    if mode is None:
        state.cr0 |= 1
        state.rflags |= 1 << 17 | 3 << 12
        for segment in state.segments:
            segment.access_rights = 0xF3
    else:
        state.ss.limit = 0xF_FFFF  # as left by protected mode
    bench = segment_bench(code, state, 0x123)
    rights, limit = state.ss.access_rights, state.ss.limit
    bench.run_to(CODE + len(code) // 2)
    assert (state.ss.selector, state.ss.base) == (0x123, 0x1230)
    assert (state.ss.access_rights, state.ss.limit, state.gpr[4]) == (rights, limit, pointer)


@pytest.mark.parametrize(("limit", "rights"), [(0xFFFF_FFFF, 0xC093), (0xFFF, 0xF3)])
def test_virtual_8086_mode__a_segment_of_that_mode(limit: int, rights: int) -> None:
    """What VMRUN has loaded of the segment before is gone, as after IRET to that mode."""
    state = real_mode()
    state.cr0 |= 1
    state.rflags |= 1 << 17 | 3 << 12
    state.ss.limit, state.ss.access_rights = limit, rights
    segment_bench(MOV_SS_AX, state, 0x123).run_to(CODE + 2)
    assert state.ss == Segment(0x123, 0x1230, 0xFFFF, 0xF3)


def test_pop_beyond_the_stack_segment() -> None:
    state = protected_mode()
    state.ss.limit = STACK + 2
    event = segment_bench(POP_SS, state, SLOT).event()
    assert (event.vector, event.error_code) == (Vector.SS, 0)


class TestHeldBack:
    """Interrupts and debug exceptions wait until the instruction after MOV SS or POP SS is over, not after LSS."""

    @staticmethod
    def bench(code: str, mode: type[CpuState]) -> ProcessorBench:
        bench = segment_bench(code + "9090", mode(), SLOT)
        bench.memory.write(DATA, struct.pack("<IH", STACK, SLOT) if code == LSS_ESP_AT_EDI else struct.pack("<H", SLOT))
        return bench

    @staticmethod
    def distance(code: str) -> int:
        """How far behind ``code`` the event comes."""
        return len(code) // 2 + (code != LSS_ESP_AT_EDI)

    @pytest.mark.parametrize(("code", "mode"), FORMS)
    def test_interrupt(self, code: str, mode: type[CpuState]) -> None:
        bench = self.bench(code, mode)
        bench.state.rflags |= 0x200
        bench.processor.run_once = _interrupting(bench)  # type: ignore[method-assign]
        assert bench.event().vector == 0x40
        assert bench.state.rip == CODE + self.distance(code)

    @pytest.mark.parametrize(("code", "mode"), FORMS)
    def test_single_step(self, code: str, mode: type[CpuState]) -> None:
        bench = self.bench(code, mode)
        bench.state.rflags |= 0x100
        assert bench.event().vector == Vector.DB
        assert bench.state.rip == CODE + self.distance(code)

    @pytest.mark.parametrize(("code", "mode"), FORMS)
    def test_instruction_breakpoint(self, code: str, mode: type[CpuState]) -> None:
        bench = self.bench(code, mode)
        behind = CODE + len(code) // 2
        bench.state.dr[:2] = [behind, behind + 1]
        bench.state.dr7 |= 0xA  # G0 and G1, execution
        event = bench.event()
        assert (event.vector, bench.state.rip) == (Vector.DB, CODE + self.distance(code))

    def test_sti__holds_back_no_debug_exception(self) -> None:
        bench = ProcessorBench("fb9090f4", long_mode())
        bench.state.dr[0], bench.state.dr7 = CODE + 1, 2
        assert bench.event().vector == Vector.DB
        assert bench.state.rip == CODE + 1


def _interrupting(bench: ProcessorBench) -> object:
    """`run_once` with an interrupt that arrives while the first instruction executes."""
    run_once = type(bench.processor).run_once

    def interrupted(until: int | None = None) -> None:
        run_once(bench.processor, until)
        if bench.platform.vector is None and not bench.events:
            bench.platform.vector = 0x40

    return interrupted


def test_sti_before_mov_ss__the_shadow_is_that_of_mov_ss() -> None:
    """FBH as the last byte before RIP does not make the instruction an STI."""
    bench = segment_bench("8e97fb000000" + "90", long_mode(), SLOT)  # MOV SS, [RDI + 0FBH]
    bench.memory.write(DATA + 0xFB, struct.pack("<H", SLOT))
    bench.run_to(CODE + 6)
    assert bench.state.shadow is Shadow.MOV_SS
