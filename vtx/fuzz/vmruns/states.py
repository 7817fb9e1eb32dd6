"""Near-valid VMCBs, each with a program for its guest. Some are drawn again because of what the guest might do."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from attrs import define

from vmcs.vmcb import layouts
from vmcs.vmcb.fields import BY_NAME, SAVE_AREA, Vmcb, VmcbField
from vmcs.vmcb.intercepts import LAST_INTERCEPT, Exit
from vmcs.vmcb.model import Rule, VmrunContext
from vmcs.vmcb.rules import RULES
from vtx.fuzz.drawing import Generator, State
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.programs import PROGRAMS, SAFE_MSRS, SAFE_PORTS, SLOT, Program
from vtx.svm.vmrun import context_of
from vtx.x86.msr_table import IA32_EFER, msrs_of
from vtx.x86.profile import Profile
from vtx.x86.state import MASK32, MASK64, Cr0, Efer, Gpr

_VALUES: Final[Mapping[int, tuple[int, ...]]] = {
    1: (0, 1, 3, 7, 0xFF),
    2: (0, 1, 3, 8, 0xFFF8, 0xFFFF),
    4: (0, 1, 2, 0xFFFF, 0xF_FFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF),
    8: (
        *(0, 1, 0xFFF, 0x1000, 0xFFFF, 0xFFFF_FFFF, 1 << 32, 0xFF_FFFF_F000, 1 << 40, (1 << 48) - 0x1000),
        *((1 << 52) - 0x1000, (1 << 47) - 1, 1 << 47, (1 << 64) - (1 << 47), 1 << 63, (1 << 64) - 1),
    ),
}
_EVENTS: Final = tuple(
    error << 32 | layouts.EVENT_VALID | has_error << 11 | kind << layouts.EVENT_TYPE_SHIFT | vector
    for kind in range(8)
    for vector in (0, 1, 2, 3, 4, 8, 9, 13, 14, 31, 32, 255)
    for has_error, error in ((0, 0), (1, 0), (1, 0xFFF8))
)
_ATTRIBUTES: Final = (
    0,
    0x82,
    0x8B,
    0x83,
    0x93,
    0xF3,
    0x9B,
    0xC93,
    0xC9B,
    0xA9B,
    0xE9B,
    0xC9F,
    0xCF3,
    0xCFB,
    0x13,
    0x493,
)
_SPECIAL: Final[Mapping[VmcbField, tuple[int, ...]]] = {
    scene.EVENTINJ: _EVENTS,
    scene.RFLAGS: (0, 2, 0x102, 0x202, 0x302, 0x2_0002, 0x2_0202, 0x1_0002, 0x3002, 0x4002, 0x1_0102, 0x28_0002),
    scene.INTERRUPT_STATE: (0, 1, 2, 3),
    scene.CPL: (0, 1, 2, 3, 4),
    scene.NESTED_CONTROL: (0, 1, 2, 8, 9),
    BY_NAME["guest ASID"]: (0, 1, 2, 0xFFFF, 0x1_0000, 0xFFFF_FFFF),
    BY_NAME["virtualization of LBR, VMLOAD and VMSAVE"]: (0, 1, 2, 3, 4),
    BY_NAME["G_PAT"]: (0, 0x0007_0406_0007_0406, 2, 3 << 8, 0x0606_0606_0606_0606, 8 << 56),
    BY_NAME["DR7"]: (0, 0x400, 0x401, 0xFFFF_FFFF, 0x2400, 1 << 32, 0xD0402),
    **{each: _ATTRIBUTES for each in scene.WRITTEN if each.name.endswith("attributes")},
}
_ALL_EXCEPTIONS: Final = 0xFFFF_FFFF
_EXCEPTIONS: Final = scene.INTERCEPTS[Exit.EXCEPTION_0 >> 5]
_CS_BASE, _CS_LIMIT = BY_NAME["CS base"], BY_NAME["CS limit"]
_CS_ATTRIBUTES, _SS_ATTRIBUTES = BY_NAME["CS attributes"], BY_NAME["SS attributes"]
_DPL: Final = 3 << 5
_LONG: Final = 1 << 9
_WHOLE_SEGMENT: Final = 0xFFFF
_PLACES: Final = (
    *(_CS_BASE, BY_NAME["CS attributes"], BY_NAME["SS base"], BY_NAME["SS attributes"], BY_NAME["IDTR base"]),
    *(scene.RSP, scene.CR0),
)
_CODE_SIZE: Final = scene.CODE_PAGES * scene.PAGE


@define(eq=False)
class VmrunGenerator(Generator[VmcbField]):
    """VMCBs for a processor of ``profile``."""

    profile: Profile
    context: VmrunContext

    names = tuple(base.name for base in scene.BASES)
    by_encoding = scene.BY_ENCODING
    rules = RULES

    @classmethod
    def of(cls, profile: Profile, seed: int) -> VmrunGenerator:
        """A generator at its beginning; ValueError if a base is not valid on this processor."""
        bases = tuple(scene.fields_of(base) for base in scene.BASES)
        block = Vmcb([0] * scene.ENCODINGS)
        context = context_of(profile, msrs_of(profile)[IA32_EFER], block, host_paging=True)
        generator = cls(seed, bases, scene.memory(), random.Random(seed), scene.CHANGED, profile, context)
        generator.check_bases()
        return generator

    @property
    def structure(self) -> Vmcb:
        """The control block that is being changed, and the registers after it."""
        return self.context.vmcb

    def methods(self) -> Sequence[Callable[[], None]]:
        """See `Generator.methods`."""
        return (
            *(self.nothing, self.flip_one, self.change_one, self.change_some, self.toggle_intercepts),
            *(self.break_rule, self.break_rule, self.break_rule, self.round_then_flip),
        )

    def values(self, each: VmcbField) -> Sequence[int]:
        """See `Generator.values`."""
        return _SPECIAL.get(each, _VALUES[each.size])

    def sources(self, each: VmcbField) -> Sequence[VmcbField]:
        """See `Generator.sources`."""
        return [other for other in self._fields if other.size == each.size]

    # Drawing.

    def prepare(self) -> None:
        """A program for the guest, and which of its intercepts and of those of exceptions are on."""
        program = self._random.choice(PROGRAMS)
        self._run(PROGRAMS.index(program))
        if self._random.randrange(2):
            for number in program.intercepts:
                self._toggle(number)
        exceptions = self._random.choice((0, 0, _ALL_EXCEPTIONS, self._random.getrandbits(32)))
        self.structure[_EXCEPTIONS] ^= exceptions

    def _run(self, number: int) -> None:
        program, block = PROGRAMS[number], self.structure
        origin = block[scene.RIP]
        block[scene.RIP] = origin + number * SLOT
        for register, value in program.registers.items():
            block[scene.REGISTERS[register]] = value
        if program.memory is not None:
            for register in (Gpr.RBX, Gpr.RSI, Gpr.RDI):
                block[scene.REGISTERS[register]] = origin + program.memory

    def _toggle(self, number: int) -> None:
        self.structure[scene.INTERCEPTS[number >> 5]] ^= 1 << (number & 31)

    def make_applicable(self, rule: Rule) -> None:
        """Switch on what the rule's condition reads, where that is in the control area."""
        for each, mask in rule.when.reads:
            if each.offset < SAVE_AREA and not rule.applies(self.context):
                self.structure[each] |= mask

    def nothing(self) -> None:
        """The program alone."""

    def toggle_intercepts(self) -> None:
        """Some intercepts, and perhaps a field."""
        for _ in range(self._random.randint(1, 40)):
            self._toggle(self._random.randrange(LAST_INTERCEPT))
        if self._random.randrange(2):
            self.change(self._random.choice(self._fields))

    # What must not be.

    def returns(self, state: State) -> bool:
        """See `Generator.returns`. Others may run a guest that is not valid here."""
        self.load(state)
        block = self.structure
        for each, mask in scene.ALWAYS_INTERCEPTED.items():
            if block[each] & mask != mask:
                return False
        if not _is_paged(block) and not self._stays(state.base):
            return False
        return _gets_on(block) and _does_no_harm(block)

    def may_be_tried(self, state: State) -> bool:
        """See `Generator.may_be_tried`. What privilege level the stack segment has makes a guest go nowhere else."""
        fields = self.fields(state)
        attributes = fields[_SS_ATTRIBUTES] & ~_DPL | self.bases[state.base][_SS_ATTRIBUTES] & _DPL
        return self.returns(self.changed(state, {_SS_ATTRIBUTES: attributes}))

    def _stays(self, base: int) -> bool:
        """Whether a guest that can reach all memory stays where it belongs: it has code and stack of its base."""
        block, fields = self.structure, self.bases[base]
        linear = block[_CS_BASE] + block[scene.RIP] & MASK64
        unchanged = all(block[each] == fields[each] for each in _PLACES)
        return unchanged and scene.CODE <= linear < scene.CODE + _CODE_SIZE


