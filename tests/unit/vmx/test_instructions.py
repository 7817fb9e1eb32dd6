"""Every outcome of every VMX instruction, in the order the manual checks for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vmx_machine import (
    REGION_A,
    REGION_B,
    VMXON_REGION,
    FakeProcessor,
    launch,
    make_vmx,
    prepare,
)

from vmcs import fields as f
from vmcs.exits import InstructionError as Error
from vmcs.exits import Reason
from vtx.vmx import Vmx
from vtx.vmx.outcome import Outcome, VmEntered, VmExited, VmFailInvalid, VmFailValid, VmSucceed
from vtx.x86.outcome import Fault, Vector
from vtx.x86.profile import DEFAULT_PROFILE, load_profile
from vtx.x86.state import Shadow

UD = Fault(Vector.UD)
GP = Fault(Vector.GP, 0)
CF, ZF = 1, 1 << 6
OTHER_STATUS_FLAGS = 0x894  # PF, AF, SF and OF
NO_VMCS = (1 << 64) - 1
WITHOUT_SHADOWING = "nehalem-server"

CALLS: dict[str, Callable[[Vmx], Outcome]] = {
    "VMXON": lambda vmx: vmx.vmxon(VMXON_REGION),
    "VMXOFF": lambda vmx: vmx.vmxoff(),
    "VMCLEAR": lambda vmx: vmx.vmclear(REGION_A),
    "VMPTRLD": lambda vmx: vmx.vmptrld(REGION_A),
    "VMPTRST": lambda vmx: vmx.vmptrst(),
    "VMREAD": lambda vmx: vmx.vmread(f.GUEST_RIP),
    "VMWRITE": lambda vmx: vmx.vmwrite(f.GUEST_RIP, 1),
    "VMLAUNCH": lambda vmx: vmx.vmlaunch(),
    "VMRESUME": lambda vmx: vmx.vmresume(),
    "VMCALL": lambda vmx: vmx.vmcall(),
    "INVEPT": lambda vmx: vmx.invept(2),
    "INVVPID": lambda vmx: vmx.invvpid(2),
}
IN_VMX_OPERATION = [name for name in CALLS if name != "VMXON"]


def in_root(profile: str = DEFAULT_PROFILE) -> tuple[FakeProcessor, Vmx]:
    processor, vmx = make_vmx(load_profile(profile))
    assert vmx.vmxon(VMXON_REGION) == VmSucceed()
    return processor, vmx


@pytest.mark.parametrize("name", IN_VMX_OPERATION)
def test_outside_vmx_operation__is_an_invalid_opcode(name: str) -> None:
    _, vmx = make_vmx()
    assert CALLS[name](vmx) == UD


def set_real_mode(processor: FakeProcessor) -> None:
    processor.state.cr0 &= ~1


def set_virtual_8086(processor: FakeProcessor) -> None:
    processor.state.rflags |= 1 << 17


def set_compatibility_mode(processor: FakeProcessor) -> None:
    processor.state.segments[1].access_rights = 0xC09B


MODES = [set_real_mode, set_virtual_8086, set_compatibility_mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(CALLS))
def test_mode_without_vmx__is_an_invalid_opcode(name: str, mode: Callable[[FakeProcessor], None]) -> None:
    processor, vmx = in_root() if name != "VMXON" else make_vmx()
    mode(processor)
    assert CALLS[name](vmx) == UD


@pytest.mark.parametrize("name", list(CALLS))
def test_cpl_above_0__is_a_general_protection_fault(name: str) -> None:
    processor, vmx = in_root() if name != "VMXON" else make_vmx()
    processor.state.segments[2].access_rights |= 3 << 5
    flags = processor.state.rflags
    assert CALLS[name](vmx) == GP
    assert processor.state.rflags == flags


@pytest.mark.parametrize("name", list(CALLS))
def test_in_a_guest__exits_with_its_own_reason_even_at_cpl_3(name: str) -> None:
    processor, vmx, vmcs = launch()
    processor.state.segments[2].access_rights |= 3 << 5
    assert CALLS[name](vmx) == VmExited(Reason[name], 0)
    assert not vmx.non_root
    assert vmcs[f.EXIT_REASON] == Reason[name]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "VMCALL"])
def test_in_a_compatibility_mode_guest__is_an_invalid_opcode_without_exit(name: str) -> None:
    processor, vmx, _ = launch()
    set_compatibility_mode(processor)
    assert CALLS[name](vmx) == UD
    assert vmx.non_root


@pytest.mark.parametrize("mode", MODES)
def test_vmcall_in_a_guest__exits_in_every_mode(mode: Callable[[FakeProcessor], None]) -> None:
    processor, vmx, _ = launch()
    mode(processor)
    assert vmx.vmcall() == VmExited(Reason.VMCALL, 0)


class TestVmxon:
    def test_without_cr4_vmxe__is_an_invalid_opcode(self) -> None:
        processor, vmx = make_vmx()
        processor.state.cr4 &= ~0x2000
        assert vmx.vmxon(VMXON_REGION) == UD

    @pytest.mark.parametrize("bit", [5, 31])
    def test_cr0_bit_fixed_to_1_clear__faults(self, bit: int) -> None:
        processor, vmx = make_vmx()
        processor.state.cr0 &= ~(1 << bit)
        assert vmx.vmxon(VMXON_REGION) == GP

    def test_cr4_bit_not_supported__faults(self) -> None:
        processor, vmx = make_vmx()
        processor.state.cr4 |= 1 << 30
        assert vmx.vmxon(VMXON_REGION) == GP

    @pytest.mark.parametrize("feature_control", [0, 1, 4])
    def test_feature_control_unlocked_or_disabled__faults(self, feature_control: int) -> None:
        processor, vmx = make_vmx()
        processor.msrs.values[0x3A] = feature_control
        assert vmx.vmxon(VMXON_REGION) == GP

    @pytest.mark.parametrize(
        "address",
        [VMXON_REGION + 8, VMXON_REGION | 1 << 46, VMXON_REGION | 1 << 63],
        ids=["unaligned", "beyond-width", "bit-63"],
    )
    def test_bad_address__fails_invalid(self, address: int) -> None:
        _processor, vmx = make_vmx()
        assert vmx.vmxon(address) == VmFailInvalid()
        assert not vmx.in_vmx_operation

    @pytest.mark.parametrize("revision", [0, 0xFFFF_FFFF, "bit 31"])
    def test_wrong_revision__fails_invalid(self, revision: int | str) -> None:
        processor, vmx = make_vmx()
        right = processor.memory.read_u32(VMXON_REGION)
        processor.memory.write_u32(VMXON_REGION, right | 1 << 31 if isinstance(revision, str) else revision)
        assert vmx.vmxon(VMXON_REGION) == VmFailInvalid()

    def test_unbacked_region__fails_invalid(self) -> None:
        _, vmx = make_vmx()
        assert vmx.vmxon(1 << 40) == VmFailInvalid()

    def test_success__leaves_no_current_vmcs(self) -> None:
        _, vmx = in_root()
        assert vmx.in_vmx_operation
        assert vmx.vmptrst() == VmSucceed(NO_VMCS)

    def test_again_without_current_vmcs__fails_invalid(self) -> None:
        _, vmx = in_root()
        assert vmx.vmxon(VMXON_REGION) == VmFailInvalid()

    def test_again_with_current_vmcs__fails_with_error_15(self) -> None:
        _, vmx = make_vmx()
        vmcs = prepare(vmx)
        assert vmx.vmxon(VMXON_REGION) == VmFailValid(Error.VMXON_IN_VMX_ROOT_OPERATION)
        assert vmcs[f.VM_INSTRUCTION_ERROR] == 15


class TestVmclear:
    @pytest.mark.parametrize("address", [REGION_A + 1, 1 << 46], ids=["unaligned", "beyond-width"])
    def test_bad_address(self, address: int) -> None:
        _, vmx = in_root()
        assert vmx.vmclear(address) == VmFailInvalid()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmclear(address) == VmFailValid(Error.VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS)

    def test_vmxon_pointer(self) -> None:
        _, vmx = in_root()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmclear(VMXON_REGION) == VmFailValid(Error.VMCLEAR_WITH_VMXON_POINTER)

    def test_current__is_current_no_more(self) -> None:
        _, vmx = make_vmx()
        prepare(vmx)
        assert vmx.vmclear(REGION_A) == VmSucceed()
        assert vmx.vmptrst() == VmSucceed(NO_VMCS)
        assert vmx.vmread(f.GUEST_RIP) == VmFailInvalid()

    def test_other__stays_current(self) -> None:
        _, vmx = in_root()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmclear(REGION_B) == VmSucceed()
        assert vmx.vmptrst() == VmSucceed(REGION_A)

    def test_writes_all_data__a_copy_of_the_region_is_the_same_vmcs(self) -> None:
        processor, vmx = make_vmx()
        prepare(vmx, fields={f.GUEST_RIP: 0x1234_5678_9ABC})
        assert vmx.vmclear(REGION_A) == VmSucceed()
        processor.memory.write(REGION_B, processor.memory.read(REGION_A, 4096))
        assert vmx.vmptrld(REGION_B) == VmSucceed()
        assert vmx.vmread(f.GUEST_RIP) == VmSucceed(0x1234_5678_9ABC)

    def test_inactive_region__becomes_clear(self) -> None:
        _processor, vmx = make_vmx()
        prepare(vmx)
        vmx.vmlaunch()
        vmx.vmcall()
        assert vmx.vmxoff() == VmSucceed()
        assert vmx.vmxon(VMXON_REGION) == VmSucceed()
        assert vmx.vmclear(REGION_A) == VmSucceed()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmresume() == VmFailValid(Error.VMRESUME_WITH_NON_LAUNCHED_VMCS)

    def test_unbacked_region__succeeds(self) -> None:
        _, vmx = in_root()
        assert vmx.vmclear(1 << 40) == VmSucceed()


class TestVmptrld:
    @pytest.mark.parametrize("address", [REGION_A + 1, 1 << 46], ids=["unaligned", "beyond-width"])
    def test_bad_address(self, address: int) -> None:
        _, vmx = in_root()
        assert vmx.vmptrld(address) == VmFailInvalid()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmptrld(address) == VmFailValid(Error.VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS)
        assert vmx.vmptrst() == VmSucceed(REGION_A)

    def test_vmxon_pointer(self) -> None:
        _, vmx = in_root()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmptrld(VMXON_REGION) == VmFailValid(Error.VMPTRLD_WITH_VMXON_POINTER)

    @pytest.mark.parametrize(
        ("flip", "profile"),
        [(1, DEFAULT_PROFILE), (1 << 31, WITHOUT_SHADOWING)],
        ids=["identifier", "shadow-indicator-without-shadowing"],
    )
    def test_wrong_revision(self, flip: int, profile: str) -> None:
        processor, vmx = in_root(profile)
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        processor.memory.write_u32(REGION_B, processor.memory.read_u32(REGION_B) ^ flip)
        assert vmx.vmptrld(REGION_B) == VmFailValid(Error.VMPTRLD_WITH_INCORRECT_VMCS_REVISION_IDENTIFIER)
        assert vmx.vmptrst() == VmSucceed(REGION_A)

    def test_unbacked_region__has_the_wrong_revision(self) -> None:
        _, vmx = in_root()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmptrld(1 << 40) == VmFailValid(Error.VMPTRLD_WITH_INCORRECT_VMCS_REVISION_IDENTIFIER)

    def test_several_active(self) -> None:
        _, vmx = in_root()
        for region in (REGION_A, REGION_B):
            assert vmx.vmptrld(region) == VmSucceed()
            assert vmx.vmwrite(f.GUEST_RIP, region) == VmSucceed()
        for region in (REGION_A, REGION_B):
            assert vmx.vmptrld(region) == VmSucceed()
            assert vmx.vmptrst() == VmSucceed(region)
            assert vmx.vmread(f.GUEST_RIP) == VmSucceed(region)

    def test_active__keeps_its_data_whatever_happens_to_the_region(self) -> None:
        processor, vmx = in_root()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmwrite(f.GUEST_RIP, 7) == VmSucceed()
        processor.memory.write(REGION_A + 4, b"\xff" * 4092)
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmread(f.GUEST_RIP) == VmSucceed(7)


class TestVmreadVmwrite:
    @pytest.mark.parametrize("encoding", [0xFFFF_FFFF, 1 << 63 | f.GUEST_RIP.encoding, 0x6C18, 0x4825, 0x1000])
    def test_unsupported_field(self, encoding: int) -> None:
        _, vmx = make_vmx()
        vmcs = prepare(vmx)
        error = VmFailValid(Error.VMREAD_OR_VMWRITE_OF_UNSUPPORTED_COMPONENT)
        assert vmx.vmread(encoding) == error
        assert vmx.vmwrite(encoding, 0) == error
        assert vmcs[f.VM_INSTRUCTION_ERROR] == 12

    def test_read_only_field__without_vmwrite_to_any_field(self) -> None:
        _, vmx = make_vmx(load_profile(WITHOUT_SHADOWING))
        vmcs = prepare(vmx)
        vmcs[f.EXIT_REASON] = 5
        assert vmx.vmwrite(f.EXIT_REASON, 1) == VmFailValid(Error.VMWRITE_TO_READ_ONLY_COMPONENT)
        assert vmx.vmread(f.EXIT_REASON) == VmSucceed(5)

    def test_read_only_field__with_vmwrite_to_any_field(self) -> None:
        _, vmx = make_vmx()
        prepare(vmx)
        assert vmx.vmwrite(f.EXIT_REASON, 1) == VmSucceed()
        assert vmx.vmread(f.EXIT_REASON) == VmSucceed(1)

    def test_high_access(self) -> None:
        _, vmx = make_vmx()
        prepare(vmx)
        assert vmx.vmwrite(f.TSC_OFFSET, 0x1111_2222_3333_4444) == VmSucceed()
        assert vmx.vmread(f.TSC_OFFSET.encoding | 1) == VmSucceed(0x1111_2222)
        assert vmx.vmwrite(f.TSC_OFFSET.encoding | 1, 0x9_5555_6666) == VmSucceed()
        assert vmx.vmread(f.TSC_OFFSET) == VmSucceed(0x5555_6666_3333_4444)

    def test_value_is_cut_to_the_field(self) -> None:
        _, vmx = make_vmx()
        prepare(vmx)
        assert vmx.vmwrite(f.GUEST_CS_SELECTOR, 0xABCD_1234) == VmSucceed()
        assert vmx.vmread(f.GUEST_CS_SELECTOR) == VmSucceed(0x1234)

    def test_without_current_vmcs__fails_invalid_whatever_the_field(self) -> None:
        _, vmx = in_root()
        assert vmx.vmread(0xFFFF_FFFF) == VmFailInvalid()
        assert vmx.vmwrite(0xFFFF_FFFF, 0) == VmFailInvalid()


class TestLaunchAndResume:
    @pytest.mark.parametrize("name", ["VMLAUNCH", "VMRESUME"])
    def test_without_current_vmcs__fails_invalid_even_if_blocked_by_mov_ss(self, name: str) -> None:
        processor, vmx = in_root()
        processor.state.shadow = Shadow.MOV_SS
        assert CALLS[name](vmx) == VmFailInvalid()

    @pytest.mark.parametrize("name", ["VMLAUNCH", "VMRESUME"])
    def test_blocked_by_mov_ss__comes_before_launch_state(self, name: str) -> None:
        processor, vmx = make_vmx()
        vmcs = prepare(vmx)
        if name == "VMLAUNCH":
            vmx.vmlaunch()
            vmx.vmcall()
        processor.state.shadow = Shadow.MOV_SS
        assert CALLS[name](vmx) == VmFailValid(Error.VM_ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS)
        assert vmcs[f.VM_INSTRUCTION_ERROR] == 26

    def test_blocked_by_sti__enters(self) -> None:
        processor, vmx = make_vmx()
        prepare(vmx)
        processor.state.shadow = Shadow.STI
        vmx.vmlaunch()
        assert vmx.non_root

    def test_launch_of_a_launched_vmcs(self) -> None:
        _, vmx, _ = launch()
        vmx.vmcall()
        assert vmx.vmlaunch() == VmFailValid(Error.VMLAUNCH_WITH_NON_CLEAR_VMCS)

    def test_resume_of_a_vmcs_that_was_cleared(self) -> None:
        """Its launch state in memory counts when it is loaded again."""
        _, vmx, _ = launch()
        vmx.vmcall()
        assert vmx.vmclear(REGION_A) == VmSucceed()
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmresume() == VmFailValid(Error.VMRESUME_WITH_NON_LAUNCHED_VMCS)
        assert vmx.vmlaunch() == VmEntered()

    def test_resume_of_a_clear_vmcs(self) -> None:
        _, vmx = make_vmx()
        prepare(vmx)
        assert vmx.vmresume() == VmFailValid(Error.VMRESUME_WITH_NON_LAUNCHED_VMCS)


class TestInvalidations:
    @pytest.mark.parametrize("kind", [0, 3, 4, (1 << 64) - 1])
    def test_invept__unknown_type(self, kind: int) -> None:
        _, vmx = make_vmx()
        prepare(vmx)
        assert vmx.invept(kind) == VmFailValid(Error.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)

    @pytest.mark.parametrize(("eptp", "valid"), [(0x10001E, True), (0x100006, False), (0x10011E, False), (0, False)])
    def test_invept__single_context_needs_a_valid_eptp(self, eptp: int, valid: bool) -> None:
        _, vmx = make_vmx()
        prepare(vmx)
        failure = VmFailValid(Error.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)
        assert vmx.invept(1, eptp) == (VmSucceed() if valid else failure)

    @pytest.mark.parametrize(
        ("kind", "vpid", "linear", "valid"),
        [
            (0, 1, 0x1000, True),
            (0, 0, 0x1000, False),
            (0, 1, 1 << 47, False),
            (0, 1 << 16 | 1, 0, False),
            (1, 1, 1 << 47, True),
            (1, 0, 0, False),
            (2, 0, 1 << 47, True),
            (2, 1 << 16, 0, False),
            (3, 1, 0, True),
            (3, 0, 0, False),
            (4, 1, 0, False),
        ],
    )
    def test_invvpid(self, kind: int, vpid: int, linear: int, valid: bool) -> None:
        _, vmx = make_vmx()
        prepare(vmx)
        failure = VmFailValid(Error.INVALID_OPERAND_TO_INVEPT_OR_INVVPID)
        assert vmx.invvpid(kind, vpid, linear) == (VmSucceed() if valid else failure)

    def test_without_ept__are_invalid_opcodes(self) -> None:
        profile = load_profile()
        _, vmx = make_vmx(profile)
        vmx.vmxon(VMXON_REGION)
        without = {**profile.vmx_capabilities, 0x48C: 0}
        vmx.operation.capabilities = type(vmx.operation.capabilities)(without)
        assert vmx.invept(2) == UD
        assert vmx.invvpid(2) == UD


class TestVmxoffVmcall:
    def test_vmcall__fails(self) -> None:
        _, vmx = in_root()
        assert vmx.vmcall() == VmFailInvalid()
        vmx.vmptrld(REGION_A)
        assert vmx.vmcall() == VmFailValid(Error.VMCALL_IN_VMX_ROOT_OPERATION)

    def test_vmxoff__leaves_and_keeps_vmcs_data_in_memory(self) -> None:
        _, vmx = make_vmx()
        prepare(vmx, fields={f.GUEST_RIP: 0x42})
        assert vmx.vmxoff() == VmSucceed()
        assert not vmx.in_vmx_operation
        assert vmx.vmptrst() == UD
        assert vmx.vmxon(VMXON_REGION) == VmSucceed()
        assert vmx.vmptrst() == VmSucceed(NO_VMCS)
        assert vmx.vmptrld(REGION_A) == VmSucceed()
        assert vmx.vmread(f.GUEST_RIP) == VmSucceed(0x42)


@pytest.mark.parametrize(
    ("call", "flags"),
    [
        (lambda vmx: vmx.vmptrst(), 0),
        (lambda vmx: vmx.vmread(0xFFFF), ZF),
        (lambda vmx: (vmx.vmclear(REGION_A), vmx.vmread(f.GUEST_RIP)), CF),
    ],
    ids=["succeed", "fail-valid", "fail-invalid"],
)
def test_status_flags(call: Callable[[Vmx], object], flags: int) -> None:
    processor, vmx = make_vmx()
    prepare(vmx)
    processor.state.rflags |= CF | ZF | OTHER_STATUS_FLAGS | 1 << 9
    call(vmx)
    assert processor.state.rflags == 2 | 1 << 9 | flags


@pytest.mark.parametrize("name", ["VMLAUNCH", "VMRESUME"])
def test_failed_instructions_change_no_launch_state(name: str) -> None:
    _, vmx = make_vmx()
    vmcs = prepare(vmx, fields={f.PIN_BASED_CONTROLS: 0})
    before = vmcs.launch_state
    assert isinstance(CALLS[name](vmx), VmFailValid)
    assert vmcs.launch_state == before
    assert vmx.transitions == 0
