"""Field encodings, typed a second time from the manual's appendix, and what is derived from them."""

import pytest
from vmcs_baseline import FULL, FULL_MSRS, OLD

from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.fields import BY_ENCODING, FIELDS, Type, Width, field_of

# Double entry: constant names in blocks of consecutive encodings, first encoding given.
BLOCKS = {
    0x0000: "VPID POSTED_INTERRUPT_NOTIFICATION_VECTOR EPTP_INDEX HLAT_PREFIX_SIZE LAST_PID_POINTER_INDEX"
    " VIRTUAL_TIMER_VECTOR",
    0x0800: "GUEST_ES_SELECTOR GUEST_CS_SELECTOR GUEST_SS_SELECTOR GUEST_DS_SELECTOR GUEST_FS_SELECTOR"
    " GUEST_GS_SELECTOR GUEST_LDTR_SELECTOR GUEST_TR_SELECTOR GUEST_INTERRUPT_STATUS PML_INDEX GUEST_UINV",
    0x0C00: "HOST_ES_SELECTOR HOST_CS_SELECTOR HOST_SS_SELECTOR HOST_DS_SELECTOR HOST_FS_SELECTOR HOST_GS_SELECTOR"
    " HOST_TR_SELECTOR",
    0x2000: "IO_BITMAP_A_ADDRESS IO_BITMAP_B_ADDRESS MSR_BITMAP_ADDRESS VM_EXIT_MSR_STORE_ADDRESS"
    " VM_EXIT_MSR_LOAD_ADDRESS VM_ENTRY_MSR_LOAD_ADDRESS EXECUTIVE_VMCS_POINTER PML_ADDRESS TSC_OFFSET"
    " VIRTUAL_APIC_ADDRESS APIC_ACCESS_ADDRESS POSTED_INTERRUPT_DESCRIPTOR_ADDRESS VM_FUNCTION_CONTROLS EPT_POINTER"
    " EOI_EXIT_BITMAP_0 EOI_EXIT_BITMAP_1 EOI_EXIT_BITMAP_2 EOI_EXIT_BITMAP_3 EPTP_LIST_ADDRESS VMREAD_BITMAP_ADDRESS"
    " VMWRITE_BITMAP_ADDRESS VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS XSS_EXITING_BITMAP ENCLS_EXITING_BITMAP"
    " SUB_PAGE_PERMISSION_TABLE_POINTER TSC_MULTIPLIER TERTIARY_PROCESSOR_BASED_CONTROLS ENCLV_EXITING_BITMAP"
    " LOW_PASID_DIRECTORY_ADDRESS HIGH_PASID_DIRECTORY_ADDRESS",
    0x203E: "PCONFIG_EXITING_BITMAP HLAT_POINTER PID_POINTER_TABLE_ADDRESS SECONDARY_VM_EXIT_CONTROLS",
    0x204A: "IA32_SPEC_CTRL_MASK IA32_SPEC_CTRL_SHADOW GUEST_DEADLINE_SHADOW",
    0x2052: "INJECTED_EVENT_DATA",
    0x2400: "GUEST_PHYSICAL_ADDRESS MSR_DATA ORIGINAL_EVENT_DATA",
    0x2800: "VMCS_LINK_POINTER GUEST_IA32_DEBUGCTL GUEST_IA32_PAT GUEST_IA32_EFER GUEST_IA32_PERF_GLOBAL_CTRL"
    " GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3 GUEST_IA32_BNDCFGS GUEST_IA32_RTIT_CTL GUEST_IA32_LBR_CTL"
    " GUEST_IA32_PKRS GUEST_IA32_FRED_CONFIG GUEST_IA32_FRED_RSP1 GUEST_IA32_FRED_RSP2 GUEST_IA32_FRED_RSP3"
    " GUEST_IA32_FRED_STKLVLS GUEST_IA32_FRED_SSP1 GUEST_IA32_FRED_SSP2 GUEST_IA32_FRED_SSP3",
    0x282E: "GUEST_IA32_SPEC_CTRL GUEST_DEADLINE",
    0x2C00: "HOST_IA32_PAT HOST_IA32_EFER HOST_IA32_PERF_GLOBAL_CTRL HOST_IA32_PKRS HOST_IA32_FRED_CONFIG"
    " HOST_IA32_FRED_RSP1 HOST_IA32_FRED_RSP2 HOST_IA32_FRED_RSP3 HOST_IA32_FRED_STKLVLS HOST_IA32_FRED_SSP1"
    " HOST_IA32_FRED_SSP2 HOST_IA32_FRED_SSP3",
    0x2C1A: "HOST_IA32_SPEC_CTRL",
    0x4000: "PIN_BASED_CONTROLS PRIMARY_PROCESSOR_BASED_CONTROLS EXCEPTION_BITMAP PAGE_FAULT_ERROR_CODE_MASK"
    " PAGE_FAULT_ERROR_CODE_MATCH CR3_TARGET_COUNT VM_EXIT_CONTROLS VM_EXIT_MSR_STORE_COUNT VM_EXIT_MSR_LOAD_COUNT"
    " VM_ENTRY_CONTROLS VM_ENTRY_MSR_LOAD_COUNT VM_ENTRY_INTERRUPTION_INFORMATION VM_ENTRY_EXCEPTION_ERROR_CODE"
    " VM_ENTRY_INSTRUCTION_LENGTH TPR_THRESHOLD SECONDARY_PROCESSOR_BASED_CONTROLS PLE_GAP PLE_WINDOW"
    " INSTRUCTION_TIMEOUT_CONTROL",
    0x4400: "VM_INSTRUCTION_ERROR EXIT_REASON VM_EXIT_INTERRUPTION_INFORMATION VM_EXIT_INTERRUPTION_ERROR_CODE"
    " IDT_VECTORING_INFORMATION IDT_VECTORING_ERROR_CODE VM_EXIT_INSTRUCTION_LENGTH VM_EXIT_INSTRUCTION_INFORMATION",
    0x4800: "GUEST_ES_LIMIT GUEST_CS_LIMIT GUEST_SS_LIMIT GUEST_DS_LIMIT GUEST_FS_LIMIT GUEST_GS_LIMIT"
    " GUEST_LDTR_LIMIT GUEST_TR_LIMIT GUEST_GDTR_LIMIT GUEST_IDTR_LIMIT GUEST_ES_ACCESS_RIGHTS"
    " GUEST_CS_ACCESS_RIGHTS GUEST_SS_ACCESS_RIGHTS GUEST_DS_ACCESS_RIGHTS GUEST_FS_ACCESS_RIGHTS"
    " GUEST_GS_ACCESS_RIGHTS GUEST_LDTR_ACCESS_RIGHTS GUEST_TR_ACCESS_RIGHTS GUEST_INTERRUPTIBILITY_STATE"
    " GUEST_ACTIVITY_STATE GUEST_SMBASE GUEST_IA32_SYSENTER_CS",
    0x482E: "VMX_PREEMPTION_TIMER_VALUE",
    0x4C00: "HOST_IA32_SYSENTER_CS",
    0x6000: "CR0_GUEST_HOST_MASK CR4_GUEST_HOST_MASK CR0_READ_SHADOW CR4_READ_SHADOW CR3_TARGET_VALUE_0"
    " CR3_TARGET_VALUE_1 CR3_TARGET_VALUE_2 CR3_TARGET_VALUE_3",
    0x6400: "EXIT_QUALIFICATION IO_RCX IO_RSI IO_RDI IO_RIP GUEST_LINEAR_ADDRESS",
    0x6800: "GUEST_CR0 GUEST_CR3 GUEST_CR4 GUEST_ES_BASE GUEST_CS_BASE GUEST_SS_BASE GUEST_DS_BASE GUEST_FS_BASE"
    " GUEST_GS_BASE GUEST_LDTR_BASE GUEST_TR_BASE GUEST_GDTR_BASE GUEST_IDTR_BASE GUEST_DR7 GUEST_RSP GUEST_RIP"
    " GUEST_RFLAGS GUEST_PENDING_DEBUG_EXCEPTIONS GUEST_IA32_SYSENTER_ESP GUEST_IA32_SYSENTER_EIP GUEST_IA32_S_CET"
    " GUEST_SSP GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR",
    0x6C00: "HOST_CR0 HOST_CR3 HOST_CR4 HOST_FS_BASE HOST_GS_BASE HOST_TR_BASE HOST_GDTR_BASE HOST_IDTR_BASE"
    " HOST_IA32_SYSENTER_ESP HOST_IA32_SYSENTER_EIP HOST_RSP HOST_RIP HOST_IA32_S_CET HOST_SSP"
    " HOST_IA32_INTERRUPT_SSP_TABLE_ADDR",
}

