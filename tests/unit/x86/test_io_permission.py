"""The I/O permission check: IOPL, then the bit map of the TSS."""

from __future__ import annotations

import pytest
from event_fixtures import TSS, FakeMemory, long_machine, protected_machine, real_machine, virtual_8086_machine

from vtx.x86.io_permission import check_io_permission
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Segment


def refused(state: CpuState, memory: FakeMemory, port: int, size: int = 1) -> bool:
    try:
        check_io_permission(state, memory, port, size)
    except InstructionAborted as aborted:
        assert aborted.cause == Fault(Vector.GP, 0)
        return True
    return False


def with_map(state: CpuState, memory: FakeMemory, base: int = 0x68, limit: int = 0x100) -> None:
    state.tr = Segment(0x28, TSS, limit, 0x8B)
    memory.poke(TSS + 102, base, 2)


def test_real_mode_and_sufficient_privilege__need_no_tss() -> None:
    for state, memory in (real_machine(), protected_machine(0)):
        state.tr = Segment(0, 0, 0, 0x10000)
        assert not refused(state, memory, 0x3F8)
    state, memory = protected_machine(3)
    state.rflags |= 0x3000
    assert not refused(state, memory, 0x3F8)


@pytest.mark.parametrize("make", [protected_machine, long_machine])
def test_bit_map(make: object) -> None:
    assert callable(make)
    state, memory = make(3)
    with_map(state, memory)
    memory.poke(TSS + 0x68 + 2, 0b0000_1000, 1)  # port 13H
    assert [refused(state, memory, port) for port in range(0x11, 0x16)] == [False, False, True, False, False]
    assert [refused(state, memory, port, 2) for port in range(0x11, 0x16)] == [False, True, True, False, False]
    assert [refused(state, memory, port, 4) for port in range(0x0F, 0x15)] == [False, True, True, True, True, False]


def test_access_across_a_byte_of_the_map() -> None:
    state, memory = protected_machine(3)
    with_map(state, memory)
    memory.poke(TSS + 0x68 + 3, 1, 1)  # port 18H
    assert refused(state, memory, 0x17, 2)
    assert not refused(state, memory, 0x17, 1)


def test_virtual_8086_mode__consults_the_map_whatever_iopl() -> None:
    state, memory = virtual_8086_machine(iopl=3)
    with_map(state, memory)
    memory.poke(TSS + 0x68, 1, 1)
    assert refused(state, memory, 0)
    assert not refused(state, memory, 1)


@pytest.mark.parametrize(
    ("limit", "port", "expected"),
    [(0x68 + 2, 0x08, False), (0x68 + 2, 0x0F, False), (0x68 + 2, 0x10, True), (0x66, 0, True)],
)
def test_both_bytes_of_the_map_must_be_within_the_limit(limit: int, port: int, expected: bool) -> None:
    state, memory = protected_machine(3)
    with_map(state, memory, limit=limit)
    assert refused(state, memory, port) is expected


def test_smallest_tss_with_a_map() -> None:
    state, memory = protected_machine(3)
    with_map(state, memory, base=0, limit=0x67)
    assert not refused(state, memory, 0)
    with_map(state, memory, base=0, limit=0x66)
    assert refused(state, memory, 0)


@pytest.mark.parametrize("rights", [0x83, 0x1008B, 0x82])
def test_no_map_in_other_segments(rights: int) -> None:
    state, memory = protected_machine(3)
    with_map(state, memory)
    state.tr.access_rights = rights
    assert refused(state, memory, 0)
