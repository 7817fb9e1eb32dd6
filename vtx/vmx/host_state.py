"""The host-state area: what the processor becomes at VM exit, and after an entry that failed late.

Spec: SDM Vol. 3, "VM Exits", "Loading Host State".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import AbortIndicator
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.vmx import fred_state
from vtx.vmx.guest_state import CR0_KEPT, DR7_ALWAYS_1, uses_pae_paging, write_msr
from vtx.vmx.operation import VmxOperation
from vtx.vmx.view import ControlView
from vtx.x86 import msr_table as m
from vtx.x86.outcome import InstructionAborted
from vtx.x86.second_level import IdentitySecondLevel
from vtx.x86.state import MASK32, AccessRights, Activity, CpuState, Cr4, Efer, Rflags, Shadow
from vtx.x86.user_interrupts import set_notification_vector

NO_SECOND_LEVEL: Final = IdentitySecondLevel()

_CODE: Final = 0xB  # execute/read, accessed
_DATA: Final = 0x3  # read/write, accessed
_BUSY_TSS: Final = 0xB
_FLAT: Final = int(AccessRights.CODE_OR_DATA | AccessRights.PRESENT | AccessRights.GRANULARITY)
_CODE_64: Final = int(_CODE | _FLAT | AccessRights.LONG)
_CODE_32: Final = int(_CODE | _FLAT | AccessRights.DEFAULT_BIG)
_DATA_RIGHTS: Final = int(_DATA | _FLAT | AccessRights.DEFAULT_BIG)
_TSS_RIGHTS: Final = int(_BUSY_TSS | AccessRights.PRESENT)
_TSS_LIMIT: Final = 0x67

_UNUSABLE: Final = int(AccessRights.UNUSABLE)
_PAE: Final = int(Cr4.PAE)
_PCIDE: Final = int(Cr4.PCIDE)
_LMA_AND_LME: Final = int(Efer.LMA | Efer.LME)
_RFLAGS: Final = int(Rflags.FIXED_1)

_CR0: Final = f.HOST_CR0.encoding
_CR3: Final = f.HOST_CR3.encoding
_CR4: Final = f.HOST_CR4.encoding
_EFER: Final = f.HOST_IA32_EFER.encoding
_PAT: Final = f.HOST_IA32_PAT.encoding
_RIP: Final = f.HOST_RIP.encoding
_RSP: Final = f.HOST_RSP.encoding
_CS_SELECTOR: Final = f.HOST_CS_SELECTOR.encoding
_TR_SELECTOR: Final = f.HOST_TR_SELECTOR.encoding
_TR_BASE: Final = f.HOST_TR_BASE.encoding
_GDTR_BASE: Final = f.HOST_GDTR_BASE.encoding
_IDTR_BASE: Final = f.HOST_IDTR_BASE.encoding
_S_CET: Final = f.HOST_IA32_S_CET.encoding
_SSP: Final = f.HOST_SSP.encoding
_INTERRUPT_SSP_TABLE: Final = f.HOST_IA32_INTERRUPT_SSP_TABLE_ADDR.encoding
_SYSENTER: Final = (
    (m.IA32_SYSENTER_CS, f.HOST_IA32_SYSENTER_CS.encoding),
    (m.IA32_SYSENTER_ESP, f.HOST_IA32_SYSENTER_ESP.encoding),
    (m.IA32_SYSENTER_EIP, f.HOST_IA32_SYSENTER_EIP.encoding),
)
# Index in CpuState.segments, selector field and base field (None: the base becomes 0).
_DATA_SEGMENTS: Final = (
    (0, f.HOST_ES_SELECTOR.encoding, None),
    (2, f.HOST_SS_SELECTOR.encoding, None),
    (3, f.HOST_DS_SELECTOR.encoding, None),
    (4, f.HOST_FS_SELECTOR.encoding, f.HOST_FS_BASE.encoding),
    (5, f.HOST_GS_SELECTOR.encoding, f.HOST_GS_BASE.encoding),
)

_LOADED_MSRS: Final[tuple[tuple[Control, Field, int], ...]] = (
    (c.EXIT_LOAD_IA32_PERF_GLOBAL_CTRL, f.HOST_IA32_PERF_GLOBAL_CTRL, 0x38F),
    (c.EXIT_LOAD_PKRS, f.HOST_IA32_PKRS, m.IA32_PKRS),
)
_CLEARED_MSRS: Final[tuple[tuple[Control, int], ...]] = (
    (c.EXIT_CLEAR_IA32_RTIT_CTL, 0x570),
    (c.EXIT_CLEAR_IA32_LBR_CTL, 0x14CE),
)
_RARE: Final = (
    sum(control.mask for control, _, _ in _LOADED_MSRS)
    + sum(control.mask for control, _ in _CLEARED_MSRS)
    + c.EXIT_CLEAR_UINV.mask
)


def load_host(operation: VmxOperation, vmcs: Vmcs, view: ControlView) -> AbortIndicator | None:
    """Load the processor from the host-state area; the VMX-abort indicator if the PDPTEs are invalid."""
    processor = operation.processor
    state, values = processor.state, vmcs.values
    is_64_bit = bool(view.exit & c.EXIT_HOST_ADDRESS_SPACE_SIZE.mask)
    _load_control_registers(state, values, view, is_64_bit)
    msrs = processor.msrs.values
    state.debugctl = 0
    for index, source in _SYSENTER:
        msrs[index] = values[source]
    if view.exit & c.EXIT_LOAD_IA32_PAT.mask:
        msrs[m.IA32_PAT] = values[_PAT]
    if view.exit & _RARE or view.secondary_exit:
        _load_rare_msrs(operation, values, view)
    if view.exit & c.EXIT_LOAD_CET_STATE.mask:
        state.s_cet, state.ssp = values[_S_CET], values[_SSP]
        state.interrupt_ssp_table = values[_INTERRUPT_SSP_TABLE]
    if view.secondary_exit & c.EXIT_LOAD_FRED.mask:
        fred_state.load(state, values, fred_state.HOST)
    if view.exit & c.EXIT_CLEAR_IA32_BNDCFGS.mask:
        state.bndcfgs = 0
    _load_segments(state, values, is_64_bit)
    state.rip = values[_RIP]
    state.gpr[4] = values[_RSP]
    state.rflags = _RFLAGS
    state.activity = Activity.ACTIVE
    state.shadow = Shadow.NONE
    state.pending_debug = 0
    # Mappings of VPID 0 survive a VM exit only if the guest had a VPID of its own.
    processor.mmu.vm_transition(state, NO_SECOND_LEVEL, 0, flush=not view.vpid)
    if uses_pae_paging(state.cr0, state.cr4, state.efer):
        try:
            state.pdptrs = list(processor.mmu.load_pdptrs(state.cr3))
        except InstructionAborted:
            return AbortIndicator.HOST_PDPTES
    return None


def _load_control_registers(state: CpuState, values: dict[int, int], view: ControlView, is_64_bit: bool) -> None:
    state.cr0 = values[_CR0] & ~CR0_KEPT | state.cr0 & CR0_KEPT
    state.cr3 = values[_CR3]
    cr4 = values[_CR4]
    state.cr4 = cr4 | _PAE if is_64_bit else cr4 & ~_PCIDE
    state.dr7 = DR7_ALWAYS_1
    if view.exit & c.EXIT_LOAD_IA32_EFER.mask:
        state.efer = values[_EFER]
    else:
        # LMA and LME follow the host address-space size.
        state.efer = state.efer & ~_LMA_AND_LME | (_LMA_AND_LME if is_64_bit else 0)


def _load_rare_msrs(operation: VmxOperation, values: dict[int, int], view: ControlView) -> None:
    for control, source, index in _LOADED_MSRS:
        if view.exit & control.mask:
            write_msr(operation, control, index, values[source.encoding])
    if view.secondary_exit & c.EXIT_LOAD_IA32_SPEC_CTRL.mask:
        source = f.HOST_IA32_SPEC_CTRL
        write_msr(operation, c.EXIT_LOAD_IA32_SPEC_CTRL, m.IA32_SPEC_CTRL, values[source.encoding])
    for control, index in _CLEARED_MSRS:
        if view.exit & control.mask:
            write_msr(operation, control, index, 0)
    if view.exit & c.EXIT_CLEAR_UINV.mask:
        set_notification_vector(operation.processor.msrs.values, 0)


def _load_segments(state: CpuState, values: dict[int, int], is_64_bit: bool) -> None:
    cs = state.segments[1]
    cs.selector = values[_CS_SELECTOR]
    cs.base = 0
    cs.limit = MASK32
    cs.access_rights = _CODE_64 if is_64_bit else _CODE_32
    for index, selector_field, base_field in _DATA_SEGMENTS:
        segment = state.segments[index]
        selector = segment.selector = values[selector_field]
        segment.base = 0 if base_field is None else values[base_field]
        segment.limit = MASK32
        segment.access_rights = _DATA_RIGHTS if selector else _DATA_RIGHTS | _UNUSABLE
    tr, ldtr = state.tr, state.ldtr
    tr.selector = values[_TR_SELECTOR]
    tr.base = values[_TR_BASE]
    tr.limit = _TSS_LIMIT
    tr.access_rights = _TSS_RIGHTS
    ldtr.selector = ldtr.base = ldtr.limit = 0
    ldtr.access_rights = _UNUSABLE
    state.gdtr.base, state.gdtr.limit = values[_GDTR_BASE], 0xFFFF
    state.idtr.base, state.idtr.limit = values[_IDTR_BASE], 0xFFFF
