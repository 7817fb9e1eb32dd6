"""The cases for host state and guest state; see `vmcs_rule_cases`."""

from vmcs_baseline import VMCS_ADDRESS
from vmcs_rule_cases import (
    DEBUG_EXCEPTION,
    GENERAL_PROTECTION,
    HLT,
    HOST_32,
    IN_SMM,
    INTERRUPT,
    LEGACY_GUEST,
    LINKED,
    NMI,
    NO_EPT,
    NON_CANONICAL,
    PAE_GUEST,
    REAL_MODE,
    RESTRICTED,
    SIX,
    TOO_WIDE,
    VIRTUAL_8086,
    Case,
    Changes,
    case,
    event,
)

from vmcs import controls as c
from vmcs import fields as f
from vmcs.fields import Field


def canonical(rule_id: str, setup: Changes, field: Field) -> Case:
    """48-bit linear addresses: the two ends of each half, and just beyond."""
    return case(
        rule_id,
        setup,
        {field: 0xFFFF_8000_0000_0000},
        {field: NON_CANONICAL},
        {field: 0xFFFF_7FFF_FFFF_F000},
        {field: 0x0100_0000_0000_0000},
    )


def reserved(rule_id: str, setup: Changes, field: Field, ok: int, *bad: int) -> Case:
    return case(rule_id, setup, {field: ok}, *({field: value} for value in bad))


def fred(prefix: str, setup: Changes) -> tuple[Case, ...]:
    name = prefix.upper()
    config = getattr(f, f"{name}_IA32_FRED_CONFIG")
    return (
        reserved(f"{prefix}.fred-config-reserved", setup, config, 0xFFFF_8000_0000_07CB, 0x4, 0x10, 0x20, 0x800),
        canonical(f"{prefix}.fred-config-canonical", setup, config),
        *(
            case(
                f"{prefix}.fred-{kind.lower()}{level}",
                setup,
                {getattr(f, f"{name}_IA32_FRED_{kind}{level}"): 0xFFFF_8000_0000_0000 | alignment},
                {getattr(f, f"{name}_IA32_FRED_{kind}{level}"): alignment >> 1},
                {getattr(f, f"{name}_IA32_FRED_{kind}{level}"): NON_CANONICAL},
            )
            for kind, alignment in (("RSP", 64), ("SSP", 8))
            for level in (1, 2, 3)
        ),
    )


def cet(prefix: str, setup: Changes) -> tuple[Case, ...]:
    name = prefix.upper()
    s_cet, table = getattr(f, f"{name}_IA32_S_CET"), getattr(f, f"{name}_IA32_INTERRUPT_SSP_TABLE_ADDR")
    return (
        reserved(f"{prefix}.s-cet-reserved", setup, s_cet, 0x43F, 0x40, 0x80, 0x100, 0x200),
        canonical(f"{prefix}.s-cet-canonical", setup, s_cet),
        reserved(f"{prefix}.s-cet-tracker", setup, s_cet, 0x800, 0xC00),
        canonical(f"{prefix}.interrupt-ssp-table-canonical", setup, table),
    )


HOST_CET = {c.EXIT_LOAD_CET_STATE: True}
GUEST_CET = {c.ENTRY_LOAD_CET_STATE: True}
PAT = (0x0706_0504_0100_0606, 0x0000_0000_0000_0002, 0x0300_0000_0000_0000, 0x0000_0008_0000_0000, 0xFF00_0000)

