"""Where this model and the others are known to differ: each class with who is right, and where the manual says so.

``docs/interpretations.md`` tells people the same under the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attrs import frozen

from vmcs.vmcb.fields import BY_NAME, VmcbField
from vtx.fuzz.classes import Known
from vtx.fuzz.compare import Disagreement
from vtx.fuzz.vmruns.results import Result
from vtx.fuzz.vmruns.states import VmrunGenerator


@frozen
class Case:
    """A disagreement and the VMCB it is about: ``case["RIP"]`` is what the field held at VMRUN."""

    ours: Result
    theirs: Result
    rules: tuple[str, ...]
    fields: Mapping[VmcbField, int]

    def __getitem__(self, name: str) -> int:
        return self.fields[BY_NAME[name]]


KNOWN: Final[Mapping[str, tuple[Known[Case], ...]]] = {"bochs": (), "qemu": ()}


def case_of(generator: VmrunGenerator) -> Callable[[Disagreement[Result]], Case]:
    """What the classes look at in a disagreement."""

    def case(found: Disagreement[Result]) -> Case:
        return Case(found.ours, found.theirs, found.rules, generator.fields(found.state))

    return case
