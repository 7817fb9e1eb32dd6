"""For every rule: a VMCS it accepts while it applies, and VMCSs that break this rule and no other.

A case is a set of changes to the baseline. Keys are fields (the value they get), controls (on or off, activating their
word) and names of context attributes; "memory" maps physical addresses to 8-byte values.
"""

from collections.abc import Mapping
from typing import Any

from attrs import frozen
from vmcs_baseline import FULL, FULL_MSRS, Memory, context_of, long_mode_guest

from vmcs import controls as c
from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.controls import GATES, Control
from vmcs.fields import CONTROL_FIELDS, Field
from vmcs.rules import EntryContext

Changes = Mapping[Any, Any]


@frozen
class Case:
    """One rule under ``setup``: it accepts ``ok``; each of ``bad`` breaks it, and no other rule of its stage."""

    id: str
    setup: Changes
    ok: Changes
    bad: tuple[Changes, ...]
    capabilities: Capabilities = FULL


def build(*changes: Changes, capabilities: Capabilities = FULL) -> EntryContext:
    """The baseline with these changes, later ones winning."""
    vmcs = long_mode_guest(capabilities)
    memory = Memory()
    attributes: dict[str, Any] = {}
    for change in changes:
        for key, value in change.items():
            if isinstance(key, Field):
                vmcs[key] = value
            elif isinstance(key, Control):
                word = CONTROL_FIELDS[key.word]
                vmcs[word] = vmcs[word] | key.mask if value else vmcs[word] & ~key.mask
                if value and key.word in GATES:
                    gate = GATES[key.word]
                    vmcs[CONTROL_FIELDS[gate.word]] = vmcs[CONTROL_FIELDS[gate.word]] | gate.mask
            elif key == "memory":
                for address, number in value.items():
                    memory.put(address, number, 8)
            else:
                attributes[key] = value
    return context_of(vmcs, read_physical=memory.read, **attributes)


def with_msrs(msrs: Mapping[int, int]) -> Capabilities:
    """The full processor with some capability MSRs replaced."""
    return Capabilities({**FULL_MSRS, **msrs})


NON_CANONICAL = 0x0000_8000_0000_0000
TOO_WIDE = 1 << 46

# ---- situations

