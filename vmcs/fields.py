"""Every field of the VMCS: its encoding, the processors that have it, its layout, and where the manual defines it.

Width, type and index are not typed twice: they are bits of the encoding. Fields stand in the order of the manual's
appendix, which is also the order of their encodings.

Spec: SDM Vol. 3, "Field Encoding in VMCS"; "Virtual Machine Control Structures", "VMREAD, VMWRITE, and Encodings of
VMCS Fields".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from attrs import field, frozen

from vmcs import controls as c
from vmcs import layouts
from vmcs.bits import Layout, mask
from vmcs.controls import Control, ControlWord
from vmcs.refs import Reference, sdm

HIGH_ACCESS: Final = 1  # bit 0 of an encoding: access to bits 63:32 of a 64-bit field
RESERVED_ENCODING: Final = ~0x6FFF  # bits 12 and 31:15 must be zero; an encoding with any of them names no field


class Width(enum.IntEnum):
    """Width of a field, bits 14:13 of the encoding."""

    BITS_16 = 0
    BITS_64 = 1
    BITS_32 = 2
    NATURAL = 3


class Type(enum.IntEnum):
    """Type of a field, bits 11:10 of the encoding."""

    CONTROL = 0
    READ_ONLY_DATA = 1
    GUEST_STATE = 2
    HOST_STATE = 3


# Natural width is 64 bits: every modelled processor supports Intel 64 architecture.
_BITS: Final[Mapping[Width, int]] = {Width.BITS_16: 16, Width.BITS_64: 64, Width.BITS_32: 32, Width.NATURAL: 64}


@frozen
class Condition:
    """When a processor has a field: it allows the 1-setting of any of these controls, or supports that much.

    ``vm_function`` is a VM-function number, ``cr3_targets`` the least number of CR3-target values. An empty condition
    holds on every processor.
    """

    any_of: tuple[Control, ...] = ()
    vm_function: int | None = None
    cr3_targets: int = 0

    def __str__(self) -> str:
        if self.vm_function is not None:
            return f"processors that support VM function {self.vm_function}"
        if self.cr3_targets:
            return f"processors that support at least {self.cr3_targets} CR3-target values"
        if self.any_of:
            return "processors that allow the 1-setting of " + " or ".join(str(control) for control in self.any_of)
        return "all processors"


def if_any(*controls: Control) -> Condition:
    """The field exists where any of these controls may be 1."""
    return Condition(any_of=controls)


ALWAYS: Final = Condition()


@frozen(eq=False)
class Field:
    """One VMCS field. Fields are compared by identity: each exists once, as a constant of this module."""

    name: str
    encoding: int
    ref: Reference = field(repr=False)
    exists: Condition = field(default=ALWAYS, repr=False)
    layout: Layout | None = field(default=None, repr=False, kw_only=True)
    mask: int = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "mask", mask(self.bits))

    @property
    def width(self) -> Width:
        """The width class."""
        return Width(self.encoding >> 13 & 3)

    @property
    def bits(self) -> int:
        """The number of bits: 16, 32 or 64."""
        return _BITS[self.width]

    @property
    def type(self) -> Type:
        """The area the field belongs to."""
        return Type(self.encoding >> 10 & 3)

    @property
    def index(self) -> int:
        """Bits 9:1 of the encoding, which distinguish fields of one width and type."""
        return self.encoding >> 1 & 0x1FF

    @property
    def read_only(self) -> bool:
        """Whether VMWRITE needs the processor's support for writing VM-exit information fields."""
        return self.type is Type.READ_ONLY_DATA

    @property
    def high(self) -> int | None:
        """The encoding that accesses bits 63:32, for a 64-bit field; None for the other widths."""
        return self.encoding | HIGH_ACCESS if self.width is Width.BITS_64 else None

    def describe(self, value: int) -> str:
        """``value`` as messages show it: hexadecimal, with the layout's words if the field has one."""
        text = f"{value:#x}"
        return f"{text} ({self.layout.describe(value)})" if self.layout else text

    def __str__(self) -> str:
        return self.name


EPTP_SWITCHING: Final = 0  # the one VM function there is

FRED_STATE: Final = if_any(c.ENTRY_LOAD_FRED, c.EXIT_SAVE_FRED)

_CHAPTER = "Virtual Machine Control Structures"
_VPID_REF = sdm(_CHAPTER, "Virtual-Processor Identifier (VPID)")
_APIC = sdm(_CHAPTER, "Controls for APIC Virtualization")
_VIRTUALIZATION_EXCEPTIONS = sdm(_CHAPTER, "Controls for Virtualization Exceptions")
_HLAT = sdm(_CHAPTER, "Fields Related to Hypervisor-Managed Linear-Address Translation")
_GUEST_REGISTERS = sdm(_CHAPTER, "Guest Register State")
_GUEST_NON_REGISTERS = sdm(_CHAPTER, "Guest Non-Register State")
_HOST_STATE = sdm(_CHAPTER, "Host-State Area")
_IO_BITMAPS = sdm(_CHAPTER, "I/O-Bitmap Addresses")
_MSR_BITMAPS = sdm(_CHAPTER, "MSR-Bitmap Address")
_EXIT_MSRS = sdm(_CHAPTER, "VM-Exit Controls for MSRs")
_ENTRY_MSRS = sdm(_CHAPTER, "VM-Entry Controls for MSRs")
_EXECUTIVE = sdm(_CHAPTER, "Executive-VMCS Pointer")
_PML = sdm(_CHAPTER, "Control Field for Page-Modification Logging")
_TSC = sdm(_CHAPTER, "Time-Stamp Counter Offset and Multiplier")
_VM_FUNCTIONS = sdm(_CHAPTER, "VM-Function Controls")
_EPTP = sdm(_CHAPTER, "Extended-Page-Table Pointer (EPTP)")
_SHADOWING = sdm(_CHAPTER, "VMCS Shadowing Bitmap Addresses")
_XSS = sdm(_CHAPTER, "XSS-Exiting Bitmap")
_ENCLS = sdm(_CHAPTER, "ENCLS-Exiting Bitmap")
_SPP = sdm(_CHAPTER, "Sub-Page-Permission-Table Pointer (SPPTP)")
_PROCESSOR_BASED = sdm(_CHAPTER, "Processor-Based VM-Execution Controls")
_ENCLV = sdm(_CHAPTER, "ENCLV-Exiting Bitmap")
_PASID = sdm(_CHAPTER, "Fields Related to PASID Translation")
_PCONFIG = sdm(_CHAPTER, "PCONFIG-Exiting Bitmap")
_EXIT_CONTROLS = sdm(_CHAPTER, "VM-Exit Controls")
_SPEC_CTRL = sdm(_CHAPTER, "Fields Controlling Virtualization of the IA32_SPEC_CTRL MSR")
_INJECTION = sdm(_CHAPTER, "VM-Entry Controls for Event Injection")
_BASIC_EXIT = sdm(_CHAPTER, "Basic VM-Exit Information")
_INSTRUCTION_EXECUTION = sdm(_CHAPTER, "Information for VM Exits Due to Instruction Execution")
_EVENT_DELIVERY = sdm(_CHAPTER, "Information for VM Exits That Occur During Event Delivery")
_PIN_BASED = sdm(_CHAPTER, "Pin-Based VM-Execution Controls")
_EXCEPTIONS = sdm(_CHAPTER, "Exception Bitmap")
_CR3_TARGETS = sdm(_CHAPTER, "CR3-Target Controls")
_ENTRY_CONTROLS = sdm(_CHAPTER, "VM-Entry Controls")
_PAUSE_LOOP = sdm(_CHAPTER, "Controls for PAUSE-Loop Exiting")
_TIMEOUT = sdm(_CHAPTER, "Instruction-Timeout Control")
_INSTRUCTION_ERROR = sdm(_CHAPTER, "VM-Instruction Error Field")
_VECTORED_EVENTS = sdm(_CHAPTER, "Information for VM Exits Due to Vectored Events")
_CR_MASKS = sdm(_CHAPTER, "Guest/Host Masks and Read Shadows for CR0 and CR4")

