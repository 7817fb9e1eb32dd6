"""What decoding tells handlers, and where memory operands are.

Spec: SDM Vol. 2, "Instruction Format"; SDM Vol. 1, "Operand Addressing"; SDM Vol. 3, "Limit Checking", "Type Checking".
"""

from __future__ import annotations

import pytest
from iced_x86 import Mnemonic
from processor_bench import long_mode, protected_mode, real_mode

from vtx.x86.decode import (
    RIP_BASE,
    MemoryOperand,
    RegisterOperand,
    decode,
    effective_address,
    is_canonical,
    linear_address,
    read_register,
    segment_allows,
    write_register,
)
from vtx.x86.outcome import InstructionAborted, Vector
from vtx.x86.state import CpuState, Segment, SegmentRegister

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ES, CS, SS, DS, FS, GS = SegmentRegister
MINUS_16 = (1 << 64) - 16


def decoded(code: str, bits: int = 64):  # type: ignore[no-untyped-def]
    instruction = decode(bytes.fromhex(code), bits)
    assert instruction is not None
    return instruction


@pytest.mark.parametrize("code", ["", "0f", "488b", "0f0b66"[:2], "c4", "f0f4", "8f0c24"[:2], "06"])
def test_no_instruction(code: str) -> None:
    assert decode(bytes.fromhex(code), 64) is None


def test_longest_instruction() -> None:
    fifteen = bytes.fromhex("2e" * 8 + "48c7042578563412"[:14])
    assert decode(b"\x66" * 14 + b"\x90", 64) is not None
    assert decode(b"\x66" * 15 + b"\x90", 64) is None
    assert len(fifteen) == 15


@pytest.mark.parametrize(
    ("code", "bits", "operand", "address"),
    [
        ("90", 16, 2, 2),
        ("90", 32, 4, 4),
        ("90", 64, 4, 8),
        ("6690", 16, 4, 2),
        ("6690", 32, 2, 4),
        ("6690", 64, 2, 8),
        ("67f390", 16, 2, 4),
        ("67f390", 64, 4, 4),
        ("4890", 64, 8, 8),
        ("664890", 64, 8, 8),
        ("486690", 64, 2, 8),  # a REX prefix that is not the last one counts for nothing
        ("4090", 64, 4, 8),
    ],
)
def test_sizes(code: str, bits: int, operand: int, address: int) -> None:
    instruction = decoded(code, bits)
    assert (instruction.operand_size, instruction.address_size, instruction.bits) == (operand, address, bits)
    assert instruction.encoding == bytes.fromhex(code)


OPERANDS = {
    "base": ("0f0117", 64, MemoryOperand(DS, RDI, None, 1, 0, 8)),  # LGDT
    "stack": ("0f011424", 64, MemoryOperand(SS, RSP, None, 1, 0, 8)),
    "frame": ("0f0155f0", 64, MemoryOperand(SS, RBP, None, 1, MINUS_16, 8)),
    "index": ("0f01549810", 64, MemoryOperand(DS, RAX, RBX, 4, 16, 8)),
    "extended": ("430f015430f0", 64, MemoryOperand(DS, 8, 14, 1, MINUS_16, 8)),
    "absolute": ("0f01142578563412", 64, MemoryOperand(DS, None, None, 1, 0x1234_5678, 8)),
    "rip": ("0f011510000000", 64, MemoryOperand(DS, RIP_BASE, None, 1, 0x17, 8)),
    "eip": ("670f0115f0ffffff", 64, MemoryOperand(DS, RIP_BASE, None, 1, 0xFFFF_FFF8, 4)),
    "override": ("650f0117", 64, MemoryOperand(GS, RDI, None, 1, 0, 8)),
    "ignored-override": ("2e0f0117", 64, MemoryOperand(CS, RDI, None, 1, 0, 8)),
    "32": ("0f0117", 32, MemoryOperand(DS, RDI, None, 1, 0, 4)),
    "16": ("0f0117", 16, MemoryOperand(DS, RBX, None, 1, 0, 2)),
    "16-two": ("0f0112", 16, MemoryOperand(SS, RBP, RSI, 1, 0, 2)),
    "16-absolute": ("0f01163412", 16, MemoryOperand(DS, None, None, 1, 0x1234, 2)),
    "16-in-32": ("670f0117", 32, MemoryOperand(DS, RBX, None, 1, 0, 2)),
    "ins": ("6d", 32, MemoryOperand(ES, RDI, None, 1, 0, 4)),
    "outs": ("646e", 64, MemoryOperand(FS, RSI, None, 1, 0, 8)),
    "outs-16": ("6e", 16, MemoryOperand(DS, RSI, None, 1, 0, 2)),
    "register": ("0f00d8", 64, None),  # LTR AX
}


@pytest.mark.parametrize(("code", "bits", "operand"), OPERANDS.values(), ids=OPERANDS)
def test_memory_operand(code: str, bits: int, operand: MemoryOperand | None) -> None:
    assert decoded(code, bits).memory == operand