LEGACY_GUEST: Changes = {  # 32-bit, paging without PAE
    c.ENTRY_IA32E_MODE_GUEST: False,
    f.GUEST_CR4: 0x2000,
    f.GUEST_IA32_EFER: 0,
    f.GUEST_CS_ACCESS_RIGHTS: 0xC09B,
}
PAE_GUEST: Changes = {**LEGACY_GUEST, f.GUEST_CR4: 0x2020}
RESTRICTED: Changes = {c.UNRESTRICTED_GUEST: False}
REAL_MODE: Changes = {
    **LEGACY_GUEST,
    f.GUEST_CR0: 0x30,
    f.GUEST_CS_ACCESS_RIGHTS: 0x93,
    f.GUEST_CS_LIMIT: 0xFFFF,
    f.GUEST_SS_ACCESS_RIGHTS: 0x93,
    f.GUEST_SS_LIMIT: 0xFFFF,
}
SIX = ("CS", "SS", "DS", "ES", "FS", "GS")
VIRTUAL_8086: Changes = {
    **LEGACY_GUEST,
    f.GUEST_RFLAGS: 0x2_0202,
    **{
        getattr(f, f"GUEST_{name}_{part}"): value
        for name in SIX
        for part, value in (("SELECTOR", 0x1000), ("BASE", 0x1_0000), ("LIMIT", 0xFFFF), ("ACCESS_RIGHTS", 0xF3))
    },
}
HOST_32: Changes = {
    **LEGACY_GUEST,
    "host_long_mode": False,
    c.EXIT_HOST_ADDRESS_SPACE_SIZE: False,
    f.HOST_RIP: 0x10_0000,
    f.HOST_CR4: 0x2000,
}
IN_SMM: Changes = {"in_smm": True}
NO_EPT: Changes = {c.UNRESTRICTED_GUEST: False, c.ENABLE_EPT: False}
TPR_SHADOW: Changes = {c.USE_TPR_SHADOW: True, f.VIRTUAL_APIC_ADDRESS: 0x7000}
VIRTUAL_INTERRUPTS: Changes = {**TPR_SHADOW, c.VIRTUAL_INTERRUPT_DELIVERY: True, c.EXTERNAL_INTERRUPT_EXITING: True}
POSTED: Changes = {
    **VIRTUAL_INTERRUPTS,
    c.PROCESS_POSTED_INTERRUPTS: True,
    c.EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT: True,
    f.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: 0x8040,
}
HLT: Changes = {f.GUEST_ACTIVITY_STATE: 1}
LINKED: Changes = {f.VMCS_LINK_POINTER: 0x9000, "memory": {0x9000: 0x1234}}
INTERRUPT = {f.VM_ENTRY_INTERRUPTION_INFORMATION: 0x8000_0030}
NMI = {f.VM_ENTRY_INTERRUPTION_INFORMATION: 0x8000_0202}
GENERAL_PROTECTION = {f.VM_ENTRY_INTERRUPTION_INFORMATION: 0x8000_0B0D}
DEBUG_EXCEPTION = {f.VM_ENTRY_INTERRUPTION_INFORMATION: 0x8000_0301}
SOFTWARE_INTERRUPT = {f.VM_ENTRY_INTERRUPTION_INFORMATION: 0x8000_0480, f.VM_ENTRY_INSTRUCTION_LENGTH: 2}
PENDING_MTF = {f.VM_ENTRY_INTERRUPTION_INFORMATION: 0x8000_0700}


def event(information: int) -> Changes:
    return {f.VM_ENTRY_INTERRUPTION_INFORMATION: information}


def case(rule_id: str, setup: Changes, ok: Changes, *bad: Changes, capabilities: Capabilities = FULL) -> Case:
    assert bad, rule_id
    return Case(rule_id, setup, ok, bad, capabilities)


def address(name: str, setup: Changes, field: Field, alignment: int = 4096) -> Case:
    """An address, tried at its alignment, just off it, and beyond the 46 bits of the processor."""
    return case(
        f"controls.{name}",
        setup,
        {field: 0x3F_FFFF_F000},
        {field: 0x1000 | alignment >> 1},
        {field: 0x1001},
        {field: TOO_WIDE},
        {field: 1 << 63},
    )


def needs(rule_id: str, control: Control, needed: Control, setup: Changes) -> Case:
    return case(f"controls.{rule_id}", {**setup, control: True}, {needed: True}, {needed: False})