# 16-bit fields, control
VPID: Final = Field("Virtual-processor identifier", 0x0000, _VPID_REF, if_any(c.ENABLE_VPID))
POSTED_INTERRUPT_NOTIFICATION_VECTOR: Final = Field(
    "Posted-interrupt notification vector", 0x0002, _APIC, if_any(c.PROCESS_POSTED_INTERRUPTS)
)
EPTP_INDEX: Final = Field("EPTP index", 0x0004, _VIRTUALIZATION_EXCEPTIONS, if_any(c.EPT_VIOLATION_VE))
HLAT_PREFIX_SIZE: Final = Field("HLAT prefix size", 0x0006, _HLAT, if_any(c.ENABLE_HLAT))
LAST_PID_POINTER_INDEX: Final = Field("Last PID-pointer index", 0x0008, _APIC, if_any(c.IPI_VIRTUALIZATION))
VIRTUAL_TIMER_VECTOR: Final = Field("Virtual timer vector", 0x000A, _APIC, if_any(c.APIC_TIMER_VIRTUALIZATION))

# 16-bit fields, guest state
GUEST_ES_SELECTOR: Final = Field("Guest ES selector", 0x0800, _GUEST_REGISTERS, layout=layouts.SELECTOR)
GUEST_CS_SELECTOR: Final = Field("Guest CS selector", 0x0802, _GUEST_REGISTERS, layout=layouts.SELECTOR)
GUEST_SS_SELECTOR: Final = Field("Guest SS selector", 0x0804, _GUEST_REGISTERS, layout=layouts.SELECTOR)
GUEST_DS_SELECTOR: Final = Field("Guest DS selector", 0x0806, _GUEST_REGISTERS, layout=layouts.SELECTOR)
GUEST_FS_SELECTOR: Final = Field("Guest FS selector", 0x0808, _GUEST_REGISTERS, layout=layouts.SELECTOR)
GUEST_GS_SELECTOR: Final = Field("Guest GS selector", 0x080A, _GUEST_REGISTERS, layout=layouts.SELECTOR)
GUEST_LDTR_SELECTOR: Final = Field("Guest LDTR selector", 0x080C, _GUEST_REGISTERS, layout=layouts.SELECTOR)
GUEST_TR_SELECTOR: Final = Field("Guest TR selector", 0x080E, _GUEST_REGISTERS, layout=layouts.SELECTOR)
GUEST_INTERRUPT_STATUS: Final = Field(
    "Guest interrupt status",
    0x0810,
    _GUEST_NON_REGISTERS,
    if_any(c.VIRTUAL_INTERRUPT_DELIVERY),
    layout=layouts.GUEST_INTERRUPT_STATUS,
)
PML_INDEX: Final = Field("PML index", 0x0812, _GUEST_NON_REGISTERS, if_any(c.ENABLE_PML))
GUEST_UINV: Final = Field("Guest UINV", 0x0814, _GUEST_NON_REGISTERS, if_any(c.ENTRY_LOAD_UINV))

# 16-bit fields, host state
HOST_ES_SELECTOR: Final = Field("Host ES selector", 0x0C00, _HOST_STATE, layout=layouts.SELECTOR)
HOST_CS_SELECTOR: Final = Field("Host CS selector", 0x0C02, _HOST_STATE, layout=layouts.SELECTOR)
HOST_SS_SELECTOR: Final = Field("Host SS selector", 0x0C04, _HOST_STATE, layout=layouts.SELECTOR)
HOST_DS_SELECTOR: Final = Field("Host DS selector", 0x0C06, _HOST_STATE, layout=layouts.SELECTOR)
HOST_FS_SELECTOR: Final = Field("Host FS selector", 0x0C08, _HOST_STATE, layout=layouts.SELECTOR)
HOST_GS_SELECTOR: Final = Field("Host GS selector", 0x0C0A, _HOST_STATE, layout=layouts.SELECTOR)
HOST_TR_SELECTOR: Final = Field("Host TR selector", 0x0C0C, _HOST_STATE, layout=layouts.SELECTOR)

