"""The architectural MSRs as data: which exist on a profile, what they hold at reset, what software may write.

Spec: SDM Vol. 4, "Architectural MSRs"; Vol. 3A, "Memory Type Range Registers (MTRRs)", "Machine-Check MSRs"; APM
Vol. 2, "Model-Specific Registers (MSRs)".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from attrs import evolve, field, frozen

from vmcs.bits import is_canonical
from vmcs.capabilities import CapabilityMsr
from vtx.x86 import bounds, control_flow, fred
from vtx.x86.cpuid import MISC_ENABLE_LIMIT_CPUID, MISC_ENABLE_MONITOR, MISC_ENABLE_XD_DISABLE
from vtx.x86.performance import FREEZE_LBRS_ON_PMI, FREEZE_PERFMON_ON_PMI, IA32_PERF_GLOBAL_STATUS
from vtx.x86.state import MASK32, MASK64, Efer

if TYPE_CHECKING:
    from vtx.x86.profile import Profile

IA32_TIME_STAMP_COUNTER: Final = 0x10
IA32_APIC_BASE: Final = 0x1B
IA32_FEATURE_CONTROL: Final = 0x3A
IA32_TSC_ADJUST: Final = 0x3B
IA32_SPEC_CTRL: Final = 0x48
IA32_UMWAIT_CONTROL: Final = 0xE1
IA32_MPERF: Final = 0xE7
IA32_APERF: Final = 0xE8
IA32_MTRRCAP: Final = 0xFE
IA32_SYSENTER_CS: Final = 0x174
IA32_SYSENTER_ESP: Final = 0x175
IA32_SYSENTER_EIP: Final = 0x176
IA32_MCG_CAP: Final = 0x179
IA32_MISC_ENABLE: Final = 0x1A0
IA32_FRED_RSP0: Final = 0x1CC
IA32_FRED_STKLVLS: Final = 0x1D0
IA32_FRED_SSP1: Final = 0x1D1
IA32_FRED_CONFIG: Final = 0x1D4
IA32_DEBUGCTL: Final = 0x1D9
MSR_LASTBRANCHFROMIP: Final = 0x1DB
IA32_PAT: Final = 0x277
IA32_U_CET: Final = 0x6A0
IA32_S_CET: Final = 0x6A2
IA32_PL0_SSP: Final = 0x6A4
IA32_INTERRUPT_SSP_TABLE_ADDR: Final = 0x6A8
IA32_TSC_DEADLINE: Final = 0x6E0
IA32_PKRS: Final = 0x6E1
IA32_UINTR_RR: Final = 0x985
IA32_UINTR_HANDLER: Final = 0x986
IA32_UINTR_STACKADJUST: Final = 0x987
IA32_UINTR_MISC: Final = 0x988
IA32_UINTR_PD: Final = 0x989
IA32_UINTR_TT: Final = 0x98A
IA32_BNDCFGS: Final = 0xD90
IA32_XSS: Final = 0xDA0
IA32_PM_CTL1: Final = 0xDB1
X2APIC_MSRS: Final = range(0x800, 0x900)
IA32_EFER: Final = 0xC000_0080
IA32_STAR: Final = 0xC000_0081
IA32_LSTAR: Final = 0xC000_0082
IA32_CSTAR: Final = 0xC000_0083
IA32_FMASK: Final = 0xC000_0084
IA32_FS_BASE: Final = 0xC000_0100
IA32_GS_BASE: Final = 0xC000_0101
IA32_KERNEL_GS_BASE: Final = 0xC000_0102
IA32_TSC_AUX: Final = 0xC000_0103
SMM_BASE: Final = 0xC001_0111
TSC_RATIO: Final = 0xC000_0104
PERF_EVENT_SELECT_0: Final = 0xC001_0000
PERF_COUNTER_0: Final = 0xC001_0004
VM_CR: Final = 0xC001_0114
VM_HSAVE_PA: Final = 0xC001_0117
SVM_KEY: Final = 0xC001_0118
AVIC_DOORBELL: Final = 0xC001_011B

APIC_BASE_BSP: Final = 1 << 8
APIC_BASE_EXTD: Final = 1 << 10
APIC_BASE_EN: Final = 1 << 11
FEATURE_CONTROL_LOCK: Final = 1 << 0
FEATURE_CONTROL_VMX_IN_SMX: Final = 1 << 1
FEATURE_CONTROL_VMX_OUTSIDE_SMX: Final = 1 << 2

UINV_SHIFT: Final = 32  # of IA32_UINTR_MISC, whose low half is UITTSZ
UINV: Final = 0xFF << UINV_SHIFT

TSC_RATIO_RESET: Final = 1 << 32
"""A ratio of 1: 8 integer bits and 32 bits of fraction."""
PERF_COUNTERS: Final = 4
VM_CR_R_INIT: Final = 1 << 1
VM_CR_LOCK: Final = 1 << 3
VM_CR_SVMDIS: Final = 1 << 4

Check = Callable[["Profile", int, int], bool]
"""Whether WRMSR may change an MSR of a profile from an old to a new value; both passed the reserved-bit masks."""


@frozen
class Msr:
    """One MSR.

    ``writable`` are the bits software changes, ``ignored`` those whose writes have no effect; setting any other bit
    faults. ``writable_with`` adds writable bits that come with a CPUID feature. ``address`` makes bits 12 up to the
    physical-address width writable. Reading a ``write_only`` MSR, a command, faults. ``features``: CPUID features of
    which one makes the MSR exist (none: it always exists). ``check`` is a condition beyond masks. ``intel_only``: AMD
    processors do not have it.
    """

    index: int
    name: str
    reset: int = 0
    writable: int = field(default=MASK64, converter=int)  # a flag's complement would know named bits only
    ignored: int = field(default=0, converter=int)
    writable_with: tuple[tuple[str, int], ...] = ()
    address: bool = False
    read_only: bool = False
    write_only: bool = False
    features: tuple[str, ...] = ()
    check: Check | None = None
    intel_only: bool = False


def _canonical(profile: Profile, old: int, new: int) -> bool:
    return is_canonical(new, profile.linear_address_width)


PAT_TYPES: Final = frozenset((0, 1, 4, 5, 6, 7))
MTRR_TYPES: Final = frozenset((0, 1, 4, 5, 6))


def pat_is_valid(value: int) -> bool:
    """Whether each of the eight bytes of ``value`` encodes a memory type for the PAT.

    Spec: SDM Vol. 3A, "IA32_PAT MSR".
    """
    return all(byte in PAT_TYPES for byte in value.to_bytes(8, "little"))


def _pat(profile: Profile, old: int, new: int) -> bool:
    return pat_is_valid(new)


def _cet(profile: Profile, old: int, new: int) -> bool:
    suppressed_and_waiting = control_flow.SUPPRESS | control_flow.TRACKER
    return is_canonical(new, profile.linear_address_width) and new & suppressed_and_waiting != suppressed_and_waiting


def _cet_control(index: int, name: str) -> Msr:
    shadow_stacks = control_flow.SH_STK_EN | control_flow.WR_SHSTK_EN
    tracking = control_flow.ENDBR_EN | control_flow.LEG_IW_EN | control_flow.NO_TRACK_EN | control_flow.SUPPRESS_DIS
    tracking |= control_flow.SUPPRESS | control_flow.TRACKER | control_flow.EB_LEG_BITMAP_BASE
    return Msr(
        index,
        name,
        writable=0,
        writable_with=(("CET_SS", shadow_stacks), ("CET_IBT", tracking)),
        features=("CET_SS", "CET_IBT"),
        check=_cet,
    )


def _mtrr_type(profile: Profile, old: int, new: int) -> bool:
    return new & 0xFF in MTRR_TYPES


def _mtrr_types(profile: Profile, old: int, new: int) -> bool:
    return all(byte in MTRR_TYPES for byte in new.to_bytes(8, "little"))


def _all_or_none(profile: Profile, old: int, new: int) -> bool:
    """Error reporting of a bank is switched as a whole, as on the P6 family.

    Spec: SDM Vol. 3B, "Machine-Check MSRs".
    """
    return new in (0, MASK64)


def _unlocked(profile: Profile, old: int, new: int) -> bool:
    return not old & FEATURE_CONTROL_LOCK


_APIC_MODES: Final = APIC_BASE_EN | APIC_BASE_EXTD
# Modes (EN and EXTD in place) reachable from each mode.
_APIC_TRANSITIONS: Final[Mapping[int, tuple[int, ...]]] = {
    0: (0, APIC_BASE_EN),
    APIC_BASE_EN: (0, APIC_BASE_EN, _APIC_MODES),
    _APIC_MODES: (0, _APIC_MODES),
}


def _apic_mode_transition(profile: Profile, old: int, new: int) -> bool:
    """Spec: SDM Vol. 3A, "x2APIC State Transitions"."""
    return new & _APIC_MODES in _APIC_TRANSITIONS[old & _APIC_MODES]


def _vm_cr(profile: Profile, old: int, new: int) -> bool:
    """LOCK makes itself and SVMDIS read-only. Spec: APM Vol. 2, "VM_CR MSR (C001_0114h)"."""
    return not old & VM_CR_LOCK or not (old ^ new) & (VM_CR_LOCK | VM_CR_SVMDIS)


# Fast strings on; branch trace storage and PEBS reported as unavailable; MONITOR/MWAIT on.
_MISC_ENABLE_RESET: Final = 1 << 0 | 1 << 11 | 1 << 12 | MISC_ENABLE_MONITOR
_PERFORMANCE_MONITORING_AVAILABLE: Final = 1 << 7
_PAT_RESET: Final = 0x0007_0406_0007_0406

_TABLE: Final[tuple[Msr, ...]] = (
    Msr(IA32_TIME_STAMP_COUNTER, "IA32_TIME_STAMP_COUNTER", features=("TSC",)),
    Msr(0x17, "IA32_PLATFORM_ID", read_only=True, intel_only=True),
    Msr(
        IA32_APIC_BASE,
        "IA32_APIC_BASE",
        reset=0xFEE0_0000 | APIC_BASE_EN,
        writable=APIC_BASE_EN | APIC_BASE_BSP,
        writable_with=(("x2APIC", APIC_BASE_EXTD),),
        address=True,
        features=("APIC",),
        check=_apic_mode_transition,
    ),
    Msr(
        IA32_FEATURE_CONTROL,
        "IA32_FEATURE_CONTROL",
        writable=FEATURE_CONTROL_LOCK,
        writable_with=(
            ("VMX", FEATURE_CONTROL_VMX_OUTSIDE_SMX),
            ("SMX", FEATURE_CONTROL_VMX_IN_SMX),
            ("SMX", 0xFF00),  # SENTER local and global enables
        ),
        features=("VMX", "SMX"),
        check=_unlocked,
    ),
    Msr(IA32_TSC_ADJUST, "IA32_TSC_ADJUST", features=("IA32_TSC_ADJUST",)),
    Msr(
        IA32_SPEC_CTRL,
        "IA32_SPEC_CTRL",
        writable=0,
        writable_with=(("SPEC_CTRL", 1), ("STIBP", 2), ("SSBD", 4)),
        features=("SPEC_CTRL", "STIBP", "SSBD"),
    ),
    # Nothing is predicted or cached here: the barriers are accepted and have nothing to do.
    Msr(0x49, "IA32_PRED_CMD", writable=1, write_only=True, features=("SPEC_CTRL",)),
    # Software clears it and executes CPUID to read the microcode revision; the model always shows the revision.
    Msr(0x8B, "IA32_BIOS_SIGN_ID", writable=0, ignored=MASK64),
    Msr(IA32_MPERF, "IA32_MPERF", features=("APERFMPERF",)),
    Msr(IA32_APERF, "IA32_APERF", features=("APERFMPERF",)),
    Msr(IA32_MTRRCAP, "IA32_MTRRCAP", read_only=True, features=("MTRR",)),
    Msr(0x10A, "IA32_ARCH_CAPABILITIES", read_only=True, features=("ARCH_CAPABILITIES",)),
    Msr(0x10B, "IA32_FLUSH_CMD", writable=1, write_only=True, features=("L1D_FLUSH",)),
    Msr(IA32_SYSENTER_CS, "IA32_SYSENTER_CS", writable=MASK32, ignored=MASK32 << 32, features=("SEP",)),
    Msr(IA32_SYSENTER_ESP, "IA32_SYSENTER_ESP", features=("SEP",), check=_canonical),
    Msr(IA32_SYSENTER_EIP, "IA32_SYSENTER_EIP", features=("SEP",), check=_canonical),
    Msr(IA32_MCG_CAP, "IA32_MCG_CAP", read_only=True, features=("MCA",)),
    Msr(0x17A, "IA32_MCG_STATUS", writable=0b111, features=("MCA",)),
    Msr(0x198, "IA32_PERF_STATUS", read_only=True, intel_only=True),
    Msr(0x199, "IA32_PERF_CTL", writable=0xFFFF | 1 << 32, features=("EIST",)),
    Msr(
        IA32_MISC_ENABLE,
        "IA32_MISC_ENABLE",
        reset=_MISC_ENABLE_RESET,
        writable=1 | MISC_ENABLE_LIMIT_CPUID,
        ignored=1 << 7 | 1 << 11 | 1 << 12,  # read-only: performance monitoring, BTS and PEBS
        writable_with=(
            ("TM", 1 << 3),
            ("EIST", 1 << 16),
            ("MONITOR", MISC_ENABLE_MONITOR),
            ("xTPR", 1 << 23),
            ("NX", MISC_ENABLE_XD_DISABLE),
        ),
        intel_only=True,
    ),
    *(
        Msr(
            IA32_FRED_RSP0 + level, f"IA32_FRED_RSP{level}", writable=MASK64 & ~63, features=("FRED",), check=_canonical
        )
        for level in range(4)
    ),
    Msr(IA32_FRED_STKLVLS, "IA32_FRED_STKLVLS", features=("FRED",)),
    *(
        Msr(IA32_FRED_SSP1 + n, f"IA32_FRED_SSP{n + 1}", writable=MASK64 & ~7, features=("FRED",), check=_canonical)
        for n in range(3)
    ),
    Msr(IA32_FRED_CONFIG, "IA32_FRED_CONFIG", writable=fred.DEFINED, features=("FRED",), check=_canonical),
    # LBR and BTF.
    Msr(IA32_DEBUGCTL, "IA32_DEBUGCTL", writable=0b11, writable_with=(("BUS_LOCK_DETECT", 1 << 2),)),
    # A last-branch record of one entry, as the P6 family has it, and the branch before the last exception.
    Msr(MSR_LASTBRANCHFROMIP, "MSR_LASTBRANCHFROMIP", read_only=True),
    Msr(0x1DC, "MSR_LASTBRANCHTOIP", read_only=True),
    Msr(0x1DD, "MSR_LER_FROM_LIP", read_only=True),
    Msr(0x1DE, "MSR_LER_TO_LIP", read_only=True),
    Msr(IA32_PAT, "IA32_PAT", reset=_PAT_RESET, features=("PAT",), check=_pat),
    Msr(0x2FF, "IA32_MTRR_DEF_TYPE", writable=0xCFF, features=("MTRR",), check=_mtrr_type),
    Msr(IA32_TSC_DEADLINE, "IA32_TSC_DEADLINE", features=("TSC-Deadline",)),
    Msr(0x2F, "IA32_BARRIER", writable=0, features=("MSRLIST",)),
    Msr(IA32_UMWAIT_CONTROL, "IA32_UMWAIT_CONTROL", writable=MASK32 & ~2, features=("WAITPKG",)),
    Msr(IA32_PKRS, "IA32_PKRS", writable=MASK32, features=("PKS",)),
    Msr(IA32_UINTR_RR, "IA32_UINTR_RR", features=("UINTR",)),
    Msr(IA32_UINTR_HANDLER, "IA32_UINTR_HANDLER", features=("UINTR",), check=_canonical),
    Msr(IA32_UINTR_STACKADJUST, "IA32_UINTR_STACKADJUST", features=("UINTR",), check=_canonical),
    Msr(IA32_UINTR_MISC, "IA32_UINTR_MISC", writable=MASK32 | UINV, features=("UINTR",)),
    Msr(IA32_UINTR_PD, "IA32_UINTR_PD", writable=MASK64 & ~0x3F, features=("UINTR",), check=_canonical),
    Msr(IA32_UINTR_TT, "IA32_UINTR_TT", writable=MASK64 & ~0xE, features=("UINTR",), check=_canonical),
    Msr(
        IA32_BNDCFGS,
        "IA32_BNDCFGS",
        writable=bounds.BASE | bounds.PRESERVE | bounds.ENABLE,
        features=("MPX",),
        check=_canonical,
    ),
    Msr(
        IA32_XSS,
        "IA32_XSS",
        writable=0,
        writable_with=(("CET_SS", 3 << 11), ("CET_IBT", 3 << 11), ("HDC", 1 << 13), ("UINTR", 1 << 14)),
        features=("XSAVES",),
    ),
    _cet_control(IA32_U_CET, "IA32_U_CET"),
    _cet_control(IA32_S_CET, "IA32_S_CET"),
    *(
        Msr(IA32_PL0_SSP + level, f"IA32_PL{level}_SSP", 0, ~3 & MASK64, features=features, check=_canonical)
        for level, features in enumerate((("CET_SS", "FRED"), ("CET_SS",), ("CET_SS",), ("CET_SS",)))
    ),
    Msr(IA32_INTERRUPT_SSP_TABLE_ADDR, "IA32_INTERRUPT_SSP_TABLE_ADDR", features=("CET_SS",), check=_canonical),
    # Hardware duty cycling: nothing is ever forced idle.
    Msr(0xDB0, "IA32_PKG_HDC_CTL", writable=1, features=("HDC",)),
    Msr(IA32_PM_CTL1, "IA32_PM_CTL1", reset=1, writable=1, features=("HDC",)),
    Msr(0xDB2, "IA32_THREAD_STALL", read_only=True, features=("HDC",)),
    Msr(
        IA32_EFER,
        "IA32_EFER",
        writable=0,
        ignored=Efer.LMA,
        writable_with=(
            ("SYSCALL", Efer.SCE),
            ("LM", Efer.LME),
            ("NX", Efer.NXE),
            ("SVM", Efer.SVME),
            ("FFXSR", Efer.FFXSR),
            ("MCOMMIT", Efer.MCOMMIT),
        ),
        features=("LM", "NX", "SYSCALL"),
    ),
    Msr(IA32_STAR, "IA32_STAR", features=("SYSCALL",)),
    Msr(IA32_LSTAR, "IA32_LSTAR", features=("SYSCALL",), check=_canonical),
    Msr(IA32_CSTAR, "IA32_CSTAR", features=("SYSCALL",), check=_canonical),
    Msr(IA32_FMASK, "IA32_FMASK", writable=MASK32, features=("SYSCALL",)),
    Msr(IA32_FS_BASE, "IA32_FS_BASE", features=("LM",), check=_canonical),
    Msr(IA32_GS_BASE, "IA32_GS_BASE", features=("LM",), check=_canonical),
    Msr(IA32_KERNEL_GS_BASE, "IA32_KERNEL_GS_BASE", features=("LM",), check=_canonical),
    Msr(IA32_TSC_AUX, "IA32_TSC_AUX", writable=MASK32, features=("RDTSCP", "RDPID")),
)

# What AMD processors have besides, or have otherwise. No debug facility, cache or memory controller is behind these.
_AMD_TABLE: Final[tuple[Msr, ...]] = (
    Msr(0x8B, "PATCH_LEVEL", read_only=True),
    Msr(IA32_SYSENTER_ESP, "SYSENTER_ESP_MSR", features=("SEP",)),
    Msr(IA32_SYSENTER_EIP, "SYSENTER_EIP_MSR", features=("SEP",)),
    Msr(IA32_DEBUGCTL, "DebugCtlMSR", writable=0b11_1111),
    Msr(
        TSC_RATIO,
        "TSC_RATIO",
        reset=TSC_RATIO_RESET,
        writable=(1 << 40) - 1,
        features=("TscRateMsr",),
    ),
    # Four counters, as every AMD processor has them. No event ever happens: they hold what software writes.
    *(Msr(PERF_EVENT_SELECT_0 + n, f"PerfEvtSel{n}", writable=0x0003_FFDF_FFFF) for n in range(PERF_COUNTERS)),
    *(Msr(PERF_COUNTER_0 + n, f"PerfCtr{n}", writable=(1 << 48) - 1) for n in range(PERF_COUNTERS)),
    Msr(0xC001_0010, "SYSCFG", writable=0b111_1100 << 16),
    Msr(0xC001_0015, "HWCR", reset=1 << 24, writable=1 << 3 | 1 << 4 | 1 << 8 | 1 << 18 | 1 << 25, ignored=1 << 24),
    *(Msr(0xC001_0016 + 2 * n, f"IORR_BASE{n}", writable=0b1_1000, address=True) for n in range(2)),
    *(Msr(0xC001_0017 + 2 * n, f"IORR_MASK{n}", writable=1 << 11, address=True) for n in range(2)),
    Msr(0xC001_001A, "TOP_MEM", writable=0, address=True),
    Msr(0xC001_001D, "TOP_MEM2", writable=0, address=True),
    Msr(0xC001_001F, "NB_CFG1", writable=1 << 46),  # of the family, not the architecture: operating systems look for it
    Msr(SMM_BASE, "SMM_BASE", reset=0x3_0000, writable=MASK32),
    Msr(0xC001_0112, "SMM_ADDR", writable=0, address=True),
    Msr(0xC001_0113, "SMM_MASK", writable=0b11, address=True),
    Msr(VM_CR, "VM_CR", writable=0b1_1111, features=("SVM",), check=_vm_cr),
    Msr(VM_HSAVE_PA, "VM_HSAVE_PA", writable=0, address=True, features=("SVM",)),
    Msr(SVM_KEY, "SVM_KEY", write_only=True, features=("SVML",)),
    Msr(AVIC_DOORBELL, "AVIC Doorbell", writable=0xFF, write_only=True, features=("AVIC",)),
    Msr(0xC001_0140, "OSVW_ID_Length", writable=0xFFFF),
    Msr(0xC001_0141, "OSVW_Status"),
)

ARCHITECTURAL_MSRS: Final[Mapping[str, Msr]] = MappingProxyType({msr.name: msr for msr in (*_TABLE, *_AMD_TABLE)})

_MTRR_FIXED: Final[tuple[tuple[int, str], ...]] = (
    (0x250, "IA32_MTRR_FIX64K_00000"),
    (0x258, "IA32_MTRR_FIX16K_80000"),
    (0x259, "IA32_MTRR_FIX16K_A0000"),
    *((0x268 + n, f"IA32_MTRR_FIX4K_{0xC0000 + n * 0x8000:X}") for n in range(8)),
)


def _mtrrs(variable: int) -> Iterable[Msr]:
    for index, name in _MTRR_FIXED:
        yield Msr(index, name, features=("MTRR",), check=_mtrr_types)
    for n in range(variable):
        base, mask = 0x200 + 2 * n, 0x201 + 2 * n
        yield Msr(base, f"IA32_MTRR_PHYSBASE{n}", 0, 0xFF, address=True, features=("MTRR",), check=_mtrr_type)
        yield Msr(mask, f"IA32_MTRR_PHYSMASK{n}", 0, 1 << 11, address=True, features=("MTRR",))


def _machine_check_banks(count: int) -> Iterable[Msr]:
    # No error ever happens: the registers hold what software writes. It may only clear the status.
    for n in range(count):
        yield Msr(0x400 + 4 * n, f"IA32_MC{n}_CTL", features=("MCA",), check=_all_or_none)
        yield Msr(0x401 + 4 * n, f"IA32_MC{n}_STATUS", writable=0, features=("MCA",))
        yield Msr(0x402 + 4 * n, f"IA32_MC{n}_ADDR", features=("MCA",))
        yield Msr(0x403 + 4 * n, f"IA32_MC{n}_MISC", features=("MCA",))


MTRRCAP_FIXED: Final = 1 << 8
MTRRCAP_WRITE_COMBINING: Final = 1 << 10


def _monitored(row: Msr) -> Msr:
    """``row`` on a processor with performance monitoring."""
    if row.index == IA32_DEBUGCTL:
        return evolve(row, writable=row.writable | FREEZE_LBRS_ON_PMI | FREEZE_PERFMON_ON_PMI)
    if row.index == IA32_MISC_ENABLE:
        return evolve(row, reset=row.reset | _PERFORMANCE_MONITORING_AVAILABLE)
    return row


def msrs_of(profile: Profile) -> dict[int, Msr]:
    """The MSRs that exist on ``profile``, by index, with its masks and reset values worked in."""
    rows = [*_TABLE, *_mtrrs(profile.variable_mtrrs), *_machine_check_banks(profile.machine_check_banks)]
    if profile.is_amd:
        rows = [*(row for row in rows if not row.intel_only), *_AMD_TABLE]
    if profile.performance is not None:
        rows = [*map(_monitored, rows), *(Msr(*row) for row in profile.performance.msrs())]
        rows.append(Msr(IA32_PERF_GLOBAL_STATUS, "IA32_PERF_GLOBAL_STATUS", read_only=True))
    resets = {
        "IA32_MTRRCAP": profile.variable_mtrrs | MTRRCAP_FIXED | MTRRCAP_WRITE_COMBINING,
        "IA32_MCG_CAP": profile.machine_check_banks,
        "IA32_BIOS_SIGN_ID": profile.microcode_revision << 32,
        "PATCH_LEVEL": profile.microcode_revision,
    }
    by_index = {row.index: evolve(row, reset=resets.get(row.name, row.reset)) for row in rows}
    by_index.update((row.index, row) for row in profile.msrs)
    existing = {
        index: _specialize(profile, row)
        for index, row in by_index.items()
        if not row.features or profile.features.intersection(row.features)
    }
    for index, value in profile.vmx_capabilities.items():
        existing[index] = Msr(index, f"IA32_VMX_{CapabilityMsr(index).name}", reset=value, read_only=True)
    return existing


def _specialize(profile: Profile, row: Msr) -> Msr:
    writable = row.writable
    for feature, bits in row.writable_with:
        if feature in profile.features:
            writable |= bits
    if row.address:
        writable |= (1 << profile.physical_address_width) - 0x1000
    reset = row.reset if row.read_only else row.reset & (writable | row.ignored)
    return evolve(row, writable=writable, reset=reset)
