"""VMX instructions as guest code encodes them: operands, memory faults, flags and RIP."""

from __future__ import annotations

import pytest
from vmx_machine import PAGE_TABLES, REGION_A, VMXON_REGION, FakeProcessor, make_vmx, prepare

from vmcs import fields as f
from vmcs.exits import InstructionError, Reason
from vtx.vmx import Vmx
from vtx.x86.decode import Instruction, decode
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import Shadow

# All with RAX as the address register where there is one.
VMXON_RAX = "f30fc730"
VMCLEAR_RAX = "660fc730"
VMPTRLD_RAX = "0fc730"
VMPTRST_RAX = "0fc738"
VMREAD_RCX_RDX = "0f78d1"  # RCX <- field in RDX
VMREAD_RAX_RDX = "0f7810"  # [RAX] <- field in RDX
VMWRITE_RDX_RCX = "0f79d1"  # field in RDX <- RCX
VMWRITE_RDX_MEMORY = "0f7910"  # field in RDX <- [RAX]
INVEPT_RCX_RAX = "660f388008"
INVVPID_RCX_RAX = "660f388108"
VMCALL = "0f01c1"
VMLAUNCH = "0f01c2"
VMXOFF = "0f01c4"

OPERAND = 0x20_0000
UNMAPPED = 0x4000_0000
NON_CANONICAL = 1 << 63
RAX, RCX, RDX = 0, 1, 2


def instruction(encoding: str, bits: int = 64) -> Instruction:
    decoded = decode(bytes.fromhex(encoding), bits)
    assert decoded is not None
    return decoded


def fault_of(vmx: Vmx, encoding: str) -> object:
    with pytest.raises(InstructionAborted) as caught:
        vmx.execute(instruction(encoding))
    return caught.value.cause


@pytest.fixture
def root() -> tuple[FakeProcessor, Vmx]:
    processor, vmx = make_vmx()
    prepare(vmx)
    processor.state.gpr[RAX] = OPERAND
    return processor, vmx


