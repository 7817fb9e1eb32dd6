"""VMRUN after its own faults: save the host, check the guest, load it, inject an event.

The checks are the rules of `vmcs.vmcb.rules`; the first one that is broken is remembered, because hardware only says
VMEXIT_INVALID.

Spec: APM Vol. 2, "VMRUN Instruction", "Canonicalization and Consistency Checks", "Event Injection".
"""

from __future__ import annotations

from operator import itemgetter
from typing import Final

from vmcs.vmcb import layouts
from vmcs.vmcb.fields import FIELDS, Vmcb
from vmcs.vmcb.intercepts import Exit
from vmcs.vmcb.layouts import InjectedType, TlbControl
from vmcs.vmcb.model import VmrunContext
from vmcs.vmcb.rules import RULES
from vtx.svm import avic, control_block, last_branch
from vtx.svm import places as at
from vtx.svm.nested_paging import NO_SECOND_LEVEL, NestedPaging
from vtx.svm.operation import SvmOperation, VmrunFailure
from vtx.svm.outcome import ENTERED, Exited, Outcome
from vtx.svm.processor_state import load_guest, save_host
from vtx.svm.vmexit import return_to_host
from vtx.x86.cpuid import reserved_cr4_bits
from vtx.x86.event import Event, EventKind
from vtx.x86.msr_table import IA32_EFER, IA32_PAT, VM_HSAVE_PA, Msr
from vtx.x86.outcome import NotModelled, Vector
from vtx.x86.paging import load_pdptrs
from vtx.x86.profile import Profile
from vtx.x86.second_level import SecondLevel
from vtx.x86.state import MASK64, CpuState, Cr0, Cr4, Efer, Rflags

_PG: Final = int(Cr0.PG)
_PAE: Final = int(Cr4.PAE)
_LME: Final = int(Efer.LME)
_IF: Final = int(Rflags.IF)
# What the rules look at, of a list of values.
_CHECKED: Final = itemgetter(*sorted({field.encoding for rule in RULES for field, _ in rule.reads}))
_EVENT_KINDS: Final = {
    InjectedType.EXTERNAL_INTERRUPT: EventKind.EXTERNAL_INTERRUPT,
    InjectedType.NMI: EventKind.NMI,
    InjectedType.EXCEPTION: EventKind.HARDWARE_EXCEPTION,
    InjectedType.SOFTWARE_INTERRUPT: EventKind.SOFTWARE_INTERRUPT,
}


def vmrun(operation: SvmOperation, address: int) -> Outcome:
    """Run the guest of the VMCB at physical ``address``: Entered, or Exited with VMEXIT_INVALID.

    RIP is already that of the next instruction.
    """
    processor = operation.processor
    state = processor.state
    if state.smm is not None and state.smm.suspended is not None:
        raise NotModelled("VMRUN by the handler of a system-management interrupt that interrupted a guest")
    _save_host(operation)
    operation.block = control_block.Contents.of(processor.memory, address)
    before, vmcb = operation.vmcb, Vmcb(operation.block.values.copy())
    if operation.cached == address and operation.observer is not None and operation.observer.traces:
        operation.observer.control_block_read(before, vmcb)
    operation.vmcb, operation.address, operation.cached = vmcb, address, None
    relevant = (*_CHECKED(vmcb.values), state.paging)
    if relevant != operation.checked:
        violation = RULES.check(new_context(operation, vmcb))
        if violation is not None:
            return _refuse(operation, VmrunFailure(address, violation))
        operation.checked = relevant
    pdptes = _pdptes(operation)
    if pdptes is None:
        detail = f"a PDPTE in memory at {vmcb.values[at.CR3]:#x} (CR3) has reserved bits set"
        return _refuse(operation, VmrunFailure(address, None, detail))
    _start(operation, pdptes)
    return ENTERED


def _save_host(operation: SvmOperation) -> None:
    """Save the host's state, which is often there already: from the VMRUN before, at the same place."""
    processor, known = operation.processor, operation.host
    memory, area = processor.memory, processor.msrs.values[VM_HSAVE_PA]
    values = [0] * len(FIELDS)
    save_host(processor.state, values)
    if known is not None and values == known.values and control_block.image(memory, area) == known.image:
        return
    control_block.write(memory, area, values, control_block.HOST_SAVED)
    kept = memory.ram_offset(area) is not None
    operation.host = control_block.Contents(control_block.image(memory, area), values) if kept else None


def new_context(operation: SvmOperation, vmcb: Vmcb) -> VmrunContext:
    """What the rules of VMRUN may know about this processor beside the VMCB."""
    processor = operation.processor
    efer = processor.msrs.table[IA32_EFER]
    return context_of(processor.profile, efer, vmcb, host_paging=processor.state.paging)


def context_of(profile: Profile, efer: Msr, vmcb: Vmcb, *, host_paging: bool) -> VmrunContext:
    """What the rules of VMRUN may know about a processor of ``profile`` whose EFER is ``efer``."""
    return VmrunContext(
        vmcb,
        physical_address_width=profile.physical_address_width,
        cr4_reserved=reserved_cr4_bits(profile),
        efer_reserved=MASK64 & ~(efer.writable | efer.ignored),
        long_mode_supported=profile.has("LM"),
        nested_paging_supported=profile.has("NP"),
        virtual_nmi_supported=profile.has("VNMI"),
        avic_supported=profile.has("AVIC"),
        x2avic_supported=profile.has("x2AVIC"),
        host_paging=host_paging,
    )


