"""What a rule of VMRUN is, what it may look at, and what its violation says.

There is one outcome: #VMEXIT with VMEXIT_INVALID. The hardware never says why; a `Violation` does.

Spec: APM Vol. 2, "Canonicalization and Consistency Checks".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define, field, frozen

from vmcs.bits import MASK64, describe_bits, mask
from vmcs.refs import Reference
from vmcs.vmcb.fields import Vmcb, VmcbField

OUTCOME: Final = "#VMEXIT(VMEXIT_INVALID)"


def _no_memory(address: int, size: int) -> int:
    return mask(8 * size)


@define(slots=True, eq=False)
class VmrunContext:
    """Everything the consistency checks look at: the VMCB, the processor, and how the host's paging is set up.

    The ``*_reserved`` masks are the bits that MOV and WRMSR would refuse. ``read_physical(address, size)`` gives the
    little-endian value of 8 bytes of memory.
    """

    vmcb: Vmcb
    physical_address_width: int = 48
    cr4_reserved: int = 0
    efer_reserved: int = 0
    long_mode_supported: bool = True
    nested_paging_supported: bool = True
    host_paging: bool = True
    read_physical: Callable[[int, int], int] = _no_memory
    values: list[int] = field(init=False, repr=False)
    beyond_width: int = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.values = self.vmcb.values
        self.beyond_width = MASK64 & ~mask(self.physical_address_width)


Test = Callable[[VmrunContext], bool]
FaultyBits = Callable[[VmrunContext], dict[VmcbField, int]]


@frozen(eq=False)
class Rule:
    """One consistency check of VMRUN.

    ``id`` is stable. ``sentence`` states what must hold, in our words; it applies if ``when`` holds, which
    ``condition`` says in words that follow "if". ``repair`` changes the VMCB such that the rule holds or no longer
    applies.
    """

    id: str
    sentence: str
    ref: Reference = field(repr=False)
    reads: tuple[VmcbField, ...] = field(repr=False)
    satisfied: Test = field(repr=False)
    repair: Callable[[VmrunContext], None] = field(repr=False)
    faulty: FaultyBits = field(default=lambda context: {}, repr=False)
    when: Test | None = field(default=None, repr=False)
    condition: str = field(default="", repr=False)

    def holds(self, context: VmrunContext) -> bool:
        """Whether the demand is met, or need not be."""
        return (self.when is not None and not self.when(context)) or self.satisfied(context)

    def statement(self) -> str:
        """The sentence with its condition."""
        return f"If {self.condition}: {self.sentence}" if self.condition else self.sentence


@frozen
class Violation:
    """A rule that does not hold, with the values that broke it: (field, value, bits at fault), in reading order."""

    rule: Rule
    values: tuple[tuple[VmcbField, int, int], ...]

    def render(self) -> str:
        """The message: rule and statement, outcome, every field read, and the citation, one per line."""
        lines = [f"{self.rule.id}: {self.rule.statement()}", f"  outcome: {OUTCOME}"]
        for each, value, bits in self.values:
            at_fault = f" <- {describe_bits(bits)}" if bits else ""
            lines.append(f"  {each.name} = {each.describe(value)}{at_fault}")
        lines.append(f"  see {self.rule.ref}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


def violation_of(rule: Rule, context: VmrunContext) -> Violation:
    """The violation of a rule known not to hold."""
    bits = rule.faulty(context)
    return Violation(rule, tuple((each, context.vmcb[each], bits.get(each, 0)) for each in rule.reads))
