"""Layouts of VMCS fields: how the bits of one field divide.

Layouts of VM-exit information live in `vmcs.exits`.

Spec: SDM Vol. 3, "Virtual Machine Control Structures", the section of each field.
"""

from __future__ import annotations

from typing import Final

from vmcs.bits import Layout, Slice, flags

# Event types, shared by VM-entry, VM-exit and IDT-vectoring information.
EXTERNAL_INTERRUPT: Final = 0
NON_MASKABLE_INTERRUPT: Final = 2
HARDWARE_EXCEPTION: Final = 3
SOFTWARE_INTERRUPT: Final = 4
PRIVILEGED_SOFTWARE_EXCEPTION: Final = 5
SOFTWARE_EXCEPTION: Final = 6
OTHER_EVENT: Final = 7

EVENT_TYPES: Final = {
    EXTERNAL_INTERRUPT: "external interrupt",
    NON_MASKABLE_INTERRUPT: "non-maskable interrupt",
    HARDWARE_EXCEPTION: "hardware exception",
    SOFTWARE_INTERRUPT: "software interrupt",
    PRIVILEGED_SOFTWARE_EXCEPTION: "privileged software exception",
    SOFTWARE_EXCEPTION: "software exception",
    OTHER_EVENT: "other event",
}

ENTRY_INTERRUPTION_INFORMATION: Final = Layout(
    "VM-entry interruption information",
    32,
    (
        Slice("vector", 0, 8),
        Slice("type", 8, 3, EVENT_TYPES),
        Slice("deliver error code", 11),
        Slice("nested exception", 13),
        Slice("valid", 31),
    ),
)

EXIT_INTERRUPTION_INFORMATION: Final = Layout(
    "VM-exit interruption information",
    32,
    (
        Slice("vector", 0, 8),
        Slice("type", 8, 3, {n: name for n, name in EVENT_TYPES.items() if n not in (4, 7)}),
        Slice("error code valid", 11),
        Slice("NMI unblocking due to IRET", 12),
        Slice("nested exception", 13),
        Slice("valid", 31),
    ),
)

IDT_VECTORING_INFORMATION: Final = Layout(
    "IDT-vectoring information",
    32,
    (
        Slice("vector", 0, 8),
        Slice("type", 8, 3, EVENT_TYPES),
        Slice("error code valid", 11),
        Slice("nested exception", 13),
        Slice("valid", 31),
    ),
)

ACCESS_RIGHTS: Final = Layout(
    "segment access rights",
    32,
    (
        Slice("type", 0, 4),
        Slice("S", 4),
        Slice("DPL", 5, 2),
        Slice("P", 7),
        Slice("AVL", 12),
        Slice("L", 13),
        Slice("D/B", 14),
        Slice("G", 15),
        Slice("unusable", 16),
    ),
)

SELECTOR: Final = Layout("segment selector", 16, (Slice("RPL", 0, 2), Slice("TI", 2), Slice("index", 3, 13)))

INTERRUPTIBILITY_STATE: Final = Layout(
    "interruptibility state",
    32,
    flags(
        (
            (0, "blocking by STI"),
            (1, "blocking by MOV SS"),
            (2, "blocking by SMI"),
            (3, "blocking by NMI"),
            (4, "enclave interruption"),
        )
    ),
)

ACTIVITY_STATES: Final = {0: "active", 1: "HLT", 2: "shutdown", 3: "wait-for-SIPI"}

ACTIVITY_STATE: Final = Layout("activity state", 32, (Slice("state", 0, 32, ACTIVITY_STATES),))

PENDING_DEBUG_EXCEPTIONS: Final = Layout(
    "pending debug exceptions",
    64,
    flags(
        (
            (0, "B0"),
            (1, "B1"),
            (2, "B2"),
            (3, "B3"),
            (11, "BLD"),
            (12, "enabled breakpoint"),
            (14, "BS"),
            (16, "RTM"),
        )
    ),
)

EPT_POINTER: Final = Layout(
    "EPT pointer",
    64,
    (
        Slice("memory type", 0, 3, {0: "uncacheable", 6: "write-back"}),
        Slice("page-walk length minus 1", 3, 3),
        Slice("enable accessed and dirty flags", 6),
        Slice("enforce access rights for supervisor shadow stack", 7),
        Slice("PML4 table frame", 12, 52),
    ),
)

