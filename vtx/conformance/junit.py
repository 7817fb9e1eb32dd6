"""The results as a JUnit file: a suite for each group, a case for each check."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from vtx.conformance.results import Check, CheckStatus, TestResult, Verdict

_LONGEST_OUTPUT: Final = 1 << 20
_NOT_XML: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SKIPPED: Final = (CheckStatus.SKIP, CheckStatus.XFAIL, CheckStatus.KFAIL)
_OWN_CASE: Final = "(test)"
_SILENT_CASE: Final = "(passed without a word)"


def junit_xml(results: Sequence[TestResult], properties: Mapping[str, str]) -> str:
    """The text of a JUnit file; ``properties`` hold for all of it.

    Each check is a case named as the suite names it, numbered if the name comes again. A test that reports no checks,
    or that ended badly besides, is a case of its own. Passed checks that the suite only counts are one case together.
    Serial output accompanies failures.
    """
    root = Element("testsuites", name="kvm-unit-tests")
    suites = []
    for group in dict.fromkeys(result.group for result in results):
        members = [result for result in results if result.group == group]
        suites.append(_suite(root, group, members, properties))
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    root.set("time", f"{sum(result.wall for result in results):.3f}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(root: Element, group: str, results: Sequence[TestResult], properties: Mapping[str, str]) -> Element:
    suite = SubElement(root, "testsuite", name=group)
    listed = SubElement(suite, "properties")
    processors = {f"processor of {result.name}": result.processor for result in results if result.processor}
    for name, value in {**properties, **processors}.items():
        SubElement(listed, "property", name=_clean(name), value=_clean(value))
    for result in results:
        _cases(suite, result)
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(case.find(tag) is not None for case in cases)))
    suite.set("time", f"{sum(result.wall for result in results):.3f}")
    output = "".join(_output_of(result) for result in results if result.verdict.is_failure)
    if output:
        SubElement(suite, "system-out").text = _clean(output)
    return suite


def _output_of(result: TestResult) -> str:
    text = result.report.text if result.report is not None else ""
    if len(text) > _LONGEST_OUTPUT:
        text = f"{text[: _LONGEST_OUTPUT // 2]}\n[...]\n{text[-_LONGEST_OUTPUT // 2 :]}"
    return f"==== {result.name} ====\n{text.rstrip()}\n"


def _cases(suite: Element, result: TestResult) -> None:
    place = f"{result.group}.{result.name}"
    checks = result.report.checks if result.report is not None else []
    seen: Counter[str] = Counter()
    for check in checks:
        seen[check.name] += 1
        number = f" [{seen[check.name]}]" if seen[check.name] > 1 else ""
        _check_case(SubElement(suite, "testcase", classname=place, name=_clean(check.name + number)), check)
    if checks and result.report is not None and result.report.silent:
        SubElement(suite, "testcase", classname=place, name=_SILENT_CASE)
    ended_badly = result.verdict in (Verdict.CRASH, Verdict.TIMEOUT)
    explained = any(check.status.is_failure for check in checks) or result.verdict in (Verdict.PASS, Verdict.SKIP)
    if not checks or ended_badly or not explained:
        name = _OWN_CASE if checks else result.name
        _own_case(SubElement(suite, "testcase", classname=place, name=name, time=f"{result.wall:.3f}"), result)


def _check_case(case: Element, check: Check) -> None:
    if check.status.is_failure:
        SubElement(case, "failure", message=_clean(f"{check.status.value}: {check.name}"))
        SubElement(case, "system-out").text = _clean(check.context)
    elif check.status in _SKIPPED:
        SubElement(case, "skipped", message=_clean(f"{check.status.value}: {check.name}"))


def _own_case(case: Element, result: TestResult) -> None:
    tags = {Verdict.SKIP: "skipped", Verdict.FAIL: "failure", Verdict.CRASH: "error", Verdict.TIMEOUT: "error"}
    if result.verdict in tags:
        SubElement(case, tags[result.verdict], message=_clean(f"{result.verdict.value}: {result.reason}"))


def _clean(text: str) -> str:
    """``text`` without the characters that XML has no way to express."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
