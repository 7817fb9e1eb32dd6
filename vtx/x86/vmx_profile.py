"""The VMX section of a CPU profile, expanded to the values of the capability MSRs.

A profile lists what it allows by the manual's names; which bits that makes must-be-one or may-be-one follows.

Spec: SDM Vol. 3D, "VMX Capability Reporting Facility".
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from vmcs.bits import Layout, mask
from vmcs.capabilities import BASIC, EPT_VPID, MISC, Capabilities, CapabilityMsr
from vmcs.controls import CONTROLS, DEFAULT1, Control, ControlWord
from vmcs.region import slots
from vtx.addresses import PAGE_SIZE
from vtx.x86.cpuid_features import supported_cr4_bits
from vtx.x86.state import MASK32, Cr0, Cr4
from vtx.x86.toml_section import Section

# Key of a profile, control word it lists, and the MSRs that report the word: as it is, and with the "true" settings.
_CONTROL_MSRS: Final = (
    ("pin_based", ControlWord.PIN_BASED, CapabilityMsr.PINBASED_CTLS, CapabilityMsr.TRUE_PINBASED_CTLS),
    ("primary", ControlWord.PRIMARY, CapabilityMsr.PROCBASED_CTLS, CapabilityMsr.TRUE_PROCBASED_CTLS),
    ("exit", ControlWord.EXIT, CapabilityMsr.EXIT_CTLS, CapabilityMsr.TRUE_EXIT_CTLS),
    ("entry", ControlWord.ENTRY, CapabilityMsr.ENTRY_CTLS, CapabilityMsr.TRUE_ENTRY_CTLS),
)

# The sets that report allowed 1-settings alone exist with the control that activates them.
_ACTIVATED_MSRS: Final = (
    ("secondary", ControlWord.SECONDARY, CapabilityMsr.PROCBASED_CTLS2, "primary", "activate secondary controls"),
    ("tertiary", ControlWord.TERTIARY, CapabilityMsr.PROCBASED_CTLS3, "primary", "activate tertiary controls"),
    ("secondary_exit", ControlWord.SECONDARY_EXIT, CapabilityMsr.EXIT_CTLS2, "exit", "activate secondary controls"),
)

# Controls about an instruction or register state that CPUID has to report.
CONTROL_FEATURES: Final = {
    "enable RDTSCP": "RDTSCP",
    "RDRAND exiting": "RDRAND",
    "enable INVPCID": "INVPCID",
    "RDSEED exiting": "RDSEED",
    "enable XSAVES/XRSTORS": "XSAVES",
    "enable user wait and pause": "WAITPKG",
    "enable ENCLS exiting": "SGX",
    "VMM bus-lock detection": "BUS_LOCK_DETECT",
    "virtualize x2APIC mode": "x2APIC",
    "clear IA32_BNDCFGS": "MPX",
    "load IA32_BNDCFGS": "MPX",
    "load PKRS": "PKS",
    "load CET state": "CET_SS",
    "prematurely busy shadow stack": "CET_SS",
    "save FRED": "FRED",
    "load FRED": "FRED",
    "load IA32_SPEC_CTRL": "SPEC_CTRL",
    "virtualize IA32_SPEC_CTRL": "SPEC_CTRL",
    "enable MSR-list instructions": "MSRLIST",
    "clear UINV": "UINTR",
    "load UINV": "UINTR",
}

# The same for bits of IA32_VMX_BASIC.
BASIC_FEATURES: Final = {"nested-exception support": "FRED"}

# Secondary controls that VM entry accepts only together with another one.
CONTROL_NEEDS: Final = {
    "unrestricted guest": "enable EPT",
    "enable PML": "enable EPT",
    "mode-based execute control for EPT": "enable EPT",
    "sub-page write permissions for EPT": "enable EPT",
}

_REGION_SIZE: Final = "VMXON and VMCS region size"

VM_FUNCTIONS: Final = ("EPTP switching",)


def _controls(section: Section, key: str, word: ControlWord, features: Collection[str]) -> list[Control]:
    by_name = {control.name: control for control in CONTROLS if control.word is word}
    default: tuple[str, ...] | None = () if word in (ControlWord.TERTIARY, ControlWord.SECONDARY_EXIT) else None
    names = section.names(key, by_name, f"control of the {word.value}", default)
    for position, name in enumerate(names):
        if (feature := CONTROL_FEATURES.get(name, None)) and feature not in features:
            raise section.fail(f"{key}[{position}]", f"CPUID feature {feature} for {name!r}")
        if (other := CONTROL_NEEDS.get(name, None)) and other not in names:
            raise section.fail(f"{key}[{position}]", f"{other!r} to be listed with {name!r}")
    return [by_name[name] for name in names]


def _fields(section: Section, layout: Layout) -> int:
    """A table of one key per slice of ``layout``, each an integer or, one bit wide, true or false; absent is 0."""
    value = 0
    for part in layout.slices:
        if part.width == 1:
            value |= part.put(int(section.flag(part.name, default=False)))
        else:
            value |= part.put(section.integer(part.name, 0, mask(part.width), default=0))
    section.finish()
    return value


def _flags(section: Section, key: str, layout: Layout) -> int:
    names = section.names(key, [part.name for part in layout.slices if part.width == 1], f"bit of {layout.name}")
    return layout.encode(dict.fromkeys(names, 1))


def capability_msrs(section: Section, features: frozenset[str]) -> dict[int, int]:
    """Index to value of each capability MSR that the ``[vmx]`` table of a profile with ``features`` makes exist.

    ProfileError for an unknown name, an impossible combination or a missing key.
    """
    msrs: dict[int, int] = {}
    basic = msrs[CapabilityMsr.BASIC] = _fields(section.section("basic"), BASIC)
    for bit, feature in BASIC_FEATURES.items():
        if BASIC.get(basic, bit) and feature not in features:
            raise section.fail("basic", f"CPUID feature {feature} for {bit!r}")
    msrs[CapabilityMsr.MISC] = _fields(section.section("misc"), MISC)
    true_controls = BASIC.get(basic, "default1 controls may be 0")
    allowed: dict[str, int] = {}
    for key, word, plain, true in _CONTROL_MSRS:
        allowed[key] = sum(control.mask for control in _controls(section, key, word, features))
        default1 = DEFAULT1[word]
        msrs[plain] = (allowed[key] | default1) << 32 | default1
        if true_controls:
            msrs[true] = (allowed[key] | default1) << 32 | default1 & ~allowed[key]
    for key, word, msr, owner, activation in _ACTIVATED_MSRS:
        controls = _controls(section, key, word, features)
        allowed[key] = sum(control.mask for control in controls)
        activated = any(c.name == activation and c.mask & allowed[owner] for c in CONTROLS)
        if controls and not activated:
            raise section.fail(key, f"no controls without {activation!r} in {owner}")
        if activated:
            msrs[msr] = allowed[key] << 32 if word.width == 32 else allowed[key]
    _add_second_level(section, msrs)
    _add_fixed_bits(section, msrs, features)
    section.finish()
    capabilities = Capabilities(msrs)
    msrs[CapabilityMsr.VMCS_ENUM] = capabilities.highest_index << 1
    if capabilities.region_size > PAGE_SIZE:
        raise section.fail(f"basic.{_REGION_SIZE}", f"at most {PAGE_SIZE} bytes")
    try:
        slots(capabilities)
    except ValueError as error:
        raise section.fail(f"basic.{_REGION_SIZE}", f"room for every field: {error}") from None
    return dict(sorted(msrs.items()))


def _add_second_level(section: Section, msrs: dict[int, int]) -> None:
    names = {c.name for c in CONTROLS if c.word is ControlWord.SECONDARY and Capabilities(msrs).allows(c)}
    prefix = EPT_VPID.by_name["maximum HLAT prefix size"]
    ept_vpid = _flags(section, "ept_vpid", EPT_VPID)
    ept_vpid |= prefix.put(section.integer("maximum_hlat_prefix_size", 0, 1, 0))
    if names & {"enable EPT", "enable VPID"}:
        msrs[CapabilityMsr.EPT_VPID_CAP] = ept_vpid
    elif ept_vpid:
        raise section.fail("ept_vpid", "no names without 'enable EPT' or 'enable VPID'")
    functions = section.names("vm_functions", VM_FUNCTIONS, "VM function", ())
    if "enable VM functions" in names:
        msrs[CapabilityMsr.VMFUNC] = sum(1 << VM_FUNCTIONS.index(name) for name in functions)
    elif functions:
        raise section.fail("vm_functions", "no names without 'enable VM functions'")


def _add_fixed_bits(section: Section, msrs: dict[int, int], features: frozenset[str]) -> None:
    supported_cr4 = supported_cr4_bits(features)
    cr0 = section.names("cr0_fixed_to_1", Cr0.__members__, "CR0 bit")
    cr4 = section.names("cr4_fixed_to_1", [bit.name for bit in Cr4 if bit.name and bit & supported_cr4], "CR4 bit")
    msrs[CapabilityMsr.CR0_FIXED0] = sum(Cr0[name] for name in cr0)
    msrs[CapabilityMsr.CR0_FIXED1] = MASK32
    msrs[CapabilityMsr.CR4_FIXED0] = sum(Cr4[name] for name in cr4)
    msrs[CapabilityMsr.CR4_FIXED1] = supported_cr4