HOST_CASES: tuple[Case, ...] = (
    case(
        "host.cr0-fixed",
        {},
        {f.HOST_CR0: 0x8001_0021},
        {f.HOST_CR0: 0x8001_0020},
        {f.HOST_CR0: 0x8001_0001},
        {f.HOST_CR0: 0x0001_0021},
        {f.HOST_CR0: 0x1_8001_0021},
    ),
    case(
        "host.cr4-fixed",
        {},
        {f.HOST_CR4: 0x13FF_FFFF & ~(1 << 23)},
        {f.HOST_CR4: 0x20},
        {f.HOST_CR4: 0x400_2020 | 1 << 63},
        {f.HOST_CR4: 0x2020 | 1 << 27},
    ),
    case("host.cet-needs-write-protect", {f.HOST_CR4: 0x80_2020}, {}, {f.HOST_CR0: 0x8000_0033}),
    reserved("host.cr3-width", {}, f.HOST_CR3, 0x3FFF_FFFF_FFFF, TOO_WIDE, 1 << 51, 1 << 61, 1 << 63),
    canonical("host.sysenter-esp-canonical", {}, f.HOST_IA32_SYSENTER_ESP),
    canonical("host.sysenter-eip-canonical", {}, f.HOST_IA32_SYSENTER_EIP),
    reserved(
        "host.perf-global-ctrl-reserved",
        {c.EXIT_LOAD_IA32_PERF_GLOBAL_CTRL: True},
        f.HOST_IA32_PERF_GLOBAL_CTRL,
        0x7_0000_000F,
        0x10,
        0x8_0000_0000,
    ),
    reserved("host.pat-memory-types", {c.EXIT_LOAD_IA32_PAT: True}, f.HOST_IA32_PAT, *PAT),
    reserved(
        "host.efer-reserved", {c.EXIT_LOAD_IA32_EFER: True}, f.HOST_IA32_EFER, 0x500, 0x502, 0x1500, 1 << 63 | 0x500
    ),
    reserved("host.efer-address-space-size", {c.EXIT_LOAD_IA32_EFER: True}, f.HOST_IA32_EFER, 0x500, 0x100, 0x400, 0),
    *cet("host", HOST_CET),
    reserved("host.ssp-aligned", HOST_CET, f.HOST_SSP, 4, 1, 2),
    canonical("host.ssp-canonical", HOST_CET, f.HOST_SSP),
    reserved("host.pkrs-width", {c.EXIT_LOAD_PKRS: True}, f.HOST_IA32_PKRS, 0xFFFF_FFFF, 1 << 32, 1 << 63),
    reserved("host.spec-ctrl-reserved", {c.EXIT_LOAD_IA32_SPEC_CTRL: True}, f.HOST_IA32_SPEC_CTRL, 7, 8, 1 << 63),
    *fred("host", {c.EXIT_LOAD_FRED: True}),
    *(
        reserved(f"host.{name.lower()}-selector", {}, getattr(f, f"HOST_{name}_SELECTOR"), 0xFFF8, 9, 0xA, 0xC, 0xF)
        for name in (*SIX, "TR")
    ),
    reserved("host.cs-not-null", {}, f.HOST_CS_SELECTOR, 8, 0),
    reserved("host.tr-not-null", {}, f.HOST_TR_SELECTOR, 8, 0),
    reserved("host.ss-not-null", HOST_32, f.HOST_SS_SELECTOR, 8, 0),
    *(
        canonical(f"host.{name}-base-canonical", {}, getattr(f, f"HOST_{name.upper()}_BASE"))
        for name in ("fs", "gs", "gdtr", "idtr", "tr")
    ),
    case(
        "host.long-mode-host-stays",
        {**LEGACY_GUEST, f.HOST_RIP: 0x1000, f.HOST_CR4: 0x2020},
        {c.EXIT_HOST_ADDRESS_SPACE_SIZE: True},
        {c.EXIT_HOST_ADDRESS_SPACE_SIZE: False},
    ),
    case("host.legacy-host-stays", {**HOST_32, f.HOST_CR4: 0x2020}, {}, {c.EXIT_HOST_ADDRESS_SPACE_SIZE: True}),
    case("host.32-bit-host-pcid", HOST_32, {f.HOST_CR4: 0x2000}, {f.HOST_CR4: 0x2_2000}),
    case("host.32-bit-host-fred", HOST_32, {f.HOST_CR4: 0x2000}, {f.HOST_CR4: 0x1_0000_2000}),
    reserved("host.32-bit-host-rip", HOST_32, f.HOST_RIP, 0xFFFF_FFFF, 1 << 32, 1 << 63),
    reserved("host.64-bit-host-pae", {}, f.HOST_CR4, 0x2020, 0x2000),
    canonical("host.64-bit-host-rip", {}, f.HOST_RIP),
)

LEGACY_USER: Changes = {
    **LEGACY_GUEST,
    f.GUEST_CS_SELECTOR: 0xB,
    f.GUEST_SS_SELECTOR: 0x13,
    f.GUEST_CS_ACCESS_RIGHTS: 0xC0FB,
    f.GUEST_SS_ACCESS_RIGHTS: 0xC0F3,
}

