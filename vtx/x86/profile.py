"""CPU profiles: what one processor model is, read from a TOML file.

A profile states features by name; CPUID leaves, control-register masks and capability MSRs are derived from it, so
that they agree. Profiles that come with the package live in ``vtx/profiles``; any other file can be given by path.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from attrs import evolve, field, frozen

from vtx.x86.cpuid import ZERO, Registers
from vtx.x86.cpuid_features import FEATURES, supported_cr4_bits
from vtx.x86.msr_table import ARCHITECTURAL_MSRS, Msr
from vtx.x86.performance import PerformanceMonitoring
from vtx.x86.save_area import SUPERVISOR_COMPONENTS, USER_COMPONENT_BITS
from vtx.x86.state import MASK32, MASK64
from vtx.x86.toml_section import ProfileError, Section
from vtx.x86.vmx_profile import capability_msrs

DEFAULT_PROFILE: Final = "skylake-server"

_AMD_VENDORS: Final = ("AuthenticAMD", "HygonGenuine")
_LARGEST_ASIDS: Final = 0x1_0000

PERFORMANCE_LEAF: Final = 0xA

CACHE_TYPES: Final = {"data": 1, "instruction": 2, "unified": 3}


@frozen
class Cache:
    """One cache: ``size`` and ``line`` in bytes; ``shared`` by the whole package or private to a core."""

    level: int
    type: str
    size: int
    ways: int
    line: int
    shared: bool
    inclusive: bool
    complex_indexing: bool

    @property
    def type_code(self) -> int:
        """The cache type as CPUID leaf 4 encodes it."""
        return CACHE_TYPES[self.type]

    @property
    def sets(self) -> int:
        """Number of sets."""
        return self.size // (self.ways * self.line)


@frozen(eq=False)
class Profile:
    """A processor model.

    ``features`` are keys of `vtx.x86.cpuid_features.FEATURES`. Widths are in bits, frequencies in Hz. ``msrs`` are
    further MSRs, and architectural ones that this model defines otherwise. ``vmx_capabilities`` maps the index of each
    VMX capability MSR to its value; empty without VMX. ``performance`` is what CPUID leaf 0AH states, if anything.
    ``asids`` is the number of address-space identifiers, 0 without SVM. By ``breakpoints_without_gif`` breakpoints hit
    also while the global interrupt flag is clear, as in virtual machines whose hypervisor leaves that out.
    ``invlpgb_count_max`` is the number of pages that INVLPGB can invalidate after the first. The derived parts follow
    from the rest.
    """

    name: str
    description: str
    vendor: str
    family: int
    model: int
    stepping: int
    brand: str
    physical_address_width: int
    linear_address_width: int
    tsc_frequency: int
    crystal_frequency: int
    highest_basic_leaf: int
    highest_extended_leaf: int
    features: frozenset[str]
    xsave_components: tuple[str, ...]
    cache_descriptors: tuple[int, ...]
    caches: tuple[Cache, ...]
    microcode_revision: int
    variable_mtrrs: int
    machine_check_banks: int
    msrs: tuple[Msr, ...]
    vmx_capabilities: Mapping[int, int]
    performance: PerformanceMonitoring | None
    asids: int = 0
    breakpoints_without_gif: bool = False
    invlpgb_count_max: int = 0
    signature: int = field(init=False)
    feature_words: Mapping[tuple[int, int], Registers] = field(init=False, repr=False)
    cr4_supported: int = field(init=False)
    xcr0_supported: int = field(init=False)
    xss_supported: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "signature", _signature(self.family, self.model, self.stepping))
        object.__setattr__(self, "feature_words", _feature_words(self.features))
        object.__setattr__(self, "cr4_supported", supported_cr4_bits(self.features))
        xcr0 = sum(1 << USER_COMPONENT_BITS[name] for name in self.xsave_components)
        object.__setattr__(self, "xcr0_supported", xcr0)
        object.__setattr__(self, "xss_supported", _supported_xss(self.features))

    def has(self, feature: str) -> bool:
        """Whether CPUID reports ``feature``; KeyError for a name that `vtx.x86.cpuid_features.FEATURES` lacks."""
        FEATURES[feature]
        return feature in self.features

    @property
    def is_amd(self) -> bool:
        """Whether instructions, MSRs and CPUID leaves are those of AMD processors where the vendors differ."""
        return self.vendor in _AMD_VENDORS

    @property
    def tsc_crystal_ratio(self) -> tuple[int, int]:
        """TSC frequency over crystal frequency, as numerator and denominator."""
        return self.tsc_frequency // self.crystal_frequency, 1


def _supported_xss(features: frozenset[str]) -> int:
    """The bits of IA32_XSS that a processor with ``features`` lets software set."""
    if "XSAVES" not in features:
        return 0
    present = (each for name, each in SUPERVISOR_COMPONENTS.items() if name in features)
    return sum({1 << component.bit for components in present for component in components})


def _signature(family: int, model: int, stepping: int) -> int:
    """Version information of CPUID leaf 1. Spec: SDM Vol. 2A, "CPUID—CPU Identification" (version information)."""
    extended_family = max(family - 0xF, 0)
    return stepping | (model & 0xF) << 4 | (family - extended_family) << 8 | (model >> 4) << 16 | extended_family << 20


def _feature_words(features: frozenset[str]) -> Mapping[tuple[int, int], Registers]:
    words: dict[tuple[int, int], list[int]] = {}
    for name in features:
        at = FEATURES[name]
        words.setdefault((at.leaf, at.subleaf), list(ZERO))[at.register] |= 1 << at.bit
    return MappingProxyType({place: (w[0], w[1], w[2], w[3]) for place, w in words.items()})


def profile_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    folder = resources.files("vtx.profiles")
    return tuple(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml")))


@functools.cache
def load_profile(name: str = DEFAULT_PROFILE) -> Profile:
    """The profile of that name, or the one in the file at that path if ``name`` ends in ``.toml``.

    ProfileError, one line, if there is none or something in it is wrong.
    """
    return parse_profile(*_read(name))


def profile_document(name: str = DEFAULT_PROFILE) -> dict[str, Any]:
    """The tables of the profile that `load_profile` would give, as TOML has them, for the caller to change at will.

    ProfileError, one line, if there is none or it is not TOML.
    """
    return _parse(*_read(name))


def _read(name: str) -> tuple[str, str]:
    """File name, for messages, and text of the profile ``name``."""
    if name.endswith(".toml"):
        try:
            return Path(name).name, Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise ProfileError(f"{name}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ProfileError(f"{name}: expected a UTF-8 text file") from None
    if name not in profile_names():
        raise ProfileError(f"{name}: expected a profile name ({', '.join(profile_names())}) or a .toml file")
    return f"{name}.toml", (resources.files("vtx.profiles") / f"{name}.toml").read_text(encoding="utf-8")


def _parse(file: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{file}: expected TOML: {error}") from None


def parse_profile(file: str, text: str) -> Profile:
    """The profile that ``text`` describes; ``file`` is named in the one-line ProfileError of any mistake."""
    return build_profile(file, _parse(file, text))


def build_profile(file: str, document: Mapping[str, Any]) -> Profile:
    """The profile that the tables of ``document`` describe; ``file`` is named in the ProfileError of any mistake."""
    top = Section(file, "", document)
    identity, implementation, cpuid = (top.section(key) for key in ("identity", "implementation", "cpuid"))
    features = frozenset(cpuid.names("features", FEATURES, "CPUID feature"))
    vmx = top.optional_section("vmx")
    if (vmx is not None) != ("VMX" in features):
        raise top.fail("vmx", "a [vmx] table if and only if cpuid.features has VMX")
    svm = top.optional_section("svm")
    if (svm is not None) != ("SVM" in features):
        raise top.fail("svm", "an [svm] table if and only if cpuid.features has SVM")
    profile = Profile(
        name=top.text("name", 64),
        description=top.text("description", 200),
        vendor=_vendor(identity),
        family=identity.integer("family", 0, 0xF + 0xFF),
        model=identity.integer("model", 0, 0xFF),
        stepping=identity.integer("stepping", 0, 0xF),
        brand=identity.text("brand", 47),
        microcode_revision=implementation.integer("microcode_revision", 0, MASK32),
        physical_address_width=implementation.integer("physical_address_width", 36, 52),
        linear_address_width=57 if "LA57" in features else 48,
        tsc_frequency=implementation.integer("tsc_frequency", 1_000_000, 10_000_000_000),
        crystal_frequency=implementation.integer("crystal_frequency", 1_000_000, MASK32),
        highest_basic_leaf=cpuid.integer("highest_basic_leaf", 1, 0x20),
        highest_extended_leaf=cpuid.integer("highest_extended_leaf", 0x8000_0000, 0x8000_0020),
        features=features,
        xsave_components=_xsave_components(cpuid, features),
        cache_descriptors=cpuid.integers("cache_descriptors", 0xFF, 15),
        caches=tuple(_cache(section) for section in cpuid.sections("caches")),
        variable_mtrrs=implementation.integer("variable_mtrrs", 0, 10),
        machine_check_banks=implementation.integer("machine_check_banks", 0, 32),
        msrs=_msrs(top),
        vmx_capabilities=MappingProxyType(capability_msrs(vmx, features) if vmx else {}),
        performance=_performance(top),
        asids=svm.integer("asids", 2, _LARGEST_ASIDS) if svm else 0,
        breakpoints_without_gif=svm.flag("breakpoints_without_gif", default=False) if svm else False,
        invlpgb_count_max=cpuid.integer("invlpgb_count_max", 0, 0xFFFF) if "INVLPGB" in features else 0,
    )
    for section in filter(None, (identity, implementation, cpuid, svm, top)):
        section.finish()
    return _checked(top, profile)


def _performance(top: Section) -> PerformanceMonitoring | None:
    section = top.optional_section("performance_monitoring")
    return PerformanceMonitoring.parse(section) if section else None


def _vendor(identity: Section) -> str:
    vendor = identity.text("vendor", 12)
    if len(vendor) != 12:
        raise identity.fail("vendor", f"a string of exactly 12 characters, not {vendor!r}")
    return vendor


def _xsave_components(cpuid: Section, features: frozenset[str]) -> tuple[str, ...]:
    names = cpuid.names("xsave_components", USER_COMPONENT_BITS, "XSAVE state component", ())
    if bool(names) != ("XSAVE" in features):
        raise cpuid.fail("xsave_components", "at least x87 with the feature XSAVE, none without it")
    if names and "x87" not in names:
        raise cpuid.fail("xsave_components", "x87 among the components")
    if ("PKRU" in names) != ("XSAVE" in features and "PKU" in features):
        raise cpuid.fail("xsave_components", "PKRU if and only if cpuid.features has PKU")
    for name in ("BNDREGS", "BNDCSR"):
        if (name in names) != ("XSAVE" in features and "MPX" in features):
            raise cpuid.fail("xsave_components", f"{name} if and only if cpuid.features has MPX")
    return tuple(names)


def _cache(section: Section) -> Cache:
    cache = Cache(
        level=section.integer("level", 1, 4),
        type=section.choice("type", CACHE_TYPES),
        size=section.integer("size", 64, 1 << 30),
        ways=section.integer("ways", 1, 1024),
        line=section.integer("line", 16, 4096),
        shared=section.flag("shared", default=False),
        inclusive=section.flag("inclusive", default=False),
        complex_indexing=section.flag("complex_indexing", default=False),
    )
    if cache.size % (cache.ways * cache.line):
        raise section.fail("size", "a multiple of ways times line")
    section.finish()
    return cache


def _msrs(top: Section) -> tuple[Msr, ...]:
    section = top.optional_section("msrs")
    if section is None:
        return ()
    by_index: dict[int, Msr] = {}
    for name, row in section.keyed_sections():
        msr = _msr(name, row)
        if msr.index in by_index:
            raise row.fail("index", f"an index of its own, not {msr.index:#x} of {by_index[msr.index].name}")
        by_index[msr.index] = msr
    return tuple(by_index.values())


def _msr(name: str, row: Section) -> Msr:
    base = ARCHITECTURAL_MSRS.get(name)
    if base is None:
        base = Msr(row.integer("index", 0, MASK32), name, writable=0)
        if any(base.index == msr.index for msr in ARCHITECTURAL_MSRS.values()):
            raise row.fail("index", f"the index of an MSR that is not architectural, not {base.index:#x}")
    msr = evolve(
        base,
        reset=row.integer("reset", 0, MASK64, base.reset),
        writable=row.integer("writable", 0, MASK64, base.writable),
        ignored=row.integer("ignored", 0, MASK64, base.ignored),
        read_only=row.flag("read_only", base.read_only),
    )
    row.finish()
    return msr


def _checked(top: Section, profile: Profile) -> Profile:
    """``profile``, unless parts of it that are right by themselves contradict each other."""
    for feature, is_amd in (("VMX", False), ("SVM", True)):
        if feature in profile.features and profile.is_amd is not is_amd:
            raise top.fail("cpuid.features", f"no {feature} with the vendor {profile.vendor}")
    extended = [name for name in profile.features if FEATURES[name].leaf > profile.highest_extended_leaf]
    basic = [name for name in profile.features if profile.highest_basic_leaf < FEATURES[name].leaf < 0x8000_0000]
    for key, beyond in (("cpuid.highest_extended_leaf", extended), ("cpuid.highest_basic_leaf", basic)):
        if beyond:
            raise top.fail(key, f"a leaf that covers feature {min(beyond)}")
    if profile.highest_extended_leaf < 0x8000_0008 and profile.physical_address_width != 36:
        raise top.fail(
            "implementation.physical_address_width", "36 without CPUID leaf 80000008H to report another width"
        )
    if profile.tsc_frequency % profile.crystal_frequency:
        raise top.fail("implementation.tsc_frequency", "a multiple of crystal_frequency")
    if profile.performance is not None and (profile.is_amd or profile.highest_basic_leaf < PERFORMANCE_LEAF):
        raise top.fail("performance_monitoring", "no such table for an AMD processor or without CPUID leaf 0AH")
    if profile.linear_address_width == 57 and profile.highest_extended_leaf < 0x8000_0008:
        raise top.fail("cpuid.highest_extended_leaf", "80000008H or higher with LA57")
    return profile
