"""What classes of differences look at, and shapes that many of them have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final

from attrs import field, frozen
from iced_x86 import Decoder, RflagsBits

from vmcs.refs import Reference
from vmcs.vmcb import layouts
from vmcs.vmcb.fields import BY_NAME, VmcbField
from vmcs.vmcb.intercepts import Exit
from vtx.fuzz.classes import Known
from vtx.fuzz.compare import Disagreement
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.programs import Program
from vtx.fuzz.vmruns.results import Result, observed
from vtx.fuzz.vmruns.states import VmrunGenerator, program_of
from vtx.x86.state import Cr0, Efer, Rflags

_LONG: Final = 1 << 9  # CS.L among the attributes
_EVENT: Final = 0x8000_07FF
_DEFAULT_SIZE: Final = 1 << 10
_FLAGS: Final = {
    RflagsBits.OF: Rflags.OF,
    RflagsBits.SF: Rflags.SF,
    RflagsBits.ZF: Rflags.ZF,
    RflagsBits.AF: Rflags.AF,
    RflagsBits.CF: Rflags.CF,
    RflagsBits.PF: Rflags.PF,
}
Seen = Mapping[str, int]


@frozen
class Case:
    """A disagreement and the VMCB it is about: ``case["RIP"]`` is what the field held at VMRUN.

    ``one`` and ``other`` are what the model and the other processor showed, by name; ``differing`` are the names of
    what differs. ``base`` is the name of the VMCB that the state was made from, ``program`` what the guest was to
    execute, None if it began elsewhere.
    """

    ours: Result
    theirs: Result
    rules: tuple[str, ...]
    differing: frozenset[str]
    fields: Mapping[VmcbField, int]
    base: str
    program: Program | None
    one: Seen = field(init=False)
    other: Seen = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "one", observed(self.ours, self.fields, ()))
        object.__setattr__(self, "other", observed(self.theirs, self.fields, ()))

    def __getitem__(self, name: str) -> int:
        return self.fields[BY_NAME[name]]

    @property
    def long_mode(self) -> bool:
        """Whether the guest began in long mode."""
        return bool(self["EFER"] & Efer.LME and self["CR0"] & Cr0.PG)

    @property
    def in_64_bit_mode(self) -> bool:
        """Whether the guest began in 64-bit mode."""
        return self.long_mode and bool(self["CS attributes"] & _LONG)

    @property
    def virtual_8086(self) -> bool:
        """Whether the guest began in virtual-8086 mode."""
        return not self.long_mode and bool(self["RFLAGS"] & Rflags.VM and self["CR0"] & Cr0.PE)

    @property
    def real(self) -> bool:
        """Whether the guest began in real mode."""
        return not self["CR0"] & Cr0.PE

    @property
    def code(self) -> bytes:
        """The code that the guest was to execute first, where that is among the programs; else nothing."""
        code = scene.memory()[scene.CODE] + scene.memory()[scene.CODE + scene.PAGE]
        linear = self["RIP"] + (0 if self.in_64_bit_mode else self["CS base"])
        offset = linear - (scene.LOW if self.virtual_8086 else scene.CODE)
        return code[offset:] if 0 <= offset < len(code) else b""

    @property
    def undefined_flags(self) -> int:
        """The bits of RFLAGS that the guest's first instruction leaves undefined."""
        wide = self["CS attributes"] & _DEFAULT_SIZE and not self.virtual_8086
        instruction = Decoder(64 if self.in_64_bit_mode else 32 if wide else 16, self.code).decode()
        undefined = instruction.rflags_undefined
        return sum(bit for flag, bit in _FLAGS.items() if undefined & flag)

    @property
    def invalid(self) -> tuple[bool, bool]:
        """Whether each of the two, the model first, had VMEXIT_INVALID."""
        return self.ours.is_invalid, self.theirs.is_invalid

    @property
    def exits(self) -> tuple[int, int]:
        """The two exit codes, the model's first."""
        return self.ours.code, self.theirs.code

    def runs(self, *names: str) -> bool:
        """Whether the guest was to execute a program whose name begins with one of ``names``."""
        return self.program is not None and self.program.name.startswith(names)

    def intercepts(self, number: int) -> bool:
        """Whether intercept ``number`` was on."""
        return bool(self.fields[scene.INTERCEPTS[number >> 5]] >> (number & 31) & 1)

    def exception(self, vector: int) -> tuple[bool, bool]:
        """Whether each of the two had the exception ``vector``: as an exit, or by getting to its handler."""
        code = Exit.EXCEPTION_0 + vector
        handler = (scene.HANDLERS & 0xFFF) + vector * scene.HANDLER_SIZE
        return self._had(self.ours, self.one, code, handler), self._had(self.theirs, self.other, code, handler)

    def _had(self, result: Result, seen: Seen, code: int, handler: int) -> bool:
        return result.code == code or (result.code == Exit.VMMCALL and seen.get("RIP", 0) & 0xFFF == handler)

    def raised(self, vector: int) -> tuple[bool, bool]:
        """Whether each of the two had the exception ``vector``, perhaps with another fault in its delivery."""
        ours, theirs = self.exception(vector)
        event = layouts.EVENT_VALID | layouts.InjectedType.EXCEPTION << layouts.EVENT_TYPE_SHIFT | vector
        interrupted = (each.interrupted & _EVENT == event for each in (self.ours, self.theirs))
        return ours or next(interrupted), theirs or next(interrupted)

    def where(self, names: Collection[str], alike: Callable[[int, int], bool]) -> frozenset[str]:
        """Which of ``names`` differ such that ``alike`` says so of our value and theirs."""
        return frozenset(
            name for name in self.differing.intersection(names) if alike(self.one.get(name, 0), self.other.get(name, 0))
        )

    @property
    def memory(self) -> frozenset[str]:
        """The names of words in memory that differ."""
        return frozenset(name for name in self.differing if name.startswith("["))


def case_of(generator: VmrunGenerator) -> Callable[[Disagreement[Result]], Case]:
    """What the classes look at in a disagreement."""

    def case(found: Disagreement[Result]) -> Case:
        fields, base = generator.fields(found.state), found.state.base
        program = program_of(base, fields)
        return Case(found.ours, found.theirs, found.rules, found.differing, fields, scene.BASES[base].name, program)

    return case


# Shapes.


def all_of_it(identity: str, verdict: str, ref: Reference | None, applies: Callable[[Case], bool]) -> Known[Case]:
    """A class of guests that went different ways, so that anything may differ."""
    return Known(identity, verdict, ref, lambda case: case.differing if applies(case) else ())


def in_fields(
    identity: str,
    verdict: str,
    ref: Reference | None,
    names: Collection[str],
    alike: Callable[[int, int], bool],
    applies: Callable[[Case], bool] = lambda case: True,
) -> Known[Case]:
    """A class about some fields, whose two values are ``alike``."""
    return Known(identity, verdict, ref, lambda case: case.where(names, alike) if applies(case) else ())


def overlooks(identity: str, ref: Reference, every: Collection[str], *rules: str, verdict: str = "vtx") -> Known[Case]:
    """A class of VMCBs that we refuse for one of ``rules``, which the other does not check; ``every`` are all such."""

    def explains(case: Case) -> Collection[str]:
        overlooked = case.invalid == (True, False) and set(rules) & set(case.rules) and set(case.rules) <= set(every)
        return case.differing if overlooked else ()

    return Known(identity, verdict, ref, explains, rules)
