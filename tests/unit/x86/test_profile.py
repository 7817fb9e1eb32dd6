"""Profiles: the capability MSRs they expand to, and one line for each mistake in a file."""

from importlib import resources

import pytest

from vmcs.capabilities import Capabilities
from vmcs.controls import ENABLE_EPT, UNRESTRICTED_GUEST
from vtx.x86.profile import load_profile, parse_profile, profile_names
from vtx.x86.toml_section import ProfileError

SKYLAKE = load_profile()
NEHALEM = load_profile("nehalem-server")
EVERYTHING = load_profile("everything")
TEXT = (resources.files("vtx.profiles") / "skylake-server.toml").read_text(encoding="utf-8")

DEFAULT1 = {0x481: 0x16, 0x482: 0x401E172, 0x483: 0x36DFF, 0x484: 0x11FF}
TRUE = {0x481: 0x48D, 0x482: 0x48E, 0x483: 0x48F, 0x484: 0x490}


def test_default_profile():
    assert SKYLAKE.name == "skylake-server"
    assert SKYLAKE.has("VMX") and not SKYLAKE.has("AVX")
    assert load_profile() is SKYLAKE


def test_has_rejects_a_name_that_is_no_feature():
    with pytest.raises(KeyError):
        SKYLAKE.has("vmx")


@pytest.mark.parametrize("name", profile_names())
def test_file_name_is_the_profile_name(name):
    assert load_profile(name).name == name


# Values of the silicon, but for the revision identifier, the timer rate and the controls that the model leaves out.
@pytest.mark.parametrize(
    ("profile", "msr", "value"),
    [
        (SKYLAKE, 0x480, 0x00D8_1000_5654_5801),
        (SKYLAKE, 0x481, 0x0000_00FF_0000_0016),
        (SKYLAKE, 0x482, 0xFFF9_FFFE_0401_E172),
        (SKYLAKE, 0x483, 0x00FF_EFFF_0003_6DFF),
        (SKYLAKE, 0x484, 0x0001_D3FF_0000_11FF),
        (SKYLAKE, 0x485, 0x0000_0000_6004_01E0),
        (SKYLAKE, 0x486, 0x8000_0021),
        (SKYLAKE, 0x487, 0xFFFF_FFFF),
        (SKYLAKE, 0x488, 0x2000),
        (SKYLAKE, 0x489, 0x0077_2FFF),
        (SKYLAKE, 0x48A, 0x32),
        (SKYLAKE, 0x48B, 0x0207_7FFF_0000_0000),
        (SKYLAKE, 0x48C, 0x0000_0F01_0633_4141),
        (SKYLAKE, 0x48D, 0x0000_00FF_0000_0016),
        (SKYLAKE, 0x48E, 0xFFF9_FFFE_0400_6172),
        (SKYLAKE, 0x48F, 0x00FF_EFFF_0003_6DFB),
        (SKYLAKE, 0x490, 0x0001_D3FF_0000_11FB),
        # XSAVES, mode-based execute control, sub-page permissions, user wait and pause, instruction timeout
        (EVERYTHING, 0x48B, SKYLAKE.vmx_capabilities[0x48B] | 0x84D0_0000 << 32),
        # 5-level walks, advanced information for EPT violations
        (EVERYTHING, 0x48C, SKYLAKE.vmx_capabilities[0x48C] | 1 << 7 | 1 << 22),
        (SKYLAKE, 0x491, 1),
        (NEHALEM, 0x485, 0x0000_0000_0004_01C0),
        (NEHALEM, 0x48B, 0x0000_006E_0000_0000),
        (NEHALEM, 0x48C, 0x0000_0F01_0611_4141),
    ],
)
def test_capability_msr(profile, msr, value):
    assert profile.vmx_capabilities[msr] == value