REGISTER_CASES: tuple[Case, ...] = (
    case(
        "guest.cr0-fixed",
        {},
        {f.GUEST_CR0: 0xE001_0021},
        {f.GUEST_CR0: 0x8001_0001},
        {f.GUEST_CR0: 0x1_8001_0021},
        {**RESTRICTED, **LEGACY_GUEST, f.GUEST_CR0: 0x0001_0021},
    ),
    case(
        "guest.paging-needs-protection",
        {**LEGACY_GUEST, f.GUEST_SS_ACCESS_RIGHTS: 0xC093},
        {},
        {f.GUEST_CR0: 0x8001_0020},
    ),
    case(
        "guest.cr4-fixed",
        {},
        {f.GUEST_CR4: 0x2020 | 1 << 20},
        {f.GUEST_CR4: 0x20},
        {f.GUEST_CR4: 0x2020 | 1 << 26},
        {f.GUEST_CR4: 0x2020 | 1 << 63},
    ),
    case("guest.cet-needs-write-protect", {f.GUEST_CR4: 0x80_2020}, {}, {f.GUEST_CR0: 0x8000_0033}),
    reserved(
        "guest.debugctl-reserved",
        {c.ENTRY_LOAD_DEBUG_CONTROLS: True},
        f.GUEST_IA32_DEBUGCTL,
        0x5FC3,
        0x4,
        0x8,
        0x2000,
        1 << 63,
    ),
    reserved("guest.ia32e-mode-paging", {}, f.GUEST_CR0, 0x8001_0033, 0x0001_0033),
    reserved("guest.ia32e-mode-pae", {}, f.GUEST_CR4, 0x2020, 0x2000),
    reserved("guest.legacy-mode-pcid", LEGACY_GUEST, f.GUEST_CR4, 0x2000, 0x2_2000),
    reserved("guest.legacy-mode-fred", LEGACY_USER, f.GUEST_CR4, 0x2000, 0x1_0000_2000),
    reserved("guest.cr3-width", {}, f.GUEST_CR3, 0x3FFF_FFFF_FFFF, TOO_WIDE, 1 << 51, 1 << 62, 1 << 63),
    reserved("guest.legacy-mode-cr3-width", LEGACY_GUEST, f.GUEST_CR3, 0x3FFF_FFFF_FFFF, TOO_WIDE, 1 << 61, 1 << 63),
    reserved("guest.dr7-width", {c.ENTRY_LOAD_DEBUG_CONTROLS: True}, f.GUEST_DR7, 0xFFFF_FFFF, 1 << 32, 1 << 63),
    canonical("guest.sysenter-esp-canonical", {}, f.GUEST_IA32_SYSENTER_ESP),
    canonical("guest.sysenter-eip-canonical", {}, f.GUEST_IA32_SYSENTER_EIP),
    *cet("guest", GUEST_CET),
    reserved(
        "guest.perf-global-ctrl-reserved",
        {c.ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL: True},
        f.GUEST_IA32_PERF_GLOBAL_CTRL,
        0x7_0000_000F,
        0x10,
        0x8_0000_0000,
    ),
    reserved("guest.pat-memory-types", {c.ENTRY_LOAD_IA32_PAT: True}, f.GUEST_IA32_PAT, *PAT),
    reserved(
        "guest.efer-reserved", {c.ENTRY_LOAD_IA32_EFER: True}, f.GUEST_IA32_EFER, 0x500, 0x502, 0x1500, 1 << 63 | 0x500
    ),
    case(
        "guest.efer-lma",
        {c.ENTRY_LOAD_IA32_EFER: True},
        {f.GUEST_IA32_EFER: 0x500},
        {f.GUEST_IA32_EFER: 0},
        {**LEGACY_GUEST, f.GUEST_IA32_EFER: 0x500},
    ),
    case(
        "guest.efer-lme",
        {c.ENTRY_LOAD_IA32_EFER: True},
        {f.GUEST_IA32_EFER: 0x500},
        {f.GUEST_IA32_EFER: 0x400},
        {**LEGACY_GUEST, f.GUEST_IA32_EFER: 0x100},
    ),
    reserved(
        "guest.bndcfgs",
        {c.ENTRY_LOAD_IA32_BNDCFGS: True},
        f.GUEST_IA32_BNDCFGS,
        0xFFFF_8000_0000_1003,
        4,
        0x800,
        NON_CANONICAL,
    ),
    reserved(
        "guest.rtit-ctl-reserved",
        {c.ENTRY_LOAD_IA32_RTIT_CTL: True, "rtit_ctl_reserved": ~0xF & (1 << 64) - 1},
        f.GUEST_IA32_RTIT_CTL,
        0xF,
        0x10,
        1 << 63,
    ),
    reserved(
        "guest.lbr-ctl-reserved",
        {c.ENTRY_LOAD_IA32_LBR_CTL: True, "lbr_ctl_reserved": ~0x7F_000F & (1 << 64) - 1},
        f.GUEST_IA32_LBR_CTL,
        0x7F_000F,
        0x10,
        1 << 63,
    ),
    reserved("guest.pkrs-width", {c.ENTRY_LOAD_PKRS: True}, f.GUEST_IA32_PKRS, 0xFFFF_FFFF, 1 << 32, 1 << 63),
    reserved("guest.uinv-width", {c.ENTRY_LOAD_UINV: True}, f.GUEST_UINV, 0xFF, 0x100, 0x8000),
    reserved("guest.spec-ctrl-reserved", {c.ENTRY_LOAD_IA32_SPEC_CTRL: True}, f.GUEST_IA32_SPEC_CTRL, 7, 8, 1 << 63),
    *fred("guest", {c.ENTRY_LOAD_FRED: True}),
    *(
        each
        for name in ("gdtr", "idtr")
        for each in (
            canonical(f"guest.{name}-base-canonical", {}, getattr(f, f"GUEST_{name.upper()}_BASE")),
            reserved(f"guest.{name}-limit", {}, getattr(f, f"GUEST_{name.upper()}_LIMIT"), 0xFFFF, 0x1_0000, 1 << 31),
        )
    ),
    case(
        "guest.rip-width",
        {},
        {**LEGACY_GUEST, f.GUEST_RIP: 0xFFFF_FFFF},
        {**LEGACY_GUEST, f.GUEST_RIP: 1 << 32},
        {f.GUEST_CS_ACCESS_RIGHTS: 0xC09B, f.GUEST_RIP: 1 << 63},  # compatibility mode
    ),
    # Bit 47 may differ from the bits above it: RIP just beyond the canonical half is the guest's own fault to take.
    reserved("guest.rip-high-bits", {}, f.GUEST_RIP, 0x0000_8000_0000_0000, 1 << 48, 1 << 63, 0xFFFE_8000_0000_0000),
    reserved("guest.rflags-reserved", {}, f.GUEST_RFLAGS, 0x3D_7FD7, 0xA, 0x22, 0x8002, 0x40_0002, 1 << 63 | 2),
    reserved("guest.rflags-fixed", {}, f.GUEST_RFLAGS, 2, 0x200),
    case(
        "guest.rflags-vm",
        {f.GUEST_CS_ACCESS_RIGHTS: 0xF3},
        {f.GUEST_CS_ACCESS_RIGHTS: 0xA09B},
        {
            **VIRTUAL_8086,
            c.ENTRY_IA32E_MODE_GUEST: True,
            f.GUEST_CR4: 0x2020,
            f.GUEST_RIP: 0,
            f.GUEST_TR_ACCESS_RIGHTS: 0x8B,
        },
        {**VIRTUAL_8086, f.GUEST_CR0: 0x30},
    ),
    case("guest.rflags-if", INTERRUPT, {f.GUEST_RFLAGS: 0x202}, {f.GUEST_RFLAGS: 2}),
    reserved("guest.ssp-aligned", GUEST_CET, f.GUEST_SSP, 4, 1, 2),
    reserved("guest.ssp-width", {**GUEST_CET, **LEGACY_GUEST}, f.GUEST_SSP, 0xFFFF_FFFC, 1 << 32, 1 << 63),
    reserved("guest.ssp-high-bits", GUEST_CET, f.GUEST_SSP, 0x0000_8000_0000_0000, 1 << 48, 1 << 63),
)


