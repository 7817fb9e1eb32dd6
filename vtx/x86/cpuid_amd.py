"""The CPUID leaves that AMD processors define, or define otherwise than `vtx.x86.cpuid` does.

Caches, topology and the SVM features have leaves of their own; a leaf out of range reads zero, where Intel processors
answer with their highest basic leaf.

Spec: APM Vol. 3, "Obtaining Processor Information Via the CPUID Instruction", "Standard Feature Function Numbers",
"Extended Feature Function Numbers".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vtx.x86.cpuid import Dynamic, Registers
    from vtx.x86.profile import Cache, Profile

SVM_REVISION: Final = 1
LAST_RDPRU_REGISTER: Final = 1

# What function 8000_0001H repeats of function 1 in EDX: FPU to APIC, MTRR to PSE-36, MMX and FXSR.
_MIRRORED: Final = 0x0183_F3FF
_CMP_LEGACY: Final = 1 << 1  # function 8000_0001H, ECX: more than one core, without threads
_FULLY_ASSOCIATIVE: Final = 0xFF
_FULLY_ASSOCIATIVE_CODE: Final = 0xF
_WAYS_CODES: Final = {1: 1, 2: 2, 4: 4, 8: 6, 16: 8, 32: 0xA, 48: 0xB, 64: 0xC, 96: 0xD, 128: 0xE}
_L1_TLB: Final = _FULLY_ASSOCIATIVE << 24 | 64 << 16 | _FULLY_ASSOCIATIVE << 8 | 64  # data and instruction, 64 entries


def _extended_features(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    eax, ebx, ecx, edx = profile.feature_words.get((0x8000_0001, 0), (0, 0, 0, 0))
    mirrored = profile.feature_words[(1, 0)][3] & _MIRRORED
    if not dynamic.apic_enabled:
        mirrored &= ~(1 << 9)
    return profile.signature | eax, ebx, ecx | (_CMP_LEGACY if dynamic.cpus > 1 else 0), edx | mirrored


def _cache(profile: Profile, level: int, type_: str) -> Cache | None:
    return next((each for each in profile.caches if (each.level, each.type) == (level, type_)), None)


def _l1(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    def describe(cache: Cache | None) -> int:
        return 0 if cache is None else cache.size >> 10 << 24 | cache.ways << 16 | 1 << 8 | cache.line

    return _L1_TLB, _L1_TLB, describe(_cache(profile, 1, "data")), describe(_cache(profile, 1, "instruction"))


def _l2_and_l3(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    def describe(cache: Cache | None, size: int) -> int:
        if cache is None:
            return 0
        return size | _WAYS_CODES.get(cache.ways, _FULLY_ASSOCIATIVE_CODE) << 12 | 1 << 8 | cache.line

    l2, l3 = _cache(profile, 2, "unified"), _cache(profile, 3, "unified")
    return 0, 0, describe(l2, l2.size >> 10 << 16 if l2 else 0), describe(l3, l3.size >> 19 << 18 if l3 else 0)


def _address_widths_and_cores(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    _, ebx, _, _ = profile.feature_words.get((0x8000_0008, 0), (0, 0, 0, 0))
    eax = profile.physical_address_width | profile.linear_address_width << 8
    edx = LAST_RDPRU_REGISTER << 16 if profile.has("RDPRU") else 0
    edx |= profile.invlpgb_count_max
    return eax, ebx, min(dynamic.cpus - 1, 0xFF) | dynamic.apic_id_bits << 12, edx


def _svm(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    if "SVM" not in profile.features:
        return 0, 0, 0, 0
    _, _, _, edx = profile.feature_words.get((0x8000_000A, 0), (0, 0, 0, 0))
    return SVM_REVISION, profile.asids, 0, edx


def _absent(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    return 0, 0, 0, 0


LEAVES: Final[Mapping[int, Callable[[Profile, int, Dynamic], Registers]]] = MappingProxyType(
    {
        0x2: _absent,
        0x4: _absent,
        0x15: _absent,
        0x16: _absent,
        0x8000_0001: _extended_features,
        0x8000_0005: _l1,
        0x8000_0006: _l2_and_l3,
        0x8000_0008: _address_widths_and_cores,
        0x8000_000A: _svm,
    }
)
"""What computes a leaf, where it is not as `vtx.x86.cpuid` has it."""
