"""The VMX controls: every named bit of the control words, and which word switches which on.

Spec: SDM Vol. 3, "Virtual Machine Control Structures", "Pin-Based VM-Execution Controls", "Processor-Based VM-Execution
Controls", "VM-Exit Controls", "VM-Entry Controls"; "VMX Capability Reporting Facility", "Reserved Controls and Default
Settings".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from attrs import field, frozen

from vmcs.bits import bit_numbers, describe_bits
from vmcs.refs import Reference, sdm


class ControlWord(enum.Enum):
    """A VMCS field made of controls; the value is the manual's name for the set."""

    PIN_BASED = "pin-based VM-execution controls"
    PRIMARY = "primary processor-based VM-execution controls"
    SECONDARY = "secondary processor-based VM-execution controls"
    TERTIARY = "tertiary processor-based VM-execution controls"
    EXIT = "primary VM-exit controls"
    SECONDARY_EXIT = "secondary VM-exit controls"
    ENTRY = "VM-entry controls"

    @property
    def width(self) -> int:
        """Bits in the word: 64 for the sets that were added last, else 32."""
        return 64 if self in (ControlWord.TERTIARY, ControlWord.SECONDARY_EXIT) else 32


_CHAPTER = "Virtual Machine Control Structures"

WORD_REFERENCES: Final[Mapping[ControlWord, Reference]] = {
    ControlWord.PIN_BASED: sdm(_CHAPTER, "Pin-Based VM-Execution Controls"),
    ControlWord.PRIMARY: sdm(_CHAPTER, "Processor-Based VM-Execution Controls"),
    ControlWord.SECONDARY: sdm(_CHAPTER, "Processor-Based VM-Execution Controls"),
    ControlWord.TERTIARY: sdm(_CHAPTER, "Processor-Based VM-Execution Controls"),
    ControlWord.EXIT: sdm(_CHAPTER, "VM-Exit Controls"),
    ControlWord.SECONDARY_EXIT: sdm(_CHAPTER, "VM-Exit Controls"),
    ControlWord.ENTRY: sdm(_CHAPTER, "VM-Entry Controls"),
}

# Reserved in the default1 class: hardware without the "true" capability MSRs, and hypervisors that have not read
# them, keep these bits set.
DEFAULT1: Final[Mapping[ControlWord, int]] = MappingProxyType(
    {
        ControlWord.PIN_BASED: 0x0000_0016,
        ControlWord.PRIMARY: 0x0401_E172,
        ControlWord.SECONDARY: 0,
        ControlWord.TERTIARY: 0,
        ControlWord.EXIT: 0x0003_6DFF,
        ControlWord.SECONDARY_EXIT: 0,
        ControlWord.ENTRY: 0x0000_11FF,
    }
)


@frozen
class Control:
    """One named bit of a control word; ``name`` is the manual's, ``mask`` the bit in place."""

    word: ControlWord
    bit: int
    name: str
    mask: int = field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "mask", 1 << self.bit)

    @property
    def default1(self) -> bool:
        """Whether the bit belongs to the default1 class: set unless the true capability MSRs allow otherwise."""
        return bool(DEFAULT1[self.word] & self.mask)

    @property
    def ref(self) -> Reference:
        """The section that defines the control."""
        return WORD_REFERENCES[self.word]

    def __str__(self) -> str:
        return f'"{self.name}"'


EXTERNAL_INTERRUPT_EXITING: Final = Control(ControlWord.PIN_BASED, 0, "external-interrupt exiting")
NMI_EXITING: Final = Control(ControlWord.PIN_BASED, 3, "NMI exiting")
VIRTUAL_NMIS: Final = Control(ControlWord.PIN_BASED, 5, "virtual NMIs")
ACTIVATE_VMX_PREEMPTION_TIMER: Final = Control(ControlWord.PIN_BASED, 6, "activate VMX-preemption timer")
PROCESS_POSTED_INTERRUPTS: Final = Control(ControlWord.PIN_BASED, 7, "process posted interrupts")


