"""The VMX instructions, each as one function of its operands' values: VMfail conditions in the manual's order, then the
operation.

What all of them check first (#UD, the VM exit of a guest, CPL) is in `admit` and its variants, and `vtx.vmx.execution`
fetches operands and commits results; so these functions are the same for guest code and for callers in Python.

Spec: SDM Vol. 3, "VMX Instruction Reference", "VMX Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmcs import controls as c
from vmcs import instruction_rules as r
from vmcs.exits import Reason
from vmcs.region import SHADOW_INDICATOR, LaunchState
from vtx.vmx.exit import perform_exit
from vtx.vmx.intercepts import vmx_instruction_exit
from vtx.vmx.operation import NO_VMCS, VmxOperation
from vtx.vmx.outcome import SUCCEED, Outcome, VmFailInvalid, VmSucceed
from vtx.vmx.record import VmExit
from vtx.vmx.shadowing import accessed_vmcs, is_shadowed
from vtx.x86.decode import Instruction, is_canonical
from vtx.x86.msr_table import FEATURE_CONTROL_LOCK, FEATURE_CONTROL_VMX_OUTSIDE_SMX, IA32_FEATURE_CONTROL
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import AccessRights, CpuState, Cr0, Cr4, Efer, Rflags

_UD: Final = Fault(Vector.UD)
_GP: Final = Fault(Vector.GP, 0)
# Arithmetic on flag enumerations is too slow for what every instruction does.
_PE: Final = int(Cr0.PE)
_VMXE: Final = int(Cr4.VMXE)
_VM: Final = int(Rflags.VM)
_LMA: Final = int(Efer.LMA)
_LONG: Final = int(AccessRights.LONG)
_LAUNCH_STATE_OFFSET: Final = 8  # in the region's image
_POINTER: Final = "VMCS pointer"
_ENCODING: Final = "field encoding"

_ALL_CONTEXTS: Final = 2  # INVVPID type


# What comes before an instruction's operands


def _guest_exit(operation: VmxOperation, reason: Reason, instruction: Instruction | None) -> Outcome:
    """The unconditional VM exit of a VMX instruction in a guest."""
    if instruction is None:
        return perform_exit(operation, VmExit(reason, instruction_length=0, resume_flag=0))
    return perform_exit(operation, vmx_instruction_exit(reason, instruction, operation.processor.state.rip))


def _in_compatibility_mode(state: CpuState) -> bool:
    return bool(state.efer & _LMA) and not state.segments[1].access_rights & _LONG


def admit(operation: VmxOperation, reason: Reason, instruction: Instruction | None) -> Outcome | None:
    """#UD, VM exit and #GP(0) that most VMX instructions share; None to go on."""
    state = operation.processor.state
    if operation.vmxon_pointer is None or not state.cr0 & _PE or state.rflags & _VM:
        return _UD
    if _in_compatibility_mode(state):
        return _UD
    if operation.non_root:
        return _guest_exit(operation, reason, instruction)
    return _GP if state.cpl else None


def admit_field_access(
    operation: VmxOperation, reason: Reason, instruction: Instruction | None, encoding: int
) -> Outcome | None:
    """VMREAD and VMWRITE of ``encoding``, which VMCS shadowing may keep from exiting; they then need CPL 0."""
    if not operation.non_root or not is_shadowed(operation, reason, encoding):
        return admit(operation, reason, instruction)
    state = operation.processor.state
    if not state.cr0 & _PE or state.rflags & _VM or _in_compatibility_mode(state):
        return _UD
    return _GP if state.cpl else None


def admit_vmcall(operation: VmxOperation, reason: Reason, instruction: Instruction | None) -> Outcome | None:
    """VMCALL exits from guests in every mode."""
    if operation.vmxon_pointer is None:
        return _UD
    if operation.non_root:
        return _guest_exit(operation, reason, instruction)
    return admit(operation, reason, instruction)