def of(name: str, part: str) -> Field:
    field: Field = getattr(f, f"GUEST_{name}_{part}")
    return field


DATA = ("DS", "ES", "FS", "GS")
USABLE_DATA: Changes = {
    **{of(name, "ACCESS_RIGHTS"): 0xC093 for name in DATA},
    **{of(name, "LIMIT"): 0xFFFF_FFFF for name in DATA},
}
USABLE_LDTR: Changes = {f.GUEST_LDTR_ACCESS_RIGHTS: 0x82, f.GUEST_LDTR_SELECTOR: 0x20, f.GUEST_LDTR_LIMIT: 0xF}
CPL_3: Changes = {
    f.GUEST_CS_SELECTOR: 0xB,
    f.GUEST_SS_SELECTOR: 0x13,
    f.GUEST_CS_ACCESS_RIGHTS: 0xA0FB,
    f.GUEST_SS_ACCESS_RIGHTS: 0xC0F3,
}


FRED: Changes = {f.GUEST_CR4: 0x1_0000_2020}
USER_FRED: Changes = {**FRED, **CPL_3}


def code_or_data(name: str) -> tuple[Case, ...]:
    """What holds for each of the six registers."""
    low = name.lower()
    setup = USABLE_DATA
    rights = 0xA09B if name == "CS" else 0xC093
    byte_granular = rights & ~0x8000
    return (
        case(
            f"guest.{low}-virtual-8086-base",
            VIRTUAL_8086,
            {of(name, "SELECTOR"): 0xFFFF, of(name, "BASE"): 0xF_FFF0},
            {of(name, "BASE"): 0x1_0010},
            {of(name, "SELECTOR"): 0x1001},
        ),
        case(
            f"guest.{low}-virtual-8086-limit",
            VIRTUAL_8086,
            {},
            {of(name, "LIMIT"): 0xFFFE},
            {of(name, "LIMIT"): 0x1_FFFF},
        ),
        case(
            f"guest.{low}-virtual-8086-rights",
            VIRTUAL_8086,
            {},
            {of(name, "ACCESS_RIGHTS"): 0x93},
            {of(name, "ACCESS_RIGHTS"): 0xF7},
            {of(name, "ACCESS_RIGHTS"): 0x1_00F3},
        ),
        case(f"guest.{low}-s", setup, {}, {of(name, "ACCESS_RIGHTS"): rights & ~0x10}),
        case(f"guest.{low}-present", setup, {}, {of(name, "ACCESS_RIGHTS"): rights & ~0x80}),
        case(
            f"guest.{low}-reserved",
            setup,
            {of(name, "ACCESS_RIGHTS"): rights | 0x1000},
            *({of(name, "ACCESS_RIGHTS"): rights | 1 << bit} for bit in (8, 9, 10, 11, 17, 31)),
        ),
        case(
            f"guest.{low}-granularity",
            setup,
            {of(name, "LIMIT"): 0xFFF},
            {of(name, "LIMIT"): 0xFFFF_FFFE},
            {of(name, "LIMIT"): 0xFFFF_F7FF},
            {of(name, "ACCESS_RIGHTS"): byte_granular, of(name, "LIMIT"): 0x10_0000},
            {of(name, "ACCESS_RIGHTS"): byte_granular},
        ),
    )


