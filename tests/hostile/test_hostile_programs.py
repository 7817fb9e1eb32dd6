"""Some hundred hostile programs, and what watches over them. `make hostile` runs 10,000."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hostile_modes import MODES
from hostile_program import Program, choose, difference, run
from hostile_sweep import run_batch, sweep

PROGRAMS = 150


@pytest.mark.slow
def test_programs__end_and_end_alike_however_they_are_run() -> None:
    report = sweep(0, PROGRAMS, compare_every=3)
    assert not report.findings, "\n".join(f"{each}\n{each.details}" for each in report.findings)
    assert report.programs == PROGRAMS
    assert report.runs == PROGRAMS + 2 * PROGRAMS // 3
    assert report.memory < 512 << 10


def test_programs__are_of_every_mode_and_extension() -> None:
    choices = [choose(seed)[0] for seed in range(len(MODES) * 8)]
    assert {choice.mode for choice in choices} == set(MODES)
    assert {choice.extension for choice in choices} == {"none", "vmx", "vmx guest", "svm", "svm guest"}


def test_programs__are_the_same_each_time() -> None:
    for seed in range(4000, 4010):
        assert difference(run(Program(seed)), run(Program(seed))) is None


def test_difference__notices_one() -> None:
    assert difference(run(Program(12)), run(Program(12, limit=3))) is not None


# Prints a line for each program it is asked for, but dies at number 2 and says that number 4 failed.
_CHILD = """\
import json, os, sys, time
for seed in range(int(sys.argv[1]), int(sys.argv[1]) + int(sys.argv[2])):
    if seed == 2:
        os.abort()
    if seed == 3:
        sys.stderr.write("Timeout (0:01:00)!")
        os._exit(1)
    record = {"seed": seed, "exception": "KeyError"} if seed == 4 else {"seed": seed}
    print(json.dumps(record), flush=True)
"""


def test_what_kills_a_process__is_found_and_the_rest_still_runs(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(_CHILD)
    records = list(run_batch(0, 7, child=(sys.executable, str(script))))
    assert [record["seed"] for record in records] == [0, 1, 2, 3, 4, 5, 6]
    assert [record.get("crash") for record in records] == [None, None, "SIGABRT", "no end", None, None, None]
    report = sweep(0, 7, child=(sys.executable, str(script)))
    assert [finding.seed for finding in report.findings] == [2, 3, 4]