@pytest.mark.parametrize("profile", [SKYLAKE, NEHALEM])
@pytest.mark.parametrize("msr", DEFAULT1)
def test_default1_class_and_true_settings(profile, msr):
    plain, true = profile.vmx_capabilities[msr], profile.vmx_capabilities[TRUE[msr]]
    assert plain & 0xFFFF_FFFF == DEFAULT1[msr]
    assert plain >> 32 & DEFAULT1[msr] == DEFAULT1[msr]
    assert true >> 32 == plain >> 32
    assert true & 0xFFFF_FFFF & ~plain == 0
    assert (true | DEFAULT1[msr]) & 0xFFFF_FFFF == plain & 0xFFFF_FFFF


@pytest.mark.parametrize("profile", [SKYLAKE, NEHALEM])
def test_vmcs_enum_names_the_highest_readable_index(profile):
    fields = Capabilities(profile.vmx_capabilities).fields
    assert profile.vmx_capabilities[0x48A] >> 1 == max(encoding >> 1 & 0x1FF for encoding in fields)


def test_nehalem_has_ept_but_no_unrestricted_guest():
    capabilities = Capabilities(NEHALEM.vmx_capabilities)
    assert capabilities.allows(ENABLE_EPT)
    assert not capabilities.allows(UNRESTRICTED_GUEST)


def test_true_msrs_are_absent_without_the_bit_that_announces_them():
    text = TEXT.replace('"default1 controls may be 0" = true', '"default1 controls may be 0" = false')
    msrs = parse_profile("x.toml", text).vmx_capabilities
    assert not msrs.keys() & set(TRUE.values())
    assert msrs.keys() >= set(DEFAULT1)


def test_capabilities_follow_the_activation_of_secondary_controls():
    text = TEXT.replace('    "activate secondary controls",\n', "")
    start, end = text.index("secondary = ["), text.index("exit = [")
    text = text[:start] + "secondary = []\n" + text[end:]
    text = text.replace('vm_functions = ["EPTP switching"]\n', "")
    start, end = text.index("ept_vpid = ["), text.index("[vmx.basic]")
    text = text[:start] + "ept_vpid = []\n" + text[end:]
    msrs = parse_profile("x.toml", text).vmx_capabilities
    assert 0x48B not in msrs and 0x48C not in msrs


