"""VMCS shadowing: which accesses of a guest exit, and what the others do to the linked VMCS."""

from __future__ import annotations

import pytest
from vmx_machine import REGION_A, REGION_B, FakeProcessor, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import InstructionError, Reason
from vmcs.fields import Field
from vtx.vmx import Vmx
from vtx.vmx.outcome import EntryFailed, VmEntered, VmExited, VmFailInvalid, VmFailValid, VmSucceed
from vtx.x86.outcome import Fault, Vector

VMREAD_BITMAP, VMWRITE_BITMAP = 0x3_0000, 0x3_1000
NO_LINK = (1 << 64) - 1
SHADOW_INDICATOR = 1 << 31


def guest(link: int = REGION_B) -> tuple[FakeProcessor, Vmx]:
    """A guest whose link pointer is ``link``; every access is shadowed, because the bitmaps are all zero."""
    processor, vmx = make_vmx()
    processor.memory.write_u32(REGION_B, processor.memory.read_u32(REGION_B) | SHADOW_INDICATOR)
    fields: dict[Field, int] = {
        f.VMREAD_BITMAP_ADDRESS: VMREAD_BITMAP,
        f.VMWRITE_BITMAP_ADDRESS: VMWRITE_BITMAP,
        f.VMCS_LINK_POINTER: link,
    }
    prepare(vmx, c.VMCS_SHADOWING, fields=fields)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    return processor, vmx


def select(processor: FakeProcessor, bitmap: int, encoding: int) -> None:
    """Make accesses to ``encoding`` exit."""
    address = bitmap + encoding // 8
    processor.memory.write_u8(address, processor.memory.read_u8(address) | 1 << encoding % 8)


def test_guest_accesses_the_shadow_vmcs_not_its_own() -> None:
    _, vmx = guest()
    assert vmx.vmwrite(f.GUEST_RSP, 0x1234) == VmSucceed()
    assert vmx.vmread(f.GUEST_RSP) == VmSucceed(0x1234)
    assert vmx.current_vmcs is not None
    assert vmx.current_vmcs[f.GUEST_RSP] == 0x5000
    assert vmx.non_root


def test_host_finds_what_the_guest_wrote__in_memory_too() -> None:
    processor, vmx = guest()
    vmx.vmwrite(f.EXIT_REASON, 48)
    vmx.vmcall()
    assert vmx.vmptrld(REGION_B) == VmSucceed()
    assert vmx.vmread(f.EXIT_REASON) == VmSucceed(48)
    assert vmx.vmclear(REGION_B) == VmSucceed()
    assert processor.memory.read_u32(REGION_B) & SHADOW_INDICATOR
    assert vmx.vmptrld(REGION_B) == VmSucceed()
    assert vmx.vmread(f.EXIT_REASON) == VmSucceed(48)


@pytest.mark.parametrize("field", [f.GUEST_RIP, f.VPID, f.EXIT_REASON, f.HOST_RIP])
def test_bitmaps_select_accesses_that_exit(field: Field) -> None:
    processor, vmx = guest()
    select(processor, VMREAD_BITMAP, field.encoding)
    assert vmx.vmwrite(field, 0) == VmSucceed()
    assert vmx.vmread(field) == VmExited(Reason.VMREAD, 0)

    processor, vmx = guest()
    select(processor, VMWRITE_BITMAP, field.encoding)
    assert vmx.vmread(field) == VmSucceed(0)
    assert vmx.vmwrite(field, 0) == VmExited(Reason.VMWRITE, 0)


def test_neighbours_in_the_bitmap_do_not_matter() -> None:
    processor, vmx = guest()
    encoding = f.GUEST_RIP.encoding
    for bitmap in (VMREAD_BITMAP, VMWRITE_BITMAP):
        for offset in range(-encoding // 8, 0x1000 - encoding // 8 - 1):
            byte = bitmap + encoding // 8 + offset
            processor.memory.write_u8(byte, 0xFF & ~(1 << encoding % 8) if offset == 0 else 0xFF)
    assert vmx.vmwrite(f.GUEST_RIP, 7) == VmSucceed()
    assert vmx.vmread(f.GUEST_RIP) == VmSucceed(7)


@pytest.mark.parametrize("encoding", [1 << 15, 1 << 31, 1 << 63 | f.GUEST_RIP.encoding])
def test_encodings_beyond_the_bitmap_exit(encoding: int) -> None:
    _, vmx = guest()
    assert vmx.vmread(encoding) == VmExited(Reason.VMREAD, 0)
    _, vmx = guest()
    assert vmx.vmwrite(encoding, 0) == VmExited(Reason.VMWRITE, 0)


def test_unsupported_field__error_goes_to_the_current_vmcs() -> None:
    _, vmx = guest()
    error = VmFailValid(InstructionError.VMREAD_OR_VMWRITE_OF_UNSUPPORTED_COMPONENT)
    assert vmx.vmread(0x7FFE) == error
    assert vmx.vmwrite(0x7FFE, 0) == error
    assert vmx.current_vmcs is not None
    assert vmx.current_vmcs[f.VM_INSTRUCTION_ERROR] == 12


def test_without_a_link__fails() -> None:
    _, vmx = guest(NO_LINK)
    assert vmx.vmread(f.GUEST_RIP) == VmFailInvalid()
    assert vmx.vmwrite(f.GUEST_RIP, 0) == VmFailInvalid()
    assert vmx.non_root


def test_shadowed_access_needs_privilege__an_exit_does_not() -> None:
    processor, vmx = guest()
    processor.state.segments[2].access_rights |= 3 << 5
    processor.state.segments[1].access_rights |= 3 << 5
    assert processor.state.cpl == 3
    assert vmx.vmread(f.GUEST_RIP) == Fault(Vector.GP, 0)
    assert vmx.vmwrite(f.GUEST_RIP, 0) == Fault(Vector.GP, 0)
    select(processor, VMREAD_BITMAP, f.GUEST_RIP.encoding)
    assert vmx.vmread(f.GUEST_RIP) == VmExited(Reason.VMREAD, 0)


def test_without_the_control__every_access_exits() -> None:
    for access in (lambda vmx: vmx.vmread(f.GUEST_RIP), lambda vmx: vmx.vmwrite(f.GUEST_RIP, 0)):
        _, vmx = make_vmx()
        prepare(vmx)
        assert vmx.vmlaunch() == VmEntered()
        assert isinstance(access(vmx), VmExited)


def test_shadow_vmcs_cannot_be_entered() -> None:
    processor, vmx = make_vmx()
    processor.memory.write_u32(REGION_A, processor.memory.read_u32(REGION_A) | SHADOW_INDICATOR)
    prepare(vmx)
    assert vmx.vmlaunch() == VmFailInvalid()


def test_link_to_an_ordinary_vmcs__entry_fails() -> None:
    _, vmx = make_vmx()
    fields: dict[Field, int] = {
        f.VMREAD_BITMAP_ADDRESS: VMREAD_BITMAP,
        f.VMWRITE_BITMAP_ADDRESS: VMWRITE_BITMAP,
        f.VMCS_LINK_POINTER: REGION_B,
    }
    prepare(vmx, c.VMCS_SHADOWING, fields=fields)
    assert vmx.vmlaunch() == EntryFailed(Reason.ENTRY_FAILURE_GUEST_STATE | 1 << 31, 4)
