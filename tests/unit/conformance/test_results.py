"""What is read from the serial port, and the verdicts."""

import pytest

from vtx.conformance.results import CheckStatus, Died, Ended, Ending, SerialReport, TestResult, TimedOut, Verdict, judge


def report(text: str, pieces: int = 1) -> SerialReport:
    data = text.encode()
    size = max(-(-len(data) // pieces), 1)
    result = SerialReport()
    for start in range(0, len(data), size):
        result.feed(data[start : start + size])
    result.finish()
    return result


TEXT = """enabling apic
PASS: one
about two
FAIL: prefix: two
XFAIL: three
XPASS: four
KFAIL: five
SKIP: six
PASS: last, unfinished"""


@pytest.mark.parametrize("pieces", [1, 3, 50, len(TEXT)])
def test_checks(pieces: int) -> None:
    found = report(TEXT, pieces)
    assert [(check.status.value, check.name) for check in found.checks] == [
        ("PASS", "one"),
        ("FAIL", "prefix: two"),
        ("XFAIL", "three"),
        ("XPASS", "four"),
        ("KFAIL", "five"),
        ("SKIP", "six"),
        ("PASS", "last, unfinished"),
    ]
    assert found.first_failure() == found.checks[1]
    assert found.text == TEXT


def test_context_of_a_failure_is_what_came_after_the_check_before_it() -> None:
    assert report(TEXT).checks[1].context == "about two\nFAIL: prefix: two"
    assert report(TEXT).checks[0].context == ""


def test_carriage_returns_and_other_bytes() -> None:
    found = SerialReport()
    found.feed(b"PASS: a\r\nFAIL: \xff\r\n")
    assert [check.name for check in found.checks] == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_words_inside_a_line_are_no_check() -> None:
    assert report("this PASS: is not\nINFO: FAIL: neither\nPASSED: nor this\n").checks == []


def test_summary_counts_checks_without_a_line() -> None:
    found = report("PASS: a\nFAIL: b\nSUMMARY: 7 tests, 1 unexpected failures\n")
    assert found.silent == 5
    result = TestResult("t", "g", Verdict.FAIL, report=found)
    assert result.count(CheckStatus.PASS) == 6
    assert result.count(CheckStatus.FAIL) == 1


@pytest.mark.parametrize(
    ("verdict", "status"),
    [(Verdict.PASS, CheckStatus.PASS), (Verdict.SKIP, CheckStatus.SKIP), (Verdict.CRASH, CheckStatus.FAIL)],
)
def test_test_that_reports_nothing_is_one_check(verdict: Verdict, status: CheckStatus) -> None:
    result = TestResult("t", "g", verdict, report=report("hello\n"))
    assert [each for each in CheckStatus if result.count(each)] == [status]


def test_endless_output_does_not_fill_the_memory() -> None:
    found = SerialReport()
    for _ in range(40):
        found.feed(b"x" * (1 << 20))
    found.feed(b"\nPASS: a\n")
    assert len(found.text) == 16 << 20
    assert [check.name for check in found.checks] == ["a"]


@pytest.mark.parametrize(
    ("ending", "text", "verdict", "reason"),
    [
        (Ended(0, ""), "", Verdict.PASS, ""),
        (Ended(0, ""), "PASS: a\n", Verdict.PASS, ""),
        (Ended(0, ""), "PASS: a\nFAIL: b\n", Verdict.FAIL, "b"),
        (Ended(1, ""), "PASS: a\nFAIL: b\nFAIL: c\n", Verdict.FAIL, "b"),
        (Ended(1, ""), "XPASS: b\n", Verdict.FAIL, "ended with 1 although no check failed"),
        (Ended(1, ""), "XPASS: b\nFAIL: c\nSUMMARY: 2 tests, 2 unexpected failures\n", Verdict.FAIL, "c"),
        (
            Ended(1, ""),
            "XPASS: b\nSUMMARY: 3 tests, 2 unexpected failures\n",
            Verdict.FAIL,
            "ended with 1 although no check failed",
        ),
        (Ended(0, ""), "XFAIL: b\nSUMMARY: 1 tests, 1 expected failures\n", Verdict.PASS, ""),
        (Ended(1, ""), "PASS: a\n", Verdict.FAIL, "ended with 1 although no check failed"),
        (Ended(38, ""), "SKIP: no such feature\n", Verdict.SKIP, "no such feature"),
        (Ended(38, ""), "", Verdict.SKIP, "the test skipped itself"),
        (Ended(38, ""), "no such feature\n\nSUMMARY: 0 tests\n", Verdict.SKIP, "no such feature"),
        (Ended(38, ""), "FAIL: a\n", Verdict.FAIL, "a"),
        (
            Ended(0x3F, ""),
            "Unhandled exception 13\nrax=0\n\n",
            Verdict.CRASH,
            "ended with 0x3f: Unhandled exception 13",
        ),
        (Ended(7, ""), "PASS: a\nnone too sure\n", Verdict.CRASH, "ended with 0x7: none too sure"),
        (Ended(127, ""), "", Verdict.CRASH, "ended with 0x7f"),
        (Ended(None, "triple fault"), "PASS: a\n", Verdict.CRASH, "triple fault"),
        (Died("killed"), "PASS: a\n", Verdict.CRASH, "killed"),
        (TimedOut(1.5), "PASS: a\n", Verdict.TIMEOUT, "not done after 1.5 s, last line: PASS: a"),
        (TimedOut(2), "", Verdict.TIMEOUT, "not done after 2 s"),
    ],
)
def test_verdict(ending: Ending, text: str, verdict: Verdict, reason: str) -> None:
    assert judge(ending, report(text)) == (verdict, reason)


def test_passed_and_skipped_are_no_failures() -> None:
    assert [verdict for verdict in Verdict if not verdict.is_failure] == [Verdict.PASS, Verdict.SKIP]


def test_pass_that_the_suite_does_not_expect_is_a_pass() -> None:
    """The suite ends with a failure, since it knows KVM to be wrong there."""
    verdict, note = judge(Ended(1, ""), report("PASS: a\nXPASS: b\nSUMMARY: 2 tests, 1 unexpected failures\n"))
    assert verdict is Verdict.PASS
    assert note == "the suite calls it a failure to pass what KVM fails (1 XPASS)"
