"""Seeded bugs, in the RTL and in the model: each must be found, for the right reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from hdl_tests.lib.blocks import BUILD, Block
from hdl_tests.lib.prover import prove
from hdl_tests.lib.simulator import simulate
from hdl_tests.mutants.bench import write_bench
from hdl_tests.mutants.model import MUTANTS
from hdl_tests.mutants.rtl import Mutant, load_mutants

PARALLEL = 2


@pytest.fixture(scope="module")
def bench():
    """By block name: the simulation of all its mutants that batches can find, and their names in order."""
    results = {}

    def run(block: Block):
        if block.name not in results:
            mutants = [each for each in load_mutants(block.name) if _in_simulation(each, "batch")]
            directory = BUILD / block.name / "mutants" / "bench"
            sources = write_bench(block, mutants, directory / "rtl")
            spec = block.simulation("mutants")
            simulation = simulate(spec, sources, directory, {"operations": block.mutant_operations})
            assert (simulation.tests, simulation.failures) == (spec.tests, 0), simulation.log.read_text()[-3000:]
            results[block.name] = simulation, [mutant.name for mutant in mutants]
        return results[block.name]

    return run


def _in_simulation(mutant: Mutant, simulation: str) -> bool:
    return "cocotb" in mutant.killed_by and mutant.simulation == simulation


def _simulated_alone(block: Block, mutant: Mutant) -> str:
    directory = BUILD / block.name / "mutants" / mutant.name
    sources = mutant.apply(block.sources, directory / "rtl")
    spec = block.simulation(mutant.simulation)
    run = simulate(spec, sources, directory / "simulation", {})
    if run.tests != spec.tests:
        return f"ran {run.tests} of {spec.tests} tests"
    if run.failures == 0:
        return "survived"
    # A crash is no kill: the testbench must have reported a difference.
    return "killed" if "mismatch" in run.report else f"failed without a mismatch: {run.log}"


def _proven(block: Block, mutant: Mutant) -> str:
    directory = BUILD / block.name / "mutants" / mutant.name
    sources = mutant.apply(block.sources, directory / "rtl")
    proof = prove(block.formal_script, [*sources, block.formal_top], "bmc", directory / "formal")
    if proof.verdict == "FAIL" and proof.failed:
        return "killed"
    return "survived" if proof.verdict == "PASS" else f"{proof.verdict}: {proof.log}"


def _not_killed(judge, cases):
    """Verdict by name of the cases that are not killed; ``judge`` runs on `PARALLEL` of them at a time."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        verdicts = list(pool.map(judge, cases))
    return {case.name: verdict for case, verdict in zip(cases, verdicts, strict=True) if verdict != "killed"}


def test_rtl_mutants__are_killed_by_batches(block, bench, show):
    simulation, names = bench(block)
    killed = {names[int(instance) - 1] for instance in simulation.report["rtl"]}
    assert set(names) - killed == set()
    latest = max(simulation.report["rtl"].values())
    show(f"{block.title}: {len(killed)} of {len(names)} RTL mutants killed within {latest} operations")


def test_rtl_mutants__are_killed_edge_by_edge(block, show):
    cases = [mutant for mutant in load_mutants(block.name) if _in_simulation(mutant, "edge")]
    assert _not_killed(lambda mutant: _simulated_alone(block, mutant), cases) == {}
    show(f"{block.title}: {len(cases)} of {len(cases)} RTL mutants of reset and idle cycles killed")


def test_rtl_mutants__are_killed_by_the_properties(block, show):
    cases = [mutant for mutant in load_mutants(block.name) if "formal" in mutant.killed_by]
    assert _not_killed(lambda mutant: _proven(block, mutant), cases) == {}
    show(f"{block.title}: {len(cases)} of {len(cases)} RTL mutants killed by the properties")


def test_model_mutants__are_killed(block, bench, show):
    simulation, _ = bench(block)
    found = simulation.report["model"]
    assert set(found) == set(MUTANTS)
    assert [name for name, operations in found.items() if operations is None] == []
    show(f"{block.title}: {len(found)} of {len(MUTANTS)} model mutants killed within {max(found.values())} operations")


def test_rtl_mutants__change_the_text_once(block, tmp_path):
    names = [mutant.name for mutant in load_mutants(block.name)]
    assert len(names) == len(set(names))
    for mutant in load_mutants(block.name):
        assert mutant.apply(block.sources, tmp_path / mutant.name)
