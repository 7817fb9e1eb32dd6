"""What can come of a VMX instruction: a closed union, the same for guest code and for callers in Python.

Spec: SDM Vol. 3, "VMX Instruction Reference", "Conventions"; "VM Instruction Error Numbers".
"""

from __future__ import annotations

from typing import Final

from attrs import field, frozen

from vmcs.exits import AbortIndicator, InstructionError
from vmcs.instruction_rules import InstructionRule
from vtx.x86.outcome import Fault


@frozen
class VmSucceed:
    """VMsucceed. ``value`` is what VMREAD or VMPTRST delivers, 0 for the other instructions."""

    value: int = 0


@frozen
class Completed:
    """The instruction completed without reporting in RFLAGS: VMFUNC."""


Operands = tuple[tuple[str, int, int], ...]
"""Values that an instruction looked at: what they are, the values, and the bits at fault (0 if they are not known)."""


@frozen
class VmFailInvalid:
    """VMfailInvalid: the instruction failed and there is no VMCS to hold an error number.

    ``rule`` is what the instruction demanded in vain, ``operands`` of what; VM entry tells of its own rules elsewhere.
    """

    rule: InstructionRule | None = field(default=None, eq=False, repr=False)
    operands: Operands = field(default=(), eq=False, repr=False)


@frozen
class VmFailValid:
    """VMfailValid: the instruction failed; ``error`` is in the current VMCS's VM-instruction error field.

    ``rule`` and ``operands`` are those of `VmFailInvalid`.
    """

    error: InstructionError
    rule: InstructionRule | None = field(default=None, eq=False, repr=False)
    operands: Operands = field(default=(), eq=False, repr=False)


@frozen
class VmEntered:
    """VM entry succeeded: the processor is in VMX non-root operation with the guest's state."""


@frozen
class EntryFailed:
    """VM entry failed during or after loading guest state; the host state has been loaded.

    ``reason`` is the 32-bit exit reason, bit 31 included.
    """

    reason: int
    qualification: int


@frozen
class VmExited:
    """The instruction, executed in VMX non-root operation, caused a VM exit; the host state has been loaded.

    ``reason`` is the 32-bit exit reason.
    """

    reason: int
    qualification: int


@frozen
class VmxAborted:
    """A VM exit could not complete; the processor is in the shutdown state."""

    indicator: AbortIndicator


Outcome = Completed | VmSucceed | VmFailInvalid | VmFailValid | VmEntered | EntryFailed | VmExited | VmxAborted | Fault

SUCCEED: Final = VmSucceed()
FAIL_INVALID: Final = VmFailInvalid()
COMPLETED: Final = Completed()
ENTERED: Final = VmEntered()
