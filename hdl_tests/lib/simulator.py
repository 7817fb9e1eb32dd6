"""Build and run one simulation, and tell what really happened.

The runner of cocotb can report success for a run in which nothing was tested (a filter that matches nothing, a module
that does not import, a failed assertion in the RTL), so success here means: the results file says that the expected
number of tests ran and none failed, and the tests themselves left a report.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from cocotb_tools.runner import get_results, get_runner

from hdl_tests.lib.blocks import SimulationSpec

DEFAULT_SEED = 20_250_601


def seed() -> int:
    """The seed of random stimuli: COCOTB_RANDOM_SEED, or a fixed one so that runs are reproducible."""
    return int(os.environ.get("COCOTB_RANDOM_SEED", DEFAULT_SEED))


class NotSimulated(Exception):  # noqa: N818 - a broken harness, as opposed to a failed comparison
    """The simulation did not get as far as comparing anything; the text is the end of its log."""


@frozen
class Simulation:
    """Result of a simulation: tests run, tests failed, and the JSON report of the testbench."""

    tests: int
    failures: int
    report: dict[str, Any]
    log: Path


def simulate(
    spec: SimulationSpec,
    sources: Sequence[Path],
    build_dir: Path,
    plusargs: Mapping[str, object],
    test_filter: str | None = None,
) -> Simulation:
    """Compile ``sources`` with the harness of ``spec`` in ``build_dir`` and run its tests.

    Raises `NotSimulated` if the build failed or the simulator left no results, whatever its exit status.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    report, results, log = (build_dir / name for name in ("report.json", "results.xml", "simulation.log"))
    for stale in (report, results, log):
        stale.unlink(missing_ok=True)
    runner = get_runner("icarus")
    try:
        runner.build(
            sources=[*sources, *spec.harness],
            hdl_toplevel=spec.top,
            build_dir=build_dir,
            parameters=spec.parameters,
            always=True,  # the runner does not notice changed parameters
            timescale=("1ns", "1ps"),
            log_file=build_dir / "build.log",
        )
    except (Exception, SystemExit) as failure:
        raise NotSimulated(_tail(build_dir / "build.log")) from failure
    values = {"report": report, "seed": seed()} | dict(plusargs)
    # SystemExit is the runner's way to report failures; what failed is in the results file.
    with contextlib.suppress(SystemExit):
        runner.test(
            test_module=spec.module,
            hdl_toplevel=spec.top,
            build_dir=build_dir,
            test_dir=build_dir,
            seed=seed(),
            plusargs=[f"+{name}={value}" for name, value in values.items()],
            results_xml=str(results),
            log_file=log,
            test_filter=test_filter,
        )
    try:
        tests, failures = get_results(results)
    except RuntimeError as failure:
        raise NotSimulated(_tail(log)) from failure
    content = json.loads(report.read_text()) if report.exists() else {}
    return Simulation(tests, failures, content, log)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-25:]) if log.exists() else f"no {log.name}"
