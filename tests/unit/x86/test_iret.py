"""IRET in every mode: what is popped, which flags change, which checks fail."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from event_fixtures import (
    GDT,
    STACK_3,
    TASK_32,
    TSS,
    FakeMemory,
    long_machine,
    protected_machine,
    real_machine,
    virtual_8086_machine,
)

from vtx.x86.iret import iret
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Cr4, Gpr, Segment, SegmentRegister, Shadow
from vtx.x86.task import TaskSwitchHooks

ALL_FLAGS = 0xFFFF_FFFF


def frame(state: CpuState, memory: FakeMemory, size: int, *values: int) -> None:
    """Lay ``values`` on the current stack, the top of the stack first."""
    base = state.ss.base if not state.in_64_bit_mode else 0
    for index, value in enumerate(values):
        memory.poke(base + state.gpr[Gpr.RSP] + index * size, value, size)


def fault_of(state: CpuState, memory: FakeMemory, operand_size: int) -> Fault:
    before = copy.deepcopy(state)
    with pytest.raises(InstructionAborted) as caught:
        iret(state, memory, operand_size)
    before.nmi_blocked = False
    assert state == before
    assert isinstance(caught.value.cause, Fault)
    return caught.value.cause


# Real-address mode


def test_real_mode_16() -> None:
    state, memory = real_machine()
    frame(state, memory, 2, 0x5678, 0x7000, 0xFFFF)
    iret(state, memory, 16)
    assert (state.rip, state.cs.selector, state.cs.base) == (0x5678, 0x7000, 0x7_0000)
    assert state.gpr[Gpr.RSP] == 0x106
    assert state.rflags == 0x4_7FD7  # AC stays, RF is not in the image


def test_real_mode_32__masks_the_popped_flags() -> None:
    state, memory = real_machine()
    state.rflags = 0x1A_0002  # VIP, VIF, VM stay
    frame(state, memory, 4, 0x5678, 0xFFFF_7000, 0x25_7FD7 | 0x8028)
    iret(state, memory, 32)
    assert state.rflags == 0x1A_0002 | 0x25_7FD5
    assert state.gpr[Gpr.RSP] == 0x10C


def test_real_mode_32__eip_beyond_the_limit() -> None:
    state, memory = real_machine()
    frame(state, memory, 4, 0x1_0000, 0x7000, 2)
    assert fault_of(state, memory, 32) == Fault(Vector.GP, 0)


def test_real_mode_32__eip_at_the_limit() -> None:
    state, memory = real_machine()
    frame(state, memory, 4, 0xFFFF, 0x7000, 2)
    iret(state, memory, 32)
    assert state.rip == 0xFFFF


def test_real_mode__stack_limit() -> None:
    state, memory = real_machine()
    state.gpr[Gpr.RSP] = 0xFFFD
    assert fault_of(state, memory, 16) == Fault(Vector.SS, 0)


# Protected mode


def test_same_privilege__all_flags_at_level_0() -> None:
    state, memory = protected_machine()
    state.shadow = Shadow.MOV_SS
    frame(state, memory, 4, 0x50_0000, 0x08, ALL_FLAGS & ~0x2_0000)
    iret(state, memory, 32)
    assert (state.rip, state.cs.selector, state.gpr[Gpr.RSP]) == (0x50_0000, 0x08, STACK_3 + 12)
    assert state.rflags == 0x3D_7FD7  # all but VM
    assert state.shadow == Shadow.NONE


@pytest.mark.parametrize(
    ("iopl", "operand_size", "expected"),
    [(0, 32, 0x25_4FD7), (3, 32, 0x25_7FD7), (0, 16, 0x4FD7), (3, 16, 0x7FD7)],
)
def test_same_privilege__flags_at_level_3(iopl: int, operand_size: int, expected: int) -> None:
    state, memory = protected_machine(cpl=3)
    state.rflags = 0x202 | iopl << 12
    frame(state, memory, operand_size // 8, 0x1000, 0x1B, ALL_FLAGS)
    iret(state, memory, operand_size)
    assert state.rflags == expected


@pytest.mark.parametrize(("iopl", "expected"), [(2, 0x2202), (3, 0x3002)])
def test_interrupt_flag__needs_iopl(iopl: int, expected: int) -> None:
    state, memory = protected_machine(cpl=3)
    state.rflags = 0x202 | iopl << 12
    frame(state, memory, 4, 0x1000, 0x1B, 2)
    iret(state, memory, 32)
    assert state.rflags == expected


def test_outer_privilege() -> None:
    state, memory = protected_machine()
    state.segments[SegmentRegister.FS] = Segment(0x23, 0, 0xFFFF_FFFF, 0xC0F3)
    state.segments[SegmentRegister.GS] = Segment(0x30, 0, 0xFFFF_FFFF, 0xC09F)
    frame(state, memory, 4, 0x50_0000, 0x1B, 0x202, 0xBFFF_0000, 0x23)
    iret(state, memory, 32)
    assert (state.rip, state.cs.selector, state.ss.selector, state.cpl) == (0x50_0000, 0x1B, 0x23, 3)
    assert state.gpr[Gpr.RSP] == 0xBFFF_0000
    usable = {name: state.segments[SegmentRegister[name]].usable for name in ("ES", "DS", "FS", "GS")}
    assert usable == {"ES": False, "DS": False, "FS": True, "GS": True}


def test_outer_privilege__onto_a_16_bit_stack_keeps_the_upper_half_of_esp() -> None:
    state, memory = protected_machine()
    state.gpr[Gpr.RSP] = 0x1234_9000
    frame(state, memory, 4, 0x50_0000, 0x1B, 0x202, 0xBFFF_0040, 0xCB)
    iret(state, memory, 32)
    assert state.gpr[Gpr.RSP] == 0x1234_0040


def test_16_bit_outer_privilege() -> None:
    state, memory = protected_machine()
    state.rflags |= 0x4_0000
    frame(state, memory, 2, 0x1000, 0x1B, 0x246, 0x7000, 0x23)
    iret(state, memory, 16)
    assert (state.rip, state.gpr[Gpr.RSP], state.rflags) == (0x1000, 0x7000, 0x4_0246)


def test_return_to_virtual_8086_mode() -> None:
    state, memory = protected_machine()
    selectors = (0x2000, 0x3000, 0x4000, 0x5000, 0x6000)  # SS ES DS FS GS
    frame(state, memory, 4, 0x234, 0x1000, 0x2_3202, 0x100, *selectors)
    iret(state, memory, 32)
    assert (state.rip, state.gpr[Gpr.RSP], state.rflags, state.cpl) == (0x234, 0x100, 0x2_3202, 3)
    found = {register.name: state.segments[register].selector for register in SegmentRegister}
    assert found == {"ES": 0x3000, "CS": 0x1000, "SS": 0x2000, "DS": 0x4000, "FS": 0x5000, "GS": 0x6000}
    assert all(state.segments[register].access_rights == 0xF3 for register in SegmentRegister)
    assert state.segments[SegmentRegister.GS].base == 0x6_0000


def test_virtual_8086_flag__is_ignored_above_level_0() -> None:
    state, memory = protected_machine(cpl=3)
    frame(state, memory, 4, 0x1000, 0x1B, 0x2_0202)
    iret(state, memory, 32)
    assert state.rflags == 0x202


Setup = tuple[int, ...]

PROTECTED_FAULTS = [
    ("cs-null", (0x1000, 0, 2), Fault(Vector.GP, 0)),
    ("cs-beyond-gdt", (0x1000, 0x103, 2), Fault(Vector.GP, 0x100)),
    ("cs-data", (0x1000, 0x10, 2), Fault(Vector.GP, 0x10)),
    ("cs-dpl", (0x1000, 0x0B, 2, 0, 0x23), Fault(Vector.GP, 0x08)),
    ("cs-not-present", (0x1000, 0x40, 2), Fault(Vector.NP, 0x40)),
    ("eip", (0x1000, 0x68, 2), Fault(Vector.GP, 0)),
    ("ss-null", (0x1000, 0x1B, 2, 0, 3), Fault(Vector.GP, 0)),
    ("ss-rpl", (0x1000, 0x1B, 2, 0, 0x20), Fault(Vector.GP, 0x20)),
    ("ss-dpl", (0x1000, 0x1B, 2, 0, 0x13), Fault(Vector.GP, 0x10)),
    ("ss-code", (0x1000, 0x1B, 2, 0, 0x1B), Fault(Vector.GP, 0x18)),
    ("v86-eip", (0x1_0000, 0x1000, 0x2_0002), Fault(Vector.GP, 0)),
]


@pytest.mark.parametrize(("values", "fault"), [c[1:] for c in PROTECTED_FAULTS], ids=[c[0] for c in PROTECTED_FAULTS])
def test_protected_mode_faults(values: tuple[int, ...], fault: Fault) -> None:
    state, memory = protected_machine()
    frame(state, memory, 4, *values)
    assert fault_of(state, memory, 32) == fault


def test_eip_at_the_limit() -> None:
    state, memory = protected_machine()
    frame(state, memory, 4, 0xFFF, 0x68, 2)
    iret(state, memory, 32)
    assert state.rip == 0xFFF


def test_null_code_selector__is_refused_even_if_the_first_descriptor_would_do() -> None:
    state, memory = protected_machine()
    memory.poke(GDT, 0x00CF9B000000FFFF, 8)
    frame(state, memory, 4, 0x1000, 0, 2)
    assert fault_of(state, memory, 32) == Fault(Vector.GP, 0)


@pytest.mark.parametrize(("selector", "fits"), [(0x33, True), (0x4B, False)], ids=["conforming", "non-conforming"])
def test_code_of_a_lower_dpl_than_the_return_level(selector: int, fits: bool) -> None:
    state, memory = protected_machine(cpl=3)
    frame(state, memory, 4, 0x1000, selector, 2)
    if fits:
        iret(state, memory, 32)
        assert (state.cs.selector, state.cpl) == (0x33, 3)
    else:
        assert fault_of(state, memory, 32) == Fault(Vector.GP, 0x48)


def test_compatibility_mode__eip_at_the_limit() -> None:
    state, memory = long_machine()
    frame(state, memory, 8, 0xFFF, 0x68, 2, 0x9000, 0x10)
    iret(state, memory, 64)
    assert state.rip == 0xFFF


def test_return_to_an_inner_level__is_refused() -> None:
    state, memory = protected_machine(cpl=3)
    frame(state, memory, 4, 0x1000, 0x08, 2)
    assert fault_of(state, memory, 32) == Fault(Vector.GP, 0x08)


def test_outer_stack_not_present() -> None:
    state, memory = protected_machine()
    memory.poke(GDT + 0x20, 0x00CF73000000FFFF, 8)
    frame(state, memory, 4, 0x1000, 0x1B, 2, 0, 0x23)
    assert fault_of(state, memory, 32) == Fault(Vector.SS, 0x20)


def test_nmi_is_unblocked_even_by_a_fault() -> None:
    state, memory = protected_machine()
    state.nmi_blocked = True
    frame(state, memory, 4, 0x1000, 0, 2)
    fault_of(state, memory, 32)
    assert not state.nmi_blocked


def test_nmi_stays_blocked_if_told_so() -> None:
    state, memory = protected_machine()
    state.nmi_blocked = True
    frame(state, memory, 4, 0x1000, 0x08, 2)
    iret(state, memory, 32, unblock_nmi=False)
    assert state.nmi_blocked


def test_nested_task() -> None:
    state, memory = protected_machine()
    memory.poke(GDT + 0x85, 0x8B, 1)
    memory.poke(TSS, 0x80, 2)
    memory.poke(TASK_32 + 0x20, 0x50_0000, 4)
    memory.poke(TASK_32 + 0x24, 0x46, 4)
    memory.poke(TASK_32 + 0x4C, 0x08, 4)
    memory.poke(TASK_32 + 0x50, 0x10, 4)
    state.rflags |= 0x4000
    iret(state, memory, 32)
    assert (state.rip, state.tr.selector, state.rflags) == (0x50_0000, 0x80, 0x46)
    assert memory.words(TSS + 0x20, 2, 4) == [0x40_1235, 0x202]


def test_nested_task__needs_a_busy_tss() -> None:
    state, memory = protected_machine()
    memory.poke(TSS, 0x80, 2)
    state.rflags |= 0x4000
    assert fault_of(state, memory, 32) == Fault(Vector.TS, 0x80)


def test_nested_task__is_intercepted() -> None:
    state, memory = protected_machine()
    memory.poke(GDT + 0x85, 0x8B, 1)
    memory.poke(TSS, 0x80, 2)
    state.rflags |= 0x4000

    def leave(selector: int, source: int) -> None:
        raise InstructionAborted((selector, source))

    with pytest.raises(InstructionAborted) as caught:
        iret(state, memory, 32, hooks=TaskSwitchHooks(intercept=leave))
    assert caught.value.cause == (0x80, 1)


# Virtual-8086 mode


def test_v86__iopl_3() -> None:
    state, memory = virtual_8086_machine(iopl=3)
    frame(state, memory, 2, 0x5678, 0x7000, 0x0146)
    iret(state, memory, 16)
    assert (state.rip, state.cs) == (0x5678, Segment(0x7000, 0x7_0000, 0xFFFF, 0xF3))
    assert state.rflags == 0x2_3146  # IF cleared, IOPL and VM kept
    assert state.gpr[Gpr.RSP] == 0x106


def test_v86__32_bit_keeps_vm_iopl_vif_and_vip() -> None:
    state, memory = virtual_8086_machine(iopl=3)
    frame(state, memory, 4, 0x5678, 0x7000, 0x3D_0FD7)
    iret(state, memory, 32)
    assert state.rflags == 0x2_3000 | 0x25_0FD7


def test_v86__eip_within_the_limit() -> None:
    state, memory = virtual_8086_machine(iopl=3)
    frame(state, memory, 4, 0xFFFF, 0x7000, 2)
    iret(state, memory, 32)
    assert state.rip == 0xFFFF
    state, memory = virtual_8086_machine(iopl=3)
    frame(state, memory, 4, 0x1_0000, 0x7000, 2)
    assert fault_of(state, memory, 32) == Fault(Vector.GP, 0)


@pytest.mark.parametrize(("vme", "operand_size"), [(False, 16), (False, 32), (True, 32)])
def test_v86__below_iopl_3_faults(vme: bool, operand_size: int) -> None:
    state, memory = virtual_8086_machine(iopl=2)
    state.cr4 |= Cr4.VME.value if vme else 0
    frame(state, memory, operand_size // 8, 0x5678, 0x7000, 2)
    assert fault_of(state, memory, operand_size) == Fault(Vector.GP, 0)


@pytest.mark.parametrize(("image", "expected"), [(0x0246, 0xA_0246), (0x0046, 0x2_0246)])
def test_vme__maps_if_to_vif(image: int, expected: int) -> None:
    state, memory = virtual_8086_machine(iopl=0)
    state.cr4 |= Cr4.VME.value
    frame(state, memory, 2, 0x5678, 0x7000, image)
    iret(state, memory, 16)
    assert state.rflags == expected


@pytest.mark.parametrize(("image", "vip"), [(0x0102, 0), (0x0202, 0x10_0000)], ids=["TF", "IF-and-VIP"])
def test_vme__faults(image: int, vip: int) -> None:
    state, memory = virtual_8086_machine(iopl=0)
    state.cr4 |= Cr4.VME.value
    state.rflags |= vip
    frame(state, memory, 2, 0x5678, 0x7000, image)
    assert fault_of(state, memory, 16) == Fault(Vector.GP, 0)


# IA-32e mode

RIP = 0xFFFF_8000_0000_1000


def test_64_bit__same_privilege_pops_the_stack_too() -> None:
    state, memory = long_machine()
    frame(state, memory, 8, RIP, 0x58, 0x246, 0xFFFF_8000_0000_9999, 0x10)
    iret(state, memory, 64)
    assert (state.rip, state.rflags, state.gpr[Gpr.RSP]) == (RIP, 0x246, 0xFFFF_8000_0000_9999)
    assert (state.cs.selector, state.ss.selector) == (0x58, 0x10)


def test_64_bit__null_ss_below_level_3() -> None:
    state, memory = long_machine()
    frame(state, memory, 8, RIP, 0x58, 0x246, 0x9000, 0)
    iret(state, memory, 64)
    assert (state.ss.selector, state.ss.usable, state.cpl) == (0, False, 0)


def test_64_bit__to_user_mode() -> None:
    state, memory = long_machine()
    state.segments[SegmentRegister.GS] = Segment(0, 0xFFFF_8880_0000_0000, 0, 0x10000)
    frame(state, memory, 8, 0x40_1000, 0x63, 0x246, 0x7FFF_FFFF_E000, 0x23)
    iret(state, memory, 64)
    assert (state.rip, state.gpr[Gpr.RSP], state.cpl, state.in_64_bit_mode) == (0x40_1000, 0x7FFF_FFFF_E000, 3, True)
    assert not state.segments[SegmentRegister.DS].usable
    assert state.segments[SegmentRegister.GS].base == 0xFFFF_8880_0000_0000  # null before: untouched


def test_64_bit__to_compatibility_mode() -> None:
    state, memory = long_machine()
    frame(state, memory, 8, 0x40_1000, 0x1B, 0x246, 0x1_FFFF_E000, 0x23)
    iret(state, memory, 64)
    assert (state.rip, state.gpr[Gpr.RSP], state.cpl, state.in_64_bit_mode) == (0x40_1000, 0xFFFF_E000, 3, False)


def test_compatibility_mode__same_privilege_leaves_ss_alone() -> None:
    state, memory = long_machine()
    state.segments[SegmentRegister.CS] = Segment(0x08, 0, 0xFFFF_FFFF, 0xC09B)
    frame(state, memory, 4, 0x1000, 0x08, 0x246, 0xBAD, 0xBAD)
    iret(state, memory, 32)
    assert (state.rip, state.gpr[Gpr.RSP], state.ss.selector) == (0x1000, 0x9014, 0x10)


LONG_FAULTS: list[tuple[str, tuple[int, ...], Fault]] = [
    ("rip-non-canonical", (0x8000_0000_0000, 0x58, 2, 0x9000, 0x10), Fault(Vector.GP, 0)),
    ("cs-long-and-default", (RIP, 0xB8, 2, 0x9000, 0x10), Fault(Vector.GP, 0xB8)),
    ("ss-null-at-level-3", (0x1000, 0x63, 2, 0x9000, 3), Fault(Vector.GP, 0)),
    ("ss-null-compatibility", (0x1000, 0x08, 2, 0x9000, 0), Fault(Vector.GP, 0)),
    ("ss-null-rpl", (0x1000, 0x58, 2, 0x9000, 1), Fault(Vector.GP, 0)),
    ("eip-compatibility", (0x1_0000_0000, 0x1B, 2, 0x9000, 0x23), Fault(Vector.GP, 0)),
]


@pytest.mark.parametrize(("values", "fault"), [c[1:] for c in LONG_FAULTS], ids=[c[0] for c in LONG_FAULTS])
def test_ia_32e_mode_faults(values: tuple[int, ...], fault: Fault) -> None:
    state, memory = long_machine()
    frame(state, memory, 8, *values)
    assert fault_of(state, memory, 64) == fault


def test_compatibility_mode__ignores_the_virtual_8086_flag() -> None:
    state, memory = long_machine()
    state.segments[SegmentRegister.CS] = Segment(0x08, 0, 0xFFFF_FFFF, 0xC09B)
    frame(state, memory, 4, 0x1000, 0x08, 0x2_0246)
    iret(state, memory, 32)
    assert (state.rip, state.rflags) == (0x1000, 0x246)


def test_ia_32e_mode__nested_task_faults() -> None:
    state, memory = long_machine()
    state.rflags |= 0x4000
    assert fault_of(state, memory, 64) == Fault(Vector.GP, 0)


@pytest.mark.parametrize("make", [long_machine, protected_machine])
def test_stack_page_fault(make: Callable[[int], tuple[CpuState, FakeMemory]]) -> None:
    state, memory = make(3)
    memory.refused.add(9)
    fault = fault_of(state, memory, 32)
    assert (fault.vector, fault.error_code) == (Vector.PF, 4)