SECOND_TABLE = {name: start + 2 * i for start, names in BLOCKS.items() for i, name in enumerate(names.split())}
CONSTANTS = {name: value for name, value in vars(f).items() if isinstance(value, f.Field)}


def test_encodings__agree_with_the_second_table() -> None:
    assert {name: field.encoding for name, field in CONSTANTS.items()} == SECOND_TABLE


def test_fields__each_constant_once_in_manual_order() -> None:
    encodings = [field.encoding for field in FIELDS]
    assert encodings == sorted(SECOND_TABLE.values())
    assert set(FIELDS) == set(CONSTANTS.values())
    assert len(BY_ENCODING) == len(FIELDS)


def test_fields__names_are_unique() -> None:
    assert len({field.name for field in FIELDS}) == len(FIELDS)


@pytest.mark.parametrize(
    ("field", "width", "bits", "kind", "index"),
    [
        (f.VPID, Width.BITS_16, 16, Type.CONTROL, 0),
        (f.GUEST_TR_SELECTOR, Width.BITS_16, 16, Type.GUEST_STATE, 7),
        (f.EPT_POINTER, Width.BITS_64, 64, Type.CONTROL, 13),
        (f.GUEST_PHYSICAL_ADDRESS, Width.BITS_64, 64, Type.READ_ONLY_DATA, 0),
        (f.EXIT_REASON, Width.BITS_32, 32, Type.READ_ONLY_DATA, 1),
        (f.VMX_PREEMPTION_TIMER_VALUE, Width.BITS_32, 32, Type.GUEST_STATE, 23),
        (f.HOST_RIP, Width.NATURAL, 64, Type.HOST_STATE, 11),
    ],
)
def test_field__derives_width_type_and_index(field: f.Field, width: Width, bits: int, kind: Type, index: int) -> None:
    assert (field.width, field.bits, field.type, field.index) == (width, bits, kind, index)
    assert field.mask == (1 << bits) - 1
    assert field.read_only == (kind is Type.READ_ONLY_DATA)