def system(name: str, rights: int, setup: Changes) -> tuple[Case, ...]:
    """What holds for TR and LDTR."""
    low = name.lower()
    return (
        case(f"guest.{low}-selector-ti", setup, {of(name, "SELECTOR"): 0x23}, {of(name, "SELECTOR"): 0x24}),
        canonical(f"guest.{low}-base-canonical", setup, of(name, "BASE")),
        case(f"guest.{low}-s", setup, {}, {of(name, "ACCESS_RIGHTS"): rights | 0x10}),
        case(f"guest.{low}-present", setup, {}, {of(name, "ACCESS_RIGHTS"): rights & ~0x80}),
        case(
            f"guest.{low}-reserved",
            setup,
            {of(name, "ACCESS_RIGHTS"): rights | 0x1000},
            *({of(name, "ACCESS_RIGHTS"): rights | 1 << bit} for bit in (8, 11, 17, 31)),
        ),
        case(
            f"guest.{low}-granularity",
            setup,
            {of(name, "ACCESS_RIGHTS"): rights | 0x8000, of(name, "LIMIT"): 0xFFF},
            {of(name, "ACCESS_RIGHTS"): rights | 0x8000},
            {of(name, "LIMIT"): 0x10_0000},
        ),
    )


SEGMENT_CASES: tuple[Case, ...] = (
    *(each for name in SIX for each in code_or_data(name)),
    *system("TR", 0x8B, {}),
    *system("LDTR", 0x82, USABLE_LDTR),
    case("guest.ss-selector-rpl", RESTRICTED, {}, {f.GUEST_CS_SELECTOR: 0x9}, {f.GUEST_CS_SELECTOR: 0xB}),
    *(canonical(f"guest.{name.lower()}-base-canonical", {}, of(name, "BASE")) for name in ("FS", "GS")),
    *(
        case(
            f"guest.{name.lower()}-base-width",
            USABLE_DATA,
            {of(name, "BASE"): 0xFFFF_FFFF},
            {of(name, "BASE"): 1 << 32},
            {of(name, "BASE"): 1 << 63},
        )
        for name in ("CS", "SS", "DS", "ES")
    ),
    case(
        "guest.cs-type",
        {},
        {f.GUEST_CS_ACCESS_RIGHTS: 0xA099},
        *({f.GUEST_CS_ACCESS_RIGHTS: 0xA090 | kind} for kind in (0, 1, 2, 4, 7, 8, 10, 12, 14)),
        {**RESTRICTED, f.GUEST_CS_ACCESS_RIGHTS: 0xA093},
    ),
    case(
        "guest.ss-type",
        {},
        {f.GUEST_SS_ACCESS_RIGHTS: 0xC097},
        *({f.GUEST_SS_ACCESS_RIGHTS: 0xC090 | kind} for kind in (0, 1, 2, 4, 5, 6, 8, 11, 15)),
    ),
    *(
        case(
            f"guest.{name.lower()}-type-accessed",
            USABLE_DATA,
            {of(name, "ACCESS_RIGHTS"): 0xC09F},
            *({of(name, "ACCESS_RIGHTS"): 0xC090 | kind} for kind in (0, 2, 4, 6, 10, 14)),
        )
        for name in DATA
    ),
    *(
        case(
            f"guest.{name.lower()}-type-readable",
            USABLE_DATA,
            {of(name, "ACCESS_RIGHTS"): 0xC09B},
            *({of(name, "ACCESS_RIGHTS"): 0xC090 | kind} for kind in (9, 13)),
        )
        for name in DATA
    ),
    case("guest.cs-dpl-data", REAL_MODE, {}, {f.GUEST_CS_ACCESS_RIGHTS: 0xB3}, {f.GUEST_CS_ACCESS_RIGHTS: 0xF3}),
    case(
        "guest.cs-dpl-nonconforming", {}, CPL_3, {f.GUEST_CS_ACCESS_RIGHTS: 0xA0FB}, {f.GUEST_CS_ACCESS_RIGHTS: 0xA0B9}
    ),
    case(
        "guest.cs-dpl-conforming",
        {},
        {**CPL_3, f.GUEST_CS_ACCESS_RIGHTS: 0xA09F},
        {f.GUEST_CS_ACCESS_RIGHTS: 0xA0BF},
        {f.GUEST_CS_ACCESS_RIGHTS: 0xA0FD},
    ),
    case(
        "guest.ss-dpl-rpl",
        RESTRICTED,
        CPL_3,
        {f.GUEST_CS_SELECTOR: 0xB, f.GUEST_SS_SELECTOR: 0x13},
        {f.GUEST_CS_ACCESS_RIGHTS: 0xA0FB, f.GUEST_SS_ACCESS_RIGHTS: 0xC0F3},
    ),
    case(
        "guest.ss-dpl-real-mode",
        REAL_MODE,
        {},
        {f.GUEST_SS_ACCESS_RIGHTS: 0xF3},
        {f.GUEST_CR0: 0x8001_0033, f.GUEST_SS_ACCESS_RIGHTS: 0xB3},
        {f.GUEST_CS_ACCESS_RIGHTS: 0xFB, f.GUEST_SS_ACCESS_RIGHTS: 0xF3},
    ),
    *(
        case(
            f"guest.{name.lower()}-dpl-rpl",
            {**RESTRICTED, **USABLE_DATA},
            {of(name, "SELECTOR"): 0x13, of(name, "ACCESS_RIGHTS"): 0xC0F3},
            {of(name, "SELECTOR"): 0x11},
            {of(name, "SELECTOR"): 0x13, of(name, "ACCESS_RIGHTS"): 0xC0DB},
        )
        for name in DATA
    ),
    case(
        "guest.ss-dpl-fred",
        USER_FRED,
        {f.GUEST_SS_ACCESS_RIGHTS: 0xC0F3},
        {f.GUEST_SS_ACCESS_RIGHTS: 0xC0B3, f.GUEST_CS_ACCESS_RIGHTS: 0xA0BB},
        {f.GUEST_SS_ACCESS_RIGHTS: 0xC0D3, f.GUEST_CS_ACCESS_RIGHTS: 0xA0DB},
    ),
    case("guest.cs-long-fred", FRED, {f.GUEST_CS_ACCESS_RIGHTS: 0xA09B}, {f.GUEST_CS_ACCESS_RIGHTS: 0xC09B}),
    case("guest.cs-default-size", {}, {f.GUEST_CS_ACCESS_RIGHTS: 0xA09B}, {f.GUEST_CS_ACCESS_RIGHTS: 0xE09B}),
    case(
        "guest.tr-type",
        {},
        {**LEGACY_GUEST, f.GUEST_TR_ACCESS_RIGHTS: 0x83},
        {f.GUEST_TR_ACCESS_RIGHTS: 0x83},
        {f.GUEST_TR_ACCESS_RIGHTS: 0x89},
        {**LEGACY_GUEST, f.GUEST_TR_ACCESS_RIGHTS: 0x81},
    ),
    case("guest.tr-usable", {}, {}, {f.GUEST_TR_ACCESS_RIGHTS: 0x1_008B}),
    case("guest.ldtr-type", USABLE_LDTR, {}, {f.GUEST_LDTR_ACCESS_RIGHTS: 0x83}, {f.GUEST_LDTR_ACCESS_RIGHTS: 0x80}),
)