INTERRUPT_WINDOW_EXITING: Final = Control(ControlWord.PRIMARY, 2, "interrupt-window exiting")
USE_TSC_OFFSETTING: Final = Control(ControlWord.PRIMARY, 3, "use TSC offsetting")
HLT_EXITING: Final = Control(ControlWord.PRIMARY, 7, "HLT exiting")
INVLPG_EXITING: Final = Control(ControlWord.PRIMARY, 9, "INVLPG exiting")
MWAIT_EXITING: Final = Control(ControlWord.PRIMARY, 10, "MWAIT exiting")
RDPMC_EXITING: Final = Control(ControlWord.PRIMARY, 11, "RDPMC exiting")
RDTSC_EXITING: Final = Control(ControlWord.PRIMARY, 12, "RDTSC exiting")
CR3_LOAD_EXITING: Final = Control(ControlWord.PRIMARY, 15, "CR3-load exiting")
CR3_STORE_EXITING: Final = Control(ControlWord.PRIMARY, 16, "CR3-store exiting")
ACTIVATE_TERTIARY_CONTROLS: Final = Control(ControlWord.PRIMARY, 17, "activate tertiary controls")
CR8_LOAD_EXITING: Final = Control(ControlWord.PRIMARY, 19, "CR8-load exiting")
CR8_STORE_EXITING: Final = Control(ControlWord.PRIMARY, 20, "CR8-store exiting")
USE_TPR_SHADOW: Final = Control(ControlWord.PRIMARY, 21, "use TPR shadow")
NMI_WINDOW_EXITING: Final = Control(ControlWord.PRIMARY, 22, "NMI-window exiting")
MOV_DR_EXITING: Final = Control(ControlWord.PRIMARY, 23, "MOV-DR exiting")
UNCONDITIONAL_IO_EXITING: Final = Control(ControlWord.PRIMARY, 24, "unconditional I/O exiting")
USE_IO_BITMAPS: Final = Control(ControlWord.PRIMARY, 25, "use I/O bitmaps")
MONITOR_TRAP_FLAG: Final = Control(ControlWord.PRIMARY, 27, "monitor trap flag")
USE_MSR_BITMAPS: Final = Control(ControlWord.PRIMARY, 28, "use MSR bitmaps")
MONITOR_EXITING: Final = Control(ControlWord.PRIMARY, 29, "MONITOR exiting")
PAUSE_EXITING: Final = Control(ControlWord.PRIMARY, 30, "PAUSE exiting")
ACTIVATE_SECONDARY_CONTROLS: Final = Control(ControlWord.PRIMARY, 31, "activate secondary controls")


VIRTUALIZE_APIC_ACCESSES: Final = Control(ControlWord.SECONDARY, 0, "virtualize APIC accesses")
ENABLE_EPT: Final = Control(ControlWord.SECONDARY, 1, "enable EPT")
DESCRIPTOR_TABLE_EXITING: Final = Control(ControlWord.SECONDARY, 2, "descriptor-table exiting")
ENABLE_RDTSCP: Final = Control(ControlWord.SECONDARY, 3, "enable RDTSCP")
VIRTUALIZE_X2APIC_MODE: Final = Control(ControlWord.SECONDARY, 4, "virtualize x2APIC mode")
ENABLE_VPID: Final = Control(ControlWord.SECONDARY, 5, "enable VPID")
WBINVD_EXITING: Final = Control(ControlWord.SECONDARY, 6, "WBINVD exiting")
UNRESTRICTED_GUEST: Final = Control(ControlWord.SECONDARY, 7, "unrestricted guest")
APIC_REGISTER_VIRTUALIZATION: Final = Control(ControlWord.SECONDARY, 8, "APIC-register virtualization")
VIRTUAL_INTERRUPT_DELIVERY: Final = Control(ControlWord.SECONDARY, 9, "virtual-interrupt delivery")
PAUSE_LOOP_EXITING: Final = Control(ControlWord.SECONDARY, 10, "PAUSE-loop exiting")
RDRAND_EXITING: Final = Control(ControlWord.SECONDARY, 11, "RDRAND exiting")
ENABLE_INVPCID: Final = Control(ControlWord.SECONDARY, 12, "enable INVPCID")
ENABLE_VM_FUNCTIONS: Final = Control(ControlWord.SECONDARY, 13, "enable VM functions")
VMCS_SHADOWING: Final = Control(ControlWord.SECONDARY, 14, "VMCS shadowing")
ENABLE_ENCLS_EXITING: Final = Control(ControlWord.SECONDARY, 15, "enable ENCLS exiting")
RDSEED_EXITING: Final = Control(ControlWord.SECONDARY, 16, "RDSEED exiting")
ENABLE_PML: Final = Control(ControlWord.SECONDARY, 17, "enable PML")
EPT_VIOLATION_VE: Final = Control(ControlWord.SECONDARY, 18, "EPT-violation #VE")
CONCEAL_VMX_FROM_PT: Final = Control(ControlWord.SECONDARY, 19, "conceal VMX from PT")
ENABLE_XSAVES_XRSTORS: Final = Control(ControlWord.SECONDARY, 20, "enable XSAVES/XRSTORS")
PASID_TRANSLATION: Final = Control(ControlWord.SECONDARY, 21, "PASID translation")
MODE_BASED_EXECUTE_CONTROL_FOR_EPT: Final = Control(ControlWord.SECONDARY, 22, "mode-based execute control for EPT")
SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT: Final = Control(ControlWord.SECONDARY, 23, "sub-page write permissions for EPT")
INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES: Final = Control(
    ControlWord.SECONDARY, 24, "Intel PT uses guest physical addresses"
)
USE_TSC_SCALING: Final = Control(ControlWord.SECONDARY, 25, "use TSC scaling")
ENABLE_USER_WAIT_AND_PAUSE: Final = Control(ControlWord.SECONDARY, 26, "enable user wait and pause")
ENABLE_PCONFIG: Final = Control(ControlWord.SECONDARY, 27, "enable PCONFIG")
ENABLE_ENCLV_EXITING: Final = Control(ControlWord.SECONDARY, 28, "enable ENCLV exiting")
VMM_BUS_LOCK_DETECTION: Final = Control(ControlWord.SECONDARY, 30, "VMM bus-lock detection")
INSTRUCTION_TIMEOUT: Final = Control(ControlWord.SECONDARY, 31, "instruction timeout")


