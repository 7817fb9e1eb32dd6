"""The seeded bugs of a block's RTL, read from ``<block>.toml`` and applied to copies of the sources."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen


@frozen
class Mutant:
    """One seeded bug: ``old``, which occurs once in ``file``, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    killed_by: tuple[str, ...]
    simulation: str

    def apply(self, sources: Sequence[Path], directory: Path) -> list[Path]:
        """``sources`` with the bug, the changed one written to ``directory``; ValueError if ``old`` is not unique."""
        directory.mkdir(parents=True, exist_ok=True)
        result = list(sources)
        position = [source.name for source in sources].index(self.file)
        text = sources[position].read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}")
        result[position] = directory / self.file
        result[position].write_text(text.replace(self.old, self.new))
        return result


def load_mutants(block: str) -> tuple[Mutant, ...]:
    """The mutants of the block of that name."""
    tables = tomllib.loads((Path(__file__).parent / f"{block}.toml").read_text())
    return tuple(
        Mutant(
            name=table["name"],
            file=table["file"],
            old=table["old"],
            new=table["new"],
            killed_by=tuple(table["killed_by"]),
            simulation=table.get("simulation", "batch"),
        )
        for table in tables["mutant"]
    )
