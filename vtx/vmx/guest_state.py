"""The guest-state area: loading it at VM entry, saving into it at VM exit.

Spec: SDM Vol. 3, "VM Entries", "Loading Guest State"; "VM Exits", "Saving Guest State".
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.vmx import fred_state
from vtx.vmx.operation import VmxOperation
from vtx.vmx.record import VmExit
from vtx.vmx.timer import remaining
from vtx.vmx.view import ControlView
from vtx.x86 import msr_table as m
from vtx.x86.branches import BTF
from vtx.x86.outcome import NotModelled
from vtx.x86.state import MASK32, Activity, CpuState, Cr0, Cr4, Efer, Rflags, Segment, Shadow
from vtx.x86.user_interrupts import notification_vector, set_notification_vector

# CR0 bits that neither VM entry nor VM exit modifies: ET, NW, CD and the reserved bits.
CR0_KEPT: Final = 0x7FFA_FFD0
DR7_ALWAYS_1: Final = 0x400
_DR7_ALWAYS_0: Final = 0xD000

_CR0: Final = f.GUEST_CR0.encoding
_CR3: Final = f.GUEST_CR3.encoding
_CR4: Final = f.GUEST_CR4.encoding
_DR7: Final = f.GUEST_DR7.encoding
_DEBUGCTL: Final = f.GUEST_IA32_DEBUGCTL.encoding
_EFER: Final = f.GUEST_IA32_EFER.encoding
_PAT: Final = f.GUEST_IA32_PAT.encoding
_RIP: Final = f.GUEST_RIP.encoding
_RSP: Final = f.GUEST_RSP.encoding
_RFLAGS: Final = f.GUEST_RFLAGS.encoding
_SYSENTER_CS: Final = f.GUEST_IA32_SYSENTER_CS.encoding
_SYSENTER_ESP: Final = f.GUEST_IA32_SYSENTER_ESP.encoding
_SYSENTER_EIP: Final = f.GUEST_IA32_SYSENTER_EIP.encoding
_GDTR_BASE: Final = f.GUEST_GDTR_BASE.encoding
_GDTR_LIMIT: Final = f.GUEST_GDTR_LIMIT.encoding
_IDTR_BASE: Final = f.GUEST_IDTR_BASE.encoding
_IDTR_LIMIT: Final = f.GUEST_IDTR_LIMIT.encoding
_ACTIVITY: Final = f.GUEST_ACTIVITY_STATE.encoding
_INTERRUPTIBILITY: Final = f.GUEST_INTERRUPTIBILITY_STATE.encoding
_PENDING_DEBUG: Final = f.GUEST_PENDING_DEBUG_EXCEPTIONS.encoding
_TIMER: Final = f.VMX_PREEMPTION_TIMER_VALUE.encoding
_S_CET: Final = f.GUEST_IA32_S_CET.encoding
_SSP: Final = f.GUEST_SSP.encoding
_INTERRUPT_SSP_TABLE: Final = f.GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR.encoding
_BNDCFGS: Final = f.GUEST_IA32_BNDCFGS.encoding
_UINV: Final = f.GUEST_UINV.encoding
_PDPTES: Final = tuple(each.encoding for each in (f.GUEST_PDPTE0, f.GUEST_PDPTE1, f.GUEST_PDPTE2, f.GUEST_PDPTE3))

_SEGMENT_NAMES: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
# Selector, base, limit and access-rights encodings of each segment register, in that order of names.
_SEGMENTS: Final = tuple(
    tuple(getattr(f, f"GUEST_{name}_{part}").encoding for part in ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS"))
    for name in _SEGMENT_NAMES
)

_SEGMENT_FIELDS: Final = tuple(itertools.chain.from_iterable(_SEGMENTS))
_segment_values = operator.itemgetter(*_SEGMENT_FIELDS)

_BLOCKING_BY_NMI: Final = 1 << 3
# Arithmetic on flag enumerations is too slow for what runs at every entry and exit.
_SHADOWS: Final = tuple(Shadow(bits) for bits in range(4))
_ACTIVITIES: Final = tuple(Activity)
_VMCS_ACTIVITY: Final = 0xFF  # without the bit of MWAIT, which the VMCS does not tell from being active
_PG: Final = int(Cr0.PG)
_PAE: Final = int(Cr4.PAE)
_LMA: Final = int(Efer.LMA)
_LME: Final = int(Efer.LME)
_RF: Final = int(Rflags.RF)
_TF: Final = int(Rflags.TF)
_PENDING_BS: Final = 1 << 14

# Controls that load or save an MSR with a field of its own; an absent MSR makes the control unmodelled.
_LOADED_MSRS: Final[tuple[tuple[Control, Field, int], ...]] = (
    (c.ENTRY_LOAD_IA32_PERF_GLOBAL_CTRL, f.GUEST_IA32_PERF_GLOBAL_CTRL, 0x38F),
    (c.ENTRY_LOAD_IA32_RTIT_CTL, f.GUEST_IA32_RTIT_CTL, 0x570),
    (c.ENTRY_LOAD_IA32_LBR_CTL, f.GUEST_IA32_LBR_CTL, 0x14CE),
    (c.ENTRY_LOAD_PKRS, f.GUEST_IA32_PKRS, m.IA32_PKRS),
    (c.ENTRY_LOAD_IA32_SPEC_CTRL, f.GUEST_IA32_SPEC_CTRL, m.IA32_SPEC_CTRL),
)
_RARE_LOADS: Final = sum(control.mask for control, _, _ in _LOADED_MSRS) | c.ENTRY_LOAD_UINV.mask
# Exits that may leave debug exceptions pending; the others save none (unless blocking by MOV SS holds them back).
_KEEPS_PENDING_DEBUG: Final = frozenset(
    (
        Reason.INIT_SIGNAL,
        Reason.OTHER_SMI,
        Reason.MONITOR_TRAP_FLAG,
        Reason.TPR_BELOW_THRESHOLD,
        Reason.VIRTUALIZED_EOI,
        Reason.APIC_WRITE,
    )
)


def uses_pae_paging(cr0: int, cr4: int, efer: int) -> bool:
    """Whether these registers select PAE paging, whose PDPTEs are registers."""
    return bool(cr0 & _PG and cr4 & _PAE and not efer & _LMA)


def guest_uses_pae_paging(vmcs: Vmcs, view: ControlView) -> bool:
    """Whether the guest will use PAE paging: the entry then loads PDPTEs."""
    values = vmcs.values
    return bool(values[_CR0] & _PG and values[_CR4] & _PAE and not view.entry & c.ENTRY_IA32E_MODE_GUEST.mask)


def load_guest(operation: VmxOperation, vmcs: Vmcs, view: ControlView, pdptes: Iterable[int] | None) -> None:
    """Load the processor from the guest-state area; ``pdptes`` are new PDPTE registers, None to keep them."""
    processor = operation.processor
    state, values = processor.state, vmcs.values
    _load_control_registers(state, values, view)
    if view.entry & c.ENTRY_LOAD_DEBUG_CONTROLS.mask:
        state.dr7 = values[_DR7] & ~_DR7_ALWAYS_0 & MASK32 | DR7_ALWAYS_1
        state.debugctl = values[_DEBUGCTL]
    _load_msr_fields(operation, values, view)
    if view.entry & c.ENTRY_LOAD_CET_STATE.mask:
        state.s_cet, state.ssp = values[_S_CET], values[_SSP]
        state.interrupt_ssp_table = values[_INTERRUPT_SSP_TABLE]
    if view.entry & c.ENTRY_LOAD_FRED.mask:
        fred_state.load(state, values, fred_state.GUEST)
    if view.entry & c.ENTRY_LOAD_IA32_BNDCFGS.mask:
        state.bndcfgs = values[_BNDCFGS]
    _load_segments(state, values)
    state.rip = values[_RIP]
    state.gpr[4] = values[_RSP]
    state.rflags = values[_RFLAGS]
    if pdptes is not None:
        state.pdptrs = list(pdptes)
    state.activity = _ACTIVITIES[values[_ACTIVITY]]
    interruptibility = values[_INTERRUPTIBILITY]
    state.shadow = _SHADOWS[interruptibility & 3]
    operation.host_nmi_blocked = state.nmi_blocked
    state.nmi_blocked = bool(interruptibility & _BLOCKING_BY_NMI)
    state.pending_debug = values[_PENDING_DEBUG]


def _load_control_registers(state: CpuState, values: dict[int, int], view: ControlView) -> None:
    cr0 = values[_CR0] & ~CR0_KEPT | state.cr0 & CR0_KEPT
    if view.entry & c.ENTRY_LOAD_IA32_EFER.mask:
        state.efer = values[_EFER]
    else:
        ia32e = bool(view.entry & c.ENTRY_IA32E_MODE_GUEST.mask)
        efer = state.efer & ~_LMA | (_LMA if ia32e else 0)
        if cr0 & _PG:
            efer = efer & ~_LME | (_LME if ia32e else 0)
        state.efer = efer
    state.cr0 = cr0
    state.cr3 = values[_CR3]
    state.cr4 = values[_CR4]


def _load_msr_fields(operation: VmxOperation, values: dict[int, int], view: ControlView) -> None:
    msrs = operation.processor.msrs.values
    msrs[m.IA32_SYSENTER_CS] = values[_SYSENTER_CS]
    msrs[m.IA32_SYSENTER_ESP] = values[_SYSENTER_ESP]
    msrs[m.IA32_SYSENTER_EIP] = values[_SYSENTER_EIP]
    if view.entry & c.ENTRY_LOAD_IA32_PAT.mask:
        msrs[m.IA32_PAT] = values[_PAT]
    if view.entry & _RARE_LOADS:
        for control, source, index in _LOADED_MSRS:
            if view.entry & control.mask:
                write_msr(operation, control, index, values[source.encoding])
        if view.entry & c.ENTRY_LOAD_UINV.mask:
            set_notification_vector(operation.processor.msrs.values, values[_UINV])


def write_msr(operation: VmxOperation, control: Control, index: int, value: int) -> None:
    """Load an MSR that ``control`` switches; NotModelled if the profile lets it be switched but lacks the MSR."""
    if index not in operation.processor.msrs.values:
        raise NotModelled(f"VMX control {control.name!r} without its MSR")
    operation.processor.msrs.write(index, value)


def _load_segments(state: CpuState, values: dict[int, int]) -> None:
    # Contents of unusable segments are mostly undefined after VM entry; loading them as they are is one choice, and
    # the one that brings the guest back unchanged.
    parts = iter(_segment_values(values))
    for segment, selector, base, limit, rights in zip(_registers(state), parts, parts, parts, parts, strict=True):
        segment.selector = selector
        segment.base = base
        segment.limit = limit
        segment.access_rights = rights
    state.gdtr.base = values[_GDTR_BASE]
    state.gdtr.limit = values[_GDTR_LIMIT]
    state.idtr.base = values[_IDTR_BASE]
    state.idtr.limit = values[_IDTR_LIMIT]


def _registers(state: CpuState) -> tuple[Segment, ...]:
    return (*state.segments, state.ldtr, state.tr)


def save_guest(operation: VmxOperation, vmcs: Vmcs, view: ControlView, record: VmExit) -> None:
    """Save the guest-state area, as the exit described by ``record`` finds the processor."""
    state = operation.processor.state
    values, changed = vmcs.values, vmcs.changed
    es, cs, ss, ds, fs, gs = state.segments
    ldtr, tr = state.ldtr, state.tr
    # One comparison for what most guests leave as it is from entry to exit.
    registers = (
        *(es.selector, es.base, es.limit, es.access_rights, cs.selector, cs.base, cs.limit, cs.access_rights),
        *(ss.selector, ss.base, ss.limit, ss.access_rights, ds.selector, ds.base, ds.limit, ds.access_rights),
        *(fs.selector, fs.base, fs.limit, fs.access_rights, gs.selector, gs.base, gs.limit, gs.access_rights),
        *(ldtr.selector, ldtr.base, ldtr.limit, ldtr.access_rights, tr.selector, tr.base, tr.limit, tr.access_rights),
    )
    saved: list[tuple[int, int]] = []
    if registers != _segment_values(values):
        saved += zip(_SEGMENT_FIELDS, registers, strict=True)
    msrs = operation.processor.msrs.values
    saved += (
        (_CR0, state.cr0),
        (_CR3, state.cr3),
        (_CR4, state.cr4),
        (_SYSENTER_CS, msrs[m.IA32_SYSENTER_CS]),
        (_SYSENTER_ESP, msrs[m.IA32_SYSENTER_ESP]),
        (_SYSENTER_EIP, msrs[m.IA32_SYSENTER_EIP]),
        (_GDTR_BASE, state.gdtr.base),
        (_GDTR_LIMIT, state.gdtr.limit),
        (_IDTR_BASE, state.idtr.base),
        (_IDTR_LIMIT, state.idtr.limit),
        (_RIP, state.rip),
        (_RSP, state.gpr[4]),
        (_RFLAGS, _saved_rflags(state, record)),
        (_ACTIVITY, _VMCS_ACTIVITY & state.activity),
        (_INTERRUPTIBILITY, _interruptibility(state)),
        (_PENDING_DEBUG, _pending_debug(state, record)),
    )
    saved += _controlled_fields(operation, view, msrs)
    for encoding, value in saved:
        if values[encoding] != value:
            changed[encoding] = changed.get(encoding, 0) | values[encoding] ^ value
            values[encoding] = value


def _controlled_fields(operation: VmxOperation, view: ControlView, msrs: dict[int, int]) -> list[tuple[int, int]]:
    """What only some controls save."""
    state, exit_controls = operation.processor.state, view.exit
    saved: list[tuple[int, int]] = []
    if exit_controls & c.EXIT_SAVE_DEBUG_CONTROLS.mask:
        saved += ((_DR7, state.dr7), (_DEBUGCTL, state.debugctl))
    if exit_controls & c.EXIT_SAVE_IA32_EFER.mask:
        saved.append((_EFER, state.efer))
    if exit_controls & c.EXIT_SAVE_IA32_PAT.mask:
        saved.append((_PAT, msrs[m.IA32_PAT]))
    if exit_controls & c.EXIT_SAVE_IA32_PERF_GLOBAL_CTRL.mask:
        saved.append((f.GUEST_IA32_PERF_GLOBAL_CTRL.encoding, operation.processor.msrs.read(0x38F) or 0))
    if exit_controls & c.EXIT_SAVE_VMX_PREEMPTION_TIMER_VALUE.mask and operation.timer_deadline is not None:
        shift = operation.capabilities.preemption_timer_shift
        saved.append((_TIMER, remaining(operation.processor.tsc(), operation.timer_deadline, shift) & MASK32))
    if view.secondary_exit & c.EXIT_SAVE_FRED.mask:
        saved += fred_state.saved(state)
    if view.eptp is not None and uses_pae_paging(state.cr0, state.cr4, state.efer):
        saved += zip(_PDPTES, state.pdptrs, strict=True)
    saved += ((encoding, msrs[index]) for encoding, index in operation.always_saved_msrs)
    if operation.saves_cet:
        saved += ((_S_CET, state.s_cet), (_SSP, state.ssp), (_INTERRUPT_SSP_TABLE, state.interrupt_ssp_table))
    if operation.saves_bounds:
        saved.append((_BNDCFGS, state.bndcfgs))
    if operation.saves_uinv:
        saved.append((_UINV, notification_vector(msrs)))
    return saved


def always_saved_msrs(capabilities: Capabilities) -> tuple[tuple[int, int], ...]:
    """Field and index of the MSRs that every VM exit saves: those entry may load that have no control for saving."""
    return tuple(
        (target.encoding, index) for control, target, index in _LOADED_MSRS[1:] if capabilities.allows(control)
    )


def _saved_rflags(state: CpuState, record: VmExit) -> int:
    if record.resume_flag is None:
        return state.rflags
    return state.rflags & ~_RF | (_RF if record.resume_flag else 0)


def _interruptibility(state: CpuState) -> int:
    value = int(state.shadow)
    return value | _BLOCKING_BY_NMI if state.nmi_blocked else value


def _pending_debug(state: CpuState, record: VmExit) -> int:
    if record.reason in _KEEPS_PENDING_DEBUG:
        return state.pending_debug
    if state.shadow is not Shadow.NONE and state.shadow & Shadow.MOV_SS and not record.is_debug_exception:
        single_step = state.rflags & _TF and not state.debugctl & BTF
        return state.pending_debug | _PENDING_BS if single_step else state.pending_debug
    return 0


def guest_pdptes(vmcs: Vmcs) -> tuple[int, ...]:
    """The PDPTE fields."""
    return tuple(vmcs.values[encoding] for encoding in _PDPTES)
