"""All mutants of a block in one simulation: every mutant's modules under names of their own, beside the block itself.

A simulator process for each mutant would spend its time on starting up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hdl_tests.lib.blocks import ROOT, Block
from hdl_tests.mutants.rtl import Mutant

_MODULE = re.compile(r"^module (\w+)", re.MULTILINE)


def write_bench(block: Block, mutants: Sequence[Mutant], directory: Path) -> list[Path]:
    """Sources of the bench in ``directory``, in compile order; mutant n of ``mutants`` is instance n + 1."""
    directory.mkdir(parents=True, exist_ok=True)
    top = block.simulation("edge").top
    sources = list(block.sources)
    for number, mutant in enumerate(mutants, 1):
        sources += _renamed(mutant.apply(block.sources, directory / f"m{number}"), number, directory)
    duts = []
    for number, module in enumerate((top, *(f"{top}_m{number}" for number in range(1, len(mutants) + 1)))):
        ports = f".clk(clk & live[{number}]), .rst_n, .valid, .rsp(rsp_{number})"
        duts.append(f"  response_t rsp_{number};")
        duts.append(f"  {module} dut_{number} ({ports}, .req(req & {{REQUEST_WIDTH{{live[{number}]}}}}));")
    comparisons = [
        f"        if (live[{number}] && (rsp_{number} !== want)) differs[{number}] = 1'b1;"
        for number in range(len(mutants) + 1)
    ]
    template = ROOT / "harness" / f"{block.simulation('mutants').top}.sv.in"
    text = template.read_text()
    text = text.replace("@INSTANCES@", str(len(mutants) + 1))
    text = text.replace("@DUTS@", "\n".join(duts)).replace("@COMPARISONS@", "\n".join(comparisons))
    bench = directory / template.stem
    bench.write_text(text)
    return [*sources, bench]


def _renamed(sources: Sequence[Path], number: int, directory: Path) -> list[Path]:
    """Copies of ``sources`` (without the package) whose modules have the suffix ``_m<number>``."""
    texts = {source: source.read_text() for source in sources}
    modules = [name for text in texts.values() for name in _MODULE.findall(text)]
    names = re.compile(rf"\b({'|'.join(modules)})\b")
    copies = []
    for source, text in texts.items():
        if _MODULE.search(text):
            copy = directory / f"{source.stem}_m{number}.sv"
            copy.write_text(names.sub(rf"\1_m{number}", text))
            copies.append(copy)
    return copies
