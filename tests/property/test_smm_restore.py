"""Whatever a handler leaves in SMRAM: RSM shuts the processor down, or gives it a state that is consistent."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.machine import Machine
from vtx.x86 import smm
from vtx.x86.cpuid import reserved_cr4_bits
from vtx.x86.state import CpuState

SAVE_AREA = 0x3_FC00
PE, PG, NW, CD, PAE, VMXE, LME, LMA, VM = 1, 1 << 31, 1 << 29, 1 << 30, 1 << 5, 1 << 13, 1 << 8, 1 << 10, 1 << 17

BYTES = st.sampled_from([0, 0xFF, 1, 0x80]) | st.integers(0, 0xFF)
PATCHES = st.lists(st.tuples(st.integers(0, 0x3FF), BYTES), max_size=12)
MACHINES = {name: Machine(memory=1 << 20, profile=name) for name in ("skylake-server", "zen-server")}


@pytest.mark.parametrize("profile", MACHINES)
@settings(max_examples=300, deadline=None)
@given(patches=PATCHES, long=st.booleans())
def test_rsm(profile, patches, long):
    cpu = MACHINES[profile].cpu
    cpu.halt = None
    fresh = CpuState()
    for name in CpuState.__slots__:
        if not name.startswith("__"):
            setattr(cpu.state, name, getattr(fresh, name))
    state = cpu.state
    if long:
        state.cr0, state.cr3, state.cr4, state.efer = 0x8000_0011, 0x1000, 0x20, 0x500
        state.segments[1].access_rights = 0xA09B
    hidden = [segment.copy() for segment in state.segments]
    smm.enter(cpu)
    for offset, value in patches:
        cpu.memory.write(SAVE_AREA + offset, bytes((value,)))
    smm.leave(cpu)
    if cpu.halt is not None:
        assert patches
        assert cpu.halt.shutdown
        return
    assert state.smm is None
    assert state.segments == hidden
    assert not state.cr0 & PG or state.cr0 & PE
    assert not state.cr0 & NW or state.cr0 & CD
    assert not state.cr4 & (reserved_cr4_bits(cpu.profile) | VMXE)
    assert bool(state.efer & LMA) == bool(state.efer & LME and state.cr0 & PG)
    assert not state.efer & LMA or state.cr4 & PAE
    assert not state.rflags & VM
    assert state.rflags & 2
    assert state.rip < 1 << (64 if state.in_64_bit_mode else 32)
    assert (state.dr7 & 0xDC00, state.dr6 & 0xFFFF_0FF0) == (0x400, 0xFFFF_0FF0)
    assert not (state.dr7 | state.dr6) >> 32
