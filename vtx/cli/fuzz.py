"""``vtx fuzz``: near-valid states by the thousand, on this model and on another one."""

from __future__ import annotations

import sys
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import click

from vtx.cli.images import Unusable, find_image
from vtx.cli.table import print_table

if TYPE_CHECKING:
    from vtx.fuzz.known import Sorted
    from vtx.fuzz.states import Generator

_PROFILE = "bochs-skylake-x"
_HARNESS = "entries"


@click.group()
def fuzz() -> None:
    """Compare the model with another one, on random input."""


@fuzz.command()
@click.option("--count", default=1000, show_default=True, type=click.IntRange(1), help="Number of VMCSs.")
@click.option("--seed", default=1, show_default=True, type=int, help="Decides all of them.")
@click.option("--list", "listing", is_flag=True, help="Print the VMCSs and run nothing.")
@click.option("--reduce", "reduced", is_flag=True, help="Reduce each disagreement that no one explains yet.")
def entries(count: int, seed: int, listing: bool, reduced: bool) -> int:
    """Enter near-valid VMCSs on this model and on Bochs, and compare how each VM entry ended.

    What is compared: whether the VM entry fails, VM-instruction error, exit reason, exit qualification, VM-exit
    interruption information and IDT-vectoring information. Disagreements are sorted into the classes that
    docs/interpretations.md explains; the others are printed.

    \b
    Exit status:
      0    all states agree, or disagree as explained
      1    a disagreement that is not explained
      2    Bochs, or the harness, is not there
    """
    from vtx.fuzz.states import Generator  # noqa: PLC0415 - the machine comes with it
    from vtx.x86.profile import load_profile  # noqa: PLC0415

    generator = Generator.of(load_profile(_PROFILE), seed)
    if listing:
        for number, state in enumerate(islice(generator, count)):
            print(f"{number}: {state}")  # noqa: T201
        return 0
    outcome = _compare(generator, count, reduced)
    agree = count - sum(map(len, outcome.explained.values())) - len(outcome.unexplained)
    rows = [("agree", f"{agree}", "")]
    rows += [(f"differ: {each.id}", f"{len(found)}", each.verdict) for each, found in outcome.explained.items()]
    rows.append(("not explained", f"{len(outcome.unexplained)}", ""))
    print_table(("class", "states", "who is right"), rows, right=frozenset({1}))
    for each in outcome.unexplained:
        print(f"\n{each}")  # noqa: T201
    sys.stdout.flush()
    return int(bool(outcome.unexplained))


def _compare(generator: Generator, count: int, reduced: bool) -> Sorted:
    from vtx.bench.emulators import Unavailable  # noqa: PLC0415
    from vtx.fuzz.compare import compare, reduce  # noqa: PLC0415
    from vtx.fuzz.known import sort  # noqa: PLC0415
    from vtx.fuzz.on_bochs import on_bochs  # noqa: PLC0415
    from vtx.fuzz.on_vtx import MEMORY, on_vtx  # noqa: PLC0415

    image = find_image(_HARNESS).data

    ours, theirs = (partial(runner, generator.profile, image) for runner in (on_vtx, on_bochs))

    try:
        found = compare(generator, list(islice(generator, count)), ours, theirs)
        outcome = sort(generator, found, MEMORY)
        if reduced and outcome.unexplained:
            outcome.unexplained[:] = reduce(generator, outcome.unexplained, ours, theirs)
    except Unavailable as error:
        raise Unusable(f"cannot compare: {error}") from None
    return outcome
