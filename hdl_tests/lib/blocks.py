"""The blocks under test, as blocks.toml describes them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from attrs import frozen

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "sim_build"


@frozen
class SimulationSpec:
    """One simulation top: what to compile besides the RTL, and which coroutines to run on it."""

    name: str
    top: str
    harness: tuple[Path, ...]
    module: str
    tests: int
    parameters: dict[str, int]


@frozen
class Block:
    """One RTL block with its simulations and its proof; paths are absolute."""

    name: str
    title: str
    sources: tuple[Path, ...]
    operations: int
    mutant_operations: int
    simulations: tuple[SimulationSpec, ...]
    formal_top: Path
    formal_script: Path
    properties: int
    covers: int

    def simulation(self, name: str) -> SimulationSpec:
        """The simulation called ``name``; StopIteration if there is none."""
        return next(each for each in self.simulations if each.name == name)


def _block(name: str, table: dict[str, Any]) -> Block:
    simulations = tuple(
        SimulationSpec(
            name=each,
            top=spec["top"],
            harness=tuple(ROOT / path for path in spec["harness"]),
            module=spec["module"],
            tests=spec["tests"],
            parameters=spec["parameters"],
        )
        for each, spec in table["simulations"].items()
    )
    return Block(
        name=name,
        title=table["title"],
        sources=tuple(ROOT / path for path in table["sources"]),
        operations=table["operations"],
        mutant_operations=table["mutant_operations"],
        simulations=simulations,
        formal_top=ROOT / table["formal"]["top"],
        formal_script=ROOT / table["formal"]["script"],
        properties=table["formal"]["properties"],
        covers=table["formal"]["covers"],
    )


def load_blocks() -> tuple[Block, ...]:
    """Every block of blocks.toml, in its order."""
    tables = tomllib.loads((ROOT / "blocks.toml").read_text())
    return tuple(_block(name, table) for name, table in tables.items())