def test_encodings__keep_reserved_bits_clear() -> None:
    for field in FIELDS:
        assert not field.encoding & f.RESERVED_ENCODING
        assert not field.encoding & f.HIGH_ACCESS


@pytest.mark.parametrize(
    ("encoding", "field"),
    [
        (0x2000, f.IO_BITMAP_A_ADDRESS),
        (0x2001, f.IO_BITMAP_A_ADDRESS),
        (0x0001, None),  # 16-bit fields have no high half
        (0x4001, None),
        (0x681F, None),  # nor have natural-width fields
        (0x203C, None),
        (0x1_0000_2000, None),
        (0xFFFF_FFFF_FFFF_FFFF, None),
    ],
)
def test_field_of__understands_high_accesses(encoding: int, field: f.Field | None) -> None:
    assert field_of(encoding) is field


def test_existence__old_processor_lacks_what_came_later() -> None:
    present = {field.encoding for field in FIELDS if OLD.has(field)}
    for field in (f.VPID, f.EPT_POINTER, f.GUEST_PDPTE0, f.SECONDARY_PROCESSOR_BASED_CONTROLS, f.GUEST_IA32_EFER):
        assert field.encoding not in present
    for field in (f.GUEST_RIP, f.IO_BITMAP_A_ADDRESS, f.VIRTUAL_APIC_ADDRESS, f.CR3_TARGET_VALUE_3, f.HOST_CR3):
        assert field.encoding in present


def test_existence__full_processor_has_every_field() -> None:
    assert all(FULL.has(field) for field in FIELDS)


@pytest.mark.parametrize(
    ("msr", "value", "field"),
    [
        (0x481, 0x7F_0000_0016, f.POSTED_INTERRUPT_NOTIFICATION_VECTOR),
        (0x482, 0x7FFF_FFFE_0401_E172, f.SECONDARY_PROCESSOR_BASED_CONTROLS),
        (0x48B, 0xFFFF_FFDF_0000_0000, f.VPID),
        (0x48B, 0xFFFF_FFFD_0000_0000, f.GUEST_PDPTE3),
        (0x48B, 0xFFFF_BFFF_0000_0000, f.VMREAD_BITMAP_ADDRESS),
        (0x48B, 0xFDFF_FFFF_0000_0000, f.TSC_MULTIPLIER),
        (0x491, 0, f.EPTP_LIST_ADDRESS),
        (0x485, 3 << 16, f.CR3_TARGET_VALUE_3),
        (0x492, 0x1DD, f.HLAT_POINTER),
        (0x493, 0xD, f.HOST_IA32_FRED_CONFIG),
    ],
)
def test_existence__follows_the_capability(msr: int, value: int, field: f.Field) -> None:
    # The true MSRs are dropped so that 481H and 482H count.
    msrs = {**FULL_MSRS, 0x480: FULL_MSRS[0x480] & ~(1 << 55), msr: value}
    capabilities = Capabilities(msrs)
    assert not capabilities.has(field)
    assert field.encoding not in capabilities.fields
    assert Capabilities({**msrs, msr: FULL_MSRS[msr]}).has(field)


def test_highest_index__is_what_vmcs_enum_reports() -> None:
    assert FULL.highest_index == (0x2052 >> 1) & 0x1FF
    assert OLD.highest_index == (0x482A >> 1) & 0x1FF  # the SYSENTER_CS of the guest


def test_condition__reads_as_a_sentence() -> None:
    assert str(f.GUEST_RIP.exists) == "all processors"
    assert str(f.VPID.exists) == 'processors that allow the 1-setting of "enable VPID"'
    assert str(f.CR3_TARGET_VALUE_2.exists) == "processors that support at least 3 CR3-target values"
    assert str(f.EPTP_LIST_ADDRESS.exists) == "processors that support VM function 0"
    assert str(f.GUEST_IA32_PAT.exists) == ('processors that allow the 1-setting of "load IA32_PAT" or "save IA32_PAT"')
