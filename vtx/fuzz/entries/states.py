"""Near-valid VMCSs. Some are drawn again because of where a VM exit would lead: the harness has to survive it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from attrs import define

from vmcs import controls as c
from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.controls import CONTROLS
from vmcs.fields import BY_ENCODING, CONTROL_FIELDS, Field, Type, Width
from vmcs.region import Vmcs
from vmcs.rules import CONSISTENCY, EntryContext, EntryFails, Rule
from vtx.fuzz.drawing import Generator, State
from vtx.fuzz.entries import scene
from vtx.vmx.rule_context import rule_context
from vtx.x86.msr_table import msrs_of
from vtx.x86.profile import Profile

_VALUES: Final[Mapping[Width, tuple[int, ...]]] = {
    Width.BITS_16: (0, 1, 3, 4, 7, 8, 0xFFF8, 0xFFFF),
    Width.BITS_32: (0, 1, 2, 3, 0xFFFF, 0xF_FFFF, 0x10_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_0FFF, 0xFFFF_FFFF),
    Width.BITS_64: (0, 1, 0xFFF, 0x1000, 0xFF_FFFF_F000, 1 << 40, (1 << 52) - 0x1000, 1 << 63, (1 << 64) - 1),
    Width.NATURAL: (
        *(0, 1, 0xFFFF, 0xFFFF_FFFF, 1 << 32, (1 << 47) - 1, 1 << 47, (1 << 64) - (1 << 47)),
        *((1 << 64) - (1 << 47) - 1, 1 << 63, (1 << 64) - 1),
    ),
}

# Where a 32-bit field has formats of its own, values that hit them.
_EVENTS: Final = tuple(
    1 << 31 | error_code << 11 | kind << 8 | vector
    for kind in range(8)
    for vector in (0, 1, 2, 3, 4, 8, 13, 14, 32, 255)
    for error_code in (0, 1)
)
_RIGHTS: Final = (
    0,
    0x10000,
    0x82,
    0x8B,
    0x83,
    0x93,
    0xF3,
    0x9B,
    0xC093,
    0xC09B,
    0xA09B,
    0xE09B,
    0xC09F,
    0xC0F3,
    0xC0FB,
)
_SPECIAL: Final[Mapping[Field, tuple[int, ...]]] = {
    f.VM_ENTRY_INTERRUPTION_INFORMATION: _EVENTS,
    f.VM_ENTRY_EXCEPTION_ERROR_CODE: (0, 1, 0x7FFF, 0x8000, 0x1_0000),
    f.VM_ENTRY_INSTRUCTION_LENGTH: (0, 1, 15, 16),
    f.GUEST_ACTIVITY_STATE: (0, 1, 2, 3, 4),
    f.GUEST_INTERRUPTIBILITY_STATE: (0, 1, 2, 3, 4, 8, 9, 16, 32),
    f.GUEST_PENDING_DEBUG_EXCEPTIONS: (0, 1, 0xF, 1 << 12, 0x5000, 1 << 14, 1 << 16),
    f.GUEST_RFLAGS: (0, 2, 0x102, 0x202, 0x302, 0x2_0002, 0x2_0202, 0x8002, 0x20),
    f.GUEST_IA32_DEBUGCTL: (0, 1, 2, 3, 4, 0x40, 0x1000),
    f.TPR_THRESHOLD: (0, 1, 15, 16),
    f.CR3_TARGET_COUNT: (0, 4, 5),
    f.VM_ENTRY_MSR_LOAD_COUNT: (0, 1, 5, 6, 7),
    **{each: _RIGHTS for each in BY_ENCODING.values() if "access rights" in each.name},
}


@define(eq=False)
class EntryGenerator(Generator[Field]):
    """VMCSs for a processor of ``profile``."""

    profile: Profile
    context: EntryContext

    names = tuple(base.name for base in scene.BASES)
    by_encoding = BY_ENCODING
    rules = CONSISTENCY

    @classmethod
    def of(cls, profile: Profile, seed: int) -> EntryGenerator:
        """A generator at its beginning; ValueError if a base is not valid on this processor."""
        capabilities = Capabilities(profile.vmx_capabilities)
        bases = tuple(scene.fields_of(base, capabilities) for base in scene.BASES)
        memory = scene.memory(capabilities)

        def read(address: int, size: int) -> int:
            page = memory.get(address & ~(scene.PAGE - 1), b"")
            return int.from_bytes(page[address % scene.PAGE :][:size], "little")

        context = rule_context(Vmcs(capabilities), profile, msrs_of(profile), 0x10_0000, read)
        generator = cls(seed, bases, memory, random.Random(seed), tuple(bases[0]), profile, context)
        generator.check_bases()
        return generator

    @property
    def structure(self) -> Vmcs:
        """The VMCS that is being changed."""
        return self.context.vmcs

    def methods(self) -> Sequence[Callable[[], None]]:
        """See `Generator.methods`."""
        return (
            *(self.flip_one, self.change_one, self.change_one, self.change_some),
            *(self.toggle_controls, self.break_rule, self.break_rule, self.round_then_flip),
        )

    def values(self, each: Field) -> Sequence[int]:
        """See `Generator.values`."""
        return _SPECIAL.get(each, _VALUES[each.width])

    def sources(self, each: Field) -> Sequence[Field]:
        """See `Generator.sources`."""
        if each.type is Type.CONTROL:
            return ()
        return [other for other in self._fields if other.width is each.width]

    def toggle_controls(self) -> None:
        """Some controls that the processor has, and perhaps a field."""
        allowed = [control for control in CONTROLS if self.context.capabilities.allows(control)]
        for control in self._random.sample(allowed, self._random.randint(1, 3)):
            self.structure[CONTROL_FIELDS[control.word]] ^= control.mask
        if self._random.randrange(2):
            self.change(self._random.choice(self._fields))

    def make_applicable(self, rule: Rule) -> None:
        """Switch on the controls that the rule's condition reads, as far as the processor has them."""
        words = {CONTROL_FIELDS[word]: word for word in CONTROL_FIELDS}
        for each, mask in rule.when.reads:
            if each in words and not rule.applies(self.context):
                self.structure[each] |= mask & self.context.capabilities.allowed[words[each]].may_be_1

    def returns(self, state: State) -> bool:
        """See `Generator.returns`."""
        violation = self.violation(state)
        if violation is not None and not isinstance(violation.outcome, EntryFails):
            return True
        vmcs, base = self.structure, self.bases[state.base]
        if any(vmcs[each] != base[each] for each in _HARNESS_RELIES_ON):
            return False
        return violation is not None or _guest_exits(vmcs)


def _guest_exits(vmcs: Vmcs) -> bool:
    """Whether a guest that was entered comes back: it is active, or the preemption timer wakes it."""
    activity = vmcs[f.GUEST_ACTIVITY_STATE]
    timer = vmcs[f.PIN_BASED_CONTROLS] & c.ACTIVATE_VMX_PREEMPTION_TIMER.mask
    if activity:
        return activity != _WAIT_FOR_SIPI and bool(timer) and vmcs[f.VMX_PREEMPTION_TIMER_VALUE] < _SOON
    return True


_SOON: Final = 0x1000
_WAIT_FOR_SIPI: Final = 3
_HARNESS_RELIES_ON: Final = (f.HOST_CR3, f.HOST_RIP, f.VM_EXIT_MSR_LOAD_COUNT, f.VM_EXIT_MSR_STORE_COUNT)
