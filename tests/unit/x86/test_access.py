"""The memory operands of an instruction about to execute, and which of them a refused page belongs to.

Spec: SDM Vol. 3, "Interrupt 14—Page-Fault Exception (#PF)"; SDM Vol. 2, the instructions' pages.
"""

from __future__ import annotations

import pytest
from processor_bench import DATA, GDT, STACK, TSS, ProcessorBench, long_mode, protected_mode, real_mode

from vtx.x86.access import Access, exact_access, operands
from vtx.x86.second_level import AccessKind
from vtx.x86.state import CpuState, SegmentRegister

READ, WRITE, BOTH = (True, False), (False, True), (True, True)
SOURCE = 0x7000


def found(code: str, state: CpuState | None = None, **registers: int) -> list[tuple[int, int, tuple[bool, bool], bool]]:
    """(linear address, size, (reads, writes), through SS) of each operand, in order of address."""
    bench = at(code, state, **registers)
    return sorted(
        (operand.linear, operand.size, (operand.reads, operand.writes), operand.stack)
        for operand in operands(bench.processor)
    )


def at(code: str, state: CpuState | None = None, **registers: int) -> ProcessorBench:
    bench = ProcessorBench(code, state)
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    for name, value in ({"rdi": DATA, "rsi": SOURCE} | registers).items():
        bench.state.gpr[names.index(name)] = value
    return bench


CASES = {
    "load": ("488b07", [(DATA, 8, READ, False)]),
    "store": ("668907", [(DATA, 2, WRITE, False)]),
    "modify": ("ff07", [(DATA, 4, BOTH, False)]),
    "compare": ("3907", [(DATA, 4, READ, False)]),
    "exchange": ("8707", [(DATA, 4, BOTH, False)]),
    "lea": ("488d07", []),
    "register": ("4889c0", []),
    "prefetch": ("0f180f", []),
    "push": ("50", [(STACK - 8, 8, WRITE, True)]),
    "pop": ("58", [(STACK, 8, READ, True)]),
    "push-memory": ("ff37", [(DATA, 8, READ, False), (STACK - 8, 8, WRITE, True)]),
    "pop-memory": ("8f07", [(DATA, 8, WRITE, False), (STACK, 8, READ, True)]),
    "pop-to-stack": ("8f0424", [(STACK, 8, READ, True), (STACK + 8, 8, WRITE, True)]),
    "call": ("e800000000", [(STACK - 8, 8, WRITE, True)]),
    "call-memory": ("ff17", [(DATA, 8, READ, False), (STACK - 8, 8, WRITE, True)]),
    "return": ("c3", [(STACK, 8, READ, True)]),
    "frame": ("488b45f8", [(0x58, 8, READ, True)]),  # RBP is 60H
    "movs": ("48a5", [(SOURCE, 8, READ, False), (DATA, 8, WRITE, False)]),
    "rep-movs": ("f3a5", [(SOURCE, 4, READ, False), (DATA, 4, WRITE, False)]),
    "rep-stosb": ("f3aa", [(DATA, 1, WRITE, False)]),
    "movaps": ("0f2807", [(DATA, 16, READ, False)]),
    "fxsave": ("0fae07", [(DATA, 512, WRITE, False)]),
    "fld": ("db2f", [(DATA, 10, READ, False)]),
    "lgdt": ("0f0117", [(DATA, 10, READ, False)]),
    "cmpxchg16b": ("480fc70f", [(DATA, 16, BOTH, False)]),
    "no-instruction": ("06", []),
}


@pytest.mark.parametrize(("code", "expected"), CASES.values(), ids=CASES)
def test_operands(code: str, expected: list[object]) -> None:
    assert found(code) == expected


def test_repeated_with_a_count_of_zero__none() -> None:
    assert found("f3a5", rcx=0) == []
    assert found("67f3a5", rcx=1 << 32) == []
    assert found("f3a5", rcx=1 << 32) != []


