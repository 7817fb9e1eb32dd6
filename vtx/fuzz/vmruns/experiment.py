"""The comparison of VMRUNs: what is drawn, sent and read, and with whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from attrs import evolve, frozen

from vmcs.vmcb.fields import VmcbField
from vtx.fuzz.compare import Experiment
from vtx.fuzz.drawing import State
from vtx.fuzz.exchange import Format
from vtx.fuzz.on_others import on_bochs, on_qemu
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.results import NO_ANSWER, Result, differences, observed, result_of
from vtx.fuzz.vmruns.scene import canonical
from vtx.fuzz.vmruns.states import VmrunGenerator, program_of
from vtx.x86.profile import Profile, load_profile

IMAGE: Final = "vmruns"
_SIZE_SHIFT: Final = 32
_OF_THE_EXIT: Final = frozenset(("EXITCODE", "EXITINFO1", "EXITINFO2", "EXITINTINFO"))


def _place(encoding: int) -> int:
    each = scene.BY_ENCODING[encoding]
    return each.offset | each.size << _SIZE_SHIFT


FORMAT: Final = Format(b"VMCBTTES", _place, scene.WATCHED)


@frozen
class Oracle:
    """Another emulator: the ``profile`` here that is the processor there, and what runs the guest on it."""

    profile: str
    runner: Callable[[Profile, bytes, bytes], str]

    def generator(self, seed: int) -> VmrunGenerator:
        """What draws states to compare with it."""
        return VmrunGenerator.of(load_profile(self.profile), seed)


# A panic of the processor is nothing here: it goes on, and mostly well.
_BOCHS: Final = ("cpu: model=ryzen, ips=10000000, reset_on_triple_fault=0", "panic: cpu0=report")
ORACLES: Final[Mapping[str, Oracle]] = {
    "bochs": Oracle("bochs-ryzen", partial(on_bochs, _BOCHS)),
    "qemu": Oracle("qemu-epyc", partial(on_qemu, "EPYC,+svm,+npt,+vgif")),
}


def _follows(values: tuple[int, int], given: tuple[int, int]) -> bool:
    """Whether two values of a field are as different as those that it was given: untouched, or both changed alike."""
    kept = all(value in (each, canonical(each)) for value, each in zip(values, given, strict=True))
    return kept or values[0] ^ values[1] == given[0] ^ given[1]


def experiment(generator: VmrunGenerator) -> Experiment[Result]:
    """The comparison of what ``generator`` draws."""
    not_there = () if generator.profile.has("NRIPS") else (scene.NEXT_RIP,)

    def differing(state: State, ours: Result, theirs: Result, *, of: State | None = None) -> frozenset[str]:
        if ours == theirs and of is None:
            return frozenset()
        inputs = generator.fields(state)
        inputs_of_ours = inputs if of is None else generator.fields(of)
        program = program_of(state.base, inputs)
        ignored: tuple[VmcbField, ...] = not_there
        if program is not None:
            ignored += tuple(scene.REGISTERS[each] for each in program.unpredictable)
        one, other = observed(ours, inputs_of_ours, ignored), observed(theirs, inputs, ignored)
        differing = differences(one, other)
        if of is None:
            return differing
        given, given_other = (
            observed(evolve(each, changed=()), fields, ignored)
            for each, fields in ((ours, inputs_of_ours), (theirs, inputs))
        )
        return frozenset(
            name
            for name in differing
            if name in _OF_THE_EXIT
            or not _follows((one.get(name, 0), other.get(name, 0)), (given.get(name, 0), given_other.get(name, 0)))
        )

    return Experiment(generator, FORMAT, result_of, NO_ANSWER, differing)