# 64-bit fields, control
IO_BITMAP_A_ADDRESS: Final = Field("Address of I/O bitmap A", 0x2000, _IO_BITMAPS)
IO_BITMAP_B_ADDRESS: Final = Field("Address of I/O bitmap B", 0x2002, _IO_BITMAPS)
MSR_BITMAP_ADDRESS: Final = Field("Address of MSR bitmaps", 0x2004, _MSR_BITMAPS, if_any(c.USE_MSR_BITMAPS))
VM_EXIT_MSR_STORE_ADDRESS: Final = Field("VM-exit MSR-store address", 0x2006, _EXIT_MSRS)
VM_EXIT_MSR_LOAD_ADDRESS: Final = Field("VM-exit MSR-load address", 0x2008, _EXIT_MSRS)
VM_ENTRY_MSR_LOAD_ADDRESS: Final = Field("VM-entry MSR-load address", 0x200A, _ENTRY_MSRS)
EXECUTIVE_VMCS_POINTER: Final = Field("Executive-VMCS pointer", 0x200C, _EXECUTIVE)
PML_ADDRESS: Final = Field("PML address", 0x200E, _PML, if_any(c.ENABLE_PML))
TSC_OFFSET: Final = Field("TSC offset", 0x2010, _TSC)
VIRTUAL_APIC_ADDRESS: Final = Field("Virtual-APIC address", 0x2012, _APIC, if_any(c.USE_TPR_SHADOW))
APIC_ACCESS_ADDRESS: Final = Field("APIC-access address", 0x2014, _APIC, if_any(c.VIRTUALIZE_APIC_ACCESSES))
POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: Final = Field(
    "Posted-interrupt descriptor address", 0x2016, _APIC, if_any(c.PROCESS_POSTED_INTERRUPTS)
)
VM_FUNCTION_CONTROLS: Final = Field("VM-function controls", 0x2018, _VM_FUNCTIONS, if_any(c.ENABLE_VM_FUNCTIONS))
EPT_POINTER: Final = Field("EPT pointer", 0x201A, _EPTP, if_any(c.ENABLE_EPT), layout=layouts.EPT_POINTER)
EOI_EXIT_BITMAP_0: Final = Field("EOI-exit bitmap 0", 0x201C, _APIC, if_any(c.VIRTUAL_INTERRUPT_DELIVERY))
EOI_EXIT_BITMAP_1: Final = Field("EOI-exit bitmap 1", 0x201E, _APIC, if_any(c.VIRTUAL_INTERRUPT_DELIVERY))
EOI_EXIT_BITMAP_2: Final = Field("EOI-exit bitmap 2", 0x2020, _APIC, if_any(c.VIRTUAL_INTERRUPT_DELIVERY))
EOI_EXIT_BITMAP_3: Final = Field("EOI-exit bitmap 3", 0x2022, _APIC, if_any(c.VIRTUAL_INTERRUPT_DELIVERY))
EPTP_LIST_ADDRESS: Final = Field("EPTP-list address", 0x2024, _VM_FUNCTIONS, Condition(vm_function=EPTP_SWITCHING))
VMREAD_BITMAP_ADDRESS: Final = Field("VMREAD-bitmap address", 0x2026, _SHADOWING, if_any(c.VMCS_SHADOWING))
VMWRITE_BITMAP_ADDRESS: Final = Field("VMWRITE-bitmap address", 0x2028, _SHADOWING, if_any(c.VMCS_SHADOWING))
VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: Final = Field(
    "Virtualization-exception information address", 0x202A, _VIRTUALIZATION_EXCEPTIONS, if_any(c.EPT_VIOLATION_VE)
)
XSS_EXITING_BITMAP: Final = Field("XSS-exiting bitmap", 0x202C, _XSS, if_any(c.ENABLE_XSAVES_XRSTORS))
ENCLS_EXITING_BITMAP: Final = Field("ENCLS-exiting bitmap", 0x202E, _ENCLS, if_any(c.ENABLE_ENCLS_EXITING))
SUB_PAGE_PERMISSION_TABLE_POINTER: Final = Field(
    "Sub-page-permission-table pointer", 0x2030, _SPP, if_any(c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT)
)
TSC_MULTIPLIER: Final = Field("TSC multiplier", 0x2032, _TSC, if_any(c.USE_TSC_SCALING))
TERTIARY_PROCESSOR_BASED_CONTROLS: Final = Field(
    "Tertiary processor-based VM-execution controls", 0x2034, _PROCESSOR_BASED, if_any(c.ACTIVATE_TERTIARY_CONTROLS)
)
ENCLV_EXITING_BITMAP: Final = Field("ENCLV-exiting bitmap", 0x2036, _ENCLV, if_any(c.ENABLE_ENCLV_EXITING))
LOW_PASID_DIRECTORY_ADDRESS: Final = Field("Low PASID directory address", 0x2038, _PASID, if_any(c.PASID_TRANSLATION))
HIGH_PASID_DIRECTORY_ADDRESS: Final = Field("High PASID directory address", 0x203A, _PASID, if_any(c.PASID_TRANSLATION))
PCONFIG_EXITING_BITMAP: Final = Field("PCONFIG-exiting bitmap", 0x203E, _PCONFIG, if_any(c.ENABLE_PCONFIG))
HLAT_POINTER: Final = Field(
    "Hypervisor-managed linear-address translation pointer", 0x2040, _HLAT, if_any(c.ENABLE_HLAT)
)
PID_POINTER_TABLE_ADDRESS: Final = Field("PID-pointer table address", 0x2042, _APIC, if_any(c.IPI_VIRTUALIZATION))
SECONDARY_VM_EXIT_CONTROLS: Final = Field(
    "Secondary VM-exit controls", 0x2044, _EXIT_CONTROLS, if_any(c.EXIT_ACTIVATE_SECONDARY_CONTROLS)
)
IA32_SPEC_CTRL_MASK: Final = Field("IA32_SPEC_CTRL mask", 0x204A, _SPEC_CTRL, if_any(c.VIRTUALIZE_IA32_SPEC_CTRL))
IA32_SPEC_CTRL_SHADOW: Final = Field("IA32_SPEC_CTRL shadow", 0x204C, _SPEC_CTRL, if_any(c.VIRTUALIZE_IA32_SPEC_CTRL))
GUEST_DEADLINE_SHADOW: Final = Field("Guest deadline shadow", 0x204E, _APIC, if_any(c.APIC_TIMER_VIRTUALIZATION))
INJECTED_EVENT_DATA: Final = Field("Injected-event data", 0x2052, _INJECTION, if_any(c.ENTRY_LOAD_FRED))

# 64-bit fields, read-only data
GUEST_PHYSICAL_ADDRESS: Final = Field("Guest-physical address", 0x2400, _BASIC_EXIT, if_any(c.ENABLE_EPT))
MSR_DATA: Final = Field("MSR data", 0x2402, _INSTRUCTION_EXECUTION, if_any(c.ENABLE_MSR_LIST_INSTRUCTIONS))
ORIGINAL_EVENT_DATA: Final = Field("Original-event data", 0x2404, _EVENT_DELIVERY, if_any(c.ENTRY_LOAD_FRED))

