"""#VMEXIT: record why, save the guest, load the host.

Spec: APM Vol. 2, "#VMEXIT", "State Saved on Exit".
"""

from __future__ import annotations

from typing import Final

from vmcs.vmcb import layouts
from vmcs.vmcb.fields import IMAGE
from vtx.svm import avic, control_block
from vtx.svm import places as at
from vtx.svm.last_branch import swap_out
from vtx.svm.nested_paging import NO_SECOND_LEVEL
from vtx.svm.operation import SvmOperation
from vtx.svm.outcome import Exited, Outcome, ShutDown
from vtx.svm.processor_state import load_host, save_guest
from vtx.svm.record import Vmexit
from vtx.x86.cpuid import reserved_cr4_bits
from vtx.x86.msr_table import IA32_EFER, IA32_PAT, VM_HSAVE_PA
from vtx.x86.outcome import InstructionAborted
from vtx.x86.state import Cr0, Cr4, Efer, Rflags
from vtx.x86.virtualization import Processor

_TF: Final = int(Rflags.TF)
_PENDING_BS: Final = 1 << 14
_PG: Final = int(Cr0.PG)
_PAE: Final = int(Cr4.PAE)
_LMA: Final = int(Efer.LMA)


def perform_exit(operation: SvmOperation, record: Vmexit) -> Outcome:
    """Leave guest mode as ``record`` says: Exited, or ShutDown if the host's state is no valid one."""
    processor, values = operation.processor, operation.vmcb.values
    state = processor.state
    save_guest(state, values)
    values[at.EXITCODE], values[at.EXITINFO1], values[at.EXITINFO2] = record.code, record.info1, record.info2
    values[at.EXITINTINFO] = record.interrupted
    values[at.NRIP] = record.next_rip if operation.features.next_rip else 0
    values[at.EVENTINJ] &= ~layouts.EVENT_VALID
    if operation.uses_virtual_nmi:
        blocked = layouts.V_NMI_MASK if state.nmi_blocked else 0
        values[at.VIRTUAL] = values[at.VIRTUAL] & ~layouts.V_NMI_MASK | blocked
        state.nmi_blocked = operation.host_nmi_blocked
    parts = control_block.GUEST_SAVED
    if operation.nested_paging:
        parts = control_block.NESTED_GUEST_SAVED
        values[at.G_PAT] = processor.msrs.values[IA32_PAT]
        processor.msrs.values[IA32_PAT] = operation.host_pat
    control_block.update(processor.memory, operation.address, values, parts, operation.block)
    swap_out(operation)
    if operation.features.decode_assists and (record.instruction_bytes or values[at.BYTES_FETCHED]):
        control_block.write_instruction_bytes(processor.memory, operation.address, record.instruction_bytes)
    outcome = return_to_host(operation)
    if operation.observer is not None:
        operation.observer.vmexit(record)
    return outcome or Exited(record.code)


def return_to_host(operation: SvmOperation) -> Outcome | None:
    """Load the host's state from its save area, with the global interrupt flag clear; ShutDown if it is invalid."""
    processor = operation.processor
    state = processor.state
    operation.guest_mode = False
    processor.monitor = None
    avic.stop(operation)
    operation.transitions += 1
    known, image = operation.host, control_block.image(processor.memory, processor.msrs.values[VM_HSAVE_PA])
    as_saved = known is not None and image == known.image
    host = known.values if known is not None and as_saved else list(IMAGE.unpack(image))
    load_host(state, host)
    state.gif = False
    state.popf_intercepted = False
    if state.rflags & _TF:
        state.pending_debug = _PENDING_BS  # the trap after VMRUN, which completes only now
    if not as_saved and not _is_valid_host(processor, host):
        processor.shut_down("#VMEXIT to a host with invalid control registers")
        return ShutDown()
    processor.mmu.second_level, processor.mmu.asid = NO_SECOND_LEVEL, 0
    processor.load_control_state()
    if state.cr0 & _PG and state.cr4 & _PAE and not state.efer & _LMA:
        try:
            state.pdptrs = list(processor.mmu.load_pdptrs(state.cr3))
        except InstructionAborted:
            processor.shut_down("#VMEXIT to a host with invalid page-directory-pointer-table entries")
            return ShutDown()
        processor.load_control_state()
    return None


def _is_valid_host(processor: Processor, values: list[int]) -> bool:
    """Whether the host's control registers have no reserved bit set."""
    efer = processor.msrs.table[IA32_EFER]
    return not (
        values[at.CR0] >> 32
        or values[at.CR3] >> processor.profile.physical_address_width
        or values[at.CR4] & reserved_cr4_bits(processor.profile)
        or values[at.EFER] & ~(efer.writable | efer.ignored)
    )