def _is_paged(block: Vmcb) -> bool:
    """Whether page tables, the guest's or its hypervisor's, are between the guest and memory."""
    return bool(block[scene.CR0] & Cr0.PG or block[scene.NESTED_CONTROL] & layouts.NP_ENABLE)


def _gets_on(block: Vmcb) -> bool:
    """Whether handlers are within CS where the guest does not load another limit: else one fault follows the other."""
    return bool(block[scene.CR0] & Cr0.PE) or block[_CS_LIMIT] >= _WHOLE_SEGMENT


def _does_no_harm(block: Vmcb) -> bool:
    """Whether ports and MSRs that matter to the harness are out of reach."""
    port, index = block[scene.REGISTERS[Gpr.RDX]] & 0xFFFF, block[scene.REGISTERS[Gpr.RCX]] & 0xFFFF_FFFF
    checks = (
        (Exit.IOIO, "IOPM_BASE_PA", scene.IOPM, port in SAFE_PORTS),
        (Exit.MSR, "MSRPM_BASE_PA", scene.MSRPM, index in SAFE_MSRS),
    )
    return all(
        safe
        or (
            block[scene.INTERCEPTS[number >> 5]] >> (number & 31) & 1
            and block[BY_NAME[name]] & ~(scene.PAGE - 1) == place
        )
        for number, name, place, safe in checks
    )


def program_of(base: int, fields: Mapping[VmcbField, int]) -> Program | None:
    """The program that the guest of a state begins with, if it begins with one."""
    long_mode = fields[scene.EFER] & Efer.LME and fields[scene.CR0] & Cr0.PG
    rip = fields[scene.RIP] if long_mode and fields[_CS_ATTRIBUTES] & _LONG else fields[scene.RIP] & MASK32
    number, offset = divmod(rip - scene.BASES[base].origin, SLOT)
    return PROGRAMS[number] if not offset and 0 <= number < len(PROGRAMS) else None