# 64-bit fields, guest state
VMCS_LINK_POINTER: Final = Field("VMCS link pointer", 0x2800, _GUEST_NON_REGISTERS)
GUEST_IA32_DEBUGCTL: Final = Field("Guest IA32_DEBUGCTL", 0x2802, _GUEST_REGISTERS, layout=layouts.IA32_DEBUGCTL)
GUEST_IA32_PAT: Final = Field(
    "Guest IA32_PAT", 0x2804, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_IA32_PAT, c.EXIT_SAVE_IA32_PAT)
)
GUEST_IA32_EFER: Final = Field(
    "Guest IA32_EFER",
    0x2806,
    _GUEST_REGISTERS,
    if_any(c.ENTRY_LOAD_IA32_EFER, c.EXIT_SAVE_IA32_EFER),
    layout=layouts.EFER,
)
GUEST_IA32_PERF_GLOBAL_CTRL: Final = Field(
    "Guest IA32_PERF_GLOBAL_CTRL",
    0x2808,
    _GUEST_REGISTERS,
    if_any(c.ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL, c.EXIT_SAVE_IA32_PERF_GLOBAL_CTRL),
)
GUEST_PDPTE0: Final = Field("Guest PDPTE0", 0x280A, _GUEST_NON_REGISTERS, if_any(c.ENABLE_EPT))
GUEST_PDPTE1: Final = Field("Guest PDPTE1", 0x280C, _GUEST_NON_REGISTERS, if_any(c.ENABLE_EPT))
GUEST_PDPTE2: Final = Field("Guest PDPTE2", 0x280E, _GUEST_NON_REGISTERS, if_any(c.ENABLE_EPT))
GUEST_PDPTE3: Final = Field("Guest PDPTE3", 0x2810, _GUEST_NON_REGISTERS, if_any(c.ENABLE_EPT))
GUEST_IA32_BNDCFGS: Final = Field(
    "Guest IA32_BNDCFGS", 0x2812, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_IA32_BNDCFGS, c.EXIT_CLEAR_IA32_BNDCFGS)
)
GUEST_IA32_RTIT_CTL: Final = Field(
    "Guest IA32_RTIT_CTL", 0x2814, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_IA32_RTIT_CTL, c.EXIT_CLEAR_IA32_RTIT_CTL)
)
GUEST_IA32_LBR_CTL: Final = Field(
    "Guest IA32_LBR_CTL", 0x2816, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_IA32_LBR_CTL, c.EXIT_CLEAR_IA32_LBR_CTL)
)
GUEST_IA32_PKRS: Final = Field("Guest IA32_PKRS", 0x2818, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_PKRS))
GUEST_IA32_FRED_CONFIG: Final = Field("Guest IA32_FRED_CONFIG", 0x281A, _GUEST_REGISTERS, FRED_STATE)
GUEST_IA32_FRED_RSP1: Final = Field("Guest IA32_FRED_RSP1", 0x281C, _GUEST_REGISTERS, FRED_STATE)
GUEST_IA32_FRED_RSP2: Final = Field("Guest IA32_FRED_RSP2", 0x281E, _GUEST_REGISTERS, FRED_STATE)
GUEST_IA32_FRED_RSP3: Final = Field("Guest IA32_FRED_RSP3", 0x2820, _GUEST_REGISTERS, FRED_STATE)
GUEST_IA32_FRED_STKLVLS: Final = Field("Guest IA32_FRED_STKLVLS", 0x2822, _GUEST_REGISTERS, FRED_STATE)
GUEST_IA32_FRED_SSP1: Final = Field("Guest IA32_FRED_SSP1", 0x2824, _GUEST_REGISTERS, FRED_STATE)
GUEST_IA32_FRED_SSP2: Final = Field("Guest IA32_FRED_SSP2", 0x2826, _GUEST_REGISTERS, FRED_STATE)
GUEST_IA32_FRED_SSP3: Final = Field("Guest IA32_FRED_SSP3", 0x2828, _GUEST_REGISTERS, FRED_STATE)
GUEST_IA32_SPEC_CTRL: Final = Field(
    "Guest IA32_SPEC_CTRL", 0x282E, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_IA32_SPEC_CTRL)
)
GUEST_DEADLINE: Final = Field("Guest deadline", 0x2830, _GUEST_NON_REGISTERS, if_any(c.APIC_TIMER_VIRTUALIZATION))

# 64-bit fields, host state
HOST_IA32_PAT: Final = Field("Host IA32_PAT", 0x2C00, _HOST_STATE, if_any(c.EXIT_LOAD_IA32_PAT))
HOST_IA32_EFER: Final = Field("Host IA32_EFER", 0x2C02, _HOST_STATE, if_any(c.EXIT_LOAD_IA32_EFER), layout=layouts.EFER)
HOST_IA32_PERF_GLOBAL_CTRL: Final = Field(
    "Host IA32_PERF_GLOBAL_CTRL", 0x2C04, _HOST_STATE, if_any(c.EXIT_LOAD_IA32_PERF_GLOBAL_CTRL)
)
HOST_IA32_PKRS: Final = Field("Host IA32_PKRS", 0x2C06, _HOST_STATE, if_any(c.EXIT_LOAD_PKRS))
HOST_IA32_FRED_CONFIG: Final = Field("Host IA32_FRED_CONFIG", 0x2C08, _HOST_STATE, if_any(c.EXIT_LOAD_FRED))
HOST_IA32_FRED_RSP1: Final = Field("Host IA32_FRED_RSP1", 0x2C0A, _HOST_STATE, if_any(c.EXIT_LOAD_FRED))
HOST_IA32_FRED_RSP2: Final = Field("Host IA32_FRED_RSP2", 0x2C0C, _HOST_STATE, if_any(c.EXIT_LOAD_FRED))
HOST_IA32_FRED_RSP3: Final = Field("Host IA32_FRED_RSP3", 0x2C0E, _HOST_STATE, if_any(c.EXIT_LOAD_FRED))
HOST_IA32_FRED_STKLVLS: Final = Field("Host IA32_FRED_STKLVLS", 0x2C10, _HOST_STATE, if_any(c.EXIT_LOAD_FRED))
HOST_IA32_FRED_SSP1: Final = Field("Host IA32_FRED_SSP1", 0x2C12, _HOST_STATE, if_any(c.EXIT_LOAD_FRED))
HOST_IA32_FRED_SSP2: Final = Field("Host IA32_FRED_SSP2", 0x2C14, _HOST_STATE, if_any(c.EXIT_LOAD_FRED))
HOST_IA32_FRED_SSP3: Final = Field("Host IA32_FRED_SSP3", 0x2C16, _HOST_STATE, if_any(c.EXIT_LOAD_FRED))
HOST_IA32_SPEC_CTRL: Final = Field("Host IA32_SPEC_CTRL", 0x2C1A, _HOST_STATE, if_any(c.EXIT_LOAD_IA32_SPEC_CTRL))

