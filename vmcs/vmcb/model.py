"""What a rule of VMRUN is and what it may look at: the machinery of `vmcs.checks` for the fields of a VMCB.

There is one outcome: #VMEXIT with VMEXIT_INVALID. The hardware never says why; a `Violation` does.

Spec: APM Vol. 2, "Canonicalization and Consistency Checks".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define, field, frozen

from vmcs import checks
from vmcs.bits import MASK64, mask
from vmcs.vmcb.fields import Vmcb, VmcbField


@define(slots=True, eq=False)
class VmrunContext:
    """Everything the consistency checks look at: the VMCB, the processor, and how the host's paging is set up.

    The ``*_reserved`` masks are the bits that MOV and WRMSR would refuse.
    """

    vmcb: Vmcb
    physical_address_width: int = 48
    cr4_reserved: int = 0
    efer_reserved: int = 0
    long_mode_supported: bool = True
    host_paging: bool = True
    nested_paging_supported: bool = True
    virtual_nmi_supported: bool = True
    avic_supported: bool = True
    x2avic_supported: bool = True
    values: list[int] = field(init=False, repr=False)
    beyond_width: int = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.values = self.vmcb.values
        self.beyond_width = MASK64 & ~mask(self.physical_address_width)


@frozen
class VmexitInvalid:
    """VMRUN ends at once; the guest's state is left alone."""

    def __str__(self) -> str:
        return "#VMEXIT(VMEXIT_INVALID)"


INVALID: Final = VmexitInvalid()

Test = Callable[[VmrunContext], bool]
FaultyBits = tuple[tuple[VmcbField, int], ...]  # per field, a mask of the bits that are at fault


class Condition(checks.Condition[VmcbField, VmrunContext]):
    """When a rule of VMRUN applies."""


class Demand(checks.Demand[VmcbField, VmrunContext]):
    """What a rule of VMRUN demands."""


class Rule(checks.Check[VmcbField, VmrunContext, VmexitInvalid]):
    """One consistency check of VMRUN."""


ALWAYS: Final = Condition()

Violation = checks.Violation[Rule, VmcbField]
RuleSet = checks.RuleSet[Rule, VmrunContext, VmcbField]
