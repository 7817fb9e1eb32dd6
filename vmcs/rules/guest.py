"""Checks on guest control registers, debug registers, MSRs, descriptor tables, RIP, RFLAGS and SSP.

They end in a VM exit with basic exit reason 33 and exit qualification 0. Segment registers and non-register state have
modules of their own: `vmcs.rules.guest_segments`, `vmcs.rules.guest_non_register`.

Spec: SDM Vol. 3, "VM Entries", "Checks on Guest Control Registers, Debug Registers, and MSRs", "Checks on Guest
Descriptor-Table Registers", "Checks on Guest RIP, RFLAGS, and SSP".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs import layouts
from vmcs.bits import MASK64, bit_range, canonicalize, is_canonical
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.refs import Reference, sdm
from vmcs.rules import shapes as s
from vmcs.rules import state
from vmcs.rules.model import ALWAYS, Condition, Demand, EntryContext, EntryFails, Rule

REGISTERS: Final = sdm("VM Entries", "Checks on Guest Control Registers, Debug Registers, and MSRs")
DESCRIPTOR_TABLES: Final = sdm("VM Entries", "Checks on Guest Descriptor-Table Registers")
RIP_RFLAGS: Final = sdm("VM Entries", "Checks on Guest RIP, RFLAGS, and SSP")

_OUTCOME = EntryFails(Reason.ENTRY_FAILURE_GUEST_STATE)

_CR0_PE = 1 << 0
_CR0_WP = 1 << 16
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_CR4_PCIDE = 1 << 17
_CR4_CET = 1 << 23
_CR4_FRED = 1 << 32
_RFLAGS_IF = 1 << 9
_RFLAGS_IOPL = 3 << 12
_RFLAGS_VM = 1 << 17
_CS_L = 1 << 13

IA32E_GUEST: Final = s.on(c.ENTRY_IA32E_MODE_GUEST)
LEGACY_GUEST: Final = s.off(c.ENTRY_IA32E_MODE_GUEST)
GUEST_IN_64_BIT_MODE: Final = s.every(IA32E_GUEST, s.bit_set(f.GUEST_CS_ACCESS_RIGHTS, _CS_L, "the L bit of CS is 1"))
GUEST_NOT_IN_64_BIT_MODE: Final = s.negation(GUEST_IN_64_BIT_MODE, "the guest is not in 64-bit mode")
PAGING: Final = s.bit_set(f.GUEST_CR0, _CR0_PG, "CR0.PG is 1")
NO_PROTECTION: Final = s.bits_equal(f.GUEST_CR0, _CR0_PE, 0, "CR0.PE is 0")
FRED: Final = s.bit_set(f.GUEST_CR4, _CR4_FRED, "CR4.FRED is 1")
FRED_IN_USER_MODE: Final = s.every(FRED, s.bits_equal(f.GUEST_SS_ACCESS_RIGHTS, 3 << 5, 3 << 5, "the DPL of SS is 3"))
UNRESTRICTED: Final = s.on(c.UNRESTRICTED_GUEST)
_unrestricted = s.test_of(UNRESTRICTED)


def _rule(name: str, sentence: str, demand: Demand, when: Condition = ALWAYS, ref: Reference = REGISTERS) -> Rule:
    return Rule(f"guest.{name}", sentence, demand, ref, _OUTCOME, when)


# ---- CR0: the fixed bits depend on "unrestricted guest"


def _cr0_must_be_1(context: EntryContext) -> int:
    fixed = context.capabilities.cr0_must_be_1
    return fixed & ~(_CR0_PE | _CR0_PG) if _unrestricted(context) else fixed


def _cr0_demand() -> Demand:
    plain = s.fixed_bits(f.GUEST_CR0, _cr0_must_be_1, lambda context: context.capabilities.cr0_may_be_1)
    return Demand((f.GUEST_CR0, *UNRESTRICTED.reads), plain.holds, plain.repair, plain.faulty, legal=plain.legal)


# ---- IA32_BNDCFGS


def _bound_configuration() -> Demand:
    def fixed(context: EntryContext) -> int:
        return canonicalize(context.vmcs[f.GUEST_IA32_BNDCFGS], context.linear_address_width) & ~bit_range(11, 2)

    def holds(context: EntryContext) -> bool:
        value = context.vmcs[f.GUEST_IA32_BNDCFGS]
        return not value & bit_range(11, 2) and is_canonical(value, context.linear_address_width)

    def repair(context: EntryContext) -> None:
        context.vmcs[f.GUEST_IA32_BNDCFGS] = fixed(context)

    return Demand(
        (f.GUEST_IA32_BNDCFGS,),
        holds,
        repair,
        lambda context: ((f.GUEST_IA32_BNDCFGS, context.vmcs[f.GUEST_IA32_BNDCFGS] ^ fixed(context)),),
    )


_LOAD_CET = s.on(c.ENTRY_LOAD_CET_STATE)
_LOAD_DEBUG = s.on(c.ENTRY_LOAD_DEBUG_CONTROLS)
_LOAD_EFER = s.on(c.ENTRY_LOAD_IA32_EFER)
_LOAD_FRED = s.on(c.ENTRY_LOAD_FRED)


def _efer_lme_matches_lma() -> Demand:
    def repair(context: EntryContext) -> None:
        value = context.vmcs[f.GUEST_IA32_EFER]
        context.vmcs[f.GUEST_IA32_EFER] = value | state.EFER_LME if value & state.EFER_LMA else value & ~state.EFER_LME

    return Demand(
        (f.GUEST_IA32_EFER,),
        lambda context: (
            bool(context.vmcs[f.GUEST_IA32_EFER] & state.EFER_LMA)
            == bool(context.vmcs[f.GUEST_IA32_EFER] & state.EFER_LME)
        ),
        repair,
        lambda context: ((f.GUEST_IA32_EFER, state.EFER_LME),),
        legal=lambda context: f"bits 10 and 8 of {f.GUEST_IA32_EFER.name} are equal",
    )


_REGISTER_RULES: Final[tuple[Rule, ...]] = (
    _rule(
        "cr0-fixed",
        "CR0 has the bits that VMX operation fixes; an unrestricted guest may clear PE and PG",
        _cr0_demand(),
    ),
    _rule("paging-needs-protection", "CR0.PE is 1", s.bits_required(f.GUEST_CR0, _CR0_PE), PAGING),
    _rule(
        "cr4-fixed",
        "CR4 has the bits that VMX operation fixes, and none the processor lacks",
        s.fixed_bits(
            f.GUEST_CR4,
            lambda context: context.capabilities.cr4_must_be_1,
            lambda context: context.capabilities.cr4_may_be_1,
        ),
    ),
    _rule(
        "cet-needs-write-protect",
        "CR0.WP is 1",
        s.bits_required(f.GUEST_CR0, _CR0_WP),
        s.bit_set(f.GUEST_CR4, _CR4_CET, "CR4.CET is 1"),
    ),
    _rule(
        "debugctl-reserved",
        "the reserved bits of IA32_DEBUGCTL are 0",
        s.bits_clear(f.GUEST_IA32_DEBUGCTL, lambda context: context.debugctl_reserved),
        _LOAD_DEBUG,
    ),
    _rule("ia32e-mode-paging", "CR0.PG is 1", s.bits_required(f.GUEST_CR0, _CR0_PG), IA32E_GUEST),
    _rule("ia32e-mode-pae", "CR4.PAE is 1", s.bits_required(f.GUEST_CR4, _CR4_PAE), IA32E_GUEST),
    _rule("legacy-mode-pcid", "CR4.PCIDE is 0", s.bits_clear(f.GUEST_CR4, _CR4_PCIDE), LEGACY_GUEST),
    _rule("legacy-mode-fred", "CR4.FRED is 0", s.bits_clear(f.GUEST_CR4, _CR4_FRED), LEGACY_GUEST),
    _rule(
        "cr3-width",
        "CR3 is within the physical-address width",
        s.bits_clear(f.GUEST_CR3, state.cr3_reserved),
        IA32E_GUEST,
    ),
    _rule(
        "legacy-mode-cr3-width",
        "CR3 is within the physical-address width",
        s.bits_clear(f.GUEST_CR3, lambda context: context.beyond_width),
        LEGACY_GUEST,
    ),
    _rule("dr7-width", "bits 63:32 of DR7 are 0", state.upper_half_clear(f.GUEST_DR7), _LOAD_DEBUG),
    _rule("sysenter-esp-canonical", "IA32_SYSENTER_ESP is canonical", s.canonical(f.GUEST_IA32_SYSENTER_ESP)),
    _rule("sysenter-eip-canonical", "IA32_SYSENTER_EIP is canonical", s.canonical(f.GUEST_IA32_SYSENTER_EIP)),
    _rule(
        "s-cet-reserved",
        "the reserved bits of IA32_S_CET are 0",
        s.bits_clear(f.GUEST_IA32_S_CET, lambda context: context.s_cet_reserved),
        _LOAD_CET,
    ),
    _rule("s-cet-canonical", "the bitmap base in IA32_S_CET is canonical", s.canonical(f.GUEST_IA32_S_CET), _LOAD_CET),
    _rule(
        "s-cet-tracker",
        "SUPPRESS and TRACKER of IA32_S_CET are not both 1",
        state.suppress_excludes_tracker(f.GUEST_IA32_S_CET),
        _LOAD_CET,
    ),
    _rule(
        "interrupt-ssp-table-canonical",
        "IA32_INTERRUPT_SSP_TABLE_ADDR is canonical",
        s.canonical(f.GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR),
        _LOAD_CET,
    ),
    _rule(
        "perf-global-ctrl-reserved",
        "the reserved bits of IA32_PERF_GLOBAL_CTRL are 0",
        s.bits_clear(f.GUEST_IA32_PERF_GLOBAL_CTRL, lambda context: context.perf_global_ctrl_reserved),
        s.on(c.ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL),
    ),
    _rule(
        "pat-memory-types",
        "every byte of IA32_PAT is a memory type",
        s.page_attribute_table(f.GUEST_IA32_PAT),
        s.on(c.ENTRY_LOAD_IA32_PAT),
    ),
    _rule(
        "efer-reserved",
        "the reserved bits of IA32_EFER are 0",
        s.bits_clear(f.GUEST_IA32_EFER, lambda context: context.efer_reserved),
        _LOAD_EFER,
    ),
    _rule(
        "efer-lma",
        f"IA32_EFER.LMA equals {c.ENTRY_IA32E_MODE_GUEST}",
        state.efer_matches(f.GUEST_IA32_EFER, c.ENTRY_IA32E_MODE_GUEST, state.EFER_LMA),
        _LOAD_EFER,
    ),
    _rule("efer-lme", "LME and LMA of IA32_EFER are equal", _efer_lme_matches_lma(), s.every(_LOAD_EFER, PAGING)),
    _rule(
        "bndcfgs",
        "bits 11:2 of IA32_BNDCFGS are 0 and the bound-directory base is canonical",
        _bound_configuration(),
        s.on(c.ENTRY_LOAD_IA32_BNDCFGS),
    ),
    _rule(
        "rtit-ctl-reserved",
        "the reserved bits of IA32_RTIT_CTL are 0",
        s.bits_clear(f.GUEST_IA32_RTIT_CTL, lambda context: context.rtit_ctl_reserved),
        s.on(c.ENTRY_LOAD_IA32_RTIT_CTL),
    ),
    _rule(
        "lbr-ctl-reserved",
        "the reserved bits of IA32_LBR_CTL are 0",
        s.bits_clear(f.GUEST_IA32_LBR_CTL, lambda context: context.lbr_ctl_reserved),
        s.on(c.ENTRY_LOAD_IA32_LBR_CTL),
    ),
    _rule(
        "pkrs-width",
        "bits 63:32 of IA32_PKRS are 0",
        state.upper_half_clear(f.GUEST_IA32_PKRS),
        s.on(c.ENTRY_LOAD_PKRS),
    ),
    _rule(
        "uinv-width", "bits 15:8 of UINV are 0", s.bits_clear(f.GUEST_UINV, bit_range(15, 8)), s.on(c.ENTRY_LOAD_UINV)
    ),
    _rule(
        "spec-ctrl-reserved",
        "the reserved bits of IA32_SPEC_CTRL are 0",
        s.bits_clear(f.GUEST_IA32_SPEC_CTRL, lambda context: context.spec_ctrl_reserved),
        s.on(c.ENTRY_LOAD_IA32_SPEC_CTRL),
    ),
    *(
        _rule(f"fred-{name}", sentence, demand, _LOAD_FRED)
        for name, sentence, demand in state.fred_demands(
            f.GUEST_IA32_FRED_CONFIG,
            (f.GUEST_IA32_FRED_RSP1, f.GUEST_IA32_FRED_RSP2, f.GUEST_IA32_FRED_RSP3),
            (f.GUEST_IA32_FRED_SSP1, f.GUEST_IA32_FRED_SSP2, f.GUEST_IA32_FRED_SSP3),
        )
    ),
)


def _table_rules(name: str, base: Field, limit: Field) -> tuple[Rule, Rule]:
    return (
        _rule(
            f"{name}-base-canonical", f"the {name.upper()} base is canonical", s.canonical(base), ref=DESCRIPTOR_TABLES
        ),
        _rule(
            f"{name}-limit",
            f"bits 31:16 of the {name.upper()} limit are 0",
            s.bits_clear(limit, bit_range(31, 16)),
            ref=DESCRIPTOR_TABLES,
        ),
    )


_RFLAGS_RESERVED = MASK64 & ~(layouts.RFLAGS.defined)

_OTHER_RULES: Final[tuple[Rule, ...]] = (
    *_table_rules("gdtr", f.GUEST_GDTR_BASE, f.GUEST_GDTR_LIMIT),
    *_table_rules("idtr", f.GUEST_IDTR_BASE, f.GUEST_IDTR_LIMIT),
    _rule(
        "rip-width",
        "bits 63:32 of RIP are 0",
        state.upper_half_clear(f.GUEST_RIP),
        GUEST_NOT_IN_64_BIT_MODE,
        RIP_RFLAGS,
    ),
    _rule(
        "rip-high-bits",
        "the bits of RIP beyond the linear-address width are all equal",
        s.high_bits_identical(f.GUEST_RIP),
        GUEST_IN_64_BIT_MODE,
        RIP_RFLAGS,
    ),
    _rule(
        "rflags-reserved",
        "the reserved bits of RFLAGS are 0",
        s.bits_clear(f.GUEST_RFLAGS, _RFLAGS_RESERVED),
        ref=RIP_RFLAGS,
    ),
    _rule("rflags-fixed", "bit 1 of RFLAGS is 1", s.bits_required(f.GUEST_RFLAGS, 1 << 1), ref=RIP_RFLAGS),
    _rule(
        "rflags-vm",
        "RFLAGS.VM is 0",
        s.bits_clear(f.GUEST_RFLAGS, _RFLAGS_VM),
        s.either(IA32E_GUEST, NO_PROTECTION),
        RIP_RFLAGS,
    ),
    _rule(
        "rflags-if",
        "RFLAGS.IF is 1",
        s.bits_required(f.GUEST_RFLAGS, _RFLAGS_IF),
        s.injecting(layouts.EXTERNAL_INTERRUPT),
        RIP_RFLAGS,
    ),
    _rule(
        "rflags-iopl-fred",
        "RFLAGS.IOPL is 0",
        s.bits_clear(f.GUEST_RFLAGS, _RFLAGS_IOPL),
        FRED_IN_USER_MODE,
        RIP_RFLAGS,
    ),
    _rule("ssp-aligned", "bits 1:0 of SSP are 0", s.bits_clear(f.GUEST_SSP, 3), _LOAD_CET, RIP_RFLAGS),
    _rule(
        "ssp-width",
        "bits 63:32 of SSP are 0",
        state.upper_half_clear(f.GUEST_SSP),
        s.every(_LOAD_CET, GUEST_NOT_IN_64_BIT_MODE),
        RIP_RFLAGS,
    ),
    _rule(
        "ssp-high-bits",
        "the bits of SSP beyond the linear-address width are all equal",
        s.high_bits_identical(f.GUEST_SSP),
        s.every(_LOAD_CET, GUEST_IN_64_BIT_MODE),
        RIP_RFLAGS,
    ),
)

RULES: Final[tuple[Rule, ...]] = (*_REGISTER_RULES, *_OTHER_RULES)
