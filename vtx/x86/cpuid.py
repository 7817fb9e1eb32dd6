"""CPUID: the leaves of a profile, and the bits that follow the processor's current state.

A profile names its features and states its parts; what a leaf returns is computed from them, so that leaves which must
agree (feature flags and XSAVE sizes, cache and topology leaves, address widths) cannot disagree.

What AMD processors have otherwise is in `vtx.x86.cpuid_amd`.

Spec: SDM Vol. 2A, "CPUID—CPU Identification".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vtx.x86 import cpuid_amd
from vtx.x86.save_area import COMPONENTS, compacted_size, standard_offset, standard_size
from vtx.x86.state import MASK32, MASK64, CpuState, Cr4

if TYPE_CHECKING:
    from vtx.x86.profile import Profile

Registers = tuple[int, int, int, int]
"""EAX, EBX, ECX and EDX, in this order, 32 bits each."""

ZERO: Final[Registers] = (0, 0, 0, 0)


OSXSAVE = 1 << 27  # leaf 1, ECX
MONITOR = 1 << 3  # leaf 1, ECX
HTT = 1 << 28  # leaf 1, EDX
APIC_ON_CHIP = 1 << 9  # leaf 1, EDX
OSPKE = 1 << 4  # leaf 7, ECX
_SUPERVISOR = 1 << 0  # leaf 0DH, ECX of a state component: IA32_XSS enables it, not XCR0
SYSCALL = 1 << 11  # leaf 8000_0001H, EDX
NX = 1 << 20  # leaf 8000_0001H, EDX

MISC_ENABLE_MONITOR = 1 << 18
MISC_ENABLE_LIMIT_CPUID = 1 << 22
MISC_ENABLE_XD_DISABLE = 1 << 34


def reserved_cr0_bits(profile: Profile) -> int:
    """The CR0 bits whose setting faults: 63:32. Undefined bits below 32 are not here, writing them has no effect.

    Spec: SDM Vol. 3A, "Control Registers"; Vol. 2B, "MOV—Move to/from Control Registers".
    """
    del profile  # the same for all processors
    return MASK32 << 32


def reserved_cr4_bits(profile: Profile) -> int:
    """The CR4 bits whose setting faults on ``profile``, as a 64-bit mask.

    Spec: SDM Vol. 3A, "Control Registers", "CPUID Qualification of Control Register Flags".
    """
    return ~profile.cr4_supported & MASK64


@frozen
class Dynamic:
    """What CPUID reports beyond the profile: the state of the executing processor and the size of the machine.

    ``apic_id`` is the initial (x2)APIC id, ``cpus`` the number of logical processors of the one package.
    ``misc_enable`` is IA32_MISC_ENABLE, ``xss`` IA32_XSS.
    """

    apic_id: int = 0
    cpus: int = 1
    cr4: int = 0
    xcr0: int = 1
    apic_enabled: bool = True
    misc_enable: int = MISC_ENABLE_MONITOR
    in_64_bit_mode: bool = True
    xss: int = 0

    @classmethod
    def of(cls, state: CpuState, apic_id: int, cpus: int, apic_enabled: bool, misc_enable: int) -> Dynamic:
        """The context of the processor whose registers are ``state``."""
        return cls(apic_id, cpus, state.cr4, state.xcr0, apic_enabled, misc_enable, state.in_64_bit_mode)

    @property
    def apic_id_bits(self) -> int:
        """Bits of the APIC id that number the processors of the package (one thread per core)."""
        return (self.cpus - 1).bit_length()


def cpuid(profile: Profile, leaf: int, subleaf: int, dynamic: Dynamic) -> Registers:
    """What CPUID returns for EAX = ``leaf``, ECX = ``subleaf`` (both 32 bits).

    Spec: SDM Vol. 2A, "CPUID—CPU Identification".
    """
    if profile.is_amd:
        if not _in_range(profile, leaf, dynamic):
            return ZERO
        compute = cpuid_amd.LEAVES.get(leaf) or _LEAVES.get(leaf)
    else:
        leaf = _resolve(profile, leaf, dynamic)
        compute = _LEAVES.get(leaf)
    if compute is not None:
        return compute(profile, subleaf, dynamic)
    return profile.feature_words.get((leaf, 0), ZERO)


def _highest_basic_leaf(profile: Profile, dynamic: Dynamic) -> int:
    if dynamic.misc_enable & MISC_ENABLE_LIMIT_CPUID:
        return min(2, profile.highest_basic_leaf)
    return profile.highest_basic_leaf


def _resolve(profile: Profile, leaf: int, dynamic: Dynamic) -> int:
    """The leaf that answers for ``leaf``: beyond the basic or extended range it is the highest basic one."""
    return leaf if _in_range(profile, leaf, dynamic) else _highest_basic_leaf(profile, dynamic)


def _in_range(profile: Profile, leaf: int, dynamic: Dynamic) -> bool:
    return leaf <= _highest_basic_leaf(profile, dynamic) or 0x8000_0000 <= leaf <= profile.highest_extended_leaf


def _with_flags(profile: Profile, leaf: int, subleaf: int, values: Registers) -> Registers:
    flags = profile.feature_words.get((leaf, subleaf), ZERO)
    return (values[0] | flags[0], values[1] | flags[1], values[2] | flags[2], values[3] | flags[3])


def _text(text: str) -> tuple[int, ...]:
    data = text.encode("ascii")
    return tuple(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))


def _vendor(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    first, second, third = _text(profile.vendor)
    return _highest_basic_leaf(profile, dynamic), first, third, second


def _signature_and_features(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    eax, ebx, ecx, edx = profile.feature_words[(1, 0)]
    addressable = min(1 << dynamic.apic_id_bits, 0xFF)
    clflush_qwords = 8 if "CLFSH" in profile.features else 0
    ebx |= clflush_qwords << 8 | addressable << 16 | (dynamic.apic_id & 0xFF) << 24
    if dynamic.cr4 & Cr4.OSXSAVE:
        ecx |= OSXSAVE
    if not dynamic.misc_enable & MISC_ENABLE_MONITOR:
        ecx &= ~MONITOR
    if not dynamic.apic_enabled:
        edx &= ~APIC_ON_CHIP
    if dynamic.cpus > 1:
        edx |= HTT
    return profile.signature | eax, ebx, ecx, edx


def _cache_descriptors(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    # One byte says how often to execute the leaf (once); fifteen descriptors follow, the null one filling up.
    data = bytes((1, *profile.cache_descriptors)).ljust(16, b"\0")
    eax, ebx, ecx, edx = (int.from_bytes(data[i : i + 4], "little") for i in range(0, 16, 4))
    return eax, ebx, ecx, edx


def _cache_parameters(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    if subleaf >= len(profile.caches):
        return ZERO
    cache = profile.caches[subleaf]
    package = (1 << dynamic.apic_id_bits) - 1
    sharing = min(package, 0xFFF) if cache.shared else 0
    eax = cache.type_code | cache.level << 5 | 1 << 8 | sharing << 14 | min(package, 0x3F) << 26
    ebx = (cache.line - 1) | (cache.ways - 1) << 22
    return eax, ebx, cache.sets - 1, cache.inclusive << 1 | cache.complex_indexing << 2


_MONITOR_LINE: Final = 64
# MWAIT takes extensions; interrupts can be break events although they are masked. There is no C-state to choose.
_MWAIT_EXTENSIONS: Final = 0b11


def _monitor(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    if "MONITOR" not in profile.features:
        return ZERO
    return _MONITOR_LINE, _MONITOR_LINE, _MWAIT_EXTENSIONS, 0


def _structured_features(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    more = profile.feature_words.get((7, 1), ZERO)
    if subleaf:
        return more if subleaf == 1 else ZERO
    _, ebx, ecx, edx = profile.feature_words.get((7, 0), ZERO)
    return int(more != ZERO), ebx, ecx | (OSPKE if dynamic.cr4 & Cr4.PKE else 0), edx


def _performance_monitoring(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    return profile.performance.cpuid if profile.performance is not None else ZERO


def _topology(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    if subleaf == 0:  # one logical processor per core
        return 0, 1, 1 << 8, dynamic.apic_id
    if subleaf == 1:
        return dynamic.apic_id_bits, dynamic.cpus, 2 << 8 | 1, dynamic.apic_id
    return 0, 0, subleaf & 0xFF, dynamic.apic_id


def _extended_state(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    supported, amd = profile.xcr0_supported, profile.is_amd
    if not supported:
        return ZERO
    if subleaf == 0:
        now, most = (standard_size(components, amd=amd) for components in (dynamic.xcr0, supported))
        return supported & MASK32, now, most, supported >> 32
    if subleaf == 1:
        features, *_ = profile.feature_words.get((0xD, 1), ZERO)
        if not profile.features & {"XSAVEC", "XSAVES"}:
            return features, 0, 0, 0
        size = compacted_size(dynamic.xcr0 | dynamic.xss)
        return features, size, profile.xss_supported & MASK32, profile.xss_supported >> 32
    for component in COMPONENTS:
        if component.bit == subleaf and (supported | profile.xss_supported) >> subleaf & 1:
            if component.supervisor:
                return component.size, 0, _SUPERVISOR, 0
            return component.size, standard_offset(component, amd=amd), 0, 0
    return ZERO


def _tsc_and_crystal(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    numerator, denominator = profile.tsc_crystal_ratio
    return denominator, numerator, profile.crystal_frequency, 0


def _frequencies(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    mhz = profile.tsc_frequency // 1_000_000
    return mhz, mhz, 100, 0


def _highest_extended(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    if profile.is_amd:
        first, second, third = _text(profile.vendor)
        return profile.highest_extended_leaf, first, third, second
    return profile.highest_extended_leaf, 0, 0, 0


def _extended_features(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    eax, ebx, ecx, edx = profile.feature_words.get((0x8000_0001, 0), ZERO)
    if not dynamic.in_64_bit_mode:
        edx &= ~SYSCALL  # Intel processors have it in 64-bit mode alone and report it there alone
    if dynamic.misc_enable & MISC_ENABLE_XD_DISABLE:
        edx &= ~NX
    return eax, ebx, ecx, edx


def _brand_part(part: int) -> Callable[[Profile, int, Dynamic], Registers]:
    def compute(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
        eax, ebx, ecx, edx = _text(profile.brand.ljust(48, "\0"))[4 * part : 4 * part + 4]
        return eax, ebx, ecx, edx

    return compute


_L2_WAYS_CODE: Final = {1: 1, 2: 2, 4: 4, 8: 6, 16: 8, 32: 0xA}


def _l2_cache(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    for cache in profile.caches:
        if cache.level == 2:
            return 0, 0, cache.line | _L2_WAYS_CODE.get(cache.ways, 0) << 12 | (cache.size >> 10) << 16, 0
    return ZERO


def _address_widths(profile: Profile, subleaf: int, dynamic: Dynamic) -> Registers:
    return profile.physical_address_width | profile.linear_address_width << 8, 0, 0, 0


_LEAVES: Final[Mapping[int, Callable[[Profile, int, Dynamic], Registers]]] = MappingProxyType(
    {
        0x0: _vendor,
        0x1: _signature_and_features,
        0x2: _cache_descriptors,
        0x4: _cache_parameters,
        0x5: _monitor,
        0x7: _structured_features,
        0xA: _performance_monitoring,
        0xB: _topology,
        0xD: _extended_state,
        0x15: _tsc_and_crystal,
        0x16: _frequencies,
        0x8000_0000: _highest_extended,
        0x8000_0001: _extended_features,
        0x8000_0002: _brand_part(0),
        0x8000_0003: _brand_part(1),
        0x8000_0004: _brand_part(2),
        0x8000_0006: _l2_cache,
        0x8000_0008: _address_widths,
    }
)
