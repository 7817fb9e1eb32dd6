"""The short way to execute STGI, CLGI, VMSAVE and VMLOAD agrees with the long one; not taken where it must not be."""

from __future__ import annotations

import pytest
from svm_machine import CLGI, HOST_RIP, INVLPGA, STGI, VMCB, VMLOAD, VMSAVE, Machine, instruction

from vtx.x86.state import Segment, Shadow


def prepared() -> Machine:
    machine = Machine()
    machine.store()
    machine.state.kernel_gs_base, machine.state.tr = 0x1234, Segment(0x18, 0x7000, 0x67, 0x8B)
    machine.state.shadow = Shadow.STI
    machine.state.rflags |= 0x1_0000
    return machine


@pytest.mark.parametrize("code", [STGI, CLGI, VMSAVE])
@pytest.mark.parametrize("gif", [True, False])
def test_both_ways_agree(code: bytes, gif: bool) -> None:
    short, long = prepared(), prepared()
    short.state.gif = long.state.gif = gif
    execute = short.svm.shortcut(instruction(code))
    assert execute is not None and execute()
    long.execute(code)
    assert short.state == long.state
    assert short.state.rip == HOST_RIP + 3
    assert short.memory.read(VMCB, 0x1000) == long.memory.read(VMCB, 0x1000)


def test_other_instructions_have_no_shortcut() -> None:
    machine = Machine()
    assert machine.svm.shortcut(instruction(INVLPGA)) is None
    assert machine.svm.shortcut(instruction(STGI, 32)) is None


def test_vmload_of_what_is_there() -> None:
    short, long = prepared(), prepared()
    for machine in (short, long):
        machine.execute(VMSAVE)
    execute = short.svm.shortcut(instruction(VMLOAD))
    assert execute is not None and execute()
    long.execute(VMLOAD)
    assert (short.state, short.processor.msrs.values) == (long.state, long.processor.msrs.values)


@pytest.mark.parametrize("offset", [0x440, 0x45C, 0x472, 0x494, 0x600, 0x618, 0x620, 0x628, 0x638])
def test_vmload_of_something_else_takes_the_long_way(offset: int) -> None:
    machine = prepared()
    machine.execute(VMSAVE)
    machine.memory.write_u8(VMCB + offset, machine.memory.read_u8(VMCB + offset) ^ 1)
    before = machine.state.rip
    execute = machine.svm.shortcut(instruction(VMLOAD))
    assert execute is not None and not execute()
    assert machine.state.rip == before


@pytest.mark.parametrize("special", ["svme", "cpl", "trap flag", "guest", "interrupt", "nmi", "smi"])
def test_what_is_special_takes_the_long_way(special: str) -> None:
    machine = prepared()
    state = machine.state
    match special:
        case "svme":
            state.efer &= ~0x1000
        case "cpl":
            state.segments[2].access_rights |= 3 << 5
        case "trap flag":
            state.rflags |= 0x100
        case "guest":
            machine.run()
        case "interrupt":
            machine.processor.interrupt = 0x20
        case "nmi":
            machine.processor.nmi = True
        case "smi":
            machine.svm.smi()
    execute = machine.svm.shortcut(instruction(STGI))
    before = machine.state.rip
    assert execute is not None and not execute()
    assert machine.state.rip == before


@pytest.mark.parametrize("address", [VMCB + 1, 1 << 48])
def test_vmsave_of_no_control_block(address: int) -> None:
    machine = prepared()
    machine.state.gpr[0] = address
    execute = machine.svm.shortcut(instruction(VMSAVE))
    assert execute is not None and not execute()