# 32-bit fields, control
PIN_BASED_CONTROLS: Final = Field("Pin-based VM-execution controls", 0x4000, _PIN_BASED)
PRIMARY_PROCESSOR_BASED_CONTROLS: Final = Field(
    "Primary processor-based VM-execution controls", 0x4002, _PROCESSOR_BASED
)
EXCEPTION_BITMAP: Final = Field("Exception bitmap", 0x4004, _EXCEPTIONS)
PAGE_FAULT_ERROR_CODE_MASK: Final = Field("Page-fault error-code mask", 0x4006, _EXCEPTIONS)
PAGE_FAULT_ERROR_CODE_MATCH: Final = Field("Page-fault error-code match", 0x4008, _EXCEPTIONS)
CR3_TARGET_COUNT: Final = Field("CR3-target count", 0x400A, _CR3_TARGETS)
VM_EXIT_CONTROLS: Final = Field("Primary VM-exit controls", 0x400C, _EXIT_CONTROLS)
VM_EXIT_MSR_STORE_COUNT: Final = Field("VM-exit MSR-store count", 0x400E, _EXIT_MSRS)
VM_EXIT_MSR_LOAD_COUNT: Final = Field("VM-exit MSR-load count", 0x4010, _EXIT_MSRS)
VM_ENTRY_CONTROLS: Final = Field("VM-entry controls", 0x4012, _ENTRY_CONTROLS)
VM_ENTRY_MSR_LOAD_COUNT: Final = Field("VM-entry MSR-load count", 0x4014, _ENTRY_MSRS)
VM_ENTRY_INTERRUPTION_INFORMATION: Final = Field(
    "VM-entry interruption-information field", 0x4016, _INJECTION, layout=layouts.ENTRY_INTERRUPTION_INFORMATION
)
VM_ENTRY_EXCEPTION_ERROR_CODE: Final = Field("VM-entry exception error code", 0x4018, _INJECTION)
VM_ENTRY_INSTRUCTION_LENGTH: Final = Field("VM-entry instruction length", 0x401A, _INJECTION)
TPR_THRESHOLD: Final = Field("TPR threshold", 0x401C, _APIC, if_any(c.USE_TPR_SHADOW))
SECONDARY_PROCESSOR_BASED_CONTROLS: Final = Field(
    "Secondary processor-based VM-execution controls", 0x401E, _PROCESSOR_BASED, if_any(c.ACTIVATE_SECONDARY_CONTROLS)
)
PLE_GAP: Final = Field("PLE_Gap", 0x4020, _PAUSE_LOOP, if_any(c.PAUSE_LOOP_EXITING))
PLE_WINDOW: Final = Field("PLE_Window", 0x4022, _PAUSE_LOOP, if_any(c.PAUSE_LOOP_EXITING))
INSTRUCTION_TIMEOUT_CONTROL: Final = Field(
    "Instruction-timeout control", 0x4024, _TIMEOUT, if_any(c.INSTRUCTION_TIMEOUT)
)

# 32-bit fields, read-only data
VM_INSTRUCTION_ERROR: Final = Field("VM-instruction error", 0x4400, _INSTRUCTION_ERROR)
EXIT_REASON: Final = Field("Exit reason", 0x4402, _BASIC_EXIT, layout=layouts.EXIT_REASON)
VM_EXIT_INTERRUPTION_INFORMATION: Final = Field(
    "VM-exit interruption information", 0x4404, _VECTORED_EVENTS, layout=layouts.EXIT_INTERRUPTION_INFORMATION
)
VM_EXIT_INTERRUPTION_ERROR_CODE: Final = Field("VM-exit interruption error code", 0x4406, _VECTORED_EVENTS)
IDT_VECTORING_INFORMATION: Final = Field(
    "IDT-vectoring information field", 0x4408, _EVENT_DELIVERY, layout=layouts.IDT_VECTORING_INFORMATION
)
IDT_VECTORING_ERROR_CODE: Final = Field("IDT-vectoring error code", 0x440A, _EVENT_DELIVERY)
VM_EXIT_INSTRUCTION_LENGTH: Final = Field("VM-exit instruction length", 0x440C, _INSTRUCTION_EXECUTION)
VM_EXIT_INSTRUCTION_INFORMATION: Final = Field("VM-exit instruction information", 0x440E, _INSTRUCTION_EXECUTION)

