"""``vtx fuzz``: near-valid states by the thousand, on this model and on another one."""

from __future__ import annotations

import sys
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from vtx.cli.images import Unusable, find_image
from vtx.cli.table import print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtx.fuzz.classes import Sorted
    from vtx.fuzz.compare import Disagreement, Experiment
    from vtx.fuzz.drawing import Generator
    from vtx.fuzz.readings import Classes
    from vtx.x86.profile import Profile


@click.group()
def fuzz() -> None:
    """Compare the model with another one, on random input."""


_COUNT = click.option("--count", default=1000, show_default=True, type=click.IntRange(1), help="Number of states.")
_SEED = click.option("--seed", default=1, show_default=True, type=int, help="Decides all of them.")
_LIST = click.option("--list", "listing", is_flag=True, help="Print the states and run nothing.")
_REDUCE = click.option("--reduce", "reduced", is_flag=True, help="Reduce each disagreement that no one explains yet.")


@fuzz.command()
@_COUNT
@_SEED
@_LIST
@_REDUCE
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
    from vtx.fuzz.entries.experiment import BOCHS, IMAGE, PROFILE, experiment  # noqa: PLC0415 - the machine too
    from vtx.fuzz.entries.known import KNOWN, case_of  # noqa: PLC0415
    from vtx.fuzz.entries.states import EntryGenerator  # noqa: PLC0415
    from vtx.fuzz.on_others import on_bochs  # noqa: PLC0415
    from vtx.fuzz.on_vtx import MEMORY  # noqa: PLC0415
    from vtx.fuzz.readings import Classes  # noqa: PLC0415
    from vtx.x86.profile import load_profile  # noqa: PLC0415

    profile = load_profile(PROFILE)
    generator = EntryGenerator.of(profile, seed)
    if listing:
        return _list(generator, count)
    campaign = Campaign(experiment(generator), profile, IMAGE, partial(on_bochs, BOCHS))
    return campaign.run(Classes(KNOWN), case_of(generator, MEMORY), count, reduced)


@fuzz.command()
@click.option(
    "--oracle", type=click.Choice(("bochs", "qemu")), default="qemu", show_default=True, help="The other one."
)
@_COUNT
@_SEED
@_LIST
@_REDUCE
def vmruns(oracle: str, count: int, seed: int, listing: bool, reduced: bool) -> int:
    """Run near-valid VMCBs on this model and on another, and compare how each VMRUN ended.

    What is compared: whether VMRUN is refused, EXITCODE, EXITINFO1 and EXITINFO2 where they are defined, EXITINTINFO,
    the guest's saved state with its general registers, and what it has pushed. Disagreements are sorted into the
    classes that docs/interpretations.md explains; the others are printed.

    \b
    Exit status:
      0    all states agree, or disagree as explained
      1    a disagreement that is not explained
      2    the other emulator, or the harness, is not there
    """
    from vtx.fuzz.vmruns.case import case_of  # noqa: PLC0415
    from vtx.fuzz.vmruns.experiment import IMAGE, ORACLES, experiment  # noqa: PLC0415 - the machine comes with it
    from vtx.fuzz.vmruns.known import KNOWN  # noqa: PLC0415

    other = ORACLES[oracle]
    generator = other.generator(seed)
    if listing:
        return _list(generator, count)
    campaign = Campaign(experiment(generator), generator.profile, IMAGE, other.runner)
    return campaign.run(KNOWN[oracle], case_of(generator), count, reduced)


def _list(generator: Generator[Any], count: int) -> int:
    for number, state in enumerate(islice(generator, count)):
        print(f"{number}: {generator.describe(state)}")  # noqa: T201
    return 0


@frozen
class Campaign:
    """An experiment, and where: the guest ``image`` on this model with ``profile``, and on ``other``."""

    experiment: Experiment[Any]
    profile: Profile
    image: str
    other: Callable[[Profile, bytes, bytes], str]

    def run(self, classes: Classes[Any], case_of: Callable[[Disagreement[Any]], Any], count: int, reduced: bool) -> int:
        """Compare ``count`` states and print the table of classes; the exit status."""
        from vtx.bench.emulators import Unavailable  # noqa: PLC0415
        from vtx.fuzz.compare import compare, reduce  # noqa: PLC0415
        from vtx.fuzz.on_vtx import on_vtx  # noqa: PLC0415
        from vtx.fuzz.readings import explain  # noqa: PLC0415

        image = find_image(self.image).data
        ours, theirs = (partial(runner, self.profile, image) for runner in (on_vtx, self.other))
        try:
            found = compare(self.experiment, list(islice(self.experiment.generator, count)), ours, theirs)
            outcome = explain(self.experiment, classes, case_of, found, ours, theirs)
            if reduced and outcome.unexplained:
                outcome.unexplained[:] = reduce(self.experiment, outcome.unexplained, ours, theirs)
        except Unavailable as error:
            raise Unusable(f"cannot compare: {error}") from None
        _print(outcome, count - len(found))
        return int(bool(outcome.unexplained))


def _print(outcome: Sorted, agree: int) -> None:
    rows = [("agree", f"{agree}", "")]
    rows += [(f"differ: {name}", f"{count}", verdict) for (name, verdict), count in outcome.counts().items()]
    rows.append(("not explained", f"{len(outcome.unexplained)}", ""))
    print_table(("class", "states", "who is right"), rows, right=frozenset({1}))
    for one in outcome.unexplained:
        print(f"\n{one}")  # noqa: T201
    sys.stdout.flush()