LOADIWKEY_EXITING: Final = Control(ControlWord.TERTIARY, 0, "LOADIWKEY exiting")
ENABLE_HLAT: Final = Control(ControlWord.TERTIARY, 1, "enable HLAT")
EPT_PAGING_WRITE_CONTROL: Final = Control(ControlWord.TERTIARY, 2, "EPT paging-write control")
GUEST_PAGING_VERIFICATION: Final = Control(ControlWord.TERTIARY, 3, "guest-paging verification")
IPI_VIRTUALIZATION: Final = Control(ControlWord.TERTIARY, 4, "IPI virtualization")
ENABLE_MSR_LIST_INSTRUCTIONS: Final = Control(ControlWord.TERTIARY, 6, "enable MSR-list instructions")
VIRTUALIZE_IA32_SPEC_CTRL: Final = Control(ControlWord.TERTIARY, 7, "virtualize IA32_SPEC_CTRL")
APIC_TIMER_VIRTUALIZATION: Final = Control(ControlWord.TERTIARY, 8, "APIC-timer virtualization")


EXIT_SAVE_DEBUG_CONTROLS: Final = Control(ControlWord.EXIT, 2, "save debug controls")
EXIT_HOST_ADDRESS_SPACE_SIZE: Final = Control(ControlWord.EXIT, 9, "host address-space size")
EXIT_LOAD_IA32_PERF_GLOBAL_CTRL: Final = Control(ControlWord.EXIT, 12, "load IA32_PERF_GLOBAL_CTRL")
EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT: Final = Control(ControlWord.EXIT, 15, "acknowledge interrupt on exit")
EXIT_SAVE_IA32_PAT: Final = Control(ControlWord.EXIT, 18, "save IA32_PAT")
EXIT_LOAD_IA32_PAT: Final = Control(ControlWord.EXIT, 19, "load IA32_PAT")
EXIT_SAVE_IA32_EFER: Final = Control(ControlWord.EXIT, 20, "save IA32_EFER")
EXIT_LOAD_IA32_EFER: Final = Control(ControlWord.EXIT, 21, "load IA32_EFER")
EXIT_SAVE_VMX_PREEMPTION_TIMER_VALUE: Final = Control(ControlWord.EXIT, 22, "save VMX-preemption timer value")
EXIT_CLEAR_IA32_BNDCFGS: Final = Control(ControlWord.EXIT, 23, "clear IA32_BNDCFGS")
EXIT_CONCEAL_VMX_FROM_PT: Final = Control(ControlWord.EXIT, 24, "conceal VMX from PT")
EXIT_CLEAR_IA32_RTIT_CTL: Final = Control(ControlWord.EXIT, 25, "clear IA32_RTIT_CTL")
EXIT_CLEAR_IA32_LBR_CTL: Final = Control(ControlWord.EXIT, 26, "clear IA32_LBR_CTL")
EXIT_CLEAR_UINV: Final = Control(ControlWord.EXIT, 27, "clear UINV")
EXIT_LOAD_CET_STATE: Final = Control(ControlWord.EXIT, 28, "load CET state")
EXIT_LOAD_PKRS: Final = Control(ControlWord.EXIT, 29, "load PKRS")
EXIT_SAVE_IA32_PERF_GLOBAL_CTRL: Final = Control(ControlWord.EXIT, 30, "save IA32_PERF_GLOBAL_CTRL")
EXIT_ACTIVATE_SECONDARY_CONTROLS: Final = Control(ControlWord.EXIT, 31, "activate secondary controls")