# 32-bit fields, guest state
GUEST_ES_LIMIT: Final = Field("Guest ES limit", 0x4800, _GUEST_REGISTERS)
GUEST_CS_LIMIT: Final = Field("Guest CS limit", 0x4802, _GUEST_REGISTERS)
GUEST_SS_LIMIT: Final = Field("Guest SS limit", 0x4804, _GUEST_REGISTERS)
GUEST_DS_LIMIT: Final = Field("Guest DS limit", 0x4806, _GUEST_REGISTERS)
GUEST_FS_LIMIT: Final = Field("Guest FS limit", 0x4808, _GUEST_REGISTERS)
GUEST_GS_LIMIT: Final = Field("Guest GS limit", 0x480A, _GUEST_REGISTERS)
GUEST_LDTR_LIMIT: Final = Field("Guest LDTR limit", 0x480C, _GUEST_REGISTERS)
GUEST_TR_LIMIT: Final = Field("Guest TR limit", 0x480E, _GUEST_REGISTERS)
GUEST_GDTR_LIMIT: Final = Field("Guest GDTR limit", 0x4810, _GUEST_REGISTERS)
GUEST_IDTR_LIMIT: Final = Field("Guest IDTR limit", 0x4812, _GUEST_REGISTERS)
GUEST_ES_ACCESS_RIGHTS: Final = Field("Guest ES access rights", 0x4814, _GUEST_REGISTERS, layout=layouts.ACCESS_RIGHTS)
GUEST_CS_ACCESS_RIGHTS: Final = Field("Guest CS access rights", 0x4816, _GUEST_REGISTERS, layout=layouts.ACCESS_RIGHTS)
GUEST_SS_ACCESS_RIGHTS: Final = Field("Guest SS access rights", 0x4818, _GUEST_REGISTERS, layout=layouts.ACCESS_RIGHTS)
GUEST_DS_ACCESS_RIGHTS: Final = Field("Guest DS access rights", 0x481A, _GUEST_REGISTERS, layout=layouts.ACCESS_RIGHTS)
GUEST_FS_ACCESS_RIGHTS: Final = Field("Guest FS access rights", 0x481C, _GUEST_REGISTERS, layout=layouts.ACCESS_RIGHTS)
GUEST_GS_ACCESS_RIGHTS: Final = Field("Guest GS access rights", 0x481E, _GUEST_REGISTERS, layout=layouts.ACCESS_RIGHTS)
GUEST_LDTR_ACCESS_RIGHTS: Final = Field(
    "Guest LDTR access rights", 0x4820, _GUEST_REGISTERS, layout=layouts.ACCESS_RIGHTS
)
GUEST_TR_ACCESS_RIGHTS: Final = Field("Guest TR access rights", 0x4822, _GUEST_REGISTERS, layout=layouts.ACCESS_RIGHTS)
GUEST_INTERRUPTIBILITY_STATE: Final = Field(
    "Guest interruptibility state", 0x4824, _GUEST_NON_REGISTERS, layout=layouts.INTERRUPTIBILITY_STATE
)
GUEST_ACTIVITY_STATE: Final = Field("Guest activity state", 0x4826, _GUEST_NON_REGISTERS, layout=layouts.ACTIVITY_STATE)
GUEST_SMBASE: Final = Field("Guest SMBASE", 0x4828, _GUEST_REGISTERS)
GUEST_IA32_SYSENTER_CS: Final = Field("Guest IA32_SYSENTER_CS", 0x482A, _GUEST_REGISTERS)
VMX_PREEMPTION_TIMER_VALUE: Final = Field(
    "VMX-preemption timer value", 0x482E, _GUEST_NON_REGISTERS, if_any(c.ACTIVATE_VMX_PREEMPTION_TIMER)
)

# 32-bit fields, host state
HOST_IA32_SYSENTER_CS: Final = Field("Host IA32_SYSENTER_CS", 0x4C00, _HOST_STATE)

# natural-width fields, control
CR0_GUEST_HOST_MASK: Final = Field("CR0 guest/host mask", 0x6000, _CR_MASKS, layout=layouts.CR0)
CR4_GUEST_HOST_MASK: Final = Field("CR4 guest/host mask", 0x6002, _CR_MASKS, layout=layouts.CR4)
CR0_READ_SHADOW: Final = Field("CR0 read shadow", 0x6004, _CR_MASKS, layout=layouts.CR0)
CR4_READ_SHADOW: Final = Field("CR4 read shadow", 0x6006, _CR_MASKS, layout=layouts.CR4)
CR3_TARGET_VALUE_0: Final = Field("CR3-target value 0", 0x6008, _CR3_TARGETS, Condition(cr3_targets=1))
CR3_TARGET_VALUE_1: Final = Field("CR3-target value 1", 0x600A, _CR3_TARGETS, Condition(cr3_targets=2))
CR3_TARGET_VALUE_2: Final = Field("CR3-target value 2", 0x600C, _CR3_TARGETS, Condition(cr3_targets=3))
CR3_TARGET_VALUE_3: Final = Field("CR3-target value 3", 0x600E, _CR3_TARGETS, Condition(cr3_targets=4))

# natural-width fields, read-only data
EXIT_QUALIFICATION: Final = Field("Exit qualification", 0x6400, _BASIC_EXIT)
IO_RCX: Final = Field("I/O RCX", 0x6402, _INSTRUCTION_EXECUTION)
IO_RSI: Final = Field("I/O RSI", 0x6404, _INSTRUCTION_EXECUTION)
IO_RDI: Final = Field("I/O RDI", 0x6406, _INSTRUCTION_EXECUTION)
IO_RIP: Final = Field("I/O RIP", 0x6408, _INSTRUCTION_EXECUTION)
GUEST_LINEAR_ADDRESS: Final = Field("Guest-linear address", 0x640A, _BASIC_EXIT)

# natural-width fields, guest state
GUEST_CR0: Final = Field("Guest CR0", 0x6800, _GUEST_REGISTERS, layout=layouts.CR0)
GUEST_CR3: Final = Field("Guest CR3", 0x6802, _GUEST_REGISTERS)
GUEST_CR4: Final = Field("Guest CR4", 0x6804, _GUEST_REGISTERS, layout=layouts.CR4)
GUEST_ES_BASE: Final = Field("Guest ES base", 0x6806, _GUEST_REGISTERS)
GUEST_CS_BASE: Final = Field("Guest CS base", 0x6808, _GUEST_REGISTERS)
GUEST_SS_BASE: Final = Field("Guest SS base", 0x680A, _GUEST_REGISTERS)
GUEST_DS_BASE: Final = Field("Guest DS base", 0x680C, _GUEST_REGISTERS)
GUEST_FS_BASE: Final = Field("Guest FS base", 0x680E, _GUEST_REGISTERS)
GUEST_GS_BASE: Final = Field("Guest GS base", 0x6810, _GUEST_REGISTERS)
GUEST_LDTR_BASE: Final = Field("Guest LDTR base", 0x6812, _GUEST_REGISTERS)
GUEST_TR_BASE: Final = Field("Guest TR base", 0x6814, _GUEST_REGISTERS)
GUEST_GDTR_BASE: Final = Field("Guest GDTR base", 0x6816, _GUEST_REGISTERS)
GUEST_IDTR_BASE: Final = Field("Guest IDTR base", 0x6818, _GUEST_REGISTERS)
GUEST_DR7: Final = Field("Guest DR7", 0x681A, _GUEST_REGISTERS)
GUEST_RSP: Final = Field("Guest RSP", 0x681C, _GUEST_REGISTERS)
GUEST_RIP: Final = Field("Guest RIP", 0x681E, _GUEST_REGISTERS)
GUEST_RFLAGS: Final = Field("Guest RFLAGS", 0x6820, _GUEST_REGISTERS, layout=layouts.RFLAGS)
GUEST_PENDING_DEBUG_EXCEPTIONS: Final = Field(
    "Guest pending debug exceptions", 0x6822, _GUEST_NON_REGISTERS, layout=layouts.PENDING_DEBUG_EXCEPTIONS
)
GUEST_IA32_SYSENTER_ESP: Final = Field("Guest IA32_SYSENTER_ESP", 0x6824, _GUEST_REGISTERS)
GUEST_IA32_SYSENTER_EIP: Final = Field("Guest IA32_SYSENTER_EIP", 0x6826, _GUEST_REGISTERS)
GUEST_IA32_S_CET: Final = Field(
    "Guest IA32_S_CET", 0x6828, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_CET_STATE), layout=layouts.S_CET
)
GUEST_SSP: Final = Field("Guest SSP", 0x682A, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_CET_STATE))
GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR: Final = Field(
    "Guest IA32_INTERRUPT_SSP_TABLE_ADDR", 0x682C, _GUEST_REGISTERS, if_any(c.ENTRY_LOAD_CET_STATE)
)

