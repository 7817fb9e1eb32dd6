"""Task switches: what goes to the old TSS, what comes from the new one, and the checks on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from event_fixtures import GDT, LDT, TASK_16, TASK_32, TSS, FakeMemory, protected_machine

from vtx.x86.delivery import Event, EventKind, deliver
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Cr0, Cr4, Gpr, Segment, SegmentRegister
from vtx.x86.task import TaskSwitchHooks, TaskSwitchSource, task_switch

CALL, IRET, JMP, TASK_GATE = (
    TaskSwitchSource.CALL,
    TaskSwitchSource.IRET,
    TaskSwitchSource.JMP,
    TaskSwitchSource.TASK_GATE,
)

NEW_GPRS = (0xA0, 0xA1, 0xA2, 0xA3, 0x7000, 0xA5, 0xA6, 0xA7)


def new_task_32(memory: FakeMemory) -> None:
    """A 32-bit TSS at 4000H for a task at privilege level 0, with an LDT."""
    memory.poke(TASK_32 + 0x1C, 0x7_7000, 4)
    memory.poke(TASK_32 + 0x20, 0x50_0000, 4)
    memory.poke(TASK_32 + 0x24, 0x0000_0246, 4)
    for index, value in enumerate(NEW_GPRS):
        memory.poke(TASK_32 + 0x28 + index * 4, value, 4)
    for index, selector in enumerate((0x10, 0x08, 0x10, 0x23, 0x0C, 0)):  # ES CS SS DS FS GS
        memory.poke(TASK_32 + 0x48 + index * 4, selector, 4)
    memory.poke(TASK_32 + 0x60, 0x90, 4)
    memory.poke(LDT + 8, 0x00CF92000000FFFF, 8)


def machine() -> tuple[CpuState, FakeMemory]:
    state, memory = protected_machine()
    for register in range(8):
        if register != Gpr.RSP:
            state.gpr[register] = 0x1111_0000 + register
    state.dr7 = 0x7FF
    new_task_32(memory)
    return state, memory


def switch(state: CpuState, memory: FakeMemory, source: TaskSwitchSource = JMP, selector: int = 0x80) -> None:
    task_switch(state, memory, selector, source, rip=0x40_1236, rflags=state.rflags)


@pytest.mark.parametrize("source", [JMP, CALL, TASK_GATE])
def test_old_task_is_saved(source: TaskSwitchSource) -> None:
    state, memory = machine()
    state.rflags |= 0x4000  # NT
    switch(state, memory, source)
    assert memory.words(TSS + 0x20, 2, 4) == [0x40_1236, 0x4202]
    assert memory.words(TSS + 0x28, 8, 4) == [
        0x1111_0000,
        0x1111_0001,
        0x1111_0002,
        0x1111_0003,
        0x9000,
        0x1111_0005,
        0x1111_0006,
        0x1111_0007,
    ]
    assert memory.words(TSS + 0x48, 6, 4) == [0x10, 0x08, 0x10, 0x10, 0x10, 0x10]


def test_new_task_is_loaded() -> None:
    state, memory = machine()
    switch(state, memory)
    assert state.gpr[:8] == list(NEW_GPRS)
    assert (state.rip, state.rflags) == (0x50_0000, 0x246)
    assert [segment.selector for segment in state.segments] == [0x10, 0x08, 0x10, 0x23, 0x0C, 0]
    assert state.cs == Segment(0x08, 0, 0xFFFF_FFFF, 0xC09B)
    assert state.segments[SegmentRegister.FS] == Segment(0x0C, 0, 0xFFFF_FFFF, 0xC093)
    assert memory.peek(LDT + 13, 1) == 0x93
    assert not state.segments[SegmentRegister.GS].usable
    assert state.ldtr == Segment(0x90, LDT, 0x1F, 0x82)
    assert state.tr == Segment(0x80, TASK_32, 0x67, 0x8B)
    assert state.cr0 & Cr0.TS
    assert state.dr7 == 0x6AA
    assert state.cr3 == 0  # paging is off


@pytest.mark.parametrize(
    ("source", "old_busy", "new_nt", "link"),
    [(JMP, False, False, 0), (CALL, True, True, 0x28), (TASK_GATE, True, True, 0x28)],
)
def test_busy_bits_nested_task_flag_and_link(source: TaskSwitchSource, old_busy: bool, new_nt: bool, link: int) -> None:
    state, memory = machine()
    switch(state, memory, source)
    assert memory.peek(GDT + 0x2D, 1) == (0x8B if old_busy else 0x89)
    assert memory.peek(GDT + 0x85, 1) == 0x8B
    assert bool(state.rflags & 0x4000) is new_nt
    assert memory.peek(TASK_32, 2) == link


def test_iret__frees_the_old_task_and_keeps_the_new_one_busy() -> None:
    state, memory = machine()
    memory.poke(GDT + 0x85, 0x8B, 1)
    state.rflags |= 0x4000
    switch(state, memory, IRET)
    assert (memory.peek(GDT + 0x2D, 1), memory.peek(GDT + 0x85, 1)) == (0x89, 0x8B)
    assert memory.peek(TSS + 0x24, 4) == 0x202
    assert state.rflags == 0x246
    assert memory.peek(TASK_32, 2) == 0


def test_16_bit_task() -> None:
    state, memory = machine()
    for offset, value in {0x0E: 0x1234, 0x10: 0x0246, 0x12: 0xAAAA, 0x1A: 0x7000, 0x22: 0x10}.items():
        memory.poke(TASK_16 + offset, value, 2)
    memory.poke(TASK_16 + 0x24, 0x08, 2)
    memory.poke(TASK_16 + 0x26, 0x10, 2)
    memory.poke(TASK_16 + 0x28, 0x20, 2)
    switch(state, memory, selector=0x88)
    assert (state.rip, state.rflags) == (0x1234, 0x246)
    assert (state.gpr[Gpr.RAX] & 0xFFFF, state.gpr[Gpr.RSP] & 0xFFFF) == (0xAAAA, 0x7000)
    assert [segment.selector for segment in state.segments] == [0x10, 0x08, 0x10, 0x20, 0, 0]
    assert state.tr == Segment(0x88, TASK_16, 0x2B, 0x83)


def test_old_16_bit_task__gets_words() -> None:
    state, memory = machine()
    state.tr = Segment(0x88, TASK_16, 0x2B, 0x83)
    switch(state, memory)
    assert memory.words(TASK_16 + 0x0E, 3, 2) == [0x1236, 0x202, 0]
    assert memory.words(TASK_16 + 0x22, 5, 2) == [0x10, 0x08, 0x10, 0x10, 0]


def test_paging__loads_cr3_through_the_hook() -> None:
    state, memory = machine()
    state.cr0 |= Cr0.PG.value
    loaded: list[int] = []
    hooks = TaskSwitchHooks(load_cr3=lambda state, value: loaded.append(value))
    task_switch(state, memory, 0x80, JMP, rip=0, rflags=2, hooks=hooks)
    assert loaded == [0x7_7000]


def test_pae_paging__needs_a_hook() -> None:
    state, memory = machine()
    state.cr0 |= Cr0.PG.value
    state.cr4 |= Cr4.PAE.value
    with pytest.raises(ValueError, match="PAE"):
        switch(state, memory)


def test_paging__a_16_bit_task_keeps_cr3() -> None:
    state, memory = machine()
    state.cr0 |= Cr0.PG.value
    state.cr3 = 0x5000
    memory.poke(TASK_16 + 0x24, 0x0010_0008, 4)
    switch(state, memory, selector=0x88)
    assert state.cr3 == 0x5000


def test_conforming_code_in_a_data_register__ignores_privilege() -> None:
    state, memory = machine()
    memory.poke(TASK_32 + 0x54, 0x33, 4)
    switch(state, memory)
    assert state.segments[SegmentRegister.DS] == Segment(0x33, 0, 0xFFFF_FFFF, 0xC09F)


def test_virtual_8086_task() -> None:
    state, memory = machine()
    memory.poke(TASK_32 + 0x20, 0x100, 4)
    memory.poke(TASK_32 + 0x24, 0x2_0202, 4)
    switch(state, memory)
    assert state.cs == Segment(0x08, 0x80, 0xFFFF, 0xF3)
    assert state.segments[SegmentRegister.DS] == Segment(0x23, 0x230, 0xFFFF, 0xF3)
    assert state.cpl == 3


def test_task_gate__pushes_the_error_code_on_the_new_stack() -> None:
    state, memory = machine()
    memory.gate(8, 0x80, 0, 0x85)
    deliver(state, memory, Event(8, EventKind.HARDWARE_EXCEPTION, error_code=0x1234))
    assert (state.rip, state.gpr[Gpr.RSP]) == (0x50_0000, 0x6FFC)
    assert memory.peek(0x6FFC, 4) == 0x1234
    assert memory.words(TSS + 0x20, 2, 4) == [0x40_1234, 0x1_0202]
    assert state.rflags == 0x4246


@pytest.mark.parametrize("word", [0, 1, 0xFFFE])
def test_trap_flag_of_the_tss__makes_a_debug_exception_pending(word: int) -> None:
    state, memory = machine()
    memory.poke(TASK_32 + 0x64, word, 2)
    switch(state, memory)
    assert state.pending_debug == (word & 1) << 15


def test_intercept__comes_before_any_change() -> None:
    state, memory = machine()
    before, contents = copy.deepcopy(state), dict(memory.bytes)
    seen: list[tuple[int, TaskSwitchSource]] = []

    def leave(selector: int, source: TaskSwitchSource) -> None:
        seen.append((selector, source))
        raise InstructionAborted("exit")

    with pytest.raises(InstructionAborted):
        task_switch(state, memory, 0x80, CALL, rip=0, rflags=2, hooks=TaskSwitchHooks(intercept=leave))
    assert (state, memory.bytes, seen) == (before, contents, [(0x80, CALL)])


# Before the commit point: nothing has changed

Setup = Callable[[CpuState, FakeMemory], None]


def descriptor(selector: int, raw: int) -> Setup:
    return lambda state, memory: memory.poke(GDT + selector, raw, 8)


def tss_in_the_ldt(state: CpuState, memory: FakeMemory) -> None:
    state.ldtr = Segment(0x90, GDT, 0xFF, 0x82)


EARLY_FAULTS = [
    ("ldt-with-a-tss", JMP, 0x84, tss_in_the_ldt, Fault(Vector.GP, 0x84)),
    ("ldt", JMP, 0x84, None, Fault(Vector.GP, 0x84)),
    ("ldt-iret", IRET, 0x84, None, Fault(Vector.TS, 0x84)),
    ("beyond-gdt", JMP, 0x100, None, Fault(Vector.GP, 0x100)),
    ("no-tss", JMP, 0x08, None, Fault(Vector.GP, 0x08)),
    ("busy", CALL, 0x28, None, Fault(Vector.GP, 0x28)),
    ("not-busy-iret", IRET, 0x80, None, Fault(Vector.TS, 0x80)),
    ("not-present", JMP, 0x80, descriptor(0x80, 0x0000090040000067), Fault(Vector.NP, 0x80)),
    ("too-small", JMP, 0x80, descriptor(0x80, 0x0000890040000066), Fault(Vector.TS, 0x80)),
    ("too-small-16", JMP, 0x88, descriptor(0x88, 0x000081005000002A), Fault(Vector.TS, 0x88)),
    ("old-unusable", JMP, 0x80, lambda s, m: setattr(s.tr, "access_rights", 0x1008B), Fault(Vector.TS, 0x28)),
    ("old-too-small", JMP, 0x80, lambda s, m: setattr(s.tr, "limit", 0x5C), Fault(Vector.TS, 0x28)),
]


@pytest.mark.parametrize(
    ("source", "selector", "setup", "fault"), [c[1:] for c in EARLY_FAULTS], ids=[c[0] for c in EARLY_FAULTS]
)
def test_faults_before_the_commit_point(
    source: TaskSwitchSource, selector: int, setup: Setup | None, fault: Fault
) -> None:
    state, memory = machine()
    if setup is not None:
        setup(state, memory)
    before = copy.deepcopy(state)
    with pytest.raises(InstructionAborted) as caught:
        switch(state, memory, source, selector)
    assert caught.value.cause == fault
    assert state == before


def test_page_fault_in_the_new_tss__changes_nothing() -> None:
    state, memory = machine()
    memory.refused.add(TASK_32 >> 12)
    before, contents = copy.deepcopy(state), dict(memory.bytes)
    with pytest.raises(InstructionAborted):
        switch(state, memory)
    assert (state, memory.bytes) == (before, contents)


@pytest.mark.parametrize(("selector", "fits"), [(0x30, True), (0x33, True), (0x1B, True), (0x18, False)])
def test_code_segment_of_the_new_task(selector: int, fits: bool) -> None:
    state, memory = machine()
    stack = 0x20 | selector & 3 if selector & 3 else 0x10
    memory.poke(TASK_32 + 0x4C, selector, 4)
    memory.poke(TASK_32 + 0x50, stack, 4)
    for offset in (0x48, 0x54, 0x58):
        memory.poke(TASK_32 + offset, 0, 4)
    if fits:
        switch(state, memory)
        assert (state.cs.selector, state.cpl) == (selector, selector & 3)
    else:
        with pytest.raises(InstructionAborted) as caught:
            switch(state, memory)
        assert caught.value.cause == Fault(Vector.TS, selector)


# Past it: the new task takes the fault


def field(offset: int, value: int) -> Setup:
    return lambda state, memory: memory.poke(TASK_32 + offset, value, 4)


ES, CS, SS, DS, LDTR, EIP = 0x48, 0x4C, 0x50, 0x54, 0x60, 0x20

LATE_FAULTS = [
    ("ldt-in-ldt", field(LDTR, 0x94), Fault(Vector.TS, 0x95)),
    ("ldt-not-ldt", field(LDTR, 0x10), Fault(Vector.TS, 0x11)),
    ("ldt-not-present", descriptor(0x90, 0x000002001800001F), Fault(Vector.TS, 0x91)),
    ("cs-null", field(CS, 0), Fault(Vector.TS, 1)),
    ("cs-data", field(CS, 0x10), Fault(Vector.TS, 0x11)),
    ("cs-dpl", field(CS, 0x18), Fault(Vector.TS, 0x19)),
    ("cs-not-present", field(CS, 0x40), Fault(Vector.NP, 0x41)),
    ("ss-null", field(SS, 0), Fault(Vector.TS, 1)),
    ("ss-dpl", field(SS, 0x20), Fault(Vector.TS, 0x21)),
    ("ss-rpl", field(SS, 0x13), Fault(Vector.TS, 0x11)),
    ("ss-read-only", field(SS, 0xA8), Fault(Vector.TS, 0xA9)),
    ("ss-not-present", field(SS, 0xB0), Fault(Vector.SS, 0xB1)),
    ("ds-rpl", field(DS, 0x13), Fault(Vector.TS, 0x11)),
    ("ds-system", field(DS, 0x28), Fault(Vector.TS, 0x29)),
    ("ds-not-present", field(DS, 0xB0), Fault(Vector.NP, 0xB1)),
    ("es-beyond-gdt", field(ES, 0x100), Fault(Vector.TS, 0x101)),
    ("eip", lambda s, m: (field(CS, 0x68)(s, m), field(EIP, 0x1000)(s, m)), Fault(Vector.GP, 1)),
]


@pytest.mark.parametrize(("setup", "fault"), [c[1:] for c in LATE_FAULTS], ids=[c[0] for c in LATE_FAULTS])
def test_faults_past_the_commit_point(setup: Setup, fault: Fault) -> None:
    state, memory = machine()
    setup(state, memory)
    with pytest.raises(InstructionAborted) as caught:
        task_switch(state, memory, 0x80, TASK_GATE, rip=0, rflags=2, external=1)
    assert caught.value.cause == fault
    assert state.tr.selector == 0x80
    assert state.gpr[:8] == list(NEW_GPRS)


def test_unloaded_stack_segment__leaves_the_task_at_level_3() -> None:
    state, memory = machine()
    field(SS, 0)(state, memory)
    with pytest.raises(InstructionAborted):
        switch(state, memory)
    assert state.cpl == 3
    assert not state.ss.usable


class TestControlFlowEnforcement:
    """The TSS holds a shadow-stack pointer at offset 104, so it must be that long, and a 32-bit one."""

    TOKEN, SSP = 0x5_0000, 0x4_0000
    SELECTOR = 0xE0

    def machine(self, s_cet: int = 1) -> tuple[CpuState, FakeMemory]:
        state, memory = machine()
        memory.poke(GDT + self.SELECTOR, 0x0000_8900_4000_006B, 8)
        state.tr.limit = 0x6B
        memory.poke(TASK_32 + 104, self.TOKEN, 4)
        memory.poke(self.TOKEN, self.TOKEN, 8)
        state.cr0 |= Cr0.WP.value
        state.cr4 |= Cr4.CET.value
        state.s_cet, state.ssp = s_cet, self.SSP
        return state, memory

    @pytest.mark.parametrize("source", [CALL, TASK_GATE])
    def test_nested_task__remembers_where_it_came_from(self, source: TaskSwitchSource) -> None:
        state, memory = self.machine()
        switch(state, memory, source, self.SELECTOR)
        assert (state.ssp, memory.peek(self.TOKEN, 8)) == (self.TOKEN - 24, self.TOKEN | 1)
        assert memory.words(state.ssp, 3, 8) == [self.SSP, 0x40_1236, 0x08]

    def test_jump__pushes_nothing(self) -> None:
        state, memory = self.machine()
        switch(state, memory, JMP, self.SELECTOR)
        assert (state.ssp, memory.peek(self.TOKEN, 8)) == (self.TOKEN, self.TOKEN | 1)

    def test_return__goes_back_to_the_shadow_stack_of_the_outer_task(self) -> None:
        state, memory = self.machine()
        memory.poke(GDT + 0x28, 0x0000_8B00_3000_006B, 8)
        switch(state, memory, CALL, self.SELECTOR)
        switch(state, memory, IRET, 0x28)
        assert (state.ssp, memory.peek(self.TOKEN, 8)) == (self.SSP, self.TOKEN)

    def test_return__to_where_the_call_did_not_come_from(self) -> None:
        state, memory = self.machine()
        memory.poke(GDT + 0x28, 0x0000_8B00_3000_006B, 8)
        switch(state, memory, CALL, self.SELECTOR)
        memory.poke(TSS + 0x20, 0x40_0000, 4)
        with pytest.raises(InstructionAborted) as aborted:
            switch(state, memory, IRET, 0x28)
        assert aborted.value.cause == Fault(Vector.CP, 2)

    @pytest.mark.parametrize(("selector", "limit"), [(0x80, 0x67), (0x88, 0x2B)])
    def test_tss_without_room_for_the_pointer(self, selector: int, limit: int) -> None:
        state, memory = self.machine()
        with pytest.raises(InstructionAborted) as aborted:
            switch(state, memory, JMP, selector)
        assert aborted.value.cause == Fault(Vector.TS, selector)
        assert state.ssp == self.SSP

    def test_token__must_be_there(self) -> None:
        state, memory = self.machine()
        memory.poke(self.TOKEN, 0, 8)
        with pytest.raises(InstructionAborted) as aborted:
            switch(state, memory, JMP, self.SELECTOR)
        assert aborted.value.cause == Fault(Vector.GP, 0)

    def test_new_task__is_expected_to_begin_with_endbranch(self) -> None:
        state, memory = self.machine(s_cet=4)
        switch(state, memory, JMP, self.SELECTOR)
        assert (state.s_cet, state.ssp) == (4 | 1 << 11, self.SSP)
