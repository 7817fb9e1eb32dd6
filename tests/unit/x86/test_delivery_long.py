"""Delivery in IA-32e mode: 64-bit gates, the interrupt stack table, stack alignment, canonical addresses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from event_fixtures import IDT, TSS, FakeMemory, long_machine

from vtx.x86.delivery import Event, EventKind, deliver
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Cr4, DescriptorTable, Gpr, Segment, SegmentRegister

EXTERNAL, EXCEPTION, INT_N = EventKind.EXTERNAL_INTERRUPT, EventKind.HARDWARE_EXCEPTION, EventKind.SOFTWARE_INTERRUPT
INTERRUPT = Event(0x40, EXTERNAL)
HANDLER = 0xFFFF_FFFF_8100_1234
RIP = 0xFFFF_8000_0040_1234
GATE_ERROR = 0x40 * 8 + 2

Setup = Callable[[CpuState, FakeMemory], None]


def fault_of(state: CpuState, memory: FakeMemory, event: Event) -> Fault:
    before = copy.deepcopy(state)
    with pytest.raises(InstructionAborted) as caught:
        deliver(state, memory, event)
    assert state == before
    assert isinstance(caught.value.cause, Fault)
    return caught.value.cause


def test_same_privilege__aligns_the_stack_and_keeps_ss() -> None:
    state, memory = long_machine()
    memory.gate64(0x40, 0x58, HANDLER, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert memory.words(0x9000 - 40, 5, 8) == [RIP, 0x58, 0x202, 0x9008, 0x10]
    assert (state.gpr[Gpr.RSP], state.rip, state.rflags) == (0x9000 - 40, HANDLER, 2)
    assert (state.cs, state.ss.selector) == (Segment(0x58, 0, 0xFFFF_FFFF, 0xA09B), 0x10)
    assert state.in_64_bit_mode


def test_error_code__is_pushed_as_8_bytes() -> None:
    state, memory = long_machine()
    memory.gate64(13, 0x58, HANDLER, 0x8F)
    deliver(state, memory, Event(13, EXCEPTION, error_code=0x18))
    assert memory.words(0x9000 - 48, 6, 8) == [0x18, RIP, 0x58, 0x1_0202, 0x9008, 0x10]
    assert state.rflags == 0x202


def test_inner_privilege__loads_a_null_ss() -> None:
    state, memory = long_machine(cpl=3)
    memory.gate64(0x40, 0x58, HANDLER, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert memory.words(0xFFFF_8800_0000_8000 - 40, 5, 8) == [RIP, 0x63, 0x202, 0x9008, 0x23]
    assert state.gpr[Gpr.RSP] == 0xFFFF_8800_0000_8000 - 40
    assert (state.ss.selector, state.ss.usable, state.cpl) == (0, False, 0)


def test_inner_privilege__to_level_1() -> None:
    state, memory = long_machine(cpl=3)
    memory.poke(TSS + 12, 0xFFFF_8800_0000_6008, 8)
    memory.gate64(0x40, 0xD0, HANDLER, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert memory.words(0xFFFF_8800_0000_6000 - 40, 5, 8) == [RIP, 0x63, 0x202, 0x9008, 0x23]
    assert (state.cs.selector, state.ss.selector, state.ss.usable, state.cpl) == (0xD1, 1, False, 1)


@pytest.mark.parametrize("cpl", [0, 3])
def test_interrupt_stack_table(cpl: int) -> None:
    state, memory = long_machine(cpl)
    memory.gate64(2, 0x58, HANDLER, 0x8E, ist=1)
    deliver(state, memory, Event(2, EventKind.NMI))
    code, stack = (0x63, 0x23) if cpl else (0x58, 0x10)
    assert memory.words(0xFFFF_8800_0001_0000 - 40, 5, 8) == [RIP, code, 0x202, 0x9008, stack]
    assert state.gpr[Gpr.RSP] == 0xFFFF_8800_0001_0000 - 40
    assert state.nmi_blocked
    assert state.ss.selector == (0 if cpl else 0x10)


def test_from_compatibility_mode() -> None:
    state, memory = long_machine(cpl=3)
    state.segments[SegmentRegister.CS] = Segment(0x1B, 0, 0xFFFF_FFFF, 0xC0FB)
    state.rip = 0xFFFF_FFFF
    memory.gate64(0x80, 0x58, HANDLER, 0xEE)
    deliver(state, memory, Event(0x80, INT_N, instruction_length=2))
    assert memory.words(0xFFFF_8800_0000_8000 - 40, 5, 8) == [1, 0x1B, 0x202, 0x9008, 0x23]
    assert state.in_64_bit_mode


def test_software_interrupt__saves_a_64_bit_return_address() -> None:
    state, memory = long_machine()
    memory.gate64(0x40, 0x58, HANDLER, 0x8E)
    deliver(state, memory, Event(0x40, INT_N, instruction_length=2))
    assert memory.peek(0x9000 - 40, 8) == RIP + 2


def gate(selector: int = 0x58, offset: int = HANDLER, attributes: int = 0x8E, ist: int = 0) -> Setup:
    return lambda state, memory: memory.gate64(0x40, selector, offset, attributes, ist)


def with_tss(limit: int, *, ist: int = 0) -> Setup:
    def apply(state: CpuState, memory: FakeMemory) -> None:
        memory.gate64(0x40, 0x58, HANDLER, 0x8E, ist)
        state.tr = Segment(0x28, TSS, limit, 0x8B)

    return apply


def with_stack(pointer: int, *, ist: int = 0) -> Setup:
    def apply(state: CpuState, memory: FakeMemory) -> None:
        memory.gate64(0x40, 0x58, HANDLER, 0x8E, ist)
        memory.poke(TSS + (36 if ist else 4), pointer, 8)

    return apply


def with_table(name: str, base: int, limit: int = 0xFFFF) -> Setup:
    """The IDT, the GDT or the TSS at ``base``."""

    def apply(state: CpuState, memory: FakeMemory) -> None:
        memory.gate64(0x40, 0x58, HANDLER, 0x8E)
        if name == "tr":
            state.tr = Segment(0x28, base, limit, 0x8B)
        else:
            setattr(state, name, DescriptorTable(base, limit))

    return apply


# Tables where an address is not canonical. The gate is at 400H, the code descriptor at 58H, RSP0 at 4.
TABLES = [
    with_table("idtr", 0x8000_0000_0000),
    with_table("idtr", 0x7FFF_FFFF_FBF8),  # of the gate, the second half
    with_table("idtr", 0xFFFF_7FFF_FFFF_FB00),
    with_table("gdtr", 0x7FFF_FFFF_FFA8),
    with_table("tr", 0x7FFF_FFFF_FFFC),
]


@pytest.mark.parametrize("setup", TABLES)
@pytest.mark.parametrize(
    ("event", "code"),
    [
        (INTERRUPT, 1),
        (Event(0x40, EventKind.NMI), 1),
        (Event(0x40, EventKind.HARDWARE_EXCEPTION, error_code=0), 1),
        (Event(0x40, INT_N, instruction_length=2), 0),
    ],
)
def test_table_that_is_not_canonical__error_code_is_that_of_the_event(setup: Setup, event: Event, code: int) -> None:
    state, memory = long_machine(cpl=3)
    setup(state, memory)
    if event.kind is INT_N:
        memory.gate64(0x40, 0x58, HANDLER, 0xEE)
    assert fault_of(state, memory, event) == Fault(Vector.GP, code)


FAULTS = [
    ("gate-16-bit", gate(attributes=0x86), Vector.GP, GATE_ERROR | 1),
    ("gate-task", gate(attributes=0x85), Vector.GP, GATE_ERROR | 1),
    ("gate-not-present", gate(attributes=0x0E), Vector.NP, GATE_ERROR | 1),
    ("selector-null", gate(selector=0), Vector.GP, 1),
    ("code-32-bit", gate(selector=0x08), Vector.GP, 0x09),
    ("code-long-and-default", gate(selector=0xB8), Vector.GP, 0xB9),
    ("code-beyond-gdt", gate(selector=0x100), Vector.GP, 0x101),
    ("rip-non-canonical", gate(offset=0x8000_0000_0000), Vector.GP, 1),
    ("tss-limit", with_tss(10), Vector.TS, 0x29),
    ("tss-limit-ist", with_tss(42, ist=1), Vector.TS, 0x29),
    ("stack-non-canonical", with_stack(0x8000_0000_0000), Vector.SS, 1),
    ("ist-non-canonical", with_stack(0xFFFF_7FFF_FFFF_FFF8, ist=1), Vector.SS, 1),
    ("stack-below-canonical", with_stack(0xFFFF_8000_0000_0010), Vector.SS, 1),
]


@pytest.mark.parametrize(("setup", "vector", "code"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_faults(setup: Setup, vector: Vector, code: int) -> None:
    state, memory = long_machine(cpl=3)
    setup(state, memory)
    assert fault_of(state, memory, INTERRUPT) == Fault(vector, code)


def test_same_privilege__the_stack_pointer_itself_need_not_be_canonical() -> None:
    """SDM Vol. 2, "INT n/INTO/INT3/INT1—Call to Interrupt Procedure": the addresses of the pushes are what counts."""
    state, memory = long_machine()
    memory.gate64(0x40, 0x58, HANDLER, 0x8E)
    state.gpr[Gpr.RSP] = 0x8000_0000_0000
    deliver(state, memory, INTERRUPT)
    assert memory.words(0x8000_0000_0000 - 40, 5, 8) == [RIP, 0x58, 0x202, 0x8000_0000_0000, 0x10]
    assert state.gpr[Gpr.RSP] == 0x8000_0000_0000 - 40


@pytest.mark.parametrize("pointer", [0x8000_0000_0010, 0xFFFF_8000_0000_0010])
@pytest.mark.parametrize("offset", [HANDLER, 0x8000_0000_0000])
def test_same_privilege__pushes_that_are_not_canonical_come_before_the_handler(pointer: int, offset: int) -> None:
    state, memory = long_machine()
    memory.gate64(0x40, 0x58, offset, 0x8E)
    state.gpr[Gpr.RSP] = pointer
    assert fault_of(state, memory, INTERRUPT) == Fault(Vector.SS, 1)


@pytest.mark.parametrize("limit", [11, 0x67])
def test_tss_limit__reaches_the_end_of_rsp0(limit: int) -> None:
    state, memory = long_machine(cpl=3)
    with_tss(limit)(state, memory)
    deliver(state, memory, INTERRUPT)
    assert state.cpl == 0


def test_idt_entries__are_16_bytes() -> None:
    state, memory = long_machine()
    memory.gate64(0x40, 0x58, HANDLER, 0x8E)
    state.idtr = DescriptorTable(IDT, 0x40F)
    deliver(state, memory, INTERRUPT)
    state, memory = long_machine()
    memory.gate64(0x40, 0x58, HANDLER, 0x8E)
    state.idtr = DescriptorTable(IDT, 0x40E)
    assert fault_of(state, memory, INTERRUPT) == Fault(Vector.GP, GATE_ERROR | 1)


def test_linear_address_width__follows_5_level_paging() -> None:
    state, memory = long_machine()
    memory.gate64(0x40, 0x58, 0x0080_0000_0000_0000, 0x8E)
    state.cr4 |= Cr4.LA57.value
    deliver(state, memory, INTERRUPT)
    assert state.rip == 0x0080_0000_0000_0000


def test_software_interrupt__is_refused_by_the_gate_privilege() -> None:
    state, memory = long_machine(cpl=3)
    memory.gate64(0x40, 0x58, HANDLER, 0x8E)
    assert fault_of(state, memory, Event(0x40, INT_N, instruction_length=2)) == Fault(Vector.GP, GATE_ERROR)
