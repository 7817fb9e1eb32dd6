"""A VM exit and the VM entry after it leave the guest as it was; the host never depends on the guest."""

from __future__ import annotations

import copy

from hypothesis import given, settings
from hypothesis import strategies as st
from vmx_machine import DATA, UNUSABLE, FakeProcessor, launch

from vmcs import controls as c
from vmcs import fields as f
from vtx.vmx.outcome import VmEntered
from vtx.vmx.record import VmExit
from vtx.x86.decode import decode
from vtx.x86.operations import Plain, Simple
from vtx.x86.state import Activity, CpuState, Segment, Shadow

U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)
LOW_CANONICAL = st.integers(0, (1 << 47) - 1)
CANONICAL = LOW_CANONICAL | LOW_CANONICAL.map(lambda low: low | 0xFFFF_8000_0000_0000)

# RFLAGS bits software may change freely with IF = 1: status flags, DF, IOPL, NT, AC, ID.
FREE_RFLAGS = 0x24_7CD5


@st.composite
def data_segments(draw: st.DrawFn) -> Segment:
    """A data segment register as 64-bit code can have it, or an unusable one."""
    if draw(st.booleans()):
        return Segment(draw(st.integers(0, 3)), 0, 0, UNUSABLE)
    selector = draw(st.integers(1, 0x1FFF)) << 3 | 3
    return Segment(selector, draw(U32), 0xFFFF_FFFF, DATA | 3 << 5)


@st.composite
def guests(draw: st.DrawFn) -> CpuState:
    """A running 64-bit guest at CPL 0 without pending events."""
    processor, _, _ = launch()
    state = processor.state
    state.gpr = draw(st.lists(U64, min_size=16, max_size=16))
    state.rip = draw(CANONICAL)
    state.rflags = 2 | draw(U64) & FREE_RFLAGS
    for register in (0, 3, 4, 5):
        state.segments[register] = draw(data_segments())
    for register in (4, 5):
        state.segments[register].base = draw(CANONICAL)
    state.gdtr.base, state.gdtr.limit = draw(CANONICAL), draw(st.integers(0, 0xFFFF))
    state.idtr.base, state.idtr.limit = draw(CANONICAL), draw(st.integers(0, 0xFFFF))
    state.cr2, state.cr3 = draw(U64), draw(st.integers(0, (1 << 34) - 1)) << 12
    state.cr0 = 0x8000_0031 | draw(U32) & 0x0005_000E
    state.cr4 = 0x2020 | draw(U32) & 0x0690
    state.dr = draw(st.lists(U64, min_size=4, max_size=4))
    state.dr7 = 0x400 | draw(U32) & 0xFFFF_03FF
    state.xcr0 = 3
    state.fpu = draw(st.binary(max_size=8))
    state.shadow = draw(st.sampled_from([Shadow.NONE, Shadow.MOV_SS]))
    state.nmi_blocked = draw(st.booleans())
    state.activity = draw(st.sampled_from([Activity.ACTIVE, Activity.HLT]))
    if state.shadow is not Shadow.NONE:
        state.activity = Activity.ACTIVE
    return state


SYSENTER = st.tuples(U32, CANONICAL, CANONICAL)
CPUID = decode(bytes.fromhex("0fa2"), 64)


def switch_msrs(processor: FakeProcessor) -> list[int | None]:
    return [processor.msrs.read(index) for index in (0x174, 0x175, 0x176, 0x277, 0x1D9, 0xC000_0080)]


@settings(max_examples=150, deadline=None)
@given(guest=guests(), sysenter=SYSENTER)
def test_exit_then_entry__leaves_the_guest_unchanged(guest: CpuState, sysenter: tuple[int, int, int]) -> None:
    processor, vmx, vmcs = launch(
        c.ENTRY_LOAD_DEBUG_CONTROLS,
        c.EXIT_SAVE_DEBUG_CONTROLS,
        c.ENTRY_LOAD_IA32_EFER,
        c.EXIT_SAVE_IA32_EFER,
        c.EXIT_LOAD_IA32_EFER,
        c.ENTRY_LOAD_IA32_PAT,
        c.EXIT_SAVE_IA32_PAT,
        c.EXIT_LOAD_IA32_PAT,
        fields={f.GUEST_IA32_EFER: 0x500, f.HOST_IA32_EFER: 0xD01, f.GUEST_IA32_PAT: 0, f.HOST_IA32_PAT: 6},
    )
    processor.state = guest
    guest.efer = 0x500
    processor.msrs.values.update(zip((0x174, 0x175, 0x176), sysenter, strict=True))
    before, msrs = copy.deepcopy(guest), switch_msrs(processor)
    assert CPUID is not None
    assert vmx.intercept(Simple(Plain.CPUID), CPUID)
    assert processor.state.rip == vmcs[f.HOST_RIP]
    assert vmx.vmresume() == VmEntered(), vmx.last_failure
    assert processor.state == before
    assert switch_msrs(processor) == msrs


@settings(max_examples=50, deadline=None)
@given(first=guests(), second=guests())
def test_the_host__does_not_depend_on_the_guest(first: CpuState, second: CpuState) -> None:
    hosts = []
    for guest in (first, second):
        processor, vmx, _ = launch()
        processor.state = guest
        vmx.exit(VmExit(10))
        state = processor.state
        # What no VM exit switches: most GPRs, CR2, DR0 to DR3, x87 and SSE state, blocking by NMI.
        registers = [state.rip, state.gpr[4], state.rflags, state.gdtr, state.idtr, state.pending_debug]
        segments = [*state.segments, state.ldtr, state.tr, state.activity, state.shadow]
        controls = [state.cr0, state.cr3, state.cr4, state.efer, state.dr7, switch_msrs(processor)]
        hosts.append((registers, segments, controls))
    assert hosts[0] == hosts[1]


@settings(max_examples=100, deadline=None)
@given(
    encoding=st.sampled_from([f.GUEST_RIP, f.TSC_OFFSET, f.GUEST_CS_SELECTOR, f.EXCEPTION_BITMAP, f.HOST_FS_BASE]),
    value=U64,
)
def test_vmwrite_then_vmread__gives_the_value_cut_to_the_width(encoding: f.Field, value: int) -> None:
    _, vmx, _ = launch()
    vmx.vmcall()
    vmx.vmwrite(encoding, value)
    outcome = vmx.vmread(encoding)
    assert getattr(outcome, "value", None) == value & (1 << encoding.bits) - 1
