"""Which tests are chosen, and what becomes of each."""

from pathlib import Path

import pytest
from suites import build

from vtx.conformance.plan import Plan, Planner, Selection
from vtx.conformance.suite import Suite, SuiteError, load_suite

CONFIGURATION = """
[plain]
file = a.flat

[big]
file = a.flat
smp = 2
test_args = 'one two'
qemu_params = -cpu qemu64,phys-bits=36 -m 2560 -append three
groups = g h
timeout = 5

[manual]
file = a.flat
groups = g nodefault
"""


def suite(tmp_path: Path, configuration: str = CONFIGURATION, settings: str = "ARCH=x86_64\n") -> Suite:
    return load_suite(build(tmp_path / "k", configuration, {"a": b"", "extra": b""}, settings=settings))


def plans(found: Suite, selection: Selection | None = None, *, most_processors: int = 4) -> dict[str, Plan]:
    selection = selection or Selection()
    planner = Planner(found, most_processors=most_processors)
    chosen = selection.select(found)
    return {test.name: planner.plan(test, asked_for=selection.asks_for(test)) for test in chosen}


def reason(tmp_path: Path, lines: str, settings: str = "ARCH=x86_64\n", most_processors: int = 4) -> str:
    found = suite(tmp_path, f"[t]\nfile = a.flat\n{lines}\n", settings)
    plan = plans(found, Selection(("t",)), most_processors=most_processors)["t"]
    assert (plan.job is None) == bool(plan.skip)
    return plan.skip


def test_job(tmp_path: Path) -> None:
    found = suite(tmp_path)
    job = plans(found)["big"].job
    assert job is not None
    assert job.image == found.directory / "x86/a.flat"
    assert job.command_line == "one two three"
    assert job.memory == 2560 << 20
    assert job.processors == 2
    assert job.timeout == 5
    assert job.profile["implementation"]["physical_address_width"] == 36
    assert job.processor == "skylake-server phys-bits=36"


def test_job_of_a_test_that_asks_for_nothing(tmp_path: Path) -> None:
    job = plans(suite(tmp_path))["plain"].job
    assert job is not None
    assert (job.command_line, job.memory, job.processors, job.timeout) == ("", 128 << 20, 1, 90.0)


def test_groups_of_a_report(tmp_path: Path) -> None:
    found = plans(suite(tmp_path))
    assert {name: plan.group for name, plan in found.items()} == {
        "plain": "default",
        "big": "g",
        "manual": "g",
        "extra": "unlisted",
    }


def test_tests_to_be_run_by_hand(tmp_path: Path) -> None:
    found = suite(tmp_path)
    by_itself = plans(found)
    assert {name for name, plan in by_itself.items() if plan.job is None} == {"manual", "extra"}
    assert by_itself["manual"].skip == "runs only when asked for"
    assert plans(found, Selection(groups=("g",)))["manual"].job is not None
    assert plans(found, Selection(tests=("extra",)))["extra"].job is not None


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (Selection(), ["plain", "big", "manual", "extra"]),
        (Selection(groups=("h",)), ["big"]),
        (Selection(groups=("default", "h")), ["plain", "big"]),
        (Selection(tests=("*a*",)), ["plain", "manual", "extra"]),
        (Selection(tests=("*a*",), groups=("g",)), ["manual"]),
        (Selection(excluded=("p*", "extra")), ["big", "manual"]),
    ],
)
def test_selection(tmp_path: Path, selection: Selection, names: list[str]) -> None:
    assert [test.name for test in selection.select(suite(tmp_path))] == names


@pytest.mark.parametrize(
    ("selection", "why"),
    [
        (Selection(tests=("plain", "nix*")), "no test is called 'nix[*]'"),
        (Selection(groups=("nix",)), r"no group 'nix' \(groups: g, h, nodefault, unlisted\)"),
        (Selection(tests=("plain",), groups=("g",)), "no test is left to run"),
    ],
)
def test_selection_of_nothing(tmp_path: Path, selection: Selection, why: str) -> None:
    with pytest.raises(SuiteError, match=f": {why}$"):
        selection.select(suite(tmp_path))


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("arch = i386", "for i386, and this build is for x86_64"),
        ("accel = kvm", "needs KVM as the accelerator"),
        ("accel = tcg", ""),
        ("check = /sys/x=Y", "needs a host with /sys/x=Y"),
        ("check = /sys/module/kvm_intel/parameters/allow_smaller_maxphyaddr=Y", ""),
        ("file = missing.flat", "x86/missing.flat has not been built"),
        ("test_args = `date`", "its arguments are made by a shell"),
        ("qemu_params = -device edu", "needs device edu"),
        ("qemu_params = -cpu max,+avx512f", "unsupported: no processor here has avx512f"),
        ("qemu_params = -cpu host,hv_passthrough", "unsupported: the interface of Hyper-V to its guests"),
        ("smp = 5", "needs 5 processors"),
        ("smp = 4", ""),
        ("qemu_params = -smp 8", "needs 8 processors"),
    ],
)
def test_reason_to_skip(tmp_path: Path, lines: str, why: str) -> None:
    assert reason(tmp_path, lines) == why