EXIT_SAVE_FRED: Final = Control(ControlWord.SECONDARY_EXIT, 0, "save FRED")
EXIT_LOAD_FRED: Final = Control(ControlWord.SECONDARY_EXIT, 1, "load FRED")
EXIT_LOAD_IA32_SPEC_CTRL: Final = Control(ControlWord.SECONDARY_EXIT, 2, "load IA32_SPEC_CTRL")
EXIT_PREMATURELY_BUSY_SHADOW_STACK: Final = Control(ControlWord.SECONDARY_EXIT, 3, "prematurely busy shadow stack")


ENTRY_LOAD_DEBUG_CONTROLS: Final = Control(ControlWord.ENTRY, 2, "load debug controls")
ENTRY_IA32E_MODE_GUEST: Final = Control(ControlWord.ENTRY, 9, "IA-32e mode guest")
ENTRY_TO_SMM: Final = Control(ControlWord.ENTRY, 10, "entry to SMM")
ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT: Final = Control(ControlWord.ENTRY, 11, "deactivate dual-monitor treatment")
ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL: Final = Control(ControlWord.ENTRY, 13, "load IA32_PERF_GLOBAL_CTRL")
ENTRY_LOAD_IA32_PAT: Final = Control(ControlWord.ENTRY, 14, "load IA32_PAT")
ENTRY_LOAD_IA32_EFER: Final = Control(ControlWord.ENTRY, 15, "load IA32_EFER")
ENTRY_LOAD_IA32_BNDCFGS: Final = Control(ControlWord.ENTRY, 16, "load IA32_BNDCFGS")
ENTRY_CONCEAL_VMX_FROM_PT: Final = Control(ControlWord.ENTRY, 17, "conceal VMX from PT")
ENTRY_LOAD_IA32_RTIT_CTL: Final = Control(ControlWord.ENTRY, 18, "load IA32_RTIT_CTL")
ENTRY_LOAD_UINV: Final = Control(ControlWord.ENTRY, 19, "load UINV")
ENTRY_LOAD_CET_STATE: Final = Control(ControlWord.ENTRY, 20, "load CET state")
ENTRY_LOAD_IA32_LBR_CTL: Final = Control(ControlWord.ENTRY, 21, "load guest IA32_LBR_CTL")
ENTRY_LOAD_PKRS: Final = Control(ControlWord.ENTRY, 22, "load PKRS")
ENTRY_LOAD_FRED: Final = Control(ControlWord.ENTRY, 23, "load FRED")
ENTRY_LOAD_IA32_SPEC_CTRL: Final = Control(ControlWord.ENTRY, 24, "load IA32_SPEC_CTRL")