STI, MOV_SS, SMI_BLOCKED, NMI_BLOCKED, ENCLAVE = (1 << bit for bit in range(5))


def blocking(bits: int) -> Changes:
    return {f.GUEST_INTERRUPTIBILITY_STATE: bits}


def pending(bits: int) -> Changes:
    return {f.GUEST_PENDING_DEBUG_EXCEPTIONS: bits}


NON_REGISTER_CASES: tuple[Case, ...] = (
    reserved("guest.activity-state", {}, f.GUEST_ACTIVITY_STATE, 3, 4, 0x8000_0001),
    case("guest.hlt-dpl", HLT, {}, {**CPL_3}),
    case(
        "guest.blocking-needs-active",
        {},
        blocking(STI),
        {**HLT, **blocking(STI)},
        {f.GUEST_ACTIVITY_STATE: 2, **blocking(MOV_SS)},
        {f.GUEST_ACTIVITY_STATE: 3, **blocking(MOV_SS)},
    ),
    case(
        "guest.hlt-injection",
        HLT,
        DEBUG_EXCEPTION,
        GENERAL_PROTECTION,
        event(0x8000_0303),
        {**event(0x8000_0480), f.VM_ENTRY_INSTRUCTION_LENGTH: 2},
    ),
    case("guest.shutdown-injection", {f.GUEST_ACTIVITY_STATE: 2}, event(0x8000_0312), INTERRUPT, GENERAL_PROTECTION),
    case("guest.wait-for-sipi-injection", {f.GUEST_ACTIVITY_STATE: 3}, event(0x30), NMI, INTERRUPT),
    case(
        "guest.smm-activity",
        {**IN_SMM, c.ENTRY_TO_SMM: True, **blocking(SMI_BLOCKED)},
        {f.GUEST_ACTIVITY_STATE: 2},
        {f.GUEST_ACTIVITY_STATE: 3},
    ),
    case("guest.interruptibility-reserved", {}, blocking(NMI_BLOCKED), blocking(1 << 5), blocking(1 << 31)),
    case("guest.sti-excludes-mov-ss", {}, blocking(MOV_SS), blocking(STI | MOV_SS)),
    case("guest.sti-needs-if", {f.GUEST_RFLAGS: 2}, blocking(MOV_SS), blocking(STI)),
    case("guest.interrupt-injection-blocked", INTERRUPT, blocking(NMI_BLOCKED), blocking(STI), blocking(MOV_SS)),
    case("guest.nmi-injection-mov-ss", NMI, blocking(NMI_BLOCKED), blocking(MOV_SS)),
    case("guest.nmi-injection-sti", NMI, blocking(NMI_BLOCKED), blocking(STI)),
    case("guest.smi-blocking-outside-smm", {}, blocking(NMI_BLOCKED), blocking(SMI_BLOCKED)),
    case("guest.smi-blocking-in-smm", {**IN_SMM, c.ENTRY_TO_SMM: True}, blocking(SMI_BLOCKED), blocking(NMI_BLOCKED)),
    case(
        "guest.nmi-injection-blocked",
        {**NMI, c.NMI_EXITING: True, c.VIRTUAL_NMIS: True},
        blocking(0),
        blocking(NMI_BLOCKED),
    ),
    case("guest.enclave-interruption-supported", {}, blocking(0), blocking(ENCLAVE)),
    case("guest.enclave-excludes-mov-ss", {"sgx": True}, blocking(ENCLAVE), blocking(ENCLAVE | MOV_SS)),
    case(
        "guest.pending-debug-reserved",
        {},
        pending(0x500F),
        *(pending(1 << bit) for bit in (4, 5, 10, 11, 13, 15, 17, 63)),
        pending(1 << 16 | 1 << 12),  # without transactional memory, its bit is reserved
    ),
    case(
        "guest.pending-debug-single-step",
        {f.GUEST_RFLAGS: 0x302, **blocking(MOV_SS)},
        pending(0x4000),
        pending(0),
        {**pending(0x4000), f.GUEST_RFLAGS: 0x202},
        {**pending(0x4000), f.GUEST_IA32_DEBUGCTL: 2},
        {**pending(0x4000), f.GUEST_RFLAGS: 0x202, **blocking(STI)},
        {**pending(0x4000), f.GUEST_RFLAGS: 0x202, **blocking(0), **HLT},
    ),
    case(
        "guest.pending-debug-rtm",
        {"rtm": True},
        pending(0x1_1000),
        pending(0x1_0000),
        pending(0x1_1001),
        pending(0x1_5000),
        {**pending(0x1_1000), **blocking(MOV_SS)},
    ),
    case(
        "guest.link-pointer-address",
        {"memory": {0x9000: 0x1234, 0x9800: 0x1234}},
        {f.VMCS_LINK_POINTER: 0x9000},
        {f.VMCS_LINK_POINTER: 0x9800},
    ),
    case("guest.link-pointer-revision", LINKED, {}, {"memory": {0x9000: 0x1235}}, {"memory": {0x9000: 0x34}}),
    case(
        "guest.link-pointer-shadow-indicator",
        LINKED,
        {c.VMCS_SHADOWING: True, "memory": {0x9000: 0x8000_1234}},
        {c.VMCS_SHADOWING: True},
        {"memory": {0x9000: 0x8000_1234}},
    ),
    case(
        "guest.link-pointer-not-current",
        {**LINKED, "memory": {0x9000: 0x1234, VMCS_ADDRESS: 0x1234}},
        {},
        {f.VMCS_LINK_POINTER: VMCS_ADDRESS},
        {**IN_SMM, c.ENTRY_TO_SMM: True, **blocking(SMI_BLOCKED), f.VMCS_LINK_POINTER: VMCS_ADDRESS},
    ),
    case(
        "guest.link-pointer-not-executive",
        {**LINKED, **IN_SMM},
        {f.EXECUTIVE_VMCS_POINTER: 0xA000},
        {f.EXECUTIVE_VMCS_POINTER: 0x9000},
    ),
    *(
        case(
            f"guest.pdpte{number}-field",
            PAE_GUEST,
            {getattr(f, f"GUEST_PDPTE{number}"): 0x3FFF_FFFF_FE19},
            *({getattr(f, f"GUEST_PDPTE{number}"): 1 | 1 << bit} for bit in (1, 2, 5, 8, 46, 63)),
        )
        for number in range(4)
    ),
    case(
        "guest.pdptes-in-memory",
        {
            **PAE_GUEST,
            **NO_EPT,
            f.GUEST_CR3: 0x20_0FE0,
            "memory": {0x20_0FE0: 0x3FFF_FFFF_FE19, 0x20_0FE8: 0x6, 0x20_0FF0: 0, 0x20_0FF8: 1},
        },
        {},
        {"memory": {0x20_0FE0: 0x3}},
        {"memory": {0x20_0FE8: 0x101}},
        {"memory": {0x20_0FF0: 1 << 46 | 1}},
        {"memory": {0x20_0FF8: 1 << 63 | 1}},
    ),
)

FRED_CASES: tuple[Case, ...] = (
    reserved("guest.rflags-iopl-fred", USER_FRED, f.GUEST_RFLAGS, 0x202, 0x1202, 0x2202, 0x3202),
    case("guest.sti-fred", USER_FRED, blocking(MOV_SS), blocking(STI)),
)

STATE_CASES = (*HOST_CASES, *REGISTER_CASES, *SEGMENT_CASES, *NON_REGISTER_CASES, *FRED_CASES)
