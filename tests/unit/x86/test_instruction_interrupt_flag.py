"""CLI, STI, PUSHF and POPF wherever IOPL does not give them IF: #GP, or the virtual interrupt flag.

Spec: SDM Vol. 2, the instructions' pages (tables of conditions); Vol. 3, "Protected-Mode Virtual Interrupts", "Class
2—Maskable Hardware Interrupt Handling in Virtual-8086 Mode Using the Virtual Interrupt Mechanism".
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import CODE, STACK, ProcessorBench, long_mode, protected_mode, real_mode

from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState

IF, TF, VIF, VIP, VM, IOPL_3 = 1 << 9, 1 << 8, 1 << 19, 1 << 20, 1 << 17, 3 << 12
VME, PVI = 1 << 0, 1 << 1
CLI, STI, PUSHF, POPF, PUSHFD, POPFD = "fa", "fb", "9c", "9d", "669c", "669d"  # in 16-bit code


def state_of(mode: str, cr4: int = 0, flags: int = 0, cpl: int = 3) -> CpuState:
    if mode == "real":
        state = real_mode()
    elif mode == "virtual-8086":
        state = real_mode()
        state.cr0 |= 1
        state.rflags |= VM
        for segment in state.segments:
            segment.access_rights = 0xF3
    else:
        state = protected_mode(cpl) if mode == "protected" else long_mode(cpl)
    state.cr4 |= cr4
    state.rflags |= flags
    return state


def after(code: str, state: CpuState) -> CpuState:
    bench = ProcessorBench(code + "cc", state)
    assert bench.event().vector == Vector.BP
    return state


def refused(code: str, state: CpuState) -> bool:
    bench = ProcessorBench(code + "cc", state)
    flags, pointer = state.rflags, state.gpr[4]
    event = bench.event()
    if event.vector == Vector.BP:
        return False
    assert (event.vector, event.error_code, state.rip) == (Vector.GP, 0, CODE)
    assert (state.rflags, state.gpr[4]) == (flags, pointer)
    return True


@pytest.mark.parametrize(
    ("mode", "cpl", "cr4", "flags", "effect"),
    [
        ("real", 0, 0, 0, "IF"),
        ("protected", 0, 0, 0, "IF"),
        ("protected", 3, 0, IOPL_3, "IF"),
        ("protected", 3, 0, 0, "fault"),
        ("protected", 3, PVI, 0, "VIF"),
        ("protected", 3, VME, 0, "fault"),
        ("protected", 2, PVI, 0, "fault"),
        ("protected", 3, PVI, IOPL_3, "IF"),
        ("long", 3, PVI, 0, "VIF"),
        ("long", 3, 0, 0, "fault"),
        ("virtual-8086", 3, 0, IOPL_3, "IF"),
        ("virtual-8086", 3, 0, 0, "fault"),
        ("virtual-8086", 3, VME, 0, "VIF"),
        ("virtual-8086", 3, PVI, 0, "fault"),
        ("virtual-8086", 3, VME, IOPL_3, "IF"),
    ],
)
def test_cli_and_sti(mode: str, cpl: int, cr4: int, flags: int, effect: str) -> None:
    if effect == "fault":
        assert refused(CLI, state_of(mode, cr4, flags | IF, cpl))
        assert refused(STI, state_of(mode, cr4, flags, cpl))
        return
    bit, other = (IF, VIF) if effect == "IF" else (VIF, IF)
    cleared = after(CLI, state_of(mode, cr4, flags | IF | VIF, cpl)).rflags
    assert cleared & (bit | other) == other
    assert after(STI, state_of(mode, cr4, flags, cpl)).rflags & (bit | other) == bit


@pytest.mark.parametrize(("mode", "cr4"), [("virtual-8086", VME), ("protected", PVI)])
def test_sti_with_a_virtual_interrupt_pending(mode: str, cr4: int) -> None:
    assert refused(STI, state_of(mode, cr4, VIP))
    assert not refused(CLI, state_of(mode, cr4, VIP))
    assert not refused(STI, state_of(mode, cr4, VIP | IOPL_3))


@pytest.mark.parametrize("code", [PUSHF, POPF, PUSHFD, POPFD])
def test_flags_in_virtual_8086_mode_need_iopl_3(code: str) -> None:
    assert refused(code, state_of("virtual-8086"))
    assert not refused(code, state_of("virtual-8086", flags=IOPL_3))


@pytest.mark.parametrize("code", [PUSHFD, POPFD])
def test_32_bit_forms_have_no_virtual_flag(code: str) -> None:
    assert refused(code, state_of("virtual-8086", VME))


@pytest.mark.parametrize("virtual", [0, VIF])
@pytest.mark.parametrize("real", [0, IF])
def test_pushf__shows_vif_as_if_and_iopl_as_3(real: int, virtual: int) -> None:
    state = state_of("virtual-8086", VME, real | virtual)
    bench = ProcessorBench(PUSHF + "cc", state)
    assert bench.event().vector == Vector.BP
    (image,) = struct.unpack("<H", bench.memory.read(STACK - 2, 2))
    assert (image & IF, image & IOPL_3) == (IF if virtual else 0, IOPL_3)


@pytest.mark.parametrize("popped", [0, IF])
@pytest.mark.parametrize("flags", [0, IF, VIF, IF | VIF])
def test_popf__if_goes_to_vif(flags: int, popped: int) -> None:
    state = state_of("virtual-8086", VME, flags)
    bench = ProcessorBench(POPF + "cc", state)
    bench.memory.write(STACK, struct.pack("<H", popped | IOPL_3 | 0x8D5))
    assert bench.event().vector == Vector.BP
    assert state.rflags & (IF | VIF | IOPL_3) == (flags & IF) | (VIF if popped else 0)
    assert (state.rflags & 0x8D5, state.gpr[4]) == (0x8D5, STACK + 2)


@pytest.mark.parametrize(("popped", "flags"), [(TF, 0), (IF, VIP), (TF | IF, VIP)])
def test_popf__faults(popped: int, flags: int) -> None:
    state = state_of("virtual-8086", VME, flags)
    bench = ProcessorBench(POPF + "cc", state)
    bench.memory.write(STACK, struct.pack("<H", popped))
    event = bench.event()
    assert (event.vector, event.error_code, state.rip, state.gpr[4]) == (Vector.GP, 0, CODE, STACK)


def test_popf__if_clear_with_a_virtual_interrupt_pending() -> None:
    state = state_of("virtual-8086", VME, VIP | VIF)
    bench = ProcessorBench(POPF + "cc", state)
    bench.memory.write(STACK, struct.pack("<H", 0))
    assert bench.event().vector == Vector.BP
    assert state.rflags & (VIF | VIP) == VIP