# natural-width fields, host state
HOST_CR0: Final = Field("Host CR0", 0x6C00, _HOST_STATE, layout=layouts.CR0)
HOST_CR3: Final = Field("Host CR3", 0x6C02, _HOST_STATE)
HOST_CR4: Final = Field("Host CR4", 0x6C04, _HOST_STATE, layout=layouts.CR4)
HOST_FS_BASE: Final = Field("Host FS base", 0x6C06, _HOST_STATE)
HOST_GS_BASE: Final = Field("Host GS base", 0x6C08, _HOST_STATE)
HOST_TR_BASE: Final = Field("Host TR base", 0x6C0A, _HOST_STATE)
HOST_GDTR_BASE: Final = Field("Host GDTR base", 0x6C0C, _HOST_STATE)
HOST_IDTR_BASE: Final = Field("Host IDTR base", 0x6C0E, _HOST_STATE)
HOST_IA32_SYSENTER_ESP: Final = Field("Host IA32_SYSENTER_ESP", 0x6C10, _HOST_STATE)
HOST_IA32_SYSENTER_EIP: Final = Field("Host IA32_SYSENTER_EIP", 0x6C12, _HOST_STATE)
HOST_RSP: Final = Field("Host RSP", 0x6C14, _HOST_STATE)
HOST_RIP: Final = Field("Host RIP", 0x6C16, _HOST_STATE)
HOST_IA32_S_CET: Final = Field(
    "Host IA32_S_CET", 0x6C18, _HOST_STATE, if_any(c.EXIT_LOAD_CET_STATE), layout=layouts.S_CET
)
HOST_SSP: Final = Field("Host SSP", 0x6C1A, _HOST_STATE, if_any(c.EXIT_LOAD_CET_STATE))
HOST_IA32_INTERRUPT_SSP_TABLE_ADDR: Final = Field(
    "Host IA32_INTERRUPT_SSP_TABLE_ADDR", 0x6C1C, _HOST_STATE, if_any(c.EXIT_LOAD_CET_STATE)
)

