"""Delivery through interrupt and trap gates of protected mode: frames and registers by hand, faults by table."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from event_fixtures import GDT, IDT, LDT, STACK_0, STACK_3, TSS, FakeMemory, protected_machine

from vtx.x86.delivery import Event, EventKind, deliver
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import Activity, CpuState, DescriptorTable, Gpr, Segment, SegmentRegister, Shadow

EXTERNAL, NMI, EXCEPTION, INT_N, INT1, INT3 = (
    EventKind.EXTERNAL_INTERRUPT,
    EventKind.NMI,
    EventKind.HARDWARE_EXCEPTION,
    EventKind.SOFTWARE_INTERRUPT,
    EventKind.PRIVILEGED_SOFTWARE_EXCEPTION,
    EventKind.SOFTWARE_EXCEPTION,
)
INTERRUPT = Event(0x40, EXTERNAL)


def fault_of(state: CpuState, memory: FakeMemory, event: Event) -> Fault:
    """The fault that delivery raises; the registers must not have changed."""
    before = copy.deepcopy(state)
    with pytest.raises(InstructionAborted) as caught:
        deliver(state, memory, event)
    assert state == before
    assert isinstance(caught.value.cause, Fault)
    return caught.value.cause


# Frames and registers


def test_interrupt_gate__same_privilege() -> None:
    state, memory = protected_machine()
    memory.gate(0x40, 0x08, 0xC000_1000, 0x8E)
    state.rflags = 0x1_4302  # RF, NT, IF, TF
    deliver(state, memory, INTERRUPT)
    assert memory.words(STACK_3 - 12, 3, 4) == [0x40_1234, 0x08, 0x1_4302]
    assert (state.gpr[Gpr.RSP], state.rip, state.rflags) == (STACK_3 - 12, 0xC000_1000, 0x2)
    assert state.cs == Segment(0x08, 0, 0xFFFF_FFFF, 0xC09B)
    assert state.ss.selector == 0x10


def test_trap_gate__leaves_interrupts_enabled_and_pushes_the_error_code_last() -> None:
    state, memory = protected_machine()
    memory.gate(13, 0x08, 0x2000, 0x8F)
    deliver(state, memory, Event(13, EXCEPTION, error_code=0x58))
    assert memory.words(STACK_3 - 16, 4, 4) == [0x58, 0x40_1234, 0x08, 0x1_0202]
    assert (state.gpr[Gpr.RSP], state.rip, state.rflags) == (STACK_3 - 16, 0x2000, 0x202)


def test_inner_privilege__takes_the_stack_of_the_tss() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(14, 0x08, 0x2000, 0x8E)
    deliver(state, memory, Event(14, EXCEPTION, error_code=4, address=0xDEAD_0000))
    assert memory.words(STACK_0 - 24, 6, 4) == [4, 0x40_1234, 0x1B, 0x1_0202, STACK_3, 0x23]
    assert (state.gpr[Gpr.RSP], state.rip, state.rflags, state.cpl) == (STACK_0 - 24, 0x2000, 2, 0)
    assert state.ss == Segment(0x10, 0, 0xFFFF_FFFF, 0xC093)
    assert state.cr2 == 0xDEAD_0000


def test_inner_privilege__to_level_1() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(0x40, 0x48, 0x2000, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert memory.words(0xA000 - 20, 5, 4) == [0x40_1234, 0x1B, 0x202, STACK_3, 0x23]
    assert (state.cs.selector, state.ss.selector, state.cpl) == (0x49, 0x51, 1)


def test_inner_privilege__with_a_16_bit_tss() -> None:
    state, memory = protected_machine(cpl=3)
    state.tr = Segment(0x88, 0x5000, 0x2B, 0x83)
    memory.poke(0x5002, 0x7000, 2)
    memory.poke(0x5004, 0x10, 2)
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert memory.words(0x7000 - 20, 5, 4) == [0x40_1234, 0x1B, 0x202, STACK_3, 0x23]
    assert state.gpr[Gpr.RSP] == 0x7000 - 20


def test_inner_privilege__onto_a_16_bit_stack() -> None:
    state, memory = protected_machine(cpl=3)
    memory.poke(TSS + 4, 0x1234_0004, 4)
    memory.poke(TSS + 8, 0x78, 2)
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    deliver(state, memory, INTERRUPT)
    # SP wraps in the 64-KiB segment at 20000H; the upper half of ESP comes from the TSS.
    assert memory.peek(0x20000, 4) == 0x23
    assert memory.words(0x2FFF0, 4, 4) == [0x40_1234, 0x1B, 0x202, STACK_3]
    assert state.gpr[Gpr.RSP] == 0x1234_FFF0


def test_conforming_code__stays_at_the_current_privilege_level() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(0x40, 0x30, 0x2000, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert memory.words(STACK_3 - 12, 3, 4) == [0x40_1234, 0x1B, 0x202]
    assert (state.cs.selector, state.cpl) == (0x33, 3)
    assert [access[3] for access in memory.accesses if access[0] == "write"] == [True] * 3


def test_stack_of_an_inner_level__is_written_as_supervisor() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    state.rflags |= 1 << 18
    deliver(state, memory, INTERRUPT)
    assert {access[3:] for access in memory.accesses if access[0] == "write"} == {(False, True)}


def test_16_bit_gate__pushes_words_and_clears_the_upper_half_of_eip() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(13, 0x08, 0xFFFF_2000, 0x86)
    deliver(state, memory, Event(13, EXCEPTION, error_code=0x1_0058))
    assert memory.words(STACK_0 - 12, 6, 2) == [0x58, 0x1234, 0x1B, 0x202, 0x9000, 0x23]
    assert (state.gpr[Gpr.RSP], state.rip) == (STACK_0 - 12, 0x2000)


def test_handler_in_the_ldt() -> None:
    state, memory = protected_machine()
    state.ldtr = Segment(0x90, LDT, 0x1F, 0x82)
    memory.poke(LDT + 8, 0x00CF9A000000FFFF, 8)
    memory.gate(0x40, 0x0C, 0x2000, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert state.cs == Segment(0x0C, 0, 0xFFFF_FFFF, 0xC09B)
    assert memory.peek(LDT + 13, 1) == 0x9B


def test_accessed_bits__are_set_in_memory_and_in_the_registers() -> None:
    state, memory = protected_machine(cpl=3)
    memory.poke(TSS + 8, 0xA0, 2)
    memory.gate(0x40, 0x98, 0x2000, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert (memory.peek(GDT + 0x9D, 1), memory.peek(GDT + 0xA5, 1)) == (0x9B, 0x93)
    assert (state.cs.access_rights, state.ss.access_rights) == (0xC09B, 0xC093)


@pytest.mark.parametrize(
    ("event", "saved_eip", "saved_flags"),
    [
        (Event(0x40, EXTERNAL), 0x40_1234, 0x202),
        (Event(2, NMI), 0x40_1234, 0x202),
        (Event(0x40, INT_N, instruction_length=2), 0x40_1236, 0x202),
        (Event(3, INT3, instruction_length=1), 0x40_1235, 0x202),
        (Event(1, INT1, instruction_length=1), 0x40_1235, 0x202),
        (Event(0, EXCEPTION), 0x40_1234, 0x1_0202),
        (Event(6, EXCEPTION), 0x40_1234, 0x1_0202),
        (Event(16, EXCEPTION), 0x40_1234, 0x1_0202),
        (Event(18, EXCEPTION), 0x40_1234, 0x202),
        (Event(1, EXCEPTION, debug=0x4000), 0x40_1234, 0x202),
        (Event(1, EXCEPTION, debug=0x2000), 0x40_1234, 0x1_0202),
        (Event(0x40, EXTERNAL, resume_flag=True), 0x40_1234, 0x1_0202),
    ],
)
def test_saved_instruction_pointer_and_resume_flag(event: Event, saved_eip: int, saved_flags: int) -> None:
    state, memory = protected_machine()
    memory.gate(event.vector, 0x08, 0x2000, 0x8E)
    deliver(state, memory, event)
    assert memory.words(STACK_3 - 12, 3, 4) == [saved_eip, 0x08, saved_flags]


@pytest.mark.parametrize("rflags", [0x202, 0x1_0202])
@pytest.mark.parametrize("kind", [EXCEPTION, INT_N])
def test_injected_event__saves_the_resume_flag_of_the_guest(kind: EventKind, rflags: int) -> None:
    state, memory = protected_machine()
    memory.gate(6, 0x08, 0x2000, 0x8E)
    state.rflags = rflags
    deliver(state, memory, Event(6, kind, instruction_length=2, injected=True))
    assert memory.peek(STACK_3 - 4, 4) == rflags
    assert state.rflags == 2


def test_instruction_breakpoint__saves_the_resume_flag_as_it_is() -> None:
    state, memory = protected_machine()
    memory.gate(1, 0x08, 0x2000, 0x8E)
    state.rflags |= 0x1_0000
    deliver(state, memory, Event(1, EXCEPTION, debug=1))
    assert memory.peek(STACK_3 - 4, 4) == 0x1_0202


# Effects beside the frame


def test_interruptibility_and_activity() -> None:
    state, memory = protected_machine()
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    state.shadow, state.activity = Shadow.STI, Activity.HLT
    deliver(state, memory, INTERRUPT)
    assert (state.shadow, state.activity, state.nmi_blocked) == (Shadow.NONE, Activity.ACTIVE, False)


@pytest.mark.parametrize("block", [True, False])
def test_nmi__blocks_further_ones_unless_told_otherwise(block: bool) -> None:
    state, memory = protected_machine()
    memory.gate(2, 0x08, 0x2000, 0x8E)
    deliver(state, memory, Event(2, NMI), block_nmi=block)
    assert state.nmi_blocked is block


def test_interrupt_with_vector_2__does_not_block_nmis() -> None:
    state, memory = protected_machine()
    memory.gate(2, 0x08, 0x2000, 0x8E)
    deliver(state, memory, Event(2, INT_N, instruction_length=2))
    assert not state.nmi_blocked


def test_debug_exception__updates_dr6_and_clears_general_detect() -> None:
    state, memory = protected_machine()
    memory.gate(1, 0x08, 0x2000, 0x8E)
    state.dr6, state.dr7 = 0xFFFF_0FF8, 0x2455
    deliver(state, memory, Event(1, EXCEPTION, debug=0x4001))
    assert (state.dr6, state.dr7) == (0xFFFF_4FF1, 0x455)


def test_injected_debug_exception_and_page_fault__leave_the_registers_alone() -> None:
    state, memory = protected_machine()
    memory.gate(1, 0x08, 0x2000, 0x8E)
    memory.gate(14, 0x08, 0x2000, 0x8E)
    state.dr6, state.dr7, state.cr2 = 0xFFFF_0FF8, 0x2455, 0x1234
    deliver(state, memory, Event(1, EXCEPTION))
    deliver(state, memory, Event(14, EXCEPTION, error_code=0))
    assert (state.dr6, state.dr7, state.cr2) == (0xFFFF_0FF8, 0x2455, 0x1234)


# Faults

Setup = Callable[[CpuState, FakeMemory], None]


def gate(vector: int = 0x40, selector: int = 0x08, offset: int = 0x2000, attributes: int = 0x8E) -> Setup:
    return lambda state, memory: memory.gate(vector, selector, offset, attributes)


def both(*setups: Setup) -> Setup:
    def apply(state: CpuState, memory: FakeMemory) -> None:
        for setup in setups:
            setup(state, memory)

    return apply


def idt_limit(limit: int) -> Setup:
    return lambda state, memory: setattr(state, "idtr", DescriptorTable(IDT, limit))


def tss_stack(selector: int, pointer: int = STACK_0) -> Setup:
    def apply(state: CpuState, memory: FakeMemory) -> None:
        memory.poke(TSS + 4, pointer, 4)
        memory.poke(TSS + 8, selector, 2)

    return apply


def task_register(segment: Segment) -> Setup:
    return lambda state, memory: setattr(state, "tr", segment)


def stack(pointer: int, segment: Segment) -> Setup:
    def apply(state: CpuState, memory: FakeMemory) -> None:
        state.gpr[Gpr.RSP] = pointer
        state.segments[SegmentRegister.SS] = segment

    return apply


GATE_ERROR = 0x40 * 8 + 2

GATE_FAULTS = [
    ("limit", both(gate(), idt_limit(0x206)), Vector.GP, GATE_ERROR),
    ("type-call-gate", gate(attributes=0x8C), Vector.GP, GATE_ERROR),
    ("type-code-segment", gate(attributes=0x9E), Vector.GP, GATE_ERROR),
    ("type-zero", gate(attributes=0x80), Vector.GP, GATE_ERROR),
    ("not-present", gate(attributes=0x0E), Vector.NP, GATE_ERROR),
    ("type-before-present", gate(attributes=0x0C), Vector.GP, GATE_ERROR),
    ("null-selector", gate(selector=3), Vector.GP, 0),
    ("selector-beyond-gdt", gate(selector=0x103), Vector.GP, 0x100),
    ("selector-in-no-ldt", gate(selector=0x0C), Vector.GP, 0x0C),
    ("data-segment", gate(selector=0x13), Vector.GP, 0x10),
    ("system-segment", gate(selector=0x28), Vector.GP, 0x28),
    ("code-not-present", gate(selector=0x40), Vector.NP, 0x40),
    ("eip-beyond-limit", gate(selector=0x68, offset=0x1000), Vector.GP, 0),
]


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("kind", [EXTERNAL, INT_N])
@pytest.mark.parametrize(
    ("setup", "vector", "code"), [case[1:] for case in GATE_FAULTS], ids=[c[0] for c in GATE_FAULTS]
)
def test_gate_faults(kind: EventKind, cpl: int, setup: Setup, vector: Vector, code: int) -> None:
    state, memory = protected_machine(cpl)
    setup(state, memory)
    attributes = IDT + 0x40 * 8 + 5
    memory.poke(attributes, memory.peek(attributes, 1) | 0x60, 1)  # DPL 3 admits INT n; the rest stays as set up
    external = 0 if kind == INT_N else 1
    event = Event(0x40, kind, instruction_length=2)
    assert fault_of(state, memory, event) == Fault(vector, code | external)


@pytest.mark.parametrize(
    ("kind", "dpl", "cpl", "faults"),
    [
        (INT_N, 0, 3, True),
        (INT3, 0, 3, True),
        (INT1, 0, 3, False),
        (EXTERNAL, 0, 3, False),
        (EXCEPTION, 0, 3, False),
        (INT_N, 3, 3, False),
        (INT_N, 0, 0, False),
    ],
)
def test_gate_privilege(kind: EventKind, dpl: int, cpl: int, faults: bool) -> None:
    state, memory = protected_machine(cpl)
    memory.gate(0x40, 0x08, 0x2000, 0x8E | dpl << 5)
    event = Event(0x40, kind, instruction_length=2)
    if faults:
        assert fault_of(state, memory, event) == Fault(Vector.GP, GATE_ERROR)
    else:
        deliver(state, memory, event)
        assert state.rip == 0x2000


def test_gate_privilege__comes_before_presence() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(0x40, 0x08, 0x2000, 0x0E)
    assert fault_of(state, memory, Event(0x40, INT_N, instruction_length=2)) == Fault(Vector.GP, GATE_ERROR)


def test_int1__sets_the_ext_bit() -> None:
    state, memory = protected_machine()
    memory.gate(1, 0x08, 0x2000, 0x0E)
    assert fault_of(state, memory, Event(1, INT1, instruction_length=1)) == Fault(Vector.NP, 1 * 8 + 2 + 1)


def test_code_of_an_outer_level__is_refused() -> None:
    state, memory = protected_machine()
    memory.gate(0x40, 0x1B, 0x2000, 0x8E)
    assert fault_of(state, memory, INTERRUPT) == Fault(Vector.GP, 0x19)


INNER_FAULTS = [
    ("tss-limit", task_register(Segment(0x28, TSS, 8, 0x8B)), Vector.TS, 0x29),
    ("tss-unusable", task_register(Segment(0x28, TSS, 0x67, 0x1008B)), Vector.TS, 0x29),
    ("tss-16-limit", task_register(Segment(0x88, 0x5000, 4, 0x83)), Vector.TS, 0x89),
    ("ss-null", tss_stack(0), Vector.TS, 1),
    ("ss-beyond-gdt", tss_stack(0x100), Vector.TS, 0x101),
    ("ss-rpl", tss_stack(0x13), Vector.TS, 0x11),
    ("ss-dpl", tss_stack(0x20), Vector.TS, 0x21),
    ("ss-read-only", tss_stack(0xA8), Vector.TS, 0xA9),
    ("ss-code", tss_stack(0x08), Vector.TS, 0x09),
    ("ss-not-present", tss_stack(0xB0), Vector.SS, 0xB1),
    ("ss-limit", tss_stack(0x70, 0x1004), Vector.SS, 0x71),
    ("ss-expand-down", tss_stack(0xC0, 0x100_0010), Vector.SS, 0xC1),
]


@pytest.mark.parametrize(
    ("setup", "vector", "code"), [case[1:] for case in INNER_FAULTS], ids=[c[0] for c in INNER_FAULTS]
)
def test_inner_privilege_faults(setup: Setup, vector: Vector, code: int) -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    setup(state, memory)
    assert fault_of(state, memory, INTERRUPT) == Fault(vector, code)


def test_null_selectors__are_refused_even_if_the_first_descriptor_would_do() -> None:
    state, memory = protected_machine(cpl=3)
    memory.poke(GDT, 0x00CF9B000000FFFF, 8)
    memory.gate(0x40, 0, 0x2000, 0x8E)
    assert fault_of(state, memory, INTERRUPT) == Fault(Vector.GP, 1)
    memory.poke(GDT, 0x00CF93000000FFFF, 8)
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    memory.poke(TSS + 8, 0, 2)
    assert fault_of(state, memory, INTERRUPT) == Fault(Vector.TS, 1)


def test_room_on_the_stack_of_level_1__names_the_selector_without_its_rpl() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(0x40, 0x48, 0x2000, 0x8E)
    memory.poke(GDT + 0x50, 0x0040B30000000FFF, 8)
    fault = Fault(Vector.SS, 0x51)
    assert fault_of(state, memory, INTERRUPT) == fault
    assert fault_of(state, memory, Event(0x40, INT1, instruction_length=1)) == fault
    memory.gate(0x40, 0x48, 0x2000, 0xEE)
    assert fault_of(state, memory, Event(0x40, INT_N, instruction_length=2)) == Fault(Vector.SS, 0x50)


def test_tss_limit__may_be_just_large_enough() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    state.tr.limit = 9
    deliver(state, memory, INTERRUPT)
    assert state.gpr[Gpr.RSP] == STACK_0 - 20


@pytest.mark.parametrize(
    ("setup", "fits"),
    [
        (stack(0x1000, Segment(0x70, 0, 0xFFF, 0x4093)), True),
        (stack(0x1001, Segment(0x70, 0, 0xFFF, 0x4093)), False),
        (stack(0x000C, Segment(0x70, 0, 0xFFF, 0x4093)), True),
        (stack(0x0008, Segment(0x70, 0, 0xFFF, 0x4093)), False),
        (stack(0x0002, Segment(0x78, 0x20000, 0xFFFF, 0x93)), False),
        (stack(0x0004, Segment(0x78, 0x20000, 0xFFFF, 0x93)), True),
        (stack(0x100C, Segment(0xC0, 0, 0xFFF, 0xC097)), True),
        (stack(0x1008, Segment(0xC0, 0, 0xFFF, 0xC097)), False),
        (stack(0x9000, Segment(0x10, 0, 0xFFFF_FFFF, 0x1C093)), False),
    ],
    ids=[
        "exact",
        "beyond",
        "down-to-0",
        "below-0",
        "16-bit-split",
        "16-bit-wrap",
        "down-fits",
        "down-below",
        "unusable",
    ],
)
def test_room_on_the_current_stack(setup: Setup, fits: bool) -> None:
    state, memory = protected_machine()
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    setup(state, memory)
    if fits:
        deliver(state, memory, INTERRUPT)
        assert state.rip == 0x2000
    else:
        assert fault_of(state, memory, INTERRUPT) == Fault(Vector.SS, 1)
        assert not [access for access in memory.accesses if access[0] == "write"]


def test_entry_point_at_the_limit_of_the_code_segment() -> None:
    state, memory = protected_machine()
    memory.gate(0x40, 0x68, 0xFFF, 0x8E)
    deliver(state, memory, INTERRUPT)
    assert state.rip == 0xFFF


@pytest.mark.parametrize(
    ("page", "address"),
    [(IDT, IDT + 0x200), (GDT, GDT + 8), (TSS, TSS + 8), (STACK_0 - 0x1000, STACK_0 - 4)],
    ids=["idt", "gdt", "tss", "stack"],
)
def test_page_faults_during_delivery(page: int, address: int) -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    memory.refused.add(page >> 12)
    fault = fault_of(state, memory, INTERRUPT)
    assert (fault.vector, fault.address) == (Vector.PF, address)


def test_page_fault_on_the_second_page_of_the_frame() -> None:
    state, memory = protected_machine()
    memory.gate(0x40, 0x08, 0x2000, 0x8E)
    state.gpr[Gpr.RSP] = 0x9004
    memory.refused.add(0x8)
    fault = fault_of(state, memory, INTERRUPT)
    assert (fault.vector, fault.error_code, fault.address) == (Vector.PF, 2, 0x8FFC)
