"""Reading the configuration of a suite and what it was built for."""

from pathlib import Path

import pytest
from suites import build

from vtx.conformance.suite import DEFAULT_TIMEOUT, SuiteError, SuiteTest, load_suite, parse_configuration


def only(text: str) -> SuiteTest:
    (test,) = parse_configuration(text, "unittests.cfg")
    return test


def test_section_with_everything() -> None:
    test = only("""
        # comment
[apic]
file = apic.flat
smp = 2
test_args = "-one_test two* -three"
qemu_params = -cpu max,+x2apic -m 2560
arch = x86_64
accel = kvm
groups = apic nodefault
check = /sys/a=Y /proc/b=0
timeout = 2m
""")
    assert test == SuiteTest(
        "apic",
        "apic.flat",
        arguments="-one_test two* -three",
        options=("-cpu", "max,+x2apic", "-m", "2560"),
        processors=2,
        groups=("apic", "nodefault"),
        architecture="x86_64",
        accelerator="kvm",
        check=("/sys/a=Y", "/proc/b=0"),
        timeout=120.0,
    )


def test_section_with_nothing_but_a_file() -> None:
    assert only("[a]\nfile=a.flat\n") == SuiteTest("a", "a.flat", "", (), 1, (), "", "", (), DEFAULT_TIMEOUT)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("'cpuid'", "cpuid"),
        ('"a b"', "a b"),
        ("plain", "plain"),
        ("'with `quote`'", None),
        ('"10 `date +%s`"', None),
        ('"$(date)"', None),
    ],
)
def test_arguments_are_what_a_shell_makes_of_them(written: str, meant: str | None) -> None:
    assert only(f"[a]\nfile = a.flat\ntest_args = {written}\n").arguments == meant


def test_old_name_of_the_options() -> None:
    assert only("[a]\nfile = a.flat\nextra_params = -m 64 -append 'x y'\n").options == ("-m", "64", "-append", "x y")


def test_options_over_several_lines() -> None:
    text = '[a]\nfile = a.flat\nqemu_params = """-m 64 \\\n-cpu max\n-smp 2"""\ngroups = g\n'
    assert only(text).options == ("-m", "64", "-cpu", "max", "-smp", "2")
    assert only(text).groups == ("g",)


def test_commented_section_is_not_a_test() -> None:
    tests = parse_configuration("[a]\nfile = a.flat\n#[b]\n#file = b.flat\n[c]\nfile = c.flat\n", "cfg")
    assert [test.name for test in tests] == ["a", "c"]


def test_tests_of_one_name_are_told_apart() -> None:
    tests = parse_configuration("[a]\nfile = a.flat\n[a]\nfile = b.flat\n[a]\nfile = c.flat\n", "cfg")
    assert [test.name for test in tests] == ["a", "a (2)", "a (3)"]


@pytest.mark.parametrize(("written", "seconds"), [("90s", 90), ("1.5", 1.5), ("3m", 180), ("1h", 3600), ("0", None)])
def test_durations(written: str, seconds: float | None) -> None:
    assert only(f"[a]\nfile = a.flat\ntimeout = {written}\n").timeout == seconds


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("timeout = soon", "timeout 'soon' is not a duration"),
        ("smp = many", "smp 'many' is not a number of processors"),
        ("smp = 0", "smp '0' is not a number of processors"),
        ("qemu_params = -append 'a", '"-append \'a": no closing quotation'),
        ("file =", "no file"),
    ],
)
def test_mistake_is_one_line(line: str, what: str) -> None:
    with pytest.raises(SuiteError) as error:
        parse_configuration(f"[a]\nfile = a.flat\n{line}\n", "cfg")
    assert str(error.value) == f"cfg: test 'a': {what}"


def test_build(tmp_path: Path) -> None:
    directory = build(tmp_path / "k", "[a]\nfile = a.flat\ngroups = g h\n", {"a": b"", "z": b""}, head="0123abcd\n")
    suite = load_suite(directory)
    assert suite.architecture == "x86_64"
    assert suite.revision == "0123abcd"
    assert [test.name for test in suite.tests] == ["a", "z"]
    assert suite.groups() == ("g", "h", "unlisted", "nodefault")
    assert suite.image(suite.tests[0]).read_bytes()[:4] == b"\x7fELF"


def test_build_without_its_settings(tmp_path: Path) -> None:
    directory = build(tmp_path / "k", "[a]\nfile = a.flat\n", {"a": b""})
    (directory / "config.mak").unlink()
    suite = load_suite(directory)
    assert suite.architecture is None
    assert suite.revision is None


def test_directory_that_is_no_build(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"not a kvm-unit-tests build: x86/unittests.cfg: No such file or directory"):
        load_suite(tmp_path)


def test_checkout_that_has_not_been_built(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"it has no images x86/\*.flat; run make in it"):
        load_suite(build(tmp_path / "k", "", {}))


def test_build_for_firmware(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="it was built for UEFI firmware"):
        load_suite(build(tmp_path / "k", "", {}, settings="ARCH=x86_64\nCONFIG_EFI=y\n"))


def test_build_for_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="a build for arm64, not for x86_64 or i386"):
        load_suite(build(tmp_path / "k", "", {"a": b""}, settings="ARCH=arm64\n"))
