"""Near-valid VMCSs: each a valid one with a few changes, seeded, and the same for the same seed on every computer.

Most changes are small; what they may change and to what follows from the tables of fields, controls and rules. Some are
drawn again because of where a VM exit would go: to the harness, which has to survive it, or never.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from attrs import define, frozen

from vmcs import controls as c
from vmcs import fields as f
from vmcs.bits import bit_numbers
from vmcs.capabilities import Capabilities
from vmcs.controls import CONTROLS
from vmcs.fields import BY_ENCODING, CONTROL_FIELDS, Field, Type, Width
from vmcs.region import Vmcs
from vmcs.rules import CONSISTENCY, EntryContext, EntryFails, Rule, Violation, repair
from vtx.fuzz import scene
from vtx.vmx.rule_context import rule_context
from vtx.x86.msr_table import msrs_of
from vtx.x86.profile import Profile

Deltas = tuple[tuple[int, int], ...]


@frozen
class State:
    """A VMCS: the number of a base in `scene.BASES`, and (encoding, value) of what differs from it."""

    base: int
    deltas: Deltas

    def __str__(self) -> str:
        changes = ", ".join(f"{BY_ENCODING[encoding].name} = {value:#x}" for encoding, value in self.deltas)
        return f"{scene.BASES[self.base].name}: {changes or 'as it is'}"


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


@define
class Generator:
    """Makes states for a processor of ``profile``; ``seed`` decides all of them."""

    profile: Profile
    seed: int
    _random: random.Random
    _bases: tuple[dict[Field, int], ...]
    _fields: tuple[Field, ...]
    _context: EntryContext
    _memory: dict[int, bytes]

    @classmethod
    def of(cls, profile: Profile, seed: int) -> Generator:
        """A generator at its beginning; ValueError if a base is not valid on this processor."""
        capabilities = Capabilities(profile.vmx_capabilities)
        bases = tuple(scene.fields_of(base, capabilities) for base in scene.BASES)
        memory = scene.memory(capabilities)

        def read(address: int, size: int) -> int:
            page = memory.get(address & ~(scene.PAGE - 1), b"")
            return int.from_bytes(page[address % scene.PAGE :][:size], "little")

        vmcs = Vmcs(capabilities)
        context = rule_context(vmcs, profile, msrs_of(profile), 0x10_0000, read)
        generator = cls(profile, seed, random.Random(seed), bases, tuple(bases[0]), context, memory)
        for number, base in enumerate(scene.BASES):
            if violation := generator.violation(State(number, ())):
                raise ValueError(f"base {base.name!r}: {violation}")
        return generator

    @property
    def capabilities(self) -> Capabilities:
        """What the processor's VMX can do."""
        return self._context.capabilities

    @property
    def bases(self) -> tuple[dict[Field, int], ...]:
        """The fields of each base, in the order of `scene.BASES`."""
        return self._bases

    @property
    def memory(self) -> Mapping[int, bytes]:
        """Pages by physical address that the states point to."""
        return self._memory

    def __iter__(self) -> Iterator[State]:
        """The states, without end; the bases as they are come first."""
        yield from (State(number, ()) for number in range(len(self._bases)))
        while True:
            state = self._draw()
            if self._returns(state):
                yield state

    def fields(self, state: State) -> dict[Field, int]:
        """Every field of a state."""
        return self._bases[state.base] | {BY_ENCODING[encoding]: value for encoding, value in state.deltas}

    def violation(self, state: State) -> Violation | None:
        """The first rule that ``state`` breaks in this model; None if it enters."""
        self._load(state)
        return CONSISTENCY.check(self._context)

    def violations(self, state: State) -> list[Violation]:
        """Every rule that it breaks."""
        self._load(state)
        return CONSISTENCY.explain(self._context)

    def _load(self, state: State) -> None:
        vmcs = self._context.vmcs
        for each, value in self._bases[state.base].items():
            vmcs[each] = value
        for encoding, value in state.deltas:
            vmcs[BY_ENCODING[encoding]] = value

    # Drawing.

    def _draw(self) -> State:
        base = self._random.randrange(len(self._bases))
        self._load(State(base, ()))
        self._random.choice(_METHODS)(self)
        return self._difference(base)

    def _difference(self, base: int) -> State:
        vmcs = self._context.vmcs
        changed = ((each.encoding, vmcs[each]) for each, value in self._bases[base].items() if vmcs[each] != value)
        return State(base, tuple(changed))

    def _flip(self, each: Field, mask: int = -1) -> None:
        vmcs = self._context.vmcs
        vmcs[each] ^= 1 << self._random.choice(list(bit_numbers(mask & each.mask)))

    def _change(self, each: Field) -> None:
        """One field: a flipped bit, a value that means something, or what another field holds."""
        vmcs, choose = self._context.vmcs, self._random
        kind = choose.randrange(4)
        if kind == 0:
            self._flip(each)
        elif kind == 3 and each.type is not Type.CONTROL:
            vmcs[each] = vmcs[choose.choice([other for other in self._fields if other.width is each.width])]
        else:
            vmcs[each] = choose.choice(_SPECIAL.get(each, _VALUES[each.width]))

    def flip_one(self) -> None:
        """One bit."""
        self._flip(self._random.choice(self._fields))

    def change_one(self) -> None:
        """One field."""
        self._change(self._random.choice(self._fields))

    def change_some(self) -> None:
        """Two to four fields."""
        for _ in range(self._random.randint(2, 4)):
            self._change(self._random.choice(self._fields))

    def toggle_controls(self) -> None:
        """Some controls that the processor has, and perhaps a field."""
        allowed = [control for control in CONTROLS if self.capabilities.allows(control)]
        for control in self._random.sample(allowed, self._random.randint(1, 3)):
            self._context.vmcs[CONTROL_FIELDS[control.word]] ^= control.mask
        if self._random.randrange(2):
            self._change(self._random.choice(self._fields))

    def break_rule(self) -> None:
        """Fields that one rule reads, until it does not hold."""
        rule = self._random.choice(CONSISTENCY.rules)
        reads = [(each, mask) for each, mask in rule.reads if self.capabilities.has(each) and not each.read_only]
        self._make_applicable(rule)
        for _ in range(_TRIES if reads else 0):
            if not rule.holds(self._context):
                return
            each, mask = self._random.choice(reads)
            if self._random.randrange(2):
                self._flip(each, mask)
            else:
                self._change(each)

    def _make_applicable(self, rule: Rule) -> None:
        """Switch on the controls that the rule's condition reads, as far as the processor has them."""
        words = {CONTROL_FIELDS[word]: word for word in CONTROL_FIELDS}
        for each, mask in rule.when.reads:
            if each in words and not rule.applies(self._context):
                self._context.vmcs[each] |= mask & self.capabilities.allowed[words[each]].may_be_1

    def round_then_flip(self) -> None:
        """Random fields made valid again, then, or not, one flipped bit."""
        vmcs = self._context.vmcs
        for each in self._random.sample(self._fields, self._random.randint(3, 10)):
            vmcs[each] = self._random.getrandbits(each.bits)
        try:
            repair(self._context)
        except ValueError:
            return
        if self._random.randrange(3):
            self._flip(self._random.choice(self._fields))

    # What must not be.

    def _returns(self, state: State) -> bool:
        """Whether the harness can go on after ``state``, as far as the rules can tell."""
        violation = self.violation(state)
        if violation is not None and not isinstance(violation.outcome, EntryFails):
            return True
        vmcs, base = self._context.vmcs, self._bases[state.base]
        if any(vmcs[each] != base[each] for each in _HARNESS_RELIES_ON):
            return False
        return violation is not None or self._guest_exits(vmcs)

    def _guest_exits(self, vmcs: Vmcs) -> bool:
        """Whether a guest that was entered comes back: it is active, or the preemption timer wakes it."""
        activity = vmcs[f.GUEST_ACTIVITY_STATE]
        timer = vmcs[f.PIN_BASED_CONTROLS] & c.ACTIVATE_VMX_PREEMPTION_TIMER.mask
        if activity:
            return activity != _WAIT_FOR_SIPI and bool(timer) and vmcs[f.VMX_PREEMPTION_TIMER_VALUE] < _SOON
        return True


_TRIES: Final = 12
_SOON: Final = 0x1000
_WAIT_FOR_SIPI: Final = 3
_HARNESS_RELIES_ON: Final = (f.HOST_CR3, f.HOST_RIP, f.VM_EXIT_MSR_LOAD_COUNT, f.VM_EXIT_MSR_STORE_COUNT)

# How often each way of drawing comes up is how often it stands here.
_METHODS: Final[tuple[Callable[[Generator], None], ...]] = (
    Generator.flip_one,
    Generator.change_one,
    Generator.change_one,
    Generator.change_some,
    Generator.toggle_controls,
    Generator.break_rule,
    Generator.break_rule,
    Generator.round_then_flip,
)
