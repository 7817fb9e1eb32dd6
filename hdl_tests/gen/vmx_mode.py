"""Interface of the block "VMX operation mode and launch state": requests, responses and the state they show.

The block sees one logical processor and `REGIONS` page-aligned memory regions, any of which can serve as VMXON region
or VMCS region. What a check reads from a VMCS is abstracted to one bit per class of check (`Component`), so that
every VMfail and both kinds of VM-entry failure remain reachable and distinguishable.

Spec: SDM Vol. 3, "VMX Instruction Reference"; "VM Instruction Error Numbers"; "Format of the VMCS Region".
"""

from __future__ import annotations

import enum

from attrs import frozen

from hdl_tests.gen.layout import bits, lanes, nested

REGIONS = 4
NO_REGION = 7
"""Encoding of "no such pointer" (FFFFFFFF_FFFFFFFFH) in members that hold a region number."""
ENTRY_FAILURE = 0x80
"""Bit 31 of the exit reason, moved to bit 7 of the 8-bit members that hold an exit reason."""


class Operation(enum.IntEnum):
    """What the processor executes, or software does, in one step."""

    VMXON = 0
    VMXOFF = 1
    VMCLEAR = 2
    VMPTRLD = 3
    VMPTRST = 4
    VMREAD = 5
    VMWRITE = 6
    VMLAUNCH = 7
    VMRESUME = 8
    VMCALL = 9
    INVEPT = 10
    INVVPID = 11
    CPUID = 12  # the plainest instruction with an unconditional VM exit
    STORE_REVISION = 13  # an ordinary store to the first four bytes of a region


class CpuMode(enum.IntEnum):
    """Operating mode of the processor, as far as VMX instructions care."""

    REAL = 0
    VIRTUAL_8086 = 1
    PROTECTED = 2  # EFER.LMA = 0
    COMPATIBILITY = 3
    LONG = 4  # 64-bit mode


class Address(enum.IntEnum):
    """The 64-bit pointer operand; 0 to 3 are the regions."""

    MISALIGNED = 4
    BEYOND_WIDTH = 5  # sets a bit beyond the physical-address width


class Component(enum.IntEnum):
    """A VMCS component, by what its value decides."""

    PLAIN = 0  # no check reads it; 8 bits of its value are observed
    CONTROLS = 1  # value 1 breaks the checks on VMX controls
    HOST_STATE = 2  # value 1 breaks the checks on the host-state area
    GUEST_STATE = 3  # value 1 breaks the checks on the guest-state area
    MSR_LIST = 4  # value 1 makes the VM-entry MSR-load list hold an entry that cannot be loaded
    INSTRUCTION_ERROR = 5  # read-only data field
    EXIT_REASON = 6  # read-only data field
    UNSUPPORTED = 7  # an encoding no processor defines


class VmxMode(enum.IntEnum):
    """VMX operation."""

    OUTSIDE = 0
    ROOT = 1
    NON_ROOT = 2


class Outcome(enum.IntEnum):
    """How a step ends."""

    RETIRED = 0  # for VMX instructions: VMsucceed
    INVALID_OPCODE = 1  # #UD
    GENERAL_PROTECTION = 2  # #GP(0)
    FAIL_INVALID = 3  # VMfailInvalid
    FAIL_VALID = 4  # VMfailValid(number)
    ENTERED = 5  # successful VM entry
    EXITED = 6  # VM exit
    ENTRY_FAILED = 7  # VM-entry failure that loads host state, exit reason bit 31 set


FLAG_BITS = {"CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "OF": 11}
"""RFLAGS positions of the six arithmetic flags, in the order of ``Request.flags`` from bit 0 up."""


@frozen
class Request:
    """One step: the operation, its operands and the processor state around it."""

    operation: int = bits(4, "an OP_* value")
    address: int = bits(3, "pointer operand: region number or ADDRESS_*")
    cpu_mode: int = bits(3, "a CPU_* value")
    cpl: int = bits(2, "current privilege level")
    cr4_vmxe: int = bits(1, "CR4.VMXE (1 in VMX operation)")
    cr0_supported: int = bits(1, "CR0 agrees with the VMX-fixed bits")
    cr4_supported: int = bits(1, "CR4 agrees with the VMX-fixed bits")
    feature_lock: int = bits(1, "IA32_FEATURE_CONTROL.LOCK")
    feature_vmxon: int = bits(1, "IA32_FEATURE_CONTROL: enable VMXON outside SMX operation")
    mov_ss_blocking: int = bits(1, "blocking by MOV SS")
    vmwrite_any: int = bits(1, "IA32_VMX_MISC: VMWRITE can write read-only data fields")
    flags: int = bits(6, "arithmetic flags before: OF SF ZF AF PF CF")
    component: int = bits(3, "VMREAD, VMWRITE: a COMPONENT_* value")
    value: int = bits(8, "VMWRITE: source; STORE_REVISION: bit 0, the identifier is this processor's")
    invalidation: int = bits(3, "INVEPT, INVVPID: type (register operand), 4 to 7 stand for any larger value")
    eptp_valid: int = bits(1, "INVEPT descriptor: the EPTP would pass VM entry")
    vpid_zero: int = bits(1, "INVVPID descriptor: VPID is 0")
    reserved_set: int = bits(1, "INVVPID descriptor: bits 63:16 are not 0")
    not_canonical: int = bits(1, "INVVPID descriptor: the linear address is not canonical")
    pad: int = bits(5, "to whole bytes")


@frozen
class State:
    """Everything the block remembers."""

    mode: int = bits(2, "a MODE_* value")
    vmxon_pointer: int = bits(3, "region number, or NO_REGION outside VMX operation")
    current: int = bits(3, "current-VMCS pointer: region number or NO_REGION")
    active: tuple[int, ...] = lanes(REGIONS, 1, "the VMCS is active")
    launched: tuple[int, ...] = lanes(REGIONS, 1, "launch state is launched, not clear")
    revision_ok: tuple[int, ...] = lanes(REGIONS, 1, "the region starts with this processor's VMCS revision identifier")
    bad_controls: tuple[int, ...] = lanes(REGIONS, 1, "COMPONENT_CONTROLS")
    bad_host: tuple[int, ...] = lanes(REGIONS, 1, "COMPONENT_HOST_STATE")
    bad_guest: tuple[int, ...] = lanes(REGIONS, 1, "COMPONENT_GUEST_STATE")
    bad_msr_list: tuple[int, ...] = lanes(REGIONS, 1, "COMPONENT_MSR_LIST")
    plain: tuple[int, ...] = lanes(REGIONS, 8, "COMPONENT_PLAIN")
    instruction_error: tuple[int, ...] = lanes(REGIONS, 8, "COMPONENT_INSTRUCTION_ERROR")
    exit_reason: tuple[int, ...] = lanes(REGIONS, 8, "COMPONENT_EXIT_REASON, entry failure in bit 7")


@frozen
class Response:
    """What a step did, and the whole state after it."""

    outcome: int = bits(3, "an OUTCOME_* value")
    number: int = bits(8, "VMfailValid: error number; VM exit: basic exit reason; entry failure: with bit 7")
    flags: int = bits(6, "arithmetic flags after")
    value: int = bits(8, "VMREAD, VMPTRST: what reaches the destination, else 0; 8'hFF for no region")
    pad: int = bits(3, "to whole bytes")
    state: State = nested(State, "after the step")  # noqa: RUF009 - an attrs field
