"""Would this VMCS enter? Every rule of VM entry for a VMCS that no machine is running, stage by stage.

What lies in memory beside the VMCS is often not known; rules that depend on such memory are not judged, and named.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import field, frozen

from vmcs import controls as c
from vmcs import fields as f
from vmcs.checks import violation_of
from vmcs.document import VmcsDocument
from vmcs.explanation import Explanation
from vmcs.rules import RULES, EntryContext, Stage
from vmcs.rules.advice import explain_msr_violation, explain_violation
from vmcs.rules.msr_load import Area, entries, violation
from vtx.vmx.rule_context import rule_context
from vtx.x86.msrs import MsrFile, bind_registers
from vtx.x86.profile import Profile
from vtx.x86.state import CpuState

_MSR_LOADING: Final = "msr-load"


class _UnknownMemoryError(Exception):
    """A rule looks at memory of which nothing is known."""


@frozen
class Broken:
    """A rule that the VMCS breaks, and the stage of VM entry at which that is found."""

    stage: Stage
    explanation: Explanation


@frozen
class Diagnosis:
    """All that is wrong with a VMCS.

    ``broken`` is in the order of VM entry: the processor reports the first. ``unjudged`` are (rule id, why).
    """

    instruction: str
    broken: tuple[Broken, ...]
    unjudged: tuple[tuple[str, str], ...] = field(default=())

    @property
    def reported(self) -> Broken | None:
        """What the processor would report; None if the VM entry would succeed."""
        return self.broken[0] if self.broken else None


def diagnose(document: VmcsDocument, profile: Profile) -> Diagnosis:
    """Evaluate every rule of VM entry for the VMCS of ``document`` on a processor of ``profile``."""
    msrs = MsrFile(profile)
    context = rule_context(
        document.vmcs, profile, msrs.table, document.vmcs_address, lambda address, size: _read(document, address, size)
    )
    context.launching = document.launching
    context.host_long_mode = document.ia32e_mode
    context.blocked_by_mov_ss = document.blocking_by_mov_ss
    broken: list[Broken] = []
    unjudged: list[tuple[str, str]] = []
    for stage, rules in RULES.items():
        for rule in rules:
            try:
                if not rule.holds(context):
                    broken.append(Broken(stage, explain_violation(violation_of(rule, context), context)))
            except _UnknownMemoryError as unknown:
                unjudged.append((rule.id, str(unknown)))
    _judge_msrs(context, msrs, broken, unjudged)
    return Diagnosis(document.instruction, tuple(broken), tuple(unjudged))


def _read(document: VmcsDocument, address: int, size: int) -> int:
    memory = document.memory
    places = range(address, address + size)
    if not all(place in memory for place in places):
        raise _UnknownMemoryError(f"memory at {address:#x} is not known")
    return int.from_bytes(bytes(memory[place] for place in places), "little")


def _judge_msrs(context: EntryContext, msrs: MsrFile, broken: list[Broken], unjudged: list[tuple[str, str]]) -> None:
    """Load the MSRs of the VM-entry MSR-load area, up to the first that cannot be loaded."""
    state = CpuState(cr0=context.vmcs[f.GUEST_CR0], efer=_guest_efer(context))
    bind_registers(msrs, lambda: state, lambda: None)
    # A tentative WRMSR on MSRs of our own: what follows sees them as loaded.
    context.wrmsr_faults = lambda index, value: not msrs.write(index, value)
    try:
        for entry in entries(context, Area.ENTRY_LOAD):
            found = violation(context, entry, Area.ENTRY_LOAD)
            if found is not None:
                broken.append(Broken(Stage.MSR_LOAD, explain_msr_violation(found)))
                return
    except _UnknownMemoryError as unknown:
        unjudged.append((_MSR_LOADING, str(unknown)))


def _guest_efer(context: EntryContext) -> int:
    """IA32_EFER once guest state is loaded."""
    values: Mapping[int, int] = context.values
    if values[f.VM_ENTRY_CONTROLS.encoding] & c.ENTRY_LOAD_IA32_EFER.mask:
        return context.vmcs[f.GUEST_IA32_EFER]
    return 0x500 if values[f.VM_ENTRY_CONTROLS.encoding] & c.ENTRY_IA32E_MODE_GUEST.mask else 0
