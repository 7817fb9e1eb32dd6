"""Hostile tables and registers: delivery and IRET end in the architectural result, and a fault changes nothing."""

from __future__ import annotations

import contextlib
import copy

from event_fixtures import (
    GDT,
    GDT_ENTRIES,
    IDT,
    TASK_32,
    TSS,
    FakeMemory,
    long_machine,
    protected_machine,
    real_machine,
    virtual_8086_machine,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.x86.delivery import Event, EventKind, deliver
from vtx.x86.double_fault import Delivered, TripleFault, deliver_with_faults
from vtx.x86.io_permission import check_io_permission
from vtx.x86.iret import iret
from vtx.x86.outcome import InstructionAborted, NotModelled
from vtx.x86.state import CpuState, Gpr, Segment, SegmentRegister

U16, U32, U64 = st.integers(0, 0xFFFF), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
SELECTORS = st.one_of(st.sampled_from(sorted(GDT_ENTRIES)), U16, st.integers(0, 3)).flatmap(
    lambda selector: st.sampled_from([selector, selector | 3, selector & 0xFFFC])
)
POINTERS = st.one_of(st.integers(0, 0x40), st.integers(0xFFE0, 0x1_0020), U32, U64, st.just(0x9000))
RIGHTS = st.one_of(
    st.sampled_from([0xC093, 0x93, 0xC097, 0x1C093, 0xC0F3, 0xF3, 0x8B, 0x83, 0x82]), st.integers(0, 0x1FFFF)
)


@st.composite
def segments(draw: st.DrawFn, *, long: bool) -> Segment:
    base = draw(st.sampled_from([0, 0x20000, 0xFFFF_FFF0])) if not long else 0
    return Segment(draw(SELECTORS), base, draw(st.one_of(U32, st.just(0xFFFF_FFFF), U16)), draw(RIGHTS))


@st.composite
def machines(draw: st.DrawFn) -> tuple[CpuState, FakeMemory]:
    mode = draw(st.sampled_from(["real", "v86", "protected", "long"]))
    cpl = draw(st.sampled_from([0, 3]))
    state, memory = {
        "real": real_machine,
        "v86": lambda: virtual_8086_machine(draw(st.integers(0, 3))),
        "protected": lambda: protected_machine(cpl),
        "long": lambda: long_machine(cpl),
    }[mode]()
    long = mode == "long"
    if draw(st.booleans()):
        state.segments[SegmentRegister.SS] = draw(segments(long=long))
    if draw(st.booleans()):
        state.tr = Segment(0x28, TSS, draw(st.one_of(st.just(0x67), st.integers(0, 0x200))), draw(RIGHTS))
    if draw(st.booleans()):
        state.ldtr = Segment(0x90, GDT, draw(U16), draw(st.sampled_from([0x82, 0x10000])))
    state.gdtr.limit = draw(st.sampled_from([0, 7, 0x2F, 0xFF, 0xFFFF]))
    state.idtr.limit = draw(st.sampled_from([0, 0x3FF, 0x7FF, 0xFFF, 0xFFFF]))
    state.gpr[Gpr.RSP] = draw(POINTERS) & (0xFFFF_FFFF_FFFF_FFFF if long else 0xFFFF_FFFF)
    state.cr4 |= draw(st.sampled_from([0, 1, 0x1000 if long else 0]))
    state.rflags |= draw(st.sampled_from([0, 0x4000, 0x3000, 0x18_0000]))
    for selector in draw(st.lists(st.sampled_from(sorted(GDT_ENTRIES)), max_size=4)):
        memory.poke(GDT + selector, draw(U64), 8)
    for offset in draw(st.lists(st.integers(0, 25), max_size=4)):
        memory.poke(TSS + offset * 4, draw(SELECTORS), 4)
    for offset in draw(st.lists(st.integers(0, 25), max_size=8)):
        memory.poke(TASK_32 + offset * 4, draw(st.one_of(SELECTORS, U32)), 4)
    memory.refused = draw(st.sets(st.sampled_from([IDT >> 12, GDT >> 12, TSS >> 12, 4, 7, 8, 9, 0x2F]), max_size=2))
    return state, memory


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[CpuState, FakeMemory, Event]:
    state, memory = draw(machines())
    vector = draw(st.integers(0, 255))
    kinds = draw(st.sampled_from(EventKind))
    event = Event(vector, kinds, draw(st.none() | U32), draw(st.integers(0, 15)), draw(st.none() | U32))
    attributes = draw(st.sampled_from([0x8E, 0x8F, 0xEE, 0x86, 0x87, 0x85, 0x8C, 0x0E]) | st.integers(0, 255))
    selector, offset = draw(SELECTORS), draw(U64)
    if state.long_mode:
        memory.gate64(vector, selector, offset, attributes, draw(st.integers(0, 7)))
    else:
        memory.gate(vector, selector, offset & 0xFFFF_FFFF, attributes)
    return state, memory, event


def check_registers(state: CpuState) -> None:
    """Every register fits its width, and the flags word is one."""
    width = 64 if state.long_mode else 32
    assert 0 <= state.rip < 1 << width
    assert 0 <= state.gpr[Gpr.RSP] < 1 << 64
    assert type(state.rflags) is int
    assert state.rflags & ~0x3F_7FD7 == 0
    assert all(0 <= segment.selector <= 0xFFFF for segment in state.segments)
    assert all(type(segment.access_rights) is int for segment in state.segments)


@settings(max_examples=250, deadline=None)
@given(deliveries())
def test_delivery_is_total_and_atomic(delivery: tuple[CpuState, FakeMemory, Event]) -> None:
    state, memory, event = delivery
    before = copy.deepcopy(state)
    try:
        deliver(state, memory, event)
    except InstructionAborted:
        if state.tr == before.tr:  # no task switch got past its commit point
            assert state == before
    except NotModelled as missing:
        assert "task switch" in missing.what
    else:
        assert not state.rflags & 0x1_0100 or state.tr != before.tr
    check_registers(state)


@settings(max_examples=150, deadline=None)
@given(deliveries())
def test_delivery_with_faults_ends(delivery: tuple[CpuState, FakeMemory, Event]) -> None:
    state, memory, event = delivery
    try:
        outcome = deliver_with_faults(state, memory, event)
    except NotModelled as missing:
        assert "task switch" in missing.what
    else:
        assert isinstance(outcome, Delivered | TripleFault)


@settings(max_examples=250, deadline=None)
@given(machines(), st.sampled_from([16, 32, 64]), st.lists(SELECTORS | U32, min_size=9, max_size=9))
def test_iret_is_total_and_atomic(machine: tuple[CpuState, FakeMemory], operand_size: int, values: list[int]) -> None:
    state, memory = machine
    if operand_size == 64 and not state.in_64_bit_mode:
        operand_size = 32
    for index, value in enumerate(values):
        memory.poke(state.gpr[Gpr.RSP] + index * operand_size // 8, value, operand_size // 8)
    before = copy.deepcopy(state)
    try:
        iret(state, memory, operand_size)
    except InstructionAborted:
        if state.tr == before.tr:
            before.nmi_blocked = False
            assert state == before
    except NotModelled as missing:
        assert "task switch" in missing.what
    check_registers(state)


@settings(max_examples=60, deadline=None)
@given(machines(), U16, st.sampled_from([1, 2, 4]))
def test_io_permission_is_total(machine: tuple[CpuState, FakeMemory], port: int, size: int) -> None:
    state, memory = machine
    before = copy.deepcopy(state)
    with contextlib.suppress(InstructionAborted):
        check_io_permission(state, memory, port, size)
    assert state == before
