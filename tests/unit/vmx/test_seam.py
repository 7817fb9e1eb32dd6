"""The rest of the seam: control registers through masks, TSC, task priority, page-modification log, diagnosis."""

from __future__ import annotations

import pytest
from vmx_machine import FakeProcessor, launch, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.vmx import Vmx
from vtx.vmx.ept import PageModificationLogFull
from vtx.vmx.outcome import EntryFailed, VmEntered, VmFailInvalid
from vtx.x86.decode import decode
from vtx.x86.operations import MoveFromControlRegister, MoveToControlRegister
from vtx.x86.outcome import NotModelled
from vtx.x86.second_level import AccessKind

VIRTUAL_APIC = 0x3_5000
VTPR = VIRTUAL_APIC + 0x80
MOV_CR8 = decode(bytes.fromhex("440f22c0"), 64)
CR0_PE, CR0_NE, CR0_PG, CR4_VMXE = 1, 1 << 5, 1 << 31, 1 << 13


@pytest.mark.parametrize("number", [0, 4])
def test_guest_sees_the_shadow_of_host_owned_bits(number: int) -> None:
    mask, shadow = (
        (f.CR0_GUEST_HOST_MASK, f.CR0_READ_SHADOW) if number == 0 else (f.CR4_GUEST_HOST_MASK, f.CR4_READ_SHADOW)
    )
    processor, vmx, _ = launch(fields={mask: 0xFF, shadow: 0x5A5A})
    real = processor.state.cr0 if number == 0 else processor.state.cr4
    assert vmx.read_control_register(number) == real & ~0xFF | 0x5A


def test_guest_writes_only_its_own_bits() -> None:
    processor, vmx, _ = launch(fields={f.CR0_GUEST_HOST_MASK: 0xFFFF_FFF0, f.CR4_GUEST_HOST_MASK: CR4_VMXE})
    assert vmx.merge_control_register(0, 0xF) == processor.state.cr0 | 0xF
    assert vmx.merge_control_register(4, 0x6B0) == CR4_VMXE | 0x6B0


@pytest.mark.parametrize(
    ("number", "clear", "controls", "ok"),
    [
        (0, 0, (), True),
        (0, CR0_NE, (), False),
        (0, CR0_PG, (), False),
        (0, CR0_PG, (c.UNRESTRICTED_GUEST, c.ENABLE_EPT), True),
        (0, CR0_PE | CR0_PG, (c.UNRESTRICTED_GUEST, c.ENABLE_EPT), True),
        (0, CR0_NE, (c.UNRESTRICTED_GUEST, c.ENABLE_EPT), False),
        (4, CR4_VMXE, (), False),
    ],
)
def test_fixed_bits_in_a_guest(number: int, clear: int, controls: tuple[Control, ...], ok: bool) -> None:
    processor, vmx, _ = launch(*controls, fields={f.EPT_POINTER: 0x3001E} if controls else None)
    value = processor.state.cr0 if number == 0 else processor.state.cr4
    assert vmx.control_register_fixed_ok(number, value & ~clear) == ok


def test_fixed_bits_outside_vmx_operation__are_free() -> None:
    _, vmx = make_vmx()
    assert vmx.control_register_fixed_ok(0, 0)
    assert vmx.control_register_fixed_ok(4, 0)


@pytest.mark.parametrize("offset", [0, 5, (1 << 64) - 10])
def test_tsc_offset(offset: int) -> None:
    _, vmx, _ = launch(c.USE_TSC_OFFSETTING, fields={f.TSC_OFFSET: offset})
    assert vmx.guest_tsc(1000) == (1000 + offset) % (1 << 64)
    vmx.vmcall()
    assert vmx.guest_tsc(1000) == 1000


def test_tsc_offset__without_the_control() -> None:
    _, vmx, _ = launch(fields={f.TSC_OFFSET: 5})
    assert vmx.guest_tsc(1000) == 1000


class TestTprShadow:
    def guest(self, threshold: int = 0) -> tuple[FakeProcessor, Vmx]:
        processor, vmx = make_vmx()
        processor.memory.write_u8(VTPR, 0xF0)
        fields = {f.VIRTUAL_APIC_ADDRESS: VIRTUAL_APIC, f.TPR_THRESHOLD: threshold}
        prepare(vmx, c.USE_TPR_SHADOW, fields=fields)
        assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
        return processor, vmx

    def test_mov_from_cr8__reads_vtpr(self) -> None:
        processor, vmx = self.guest()
        rip = processor.state.rip
        assert MOV_CR8 is not None
        assert vmx.intercept(MoveFromControlRegister(8, 3), MOV_CR8)
        assert processor.state.gpr[3] == 0xF
        assert processor.state.rip == rip + 4
        assert vmx.non_root

    @pytest.mark.parametrize(("value", "exits"), [(7, False), (5, False), (4, True), (0, True)])
    def test_mov_to_cr8__writes_vtpr_and_compares_the_threshold(self, value: int, exits: bool) -> None:
        processor, vmx = self.guest(threshold=5)
        rip = processor.state.rip
        assert MOV_CR8 is not None
        assert vmx.intercept(MoveToControlRegister(8, 0, value), MOV_CR8)
        assert processor.memory.read_u32(VTPR) == value << 4
        assert vmx.non_root != exits
        if exits:
            assert vmx.current_vmcs is not None
            assert vmx.current_vmcs[f.EXIT_REASON] == Reason.TPR_BELOW_THRESHOLD
            assert vmx.current_vmcs[f.GUEST_RIP] == rip + 4  # trap-like: the instruction has completed


