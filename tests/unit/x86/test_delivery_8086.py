"""Delivery in real-address mode and from virtual-8086 mode, with and without its extensions."""

from __future__ import annotations

import copy

import pytest
from event_fixtures import STACK_0, TSS, FakeMemory, real_machine, virtual_8086_machine

from vtx.x86.delivery import Event, EventKind, deliver
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Cr4, DescriptorTable, Gpr, Segment, SegmentRegister

EXTERNAL, EXCEPTION = EventKind.EXTERNAL_INTERRUPT, EventKind.HARDWARE_EXCEPTION
INT_N, INT3 = EventKind.SOFTWARE_INTERRUPT, EventKind.SOFTWARE_EXCEPTION


def fault_of(state: CpuState, memory: FakeMemory, event: Event) -> Fault:
    before = copy.deepcopy(state)
    with pytest.raises(InstructionAborted) as caught:
        deliver(state, memory, event)
    assert state == before
    assert isinstance(caught.value.cause, Fault)
    return caught.value.cause


# Real-address mode


def test_real_mode__pushes_three_words_and_no_error_code() -> None:
    state, memory = real_machine()
    memory.poke(13 * 4, 0xF000_5678, 4)
    deliver(state, memory, Event(13, EXCEPTION, error_code=0))
    assert memory.words(0x200FA, 3, 2) == [0x234, 0x1000, 0x302]
    assert (state.gpr[Gpr.RSP], state.rip, state.rflags) == (0xFA, 0x5678, 0x2)
    assert state.cs == Segment(0xF000, 0xF_0000, 0xFFFF, 0x9B)


def test_real_mode__software_interrupt_returns_to_the_next_instruction() -> None:
    state, memory = real_machine()
    memory.poke(0x21 * 4, 0x0040_0010, 4)
    deliver(state, memory, Event(0x21, INT_N, instruction_length=2))
    assert memory.peek(0x200FA, 2) == 0x236


def test_real_mode__stack_pointer_wraps_and_keeps_the_upper_half_of_esp() -> None:
    state, memory = real_machine()
    memory.poke(0x40 * 4, 0x0040_0010, 4)
    state.gpr[Gpr.RSP] = 0xABCD_0002
    deliver(state, memory, Event(0x40, EXTERNAL))
    assert memory.peek(0x20000, 2) == 0x302
    assert memory.words(0x2FFFC, 2, 2) == [0x234, 0x1000]
    assert state.gpr[Gpr.RSP] == 0xABCD_FFFC


def test_real_mode__idt_may_be_moved() -> None:
    state, memory = real_machine()
    state.idtr = DescriptorTable(0x7000, 0x103)
    memory.poke(0x7000 + 0x40 * 4, 0x0040_0010, 4)
    deliver(state, memory, Event(0x40, EXTERNAL))
    assert (state.cs.selector, state.rip) == (0x40, 0x10)


def test_real_mode__vector_beyond_the_limit() -> None:
    state, memory = real_machine()
    state.idtr = DescriptorTable(0, 0x102)
    assert fault_of(state, memory, Event(0x40, EXTERNAL)) == Fault(Vector.GP, 0)


@pytest.mark.parametrize("pointer", [1, 3, 5])
def test_real_mode__odd_stack_pointer_splits_a_push(pointer: int) -> None:
    state, memory = real_machine()
    state.gpr[Gpr.RSP] = pointer
    assert fault_of(state, memory, Event(0x40, EXTERNAL)) == Fault(Vector.SS, 0)


# Virtual-8086 mode


@pytest.mark.parametrize("iopl", [0, 3])
def test_v86__exception_pushes_the_data_segments(iopl: int) -> None:
    state, memory = virtual_8086_machine(iopl)
    memory.gate(13, 0x08, 0x2000, 0x8E)
    deliver(state, memory, Event(13, EXCEPTION, error_code=0))
    flags = 0x3_0202 | iopl << 12
    expected = [0, 0x234, 0x1000, flags, 0x100, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000]
    assert memory.words(STACK_0 - 40, 10, 4) == expected
    assert (state.gpr[Gpr.RSP], state.rip, state.cpl) == (STACK_0 - 40, 0x2000, 0)
    assert state.rflags == 2 | iopl << 12
    for name in ("ES", "DS", "FS", "GS"):
        segment = state.segments[SegmentRegister[name]]
        assert (segment.selector, segment.usable) == (0, False)
    assert (state.cs.selector, state.ss.selector) == (0x08, 0x10)


def test_v86__16_bit_gate() -> None:
    state, memory = virtual_8086_machine()
    memory.gate(0x40, 0x08, 0x2000, 0x86)
    deliver(state, memory, Event(0x40, EXTERNAL))
    expected = [0x234, 0x1000, 0x0202, 0x100, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000]
    assert memory.words(STACK_0 - 18, 9, 2) == expected


@pytest.mark.parametrize(
    ("selector", "code"), [(0x48, 0x49), (0x30, 0x31), (0x18, 0x19)], ids=["dpl-1", "conf", "dpl-3"]
)
def test_v86__handler_must_be_non_conforming_at_level_0(selector: int, code: int) -> None:
    state, memory = virtual_8086_machine()
    memory.gate(0x40, selector, 0x2000, 0x8E)
    assert fault_of(state, memory, Event(0x40, EXTERNAL)) == Fault(Vector.GP, code)


