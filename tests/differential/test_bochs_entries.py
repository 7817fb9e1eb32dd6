"""VM entries of near-valid VMCSs on this model and on Bochs: nothing differs but what is known to."""

import shutil
from itertools import islice

import pytest

from vtx.cli.images import find_image
from vtx.fuzz import compare
from vtx.fuzz.exchange import Report
from vtx.fuzz.known import sort
from vtx.fuzz.on_bochs import on_bochs
from vtx.fuzz.on_vtx import MEMORY, on_vtx
from vtx.fuzz.states import Generator
from vtx.x86.profile import load_profile

PROFILE = load_profile("bochs-skylake-x")
COUNT = 300
ENUMERATION = "MSR 48a"  # the highest index of a field: Bochs knows fields of controls that it does not have here

pytestmark = [
    pytest.mark.skipif(shutil.which("bochs") is None, reason="Bochs is not installed (Debian: bochs, bochs-term)"),
    pytest.mark.slow,
]


def here(blob: bytes) -> str:
    return on_vtx(PROFILE, find_image("entries").data, blob)


def there(blob: bytes) -> str:
    return on_bochs(PROFILE, find_image("entries").data, blob)


def test_the_profile_is_that_of_bochs() -> None:
    def processor(report: Report) -> dict[str, int]:
        return {name: value for name, value in report.processor.items() if name != ENUMERATION}

    generator = Generator.of(PROFILE, 0)
    (_, ours), (_, theirs) = (compare.run(generator, [], runner) for runner in (here, there))
    assert len(ours.processor) == 19
    assert processor(ours) == processor(theirs)


def test_entries() -> None:
    generator = Generator.of(PROFILE, 2026)
    states = list(islice(generator, COUNT))
    found = compare.compare(generator, states, here, there)
    assert sort(generator, found, MEMORY).unexplained == []
    assert len(found) < COUNT // 10