RFLAGS: Final = Layout(
    "RFLAGS",
    64,
    (
        Slice("CF", 0),
        Slice("always 1", 1),
        Slice("PF", 2),
        Slice("AF", 4),
        Slice("ZF", 6),
        Slice("SF", 7),
        Slice("TF", 8),
        Slice("IF", 9),
        Slice("DF", 10),
        Slice("OF", 11),
        Slice("IOPL", 12, 2),
        Slice("NT", 14),
        Slice("RF", 16),
        Slice("VM", 17),
        Slice("AC", 18),
        Slice("VIF", 19),
        Slice("VIP", 20),
        Slice("ID", 21),
    ),
)

CR0: Final = Layout(
    "CR0",
    64,
    flags(
        (
            (0, "PE"),
            (1, "MP"),
            (2, "EM"),
            (3, "TS"),
            (4, "ET"),
            (5, "NE"),
            (16, "WP"),
            (18, "AM"),
            (29, "NW"),
            (30, "CD"),
            (31, "PG"),
        )
    ),
)

CR4: Final = Layout(
    "CR4",
    64,
    flags(
        (
            (0, "VME"),
            (1, "PVI"),
            (2, "TSD"),
            (3, "DE"),
            (4, "PSE"),
            (5, "PAE"),
            (6, "MCE"),
            (7, "PGE"),
            (8, "PCE"),
            (9, "OSFXSR"),
            (10, "OSXMMEXCPT"),
            (11, "UMIP"),
            (12, "LA57"),
            (13, "VMXE"),
            (14, "SMXE"),
            (16, "FSGSBASE"),
            (17, "PCIDE"),
            (18, "OSXSAVE"),
            (19, "KL"),
            (20, "SMEP"),
            (21, "SMAP"),
            (22, "PKE"),
            (23, "CET"),
            (24, "PKS"),
            (25, "UINTR"),
            (28, "LAM_SUP"),
            (32, "FRED"),
        )
    ),
)

EFER: Final = Layout("IA32_EFER", 64, flags(((0, "SCE"), (8, "LME"), (10, "LMA"), (11, "NXE"))))

IA32_DEBUGCTL: Final = Layout(
    "IA32_DEBUGCTL",
    64,
    flags(
        (
            (0, "LBR"),
            (1, "BTF"),
            (2, "BLD"),
            (6, "TR"),
            (7, "BTS"),
            (8, "BTINT"),
            (9, "BTS_OFF_OS"),
            (10, "BTS_OFF_USR"),
            (11, "FREEZE_LBRS_ON_PMI"),
            (12, "FREEZE_PERFMON_ON_PMI"),
            (13, "ENABLE_UNCORE_PMI"),
            (14, "FREEZE_WHILE_SMM"),
            (15, "RTM_DEBUG"),
        )
    ),
)

S_CET: Final = Layout(
    "IA32_S_CET",
    64,
    (
        Slice("SH_STK_EN", 0),
        Slice("WR_SHSTK_EN", 1),
        Slice("ENDBR_EN", 2),
        Slice("LEG_IW_EN", 3),
        Slice("NO_TRACK_EN", 4),
        Slice("SUPPRESS_DIS", 5),
        Slice("SUPPRESS", 10),
        Slice("TRACKER", 11),
        Slice("EB_LEG_BITMAP_BASE", 12, 52),
    ),
)

GUEST_INTERRUPT_STATUS: Final = Layout(
    "guest interrupt status",
    16,
    (Slice("requesting virtual interrupt", 0, 8), Slice("servicing virtual interrupt", 8, 8)),
)

EXIT_REASON: Final = Layout(
    "exit reason",
    32,
    (
        Slice("basic exit reason", 0, 16),
        Slice("shadow stack busy", 25),
        Slice("bus lock", 26),
        Slice("enclave mode", 27),
        Slice("pending MTF", 28),
        Slice("exit from VMX root operation", 29),
        Slice("VM-entry failure", 31),
    ),
)
