"""What a VM-entry rule is and what it may look at: the machinery of `vmcs.checks` for VMCS fields.

Rules are pure: they read an `EntryContext` and nothing else. Only `Check.repair` writes, and (outside the basic stage)
only to the VMCS.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from attrs import define, field, frozen

from vmcs import checks
from vmcs.bits import MASK64, mask
from vmcs.capabilities import Capabilities
from vmcs.exits import BY_NUMBER, InstructionError, Reason
from vmcs.fields import Field
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


class Condition(checks.Condition[Field, EntryContext]):
    """When a rule of VM entry applies."""


class Demand(checks.Demand[Field, EntryContext]):
    """What a rule of VM entry demands."""


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


class Rule(checks.Check[Field, EntryContext, Outcome]):
    """One check of VM entry; its ``id`` is stage, dot, name."""

    @property
    def stage(self) -> Stage:
        """The stage that evaluates the rule."""
        return _STAGES[self.id.partition(".")[0]]


_STAGES: Final = {
    "basic": Stage.BASIC,
    "controls": Stage.CONTROLS,
    "host": Stage.HOST,
    "guest": Stage.GUEST,
    "msr-load": Stage.MSR_LOAD,
}

Violation = checks.Violation[Rule, Field]
RuleSet = checks.RuleSet[Rule, EntryContext, Field]
