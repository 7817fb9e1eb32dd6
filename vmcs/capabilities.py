"""The capability MSRs of a processor, decoded: which controls, fields and values its VMX supports.

Everything that depends on the processor in this package depends on it through `Capabilities`, built once from the
values of the MSRs of a CPU profile.

Spec: SDM Vol. 3, "VMX Capability Reporting Facility".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from attrs import field, frozen

from vmcs.bits import MASK32, MASK64, Layout, Slice, flags, mask
from vmcs.controls import Control, ControlWord
from vmcs.fields import FIELDS, HIGH_ACCESS, Condition, Field


class CapabilityMsr(enum.IntEnum):
    """Indexes of the capability MSRs."""

    BASIC = 0x480
    PINBASED_CTLS = 0x481
    PROCBASED_CTLS = 0x482
    EXIT_CTLS = 0x483
    ENTRY_CTLS = 0x484
    MISC = 0x485
    CR0_FIXED0 = 0x486
    CR0_FIXED1 = 0x487
    CR4_FIXED0 = 0x488
    CR4_FIXED1 = 0x489
    VMCS_ENUM = 0x48A
    PROCBASED_CTLS2 = 0x48B
    EPT_VPID_CAP = 0x48C
    TRUE_PINBASED_CTLS = 0x48D
    TRUE_PROCBASED_CTLS = 0x48E
    TRUE_EXIT_CTLS = 0x48F
    TRUE_ENTRY_CTLS = 0x490
    VMFUNC = 0x491
    PROCBASED_CTLS3 = 0x492
    EXIT_CTLS2 = 0x493


WRITE_BACK: Final = 6
UNCACHEABLE: Final = 0

BASIC: Final = Layout(
    "IA32_VMX_BASIC",
    64,
    (
        Slice("VMCS revision identifier", 0, 31),
        Slice("VMXON and VMCS region size", 32, 13),
        Slice("physical addresses limited to 32 bits", 48),
        Slice("dual-monitor treatment of SMM", 49),
        Slice("VMCS memory type", 50, 4, {UNCACHEABLE: "uncacheable", WRITE_BACK: "write-back"}),
        Slice("INS and OUTS instruction information", 54),
        Slice("default1 controls may be 0", 55),
        Slice("hardware exceptions injected with any error-code setting", 56),
        Slice("nested-exception support", 58),
    ),
)

MISC: Final = Layout(
    "IA32_VMX_MISC",
    64,
    (
        Slice("preemption-timer rate", 0, 5),
        Slice("VM exits store EFER.LMA into IA-32e mode guest", 5),
        Slice("activity state HLT", 6),
        Slice("activity state shutdown", 7),
        Slice("activity state wait-for-SIPI", 8),
        Slice("Intel PT in VMX operation", 14),
        Slice("RDMSR of IA32_SMBASE in SMM", 15),
        Slice("CR3-target values", 16, 9),
        Slice("recommended MSR-list maximum", 25, 3),
        Slice("IA32_SMM_MONITOR_CTL bit 2", 28),
        Slice("VMWRITE to any supported field", 29),
        Slice("injection with instruction length 0", 30),
        Slice("MSEG revision identifier", 32, 32),
    ),
)

EPT_VPID: Final = Layout(
    "IA32_VMX_EPT_VPID_CAP",
    64,
    (
        *flags(
            (
                (0, "execute-only translations"),
                (6, "page-walk length 4"),
                (7, "page-walk length 5"),
                (8, "uncacheable paging structures"),
                (14, "write-back paging structures"),
                (16, "2-MByte pages"),
                (17, "1-GByte pages"),
                (20, "INVEPT"),
                (21, "accessed and dirty flags"),
                (22, "advanced VM-exit information for EPT violations"),
                (23, "supervisor shadow-stack control"),
                (25, "single-context INVEPT"),
                (26, "all-context INVEPT"),
                (32, "INVVPID"),
                (40, "individual-address INVVPID"),
                (41, "single-context INVVPID"),
                (42, "all-context INVVPID"),
                (43, "single-context-retaining-globals INVVPID"),
            )
        ),
        Slice("maximum HLAT prefix size", 48, 6),
    ),
)

# The MSR that reports each word, and the one that replaces it when IA32_VMX_BASIC bit 55 is 1. The last two report
# allowed 1-settings only, 64 bits wide; every bit of those words may be 0.
_WORD_MSRS: Final[Mapping[ControlWord, tuple[CapabilityMsr, CapabilityMsr]]] = {
    ControlWord.PIN_BASED: (CapabilityMsr.PINBASED_CTLS, CapabilityMsr.TRUE_PINBASED_CTLS),
    ControlWord.PRIMARY: (CapabilityMsr.PROCBASED_CTLS, CapabilityMsr.TRUE_PROCBASED_CTLS),
    ControlWord.EXIT: (CapabilityMsr.EXIT_CTLS, CapabilityMsr.TRUE_EXIT_CTLS),
    ControlWord.ENTRY: (CapabilityMsr.ENTRY_CTLS, CapabilityMsr.TRUE_ENTRY_CTLS),
    ControlWord.SECONDARY: (CapabilityMsr.PROCBASED_CTLS2, CapabilityMsr.PROCBASED_CTLS2),
    ControlWord.TERTIARY: (CapabilityMsr.PROCBASED_CTLS3, CapabilityMsr.PROCBASED_CTLS3),
    ControlWord.SECONDARY_EXIT: (CapabilityMsr.EXIT_CTLS2, CapabilityMsr.EXIT_CTLS2),
}


@frozen
class AllowedSettings:
    """What a control word may hold: bits of ``must_be_1`` have to be set, bits outside ``may_be_1`` clear."""

    must_be_1: int
    may_be_1: int

    def violations(self, value: int) -> int:
        """The bits of ``value`` that the processor does not allow as they are."""
        return (self.must_be_1 & ~value) | (value & ~self.may_be_1)

    def repair(self, value: int) -> int:
        """The allowed value nearest to ``value``."""
        return (value | self.must_be_1) & self.may_be_1


def _allowed_settings(msrs: Mapping[int, int], word: ControlWord, true_controls: bool) -> AllowedSettings:
    value = msrs.get(_WORD_MSRS[word][true_controls], 0) & MASK64
    if word.width == 64:
        return AllowedSettings(0, value)
    return AllowedSettings(value & MASK32, value >> 32)


def _frozen_copy(msrs: Mapping[int, int]) -> Mapping[int, int]:
    return MappingProxyType(dict(msrs))


@frozen(eq=False)
class Capabilities:
    """The VMX capabilities of one processor; ``msrs`` maps MSR indexes to 64-bit values, absent ones reading as 0.

    ``fields`` maps every encoding VMREAD accepts, high accesses included, to its field.
    """

    msrs: Mapping[int, int] = field(repr=False, converter=_frozen_copy)
    basic: int = field(init=False)
    misc: int = field(init=False)
    ept_vpid: int = field(init=False)
    vm_functions: int = field(init=False)
    allowed: Mapping[ControlWord, AllowedSettings] = field(init=False, repr=False)
    fields: Mapping[int, Field] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        def set_once(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        set_once("basic", self.msr(CapabilityMsr.BASIC))
        set_once("misc", self.msr(CapabilityMsr.MISC))
        set_once("ept_vpid", self.msr(CapabilityMsr.EPT_VPID_CAP))
        set_once("vm_functions", self.msr(CapabilityMsr.VMFUNC))
        true_controls = bool(BASIC.get(self.basic, "default1 controls may be 0"))
        set_once("allowed", {word: _allowed_settings(self.msrs, word, true_controls) for word in ControlWord})
        present: dict[int, Field] = {}
        for each in FIELDS:
            if self.meets(each.exists):
                present[each.encoding] = each
                if each.high is not None:
                    present[each.encoding | HIGH_ACCESS] = each
        set_once("fields", present)

    def msr(self, index: CapabilityMsr) -> int:
        """The value of a capability MSR."""
        return self.msrs.get(index, 0) & MASK64

    # Controls

    def allows(self, control: Control) -> bool:
        """Whether the control may be 1."""
        return bool(self.allowed[control.word].may_be_1 & control.mask)

    def requires(self, control: Control) -> bool:
        """Whether the control must be 1."""
        return bool(self.allowed[control.word].must_be_1 & control.mask)

    def reserved_violations(self, word: ControlWord, value: int) -> int:
        """The bits of a control word that this processor does not allow as they are; 0 for an allowed value."""
        return self.allowed[word].violations(value)

    # Fields

    def meets(self, condition: Condition) -> bool:
        """Whether a field with this existence condition is there."""
        if condition.vm_function is not None:
            return bool(self.vm_functions >> condition.vm_function & 1)
        if condition.cr3_targets:
            return self.cr3_targets >= condition.cr3_targets
        return not condition.any_of or any(self.allows(control) for control in condition.any_of)

    def has(self, vmcs_field: Field) -> bool:
        """Whether the VMCS of this processor has the field."""
        return vmcs_field.encoding in self.fields

    @property
    def highest_index(self) -> int:
        """The highest index of any field there is: what bits 9:1 of IA32_VMX_VMCS_ENUM ought to say."""
        return max(each.index for each in self.fields.values())

    # IA32_VMX_BASIC

    @property
    def revision_identifier(self) -> int:
        """The 31-bit VMCS revision identifier."""
        return self.basic & mask(31)

    @property
    def region_size(self) -> int:
        """Bytes to allocate for a VMXON or VMCS region; at most 4096."""
        return BASIC.get(self.basic, "VMXON and VMCS region size")

    @property
    def addresses_limited_to_32_bits(self) -> bool:
        """Whether addresses in VMX structures must fit 32 bits."""
        return bool(BASIC.get(self.basic, "physical addresses limited to 32 bits"))

    @property
    def dual_monitor(self) -> bool:
        """Whether the dual-monitor treatment of SMIs and SMM is supported."""
        return bool(BASIC.get(self.basic, "dual-monitor treatment of SMM"))

    @property
    def memory_type(self) -> int:
        """The memory type of VMX structures: 0 uncacheable, 6 write-back."""
        return BASIC.get(self.basic, "VMCS memory type")

    @property
    def ins_outs_information(self) -> bool:
        """Whether exits of INS and OUTS fill the VM-exit instruction information."""
        return bool(BASIC.get(self.basic, "INS and OUTS instruction information"))

    @property
    def any_error_code_setting(self) -> bool:
        """Whether a hardware exception may be injected with or without an error code, whatever its vector."""
        return bool(BASIC.get(self.basic, "hardware exceptions injected with any error-code setting"))

    @property
    def nested_exceptions(self) -> bool:
        """Whether event injection and VM exits know nested exceptions (FRED)."""
        return bool(BASIC.get(self.basic, "nested-exception support"))

    # IA32_VMX_MISC

    @property
    def preemption_timer_shift(self) -> int:
        """The VMX-preemption timer counts down whenever this bit of the TSC changes."""
        return MISC.get(self.misc, "preemption-timer rate")

    @property
    def stores_ia32e_mode_guest(self) -> bool:
        """Whether VM exits store EFER.LMA into the "IA-32e mode guest" control."""
        return bool(MISC.get(self.misc, "VM exits store EFER.LMA into IA-32e mode guest"))

    def supports_activity_state(self, state: int) -> bool:
        """Whether VM entry may load activity state ``state`` (0 active to 3 wait-for-SIPI)."""
        return state == 0 or (state in (1, 2, 3) and bool(self.misc >> (5 + state) & 1))

    @property
    def cr3_targets(self) -> int:
        """The number of CR3-target values."""
        return MISC.get(self.misc, "CR3-target values")

    @property
    def msr_list_maximum(self) -> int:
        """The recommended maximum number of entries of each MSR list."""
        return 512 * (MISC.get(self.misc, "recommended MSR-list maximum") + 1)

    @property
    def vmwrite_any_field(self) -> bool:
        """Whether VMWRITE may write VM-exit information fields."""
        return bool(MISC.get(self.misc, "VMWRITE to any supported field"))

    @property
    def injection_with_length_0(self) -> bool:
        """Whether software events may be injected with VM-entry instruction length 0."""
        return bool(MISC.get(self.misc, "injection with instruction length 0"))

    # CR0 and CR4

    @property
    def cr0_must_be_1(self) -> int:
        """Bits of CR0 fixed to 1 in VMX operation."""
        return self.msr(CapabilityMsr.CR0_FIXED0)

    @property
    def cr0_may_be_1(self) -> int:
        """Bits of CR0 that may be 1 in VMX operation."""
        return self.msr(CapabilityMsr.CR0_FIXED1)

    @property
    def cr4_must_be_1(self) -> int:
        """Bits of CR4 fixed to 1 in VMX operation."""
        return self.msr(CapabilityMsr.CR4_FIXED0)

    @property
    def cr4_may_be_1(self) -> int:
        """Bits of CR4 that may be 1 in VMX operation."""
        return self.msr(CapabilityMsr.CR4_FIXED1)

    # IA32_VMX_EPT_VPID_CAP

    def supports(self, name: str) -> bool:
        """Whether a bit of IA32_VMX_EPT_VPID_CAP is 1, by its name in the layout `EPT_VPID`."""
        return bool(EPT_VPID.get(self.ept_vpid, name))