CONTROL_CASES: tuple[Case, ...] = (
    case(
        "controls.pin-based-reserved",
        {},
        {f.PIN_BASED_CONTROLS: 0x5F},
        {f.PIN_BASED_CONTROLS: 0x14},
        {f.PIN_BASED_CONTROLS: 0x116},
    ),
    case(
        "controls.primary-reserved",
        {},
        {f.PRIMARY_PROCESSOR_BASED_CONTROLS: 0x8401_E1F2},
        {f.PRIMARY_PROCESSOR_BASED_CONTROLS: 0x8400_6173},
        {f.PRIMARY_PROCESSOR_BASED_CONTROLS: 0x8400_6170},
    ),
    case(
        "controls.secondary-reserved",
        {},
        {f.SECONDARY_PROCESSOR_BASED_CONTROLS: 0xA2},
        {f.SECONDARY_PROCESSOR_BASED_CONTROLS: 0x4A2},
        {f.SECONDARY_PROCESSOR_BASED_CONTROLS: 0x8000_00A2},
        capabilities=with_msrs({0x48B: 0xFF_0000_0000}),
    ),
    case(
        "controls.tertiary-reserved",
        {c.ACTIVATE_TERTIARY_CONTROLS: True},
        {f.TERTIARY_PROCESSOR_BASED_CONTROLS: 0xC1},
        {f.TERTIARY_PROCESSOR_BASED_CONTROLS: 0x20},
        {f.TERTIARY_PROCESSOR_BASED_CONTROLS: 1 << 63},
    ),
    case(
        "controls.cr3-target-count", {}, {f.CR3_TARGET_COUNT: 4}, {f.CR3_TARGET_COUNT: 5}, {f.CR3_TARGET_COUNT: 1 << 31}
    ),
    address("io-bitmap-a-address", {c.USE_IO_BITMAPS: True}, f.IO_BITMAP_A_ADDRESS),
    address("io-bitmap-b-address", {c.USE_IO_BITMAPS: True}, f.IO_BITMAP_B_ADDRESS),
    address("msr-bitmap-address", {c.USE_MSR_BITMAPS: True}, f.MSR_BITMAP_ADDRESS),
    address("virtual-apic-address", TPR_SHADOW, f.VIRTUAL_APIC_ADDRESS),
    case(
        "controls.tpr-threshold-reserved",
        {**TPR_SHADOW, c.VIRTUALIZE_APIC_ACCESSES: True},
        {f.TPR_THRESHOLD: 0xF},
        {f.TPR_THRESHOLD: 0x10},
        {f.TPR_THRESHOLD: 1 << 31},
    ),
    case(
        "controls.tpr-threshold-above-vtpr",
        {**TPR_SHADOW, "memory": {0x7080: 0x5F}},
        {f.TPR_THRESHOLD: 5},
        {f.TPR_THRESHOLD: 6},
        {f.TPR_THRESHOLD: 15},
    ),
    needs("x2apic-mode-needs-tpr-shadow", c.VIRTUALIZE_X2APIC_MODE, c.USE_TPR_SHADOW, {}),
    needs("apic-register-virtualization-needs-tpr-shadow", c.APIC_REGISTER_VIRTUALIZATION, c.USE_TPR_SHADOW, {}),
    needs(
        "virtual-interrupt-delivery-needs-tpr-shadow",
        c.VIRTUAL_INTERRUPT_DELIVERY,
        c.USE_TPR_SHADOW,
        {c.EXTERNAL_INTERRUPT_EXITING: True},
    ),
    needs("ipi-virtualization-needs-tpr-shadow", c.IPI_VIRTUALIZATION, c.USE_TPR_SHADOW, {}),
    needs("virtual-nmis-need-nmi-exiting", c.VIRTUAL_NMIS, c.NMI_EXITING, {}),
    needs("nmi-window-needs-virtual-nmis", c.NMI_WINDOW_EXITING, c.VIRTUAL_NMIS, {c.NMI_EXITING: True}),
    address("apic-access-address", {c.VIRTUALIZE_APIC_ACCESSES: True}, f.APIC_ACCESS_ADDRESS),
    case(
        "controls.x2apic-mode-excludes-apic-accesses",
        {**TPR_SHADOW, c.VIRTUALIZE_X2APIC_MODE: True},
        {c.VIRTUALIZE_APIC_ACCESSES: False},
        {c.VIRTUALIZE_APIC_ACCESSES: True},
    ),
    needs(
        "virtual-interrupt-delivery-needs-external-interrupt-exiting",
        c.VIRTUAL_INTERRUPT_DELIVERY,
        c.EXTERNAL_INTERRUPT_EXITING,
        TPR_SHADOW,
    ),
    needs(
        "posted-interrupts-need-virtual-interrupt-delivery",
        c.PROCESS_POSTED_INTERRUPTS,
        c.VIRTUAL_INTERRUPT_DELIVERY,
        POSTED,
    ),
    needs(
        "posted-interrupts-need-acknowledge", c.PROCESS_POSTED_INTERRUPTS, c.EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT, POSTED
    ),
    case(
        "controls.posted-interrupt-vector",
        POSTED,
        {f.POSTED_INTERRUPT_NOTIFICATION_VECTOR: 0xFF},
        {f.POSTED_INTERRUPT_NOTIFICATION_VECTOR: 0x100},
        {f.POSTED_INTERRUPT_NOTIFICATION_VECTOR: 0x80FF},
    ),
    address("posted-interrupt-descriptor-address", POSTED, f.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, 64),
    case("controls.vpid-not-zero", {}, {f.VPID: 0xFFFF}, {f.VPID: 0}),
    case(
        "controls.eptp-memory-type",
        {},
        {f.EPT_POINTER: 0x18},
        *({f.EPT_POINTER: 0x18 | kind} for kind in (1, 2, 3, 4, 5, 7)),
    ),
    case(
        "controls.eptp-walk-length",
        {},
        {f.EPT_POINTER: 0x26},
        *({f.EPT_POINTER: 6 | n << 3} for n in (0, 1, 2, 5, 6, 7)),
    ),
    case(
        "controls.eptp-accessed-dirty",
        {},
        {f.EPT_POINTER: 0x10_001E},
        {f.EPT_POINTER: 0x10_005E},
        capabilities=with_msrs({0x48C: 0x0F01_0713_4141}),
    ),
    case(
        "controls.eptp-reserved",
        {},
        {f.EPT_POINTER: 0x3F_FFFF_F0DE},
        *({f.EPT_POINTER: 0x1E | 1 << bit} for bit in (8, 9, 10, 11, 46, 51, 63)),
    ),
    needs("pml-needs-ept", c.ENABLE_PML, c.ENABLE_EPT, RESTRICTED),
    address("pml-address", {c.ENABLE_PML: True}, f.PML_ADDRESS),
    needs("unrestricted-guest-needs-ept", c.UNRESTRICTED_GUEST, c.ENABLE_EPT, {}),
    needs("mode-based-execute-needs-ept", c.MODE_BASED_EXECUTE_CONTROL_FOR_EPT, c.ENABLE_EPT, RESTRICTED),
    needs("sub-page-permissions-need-ept", c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT, c.ENABLE_EPT, RESTRICTED),
    address(
        "sub-page-permission-table-pointer",
        {c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT: True},
        f.SUB_PAGE_PERMISSION_TABLE_POINTER,
    ),
    case(
        "controls.vm-function-controls-reserved",
        {c.ENABLE_VM_FUNCTIONS: True},
        {f.VM_FUNCTION_CONTROLS: 1},
        {f.VM_FUNCTION_CONTROLS: 2},
        {f.VM_FUNCTION_CONTROLS: 1 << 63},
    ),
    case(
        "controls.eptp-switching-needs-ept",
        {**RESTRICTED, c.ENABLE_VM_FUNCTIONS: True, f.VM_FUNCTION_CONTROLS: 1},
        {c.ENABLE_EPT: True},
        {c.ENABLE_EPT: False},
    ),
    address("eptp-list-address", {c.ENABLE_VM_FUNCTIONS: True, f.VM_FUNCTION_CONTROLS: 1}, f.EPTP_LIST_ADDRESS),
    address("vmread-bitmap-address", {c.VMCS_SHADOWING: True}, f.VMREAD_BITMAP_ADDRESS),
    address("vmwrite-bitmap-address", {c.VMCS_SHADOWING: True}, f.VMWRITE_BITMAP_ADDRESS),
    address(
        "virtualization-exception-address", {c.EPT_VIOLATION_VE: True}, f.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS
    ),
    case(
        "controls.tsc-multiplier-not-zero",
        {c.USE_TSC_SCALING: True},
        {f.TSC_MULTIPLIER: 1 << 63},
        {f.TSC_MULTIPLIER: 0},
    ),
    address("low-pasid-directory-address", {c.PASID_TRANSLATION: True}, f.LOW_PASID_DIRECTORY_ADDRESS),
    address("high-pasid-directory-address", {c.PASID_TRANSLATION: True}, f.HIGH_PASID_DIRECTORY_ADDRESS),
    case(
        "controls.hlat-pointer-reserved",
        {c.ENABLE_HLAT: True},
        {f.HLAT_POINTER: 0x3F_FFFF_F018},
        *({f.HLAT_POINTER: 1 << bit} for bit in (0, 1, 2, 5, 11, 46, 63)),
    ),
    needs("hlat-needs-ept", c.ENABLE_HLAT, c.ENABLE_EPT, RESTRICTED),
    needs("paging-write-needs-ept", c.EPT_PAGING_WRITE_CONTROL, c.ENABLE_EPT, RESTRICTED),
    needs("paging-verification-needs-ept", c.GUEST_PAGING_VERIFICATION, c.ENABLE_EPT, RESTRICTED),
    case(
        "controls.pid-pointer-table-address",
        {**TPR_SHADOW, c.IPI_VIRTUALIZATION: True},
        {f.PID_POINTER_TABLE_ADDRESS: 0x3F_FFFF_FFF8},
        *({f.PID_POINTER_TABLE_ADDRESS: 0x1000 | 1 << bit} for bit in range(3)),
    ),
    case(
        "controls.pid-pointer-table-end",
        {**TPR_SHADOW, c.IPI_VIRTUALIZATION: True, f.PID_POINTER_TABLE_ADDRESS: 0x3FFF_FFFF_FFF0},
        {f.LAST_PID_POINTER_INDEX: 1},
        {f.LAST_PID_POINTER_INDEX: 2},
        {f.LAST_PID_POINTER_INDEX: 0xFFFF},
    ),
    *(
        needs(
            f"intel-pt-needs-{name}",
            c.INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES,
            control,
            {**RESTRICTED, c.ENTRY_LOAD_IA32_RTIT_CTL: True, c.EXIT_CLEAR_IA32_RTIT_CTL: True},
        )
        for name, control in (
            ("ept", c.ENABLE_EPT),
            ("load", c.ENTRY_LOAD_IA32_RTIT_CTL),
            ("clear", c.EXIT_CLEAR_IA32_RTIT_CTL),
        )
    ),
    case(
        "controls.exit-reserved",
        {},
        {f.VM_EXIT_CONTROLS: 0x3_6FFF},
        {f.VM_EXIT_CONTROLS: 0x3_6FFA},
        {f.VM_EXIT_CONTROLS: 0x3_4FFB},
    ),
    case(
        "controls.secondary-exit-reserved",
        {c.EXIT_ACTIVATE_SECONDARY_CONTROLS: True},
        {f.SECONDARY_VM_EXIT_CONTROLS: 0x9},
        {f.SECONDARY_VM_EXIT_CONTROLS: 0x10},
        {f.SECONDARY_VM_EXIT_CONTROLS: 1 << 63},
    ),
    needs("save-timer-needs-timer", c.EXIT_SAVE_VMX_PREEMPTION_TIMER_VALUE, c.ACTIVATE_VMX_PREEMPTION_TIMER, {}),
    *(
        each
        for name, area, count in (
            ("exit-msr-store", f.VM_EXIT_MSR_STORE_ADDRESS, f.VM_EXIT_MSR_STORE_COUNT),
            ("exit-msr-load", f.VM_EXIT_MSR_LOAD_ADDRESS, f.VM_EXIT_MSR_LOAD_COUNT),
            ("entry-msr-load", f.VM_ENTRY_MSR_LOAD_ADDRESS, f.VM_ENTRY_MSR_LOAD_COUNT),
        )
        for each in (
            case(
                f"controls.{name}-address",
                {count: 2},
                {area: 0x1_0010},
                *({area: 0x1_0000 | 1 << bit} for bit in range(4)),
            ),
            case(
                f"controls.{name}-end",
                {area: 0x3FFF_FFFF_FFE0},
                {count: 2},
                {count: 3},
                {count: 0xFFFF_FFFF},
            ),
        )
    ),
    case(
        "controls.entry-reserved",
        {},
        {f.VM_ENTRY_CONTROLS: 0x13FF},
        {f.VM_ENTRY_CONTROLS: 0x13FA},
        {f.VM_ENTRY_CONTROLS: 0x3FB | 1 << 12 | 1 << 31},
    ),
    case("controls.injection-type", {}, INTERRUPT, event(0x8000_0130)),
    case("controls.injection-nmi-vector", {}, NMI, event(0x8000_0203), event(0x8000_0200)),
    case("controls.injection-exception-vector", {}, event(0x8000_031F), event(0x8000_0320), event(0x8000_03FF)),
    case(
        "controls.injection-other-vector",
        {f.VM_ENTRY_INSTRUCTION_LENGTH: 2},
        {**event(0x8000_0702), f.GUEST_CR4: 0x1_0000_2020},
        event(0x8000_0701),
        event(0x8000_07FF),
        {**event(0x8000_0703), f.GUEST_CR4: 0x1_0000_2020},
    ),
    case(
        "controls.injection-error-code-setting",
        {},
        GENERAL_PROTECTION,
        *(event(0x8000_0300 | vector) for vector in (8, 10, 11, 12, 13, 14, 17)),  # without their error codes
        *(event(0x8000_0B00 | vector) for vector in (0, 1, 3, 4, 5, 7, 9, 15, 16, 18, 19, 20)),  # with one
        event(0x8000_0B06),  # invalid opcode with one
        event(0x8000_0830),  # external interrupt with one
        event(0x8000_0A02),  # NMI with one
        event(0x8000_0B15),  # control protection counts as a vector without one
        {**REAL_MODE, **GENERAL_PROTECTION},  # no error codes in real-address mode
    ),
    case("controls.injection-reserved", INTERRUPT, {}, *(event(0x8000_0030 | 1 << bit) for bit in (12, 13, 20, 30))),
    case(
        "controls.injection-error-code",
        GENERAL_PROTECTION,
        {f.VM_ENTRY_EXCEPTION_ERROR_CODE: 0xFFFF},
        {f.VM_ENTRY_EXCEPTION_ERROR_CODE: 0x1_0000},
        {f.VM_ENTRY_EXCEPTION_ERROR_CODE: 1 << 31},
    ),
    case(
        "controls.injection-instruction-length",
        SOFTWARE_INTERRUPT,
        {f.VM_ENTRY_INSTRUCTION_LENGTH: 15},
        {f.VM_ENTRY_INSTRUCTION_LENGTH: 16},
        {f.VM_ENTRY_INSTRUCTION_LENGTH: 0xFFFF_FFFF},
        {**event(0x8000_0501), f.VM_ENTRY_INSTRUCTION_LENGTH: 16},
        {**event(0x8000_0603), f.VM_ENTRY_INSTRUCTION_LENGTH: 16},
        {**event(0x8000_0701), f.VM_ENTRY_INSTRUCTION_LENGTH: 16, f.GUEST_CR4: 0x1_0000_2020},
    ),
    case(
        "controls.injection-nested-exception",
        {},
        event(0x8000_2306),
        event(0x8000_2202),
        event(0x8000_2030),
        capabilities=with_msrs({0x480: FULL_MSRS[0x480] | 1 << 58}),
    ),
    case("controls.entry-to-smm-outside-smm", {}, {c.ENTRY_TO_SMM: False}, {c.ENTRY_TO_SMM: True}),
    case("controls.deactivate-dual-monitor-outside-smm", {}, {}, {c.ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT: True}),
    case(
        "controls.entry-to-smm-excludes-deactivate",
        {**IN_SMM, c.ENTRY_TO_SMM: True, f.GUEST_INTERRUPTIBILITY_STATE: 4},
        {},
        {c.ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT: True},
    ),
    case(
        "controls.tracing-excludes-load",
        {"tracing": True},
        {},
        {c.ENTRY_LOAD_IA32_RTIT_CTL: True},
    ),
)
