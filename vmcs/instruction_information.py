"""Layouts of the VM-exit instruction-information field, one per table of the manual.

Registers and segment registers have their usual encodings. Every layout encodes and decodes.

Spec: SDM Vol. 3, "VM Exits", "Information for VM Exits Due to Instruction Execution".
"""

from __future__ import annotations

from typing import Final

from vmcs.bits import Layout, Slice

SCALINGS: Final = {0: "no scaling", 1: "by 2", 2: "by 4", 3: "by 8"}
ADDRESS_SIZES: Final = {0: "16-bit", 1: "32-bit", 2: "64-bit"}
SEGMENTS: Final = {0: "ES", 1: "CS", 2: "SS", 3: "DS", 4: "FS", 5: "GS"}
REGISTERS: Final = dict(
    enumerate(
        ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15")
    )
)

_SCALING = Slice("scaling", 0, 2, SCALINGS)
_REGISTER_1 = Slice("register 1", 3, 4, REGISTERS)
_ADDRESS_SIZE = Slice("address size", 7, 3, ADDRESS_SIZES)
_REGISTER_OPERAND = Slice("register operand", 10)
_SEGMENT = Slice("segment", 15, 3, SEGMENTS)
_BASE_AND_INDEX = (
    Slice("index", 18, 4, REGISTERS),
    Slice("no index", 22),
    Slice("base", 23, 4, REGISTERS),
    Slice("no base", 27),
)
_REGISTER_2 = Slice("register 2", 28, 4, REGISTERS)

INS_OUTS: Final = Layout("INS and OUTS", 32, (_ADDRESS_SIZE, _SEGMENT))

INVALIDATE: Final = Layout(
    "INVEPT, INVPCID and INVVPID", 32, (_SCALING, _ADDRESS_SIZE, _SEGMENT, *_BASE_AND_INDEX, _REGISTER_2)
)

GDTR_IDTR_ACCESS: Final = Layout(
    "LIDT, LGDT, SIDT and SGDT",
    32,
    (
        _SCALING,
        _ADDRESS_SIZE,
        Slice("operand size", 11, 1, {0: "16-bit", 1: "32-bit"}),
        _SEGMENT,
        *_BASE_AND_INDEX,
        Slice("instruction", 28, 2, {0: "SGDT", 1: "SIDT", 2: "LGDT", 3: "LIDT"}),
    ),
)

LDTR_TR_ACCESS: Final = Layout(
    "LLDT, LTR, SLDT and STR",
    32,
    (
        _SCALING,
        _REGISTER_1,
        _ADDRESS_SIZE,
        _REGISTER_OPERAND,
        _SEGMENT,
        *_BASE_AND_INDEX,
        Slice("instruction", 28, 2, {0: "SLDT", 1: "STR", 2: "LLDT", 3: "LTR"}),
    ),
)

DESTINATION_REGISTER: Final = Layout(
    "RDRAND, RDSEED, TPAUSE and UMWAIT",
    32,
    (Slice("register", 3, 4, REGISTERS), Slice("operand size", 11, 2, {0: "16-bit", 1: "32-bit", 2: "64-bit"})),
)

MEMORY: Final = Layout(
    "VMCLEAR, VMPTRLD, VMPTRST, VMXON, XRSTORS and XSAVES", 32, (_SCALING, _ADDRESS_SIZE, _SEGMENT, *_BASE_AND_INDEX)
)

VMREAD_VMWRITE: Final = Layout(
    "VMREAD and VMWRITE",
    32,
    (_SCALING, _REGISTER_1, _ADDRESS_SIZE, _REGISTER_OPERAND, _SEGMENT, *_BASE_AND_INDEX, _REGISTER_2),
)

LOADIWKEY: Final = Layout("LOADIWKEY", 32, (_REGISTER_1, _REGISTER_2))

LAYOUTS: Final = (
    INS_OUTS,
    INVALIDATE,
    GDTR_IDTR_ACCESS,
    LDTR_TR_ACCESS,
    DESTINATION_REGISTER,
    MEMORY,
    VMREAD_VMWRITE,
    LOADIWKEY,
)
