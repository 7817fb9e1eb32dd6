"""CPUID features by name: where each is reported, and which control-register bits come with it.

Spec: SDM Vol. 2A, "CPUID—CPU Identification"; Vol. 3A, "Control Registers"; APM Vol. 3, "Obtaining
Processor Information Via the CPUID Instruction".
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from attrs import frozen

from vtx.x86.state import Cr4

EAX, EBX, ECX, EDX = range(4)


@frozen
class FeatureBit:
    """Where CPUID reports a feature: leaf, subleaf, register (0 to 3 for EAX, EBX, ECX, EDX) and bit."""

    leaf: int
    subleaf: int
    register: int
    bit: int


# One row per feature-flag register: (leaf, subleaf, register) and the names by bit. Flags that follow the processor's
# state (OSXSAVE, OSPKE) or the number of processors (HTT) are absent: a profile cannot state them.
_FLAGS: Final[tuple[tuple[int, int, int, dict[int, str]], ...]] = (
    (
        1,
        0,
        ECX,
        {
            0: "SSE3",
            1: "PCLMULQDQ",
            2: "DTES64",
            3: "MONITOR",
            4: "DS-CPL",
            5: "VMX",
            6: "SMX",
            7: "EIST",
            8: "TM2",
            9: "SSSE3",
            10: "CNXT-ID",
            11: "SDBG",
            12: "FMA",
            13: "CMPXCHG16B",
            14: "xTPR",
            15: "PDCM",
            17: "PCID",
            18: "DCA",
            19: "SSE4_1",
            20: "SSE4_2",
            21: "x2APIC",
            22: "MOVBE",
            23: "POPCNT",
            24: "TSC-Deadline",
            25: "AESNI",
            26: "XSAVE",
            28: "AVX",
            29: "F16C",
            30: "RDRAND",
        },
    ),
    (
        1,
        0,
        EDX,
        {
            0: "FPU",
            1: "VME",
            2: "DE",
            3: "PSE",
            4: "TSC",
            5: "MSR",
            6: "PAE",
            7: "MCE",
            8: "CX8",
            9: "APIC",
            11: "SEP",
            12: "MTRR",
            13: "PGE",
            14: "MCA",
            15: "CMOV",
            16: "PAT",
            17: "PSE-36",
            18: "PSN",
            19: "CLFSH",
            21: "DS",
            22: "ACPI",
            23: "MMX",
            24: "FXSR",
            25: "SSE",
            26: "SSE2",
            27: "SS",
            29: "TM",
            31: "PBE",
        },
    ),
    (6, 0, EAX, {2: "ARAT", 13: "HDC"}),
    (6, 0, ECX, {0: "APERFMPERF"}),
    (
        7,
        0,
        EBX,
        {
            0: "FSGSBASE",
            1: "IA32_TSC_ADJUST",
            2: "SGX",
            3: "BMI1",
            4: "HLE",
            5: "AVX2",
            6: "FDP_EXCPTN_ONLY",
            7: "SMEP",
            8: "BMI2",
            9: "ERMS",
            10: "INVPCID",
            11: "RTM",
            12: "RDT-M",
            13: "FPU-CS-DS-DEPRECATED",
            14: "MPX",
            15: "RDT-A",
            18: "RDSEED",
            19: "ADX",
            20: "SMAP",
            23: "CLFLUSHOPT",
            24: "CLWB",
            25: "PT",
            29: "SHA",
        },
    ),
    (
        7,
        0,
        ECX,
        {
            2: "UMIP",
            3: "PKU",
            5: "WAITPKG",
            7: "CET_SS",
            16: "LA57",
            22: "RDPID",
            23: "KL",
            24: "BUS_LOCK_DETECT",
            31: "PKS",
        },
    ),
    (
        7,
        0,
        EDX,
        {4: "FSRM", 5: "UINTR", 10: "MD_CLEAR", 20: "CET_IBT", 26: "SPEC_CTRL", 27: "STIBP", 28: "L1D_FLUSH"}
        | {29: "ARCH_CAPABILITIES", 31: "SSBD"},
    ),
    (7, 1, EAX, {17: "FRED", 18: "LKGS", 26: "LAM", 27: "MSRLIST"}),
    (7, 1, EDX, {17: "UIRET_UIF"}),
    (0xD, 1, EAX, {0: "XSAVEOPT", 1: "XSAVEC", 2: "XGETBV_1", 3: "XSAVES"}),
    (
        0x8000_0001,
        0,
        ECX,
        {0: "LAHF64", 2: "SVM", 4: "AltMovCr8", 5: "LZCNT", 8: "PREFETCHW", 12: "SKINIT", 29: "MONITORX"},
    ),
    (0x8000_0001, 0, EDX, {11: "SYSCALL", 20: "NX", 22: "MmxExt", 25: "FFXSR", 26: "PAGE1GB", 27: "RDTSCP", 29: "LM"}),
    (0x8000_0007, 0, EDX, {8: "INVARIANT-TSC"}),
    (
        0x8000_0008,
        0,
        EBX,
        {0: "CLZERO", 3: "INVLPGB", 4: "RDPRU", 8: "MCOMMIT", 20: "EferLmsleUnsupported", 21: "INVLPGBnestedPages"},
    ),
    (
        0x8000_000A,
        0,
        EDX,
        {
            0: "NP",
            1: "LbrVirt",
            2: "SVML",
            3: "NRIPS",
            4: "TscRateMsr",
            5: "VmcbClean",
            6: "FlushByAsid",
            7: "DecodeAssists",
            10: "PauseFilter",
            12: "PauseFilterThreshold",
            13: "AVIC",
            15: "VmsaveVirt",
            16: "VGIF",
            17: "GMET",
            18: "x2AVIC",
            24: "TlbiCtl",
            25: "VNMI",
            28: "NestedVirtVmcbAddrChk",
            30: "IdleHltIntercept",
        },
    ),
)

FEATURES: Final[Mapping[str, FeatureBit]] = MappingProxyType(
    {
        name: FeatureBit(leaf, subleaf, register, bit)
        for leaf, subleaf, register, names in _FLAGS
        for bit, name in names.items()
    }
)


# CR4 bits and the feature that makes each one writable.
CR4_FEATURES: Final[tuple[tuple[Cr4, str], ...]] = (
    (Cr4.VME, "VME"),
    (Cr4.PVI, "VME"),
    (Cr4.TSD, "TSC"),
    (Cr4.DE, "DE"),
    (Cr4.PSE, "PSE"),
    (Cr4.PAE, "PAE"),
    (Cr4.MCE, "MCE"),
    (Cr4.PGE, "PGE"),
    (Cr4.PCE, "MSR"),  # RDPMC came with no flag of its own; every processor modelled here has it
    (Cr4.OSFXSR, "FXSR"),
    (Cr4.OSXMMEXCPT, "SSE"),
    (Cr4.UMIP, "UMIP"),
    (Cr4.LA57, "LA57"),
    (Cr4.VMXE, "VMX"),
    (Cr4.SMXE, "SMX"),
    (Cr4.FSGSBASE, "FSGSBASE"),
    (Cr4.PCIDE, "PCID"),
    (Cr4.OSXSAVE, "XSAVE"),
    (Cr4.KL, "KL"),
    (Cr4.SMEP, "SMEP"),
    (Cr4.SMAP, "SMAP"),
    (Cr4.PKE, "PKU"),
    (Cr4.CET, "CET_SS"),
    (Cr4.CET, "CET_IBT"),
    (Cr4.PKS, "PKS"),
    (Cr4.UINTR, "UINTR"),
    (Cr4.LAM_SUP, "LAM"),
    (Cr4.FRED, "FRED"),
)


def supported_cr4_bits(features: frozenset[str]) -> int:
    """The CR4 bits that a processor with ``features`` lets software set."""
    bits = 0
    for bit, feature in CR4_FEATURES:
        if feature in features:
            bits |= bit.value
    return bits
