"""``vtx conformance``: a build of kvm-unit-tests in, a table and a JUnit file out."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from vtx.cli.images import Unusable
from vtx.cli.status import INTERRUPTED
from vtx.cli.table import print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vtx.conformance.plan import Plan
    from vtx.conformance.results import TestResult
    from vtx.conformance.suite import Suite

_MOST_FAILURES: Final = 10


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--group", "groups", multiple=True, metavar="G", help="Only tests of this group; may be repeated.")
@click.option("--test", "tests", multiple=True, metavar="T", help="Only tests of this name or pattern (vmx_*).")
@click.option("--exclude", "excluded", multiple=True, metavar="T", help="No tests of this name or pattern.")
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="Processor to be; the first one that fits.")
@click.option(
    "--cpu",
    "flags",
    default="-pku",  # with protection keys, tests of all kinds of access make ten times as many
    show_default=True,
    metavar="FLAGS",
    help="Change every processor: +pku,-smep,phys-bits=40. A test called like a flag keeps it.",
)
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Tests at a time [default: one per processor].")
@click.option(
    "--timeout-scale",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="X",
    help="Multiplies the suite's time-outs, which are meant for hardware.",
)
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a JUnit file.")
@click.option("--list", "only_list", is_flag=True, help="Only say what would run, and what not and why.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def conformance(
    directory: Path,
    groups: tuple[str, ...],
    tests: tuple[str, ...],
    excluded: tuple[str, ...],
    profiles: tuple[str, ...],
    flags: str,
    jobs: int | None,
    timeout_scale: float,
    junit: Path | None,
    only_list: bool,
    as_json: bool,
) -> int:
    """Run the kvm-unit-tests built in DIR and say what passes.

    DIR is a checkout of the suite with its x86 images built (./configure && make). Which tests there are, with what
    arguments, memory, processor and time-out, is read from its x86/unittests.cfg; images that it does not mention are
    in the group "unlisted" and run when asked for, as do the tests of its group "nodefault".

    \b
    Exit status:
      0    everything that ran passed
      1    a test failed, crashed or timed out
      130  interrupted from the keyboard; the table has what was done by then
      2    wrong usage, or DIR is no such build
    """
    suite, plans = _plan(directory, groups, tests, excluded, profiles, flags)
    if only_list:
        _list(plans, as_json=as_json)
        return 0
    file = _JUnitFile(junit, _properties(suite)) if junit is not None else None
    results, interrupted = _run(plans, jobs or os.cpu_count() or 1, timeout_scale, file)
    if file is not None:
        file.write(results)
    if as_json:
        _print_json(suite, results)
    else:
        _print_table(suite, results)
        _print_failures(results)
    if interrupted:
        return INTERRUPTED
    return int(any(result.verdict.is_failure for result in results))


def _plan(
    directory: Path,
    groups: tuple[str, ...],
    tests: tuple[str, ...],
    excluded: tuple[str, ...],
    profiles: tuple[str, ...],
    flags: str,
) -> tuple[Suite, list[Plan]]:
    from vtx.conformance.plan import Planner, Selection  # noqa: PLC0415 - not before the options are known to be good
    from vtx.conformance.processor import UnsupportedError  # noqa: PLC0415
    from vtx.conformance.suite import SuiteError, load_suite  # noqa: PLC0415
    from vtx.x86.toml_section import ProfileError  # noqa: PLC0415

    try:
        suite = load_suite(directory)
        selection = Selection(tests, groups, excluded)
        chosen = selection.select(suite)
        planner = Planner(suite, profiles, flags=flags)
    except SuiteError as error:
        raise Unusable(str(error)) from None
    except UnsupportedError as error:
        raise Unusable(f"--cpu {flags}: {error}") from None
    except ProfileError as error:
        raise Unusable(f"profile {error}") from None
    return suite, [planner.plan(test, asked_for=selection.asks_for(test)) for test in chosen]


class _JUnitFile:
    """The JUnit file, written anew after each test: a run of hours that is killed leaves what it knew.

    It is written before the first one, too: that it cannot be is better known then than after those hours.
    """

    def __init__(self, path: Path, properties: Mapping[str, str]) -> None:
        self._path = path
        self._properties = properties
        self.write([])

    def write(self, results: Sequence[TestResult]) -> None:
        from vtx.conformance.junit import junit_xml  # noqa: PLC0415 - see `_plan`

        _write(self._path, junit_xml(results, self._properties))

    def keep(self, results: Sequence[TestResult]) -> None:
        """As `write`, but a disk that is full for a while does not end the run; the last `write` says what is wrong."""
        with suppress(Unusable):
            self.write(results)


def _run(
    plans: Sequence[Plan], jobs: int, timeout_scale: float, file: _JUnitFile | None
) -> tuple[list[TestResult], bool]:
    from vtx.conformance.runner import Runner  # noqa: PLC0415 - see `_plan`

    runner = Runner(plans, jobs, timeout_scale, record=file.keep if file is not None else None)
    try:
        if sys.stderr.isatty():
            from vtx.cli.progress import Progress  # noqa: PLC0415 - of use on a terminal alone

            with Progress(sum(plan.job is not None for plan in plans)) as progress:
                runner.observer = progress
                return runner.run(), False
        return runner.run(), False
    except KeyboardInterrupt:
        return runner.results, True


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Unusable(f"cannot write {str(path)!r}: {error.strerror}") from None


def _properties(suite: Suite) -> dict[str, str]:
    from importlib.metadata import version  # noqa: PLC0415 - for the file alone

    return {
        "suite": "kvm-unit-tests",
        "suite revision": suite.revision or "unknown",
        "suite architecture": suite.architecture or "unknown",
        "vtx": version("vtx"),
    }


def _list(plans: Sequence[Plan], *, as_json: bool) -> None:
    rows = []
    for plan in plans:
        job, test = plan.job, plan.test
        rows.append(
            {
                "test": test.name,
                "groups": " ".join(test.groups),
                "image": test.file,
                "processors": str(job.processors if job else test.processors),
                "memory": f"{job.memory >> 20}M" if job else "",
                "timeout": f"{job.timeout:g}" if job and job.timeout else "",
                "processor": job.processor if job else "",
                "setting": job.environment if job else "",
                "skipped because": plan.skip,
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2))  # noqa: T201
    else:
        print_table(tuple(rows[0]), [tuple(row.values()) for row in rows], right=frozenset({3, 4, 5}))


def _tally(result: TestResult) -> tuple[int, int, int]:
    """Checks that passed, failed and were skipped; an expected failure counts as skipped."""
    from vtx.conformance.results import CheckStatus as Status  # noqa: PLC0415 - see `_plan`

    skipped = result.count(Status.SKIP, Status.XFAIL, Status.KFAIL)
    return result.count(Status.PASS, Status.XPASS), result.count(Status.FAIL), skipped


def _print_table(suite: Suite, results: Sequence[TestResult]) -> None:
    rows = []
    totals = [0, 0, 0]
    for result in results:
        tally = _tally(result) if result.report is not None else (0, 0, 0)
        totals = [total + count for total, count in zip(totals, tally, strict=True)]
        wall = f"{result.wall:.1f}" if result.report is not None else ""
        counts = [str(count or "") for count in tally]
        rows.append((result.name, result.verdict.value, *counts, wall, result.reason[:100]))
    verdicts = [result.verdict.value for result in results]
    summary = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
    total_wall = sum(result.wall for result in results)
    rows.append(("total", "", *map(str, totals), f"{total_wall:.1f}", summary))
    header = ("test", "verdict", "passed", "failed", "skipped", "seconds", "why, or first failure")
    print_table(header, rows, right=frozenset({2, 3, 4, 5}))
    revision = suite.revision or "of unknown revision"
    print(f"kvm-unit-tests {revision}, built for {suite.architecture or 'an unknown target'}")  # noqa: T201


def _print_failures(results: Sequence[TestResult]) -> None:
    for result in results:
        checks = result.report.checks if result.report is not None else ()
        failed = [check for check in checks if check.status.is_failure]
        if not failed:
            continue
        print(f"\n{result.name}: failed checks")  # noqa: T201
        for check in failed[:_MOST_FAILURES]:
            print(f"  {check.status.value}: {check.name}")  # noqa: T201
        if len(failed) > _MOST_FAILURES:
            print(f"  and {len(failed) - _MOST_FAILURES} more (--junit has them all)")  # noqa: T201


def _print_json(suite: Suite, results: Sequence[TestResult]) -> None:
    print(json.dumps({**_properties(suite), "tests": [_as_json(result) for result in results]}, indent=2))  # noqa: T201


def _as_json(result: TestResult) -> dict[str, Any]:
    report = result.report
    checks = [{"status": check.status.value, "name": check.name} for check in report.checks] if report else []
    passed, failed, skipped = _tally(result) if report else (0, 0, 0)
    return {
        "name": result.name,
        "group": result.group,
        "verdict": result.verdict.value,
        "reason": result.reason,
        "processor": result.processor,
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(result.wall, 3),
        "checks": checks,
    }