CONTROLS: Final[tuple[Control, ...]] = (
    EXTERNAL_INTERRUPT_EXITING,
    NMI_EXITING,
    VIRTUAL_NMIS,
    ACTIVATE_VMX_PREEMPTION_TIMER,
    PROCESS_POSTED_INTERRUPTS,
    INTERRUPT_WINDOW_EXITING,
    USE_TSC_OFFSETTING,
    HLT_EXITING,
    INVLPG_EXITING,
    MWAIT_EXITING,
    RDPMC_EXITING,
    RDTSC_EXITING,
    CR3_LOAD_EXITING,
    CR3_STORE_EXITING,
    ACTIVATE_TERTIARY_CONTROLS,
    CR8_LOAD_EXITING,
    CR8_STORE_EXITING,
    USE_TPR_SHADOW,
    NMI_WINDOW_EXITING,
    MOV_DR_EXITING,
    UNCONDITIONAL_IO_EXITING,
    USE_IO_BITMAPS,
    MONITOR_TRAP_FLAG,
    USE_MSR_BITMAPS,
    MONITOR_EXITING,
    PAUSE_EXITING,
    ACTIVATE_SECONDARY_CONTROLS,
    VIRTUALIZE_APIC_ACCESSES,
    ENABLE_EPT,
    DESCRIPTOR_TABLE_EXITING,
    ENABLE_RDTSCP,
    VIRTUALIZE_X2APIC_MODE,
    ENABLE_VPID,
    WBINVD_EXITING,
    UNRESTRICTED_GUEST,
    APIC_REGISTER_VIRTUALIZATION,
    VIRTUAL_INTERRUPT_DELIVERY,
    PAUSE_LOOP_EXITING,
    RDRAND_EXITING,
    ENABLE_INVPCID,
    ENABLE_VM_FUNCTIONS,
    VMCS_SHADOWING,
    ENABLE_ENCLS_EXITING,
    RDSEED_EXITING,
    ENABLE_PML,
    EPT_VIOLATION_VE,
    CONCEAL_VMX_FROM_PT,
    ENABLE_XSAVES_XRSTORS,
    PASID_TRANSLATION,
    MODE_BASED_EXECUTE_CONTROL_FOR_EPT,
    SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,
    INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES,
    USE_TSC_SCALING,
    ENABLE_USER_WAIT_AND_PAUSE,
    ENABLE_PCONFIG,
    ENABLE_ENCLV_EXITING,
    VMM_BUS_LOCK_DETECTION,
    INSTRUCTION_TIMEOUT,
    LOADIWKEY_EXITING,
    ENABLE_HLAT,
    EPT_PAGING_WRITE_CONTROL,
    GUEST_PAGING_VERIFICATION,
    IPI_VIRTUALIZATION,
    ENABLE_MSR_LIST_INSTRUCTIONS,
    VIRTUALIZE_IA32_SPEC_CTRL,
    APIC_TIMER_VIRTUALIZATION,
    EXIT_SAVE_DEBUG_CONTROLS,
    EXIT_HOST_ADDRESS_SPACE_SIZE,
    EXIT_LOAD_IA32_PERF_GLOBAL_CTRL,
    EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT,
    EXIT_SAVE_IA32_PAT,
    EXIT_LOAD_IA32_PAT,
    EXIT_SAVE_IA32_EFER,
    EXIT_LOAD_IA32_EFER,
    EXIT_SAVE_VMX_PREEMPTION_TIMER_VALUE,
    EXIT_CLEAR_IA32_BNDCFGS,
    EXIT_CONCEAL_VMX_FROM_PT,
    EXIT_CLEAR_IA32_RTIT_CTL,
    EXIT_CLEAR_IA32_LBR_CTL,
    EXIT_CLEAR_UINV,
    EXIT_LOAD_CET_STATE,
    EXIT_LOAD_PKRS,
    EXIT_SAVE_IA32_PERF_GLOBAL_CTRL,
    EXIT_ACTIVATE_SECONDARY_CONTROLS,
    EXIT_SAVE_FRED,
    EXIT_LOAD_FRED,
    EXIT_LOAD_IA32_SPEC_CTRL,
    EXIT_PREMATURELY_BUSY_SHADOW_STACK,
    ENTRY_LOAD_DEBUG_CONTROLS,
    ENTRY_IA32E_MODE_GUEST,
    ENTRY_TO_SMM,
    ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT,
    ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL,
    ENTRY_LOAD_IA32_PAT,
    ENTRY_LOAD_IA32_EFER,
    ENTRY_LOAD_IA32_BNDCFGS,
    ENTRY_CONCEAL_VMX_FROM_PT,
    ENTRY_LOAD_IA32_RTIT_CTL,
    ENTRY_LOAD_UINV,
    ENTRY_LOAD_CET_STATE,
    ENTRY_LOAD_IA32_LBR_CTL,
    ENTRY_LOAD_PKRS,
    ENTRY_LOAD_FRED,
    ENTRY_LOAD_IA32_SPEC_CTRL,
)

BY_WORD: Final[Mapping[ControlWord, tuple[Control, ...]]] = MappingProxyType(
    {word: tuple(control for control in CONTROLS if control.word is word) for word in ControlWord}
)

# A control word counts as zero while its gate is clear. Nothing gates the others.
GATES: Final[Mapping[ControlWord, Control]] = MappingProxyType(
    {
        ControlWord.SECONDARY: ACTIVATE_SECONDARY_CONTROLS,
        ControlWord.TERTIARY: ACTIVATE_TERTIARY_CONTROLS,
        ControlWord.SECONDARY_EXIT: EXIT_ACTIVATE_SECONDARY_CONTROLS,
    }
)

BY_BIT: Final[Mapping[tuple[ControlWord, int], Control]] = MappingProxyType({(c.word, c.bit): c for c in CONTROLS})


def describe_controls(word: ControlWord, value: int) -> str:
    """The controls set in ``value`` by name; bits without a name as bit numbers."""
    known = [BY_BIT[word, number] for number in bit_numbers(value) if (word, number) in BY_BIT]
    words = [str(control) for control in known]
    if unnamed := value & ~sum(control.mask for control in known):
        words.append(describe_bits(unnamed))
    return ", ".join(words) or "none"
