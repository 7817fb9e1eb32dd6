"""Whole runs: processes, time limits, order, what is left behind."""

import os
import time
from pathlib import Path

import pytest
from suites import HANG, SHUT_DOWN, build, ends_with, image, say, say_command_line, say_module

from vtx.conformance.plan import Planner, Selection
from vtx.conformance.results import CheckStatus, SerialReport, TestResult, Verdict
from vtx.conformance.runner import Runner, Silent
from vtx.conformance.suite import load_suite

CONFIGURATION = """
[hangs]
file = hangs.flat
timeout = 1
[passes]
file = passes.flat
test_args = 'one two'
groups = g
[skipped]
file = passes.flat
accel = kvm
[fails]
file = fails.flat
groups = g
[skips]
file = skips.flat
[aborts]
file = aborts.flat
[shuts-down]
file = shuts-down.flat
[apic]
file = apic.flat
[foreign]
file = foreign.flat
"""

IMAGES = {
    "hangs": say("PASS: before\nstuck") + HANG,
    "passes": say("PASS: a\nPASS: b\n") + say_command_line() + ends_with(0),
    "fails": say("PASS: a\nvalue 5\nFAIL: b\nSUMMARY: 2 tests, 1 unexpected failures\n") + ends_with(1),
    "skips": say("SKIP: not here\n") + ends_with(38),
    "aborts": say("PASS: a\nUnhandled exception 13\n") + ends_with(7),
    "shuts-down": say("PASS: a\n") + SHUT_DOWN,
    "apic": say_module() + ends_with(0),
    "foreign": b"",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = build(tmp_path_factory.mktemp("suite") / "k", CONFIGURATION, IMAGES)
    (found / "x86/foreign.flat").write_bytes(image(b"", machine=183))  # AArch64
    return found


def runner(directory: Path, *names: str, jobs: int = 1, scale: float = 1.0, observer: Silent | None = None) -> Runner:
    suite = load_suite(directory)
    planner = Planner(suite, most_processors=1)
    tests = Selection(names).select(suite)
    plans = [planner.plan(test, asked_for=False) for test in tests]
    return Runner(plans, jobs, scale, observer or Silent())


def one(directory: Path, name: str) -> TestResult:
    (result,) = runner(directory, name, scale=60).run()
    return result


def test_pass(directory: Path) -> None:
    result = one(directory, "passes")
    assert (result.verdict, result.reason, result.group) == (Verdict.PASS, "", "g")
    assert result.count(CheckStatus.PASS) == 2
    assert result.processor == "skylake-server"
    assert result.wall > 0


def test_arguments_reach_the_guest(directory: Path) -> None:
    report = one(directory, "passes").report
    assert report is not None
    assert report.last_line == "image one two"


def test_settings_reach_the_guest_as_its_module(directory: Path) -> None:
    report = one(directory, "apic").report
    assert report is not None
    assert report.text == "TEST_DEVICE=0\n"


def test_fail(directory: Path) -> None:
    result = one(directory, "fails")
    assert (result.verdict, result.reason) == (Verdict.FAIL, "b")
    assert result.report is not None
    assert result.report.checks[1].context == "value 5\nFAIL: b"


def test_skip_by_the_test_and_by_the_plan(directory: Path) -> None:
    by_itself, planned = one(directory, "skips"), one(directory, "skipped")
    assert (by_itself.verdict, by_itself.reason) == (Verdict.SKIP, "not here")
    assert (planned.verdict, planned.reason) == (Verdict.SKIP, "needs KVM as the accelerator")
    assert planned.report is None


def test_abort(directory: Path) -> None:
    result = one(directory, "aborts")
    assert (result.verdict, result.reason) == (Verdict.CRASH, "ended with 0x7: Unhandled exception 13")


def test_shutdown(directory: Path) -> None:
    result = one(directory, "shuts-down")
    assert result.verdict is Verdict.CRASH
    assert "triple fault" in result.reason
    assert result.count(CheckStatus.PASS) == 1


def test_image_that_cannot_be_booted(directory: Path) -> None:
    result = one(directory, "foreign")
    assert result.verdict is Verdict.CRASH
    assert result.reason == "cannot boot: ELF file is not for x86: machine EM_AARCH64"


@pytest.mark.slow
def test_timeout_keeps_what_was_said(directory: Path) -> None:
    (result,) = runner(directory, "hangs", scale=5).run()
    assert (result.verdict, result.reason) == (Verdict.TIMEOUT, "not done after 5 s, last line: stuck")
    assert result.count(CheckStatus.PASS) == 1


class Recorder(Silent):
    """Notes what it is told, and which processes there were."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.running: set[str] = set()
        self.most = 0

    def started(self, name: str) -> None:
        self.running.add(name)
        self.most = max(self.most, len(self.running))

    def progressed(self, name: str, report: SerialReport) -> None:
        assert name in self.running
        assert report.text

    def finished(self, result: TestResult) -> None:
        self.running.discard(result.name)
        self.order.append(result.name)


@pytest.mark.slow
def test_order_is_that_of_the_suite_and_not_of_completion(directory: Path) -> None:
    recorder = Recorder()
    results = runner(directory, "hangs", "passes", "fails", "skipped", jobs=2, scale=8, observer=recorder).run()
    assert [result.name for result in results] == ["hangs", "passes", "skipped", "fails"]
    assert recorder.order[0] == "skipped"
    assert recorder.order[-1] == "hangs"
    assert recorder.most == 2


def test_record_gets_what_is_known_after_each_test(directory: Path) -> None:
    run = runner(directory, "passes", "skipped", "fails", scale=60)
    known: list[list[str]] = []
    run.record = lambda results: known.append([result.name for result in results])
    run.run()
    assert known[0] == ["skipped"]
    assert sorted(known[1]) in (["passes", "skipped"], ["fails", "skipped"])
    assert known[2:] == [["passes", "skipped", "fails"]]


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_interrupt_leaves_results_and_no_process(directory: Path) -> None:
    class Interrupter(Silent):
        def progressed(self, name: str, report: SerialReport) -> None:
            if name == "hangs":
                raise KeyboardInterrupt

    before = children()
    run = runner(directory, "hangs", "passes", "skipped", jobs=1, scale=100, observer=Interrupter())
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert time.monotonic() - start < 50
    assert [result.name for result in run.results] == ["skipped"]
    assert children() == before