def _refuse(operation: SvmOperation, failure: VmrunFailure) -> Outcome:
    memory = operation.processor.memory
    control_block.write_exit_code(memory, failure.address, operation.vmcb.values, Exit.INVALID)
    operation.last_failure = failure
    outcome = return_to_host(operation)
    if operation.observer is not None:
        operation.observer.vmrun_failed(failure)
    return outcome or Exited(Exit.INVALID)


def _pdptes(operation: SvmOperation) -> tuple[int, int, int, int] | None:
    """The PDPTE registers of a guest with PAE paging, None if they are invalid. Nested paging reads them on demand.

    Spec: APM Vol. 2, "Legacy PAE Mode".
    """
    values, processor = operation.vmcb.values, operation.processor
    pae = values[at.CR0] & _PG and values[at.CR4] & _PAE and not values[at.EFER] & _LME
    if not pae or operation.nested_paging:
        return 0, 0, 0, 0
    width = processor.profile.physical_address_width
    found = load_pdptrs(values[at.CR3], width, processor.memory, NO_SECOND_LEVEL)
    return found if isinstance(found, tuple) else None


def second_level_of(operation: SvmOperation, host: CpuState) -> SecondLevel:
    """The nested paging of the guest, for the host's control registers as they are in ``host``, or none."""
    if not operation.nested_paging:
        return NO_SECOND_LEVEL
    processor, values, nested = operation.processor, operation.vmcb.values, operation.nested
    gmet = operation.features.gmet and bool(values[at.NESTED_CONTROL] & layouts.GMET_ENABLE)
    apic_page = avic.access_page(operation)
    inputs = values[at.N_CR3], host.cr4, host.efer, gmet, apic_page
    if nested is None or nested.inputs != inputs:
        profile = processor.profile
        nested = operation.nested = NestedPaging(
            values[at.N_CR3],
            host,
            processor.memory,
            profile.physical_address_width,
            page1gb=profile.has("PAGE1GB"),
            gmet=gmet,
            apic_page=apic_page,
        )
    nested.begin()
    return nested


def _start(operation: SvmOperation, pdptes: tuple[int, int, int, int]) -> None:
    """Past the point where VMRUN can fail: load the guest, switch translation, inject."""
    processor, values = operation.processor, operation.vmcb.values
    state = processor.state
    second_level = second_level_of(operation, state)
    operation.guest_mode = True
    processor.monitor = None
    operation.cached = operation.address
    operation.transitions += 1
    operation.read_intercepts()
    operation.read_tsc_ratio()
    operation.host_if = bool(state.rflags & _IF)
    operation.host_nmi_blocked = state.nmi_blocked
    operation.pauses, operation.last_pause = values[at.PAUSE_COUNT], None
    load_guest(state, values)
    state.pdptrs[:] = pdptes
    state.gif = True
    state.popf_intercepted = operation.intercepted(Exit.POPF)
    if operation.uses_virtual_nmi:
        state.nmi_blocked = bool(values[at.VIRTUAL] & layouts.V_NMI_MASK)
    if operation.nested_paging:
        operation.host_pat = processor.msrs.values[IA32_PAT]
        processor.msrs.values[IA32_PAT] = values[at.G_PAT]
    last_branch.swap_in(operation)
    avic.start(operation)
    _flush(operation)
    processor.mmu.second_level, processor.mmu.asid = second_level, values[at.ASID]
    processor.load_control_state()
    if operation.observer is not None:
        operation.observer.vmrun()
    if values[at.EVENTINJ] & layouts.EVENT_VALID:
        processor.deliver(injected_event(operation))


def _flush(operation: SvmOperation) -> None:
    """Spec: APM Vol. 2, "TLB Flush"."""
    control, asid = operation.vmcb.values[at.TLB_CONTROL], operation.vmcb.values[at.ASID]
    mmu = operation.processor.mmu
    if control == TlbControl.ALL_ASIDS:
        mmu.flush_asid(None)
    elif operation.features.flush_by_asid and control in (TlbControl.THIS_ASID, TlbControl.THIS_ASID_NON_GLOBAL):
        mmu.flush_asid(asid, keep_global=control == TlbControl.THIS_ASID_NON_GLOBAL)


def injected_event(operation: SvmOperation) -> Event:
    """The event of EVENTINJ; an NMI has vector 2 whatever VECTOR says.

    Software interrupts and the exceptions of INT3 and INTO return to nRIP.
    """
    values = operation.vmcb.values
    word = values[at.EVENTINJ]
    kind = _EVENT_KINDS[InjectedType(word >> layouts.EVENT_TYPE_SHIFT & 7)]
    vector = Vector.NMI if kind is EventKind.NMI else word & 0xFF
    length = 0
    if operation.features.next_rip:
        length = (values[at.NRIP] - values[at.RIP]) & MASK64
        if kind is EventKind.HARDWARE_EXCEPTION and vector in (Vector.BP, Vector.OF):
            kind = EventKind.SOFTWARE_EXCEPTION
    error_code = word >> 32 if word & layouts.EVENT_ERROR_CODE_VALID else None
    return Event(vector, kind, error_code, length, injected=True)