FIELDS: Final[tuple[Field, ...]] = (
    VPID,
    POSTED_INTERRUPT_NOTIFICATION_VECTOR,
    EPTP_INDEX,
    HLAT_PREFIX_SIZE,
    LAST_PID_POINTER_INDEX,
    VIRTUAL_TIMER_VECTOR,
    GUEST_ES_SELECTOR,
    GUEST_CS_SELECTOR,
    GUEST_SS_SELECTOR,
    GUEST_DS_SELECTOR,
    GUEST_FS_SELECTOR,
    GUEST_GS_SELECTOR,
    GUEST_LDTR_SELECTOR,
    GUEST_TR_SELECTOR,
    GUEST_INTERRUPT_STATUS,
    PML_INDEX,
    GUEST_UINV,
    HOST_ES_SELECTOR,
    HOST_CS_SELECTOR,
    HOST_SS_SELECTOR,
    HOST_DS_SELECTOR,
    HOST_FS_SELECTOR,
    HOST_GS_SELECTOR,
    HOST_TR_SELECTOR,
    IO_BITMAP_A_ADDRESS,
    IO_BITMAP_B_ADDRESS,
    MSR_BITMAP_ADDRESS,
    VM_EXIT_MSR_STORE_ADDRESS,
    VM_EXIT_MSR_LOAD_ADDRESS,
    VM_ENTRY_MSR_LOAD_ADDRESS,
    EXECUTIVE_VMCS_POINTER,
    PML_ADDRESS,
    TSC_OFFSET,
    VIRTUAL_APIC_ADDRESS,
    APIC_ACCESS_ADDRESS,
    POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
    VM_FUNCTION_CONTROLS,
    EPT_POINTER,
    EOI_EXIT_BITMAP_0,
    EOI_EXIT_BITMAP_1,
    EOI_EXIT_BITMAP_2,
    EOI_EXIT_BITMAP_3,
    EPTP_LIST_ADDRESS,
    VMREAD_BITMAP_ADDRESS,
    VMWRITE_BITMAP_ADDRESS,
    VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS,
    XSS_EXITING_BITMAP,
    ENCLS_EXITING_BITMAP,
    SUB_PAGE_PERMISSION_TABLE_POINTER,
    TSC_MULTIPLIER,
    TERTIARY_PROCESSOR_BASED_CONTROLS,
    ENCLV_EXITING_BITMAP,
    LOW_PASID_DIRECTORY_ADDRESS,
    HIGH_PASID_DIRECTORY_ADDRESS,
    PCONFIG_EXITING_BITMAP,
    HLAT_POINTER,
    PID_POINTER_TABLE_ADDRESS,
    SECONDARY_VM_EXIT_CONTROLS,
    IA32_SPEC_CTRL_MASK,
    IA32_SPEC_CTRL_SHADOW,
    GUEST_DEADLINE_SHADOW,
    INJECTED_EVENT_DATA,
    GUEST_PHYSICAL_ADDRESS,
    MSR_DATA,
    ORIGINAL_EVENT_DATA,
    VMCS_LINK_POINTER,
    GUEST_IA32_DEBUGCTL,
    GUEST_IA32_PAT,
    GUEST_IA32_EFER,
    GUEST_IA32_PERF_GLOBAL_CTRL,
    GUEST_PDPTE0,
    GUEST_PDPTE1,
    GUEST_PDPTE2,
    GUEST_PDPTE3,
    GUEST_IA32_BNDCFGS,
    GUEST_IA32_RTIT_CTL,
    GUEST_IA32_LBR_CTL,
    GUEST_IA32_PKRS,
    GUEST_IA32_FRED_CONFIG,
    GUEST_IA32_FRED_RSP1,
    GUEST_IA32_FRED_RSP2,
    GUEST_IA32_FRED_RSP3,
    GUEST_IA32_FRED_STKLVLS,
    GUEST_IA32_FRED_SSP1,
    GUEST_IA32_FRED_SSP2,
    GUEST_IA32_FRED_SSP3,
    GUEST_IA32_SPEC_CTRL,
    GUEST_DEADLINE,
    HOST_IA32_PAT,
    HOST_IA32_EFER,
    HOST_IA32_PERF_GLOBAL_CTRL,
    HOST_IA32_PKRS,
    HOST_IA32_FRED_CONFIG,
    HOST_IA32_FRED_RSP1,
    HOST_IA32_FRED_RSP2,
    HOST_IA32_FRED_RSP3,
    HOST_IA32_FRED_STKLVLS,
    HOST_IA32_FRED_SSP1,
    HOST_IA32_FRED_SSP2,
    HOST_IA32_FRED_SSP3,
    HOST_IA32_SPEC_CTRL,
    PIN_BASED_CONTROLS,
    PRIMARY_PROCESSOR_BASED_CONTROLS,
    EXCEPTION_BITMAP,
    PAGE_FAULT_ERROR_CODE_MASK,
    PAGE_FAULT_ERROR_CODE_MATCH,
    CR3_TARGET_COUNT,
    VM_EXIT_CONTROLS,
    VM_EXIT_MSR_STORE_COUNT,
    VM_EXIT_MSR_LOAD_COUNT,
    VM_ENTRY_CONTROLS,
    VM_ENTRY_MSR_LOAD_COUNT,
    VM_ENTRY_INTERRUPTION_INFORMATION,
    VM_ENTRY_EXCEPTION_ERROR_CODE,
    VM_ENTRY_INSTRUCTION_LENGTH,
    TPR_THRESHOLD,
    SECONDARY_PROCESSOR_BASED_CONTROLS,
    PLE_GAP,
    PLE_WINDOW,
    INSTRUCTION_TIMEOUT_CONTROL,
    VM_INSTRUCTION_ERROR,
    EXIT_REASON,
    VM_EXIT_INTERRUPTION_INFORMATION,
    VM_EXIT_INTERRUPTION_ERROR_CODE,
    IDT_VECTORING_INFORMATION,
    IDT_VECTORING_ERROR_CODE,
    VM_EXIT_INSTRUCTION_LENGTH,
    VM_EXIT_INSTRUCTION_INFORMATION,
    GUEST_ES_LIMIT,
    GUEST_CS_LIMIT,
    GUEST_SS_LIMIT,
    GUEST_DS_LIMIT,
    GUEST_FS_LIMIT,
    GUEST_GS_LIMIT,
    GUEST_LDTR_LIMIT,
    GUEST_TR_LIMIT,
    GUEST_GDTR_LIMIT,
    GUEST_IDTR_LIMIT,
    GUEST_ES_ACCESS_RIGHTS,
    GUEST_CS_ACCESS_RIGHTS,
    GUEST_SS_ACCESS_RIGHTS,
    GUEST_DS_ACCESS_RIGHTS,
    GUEST_FS_ACCESS_RIGHTS,
    GUEST_GS_ACCESS_RIGHTS,
    GUEST_LDTR_ACCESS_RIGHTS,
    GUEST_TR_ACCESS_RIGHTS,
    GUEST_INTERRUPTIBILITY_STATE,
    GUEST_ACTIVITY_STATE,
    GUEST_SMBASE,
    GUEST_IA32_SYSENTER_CS,
    VMX_PREEMPTION_TIMER_VALUE,
    HOST_IA32_SYSENTER_CS,
    CR0_GUEST_HOST_MASK,
    CR4_GUEST_HOST_MASK,
    CR0_READ_SHADOW,
    CR4_READ_SHADOW,
    CR3_TARGET_VALUE_0,
    CR3_TARGET_VALUE_1,
    CR3_TARGET_VALUE_2,
    CR3_TARGET_VALUE_3,
    EXIT_QUALIFICATION,
    IO_RCX,
    IO_RSI,
    IO_RDI,
    IO_RIP,
    GUEST_LINEAR_ADDRESS,
    GUEST_CR0,
    GUEST_CR3,
    GUEST_CR4,
    GUEST_ES_BASE,
    GUEST_CS_BASE,
    GUEST_SS_BASE,
    GUEST_DS_BASE,
    GUEST_FS_BASE,
    GUEST_GS_BASE,
    GUEST_LDTR_BASE,
    GUEST_TR_BASE,
    GUEST_GDTR_BASE,
    GUEST_IDTR_BASE,
    GUEST_DR7,
    GUEST_RSP,
    GUEST_RIP,
    GUEST_RFLAGS,
    GUEST_PENDING_DEBUG_EXCEPTIONS,
    GUEST_IA32_SYSENTER_ESP,
    GUEST_IA32_SYSENTER_EIP,
    GUEST_IA32_S_CET,
    GUEST_SSP,
    GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR,
    HOST_CR0,
    HOST_CR3,
    HOST_CR4,
    HOST_FS_BASE,
    HOST_GS_BASE,
    HOST_TR_BASE,
    HOST_GDTR_BASE,
    HOST_IDTR_BASE,
    HOST_IA32_SYSENTER_ESP,
    HOST_IA32_SYSENTER_EIP,
    HOST_RSP,
    HOST_RIP,
    HOST_IA32_S_CET,
    HOST_SSP,
    HOST_IA32_INTERRUPT_SSP_TABLE_ADDR,
)

BY_ENCODING: Final[Mapping[int, Field]] = MappingProxyType({each.encoding: each for each in FIELDS})

CONTROL_FIELDS: Final[Mapping[ControlWord, Field]] = MappingProxyType(
    {
        ControlWord.PIN_BASED: PIN_BASED_CONTROLS,
        ControlWord.PRIMARY: PRIMARY_PROCESSOR_BASED_CONTROLS,
        ControlWord.SECONDARY: SECONDARY_PROCESSOR_BASED_CONTROLS,
        ControlWord.TERTIARY: TERTIARY_PROCESSOR_BASED_CONTROLS,
        ControlWord.EXIT: VM_EXIT_CONTROLS,
        ControlWord.SECONDARY_EXIT: SECONDARY_VM_EXIT_CONTROLS,
        ControlWord.ENTRY: VM_ENTRY_CONTROLS,
    }
)


def field_of(encoding: int) -> Field | None:
    """The field that an encoding, full or high access, names on some processor; None if there is no such field."""
    found = BY_ENCODING.get(encoding & ~HIGH_ACCESS)
    if found is None or (encoding & HIGH_ACCESS and found.high is None):
        return None
    return found
