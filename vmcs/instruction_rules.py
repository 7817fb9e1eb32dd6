"""The checks of VMX instructions that end in VMfail, one record each; those of VM entry are in `vmcs.rules`.

Spec: SDM Vol. 3, "VMX Instruction Reference", "VMX Instructions" and "VM Instruction Error Numbers".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from vmcs.exits import InstructionError
from vmcs.refs import Reference, sdm

_REF: Final = sdm("VMX Instruction Reference", "VMX Instructions")


@frozen
class InstructionRule:
    """What an instruction demands; without an ``error`` a violation is VMfailInvalid.

    With an ``error`` it is VMfailValid, or VMfailInvalid as long as there is no current VMCS to hold the number.
    """

    id: str
    sentence: str
    error: InstructionError | None = None
    ref: Reference = _REF


CURRENT_VMCS: Final = InstructionRule("vm-instruction.current-vmcs", "there is a current VMCS")
LINKED_VMCS: Final = InstructionRule("vm-instruction.linked-vmcs", "the VMCS link pointer of the guest names a VMCS")

VMXON_ADDRESS: Final = InstructionRule(
    "vmxon.address", "the VMXON pointer is 4096-byte aligned and within the width of addresses in VMX structures"
)
VMXON_REVISION: Final = InstructionRule(
    "vmxon.revision", "the VMXON region begins with the processor's VMCS revision identifier, bit 31 clear"
)
VMXON_TWICE: Final = InstructionRule(
    "vmxon.outside-vmx-operation",
    "the processor is not in VMX root operation yet",
    InstructionError.VMXON_IN_VMX_ROOT_OPERATION,
)
VMCALL_ROOT: Final = InstructionRule(
    "vmcall.dual-monitor",
    "VMCALL is executed by a guest, or under the dual-monitor treatment of SMIs, which no modelled processor has",
    InstructionError.VMCALL_IN_VMX_ROOT_OPERATION,
)
VMCLEAR_ADDRESS: Final = InstructionRule(
    "vmclear.address",
    "the VMCS pointer is 4096-byte aligned and within the width of addresses in VMX structures",
    InstructionError.VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS,
)
VMCLEAR_VMXON_POINTER: Final = InstructionRule(
    "vmclear.not-vmxon-pointer",
    "the VMCS pointer is not the VMXON pointer",
    InstructionError.VMCLEAR_WITH_VMXON_POINTER,
)
VMPTRLD_ADDRESS: Final = InstructionRule(
    "vmptrld.address",
    "the VMCS pointer is 4096-byte aligned and within the width of addresses in VMX structures",
    InstructionError.VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS,
)
VMPTRLD_VMXON_POINTER: Final = InstructionRule(
    "vmptrld.not-vmxon-pointer",
    "the VMCS pointer is not the VMXON pointer",
    InstructionError.VMPTRLD_WITH_VMXON_POINTER,
)
VMPTRLD_REVISION: Final = InstructionRule(
    "vmptrld.revision",
    "the VMCS region begins with the processor's VMCS revision identifier; bit 31 is set only where the processor "
    "has VMCS shadowing",
    InstructionError.VMPTRLD_WITH_INCORRECT_VMCS_REVISION_IDENTIFIER,
)
FIELD_EXISTS: Final = InstructionRule(
    "vmread-vmwrite.field-exists",
    "the encoding names a field that the VMCS of this processor has",
    InstructionError.VMREAD_OR_VMWRITE_OF_UNSUPPORTED_COMPONENT,
)
FIELD_WRITABLE: Final = InstructionRule(
    "vmwrite.field-writable",
    "the field is not one of the VM-exit information fields, unless the processor lets them be written",
    InstructionError.VMWRITE_TO_READ_ONLY_COMPONENT,
)

# The types of INVEPT and INVVPID, with the name of the capability bit of each.
INVEPT_KINDS: Final[Mapping[int, str]] = {1: "single-context INVEPT", 2: "all-context INVEPT"}
INVVPID_KINDS: Final[Mapping[int, str]] = {
    0: "individual-address INVVPID",
    1: "single-context INVVPID",
    2: "all-context INVVPID",
    3: "single-context-retaining-globals INVVPID",
}

_INVALIDATION = InstructionError.INVALID_OPERAND_TO_INVEPT_OR_INVVPID

INVEPT_TYPE: Final = InstructionRule("invept.type", "the processor supports the INVEPT type", _INVALIDATION)
INVEPT_EPTP: Final = InstructionRule(
    "invept.eptp", "VM entry would accept the EPTP of the INVEPT descriptor", _INVALIDATION
)
INVVPID_TYPE: Final = InstructionRule("invvpid.type", "the processor supports the INVVPID type", _INVALIDATION)
INVVPID_RESERVED: Final = InstructionRule(
    "invvpid.descriptor-reserved", "bits 63:16 of the INVVPID descriptor are 0", _INVALIDATION
)
INVVPID_VPID: Final = InstructionRule(
    "invvpid.vpid-not-zero", "the VPID of the descriptor is not 0, unless all contexts are invalidated", _INVALIDATION
)
INVVPID_ADDRESS: Final = InstructionRule(
    "invvpid.linear-address", "the linear address of the descriptor is canonical", _INVALIDATION
)

RULES: Final[tuple[InstructionRule, ...]] = (
    CURRENT_VMCS,
    LINKED_VMCS,
    VMXON_ADDRESS,
    VMXON_REVISION,
    VMXON_TWICE,
    VMCALL_ROOT,
    VMCLEAR_ADDRESS,
    VMCLEAR_VMXON_POINTER,
    VMPTRLD_ADDRESS,
    VMPTRLD_VMXON_POINTER,
    VMPTRLD_REVISION,
    FIELD_EXISTS,
    FIELD_WRITABLE,
    INVEPT_TYPE,
    INVEPT_EPTP,
    INVVPID_TYPE,
    INVVPID_RESERVED,
    INVVPID_VPID,
    INVVPID_ADDRESS,
)
