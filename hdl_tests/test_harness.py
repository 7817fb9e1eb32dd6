"""The ways in which a simulation looks green without having tested anything, each of which must be seen."""

from __future__ import annotations

import pytest
from attrs import evolve

from hdl_tests.lib.blocks import BUILD, load_blocks
from hdl_tests.lib.coverage import Coverage, UndeclaredBin
from hdl_tests.lib.prover import prove
from hdl_tests.lib.simulator import NotSimulated, simulate

BLOCK = load_blocks()[0]
SPEC = BLOCK.simulation("edge")


def _directory(name):
    return BUILD / "harness" / name


def test_simulate__counts_the_tests_that_ran():
    run = simulate(SPEC, BLOCK.sources, _directory("filter"), {}, test_filter="no_such_test")
    assert run.tests == 0


def test_simulate__reports_a_testbench_that_does_not_import():
    with pytest.raises(NotSimulated, match="no_such_module"):
        simulate(evolve(SPEC, module="hdl_tests.sim.no_such_module"), BLOCK.sources, _directory("import"), {})


def test_simulate__reports_rtl_that_does_not_compile(tmp_path):
    broken = tmp_path / "vmx_decide.sv"
    broken.write_text("module vmx_decide (")
    with pytest.raises(NotSimulated, match="syntax error"):
        simulate(SPEC, [BLOCK.sources[0], broken, BLOCK.sources[2]], _directory("compile"), {})


def test_prove__reports_rtl_that_does_not_elaborate(tmp_path):
    broken = tmp_path / "vmx_decide.sv"
    broken.write_text("module vmx_decide (")
    files = [BLOCK.sources[0], broken, BLOCK.sources[2], BLOCK.formal_top]
    proof = prove(BLOCK.formal_script, files, "prove", _directory("elaborate"))
    assert proof.verdict == "ERROR"
    assert not proof.proven


def test_coverage__refuses_what_is_not_declared():
    coverage = Coverage({"letters": frozenset("ab")})
    coverage.sample("letters", "a")
    assert (coverage.covered, coverage.goal, coverage.missing()) == (1, 2, ["letters: b"])
    with pytest.raises(UndeclaredBin, match="letters: c"):
        coverage.sample("letters", "c")
