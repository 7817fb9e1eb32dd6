"""Safety properties of the RTL, proven for every sequence of operations."""

from __future__ import annotations

from hdl_tests.lib.blocks import BUILD
from hdl_tests.lib.prover import prove


def _files(block):
    return [*block.sources, block.formal_top]


def test_properties__are_proven(block, show):
    proof = prove(block.formal_script, _files(block), "prove", BUILD / block.name / "prove")
    assert proof.verdict == "PASS", proof.log
    assert len(proof.proven) == block.properties, "a property has vanished: compare with blocks.toml"
    show(f"{block.title}: {len(proof.proven)} properties proven by induction")


def test_covers__are_reached(block, show):
    proof = prove(block.formal_script, _files(block), "cover", BUILD / block.name / "cover")
    assert proof.verdict == "PASS", proof.log
    assert len(proof.reached) == block.covers, "a cover has vanished: compare with blocks.toml"
    show(f"{block.title}: {len(proof.reached)} cover points reached by the solver")