@pytest.mark.parametrize(
    ("code", "bit", "distance"),
    [
        ("0fab07", 31, 0),  # BTS [RDI], EAX
        ("0fab07", 32, 4),
        ("0fab07", (1 << 32) - 1, -4),
        ("480fa307", 64, 8),
        ("480fa307", (1 << 64) - 65, -16),
        ("660fbb07", 0x8000, -0x1000),
        ("0fba2f25", 0, 0),  # an immediate bit stays in the operand
    ],
)
def test_bit_string(code: str, bit: int, distance: int) -> None:
    ((linear, _, _, _),) = found(code, rax=bit)
    assert linear == DATA + distance


def test_segment_and_offset() -> None:
    state = protected_mode()
    state.segments[SegmentRegister.GS].base = 0xFFFF_FF00
    bench = at("658b4710", state)
    (operand,) = operands(bench.processor)
    assert (operand.segment, operand.offset, operand.linear) == (SegmentRegister.GS, DATA + 16, DATA + 16 - 0x100)


def test_64_bit_mode__base_of_fs_but_not_of_ds() -> None:
    state = long_mode()
    state.segments[SegmentRegister.DS].base = state.segments[SegmentRegister.FS].base = 0x100
    assert found("488b07", state)[0][0] == DATA
    assert found("64488b07", state)[0][0] == DATA + 0x100


def test_rip_relative() -> None:
    assert found("8b0510000000")[0][0] == 0x1000 + 6 + 0x10


@pytest.mark.parametrize(("big", "expected"), [(True, 0x1_0000 - 4), (False, 0x1_FFFC)])
def test_width_of_the_stack_pointer_is_that_of_ss(big: bool, expected: int) -> None:
    state = protected_mode()
    state.ss.access_rights = 0xC093 if big else 0x8093
    state.ss.base = 0x1_0000 if not big else 0
    assert found("50", state, rsp=0x1_0000)[0][0] == expected


def test_16_bit_address_wraps() -> None:
    assert found("8a4510", real_mode(), rdi=0xFFF8)[0][0] == 8


def exact(code: str, page: int, kind: AccessKind, state: CpuState | None = None, **registers: int) -> Access:
    return exact_access(at(code, state, **registers).processor, page, kind)


class TestExactAccess:
    """The engine knows the page only."""

    def test_address_in_the_page(self) -> None:
        assert exact("8b4710", DATA, AccessKind.READ) == Access(DATA + 16, AccessKind.READ)

    def test_modify__is_a_write_from_the_start(self) -> None:
        assert exact("ff07", DATA, AccessKind.READ) == Access(DATA, AccessKind.WRITE)

    def test_second_page_of_an_operand(self) -> None:
        assert exact("488b07", DATA, AccessKind.READ, rdi=DATA - 3) == Access(DATA, AccessKind.READ)
        assert exact("488b07", DATA - 0x1000, AccessKind.READ, rdi=DATA - 3) == Access(DATA - 3, AccessKind.READ)

    def test_operand_of_the_right_kind(self) -> None:
        code = "48a5"  # both operands on the page
        assert exact(code, DATA, AccessKind.READ, rsi=DATA + 8) == Access(DATA + 8, AccessKind.READ)
        assert exact(code, DATA, AccessKind.WRITE, rsi=DATA + 8) == Access(DATA, AccessKind.WRITE)

    def test_stack(self) -> None:
        assert exact("50", STACK - 0x1000, AccessKind.WRITE) == Access(STACK - 8, AccessKind.WRITE, stack=True)

    @pytest.mark.parametrize("table", [GDT, TSS])
    def test_table__is_accessed_by_the_supervisor(self, table: int) -> None:
        assert exact("8ed8", table, AccessKind.READ) == Access(table, AccessKind.READ, implicit=True)

    def test_nothing_explains_it(self) -> None:
        assert exact("90", DATA, AccessKind.READ) == Access(DATA, AccessKind.READ)
