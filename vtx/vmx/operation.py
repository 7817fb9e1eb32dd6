"""VMX operation of one logical processor: the VMXON and current-VMCS pointers, active VMCSs, root and non-root.

Spec: SDM Vol. 3, "Introduction to VMX Operation"; "Virtual Machine Control Structures", "Overview" (active, current
and launch state).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import define, field, frozen

from vmcs import controls as c
from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.exits import InstructionError
from vmcs.instruction_rules import InstructionRule
from vmcs.region import Vmcs
from vmcs.rules import RULES, EntryContext, Stage, Violation
from vmcs.rules.msr_load import MsrViolation
from vtx.vmx.observer import Observer
from vtx.vmx.outcome import Outcome, VmFailInvalid, VmFailValid
from vtx.vmx.record import VmExit
from vtx.vmx.rule_context import rule_context
from vtx.vmx.view import ControlView
from vtx.vmx.virtual_apic import VirtualApic
from vtx.x86.second_level import SecondLevel
from vtx.x86.state import MASK64, Cr0
from vtx.x86.virtualization import Processor

NO_VMCS: Final = MASK64  # the current-VMCS pointer while there is no current VMCS
_PE_AND_PG: Final = int(Cr0.PE | Cr0.PG)
EPTP_RULES: Final = tuple(
    rule for rule in RULES[Stage.CONTROLS] if any(each is f.EPT_POINTER for each, _ in rule.demand.reads)
)
_ERROR_FIELD: Final = f.VM_INSTRUCTION_ERROR.encoding


@define(slots=True, eq=False)
class ActiveVmcs:
    """An active VMCS: its region's address, its fields, and what VM entry last derived from them.

    ``checked`` are the bits by encoding that had changed when all rules of VM entry last held.
    """

    pointer: int
    vmcs: Vmcs
    view: ControlView | None = None
    second_level: SecondLevel | None = None
    virtual_apic: VirtualApic | None = None
    context: EntryContext | None = None
    checked: Mapping[int, int] = field(factory=dict)

    @property
    def rule_context(self) -> EntryContext:
        """What the rules of VM entry looked at; there is one once an entry was tried."""
        assert self.context is not None
        return self.context


@frozen
class EntryFailure:
    """Why the last failing VM entry failed.

    ``outcome`` is what software saw. ``violations`` are the broken rules in order, ``msr`` an MSR that cannot be
    loaded; ``detail`` explains in words what is none of these: invalid PDPTEs in memory, no current VMCS.
    """

    outcome: Outcome
    violations: tuple[Violation, ...] = ()
    detail: str = ""
    msr: MsrViolation | None = None

    def __str__(self) -> str:
        return "\n".join([*(violation.render() for violation in self.violations), *filter(None, (self.detail,))])


@define(slots=True, eq=False)
class VmxOperation:
    """The VMX state of one logical processor, outside VMX operation to begin with.

    ``vmxon_pointer`` is None outside VMX operation. ``host_nmi_blocked`` is blocking by NMI as it was before the last
    VM entry. ``timer_deadline`` is the TSC at which the VMX-preemption timer expires. ``trap_flag`` and
    ``pending_trap`` are the monitor trap flag in its two stages: armed for the boundary after next, and pending now.
    ``virtual_apic`` is the running guest's virtual-APIC page, None without a TPR shadow; ``below_threshold`` the exit
    due at once after an entry with a TPR below its threshold. ``pause_loop`` has the times of the first and the last
    PAUSE of what may be a loop, None before the first since VM entry. ``transitions`` counts VM entries and VM exits.
    ``always_saved_msrs`` lists (field, MSR) that every exit saves; ``saves_cet``, ``saves_bounds`` and ``saves_uinv``:
    every exit saves CET state, IA32_BNDCFGS and UINV, too.
    """

    processor: Processor
    capabilities: Capabilities
    vmxon_pointer: int | None = None
    current: ActiveVmcs | None = None
    active: dict[int, ActiveVmcs] = field(factory=dict)
    non_root: bool = False
    view: ControlView | None = None
    virtual_apic: VirtualApic | None = None
    below_threshold: VmExit | None = None
    pause_loop: tuple[int, int] | None = None
    host_nmi_blocked: bool = False
    timer_deadline: int | None = None
    trap_flag: bool = False
    pending_trap: bool = False
    transitions: int = 0
    last_failure: EntryFailure | None = None
    observer: Observer | None = None
    always_saved_msrs: tuple[tuple[int, int], ...] = ()
    stores_ia32e_mode_guest: bool = field(init=False)
    saves_cet: bool = field(init=False)
    saves_bounds: bool = field(init=False)
    saves_uinv: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.stores_ia32e_mode_guest = self.capabilities.stores_ia32e_mode_guest
        self.saves_cet = self.capabilities.allows(c.ENTRY_LOAD_CET_STATE)
        self.saves_bounds = any(map(self.capabilities.allows, (c.ENTRY_LOAD_IA32_BNDCFGS, c.EXIT_CLEAR_IA32_BNDCFGS)))
        self.saves_uinv = self.capabilities.allows(c.ENTRY_LOAD_UINV)

    @property
    def current_pointer(self) -> int:
        """The current-VMCS pointer, `NO_VMCS` if there is no current VMCS."""
        return self.current.pointer if self.current else NO_VMCS

    @property
    def current_vmcs(self) -> Vmcs:
        """The current VMCS; only to be asked for when there is one."""
        assert self.current is not None
        return self.current.vmcs

    def activate(self, address: int) -> ActiveVmcs:
        """The VMCS at physical ``address``, which becomes active if it is not: its data then come from memory."""
        active = self.active.get(address)
        if active is None:
            image = self.processor.memory.read(address, self.capabilities.region_size)
            active = self.active[address] = ActiveVmcs(address, Vmcs.from_image(image, self.capabilities))
        return active

    def new_context(self, active: ActiveVmcs) -> EntryContext:
        """What the rules of VM entry may know about this processor beside the VMCS."""
        processor = self.processor
        return rule_context(
            active.vmcs,
            processor.profile,
            processor.msrs.table,
            active.pointer,
            lambda address, size: int.from_bytes(processor.memory.read(address, size), "little"),
        )

    def address_faults(self, address: int) -> int:
        """The bits that keep a VMXON or VMCS region from being at ``address``: not page-aligned, or too wide."""
        width = 32 if self.capabilities.addresses_limited_to_32_bits else self.processor.profile.physical_address_width
        return address & (0xFFF | MASK64 >> width << width)

    def fixed_bits_ok(self, number: int, value: int) -> bool:
        """Whether VMX operation supports ``value`` in CR0 or CR4; outside VMX operation: whether VMXON would accept it.

        Spec: SDM Vol. 3, "VMX Capability Reporting Facility", "VMX-Fixed Bits in CR0", "VMX-Fixed Bits in CR4".
        """
        capabilities = self.capabilities
        if number == 0:
            must, may = capabilities.cr0_must_be_1, capabilities.cr0_may_be_1
            if self.view is not None and self.view.unrestricted_guest:
                must &= ~_PE_AND_PG
        else:
            must, may = capabilities.cr4_must_be_1, capabilities.cr4_may_be_1
        return value & must == must and not value & ~may

    def eptp_context(self, eptp: int) -> EntryContext:
        """What `EPTP_RULES` look at if ``eptp`` is the EPT pointer."""
        vmcs = Vmcs(self.capabilities)
        vmcs[f.PRIMARY_PROCESSOR_BASED_CONTROLS] = c.ACTIVATE_SECONDARY_CONTROLS.mask
        vmcs[f.SECONDARY_PROCESSOR_BASED_CONTROLS] = c.ENABLE_EPT.mask
        vmcs[f.EPT_POINTER] = eptp
        return self.new_context(ActiveVmcs(0, vmcs))

    def eptp_is_valid(self, eptp: int) -> bool:
        """Whether VM entry would accept ``eptp``."""
        context = self.eptp_context(eptp)
        return all(rule.holds(context) for rule in EPTP_RULES)

    def fail(self, rule: InstructionRule, *operands: tuple[str, int, int]) -> Outcome:
        """VMfail: ``rule`` does not hold of ``operands``. VMfailValid if there is a VMCS to hold its error number."""
        if self.current is None or rule.error is None:
            return VmFailInvalid(rule, operands)
        self.current.vmcs.values[_ERROR_FIELD] = rule.error
        return VmFailValid(rule.error, rule, operands)

    def fail_entry(self, error: InstructionError) -> Outcome:
        """VMfailValid of a VM entry with ``error``."""
        self.current_vmcs.values[_ERROR_FIELD] = error
        return VmFailValid(error)

    def write_out(self, active: ActiveVmcs) -> None:
        """Store all VMCS data in the region in memory."""
        self.processor.memory.write(active.pointer, active.vmcs.to_image())
