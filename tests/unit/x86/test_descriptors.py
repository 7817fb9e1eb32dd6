"""Descriptors and gates: figures of the manual, bijection, table limits."""

from __future__ import annotations

import pytest
from event_fixtures import GDT, LDT, long_machine, protected_machine
from hypothesis import given
from hypothesis import strategies as st

from vtx.x86 import descriptors
from vtx.x86.descriptors import Descriptor, Gate, SystemType
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import DescriptorTable, Segment


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (0x00CF9B000000FFFF, Descriptor(0, 0xFFFF_FFFF, 0xC09B)),
        (0x00AF9B000000FFFF, Descriptor(0, 0xFFFF_FFFF, 0xA09B)),
        (0x12408934567890AB, Descriptor(0x1234_5678, 0x0_90AB, 0x4089)),
        (0xFF0F92FFFFFFFFFF, Descriptor(0xFFFF_FFFF, 0xF_FFFF, 0x0092)),
        (0x0080930000000000, Descriptor(0, 0xFFF, 0x8093)),
    ],
)
def test_parse_descriptor(raw: int, expected: Descriptor) -> None:
    assert descriptors.parse_descriptor(raw) == expected


def test_parse_16_byte_descriptor__takes_the_upper_half_of_the_base() -> None:
    parsed = descriptors.parse_descriptor(0x12408934567890AB, 0x5555_5555_FFFF_8000)
    assert parsed.base == 0xFFFF_8000_1234_5678


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0x12348E0000085678, 0, Gate(0x08, 0x1234_5678, SystemType.INTERRUPT_GATE_32, 0, True)),
        (0x1234E70000085678, 0, Gate(0x08, 0x5678, SystemType.TRAP_GATE_16, 3, True)),
        (0x12340F0300085678, 0xFFFF_8000, Gate(0x08, 0xFFFF_8000_1234_5678, 15, 0, False, ist=3, parameter_count=3)),
        (0x1234840300085678, 0, Gate(0x08, 0x5678, SystemType.CALL_GATE_16, 0, True, ist=3, parameter_count=3)),
        (0x12348C1F00085678, 0, Gate(0x08, 0x1234_5678, SystemType.CALL_GATE_32, 0, True, ist=7, parameter_count=31)),
        (0x0000850000280000, 0, Gate(0x28, 0, SystemType.TASK_GATE, 0, True)),
    ],
)
def test_parse_gate(low: int, high: int, expected: Gate) -> None:
    assert descriptors.parse_gate(low, high) == expected


def test_gate_type__keeps_the_s_bit_so_that_no_code_segment_passes() -> None:
    assert descriptors.parse_gate(0x00009E0000080000).type not in list(SystemType)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_descriptor_round_trip(low: int, high: int) -> None:
    assert descriptors.encode_descriptor(descriptors.parse_descriptor(low, high)) == (low, high)


@given(
    st.integers(0, 0xFFFF),
    st.integers(0, 2**64 - 1),
    st.sampled_from([SystemType.INTERRUPT_GATE_32, SystemType.TRAP_GATE_32]),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 7),
)
def test_gate_round_trip(selector: int, offset: int, kind: int, dpl: int, present: bool, ist: int) -> None:
    gate = Gate(selector, offset, kind, dpl, present, ist, ist)
    assert descriptors.parse_gate(*descriptors.encode_gate(gate)) == gate


@pytest.mark.parametrize(
    ("raw", "code", "conforming", "writable_data", "readable"),
    [
        (0x00CF92000000FFFF, False, False, True, True),
        (0x00CF90000000FFFF, False, False, False, True),
        (0x00CF96000000FFFF, False, False, True, True),
        (0x00CF98000000FFFF, True, False, False, False),
        (0x00CF9A000000FFFF, True, False, False, True),
        (0x00CF9C000000FFFF, True, True, False, False),
        (0x00CF9E000000FFFF, True, True, False, True),
        (0x00CF82000000FFFF, False, False, False, False),
        (0x00CF8E000000FFFF, False, False, False, False),
    ],
)
def test_segment_kinds(raw: int, code: bool, conforming: bool, writable_data: bool, readable: bool) -> None:
    parsed = descriptors.parse_descriptor(raw)
    found = (parsed.is_code, parsed.is_conforming, parsed.is_writable_data, parsed.is_readable)
    assert found == (code, conforming, writable_data, readable)


@pytest.mark.parametrize(
    ("selector", "limit", "address"),
    [(0x08, 0x0F, GDT + 8), (0x08, 0x0E, None), (0x0B, 0x0F, GDT + 8), (0, 7, GDT), (0, 6, None)],
)
def test_descriptor_address__checks_the_gdt_limit(selector: int, limit: int, address: int | None) -> None:
    state, _ = protected_machine()
    state.gdtr = DescriptorTable(GDT, limit)
    assert descriptors.descriptor_address(state, selector) == address


def test_descriptor_address__uses_the_ldt() -> None:
    state, _ = protected_machine()
    assert descriptors.descriptor_address(state, 0x0C) is None
    state.ldtr = Segment(0x90, LDT, 0x0F, 0x82)
    assert descriptors.descriptor_address(state, 0x0F) == LDT + 8
    assert descriptors.descriptor_address(state, 0x14) is None


def test_descriptor_address__wraps_at_4_gib_outside_ia_32e_mode() -> None:
    state, _ = protected_machine()
    state.gdtr = DescriptorTable(0xFFFF_FFF8, 0xFF)
    assert descriptors.descriptor_address(state, 0x10) == 8


def test_descriptor_address__non_canonical_is_a_general_protection_fault() -> None:
    state, _ = long_machine()
    state.gdtr = DescriptorTable(0x7FFF_FFFF_FFF8, 0xFF)
    with pytest.raises(InstructionAborted) as caught:
        descriptors.descriptor_address(state, 0x08)
    assert caught.value.cause == Fault(Vector.GP, 0)


def test_set_accessed__writes_memory_only_once() -> None:
    state, memory = protected_machine()
    descriptor = descriptors.read_descriptor(state, memory, 0x98)
    assert descriptor is not None and descriptor.access_rights == 0xC09A
    assert descriptors.set_accessed(state, memory, 0x98, descriptor).access_rights == 0xC09B
    assert memory.peek(GDT + 0x98, 8) == 0x00CF9B000000FFFF
    memory.accesses.clear()
    accessed = descriptors.read_descriptor(state, memory, 0x98)
    assert accessed is not None
    descriptors.set_accessed(state, memory, 0x98, accessed)
    assert [access[0] for access in memory.accesses] == ["read"]


def test_null_selectors() -> None:
    assert [descriptors.is_null(selector) for selector in (0, 3, 4, 8)] == [True, True, False, False]
    null = descriptors.null_segment(3, 3)
    assert null == Segment(3, 0, 0, 0x1_0060)
    assert (null.usable, null.dpl) == (False, 3)
