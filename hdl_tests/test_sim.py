"""RTL against the emulator's own model, in simulation."""

from __future__ import annotations

import os

from hdl_tests.lib.blocks import BUILD
from hdl_tests.lib.simulator import seed, simulate


def test_batch__rtl_and_model_agree(block, show):
    spec = block.simulation("batch")
    operations = int(os.environ.get("HDL_OPERATIONS", block.operations))
    run = simulate(spec, block.sources, BUILD / block.name / "batch", {"operations": operations})
    assert run.failures == 0, run.report.get("mismatch", {}).get("text", run.log.read_text()[-3000:])
    assert run.tests == spec.tests
    profiles = [run.report[f"vmwrite_any_{setting}"] for setting in (0, 1)]
    compared = run.report["directed"] + sum(profile["operations"] for profile in profiles)
    assert compared >= 2 * operations
    for profile in profiles:
        assert profile["missing"] == []
        assert profile["covered"] == profile["goal"]
    covered, goal = (sum(profile[name] for profile in profiles) for name in ("covered", "goal"))
    show(f"{block.title}: {compared} operations compared, RTL = model in every bit (seed {seed()})")
    show(f"{block.title}: {covered} of {goal} transitions covered (goal: all)")


def test_edge__reset_and_idle_cycles(block):
    spec = block.simulation("edge")
    run = simulate(spec, block.sources, BUILD / block.name / "edge", {})
    assert (run.tests, run.failures) == (spec.tests, 0), run.log.read_text()[-3000:]