@pytest.mark.parametrize(
    ("code", "registers", "system"),
    [
        ("0f20c0", (RegisterOperand(RAX, 8), None), (None, 0)),  # MOV RAX, CR0
        ("440f22c1", (None, RegisterOperand(RCX, 8)), (8, None)),  # MOV CR8, RCX
        ("0f23fb", (None, RegisterOperand(RBX, 8)), (7, None)),
        ("8ed3", (None, RegisterOperand(RBX, 4)), (2, None)),
        ("490fc7f7", (RegisterOperand(15, 8),), (None,)),  # RDRAND R15
        ("0fc7f4", (RegisterOperand(RSP, 4),), (None,)),
        ("88e0", (RegisterOperand(RAX, 1), RegisterOperand(RAX, 1, high_byte=True)), (None, None)),
        ("4088e0", (RegisterOperand(RAX, 1), RegisterOperand(RSP, 1)), (None, None)),  # SPL
    ],
)
def test_register_operands(code: str, registers: tuple[object, ...], system: tuple[object, ...]) -> None:
    instruction = decoded(code)
    assert (instruction.registers, instruction.system_registers) == (registers, system)


@pytest.mark.parametrize(
    ("code", "immediate"),
    [("cd80", 0x80), ("e4ff", 0xFF), ("ca3412", 0x1234), ("6af0", MINUS_16), ("0f01c1", 0)],
)
def test_immediate(code: str, immediate: int) -> None:
    assert decoded(code).immediate == immediate


def test_prefixes_and_name() -> None:
    assert (decoded("f36d").rep, decoded("f26d").rep, decoded("6d").rep) == (True, True, False)
    assert (decoded("f00fc70f").lock, decoded("0fc70f").lock) == (True, False)
    assert decoded("0f01c2").name == "VMLAUNCH"
    assert decoded("0f01c2").mnemonic == Mnemonic.VMLAUNCH


def test_same_bytes_are_decoded_once() -> None:
    assert decode(b"\x0f\xa2", 64) is decode(b"\x0f\xa2", 64)


@pytest.mark.parametrize(
    ("code", "bits", "expected"),
    [
        ("0f01549810", 64, 0x1_0000_0010 + 4 * 0x20),
        ("670f01549810", 64, 0x10 + 4 * 0x20),  # cut to 32 bits
        ("0f01549810", 32, 0x10 + 4 * 0x20),
        ("0f011510000000", 64, 0x1000 + 7 + 0x10),
        ("0f0155f0", 64, MINUS_16 + 5),  # RBP of 5 and a displacement of -16
        ("0f0112", 16, 0x2_0006 & 0xFFFF),
    ],
)
def test_effective_address(code: str, bits: int, expected: int) -> None:
    state = long_mode()
    state.rip = 0x1000
    state.gpr[RAX], state.gpr[RBX], state.gpr[RBP], state.gpr[RSI] = 0x1_0000_0000, 0x20, 5, 0x2_0001
    instruction = decoded(code, bits)
    assert instruction.memory is not None
    assert effective_address(state, instruction, instruction.memory) == expected & ((1 << 64) - 1)


@pytest.mark.parametrize(
    ("address", "width", "canonical"),
    [
        (0, 48, True),
        ((1 << 47) - 1, 48, True),
        (1 << 47, 48, False),
        ((1 << 64) - (1 << 47), 48, True),
        ((1 << 64) - (1 << 47) - 1, 48, False),
        (1 << 47, 57, True),
        (1 << 56, 57, False),
        ((1 << 64) - (1 << 56), 57, True),
    ],
)
def test_canonical(address: int, width: int, canonical: bool) -> None:
    assert is_canonical(address, width) is canonical


def access(state: CpuState, code: str, size: int, bits: int, *, write: bool = False, width: int = 48) -> int:
    return linear_address(state, decoded(code, bits), size, write=write, width=width)


def refused(state: CpuState, code: str, size: int, bits: int, *, write: bool = False) -> Vector:
    with pytest.raises(InstructionAborted) as raised:
        access(state, code, size, bits, write=write)
    assert raised.value.cause.error_code == 0  # type: ignore[attr-defined]
    return raised.value.cause.vector  # type: ignore[attr-defined, no-any-return]