@pytest.mark.parametrize(("extra", "fits"), [(36, True), (35, False)])
def test_v86__room_for_nine_doublewords(extra: int, fits: bool) -> None:
    state, memory = virtual_8086_machine()
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    memory.poke(TSS + 4, extra, 4)
    memory.poke(TSS + 8, 0x70, 2)
    if fits:
        deliver(state, memory, Event(0x40, EXTERNAL))
        assert state.gpr[Gpr.RSP] == 0
    else:
        assert fault_of(state, memory, Event(0x40, EXTERNAL)) == Fault(Vector.SS, 0x71)


def test_v86__int_n_below_iopl_3_faults() -> None:
    state, memory = virtual_8086_machine(iopl=2)
    memory.gate(0x40, 0x08, 0x2000, 0xEE)
    assert fault_of(state, memory, Event(0x40, INT_N, instruction_length=2)) == Fault(Vector.GP, 0)


def test_v86__injected_int_n_ignores_iopl() -> None:
    state, memory = virtual_8086_machine(iopl=0)
    memory.gate(0x40, 0x08, 0x2000, 0xEE)
    deliver(state, memory, Event(0x40, INT_N, instruction_length=2, injected=True))
    assert state.cpl == 0


def test_v86__int3_ignores_iopl_but_not_the_gate() -> None:
    state, memory = virtual_8086_machine(iopl=0)
    memory.gate(3, 0x08, 0x2000, 0xEE)
    deliver(state, memory, Event(3, INT3, instruction_length=1))
    assert memory.peek(STACK_0 - 36, 4) == 0x235
    state, memory = virtual_8086_machine(iopl=0)
    memory.gate(3, 0x08, 0x2000, 0x8E)
    assert fault_of(state, memory, Event(3, INT3, instruction_length=1)) == Fault(Vector.GP, 3 * 8 + 2)


def extended_machine(iopl: int, *, redirected: bool, flags: int = 0) -> tuple[CpuState, FakeMemory]:
    """CR4.VME set; the redirection bit map starts at TSS + 68H, below an I/O map at 88H."""
    state, memory = virtual_8086_machine(iopl)
    state.cr4 |= Cr4.VME.value
    state.rflags |= flags
    state.tr.limit = 0x200
    memory.poke(TSS + 102, 0x88, 2)
    memory.poke(TSS + 0x68 + 8, 0xFE if redirected else 0x01, 1)
    memory.poke(0x40 * 4, 0x7000_0010, 4)
    memory.gate(0x40, 0x08, 0x2000, 0xEE)
    return state, memory


def test_vme__redirects_to_the_8086_program() -> None:
    state, memory = extended_machine(3, redirected=True, flags=0x8_0100)
    deliver(state, memory, Event(0x40, INT_N, instruction_length=2))
    assert memory.words(0x200FA, 3, 2) == [0x236, 0x1000, 0x3302]
    assert (state.cs, state.rip) == (Segment(0x7000, 0x7_0000, 0xFFFF, 0xF3), 0x10)
    assert state.rflags == 0xA_3002  # IF and TF cleared, VIF untouched


@pytest.mark.parametrize(("flags", "saved"), [(0x8_0000, 0x3202), (0, 0x3002)], ids=["VIF", "no-VIF"])
def test_vme__below_iopl_3_virtualizes_the_interrupt_flag(flags: int, saved: int) -> None:
    state, memory = extended_machine(0, redirected=True, flags=flags)
    deliver(state, memory, Event(0x40, INT_N, instruction_length=2))
    assert memory.words(0x200FA, 3, 2) == [0x236, 0x1000, saved]
    assert state.rflags == 0x2_0202  # VIF cleared, IF untouched
    assert {access[3] for access in memory.accesses if access[0] == "write"} == {True}


def test_vme__bit_set_goes_to_the_monitor() -> None:
    state, memory = extended_machine(3, redirected=False)
    deliver(state, memory, Event(0x40, INT_N, instruction_length=2))
    assert state.cpl == 0
    state, memory = extended_machine(2, redirected=False)
    assert fault_of(state, memory, Event(0x40, INT_N, instruction_length=2)) == Fault(Vector.GP, 0)


def test_vme__hardware_interrupts_are_not_redirected() -> None:
    state, memory = extended_machine(0, redirected=True)
    deliver(state, memory, Event(0x40, EXTERNAL))
    assert state.cpl == 0


@pytest.mark.parametrize("limit", [0x66, 0x6F], ids=["no-map-base", "no-map"])
def test_vme__map_beyond_the_tss_faults(limit: int) -> None:
    state, memory = extended_machine(3, redirected=True)
    state.tr.limit = limit
    assert fault_of(state, memory, Event(0x40, INT_N, instruction_length=2)) == Fault(Vector.GP, 0)


def test_vme__map_base_below_32_faults() -> None:
    state, memory = extended_machine(3, redirected=True)
    memory.poke(TSS + 102, 0x10, 2)
    assert fault_of(state, memory, Event(0x40, INT_N, instruction_length=2)) == Fault(Vector.GP, 0)
