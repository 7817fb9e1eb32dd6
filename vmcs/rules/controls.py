"""Checks on the VM-execution, VM-exit and VM-entry control fields.

All of them end in VMfailValid(7). The manual leaves their order open; this is the manual's own.

Spec: SDM Vol. 3, "VM Entries", "VM-Execution Control Fields", "VM-Exit Control Fields", "VM-Entry Control Fields".
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs import layouts
from vmcs.bits import MASK64, bit_range
from vmcs.capabilities import WRITE_BACK
from vmcs.controls import Control, ControlWord
from vmcs.exits import InstructionError
from vmcs.fields import Field
from vmcs.refs import Reference, sdm
from vmcs.rules import shapes as s
from vmcs.rules.model import ALWAYS, Condition, Demand, EntryContext, FailValid, FaultyBits, Rule

EXECUTION: Final = sdm("VM Entries", "VM-Execution Control Fields")
EXIT: Final = sdm("VM Entries", "VM-Exit Control Fields")
ENTRY: Final = sdm("VM Entries", "VM-Entry Control Fields")

_OUTCOME = FailValid(InstructionError.VM_ENTRY_WITH_INVALID_CONTROL_FIELDS)


def _rule(name: str, sentence: str, demand: Demand, when: Condition = ALWAYS, ref: Reference = EXECUTION) -> Rule:
    return Rule(f"controls.{name}", sentence, demand, ref, _OUTCOME, when)


def _allowed(name: str, word: ControlWord, ref: Reference, when: Condition = ALWAYS) -> Rule:
    sentence = f"the {word.value} have only settings that the capability MSRs allow"
    return _rule(name, sentence, s.allowed_word(word), when, ref)


def _needs(name: str, control: Control, needed: Control, ref: Reference = EXECUTION) -> Rule:
    return _rule(name, f"{needed} is 1 too", s.control_on(needed, because=control), s.on(control), ref)


def _address(name: str, field: Field, when: Condition, alignment: int = s.PAGE, ref: Reference = EXECUTION) -> Rule:
    sentence = f"the {_lower(field.name)} is {alignment}-byte aligned and within the physical-address width"
    return _rule(name, sentence, s.structure_address(field, alignment), when, ref)


def _lower(name: str) -> str:
    return name if name[1:2].isupper() else name[0].lower() + name[1:]


# ---- TPR threshold


def _virtual_task_priority(context: EntryContext) -> int:
    """Bits 7:4 of VTPR: its byte at offset 80H of the virtual-APIC page, read with its three neighbours."""
    return context.read(context.vmcs[f.VIRTUAL_APIC_ADDRESS] + 0x80, 4) >> 4 & 0xF


def _lower_threshold(context: EntryContext) -> None:
    context.vmcs[f.TPR_THRESHOLD] = context.vmcs[f.TPR_THRESHOLD] & ~0xF


_THRESHOLD_WITHIN_VTPR = Demand(
    (f.TPR_THRESHOLD, f.VIRTUAL_APIC_ADDRESS),
    lambda context: context.vmcs[f.TPR_THRESHOLD] & 0xF <= _virtual_task_priority(context),
    _lower_threshold,
    lambda context: ((f.TPR_THRESHOLD, 0xF),),
    volatile=True,
)

# ---- EPT pointer


def _ept_memory_types(context: EntryContext) -> Collection[int]:
    types: list[int] = []
    if context.capabilities.supports("write-back paging structures"):
        types.append(WRITE_BACK)
    if context.capabilities.supports("uncacheable paging structures"):
        types.append(0)
    return types or (WRITE_BACK,)


def _ept_walk_lengths(context: EntryContext) -> Collection[int]:
    lengths: list[int] = []
    if context.capabilities.supports("page-walk length 4"):
        lengths.append(3 << 3)
    if context.capabilities.supports("page-walk length 5"):
        lengths.append(4 << 3)
    return lengths or (3 << 3,)


def _ept_pointer_reserved(context: EntryContext) -> int:
    reserved = bit_range(11, 8) | context.beyond_width
    if not context.capabilities.supports("supervisor shadow-stack control"):
        reserved |= 1 << 7
    return reserved


def _accessed_dirty_reserved(context: EntryContext) -> int:
    return 0 if context.capabilities.supports("accessed and dirty flags") else 1 << 6


# ---- MSR areas


def _area_end(address: Field, count: Field) -> Demand:
    def beyond(context: EntryContext) -> int:
        last = context.vmcs[address] + 16 * context.vmcs[count] - 1
        return last & ~(MASK64 & ~context.beyond_structure_width)  # the sum may need more than 64 bits

    def repair(context: EntryContext) -> None:
        context.vmcs[count] = 0

    return Demand((address, count), lambda context: not beyond(context), repair, lambda context: ((address, 0),))


def _msr_area(name: str, address: Field, count: Field, ref: Reference) -> tuple[Rule, Rule]:
    when = s.bit_set(count, count.mask, f"the {count.name} is not 0")
    return (
        _address(f"{name}-address", address, when, 16, ref),
        _rule(
            f"{name}-end",
            "the last byte of the area is within the physical-address width",
            _area_end(address, count),
            when,
            ref,
        ),
    )


# ---- IPI virtualization


def _last_pid_pointer() -> Demand:
    def holds(context: EntryContext) -> bool:
        last = context.vmcs[f.PID_POINTER_TABLE_ADDRESS] + 8 * context.vmcs[f.LAST_PID_POINTER_INDEX]
        return not last & ~(MASK64 & ~context.beyond_structure_width)

    def repair(context: EntryContext) -> None:
        context.vmcs[f.LAST_PID_POINTER_INDEX] = 0
        if not holds(context):
            context.vmcs[f.PID_POINTER_TABLE_ADDRESS] = 0

    return Demand((f.PID_POINTER_TABLE_ADDRESS, f.LAST_PID_POINTER_INDEX), holds, repair)


_EPTP_SWITCHING = s.every(
    s.on(c.ENABLE_VM_FUNCTIONS), s.bit_set(f.VM_FUNCTION_CONTROLS, 1 << f.EPTP_SWITCHING, "EPTP switching is enabled")
)

_EXECUTION_RULES: Final[tuple[Rule, ...]] = (
    _allowed("pin-based-reserved", ControlWord.PIN_BASED, EXECUTION),
    _allowed("primary-reserved", ControlWord.PRIMARY, EXECUTION),
    _allowed("secondary-reserved", ControlWord.SECONDARY, EXECUTION, s.on(c.ACTIVATE_SECONDARY_CONTROLS)),
    _allowed("tertiary-reserved", ControlWord.TERTIARY, EXECUTION, s.on(c.ACTIVATE_TERTIARY_CONTROLS)),
    _rule(
        "cr3-target-count",
        "the CR3-target count is no greater than the number of CR3-target values",
        s.slice_in(
            f.CR3_TARGET_COUNT, f.CR3_TARGET_COUNT.mask, lambda context: range(context.capabilities.cr3_targets + 1)
        ),
    ),
    _address("io-bitmap-a-address", f.IO_BITMAP_A_ADDRESS, s.on(c.USE_IO_BITMAPS)),
    _address("io-bitmap-b-address", f.IO_BITMAP_B_ADDRESS, s.on(c.USE_IO_BITMAPS)),
    _address("msr-bitmap-address", f.MSR_BITMAP_ADDRESS, s.on(c.USE_MSR_BITMAPS)),
    _address("virtual-apic-address", f.VIRTUAL_APIC_ADDRESS, s.on(c.USE_TPR_SHADOW)),
    _rule(
        "tpr-threshold-reserved",
        "bits 31:4 of the TPR threshold are 0",
        s.bits_clear(f.TPR_THRESHOLD, bit_range(31, 4)),
        s.every(s.on(c.USE_TPR_SHADOW), s.off(c.VIRTUAL_INTERRUPT_DELIVERY)),
    ),
    _rule(
        "tpr-threshold-above-vtpr",
        "the TPR threshold is no greater than bits 7:4 of VTPR on the virtual-APIC page",
        _THRESHOLD_WITHIN_VTPR,
        s.every(s.on(c.USE_TPR_SHADOW), s.off(c.VIRTUALIZE_APIC_ACCESSES), s.off(c.VIRTUAL_INTERRUPT_DELIVERY)),
    ),
    _needs("x2apic-mode-needs-tpr-shadow", c.VIRTUALIZE_X2APIC_MODE, c.USE_TPR_SHADOW),
    _needs("apic-register-virtualization-needs-tpr-shadow", c.APIC_REGISTER_VIRTUALIZATION, c.USE_TPR_SHADOW),
    _needs("virtual-interrupt-delivery-needs-tpr-shadow", c.VIRTUAL_INTERRUPT_DELIVERY, c.USE_TPR_SHADOW),
    _needs("ipi-virtualization-needs-tpr-shadow", c.IPI_VIRTUALIZATION, c.USE_TPR_SHADOW),
    _needs("virtual-nmis-need-nmi-exiting", c.VIRTUAL_NMIS, c.NMI_EXITING),
    _needs("nmi-window-needs-virtual-nmis", c.NMI_WINDOW_EXITING, c.VIRTUAL_NMIS),
    _address("apic-access-address", f.APIC_ACCESS_ADDRESS, s.on(c.VIRTUALIZE_APIC_ACCESSES)),
    _rule(
        "x2apic-mode-excludes-apic-accesses",
        f"{c.VIRTUALIZE_APIC_ACCESSES} is 0",
        s.control_off(c.VIRTUALIZE_APIC_ACCESSES),
        s.on(c.VIRTUALIZE_X2APIC_MODE),
    ),
    _needs(
        "virtual-interrupt-delivery-needs-external-interrupt-exiting",
        c.VIRTUAL_INTERRUPT_DELIVERY,
        c.EXTERNAL_INTERRUPT_EXITING,
    ),
    _needs(
        "posted-interrupts-need-virtual-interrupt-delivery", c.PROCESS_POSTED_INTERRUPTS, c.VIRTUAL_INTERRUPT_DELIVERY
    ),
    _needs("posted-interrupts-need-acknowledge", c.PROCESS_POSTED_INTERRUPTS, c.EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT),
    _rule(
        "posted-interrupt-vector",
        "the posted-interrupt notification vector is at most 255",
        s.bits_clear(f.POSTED_INTERRUPT_NOTIFICATION_VECTOR, bit_range(15, 8)),
        s.on(c.PROCESS_POSTED_INTERRUPTS),
    ),
    _address(
        "posted-interrupt-descriptor-address",
        f.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
        s.on(c.PROCESS_POSTED_INTERRUPTS),
        64,
    ),
    _rule("vpid-not-zero", "the VPID is not 0", s.not_zero(f.VPID), s.on(c.ENABLE_VPID)),
    _rule(
        "eptp-memory-type",
        "the processor supports the EPT paging-structure memory type",
        s.slice_in(f.EPT_POINTER, 7, _ept_memory_types),
        s.on(c.ENABLE_EPT),
    ),
    _rule(
        "eptp-walk-length",
        "the processor supports the EPT page-walk length",
        s.slice_in(f.EPT_POINTER, 7 << 3, _ept_walk_lengths),
        s.on(c.ENABLE_EPT),
    ),
    _rule(
        "eptp-accessed-dirty",
        "accessed and dirty flags for EPT are enabled only where the processor supports them",
        s.bits_clear(f.EPT_POINTER, _accessed_dirty_reserved),
        s.on(c.ENABLE_EPT),
    ),
    _rule(
        "eptp-reserved",
        "the reserved bits of the EPT pointer, those beyond the physical-address width among them, are 0",
        s.bits_clear(f.EPT_POINTER, _ept_pointer_reserved),
        s.on(c.ENABLE_EPT),
    ),
    _needs("pml-needs-ept", c.ENABLE_PML, c.ENABLE_EPT),
    _address("pml-address", f.PML_ADDRESS, s.on(c.ENABLE_PML)),
    _needs("unrestricted-guest-needs-ept", c.UNRESTRICTED_GUEST, c.ENABLE_EPT),
    _needs("mode-based-execute-needs-ept", c.MODE_BASED_EXECUTE_CONTROL_FOR_EPT, c.ENABLE_EPT),
    _needs("sub-page-permissions-need-ept", c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT, c.ENABLE_EPT),
    _address(
        "sub-page-permission-table-pointer",
        f.SUB_PAGE_PERMISSION_TABLE_POINTER,
        s.on(c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT),
    ),
    _rule(
        "vm-function-controls-reserved",
        "only VM functions that the processor supports are enabled",
        s.bits_clear(f.VM_FUNCTION_CONTROLS, lambda context: MASK64 & ~context.capabilities.vm_functions),
        s.on(c.ENABLE_VM_FUNCTIONS),
    ),
    _rule(
        "eptp-switching-needs-ept",
        f"{c.ENABLE_EPT} is 1",
        s.control_on(c.ENABLE_EPT, because=c.ENABLE_VM_FUNCTIONS),
        _EPTP_SWITCHING,
    ),
    _address("eptp-list-address", f.EPTP_LIST_ADDRESS, _EPTP_SWITCHING),
    _address("vmread-bitmap-address", f.VMREAD_BITMAP_ADDRESS, s.on(c.VMCS_SHADOWING)),
    _address("vmwrite-bitmap-address", f.VMWRITE_BITMAP_ADDRESS, s.on(c.VMCS_SHADOWING)),
    _address(
        "virtualization-exception-address", f.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS, s.on(c.EPT_VIOLATION_VE)
    ),
    _needs("intel-pt-needs-ept", c.INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES, c.ENABLE_EPT),
    _needs("intel-pt-needs-load", c.INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES, c.ENTRY_LOAD_IA32_RTIT_CTL),
    _needs("intel-pt-needs-clear", c.INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES, c.EXIT_CLEAR_IA32_RTIT_CTL),
    _rule(
        "tsc-multiplier-not-zero", "the TSC multiplier is not 0", s.not_zero(f.TSC_MULTIPLIER), s.on(c.USE_TSC_SCALING)
    ),
    _address("low-pasid-directory-address", f.LOW_PASID_DIRECTORY_ADDRESS, s.on(c.PASID_TRANSLATION)),
    _address("high-pasid-directory-address", f.HIGH_PASID_DIRECTORY_ADDRESS, s.on(c.PASID_TRANSLATION)),
    _rule(
        "hlat-pointer-reserved",
        "the reserved bits of the HLAT pointer, those beyond the physical-address width among them, are 0",
        s.bits_clear(f.HLAT_POINTER, lambda context: context.beyond_width | bit_range(11, 5) | 7),
        s.on(c.ENABLE_HLAT),
    ),
    _needs("hlat-needs-ept", c.ENABLE_HLAT, c.ENABLE_EPT),
    _needs("paging-write-needs-ept", c.EPT_PAGING_WRITE_CONTROL, c.ENABLE_EPT),
    _needs("paging-verification-needs-ept", c.GUEST_PAGING_VERIFICATION, c.ENABLE_EPT),
    _address("pid-pointer-table-address", f.PID_POINTER_TABLE_ADDRESS, s.on(c.IPI_VIRTUALIZATION), 8),
    _rule(
        "pid-pointer-table-end",
        "the last entry of the PID-pointer table is within the physical-address width",
        _last_pid_pointer(),
        s.on(c.IPI_VIRTUALIZATION),
    ),
)

_EXIT_RULES: Final[tuple[Rule, ...]] = (
    _allowed("exit-reserved", ControlWord.EXIT, EXIT),
    _allowed("secondary-exit-reserved", ControlWord.SECONDARY_EXIT, EXIT, s.on(c.EXIT_ACTIVATE_SECONDARY_CONTROLS)),
    _needs("save-timer-needs-timer", c.EXIT_SAVE_VMX_PREEMPTION_TIMER_VALUE, c.ACTIVATE_VMX_PREEMPTION_TIMER, EXIT),
    *_msr_area("exit-msr-store", f.VM_EXIT_MSR_STORE_ADDRESS, f.VM_EXIT_MSR_STORE_COUNT, EXIT),
    *_msr_area("exit-msr-load", f.VM_EXIT_MSR_LOAD_ADDRESS, f.VM_EXIT_MSR_LOAD_COUNT, EXIT),
)

# ---- event injection

_INFORMATION = f.VM_ENTRY_INTERRUPTION_INFORMATION
_VALID = 1 << 31
_TYPE = 7 << 8
_DELIVER_ERROR_CODE = 1 << 11
_NESTED_EXCEPTION = 1 << 13

# Double fault, invalid TSS, segment not present, stack fault, general protection, page fault, alignment check.
# Processors with control protection do not insist on vectors any more.
_VECTORS_WITH_ERROR_CODE: Final = frozenset((8, 10, 11, 12, 13, 14, 17))


def _event_types(context: EntryContext) -> Collection[int]:
    types = [0, 2, 3, 4, 5, 6]
    if context.capabilities.allows(c.MONITOR_TRAP_FLAG):
        types.append(7)
    return [number << 8 for number in types]


_UNRESTRICTED = s.on(c.UNRESTRICTED_GUEST)
_unrestricted = s.test_of(_UNRESTRICTED)


def _delivers_error_code(context: EntryContext) -> frozenset[bool]:
    """The settings of "deliver error code" that fit the event and the guest."""
    information = context.vmcs[_INFORMATION]
    if information & _TYPE != layouts.HARDWARE_EXCEPTION << 8:
        return frozenset((False,))
    if _unrestricted(context) and not context.vmcs[f.GUEST_CR0] & 1:
        return frozenset((False,))
    if context.capabilities.any_error_code_setting:
        return frozenset((False, True))
    return frozenset((information & 0xFF in _VECTORS_WITH_ERROR_CODE,))


def _repair_error_code(context: EntryContext) -> None:
    context.vmcs[_INFORMATION] = context.vmcs[_INFORMATION] ^ _DELIVER_ERROR_CODE


def _faulty_error_code(context: EntryContext) -> FaultyBits:
    return ((_INFORMATION, _DELIVER_ERROR_CODE),)


_ERROR_CODE_SETTING = Demand(
    (_INFORMATION, (f.GUEST_CR0, 1), *_UNRESTRICTED.reads),
    lambda context: bool(context.vmcs[_INFORMATION] & _DELIVER_ERROR_CODE) in _delivers_error_code(context),
    _repair_error_code,
    _faulty_error_code,
)

_SOFTWARE_EVENT = s.either(
    s.injecting(layouts.SOFTWARE_INTERRUPT),
    s.injecting(layouts.PRIVILEGED_SOFTWARE_EXCEPTION),
    s.injecting(layouts.SOFTWARE_EXCEPTION),
    *(
        s.bits_equal(_INFORMATION, _VALID | _TYPE | 0xFF, _VALID | _TYPE | vector, f"{name} is injected")
        for vector, name in ((1, "SYSCALL"), (2, "SYSENTER"))
    ),
)


def _other_event_vector() -> Demand:
    fred = 1 << 32
    plain = s.slice_in(_INFORMATION, 0xFF, lambda context: (0, 1, 2) if context.vmcs[f.GUEST_CR4] & fred else (0,))
    return Demand((*plain.reads, (f.GUEST_CR4, fred)), plain.holds, plain.repair, plain.faulty, legal=plain.legal)


def _instruction_lengths(context: EntryContext) -> Collection[int]:
    return range(0 if context.capabilities.injection_with_length_0 else 1, 16)


def _information_reserved(context: EntryContext) -> int:
    reserved = bit_range(30, 12)
    return reserved & ~_NESTED_EXCEPTION if context.capabilities.nested_exceptions else reserved


_NESTED = s.every(
    s.processor_is("nested exceptions are supported", lambda context: context.capabilities.nested_exceptions),
    s.INJECTING,
    s.bit_set(_INFORMATION, _NESTED_EXCEPTION, "it is marked nested"),
)

_INJECTION_RULES: Final[tuple[Rule, ...]] = (
    _rule(
        "injection-type",
        "the interruption type is not reserved, and is other event only where the monitor trap flag is supported",
        s.slice_in(_INFORMATION, _TYPE, _event_types),
        s.INJECTING,
        ENTRY,
    ),
    _rule(
        "injection-nmi-vector",
        "the vector of an NMI is 2",
        s.slice_in(_INFORMATION, 0xFF, (2,)),
        s.injecting(layouts.NON_MASKABLE_INTERRUPT),
        ENTRY,
    ),
    _rule(
        "injection-exception-vector",
        "the vector of a hardware exception is at most 31",
        s.slice_in(_INFORMATION, 0xFF, range(32)),
        s.injecting(layouts.HARDWARE_EXCEPTION),
        ENTRY,
    ),
    _rule(
        "injection-other-vector",
        "the vector of an other event is 0, a pending MTF VM exit; with FRED also 1, SYSCALL, or 2, SYSENTER",
        _other_event_vector(),
        s.injecting(layouts.OTHER_EVENT),
        ENTRY,
    ),
    _rule(
        "injection-error-code-setting",
        "an error code is delivered exactly with the hardware exceptions that have one, and only in protected mode",
        _ERROR_CODE_SETTING,
        s.INJECTING,
        ENTRY,
    ),
    _rule(
        "injection-reserved",
        "the reserved bits of the interruption information are 0",
        s.bits_clear(_INFORMATION, _information_reserved),
        s.INJECTING,
        ENTRY,
    ),
    _rule(
        "injection-nested-exception",
        "only a hardware exception is nested",
        s.slice_in(_INFORMATION, _TYPE, (layouts.HARDWARE_EXCEPTION << 8,)),
        _NESTED,
        ENTRY,
    ),
    _rule(
        "injection-error-code",
        "bits 31:16 of the error code are 0",
        s.bits_clear(f.VM_ENTRY_EXCEPTION_ERROR_CODE, bit_range(31, 16)),
        s.every(s.INJECTING, s.bit_set(_INFORMATION, _DELIVER_ERROR_CODE, "an error code is delivered")),
        ENTRY,
    ),
    _rule(
        "injection-instruction-length",
        "the instruction length is at most 15, and is 0 only where the processor supports that",
        s.slice_in(f.VM_ENTRY_INSTRUCTION_LENGTH, f.VM_ENTRY_INSTRUCTION_LENGTH.mask, _instruction_lengths),
        _SOFTWARE_EVENT,
        ENTRY,
    ),
)

_OUTSIDE_SMM = s.context_is("the processor is not in SMM", lambda context: not context.in_smm)

_ENTRY_RULES: Final[tuple[Rule, ...]] = (
    _allowed("entry-reserved", ControlWord.ENTRY, ENTRY),
    *_INJECTION_RULES,
    *_msr_area("entry-msr-load", f.VM_ENTRY_MSR_LOAD_ADDRESS, f.VM_ENTRY_MSR_LOAD_COUNT, ENTRY),
    _rule("entry-to-smm-outside-smm", f"{c.ENTRY_TO_SMM} is 0", s.control_off(c.ENTRY_TO_SMM), _OUTSIDE_SMM, ENTRY),
    _rule(
        "deactivate-dual-monitor-outside-smm",
        f"{c.ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT} is 0",
        s.control_off(c.ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT),
        _OUTSIDE_SMM,
        ENTRY,
    ),
    _rule(
        "entry-to-smm-excludes-deactivate",
        f"{c.ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT} is 0",
        s.control_off(c.ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT),
        s.on(c.ENTRY_TO_SMM),
        ENTRY,
    ),
    _rule(
        "tracing-excludes-load",
        f"{c.ENTRY_LOAD_IA32_RTIT_CTL} is 0",
        s.control_off(c.ENTRY_LOAD_IA32_RTIT_CTL),
        s.context_is("Intel PT is tracing", lambda context: context.tracing),
        ENTRY,
    ),
)

RULES: Final[tuple[Rule, ...]] = (*_EXECUTION_RULES, *_EXIT_RULES, *_ENTRY_RULES)
