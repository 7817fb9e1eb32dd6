"""How words of the VMCB are divided: bit by bit, in the order of the manual.

Spec: APM Vol. 2, "Layout of VMCB", "Event Injection", "Injecting Virtual (INTR) Interrupts".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from vmcs.bits import Layout, Slice, flags


class TlbControl(enum.IntEnum):
    """TLB_CONTROL: what VMRUN flushes."""

    NOTHING = 0
    ALL_ASIDS = 1
    THIS_ASID = 3
    THIS_ASID_NON_GLOBAL = 7


class InjectedType(enum.IntEnum):
    """TYPE of EVENTINJ and EXITINTINFO."""

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4


TYPE_NAMES: Final[Mapping[int, str]] = {
    InjectedType.EXTERNAL_INTERRUPT: "external or virtual interrupt",
    InjectedType.NMI: "NMI",
    InjectedType.EXCEPTION: "exception",
    InjectedType.SOFTWARE_INTERRUPT: "software interrupt",
}

VIRTUAL_INTERRUPTS: Final = Layout(
    "virtual interrupt control",
    64,
    (
        Slice("V_TPR", 0, 8),
        *flags([(8, "V_IRQ"), (9, "VGIF"), (11, "V_NMI"), (12, "V_NMI_MASK")]),
        Slice("V_INTR_PRIO", 16, 4),
        *flags([(20, "V_IGN_TPR"), (24, "V_INTR_MASKING"), (25, "virtual GIF enable"), (26, "V_NMI_ENABLE")]),
        *flags([(30, "x2AVIC enable"), (31, "AVIC enable")]),
        Slice("V_INTR_VECTOR", 32, 8),
    ),
)
V_TPR: Final = 0xFF
V_IRQ: Final = 1 << 8
V_GIF: Final = 1 << 9
V_NMI: Final = 1 << 11
V_NMI_MASK: Final = 1 << 12
V_INTR_PRIO_SHIFT: Final = 16
V_IGN_TPR: Final = 1 << 20
V_INTR_MASKING: Final = 1 << 24
V_GIF_ENABLE: Final = 1 << 25
V_NMI_ENABLE: Final = 1 << 26
X2AVIC_ENABLE: Final = 1 << 30
AVIC_ENABLE: Final = 1 << 31
V_INTR_VECTOR_SHIFT: Final = 32

INTERRUPT_STATE: Final = Layout("interrupt state", 64, flags([(0, "INTERRUPT_SHADOW"), (1, "GUEST_INTERRUPT_MASK")]))
INTERRUPT_SHADOW: Final = 1 << 0
GUEST_INTERRUPT_MASK: Final = 1 << 1

EVENT: Final = Layout(
    "event",
    64,
    (
        Slice("VECTOR", 0, 8),
        Slice("TYPE", 8, 3, TYPE_NAMES),
        *flags([(11, "EV"), (31, "V")]),
        Slice("ERRORCODE", 32, 32),
    ),
)
EVENT_TYPE_SHIFT: Final = 8
EVENT_ERROR_CODE_VALID: Final = 1 << 11
EVENT_VALID: Final = 1 << 31

NESTED_CONTROL: Final = Layout(
    "nested paging and encryption control",
    64,
    flags(
        [
            *((0, "NP_ENABLE"), (1, "SEV"), (2, "SEV-ES"), (3, "GMET"), (4, "SSSCheck"), (5, "VTE"), (6, "ROGPT")),
            (7, "INVLPGB/TLBSYNC"),
        ]
    ),
)
NP_ENABLE: Final = 1 << 0
GMET_ENABLE: Final = 1 << 3
INVLPGB_ENABLE: Final = 1 << 7

VIRTUALIZATION_EXTENSIONS: Final = Layout(
    "virtualization of LBR, VMLOAD and VMSAVE",
    64,
    flags([(0, "LBR virtualization"), (1, "VMLOAD/VMSAVE virtualization"), (2, "IBS virtualization")]),
)
LBR_VIRTUALIZATION: Final = 1 << 0
VMSAVE_VIRTUALIZATION: Final = 1 << 1

CLEAN_BITS: Final = Layout(
    "VMCB clean bits",
    32,
    flags(
        [
            *((0, "I"), (1, "IOPM"), (2, "ASID"), (3, "TPR"), (4, "NP"), (5, "CRx"), (6, "DRx"), (7, "DT")),
            *((8, "SEG"), (9, "CR2"), (10, "LBR"), (11, "AVIC"), (12, "CET")),
        ]
    ),
)