class TestDiagnosis:
    def test_explain__names_every_violation(self) -> None:
        _, vmx = make_vmx()
        prepare(vmx, fields={f.GUEST_RFLAGS: 0, f.HOST_CR0: 0})
        fields = {field for violation in vmx.explain() for field, _, _ in violation.values}
        assert {f.GUEST_RFLAGS, f.HOST_CR0} <= fields

    def test_explain__good_vmcs_or_none(self) -> None:
        _, vmx = make_vmx()
        assert vmx.explain() == []
        prepare(vmx)
        assert vmx.explain() == []
        vmx.vmlaunch()
        vmx.vmcall()
        assert vmx.explain() == []

    def test_last_failure__says_which_msr(self) -> None:
        processor, vmx = make_vmx()
        prepare(vmx, fields={f.VM_ENTRY_MSR_LOAD_COUNT: 1, f.VM_ENTRY_MSR_LOAD_ADDRESS: 0x3_8000})
        processor.memory.write_u64(0x3_8000, 0x802)
        assert isinstance(vmx.vmlaunch(), EntryFailed)
        assert "msr-load.x2apic" in str(vmx.last_failure)

    def test_last_failure__without_current_vmcs(self) -> None:
        _, vmx = make_vmx()
        vmx.vmxon(0x1000)
        assert vmx.vmlaunch() == VmFailInvalid()
        assert str(vmx.last_failure) == "there is no current VMCS"


def test_advertised_but_not_modelled__says_its_name() -> None:
    processor, vmx = make_vmx()
    msrs = dict(processor.profile.vmx_capabilities)
    msrs[0x48B] |= c.ENABLE_ENCLS_EXITING.mask << 32
    vmx.operation.capabilities = type(vmx.operation.capabilities)(msrs)
    prepare(vmx, c.ENABLE_ENCLS_EXITING)
    with pytest.raises(NotModelled, match="enable ENCLS exiting"):
        vmx.vmlaunch()


def test_page_modification_log() -> None:
    processor, vmx = make_vmx()
    msrs = dict(processor.profile.vmx_capabilities)
    msrs[0x48B] |= c.ENABLE_PML.mask << 32
    vmx.operation.capabilities = type(vmx.operation.capabilities)(msrs)
    tables, log, page = 0x3_0000, 0x3_9000, 0x3_A000
    for level in range(3):
        processor.memory.write_u64(tables + level * 0x1000, tables + (level + 1) * 0x1000 | 7)
    for index in range(512):
        processor.memory.write_u64(tables + 0x3000 + 8 * index, index << 12 | 6 << 3 | 7)
    fields = {f.EPT_POINTER: tables | 0x5E, f.PML_ADDRESS: log, f.PML_INDEX: 0}
    vmcs = prepare(vmx, c.ENABLE_EPT, c.ENABLE_PML, fields=fields)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    second_level = processor.mmu.second_level

    def access(address: int, kind: AccessKind) -> object:
        return second_level.translate(GuestPhysicalAddress(address), kind, LinearAddress(0), 0)

    def write(address: int) -> object:
        return access(address, AccessKind.WRITE)

    access(page + 0x2000, AccessKind.READ)
    assert vmcs[f.PML_INDEX] == 0
    write(page + 0x123)
    assert processor.memory.read_u64(log) == page
    assert vmcs[f.PML_INDEX] == 0xFFFF
    # Nor can an accessed flag be set now; flags that are set need no room.
    leaf = tables + 0x3000 + (page >> 12) * 8
    assert isinstance(access(page + 0x1000, AccessKind.READ), PageModificationLogFull)
    assert processor.memory.read_u64(leaf + 8) >> 8 & 3 == 0
    assert not isinstance(access(page + 0x2000, AccessKind.READ), PageModificationLogFull)
    fault = write(page + 0x1000)
    assert vmx.second_level_fault(fault, None)  # type: ignore[arg-type]
    assert vmcs[f.EXIT_REASON] == Reason.PAGE_MODIFICATION_LOG_FULL
