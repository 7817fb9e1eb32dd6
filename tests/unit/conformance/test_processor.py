"""What a ``-cpu`` option does to a profile."""

import pytest

from vmcs.capabilities import CapabilityMsr
from vtx.conformance.processor import UnsupportedError, Wish, adapt, features_of, parse_wish
from vtx.x86.profile import Profile, build_profile, profile_document, profile_names

POSSIBLE = features_of([profile_document(name) for name in profile_names()])


def adapted(wish: str, profile: str = "skylake-server", possible: frozenset[str] = POSSIBLE) -> Profile:
    return build_profile("test", adapt(profile_document(profile), parse_wish(wish), possible))


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("qemu64", Wish()),
        ("max", Wish(profile="everything")),
        ("max,+vmx,-pku", Wish(("vmx",), ("pku",), profile="everything")),
        ("qemu64,+x2apic,+tsc-deadline", Wish(("x2apic", "tsc-deadline"))),
        ("qemu64,-xsave,+xsave", Wish(("xsave",))),
        ("qemu64,xsave=off,umip=on,smep", Wish(("umip", "smep"), ("xsave",))),
        ("IvyBridge,phys-bits=36,host-phys-bits=off,+vmx", Wish(("vmx",), physical_address_width=36)),
        ("max,vendor=GenuineIntel", Wish(vendor="GenuineIntel", profile="everything")),
        ("host,migratable=no", Wish(profile="everything")),
        ("qemu64,host-phys-bits", Wish()),
    ],
)
def test_parse(text: str, wish: Wish) -> None:
    assert parse_wish(text) == wish


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("host,hv_passthrough", "the interface of Hyper-V to its guests"),
        ("max,hv-vapic", "the interface of Hyper-V to its guests"),
        ("max,cores=2", "processor property cores=2"),
        ("max,phys-bits=wide", "processor property phys-bits=wide"),
    ],
)
def test_property_that_cannot_be_had(text: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{why}$"):
        parse_wish(text)


@pytest.mark.parametrize(
    ("flag", "feature"),
    [
        ("rdtscp", "RDTSCP"),
        ("invpcid", "INVPCID"),
        ("x2apic", "x2APIC"),
        ("tsc-deadline", "TSC-Deadline"),
        ("pdpe1gb", "PAGE1GB"),
        ("sse4.1", "SSE4_1"),
        ("aes", "AESNI"),
        ("lahf_lm", "LAHF64"),
        ("xsave", "XSAVE"),
    ],
)
def test_feature_off(flag: str, feature: str) -> None:
    assert adapted("max").has(feature)
    assert not adapted(f"max,-{flag}").has(feature)


def test_feature_off_takes_the_vmx_control_along() -> None:
    secondary = CapabilityMsr.PROCBASED_CTLS2
    lost = adapted("max").vmx_capabilities[secondary] ^ adapted("max,-rdtscp,-invpcid").vmx_capabilities[secondary]
    assert lost == (1 << 3 | 1 << 12) << 32  # enable RDTSCP, enable INVPCID


def test_xsave_off_takes_its_state_along() -> None:
    profile = adapted("max,-xsave")
    assert profile.xsave_components == ()
    assert profile.xcr0_supported == 0
    assert not profile.cr4_supported >> 18 & 1  # OSXSAVE


def test_feature_of_another_processor_on() -> None:
    assert not adapted("max", "nehalem-server").has("SMEP")
    profile = adapted("max,+smep,+pcid", "nehalem-server")
    assert profile.has("SMEP")
    assert profile.has("PCID")
    assert profile.cr4_supported >> 20 & 1


def test_xsave_on_brings_its_state_along() -> None:
    assert adapted("max,+xsave", "nehalem-server").xsave_components == ("x87", "SSE")


def test_control_on_and_off() -> None:
    secondary = CapabilityMsr.PROCBASED_CTLS2
    unrestricted = 1 << 7 << 32
    assert adapted("max").vmx_capabilities[secondary] & unrestricted
    assert not adapted("max,-vmx-unrestricted-guest").vmx_capabilities[secondary] & unrestricted
    assert adapted("max,+vmx-unrestricted-guest", "nehalem-server").vmx_capabilities[secondary] & unrestricted


def test_ept_off_takes_what_builds_on_it_along() -> None:
    assert not adapted("max,-vmx-ept").vmx_capabilities[CapabilityMsr.PROCBASED_CTLS2] >> 32 & (1 << 1 | 1 << 7)


def test_vmx_off() -> None:
    profile = adapted("max,-vmx")
    assert not profile.has("VMX")
    assert profile.vmx_capabilities == {}


def test_physical_address_width() -> None:
    assert adapted("max,phys-bits=36").physical_address_width == 36


def test_what_nothing_has_is_off_already() -> None:
    assert adapted("max,-skinit,-npt,-vmx-mbec").features == adapted("max").features


def test_fred_only_if_asked_for() -> None:
    """With it go its controls, bits 1:0 of the secondary ones for exits, and bit 58 of IA32_VMX_BASIC."""
    profiles = adapted("max", "everything"), adapted("max,+fred", "everything")
    assert [profile.has("FRED") for profile in profiles] == [False, True]
    assert [profile.vmx_capabilities[0x493] & 3 for profile in profiles] == [0, 3]
    assert [profile.vmx_capabilities[0x480] >> 58 for profile in profiles] == [0, 1]


@pytest.mark.parametrize("off", ["-mpx", "-xsave"])
def test_mpx_takes_its_state_components_along(off: str) -> None:
    profile = adapted(f"max,{off}", "everything")
    assert not profile.has("MPX")
    assert not {"BNDREGS", "BNDCSR"} & set(profile.xsave_components)
    assert adapted("max,-mpx,+mpx", "everything").has("MPX")


@pytest.mark.parametrize("feature", ["RDPRU", "APERFMPERF"])
def test_feature_that_no_model_of_qemus_has(feature: str) -> None:
    assert feature in profile_document("everything-amd")["cpuid"]["features"]
    assert not adapted("max,+svm", "everything-amd").has(feature)


def test_original_stays_as_it_was() -> None:
    document = profile_document("skylake-server")
    adapt(document, parse_wish("max,-xsave,-vmx-ept"), POSSIBLE)
    assert document == profile_document("skylake-server")


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ("max,+avx512f", "no processor here has avx512f"),
        ("max,+sgx", "no processor here has SGX"),
        ("max,vendor=NoSuchVendor", "a processor of NoSuchVendor"),
        ("max,phys-bits=99", "phys-bits=99: .*physical_address_width: expected an integer from 0x24 to 0x34"),
    ],
)
def test_what_cannot_be_had(wish: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{why}"):
        adapted(wish)


def test_control_that_no_processor_has() -> None:
    with pytest.raises(UnsupportedError, match=r"^no processor here has the VMX control 'use TSC scaling'$"):
        adapted("max,+vmx-tsc-scaling", "nehalem-server", possible=frozenset())


def test_extension_is_not_added_to_a_processor_without_it() -> None:
    document = adapt(profile_document("skylake-server"), parse_wish("max,-vmx"), POSSIBLE)
    with pytest.raises(UnsupportedError, match=r"^the processor has no VMX$"):
        adapt(document, parse_wish("max,+vmx"), POSSIBLE)


def test_part_of_a_wish_that_is_no_change_is_not_mentioned() -> None:
    document = profile_document("skylake-server")
    wish = parse_wish("max,+vmx,-npt,-pcid,+vmx-ept,+avx512f,vendor=GenuineIntel,phys-bits=40")
    assert str(wish.beyond(document)) == "+avx512f -pcid phys-bits=40"
    assert str(parse_wish("max,phys-bits=46,vendor=Other").beyond(document)) == "vendor=Other"
