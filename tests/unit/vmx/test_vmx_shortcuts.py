"""The short way to execute VMREAD and VMWRITE agrees with the long one; not taken where anything is special."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vmx_machine import FakeProcessor, launch, make_vmx, prepare

from vmcs import fields as f
from vtx.vmx import Vmx
from vtx.x86.decode import Instruction, decode
from vtx.x86.state import Shadow

RCX, RDX = 1, 2
VMREAD, VMWRITE = "0f78d1", "0f79d1"  # RCX <- field in RDX; field in RDX <- RCX
VMREAD_MEMORY = "0f7810"
READ_ONLY = f.EXIT_REASON.encoding


def instruction(encoding: str, bits: int = 64) -> Instruction:
    found = decode(bytes.fromhex(encoding), bits)
    assert found is not None
    return found


def prepared(field: int = f.GUEST_RSP.encoding) -> tuple[FakeProcessor, Vmx]:
    """In root operation with a current VMCS, status flags and RF set, in the shadow of STI."""
    processor, vmx = make_vmx()
    prepare(vmx, fields={f.GUEST_RSP: 0x1122_3344_5566_7788})
    state = processor.state
    state.gpr[RCX], state.gpr[RDX] = 0x9988_7766_5544_3322, field
    state.rflags, state.shadow = 0x1_08D7, Shadow.STI
    return processor, vmx


def short_way(vmx: Vmx, encoding: str) -> bool:
    execute = vmx.shortcut(instruction(encoding))
    assert execute is not None
    return execute()


@pytest.mark.parametrize("encoding", [VMREAD, VMWRITE])
def test_both_ways_agree(encoding: str) -> None:
    (short, short_vmx), (long, long_vmx) = prepared(), prepared()
    assert short_way(short_vmx, encoding)
    assert long_vmx.execute(instruction(encoding))
    assert short.state == long.state
    assert (short.state.rip, short.state.rflags, short.state.shadow) == (0x8003, 2, Shadow.NONE)
    for vmx in (short_vmx, long_vmx):
        assert vmx.current_vmcs is not None
        value = 0x1122_3344_5566_7788 if encoding == VMREAD else 0x9988_7766_5544_3322
        assert vmx.current_vmcs[f.GUEST_RSP] == value
    assert short.state.gpr[RCX] == (0x1122_3344_5566_7788 if encoding == VMREAD else 0x9988_7766_5544_3322)


@pytest.mark.parametrize(
    ("encoding", "bits"), [(VMREAD_MEMORY, 64), ("0f7910", 64), ("0f01c2", 64), ("0fa2", 64), (VMREAD, 32)]
)
def test_other_instructions_have_no_shortcut(encoding: str, bits: int) -> None:
    _, vmx = prepared()
    assert vmx.shortcut(instruction(encoding, bits)) is None


def leave_vmx(processor: FakeProcessor, vmx: Vmx) -> None:
    vmx.vmxoff()
    processor.state.shadow = Shadow.STI


def without_vmcs(processor: FakeProcessor, vmx: Vmx) -> None:
    vmx.vmclear(vmx.current_pointer)


def single_step(processor: FakeProcessor, vmx: Vmx) -> None:
    processor.state.rflags |= 1 << 8


def user(processor: FakeProcessor, vmx: Vmx) -> None:
    for segment in processor.state.segments:
        segment.access_rights |= 3 << 5


def compatibility(processor: FakeProcessor, vmx: Vmx) -> None:
    processor.state.segments[1].access_rights = 0xC09B


def legacy(processor: FakeProcessor, vmx: Vmx) -> None:
    processor.state.efer = 0


def no_such_field(processor: FakeProcessor, vmx: Vmx) -> None:
    processor.state.gpr[RDX] = 0x7FFE


@pytest.mark.parametrize("encoding", [VMREAD, VMWRITE])
@pytest.mark.parametrize("change", [leave_vmx, without_vmcs, single_step, user, compatibility, legacy, no_such_field])
def test_not_taken(encoding: str, change: Callable[[FakeProcessor, Vmx], None]) -> None:
    processor, vmx = prepared()
    change(processor, vmx)
    before, rip = list(processor.state.gpr), processor.state.rip
    assert not short_way(vmx, encoding)
    assert (processor.state.gpr, processor.state.rip) == (before, rip)


@pytest.mark.parametrize("encoding", [VMREAD, VMWRITE])
def test_not_taken_by_a_guest(encoding: str) -> None:
    """The guest's VMREAD is to exit; its hypervisor's current VMCS is none of its own."""
    processor, vmx, vmcs = launch()
    processor.state.gpr[RCX], processor.state.gpr[RDX] = 7, f.GUEST_RSP.encoding
    assert not short_way(vmx, encoding)
    assert (processor.state.gpr[RCX], vmcs[f.GUEST_RSP]) == (7, 0x5000)
    assert vmx.execute(instruction(encoding))
    assert vmcs[f.EXIT_REASON] == (23 if encoding == VMREAD else 25)


def test_not_taken_for_a_read_only_field() -> None:
    """Where VMWRITE to any field is supported, all are written."""
    processor, vmx = make_vmx()
    prepare(vmx)
    processor.state.gpr[RCX], processor.state.gpr[RDX] = 7, READ_ONLY
    assert short_way(vmx, VMWRITE) == vmx.operation.capabilities.vmwrite_any_field