def admit_vmxon(operation: VmxOperation, reason: Reason, instruction: Instruction | None) -> Outcome | None:
    """VMXON: outside VMX operation, more faults; inside, a failure before the operand is read."""
    state = operation.processor.state
    if not state.cr0 & _PE or not state.cr4 & _VMXE or state.rflags & _VM:
        return _UD
    if _in_compatibility_mode(state):
        return _UD
    if operation.non_root:
        return _guest_exit(operation, reason, instruction)
    if state.cpl:
        return _GP
    if operation.vmxon_pointer is not None:
        return operation.fail(r.VMXON_TWICE)
    if not operation.fixed_bits_ok(0, state.cr0) or not operation.fixed_bits_ok(4, state.cr4):
        return _GP
    needed = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX_OUTSIDE_SMX
    feature_control = operation.processor.msrs.read(IA32_FEATURE_CONTROL) or 0
    return None if feature_control & needed == needed else _GP


def admit_invept(operation: VmxOperation, reason: Reason, instruction: Instruction | None) -> Outcome | None:
    """INVEPT is an invalid opcode where it is not supported."""
    return admit(operation, reason, instruction) if operation.capabilities.supports("INVEPT") else _UD


def admit_invvpid(operation: VmxOperation, reason: Reason, instruction: Instruction | None) -> Outcome | None:
    """INVVPID is an invalid opcode where it is not supported."""
    return admit(operation, reason, instruction) if operation.capabilities.supports("INVVPID") else _UD


# VMX operation


def vmxon(operation: VmxOperation, address: int) -> Outcome:
    """Enter VMX root operation with the VMXON region at physical ``address``."""
    if faults := operation.address_faults(address):
        return VmFailInvalid(r.VMXON_ADDRESS, (("VMXON pointer", address, faults),))
    word, revision = operation.processor.memory.read_u32(address), operation.capabilities.revision_identifier
    # A set bit 31 can never match: the identifier has 31 bits.
    if word != revision:
        return VmFailInvalid(r.VMXON_REVISION, (("first word of the VMXON region", word, word ^ revision),))
    operation.vmxon_pointer = address
    operation.current = None
    return SUCCEED


def vmxoff(operation: VmxOperation) -> Outcome:
    """Leave VMX operation. VMCSs still active are written to memory, so that none is lost."""
    for active in operation.active.values():
        operation.write_out(active)
    operation.active.clear()
    operation.current = None
    operation.vmxon_pointer = None
    return SUCCEED


def vmcall(operation: VmxOperation) -> Outcome:
    """VMCALL in root operation: there is no dual-monitor treatment to call."""
    return operation.fail(r.VMCALL_ROOT)


# VMCSs


def vmclear(operation: VmxOperation, address: int) -> Outcome:
    """Make the VMCS at physical ``address`` inactive and clear, with all its data in memory."""
    if faults := operation.address_faults(address):
        return operation.fail(r.VMCLEAR_ADDRESS, (_POINTER, address, faults))
    if address == operation.vmxon_pointer:
        return operation.fail(r.VMCLEAR_VMXON_POINTER, (_POINTER, address, 0))
    active = operation.active.pop(address, None)
    if active is None:
        operation.processor.memory.write_u32(address + _LAUNCH_STATE_OFFSET, LaunchState.CLEAR)
        return SUCCEED
    active.vmcs.launch_state = LaunchState.CLEAR
    operation.write_out(active)
    if operation.current is active:
        operation.current = None
    return SUCCEED