def test_others_instructions__are_not_taken(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    assert not vmx.execute(instruction("0fa2"))
    assert processor.state.rip == 0x8000


def test_vmxon_to_vmxoff__by_guest_code() -> None:
    processor, vmx = make_vmx()
    state = processor.state
    state.gpr[RAX] = OPERAND
    processor.memory.write_u64(OPERAND, VMXON_REGION)
    assert vmx.execute(instruction(VMXON_RAX))
    assert vmx.in_vmx_operation
    assert state.rip == 0x8004
    processor.memory.write_u64(OPERAND, REGION_A)
    for encoding in (VMCLEAR_RAX, VMPTRLD_RAX):
        assert vmx.execute(instruction(encoding))
    assert vmx.current_pointer == REGION_A
    state.gpr[RAX] = OPERAND + 8
    assert vmx.execute(instruction(VMPTRST_RAX))
    assert processor.memory.read_u64(OPERAND + 8) == REGION_A
    assert vmx.execute(instruction(VMXOFF))
    assert not vmx.in_vmx_operation


def test_vmread_vmwrite__registers(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    gpr = processor.state.gpr
    gpr[RDX], gpr[RCX] = f.GUEST_RSP.encoding, 0xFEDC_BA98_7654_3210
    assert vmx.execute(instruction(VMWRITE_RDX_RCX))
    gpr[RCX] = 0
    assert vmx.execute(instruction(VMREAD_RCX_RDX))
    assert gpr[RCX] == 0xFEDC_BA98_7654_3210
    assert processor.state.rip == 0x8006


def test_vmread_vmwrite__memory(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    gpr = processor.state.gpr
    gpr[RDX] = f.GUEST_RSP.encoding
    processor.memory.write_u64(OPERAND, 0x1122_3344_5566_7788)
    assert vmx.execute(instruction(VMWRITE_RDX_MEMORY))
    gpr[RAX] = OPERAND + 0x100
    assert vmx.execute(instruction(VMREAD_RAX_RDX))
    assert processor.memory.read_u64(OPERAND + 0x100) == 0x1122_3344_5566_7788


def test_vmread__32_bit_code_reads_32_bits(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    state = processor.state
    vmx.vmwrite(f.GUEST_RSP, 0x1122_3344_5566_7788)
    state.efer = 0
    state.segments[1].access_rights = 0xC09B
    state.gpr[RDX], state.gpr[RCX] = 0xFFFF_FFFF_0000_0000 | f.GUEST_RSP.encoding, (1 << 64) - 1
    assert vmx.execute(instruction(VMREAD_RCX_RDX, 32))
    assert state.gpr[RCX] == 0x5566_7788


def test_vmread__upper_half_of_the_encoding_counts_in_64_bit_mode(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    processor.state.gpr[RDX] = 1 << 32 | f.GUEST_RSP.encoding
    processor.state.gpr[RCX] = 0x77
    assert vmx.execute(instruction(VMREAD_RCX_RDX))
    assert vmx.current_vmcs is not None
    assert vmx.current_vmcs[f.VM_INSTRUCTION_ERROR] == 12
    assert processor.state.gpr[RCX] == 0x77
    assert processor.state.rip == 0x8003


MEMORY_FORMS = {
    "VMCLEAR": VMCLEAR_RAX,
    "VMPTRLD": VMPTRLD_RAX,
    "VMPTRST": VMPTRST_RAX,
    "VMREAD": VMREAD_RAX_RDX,
    "VMWRITE": VMWRITE_RDX_MEMORY,
    "INVEPT": INVEPT_RCX_RAX,
    "INVVPID": INVVPID_RCX_RAX,
}
WRITES = ("VMPTRST", "VMREAD")


@pytest.mark.parametrize("name", list(MEMORY_FORMS))
def test_unmapped_operand__page_fault_and_nothing_else(root: tuple[FakeProcessor, Vmx], name: str) -> None:
    processor, vmx = root
    state = processor.state
    state.gpr[RAX], state.gpr[RDX], state.gpr[RCX] = UNMAPPED, f.GUEST_RSP.encoding, 2
    state.rflags = 0x8D7
    assert fault_of(vmx, MEMORY_FORMS[name]) == Fault(Vector.PF, 2 if name in WRITES else 0, UNMAPPED)
    assert state.rflags == 0x8D7
    assert state.rip == 0x8000
    assert vmx.current_pointer == REGION_A


@pytest.mark.parametrize("name", list(MEMORY_FORMS))
def test_non_canonical_operand__general_protection_fault(root: tuple[FakeProcessor, Vmx], name: str) -> None:
    processor, vmx = root
    state = processor.state
    state.gpr[RAX], state.gpr[RDX], state.gpr[RCX] = NON_CANONICAL, f.GUEST_RSP.encoding, 2
    assert fault_of(vmx, MEMORY_FORMS[name]) == Fault(Vector.GP, 0)


@pytest.mark.parametrize("name", list(MEMORY_FORMS))
def test_non_canonical_operand_in_the_stack_segment__stack_fault(root: tuple[FakeProcessor, Vmx], name: str) -> None:
    processor, vmx = root
    state = processor.state
    state.gpr[RAX], state.gpr[RDX], state.gpr[RCX] = NON_CANONICAL, f.GUEST_RSP.encoding, 2
    state.gpr[4] = NON_CANONICAL
    # ModRM.rm = 100b with SIB 24h: RSP is the base, so SS the segment.
    encoding = bytearray.fromhex(MEMORY_FORMS[name])
    encoding[-1] = encoding[-1] & 0x38 | 4
    assert fault_of(vmx, (encoding + b"\x24").hex()) == Fault(Vector.SS, 0)


def test_read_only_page__refuses_vmread(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    entry = PAGE_TABLES + 0x2000 + 8
    processor.memory.write_u64(entry, processor.memory.read_u64(entry) & ~2)
    processor.state.gpr[RDX] = f.GUEST_RSP.encoding
    assert fault_of(vmx, VMREAD_RAX_RDX) == Fault(Vector.PF, 3, OPERAND)


def test_vmwrite__unsupported_field_comes_before_the_memory_operand(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    state = processor.state
    state.gpr[RAX], state.gpr[RDX] = UNMAPPED, 0xFFFF_FFFF
    assert vmx.execute(instruction(VMWRITE_RDX_MEMORY))
    assert state.rflags & 1 << 6


def test_vmxon_in_root__fails_without_reading_its_operand(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    processor.state.gpr[RAX] = UNMAPPED
    assert vmx.execute(instruction(VMXON_RAX))
    assert vmx.current_vmcs is not None
    assert vmx.current_vmcs[f.VM_INSTRUCTION_ERROR] == InstructionError.VMXON_IN_VMX_ROOT_OPERATION


def test_invvpid__descriptor_in_memory(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    state = processor.state
    state.gpr[RCX] = 0
    processor.memory.write_u64(OPERAND, 1)
    processor.memory.write_u64(OPERAND + 8, 1 << 62)
    assert vmx.execute(instruction(INVVPID_RCX_RAX))
    assert state.rflags & 1 << 6
    processor.memory.write_u64(OPERAND + 8, 0x1000)
    assert vmx.execute(instruction(INVVPID_RCX_RAX))
    assert not state.rflags & 1 << 6


def test_vmlaunch__leaves_rip_to_the_guest(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    assert vmx.execute(instruction(VMLAUNCH))
    assert processor.state.rip == 0x4000


def test_guest_exit__reports_length_information_and_displacement(root: tuple[FakeProcessor, Vmx]) -> None:
    _processor, vmx = root
    vmcs = vmx.current_vmcs
    assert vmcs is not None
    vmx.vmlaunch()
    # VMPTRLD QWORD PTR FS:[R9 + R14*4 - 0x12345678]
    assert vmx.execute(instruction("64430fc7b4b1" + (-0x12345678 & 0xFFFF_FFFF).to_bytes(4, "little").hex()))
    assert vmcs[f.EXIT_REASON] == Reason.VMPTRLD
    assert vmcs[f.EXIT_QUALIFICATION] == -0x12345678 & (1 << 64) - 1
    assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == 10
    # Scaling by 4, 64-bit address, FS, index R14, base R9.
    assert vmcs[f.VM_EXIT_INSTRUCTION_INFORMATION] == 2 | 2 << 7 | 4 << 15 | 14 << 18 | 9 << 23
    assert vmcs[f.GUEST_RIP] == 0x4000


def test_guest_exit__rip_relative_operand_reports_its_address(root: tuple[FakeProcessor, Vmx]) -> None:
    _, vmx = root
    vmcs = vmx.current_vmcs
    assert vmcs is not None
    vmx.vmlaunch()
    assert vmx.execute(instruction("0fc73510000000"))  # VMPTRLD [RIP + 10h], 7 bytes at 4000h
    assert vmcs[f.EXIT_QUALIFICATION] == 0x4017
    assert vmcs[f.VM_EXIT_INSTRUCTION_INFORMATION] == 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27


def test_guest_exit__vmread_register_form(root: tuple[FakeProcessor, Vmx]) -> None:
    _, vmx = root
    vmcs = vmx.current_vmcs
    assert vmcs is not None
    vmx.vmlaunch()
    assert vmx.execute(instruction("450f78cb"))  # VMREAD R11, R9
    assert vmcs[f.VM_EXIT_INSTRUCTION_INFORMATION] & 0xF000_0478 == 11 << 3 | 1 << 10 | 9 << 28


def test_completed_instruction__ends_the_shadow_and_clears_rf(root: tuple[FakeProcessor, Vmx]) -> None:
    processor, vmx = root
    processor.state.shadow = Shadow.STI
    processor.state.rflags |= 1 << 16
    assert vmx.execute(instruction(VMPTRST_RAX))
    assert processor.state.shadow is Shadow.NONE
    assert processor.state.rflags == 2
