"""The comparison of VMRUNs: what is drawn, sent and read, and with whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from attrs import frozen

from vmcs.vmcb.fields import Vmcb, VmcbField
from vtx.fuzz.compare import Experiment
from vtx.fuzz.drawing import State
from vtx.fuzz.exchange import Format
from vtx.fuzz.on_others import on_bochs, on_qemu
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.results import NO_ANSWER, Result, differences, observed, result_of
from vtx.fuzz.vmruns.states import VmrunGenerator, program_of
from vtx.x86.profile import Profile, load_profile
from vtx.x86.state import Rflags

IMAGE: Final = "vmruns"
_SIZE_SHIFT: Final = 32


def _place(encoding: int) -> int:
    each = scene.BY_ENCODING[encoding]
    return each.offset | each.size << _SIZE_SHIFT


FORMAT: Final = Format(b"VMCBTTES", _place, scene.WATCHED)


@frozen
class Oracle:
    """Another emulator: the ``profile`` here that is the processor there, and what runs the guest on it.

    ``survives`` tells whether it goes on after a guest with such a control block.
    """

    profile: str
    runner: Callable[[Profile, bytes, bytes], str]
    survives: Callable[[Vmcb], bool] = lambda block: True

    def generator(self, seed: int) -> VmrunGenerator:
        """What draws states to compare with it."""
        return VmrunGenerator.of(load_profile(self.profile), seed, self.survives)


def _not_virtual_8086(block: Vmcb) -> bool:
    """Bochs panics when it leaves a virtual-8086 guest for a host in long mode."""
    return not block[scene.RFLAGS] & Rflags.VM


ORACLES: Final[Mapping[str, Oracle]] = {
    "bochs": Oracle("bochs-ryzen", partial(on_bochs, "ryzen"), _not_virtual_8086),
    "qemu": Oracle("qemu-epyc", partial(on_qemu, "EPYC,+svm,+npt,+vgif")),
}


def experiment(generator: VmrunGenerator) -> Experiment[Result]:
    """The comparison of what ``generator`` draws."""
    not_there = () if generator.profile.has("NRIPS") else (scene.NEXT_RIP,)

    def differing(state: State, ours: Result, theirs: Result) -> frozenset[str]:
        if ours == theirs:
            return frozenset()
        inputs = generator.fields(state)
        program = program_of(state.base, inputs[scene.RIP])
        ignored: tuple[VmcbField, ...] = not_there
        if program is not None:
            ignored += tuple(scene.REGISTERS[each] for each in program.unpredictable)
        one, other = (observed(each, inputs, ignored) for each in (ours, theirs))
        return differences(one, other)

    return Experiment(generator, FORMAT, result_of, NO_ANSWER, differing)