def vmptrld(operation: VmxOperation, address: int) -> Outcome:
    """Make the VMCS at physical ``address`` active and current."""
    if faults := operation.address_faults(address):
        return operation.fail(r.VMPTRLD_ADDRESS, (_POINTER, address, faults))
    if address == operation.vmxon_pointer:
        return operation.fail(r.VMPTRLD_VMXON_POINTER, (_POINTER, address, 0))
    capabilities = operation.capabilities
    word = operation.processor.memory.read_u32(address)
    wrong = word ^ capabilities.revision_identifier
    if capabilities.allows(c.VMCS_SHADOWING):
        wrong &= ~SHADOW_INDICATOR
    if wrong:
        return operation.fail(r.VMPTRLD_REVISION, ("first word of the VMCS region", word, wrong))
    operation.current = operation.activate(address)
    return SUCCEED


def vmptrst(operation: VmxOperation) -> Outcome:
    """The current-VMCS pointer."""
    return VmSucceed(operation.current.pointer if operation.current else NO_VMCS)


def vmread(operation: VmxOperation, encoding: int) -> Outcome:
    """The value of the field, or of bits 63:32 of it, that ``encoding`` names; a guest reads the shadow VMCS."""
    vmcs = accessed_vmcs(operation)
    if vmcs is None:
        return VmFailInvalid(r.LINKED_VMCS if operation.non_root else r.CURRENT_VMCS)
    value = vmcs.read(encoding)
    if value is None:
        return operation.fail(r.FIELD_EXISTS, (_ENCODING, encoding, 0))
    return VmSucceed(value)


def vmwrite(operation: VmxOperation, encoding: int, source: Callable[[], int]) -> Outcome:
    """Write the field that ``encoding`` names; a guest writes the shadow VMCS.

    ``source`` reads the operand and is called only if it is needed.
    """
    vmcs = accessed_vmcs(operation)
    if vmcs is None:
        return VmFailInvalid(r.LINKED_VMCS if operation.non_root else r.CURRENT_VMCS)
    field = operation.capabilities.fields.get(encoding)
    if field is None:
        return operation.fail(r.FIELD_EXISTS, (_ENCODING, encoding, 0))
    if field.read_only and not operation.capabilities.vmwrite_any_field:
        return operation.fail(r.FIELD_WRITABLE, (_ENCODING, encoding, 0))
    vmcs.write(encoding, source())
    return SUCCEED


# Invalidations. ``source`` reads the 128-bit descriptor from memory.


def invept(operation: VmxOperation, kind: int, source: Callable[[], int]) -> Outcome:
    """Invalidate mappings derived from EPT: of one EPT pointer (``kind`` 1) or all (2)."""
    name = r.INVEPT_KINDS.get(kind)
    if name is None or not operation.capabilities.supports(name):
        return operation.fail(r.INVEPT_TYPE, ("INVEPT type", kind, 0))
    eptp = source() & (1 << 64) - 1
    if kind == 1 and not operation.eptp_is_valid(eptp):
        return operation.fail(r.INVEPT_EPTP, ("EPTP", eptp, 0))
    operation.processor.mmu.invept(kind, eptp)
    return SUCCEED


def invvpid(operation: VmxOperation, kind: int, source: Callable[[], int]) -> Outcome:
    """Invalidate mappings by VPID: one address (``kind`` 0), one VPID (1), all (2), one without globals (3)."""
    name = r.INVVPID_KINDS.get(kind)
    if name is None or not operation.capabilities.supports(name):
        return operation.fail(r.INVVPID_TYPE, ("INVVPID type", kind, 0))
    descriptor = source()
    low, linear = descriptor & (1 << 64) - 1, descriptor >> 64
    vpid = low & 0xFFFF
    if low != vpid:
        return operation.fail(r.INVVPID_RESERVED, ("low 64 bits of the INVVPID descriptor", low, low ^ vpid))
    if kind != _ALL_CONTEXTS and not vpid:
        return operation.fail(r.INVVPID_VPID, ("VPID", vpid, 0))
    if kind == 0 and not is_canonical(linear, operation.processor.profile.linear_address_width):
        return operation.fail(r.INVVPID_ADDRESS, ("linear address", linear, 0))
    operation.processor.mmu.invvpid(kind, vpid, linear)
    return SUCCEED