class TestLinearAddress:
    AT_RDI, AT_RSP, GS_RDI = "0f0117", "0f011424", "650f0117"

    def test_64_bit__only_fs_and_gs_have_bases(self) -> None:
        state = long_mode()
        state.gpr[RDI] = 0x1000
        state.segments[DS].base, state.segments[GS].base = 0x10, 0x20
        assert (access(state, self.AT_RDI, 8, 64), access(state, self.GS_RDI, 8, 64)) == (0x1000, 0x1020)

    def test_64_bit__canonical_from_first_to_last_byte(self) -> None:
        state = long_mode()
        state.gpr[RDI] = state.gpr[RSP] = (1 << 47) - 8
        assert access(state, self.AT_RDI, 8, 64) == (1 << 47) - 8
        assert refused(state, self.AT_RDI, 10, 64) is Vector.GP
        assert refused(state, self.AT_RSP, 10, 64) is Vector.SS
        assert access(state, self.AT_RDI, 10, 64, width=57) == (1 << 47) - 8

    def test_64_bit__no_limits_and_no_rights(self) -> None:
        state = long_mode()
        state.gpr[RDI] = 0x1000
        state.segments[DS] = Segment(0, 0, 0, 0x1_0000)
        assert access(state, self.AT_RDI, 8, 64, write=True) == 0x1000

    def test_32_bit__base_and_limit(self) -> None:
        state = protected_mode()
        state.segments[DS] = Segment(0x10, 0xFFFF_F000, 0xFFF, 0x4093)
        state.gpr[RDI] = 0xFF8
        assert access(state, self.AT_RDI, 8, 32) == 0xFFFF_FFF8
        assert refused(state, self.AT_RDI, 9, 32) is Vector.GP
        state.segments[DS] = Segment(0x10, 0xFFFF_FFFF, 0xFFF, 0x4093)
        assert access(state, self.AT_RDI, 8, 32) == 0xFF7  # wraps at 4 GiB

    def test_32_bit__stack(self) -> None:
        state = protected_mode()
        state.ss.limit, state.gpr[RSP] = 0xFFF, 0xFFD
        assert refused(state, self.AT_RSP, 4, 32) is Vector.SS

    def test_real_mode(self) -> None:
        state = real_mode()
        state.segments[DS].base, state.gpr[RBX] = 0x1230, 0xFFFE
        assert access(state, self.AT_RDI, 2, 16, write=True) == 0x1_122E
        assert refused(state, self.AT_RDI, 4, 16) is Vector.GP


RIGHTS = {
    # access rights, limit, offset, may be read, may be written
    "data": (0x4093, 0xFFF, 0xFFC, True, True),
    "data-beyond": (0x4093, 0xFFF, 0xFFD, False, False),
    "read-only": (0x4091, 0xFFF, 0, True, False),
    "expand-down-above": (0x4097, 0xFFF, 0x1000, True, True),
    "expand-down-below": (0x4097, 0xFFF, 0xFFF, False, False),
    "expand-down-top": (0x4097, 0xFFF, 0xFFFF_FFFC, True, True),
    "expand-down-over": (0x4097, 0xFFF, 0xFFFF_FFFD, False, False),
    "expand-down-16": (0x0097, 0xFFF, 0xFFFD, False, False),
    "expand-down-read-only": (0x4095, 0xFFF, 0x1000, True, False),
    "code": (0x409B, 0xFFF, 0, True, False),
    "execute-only": (0x4099, 0xFFF, 0, False, False),
    "conforming": (0x409F, 0xFFF, 0xFFC, True, False),
    "unusable": (0x1_0000, 0xFFFF_FFFF, 0, False, False),
    "not-present": (0x4013, 0xFFF, 0, False, False),
}


@pytest.mark.parametrize(("rights", "limit", "offset", "read", "write"), RIGHTS.values(), ids=RIGHTS)
def test_segment_rights(rights: int, limit: int, offset: int, read: bool, write: bool) -> None:
    segment = Segment(0x10, 0, limit, rights)
    state = protected_mode()
    assert segment_allows(state, segment, offset, 4, write=False) is read
    assert segment_allows(state, segment, offset, 4, write=True) is write


def test_segment_rights__real_mode_looks_at_the_limit_only() -> None:
    segment = Segment(0, 0, 0xFFFF, 0x409B)
    assert segment_allows(real_mode(), segment, 0xFFFC, 4, write=True)
    assert not segment_allows(real_mode(), segment, 0xFFFD, 4, write=True)


@pytest.mark.parametrize(
    ("operand", "read", "after"),
    [
        (RegisterOperand(RBX, 8), 0x1122_3344_5566_7788, 0xAABB_CCDD_EEFF_0011),
        (RegisterOperand(RBX, 4), 0x5566_7788, 0xEEFF_0011),
        (RegisterOperand(RBX, 2), 0x7788, 0x1122_3344_5566_0011),
        (RegisterOperand(RBX, 1), 0x88, 0x1122_3344_5566_7711),
        (RegisterOperand(RBX, 1, high_byte=True), 0x77, 0x1122_3344_5566_1188),
    ],
)
def test_register_access(operand: RegisterOperand, read: int, after: int) -> None:
    state = CpuState()
    state.gpr[RBX] = 0x1122_3344_5566_7788
    assert read_register(state, operand) == read
    write_register(state, operand, 0xAABB_CCDD_EEFF_0011)
    assert state.gpr[RBX] == after
