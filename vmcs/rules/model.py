"""What a VM-entry rule is, what it may look at, and what its violation says.

A rule is a record: an id that never changes, a sentence, a citation, the condition under which it applies, the demand
it makes, and what VM entry does when the demand is not met. Rules are pure: they read an `EntryContext` and nothing
else. Only `Rule.repair` writes, and (outside the basic stage) only to the VMCS.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Final

from attrs import define, field, frozen

from vmcs.bits import MASK64, describe_bits, mask
from vmcs.capabilities import Capabilities
from vmcs.exits import BY_NUMBER, InstructionError, Reason
from vmcs.fields import Field
from vmcs.refs import Reference
from vmcs.region import Vmcs


class Stage(enum.Enum):
    """The stages of VM entry, in the order in which they are carried out."""

    BASIC = "basic checks"
    CONTROLS = "checks on VMX controls"
    HOST = "checks on the host-state area"
    GUEST = "checks on the guest-state area"
    MSR_LOAD = "loading MSRs"


def _no_memory(address: int, size: int) -> int:
    return mask(8 * size)


def _no_fault(index: int, value: int) -> bool:
    return False


@define(slots=True, eq=False)
class EntryContext:
    """Everything VM entry looks at besides the VMCS itself.

    The ``*_reserved`` masks are the bits WRMSR would refuse in the MSR; their defaults fit a processor with four
    general-purpose and three fixed-function performance counters, and without the features newer than that.
    ``read_physical(address, size)`` gives the little-endian value of 4 or 8 bytes; ``wrmsr_faults(index, value)``
    tells whether WRMSR at privilege level 0 would raise an exception.
    """

    vmcs: Vmcs
    capabilities: Capabilities
    physical_address_width: int = 46
    linear_address_width: int = 48  # 57 on processors with 5-level paging, whatever CR4.LA57 says
    host_long_mode: bool = True  # IA32_EFER.LMA when the instruction executes
    in_smm: bool = False
    vmcs_address: int = 0
    vmcs_current: bool = True  # whether there is a current VMCS
    launching: bool = True  # VMLAUNCH, not VMRESUME
    blocked_by_mov_ss: bool = False
    tracing: bool = False  # IA32_RTIT_CTL.TraceEn when the instruction executes
    read_physical: Callable[[int, int], int] = _no_memory
    wrmsr_faults: Callable[[int, int], bool] = _no_fault
    efer_reserved: int = MASK64 & ~0xD01
    debugctl_reserved: int = MASK64 & ~0x5FC3
    perf_global_ctrl_reserved: int = MASK64 & ~0x7_0000_000F
    rtit_ctl_reserved: int = MASK64
    lbr_ctl_reserved: int = MASK64
    spec_ctrl_reserved: int = MASK64 & ~0x7
    s_cet_reserved: int = 0x3C0
    linear_address_masking: bool = False  # CR3 bits 62:61
    sgx: bool = False
    rtm: bool = False
    bus_lock_debug: bool = False
    nmi_injection_refused_by_sti: bool = True  # implementation-specific, says the manual
    values: dict[int, int] = field(init=False, repr=False)
    beyond_width: int = field(init=False, repr=False)
    beyond_structure_width: int = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.values = self.vmcs.values
        self.beyond_width = MASK64 & ~mask(self.physical_address_width)
        # Addresses of VMX structures are held to 32 bits by processors that say so; page-table addresses are not.
        self.beyond_structure_width = self.beyond_width
        if self.capabilities.addresses_limited_to_32_bits:
            self.beyond_structure_width |= MASK64 & ~mask(32)

    def read(self, address: int, size: int) -> int:
        """Physical memory, ``size`` bytes; all ones beyond the physical-address width, where nothing can answer."""
        if (address + size - 1) >> self.physical_address_width:
            return mask(8 * size)
        return self.read_physical(address, size)


Test = Callable[[EntryContext], bool]
Reads = tuple[tuple[Field, int], ...]  # per field, a mask of the bits that matter
FaultyBits = tuple[tuple[Field, int], ...]  # per field, a mask of the bits that are at fault


def _reads(items: Iterable[Field | tuple[Field, int]]) -> Reads:
    """Which bits of which fields are read; a bare field stands for all its bits."""
    bits: dict[Field, int] = {}
    for item in items:
        vmcs_field, read = item if isinstance(item, tuple) else (item, item.mask)
        bits[vmcs_field] = bits.get(vmcs_field, 0) | read
    return tuple(bits.items())


@frozen(eq=False)
class Condition:
    """When a rule applies. ``test`` is None for a condition that always holds; ``text`` follows the word "if"."""

    text: str = ""
    reads: Reads = field(default=(), converter=_reads)
    test: Test | None = None
    volatile: bool = False  # whether it reads more of the context than VMCS fields


@frozen(eq=False)
class Demand:
    """What a rule demands of the fields it reads.

    ``faulty`` names the bits at fault when it does not hold. ``repair`` changes the VMCS such that it does, or such
    that the rule no longer applies; what else that breaks is for the other rules to say. ``legal`` says what this
    processor accepts, where the rule's sentence leaves that open.
    """

    reads: Reads = field(converter=_reads)
    holds: Test
    repair: Callable[[EntryContext], None]
    faulty: Callable[[EntryContext], FaultyBits] = lambda context: ()
    volatile: bool = False
    legal: Callable[[EntryContext], str] = lambda context: ""


@frozen
class FailInvalid:
    """VMfailInvalid: there is no VMCS to hold an error number."""

    def __str__(self) -> str:
        return "VMfailInvalid"


@frozen
class FailValid:
    """VMfailValid with a VM-instruction error."""

    error: InstructionError

    def __str__(self) -> str:
        return f"VMfailValid({self.error.value})"


@frozen
class EntryFails:
    """The VM entry fails as a VM exit; bit 31 of the exit reason will be set."""

    reason: Reason
    qualification: int = 0

    def __str__(self) -> str:
        return f"{BY_NUMBER[self.reason].name}, exit qualification {self.qualification}"


Outcome = FailInvalid | FailValid | EntryFails

ALWAYS: Final = Condition()


@frozen(eq=False)
class Rule:
    """One check of VM entry.

    ``id`` is stage, dot, name; it is stable, so that tests, coverage and users can refer to it. ``sentence`` states
    what must hold, in our words, without the condition.
    """

    id: str
    sentence: str
    demand: Demand = field(repr=False)
    ref: Reference = field(repr=False)
    outcome: Outcome = field(repr=False)
    when: Condition = field(default=ALWAYS, repr=False)
    reads: Reads = field(init=False, repr=False)
    """Every field the rule depends on, with the bits that matter; the condition's fields first."""

    @reads.default
    def _reads_of_both(self) -> Reads:
        return _reads(self.when.reads + self.demand.reads)

    @property
    def stage(self) -> Stage:
        """The stage that evaluates the rule."""
        return _STAGES[self.id.partition(".")[0]]

    @property
    def volatile(self) -> bool:
        """Whether the rule depends on more than VMCS fields: memory, or the state of the processor."""
        return self.when.volatile or self.demand.volatile

    def applies(self, context: EntryContext) -> bool:
        """Whether the rule has anything to say about this entry."""
        return self.when.test is None or bool(self.when.test(context))

    def holds(self, context: EntryContext) -> bool:
        """Whether the demand is met, or need not be."""
        return not self.applies(context) or bool(self.demand.holds(context))

    def repair(self, context: EntryContext) -> None:
        """Change the VMCS such that the rule holds; nothing happens if it does already."""
        if not self.holds(context):
            self.demand.repair(context)

    def statement(self) -> str:
        """The sentence with its condition."""
        return f"If {self.when.text}: {self.sentence}" if self.when.text else self.sentence


_STAGES: Final = {
    "basic": Stage.BASIC,
    "controls": Stage.CONTROLS,
    "host": Stage.HOST,
    "guest": Stage.GUEST,
    "msr-load": Stage.MSR_LOAD,
}


@frozen
class Violation:
    """A rule that does not hold, with the values that broke it: (field, value, bits at fault), in reading order."""

    rule: Rule
    values: tuple[tuple[Field, int, int], ...]

    @property
    def outcome(self) -> Outcome:
        """What the processor does about it."""
        return self.rule.outcome

    def render(self) -> str:
        """The message: rule and statement, outcome, every field read, and the citation, one per line."""
        lines = [f"{self.rule.id}: {self.rule.statement()}", f"  outcome: {self.outcome}"]
        for each, value, bits in self.values:
            at_fault = f" <- {describe_bits(bits)}" if bits else ""
            lines.append(f"  {each.name} = {each.describe(value)}{at_fault}")
        lines.append(f"  see {self.rule.ref}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


def violation_of(rule: Rule, context: EntryContext) -> Violation:
    """The violation of a rule known not to hold."""
    bits = dict(rule.demand.faulty(context))
    return Violation(rule, tuple((each, context.vmcs[each], bits.get(each, 0)) for each, _ in rule.reads))
