"""What went wrong, in full: failing VM entries, VMX instructions that fail, misconfigured EPT entries.

These functions only look; who wants to know calls them right after the fact, while the machine is still as it was.

Spec: SDM Vol. 3, "VM Entries"; "VMX Instruction Reference", "VMX Instructions"; "EPT Misconfigurations".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from vmcs import instruction_rules as r
from vmcs.bits import describe_bits
from vmcs.capabilities import Capabilities
from vmcs.explanation import Explanation, Finding
from vmcs.fields import BY_ENCODING, HIGH_ACCESS, RESERVED_ENCODING
from vmcs.instruction_rules import InstructionRule
from vmcs.rules import BY_ID
from vmcs.rules.advice import explain_msr_violation, explain_violation
from vmcs.rules.model import Rule
from vtx.vmx.ept import (
    EXECUTE,
    EXECUTE_USER,
    READ,
    RESERVED_MEMORY_TYPES,
    WRITE,
    EptConfig,
    EptMisconfiguration,
)
from vtx.vmx.operation import EPTP_RULES, EntryFailure, VmxOperation
from vtx.vmx.outcome import VmFailInvalid, VmFailValid

_CURRENT_VMCS: Final[Rule] = BY_ID["basic.current-vmcs"]
_PDPTES: Final[Rule] = BY_ID["guest.pdptes-in-memory"]
_MEMORY_TYPE: Final = 7 << 3
MISCONFIGURATION: Final = "ept-misconfiguration"
_MISCONFIGURATIONS: Final = 'SDM Vol. 3, "VMX Support for Address Translation", "EPT Misconfigurations"'

Explain = Callable[[str, Callable[[], Explanation]], None]
"""Takes the id of what was broken, and a function that explains it, to be called at once or not at all."""


def broken_rule(failure: EntryFailure) -> str:
    """The id of the rule whose violation made a VM entry fail."""
    if failure.msr is not None:
        return failure.msr.rule.id
    if failure.violations:
        return failure.violations[0].rule.id
    return _CURRENT_VMCS.id if isinstance(failure.outcome, VmFailInvalid) else _PDPTES.id


def explain_entry_failure(operation: VmxOperation, failure: EntryFailure) -> Explanation:
    """Why a VM entry failed."""
    if failure.msr is not None:
        return explain_msr_violation(failure.msr)
    active = operation.current
    if failure.violations and active is not None:
        return explain_violation(failure.violations[0], active.rule_context)
    rule = BY_ID[broken_rule(failure)]
    return Explanation(rule.id, rule.statement(), str(rule.outcome), str(rule.ref), legal=failure.detail)


def explain_instruction(
    operation: VmxOperation, rule: InstructionRule, outcome: VmFailInvalid | VmFailValid
) -> Explanation:
    """Why a VMX instruction that demands ``rule`` ended with ``outcome``."""
    words = f"VMfailValid({int(outcome.error)})" if isinstance(outcome, VmFailValid) else "VMfailInvalid"
    legal = _LEGAL.get(rule)
    return Explanation(
        rule.id,
        rule.sentence,
        words,
        str(rule.ref),
        tuple(Finding(name, value, _text(rule, value), bits) for name, value, bits in outcome.operands),
        legal(operation, outcome.operands[0][1]) if legal else "",
    )


def explain_misconfiguration(config: EptConfig, fault: EptMisconfiguration) -> Explanation:
    """Why an EPT paging-structure entry is misconfigured.

    Spec: SDM Vol. 3, "VMX Support for Address Translation", "EPT Misconfigurations".
    """
    level, entry = fault.level, fault.entry
    assert level is not None
    permissions = READ | WRITE | EXECUTE | (EXECUTE_USER if config.mode_based_execute else 0)
    maps_page = entry & level.maps_page == level.maps_page
    reserved = level.reserved_page if maps_page else level.reserved_table
    if not entry & READ and entry & (permissions if not config.execute_only else WRITE):
        name, at_fault = "permissions", entry & permissions
        statement = "an entry that is present allows reads" + (
            ", or nothing but instruction fetches" if config.execute_only else ""
        )
        legal = f"{describe_bits(permissions)}: all 0, or bit 0 is 1" + (
            f", or only bits of {describe_bits(permissions & ~(READ | WRITE))} are 1" if config.execute_only else ""
        )
    elif entry & reserved:
        name, at_fault = "reserved-bits", entry & reserved
        what = "an entry that maps a page" if maps_page else "an entry that references a table"
        statement = f"the reserved bits of {what} are 0"
        legal = f"{describe_bits(reserved)} of this {level.name} are 0"
    else:
        name, at_fault = "memory-type", _MEMORY_TYPE
        statement = "the memory type of an entry that maps a page is not reserved"
        types = sorted(set(range(8)) - RESERVED_MEMORY_TYPES)
        legal = "bits 5:3: " + ", ".join(map(str, types))
    return Explanation(
        f"{MISCONFIGURATION}.{name}",
        statement,
        "VM exit: EPT misconfiguration",
        _MISCONFIGURATIONS,
        (
            Finding("guest-physical address", fault.guest_physical, f"{fault.guest_physical:#x}"),
            Finding(level.name, entry, f"{entry:#x} at {fault.entry_address:#x}", at_fault),
        ),
        legal,
    )


def _text(rule: InstructionRule, value: int) -> str:
    field = BY_ENCODING.get(value & ~HIGH_ACCESS) if rule in (r.FIELD_EXISTS, r.FIELD_WRITABLE) else None
    if field is None:
        return f"{value:#x}"
    return f"{value:#x} ({'high access to ' if value & HIGH_ACCESS else ''}{field.name})"


# What would have been legal, for the rules whose sentence leaves that open: functions of the first operand.


def _address(operation: VmxOperation, _address: int) -> str:
    return f"{describe_bits(operation.address_faults((1 << 64) - 1))} are 0"


def _revision(operation: VmxOperation, _word: int) -> str:
    return f"{operation.capabilities.revision_identifier:#x}"


def _field(operation: VmxOperation, encoding: int) -> str:
    field = BY_ENCODING.get(encoding & ~HIGH_ACCESS)
    if encoding & RESERVED_ENCODING:
        return "an encoding with bits 31:15 and bit 12 clear that the manual's appendix lists"
    if field is None:
        return "an encoding that the manual's appendix lists"
    if encoding & HIGH_ACCESS and field.high is None:
        return "bit 0 is 0: only 64-bit fields have high access"
    return f"the field exists on {field.exists}"


def _writable(operation: VmxOperation, _encoding: int) -> str:
    return 'processors whose IA32_VMX_MISC reports "VMWRITE to any supported field" let it be written'


def _types(kinds: Mapping[int, str]) -> Callable[[VmxOperation, int], str]:
    def supported(operation: VmxOperation, _kind: int) -> str:
        capabilities: Capabilities = operation.capabilities
        return ", ".join(f"{kind} ({name})" for kind, name in kinds.items() if capabilities.supports(name)) or "none"

    return supported


def _eptp(operation: VmxOperation, eptp: int) -> str:
    context = operation.eptp_context(eptp)
    return "; ".join(rule.demand.legal(context) for rule in EPTP_RULES if not rule.holds(context))


def _linear(operation: VmxOperation, _linear: int) -> str:
    return f"a canonical address of {operation.processor.profile.linear_address_width} bits"


_LEGAL: Final[dict[InstructionRule, Callable[[VmxOperation, int], str]]] = {
    r.VMXON_ADDRESS: _address,
    r.VMXON_REVISION: _revision,
    r.VMCLEAR_ADDRESS: _address,
    r.VMPTRLD_ADDRESS: _address,
    r.VMPTRLD_REVISION: _revision,
    r.FIELD_EXISTS: _field,
    r.FIELD_WRITABLE: _writable,
    r.INVEPT_TYPE: _types(r.INVEPT_KINDS),
    r.INVEPT_EPTP: _eptp,
    r.INVVPID_TYPE: _types(r.INVVPID_KINDS),
    r.INVVPID_ADDRESS: _linear,
}