MISTAKES = [
    ("name = ", "nome = ", "x.toml: name: expected an ASCII string of at most 64 characters, but the key is missing"),
    ('"GenuineIntel"', '"Intel"', "x.toml: identity.vendor: expected a string of exactly 12 characters, not 'Intel'"),
    ("stepping = 4", "stepping = 16", "x.toml: identity.stepping: expected an integer from 0x0 to 0xf, not 0x10"),
    ("stepping = 4", "stepping = true", "x.toml: identity.stepping: expected an integer from 0x0 to 0xf, not True"),
    ("stepping = 4", "stepping = 4\nstep = 1", "x.toml: identity.step: expected no such key"),
    ('"FPU", "VME"', '"FPU", "VMM"', "x.toml: cpuid.features[1]: expected the name of a CPUID feature, not 'VMM'"),
    ('"FPU", "VME"', '"FPU", "FPU"', "x.toml: cpuid.features[1]: expected each CPUID feature once, not 'FPU' again"),
    ("ways = 11", "ways = 7", "x.toml: cpuid.caches[3].size: expected a multiple of ways times line"),
    (
        '"unified"\nsize = 1_048',
        '"both"\nsize = 1_048',
        "x.toml: cpuid.caches[2].type: expected one of data, instruction, unified, not 'both'",
    ),
    ("= 0x16\n", "= 0x6\n", "x.toml: cpuid.highest_basic_leaf: expected a leaf that covers feature CLFLUSHOPT"),
    (
        "xsave_components",
        "xsafe_components",
        "x.toml: cpuid.xsave_components: expected at least x87 with the feature XSAVE, none without it",
    ),
    (
        '"NMI exiting"',
        '"NMI-exiting"',
        "x.toml: vmx.pin_based[1]: expected the name of a control of the pin-based VM-execution controls, "
        "not 'NMI-exiting'",
    ),
    (
        '"RDSEED", "SMAP"',
        '"SMAP"',
        "x.toml: vmx.secondary[8]: expected CPUID feature RDSEED for 'RDSEED exiting'",
    ),
    (
        '"VMCS memory type" = 6\n',
        '"VMCS memory type" = 6\n"nested-exception support" = true\n',
        "x.toml: vmx.basic: expected CPUID feature FRED for 'nested-exception support'",
    ),
    (
        '    "enable EPT",\n',
        "",
        "x.toml: vmx.secondary[4]: expected 'enable EPT' to be listed with 'unrestricted guest'",
    ),
    (
        '    "activate secondary controls",\n',
        "",
        "x.toml: vmx.secondary: expected no controls without 'activate secondary controls' in primary",
    ),
    (
        '"INVEPT",',
        '"INVEPT!",',
        "x.toml: vmx.ept_vpid[6]: expected the name of a bit of IA32_VMX_EPT_VPID_CAP, not 'INVEPT!'",
    ),
    ('cr4_fixed_to_1 = ["VMXE"]', 'cr4_fixed_to_1 = ["PKS"]', "not 'PKS'"),
    (
        '"CR3-target values" = 4',
        '"CR3-target values" = 512',
        "x.toml: vmx.misc.CR3-target values: expected an integer from 0x0 to 0x1ff, not 0x200",
    ),
    ('region size" = 0x1000', 'region size" = 0x100', "basic.VMXON and VMCS region size: expected room for every"),
    ('region size" = 0x1000', 'region size" = 0x1FFF', "basic.VMXON and VMCS region size: expected at most 4096"),
    ('"VMX", ', "", "x.toml: vmx: expected a [vmx] table if and only if cpuid.features has VMX"),
    ("[vmx]", "[vmx", "x.toml: expected TOML:"),
    ("[msrs]", "[[msrs]]", "x.toml: msrs: expected a table, not"),
    ("index = 0xCE", "index = 0x1B", "x.toml: msrs.MSR_PLATFORM_INFO.index: expected the index of an MSR that is not"),
    (
        "[msrs]",
        "[msrs]\nMSR_FIRST = { index = 0xCE }",
        "x.toml: msrs.MSR_PLATFORM_INFO.index: expected an index of its own, not 0xce of MSR_FIRST",
    ),
    (
        '"BNDCSR", "PKRU"]',
        '"BNDCSR"]',
        "x.toml: cpuid.xsave_components: expected PKRU if and only if cpuid.features has PKU",
    ),
    ('["x87", "SSE", ', '["SSE", ', "x.toml: cpuid.xsave_components: expected x87 among the components"),
    (
        '"BNDREGS", "BNDCSR"',
        '"BNDCSR"',
        "x.toml: cpuid.xsave_components: expected BNDREGS if and only if cpuid.features has MPX",
    ),
    ("index = 0xCE, ", "", "x.toml: msrs.MSR_PLATFORM_INFO.index: expected an integer from 0x0 to 0xffffffff, but"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_mistake_in_a_file_is_one_line(old, new, message):
    assert old in TEXT
    with pytest.raises(ProfileError) as caught:
        parse_profile("x.toml", TEXT.replace(old, new, 1))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "nosuch", "../skylake-server", "/no/such/file.toml", "/tmp"])
def test_unknown_profile_is_one_line(name):
    with pytest.raises(ProfileError) as caught:
        load_profile(name)
    assert "\n" not in str(caught.value)


def test_profile_from_a_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace('name = "skylake-server"', 'name = "mine"'))
    assert load_profile(str(path)).name == "mine"


def test_binary_file_is_no_profile(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(ProfileError, match=r"expected a UTF-8 text file"):
        load_profile(str(path))
