"""SYSCALL, SYSRET, SYSENTER and SYSEXIT."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from event_fixtures import long_machine, protected_machine, real_machine

from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Efer, Gpr, Segment, SegmentRegister
from vtx.x86.syscall import SyscallMsrs, SysenterMsrs, syscall, sysenter, sysexit, sysret

MSRS = SyscallMsrs(star=0x0023_0010_1234_5678, lstar=0xFFFF_8000_0000_1000, cstar=0xFFFF_8000_0000_2000, fmask=0x4_7700)
ENTRY = SysenterMsrs(cs=0x13, esp=0xFFFF_8000_1111_2222, eip=0xFFFF_8000_3333_4444)


def fault_of(state: CpuState, run: Callable[[], None]) -> Fault:
    before = copy.deepcopy(state)
    with pytest.raises(InstructionAborted) as caught:
        run()
    assert state == before
    assert isinstance(caught.value.cause, Fault)
    return caught.value.cause


def test_syscall__64_bit_mode() -> None:
    state, _ = long_machine(cpl=3)
    state.rflags = 0x5_0346  # RF, AC, TF, IF
    rip = state.rip
    syscall(state, MSRS, 2)
    assert (state.gpr[Gpr.RCX], state.gpr[Gpr.R11]) == (rip + 2, 0x4_0346)
    assert (state.rip, state.rflags, state.cpl) == (0xFFFF_8000_0000_1000, 0x46, 0)
    assert state.cs == Segment(0x10, 0, 0xFFFF_FFFF, 0xA09B)
    assert state.ss == Segment(0x18, 0, 0xFFFF_FFFF, 0xC093)


def test_syscall__compatibility_mode_depends_on_the_vendor() -> None:
    state, _ = long_machine(cpl=3)
    state.segments[SegmentRegister.CS] = Segment(0x1B, 0, 0xFFFF_FFFF, 0xC0FB)
    state.rip = 0x1000
    assert fault_of(state, lambda: syscall(state, MSRS, 2)) == Fault(Vector.UD)
    syscall(state, MSRS, 2, amd=True)
    assert (state.rip, state.gpr[Gpr.RCX], state.in_64_bit_mode) == (0xFFFF_8000_0000_2000, 0x1002, True)


def test_syscall__amd_legacy_mode() -> None:
    state, _ = protected_machine(cpl=3)
    state.efer = Efer.SCE.value
    syscall(state, MSRS, 2, amd=True)
    assert (state.rip, state.gpr[Gpr.RCX], state.rflags) == (0x1234_5678, 0x40_1236, 2)
    assert state.cs == Segment(0x10, 0, 0xFFFF_FFFF, 0xC09B)


def test_syscall__disabled() -> None:
    state, _ = long_machine(cpl=3)
    state.efer &= ~Efer.SCE.value
    assert fault_of(state, lambda: syscall(state, MSRS, 2)) == Fault(Vector.UD)


def test_syscall__real_mode() -> None:
    state, _ = real_machine()
    state.efer = Efer.SCE.value
    assert fault_of(state, lambda: syscall(state, MSRS, 2, amd=True)) == Fault(Vector.UD)


def test_sysret__64_bit() -> None:
    state, _ = long_machine()
    state.gpr[Gpr.RCX], state.gpr[Gpr.R11] = 0x7FFF_FFFF_F000, 0xFFFF_FFFF
    sysret(state, MSRS, 64)
    assert (state.rip, state.rflags, state.cpl) == (0x7FFF_FFFF_F000, 0x3C_7FD7, 3)
    assert state.cs == Segment(0x33, 0, 0xFFFF_FFFF, 0xA0FB)
    assert state.ss == Segment(0x2B, 0, 0xFFFF_FFFF, 0xC0F3)


def test_sysret__compatibility() -> None:
    state, _ = long_machine()
    state.gpr[Gpr.RCX], state.gpr[Gpr.R11] = 0x8000_0000_1000, 0x202  # not canonical: cut off
    sysret(state, MSRS, 32)
    assert (state.rip, state.cs) == (0x1000, Segment(0x23, 0, 0xFFFF_FFFF, 0xC0FB))
    assert state.ss.selector == 0x2B


@pytest.mark.parametrize(
    ("cpl", "rcx", "fault"), [(3, 0, Fault(Vector.GP, 0)), (0, 0x8000_0000_0000, Fault(Vector.GP, 0))]
)
def test_sysret__faults(cpl: int, rcx: int, fault: Fault) -> None:
    state, _ = long_machine(cpl)
    state.gpr[Gpr.RCX] = rcx
    assert fault_of(state, lambda: sysret(state, MSRS, 64)) == fault


def test_sysret__outside_64_bit_mode() -> None:
    state, _ = protected_machine()
    assert fault_of(state, lambda: sysret(state, MSRS, 32)) == Fault(Vector.UD)


@pytest.mark.parametrize(
    ("machine", "rights", "rip", "rsp"),
    [
        (protected_machine, 0xC09B, 0x3333_4444, 0x1111_2222),
        (long_machine, 0xA09B, 0xFFFF_8000_3333_4444, 0xFFFF_8000_1111_2222),
    ],
)
def test_sysenter(machine: Callable[[int], tuple[CpuState, object]], rights: int, rip: int, rsp: int) -> None:
    state, _ = machine(3)
    sysenter(state, ENTRY)
    assert (state.rip, state.gpr[Gpr.RSP], state.rflags, state.cpl) == (rip, rsp, 2, 0)
    assert state.cs == Segment(0x10, 0, 0xFFFF_FFFF, rights)
    assert state.ss == Segment(0x18, 0, 0xFFFF_FFFF, 0xC093)


def test_sysenter__faults() -> None:
    state, _ = protected_machine(3)
    assert fault_of(state, lambda: sysenter(state, SysenterMsrs(cs=3))) == Fault(Vector.GP, 0)
    real, _ = real_machine()
    assert fault_of(real, lambda: sysenter(real, ENTRY)) == Fault(Vector.GP, 0)
    long, _ = long_machine(3)
    assert fault_of(long, lambda: sysenter(long, ENTRY, amd=True)) == Fault(Vector.UD)


@pytest.mark.parametrize(
    ("operand_size", "cs", "rip", "rsp"),
    [
        (64, Segment(0x33, 0, 0xFFFF_FFFF, 0xA0FB), 0x1_0000_1000, 0x2_0000_2000),
        (32, Segment(0x23, 0, 0xFFFF_FFFF, 0xC0FB), 0x1000, 0x2000),
    ],
)
def test_sysexit(operand_size: int, cs: Segment, rip: int, rsp: int) -> None:
    state, _ = long_machine()
    state.gpr[Gpr.RDX], state.gpr[Gpr.RCX] = 0x1_0000_1000, 0x2_0000_2000
    sysexit(state, ENTRY, operand_size)
    assert (state.rip, state.gpr[Gpr.RSP], state.cs, state.cpl) == (rip, rsp, cs, 3)
    assert state.ss.selector == (0x3B if operand_size == 64 else 0x2B)


@pytest.mark.parametrize(
    ("cpl", "cs", "rdx", "rcx"),
    [(3, 0x10, 0, 0), (0, 3, 0, 0), (0, 0x10, 1 << 47, 0), (0, 0x10, 0, 1 << 47)],
    ids=["cpl", "null", "rdx", "rcx"],
)
def test_sysexit__faults(cpl: int, cs: int, rdx: int, rcx: int) -> None:
    state, _ = long_machine(cpl)
    state.gpr[Gpr.RDX], state.gpr[Gpr.RCX] = rdx, rcx
    assert fault_of(state, lambda: sysexit(state, SysenterMsrs(cs=cs), 64)) == Fault(Vector.GP, 0)
