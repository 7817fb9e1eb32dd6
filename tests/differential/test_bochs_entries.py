"""VM entries of near-valid VMCSs on this model and on Bochs: nothing differs but what is known to."""

import shutil
from itertools import islice

import pytest

from vtx.cli.images import find_image
from vtx.fuzz import compare
from vtx.fuzz.classes import sort
from vtx.fuzz.entries.experiment import BOCHS, IMAGE, PROFILE, experiment
from vtx.fuzz.entries.known import KNOWN, case_of
from vtx.fuzz.entries.results import Result
from vtx.fuzz.entries.states import EntryGenerator
from vtx.fuzz.exchange import Report
from vtx.fuzz.on_others import on_bochs
from vtx.fuzz.on_vtx import MEMORY, on_vtx
from vtx.x86.profile import load_profile

HERE = load_profile(PROFILE)
COUNT = 300
ENUMERATION = "MSR 48a"  # the highest index of a field: Bochs knows fields of controls that it does not have here

pytestmark = [
    pytest.mark.skipif(shutil.which("bochs") is None, reason="Bochs is not installed (Debian: bochs, bochs-term)"),
    pytest.mark.slow,
]


def here(blob: bytes) -> str:
    return on_vtx(HERE, find_image(IMAGE).data, blob)


def there(blob: bytes) -> str:
    return on_bochs(BOCHS, HERE, find_image(IMAGE).data, blob)


def test_the_profile_is_that_of_bochs() -> None:
    def processor(report: Report[Result]) -> dict[str, int]:
        return {name: value for name, value in report.processor.items() if name != ENUMERATION}

    entries = experiment(EntryGenerator.of(HERE, 0))
    (_, ours), (_, theirs) = (compare.run(entries, [], runner) for runner in (here, there))
    assert len(ours.processor) == 19
    assert processor(ours) == processor(theirs)


def test_entries() -> None:
    generator = EntryGenerator.of(HERE, 2026)
    found = compare.compare(experiment(generator), list(islice(generator, COUNT)), here, there)
    assert sort(KNOWN, case_of(generator, MEMORY), found).unexplained == []
    assert len(found) < COUNT // 10
