"""Checks on the host-state area, made before the guest runs so that a VM exit can load it blindly.

All of them end in VMfailValid(8).

Spec: SDM Vol. 3, "VM Entries", "Checks on Host Control Registers, MSRs, and SSP", "Checks on Host Segment and
Descriptor-Table Registers", "Checks Related to Address-Space Size".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.bits import bit_range
from vmcs.exits import InstructionError
from vmcs.fields import Field
from vmcs.refs import Reference, sdm
from vmcs.rules import shapes as s
from vmcs.rules import state
from vmcs.rules.model import ALWAYS, Condition, Demand, FailValid, Rule

REGISTERS: Final = sdm("VM Entries", "Checks on Host Control Registers, MSRs, and SSP")
SEGMENTS: Final = sdm("VM Entries", "Checks on Host Segment and Descriptor-Table Registers")
ADDRESS_SPACE: Final = sdm("VM Entries", "Checks Related to Address-Space Size")

_OUTCOME = FailValid(InstructionError.VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS)

_CR0_WP = 1 << 16
_CR4_PAE = 1 << 5
_CR4_PCIDE = 1 << 17
_CR4_CET = 1 << 23
_CR4_FRED = 1 << 32


def _rule(name: str, sentence: str, demand: Demand, when: Condition = ALWAYS, ref: Reference = REGISTERS) -> Rule:
    return Rule(f"host.{name}", sentence, demand, ref, _OUTCOME, when)


_HOST_64 = s.on(c.EXIT_HOST_ADDRESS_SPACE_SIZE)
_HOST_32 = s.off(c.EXIT_HOST_ADDRESS_SPACE_SIZE)
_LOAD_CET = s.on(c.EXIT_LOAD_CET_STATE)
_LOAD_FRED = s.on(c.EXIT_LOAD_FRED)
_ENTERED_IN_LONG_MODE = s.context_is("IA32_EFER.LMA is 1 at VM entry", lambda context: context.host_long_mode)
_ENTERED_IN_32_BITS = s.context_is("IA32_EFER.LMA is 0 at VM entry", lambda context: not context.host_long_mode)

_REGISTER_RULES: Final[tuple[Rule, ...]] = (
    _rule(
        "cr0-fixed",
        "CR0 has the bits that VMX operation fixes",
        s.fixed_bits(
            f.HOST_CR0,
            lambda context: context.capabilities.cr0_must_be_1,
            lambda context: context.capabilities.cr0_may_be_1,
        ),
    ),
    _rule(
        "cr4-fixed",
        "CR4 has the bits that VMX operation fixes, and none the processor lacks",
        s.fixed_bits(
            f.HOST_CR4,
            lambda context: context.capabilities.cr4_must_be_1,
            lambda context: context.capabilities.cr4_may_be_1,
        ),
    ),
    _rule(
        "cet-needs-write-protect",
        "CR0.WP is 1",
        s.bits_required(f.HOST_CR0, _CR0_WP),
        s.bit_set(f.HOST_CR4, _CR4_CET, "CR4.CET is 1"),
    ),
    _rule("cr3-width", "CR3 is within the physical-address width", s.bits_clear(f.HOST_CR3, state.cr3_reserved)),
    _rule("sysenter-esp-canonical", "IA32_SYSENTER_ESP is canonical", s.canonical(f.HOST_IA32_SYSENTER_ESP)),
    _rule("sysenter-eip-canonical", "IA32_SYSENTER_EIP is canonical", s.canonical(f.HOST_IA32_SYSENTER_EIP)),
    _rule(
        "perf-global-ctrl-reserved",
        "the reserved bits of IA32_PERF_GLOBAL_CTRL are 0",
        s.bits_clear(f.HOST_IA32_PERF_GLOBAL_CTRL, lambda context: context.perf_global_ctrl_reserved),
        s.on(c.EXIT_LOAD_IA32_PERF_GLOBAL_CTRL),
    ),
    _rule(
        "pat-memory-types",
        "every byte of IA32_PAT is a memory type",
        s.page_attribute_table(f.HOST_IA32_PAT),
        s.on(c.EXIT_LOAD_IA32_PAT),
    ),
    _rule(
        "efer-reserved",
        "the reserved bits of IA32_EFER are 0",
        s.bits_clear(f.HOST_IA32_EFER, lambda context: context.efer_reserved),
        s.on(c.EXIT_LOAD_IA32_EFER),
    ),
    _rule(
        "efer-address-space-size",
        f"LMA and LME of IA32_EFER both equal {c.EXIT_HOST_ADDRESS_SPACE_SIZE}",
        state.efer_matches(f.HOST_IA32_EFER, c.EXIT_HOST_ADDRESS_SPACE_SIZE, state.EFER_LMA | state.EFER_LME),
        s.on(c.EXIT_LOAD_IA32_EFER),
    ),
    _rule(
        "s-cet-reserved",
        "the reserved bits of IA32_S_CET are 0",
        s.bits_clear(f.HOST_IA32_S_CET, lambda context: context.s_cet_reserved),
        _LOAD_CET,
    ),
    _rule("s-cet-canonical", "the bitmap base in IA32_S_CET is canonical", s.canonical(f.HOST_IA32_S_CET), _LOAD_CET),
    _rule(
        "s-cet-tracker",
        "SUPPRESS and TRACKER of IA32_S_CET are not both 1",
        state.suppress_excludes_tracker(f.HOST_IA32_S_CET),
        _LOAD_CET,
    ),
    _rule("ssp-aligned", "bits 1:0 of SSP are 0", s.bits_clear(f.HOST_SSP, 3), _LOAD_CET),
    _rule("ssp-canonical", "SSP is canonical", s.canonical(f.HOST_SSP), _LOAD_CET),
    _rule(
        "interrupt-ssp-table-canonical",
        "IA32_INTERRUPT_SSP_TABLE_ADDR is canonical",
        s.canonical(f.HOST_IA32_INTERRUPT_SSP_TABLE_ADDR),
        _LOAD_CET,
    ),
    _rule(
        "pkrs-width",
        "bits 63:32 of IA32_PKRS are 0",
        s.bits_clear(f.HOST_IA32_PKRS, bit_range(63, 32)),
        s.on(c.EXIT_LOAD_PKRS),
    ),
    _rule(
        "spec-ctrl-reserved",
        "the reserved bits of IA32_SPEC_CTRL are 0",
        s.bits_clear(f.HOST_IA32_SPEC_CTRL, lambda context: context.spec_ctrl_reserved),
        s.on(c.EXIT_LOAD_IA32_SPEC_CTRL),
    ),
    *(
        _rule(f"fred-{name}", sentence, demand, _LOAD_FRED)
        for name, sentence, demand in state.fred_demands(
            f.HOST_IA32_FRED_CONFIG,
            (f.HOST_IA32_FRED_RSP1, f.HOST_IA32_FRED_RSP2, f.HOST_IA32_FRED_RSP3),
            (f.HOST_IA32_FRED_SSP1, f.HOST_IA32_FRED_SSP2, f.HOST_IA32_FRED_SSP3),
        )
    ),
)

_SELECTORS: Final[tuple[tuple[str, Field], ...]] = (
    ("cs", f.HOST_CS_SELECTOR),
    ("ss", f.HOST_SS_SELECTOR),
    ("ds", f.HOST_DS_SELECTOR),
    ("es", f.HOST_ES_SELECTOR),
    ("fs", f.HOST_FS_SELECTOR),
    ("gs", f.HOST_GS_SELECTOR),
    ("tr", f.HOST_TR_SELECTOR),
)

_BASES: Final[tuple[tuple[str, Field], ...]] = (
    ("fs", f.HOST_FS_BASE),
    ("gs", f.HOST_GS_BASE),
    ("gdtr", f.HOST_GDTR_BASE),
    ("idtr", f.HOST_IDTR_BASE),
    ("tr", f.HOST_TR_BASE),
)

_SEGMENT_RULES: Final[tuple[Rule, ...]] = (
    *(
        _rule(
            f"{name}-selector", f"RPL and TI of the {name.upper()} selector are 0", s.bits_clear(field, 7), ref=SEGMENTS
        )
        for name, field in _SELECTORS
    ),
    _rule("cs-not-null", "the CS selector is not 0", state.selector_not_null(f.HOST_CS_SELECTOR), ref=SEGMENTS),
    _rule("tr-not-null", "the TR selector is not 0", state.selector_not_null(f.HOST_TR_SELECTOR), ref=SEGMENTS),
    _rule("ss-not-null", "the SS selector is not 0", state.selector_not_null(f.HOST_SS_SELECTOR), _HOST_32, SEGMENTS),
    *(
        _rule(f"{name}-base-canonical", f"the {name.upper()} base is canonical", s.canonical(field), ref=SEGMENTS)
        for name, field in _BASES
    ),
)

_ADDRESS_SPACE_RULES: Final[tuple[Rule, ...]] = (
    _rule(
        "long-mode-host-stays",
        f"{c.EXIT_HOST_ADDRESS_SPACE_SIZE} is 1",
        s.control_on(c.EXIT_HOST_ADDRESS_SPACE_SIZE, because=c.EXIT_HOST_ADDRESS_SPACE_SIZE),
        _ENTERED_IN_LONG_MODE,
        ADDRESS_SPACE,
    ),
    _rule(
        "legacy-host-stays",
        f"{c.EXIT_HOST_ADDRESS_SPACE_SIZE} is 0",
        s.control_off(c.EXIT_HOST_ADDRESS_SPACE_SIZE),
        _ENTERED_IN_32_BITS,
        ADDRESS_SPACE,
    ),
    _rule(
        "legacy-host-has-legacy-guest",
        f"{c.ENTRY_IA32E_MODE_GUEST} is 0",
        s.control_off(c.ENTRY_IA32E_MODE_GUEST),
        _ENTERED_IN_32_BITS,
        ADDRESS_SPACE,
    ),
    _rule(
        "32-bit-host-has-legacy-guest",
        f"{c.ENTRY_IA32E_MODE_GUEST} is 0",
        s.control_off(c.ENTRY_IA32E_MODE_GUEST),
        _HOST_32,
        ADDRESS_SPACE,
    ),
    _rule("32-bit-host-pcid", "CR4.PCIDE is 0", s.bits_clear(f.HOST_CR4, _CR4_PCIDE), _HOST_32, ADDRESS_SPACE),
    _rule("32-bit-host-fred", "CR4.FRED is 0", s.bits_clear(f.HOST_CR4, _CR4_FRED), _HOST_32, ADDRESS_SPACE),
    _rule(
        "32-bit-host-rip",
        "bits 63:32 of RIP are 0",
        s.bits_clear(f.HOST_RIP, bit_range(63, 32)),
        _HOST_32,
        ADDRESS_SPACE,
    ),
    _rule("64-bit-host-pae", "CR4.PAE is 1", s.bits_required(f.HOST_CR4, _CR4_PAE), _HOST_64, ADDRESS_SPACE),
    _rule("64-bit-host-rip", "RIP is canonical", s.canonical(f.HOST_RIP), _HOST_64, ADDRESS_SPACE),
)

RULES: Final[tuple[Rule, ...]] = (*_REGISTER_RULES, *_SEGMENT_RULES, *_ADDRESS_SPACE_RULES)
