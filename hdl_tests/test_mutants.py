"""Seeded bugs, in the RTL and in the model: each must be found, for the right reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from hdl_tests.lib.blocks import BUILD, Block
from hdl_tests.lib.prover import prove
from hdl_tests.lib.simulator import NotSimulated, simulate
from hdl_tests.mutants.model import MUTANTS
from hdl_tests.mutants.rtl import Mutant, load_mutants

PARALLEL = 2


def _verdict(spec, sources, directory, plusargs):
    """What the simulation says about a seeded bug: killed, or why that cannot be said."""
    try:
        run = simulate(spec, sources, directory, plusargs)
    except NotSimulated as failure:
        return f"did not run: {failure}"
    if run.tests != spec.tests:
        return f"ran {run.tests} of {spec.tests} tests"
    if run.failures == 0:
        return "survived"
    # A crash is no kill: the testbench must have reported a difference.
    return "killed" if "mismatch" in run.report else f"failed without a mismatch: {run.log}"


def _simulated(block: Block, mutant: Mutant) -> str:
    directory = BUILD / block.name / "mutants" / mutant.name
    sources = mutant.apply(block.sources, directory / "rtl")
    plusargs = {"operations": block.mutant_operations}
    return _verdict(block.simulation(mutant.simulation), sources, directory / "simulation", plusargs)


def _proven(block: Block, mutant: Mutant) -> str:
    directory = BUILD / block.name / "mutants" / mutant.name
    sources = mutant.apply(block.sources, directory / "rtl")
    proof = prove(block.formal_script, [*sources, block.formal_top], "bmc", directory / "formal")
    if proof.verdict == "FAIL" and proof.failed:
        return "killed"
    return "survived" if proof.verdict == "PASS" else f"{proof.verdict}: {proof.log}"


def _verdicts(judge, cases):
    """Verdict by name of each case; ``judge`` runs on `PARALLEL` of them at a time."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        verdicts = list(pool.map(judge, cases))
    return {getattr(case, "name", case): verdict for case, verdict in zip(cases, verdicts, strict=True)}


def _not_killed(verdicts):
    return {name: verdict for name, verdict in verdicts.items() if verdict != "killed"}


def test_rtl_mutants__are_killed_in_simulation(block, show):
    cases = [mutant for mutant in load_mutants(block.name) if "cocotb" in mutant.killed_by]
    verdicts = _verdicts(lambda mutant: _simulated(block, mutant), cases)
    assert _not_killed(verdicts) == {}
    show(f"{block.title}: {len(verdicts)} of {len(cases)} RTL mutants killed in simulation")


def test_rtl_mutants__are_killed_by_the_properties(block, show):
    cases = [mutant for mutant in load_mutants(block.name) if "formal" in mutant.killed_by]
    verdicts = _verdicts(lambda mutant: _proven(block, mutant), cases)
    assert _not_killed(verdicts) == {}
    show(f"{block.title}: {len(verdicts)} of {len(cases)} RTL mutants killed by the properties")


def test_model_mutants__are_killed_in_simulation(block, show):
    def judge(name):
        directory = BUILD / block.name / "mutants" / f"model-{name}"
        plusargs = {"operations": block.mutant_operations, "model_mutant": name}
        return _verdict(block.simulation("batch"), block.sources, directory, plusargs)

    cases = list(MUTANTS)
    verdicts = _verdicts(judge, cases)
    assert _not_killed(verdicts) == {}
    show(f"{block.title}: {len(verdicts)} of {len(cases)} model mutants killed in simulation")


def test_rtl_mutants__change_the_text_once(block, tmp_path):
    names = [mutant.name for mutant in load_mutants(block.name)]
    assert len(names) == len(set(names))
    for mutant in load_mutants(block.name):
        assert mutant.apply(block.sources, tmp_path / mutant.name)