def test_image_of_a_build_of_unknown_target(tmp_path: Path) -> None:
    assert reason(tmp_path, "arch = i386", settings="") == ""


def test_paravirtual_interfaces_are_not_architecture(tmp_path: Path) -> None:
    found = suite(tmp_path, "[t]\nfile = hypercall.flat\n")
    assert plans(found)["t"].skip == "needs KVM's hypercalls"


def test_one_argument_of_an_image_is_not_architecture(tmp_path: Path) -> None:
    tests = "".join(f"[{name}]\nfile = vmexit.flat\ntest_args = '{name}'\n" for name in ("vmcall", "cpuid"))
    found = plans(load_suite(build(tmp_path / "k", tests, {"vmexit": b""})))
    assert [plan.skip for plan in found.values()] == ["needs KVM's hypercalls", ""]


def test_hypercalls_that_the_suite_can_leave_out(tmp_path: Path) -> None:
    directory = build(tmp_path / "k", "[t]\nfile = apic.flat\n[u]\nfile = a.flat\n", {"apic": b"", "a": b""})
    jobs = [plan.job for plan in plans(load_suite(directory)).values()]
    assert [job.environment for job in jobs if job] == ["TEST_DEVICE=0", ""]


def test_first_profile_that_fits(tmp_path: Path) -> None:
    found = suite(tmp_path, "[t]\nfile = a.flat\nqemu_params = -cpu max,+smep\n")
    planner = Planner(found, ("nehalem-server", "skylake-server"), most_processors=1)
    job = planner.plan(found.tests[0], asked_for=False).job
    assert job is not None
    assert job.processor == "nehalem-server +smep"
    planner = Planner(found, most_processors=1)
    job = planner.plan(found.tests[0], asked_for=False).job
    assert job is not None
    assert job.processor == "everything"


@pytest.mark.parametrize(
    ("flags", "processor"),
    [
        ("-smep", "everything -smep"),
        ("smep=off,phys-bits=40", "everything -smep phys-bits=40"),
        ("+smep", "everything"),
        ("-vmx-pml,-smap", "everything -vmx-pml -smap"),
        ("", "everything"),
    ],
)
def test_flags_for_every_test(tmp_path: Path, flags: str, processor: str) -> None:
    found = suite(tmp_path, "[t]\nfile = a.flat\nqemu_params = -cpu max\n")
    job = Planner(found, flags=flags).plan(found.tests[0], asked_for=False).job
    assert job is not None
    assert job.processor == processor
    assert ("SMEP" in job.profile["cpuid"]["features"]) == ("-smep" not in processor)


def test_flags_for_a_test_that_names_no_processor(tmp_path: Path) -> None:
    found = suite(tmp_path, "[t]\nfile = a.flat\n")
    job = Planner(found, flags="-smep").plan(found.tests[0], asked_for=False).job
    assert job is not None
    assert job.processor == "skylake-server -smep"


def test_flags_leave_a_test_of_their_name_alone(tmp_path: Path) -> None:
    found = suite(tmp_path, "[pku]\nfile = a.flat\nqemu_params = -cpu max\n")
    job = Planner(found, flags="-pku,-smep").plan(found.tests[0], asked_for=False).job
    assert job is not None
    assert job.processor == "everything -smep"


def test_flags_come_after_those_of_the_test(tmp_path: Path) -> None:
    found = suite(tmp_path, "[t]\nfile = a.flat\nqemu_params = -cpu max,-smep\n")
    job = Planner(found, flags="+smep").plan(found.tests[0], asked_for=False).job
    assert job is not None
    assert job.processor == "everything"


def test_profile_like_the_named_processor(tmp_path: Path) -> None:
    models = ("max", "host,migratable=no", "qemu64", "Skylake-Server")
    configuration = "".join(f"[{model}]\nfile = a.flat\nqemu_params = -cpu {model}\n" for model in models)
    jobs = [plan.job for plan in plans(suite(tmp_path, configuration)).values()]
    assert [job.processor for job in jobs if job] == ["everything", "everything", "skylake-server", "skylake-server"]


def test_profile_like_it_of_another_vendor(tmp_path: Path) -> None:
    found = suite(tmp_path, "[t]\nfile = a.flat\nqemu_params = -cpu max,+svm\n")
    job = Planner(found).plan(found.tests[0], asked_for=False).job
    assert job is not None
    assert job.processor == "everything-amd"
