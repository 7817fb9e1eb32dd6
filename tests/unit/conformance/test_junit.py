"""The JUnit file."""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from vtx.conformance.junit import junit_xml
from vtx.conformance.results import Ended, SerialReport, TestResult, TimedOut, Verdict, judge

PROPERTIES = {"suite revision": "0123abcd", "vtx": "1"}


def result(name: str, group: str, ending: Ended | TimedOut, text: str = "") -> TestResult:
    report = SerialReport()
    report.feed(text.encode())
    report.finish()
    verdict, reason = judge(ending, report)
    return TestResult(name, group, verdict, reason, "some-processor", report, ending, 1.5)


RESULTS = [
    result("good", "g", Ended(0, ""), "PASS: a\nPASS: a\nSKIP: b\nXFAIL: c\n"),
    result("bad", "g", Ended(1, ""), "PASS: a\nvalue <5> \x00\x1b\nFAIL: b & c\nPASS: d\n"),
    result("stuck", "h", TimedOut(3), "PASS: a\nwaiting\n"),
    result("quiet", "h", Ended(0, "")),
    result("dead", "h", Ended(None, "triple fault")),
    result("lying", "h", Ended(1, ""), "PASS: a\n"),
    result("terse", "h", Ended(0, ""), "PASS: a\nSUMMARY: 9 tests\n"),
    TestResult("absent", "h", Verdict.SKIP, "needs 2 processors"),
]


def parsed() -> Element:
    return ElementTree.fromstring(junit_xml(RESULTS, PROPERTIES).encode())


def cases(test: str) -> dict[str, Element]:
    return {
        str(case.get("name")): case
        for case in parsed().iter("testcase")
        if str(case.get("classname")).split(".", 1)[1] == test
    }


def tags(test: str) -> dict[str, list[str]]:
    return {name: [child.tag for child in case] for name, case in cases(test).items()}


def test_a_suite_for_each_group() -> None:
    suites = parsed().findall("testsuite")
    assert [suite.get("name") for suite in suites] == ["g", "h"]
    counts = [[int(suite.get(key, "")) for key in ("tests", "failures", "errors", "skipped")] for suite in suites]
    assert counts == [[7, 1, 0, 2], [9, 1, 2, 1]]
    assert [suite.get("time") for suite in suites] == ["3.000", "7.500"]


def test_totals() -> None:
    root = parsed()
    assert [root.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["16", "2", "2", "3"]


def test_properties() -> None:
    suite = parsed().find("testsuite")
    assert suite is not None
    found = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert found == {**PROPERTIES, "processor of good": "some-processor", "processor of bad": "some-processor"}


def test_case_for_each_check() -> None:
    assert tags("good") == {"a": [], "a [2]": [], "b": ["skipped"], "c": ["skipped"]}
    assert tags("bad") == {"a": [], "b & c": ["failure", "system-out"], "d": []}


def test_output_with_a_failure() -> None:
    case = cases("bad")["b & c"]
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("message") == "FAIL: b & c"
    assert case.findtext("system-out") == "value <5> \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\nFAIL: b & c"
    outputs = [suite.findtext("system-out") or "" for suite in parsed().findall("testsuite")]
    assert outputs[0].startswith("==== bad ====\nPASS: a\nvalue <5>")
    assert "good" not in outputs[0]
    assert "==== stuck ====\nPASS: a\nwaiting\n" in outputs[1]


def test_case_for_a_test_without_checks_or_that_ended_badly() -> None:
    assert tags("stuck") == {"a": [], "(test)": ["error"]}
    assert tags("quiet") == {"quiet": []}
    assert tags("dead") == {"dead": ["error"]}
    assert tags("lying") == {"a": [], "(test)": ["failure"]}
    assert tags("terse") == {"a": [], "(passed without a word)": []}
    assert tags("absent") == {"absent": ["skipped"]}
    skipped = cases("absent")["absent"].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "SKIP: needs 2 processors"
