"""The comparison of VM entries: what is drawn, sent and read, with whom, and what is known to differ."""

from __future__ import annotations

from typing import Final

from vtx.fuzz.compare import Experiment
from vtx.fuzz.drawing import State
from vtx.fuzz.entries.results import NO_ANSWER, Result, result_of
from vtx.fuzz.entries.states import EntryGenerator
from vtx.fuzz.exchange import Format

IMAGE: Final = "entries"
PROFILE: Final = "bochs-skylake-x"
BOCHS: Final = ("cpu: model=corei7_skylake_x, ips=10000000",)
FORMAT: Final = Format(b"VMCSTTES", lambda encoding: encoding)


def experiment(generator: EntryGenerator) -> Experiment[Result]:
    """The comparison of what ``generator`` draws."""
    return Experiment(generator, FORMAT, result_of, NO_ANSWER, _differences)


def _differences(state: State, ours: Result, theirs: Result, *, of: State | None = None) -> frozenset[str]:
    return frozenset() if ours == theirs else frozenset(("result",))
