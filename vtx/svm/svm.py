"""`Svm`: AMD's virtualization extension of one logical processor, behind the seam of `vtx.x86.virtualization`.

Spec: APM Vol. 2, "Secure Virtual Machine".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from iced_x86 import Mnemonic

from vmcs.vmcb.intercepts import Exit
from vmcs.vmcb.model import Violation
from vmcs.vmcb.rules import RULES
from vtx.svm import avic, avic_access, events, instructions, pause_filter, smm, vm_cr
from vtx.svm.boundary import boundary_event, holds_interrupts, wants_boundary, wants_interrupt_window
from vtx.svm.intercepts import control_register_trap, efer_trap, exit_of, next_rip
from vtx.svm.nested_paging import NO_SECOND_LEVEL
from vtx.svm.observer import Observer
from vtx.svm.operation import Features, SvmOperation, VmrunFailure
from vtx.svm.outcome import Outcome
from vtx.svm.record import Vmexit
from vtx.svm.shortcuts import shortcut
from vtx.svm.vmexit import perform_exit
from vtx.svm.vmrun import new_context
from vtx.x86.decode import Instruction
from vtx.x86.event import Event
from vtx.x86.msr_table import AVIC_DOORBELL
from vtx.x86.operations import (
    MoveFromControlRegister,
    MoveToControlRegister,
    Operation,
    Plain,
    ReadMsr,
    Simple,
    WriteMsr,
)
from vtx.x86.outcome import Fault, NotModelled
from vtx.x86.second_level import ReservedPageAccess, SecondLevelFault
from vtx.x86.spinning import PAUSE_TICKS
from vtx.x86.state import MASK64, Rflags, Shadow
from vtx.x86.virtualization import Processor, RefusedInstruction, SmmSuspension

_PAUSE: Final = Simple(Plain.PAUSE)
_OF_REGISTERS: Final = frozenset((MoveFromControlRegister, MoveToControlRegister, ReadMsr, WriteMsr))
"""Operations that may be on virtual registers of the local APIC."""

_BROADCASTS: Final = frozenset((Mnemonic.INVLPGB, Mnemonic.TLBSYNC))
_RF: Final = int(Rflags.RF)
_TF: Final = int(Rflags.TF)
_PENDING_BS: Final = 1 << 14


class Svm:
    """SVM of ``processor``, with the features of its profile; outside guest mode to begin with.

    ``observer`` is told of SVM instructions, VMRUNs and #VMEXITs; None costs nothing.
    """

    intercepts_flow = True
    mnemonics = instructions.ROWS.keys()
    iret_unblocked_nmi = False

    def __init__(self, processor: Processor, observer: Observer | None = None) -> None:
        self.operation = SvmOperation(processor, Features.of(processor.profile), observer=observer)
        if processor.profile.has("SVM"):
            vm_cr.bind(processor)
            processor.msrs.bind(AVIC_DOORBELL, lambda index: None, self._ring_doorbell)

    def reset(self) -> None:
        """See `Virtualization.reset`."""
        old = self.operation
        self.operation = SvmOperation(old.processor, old.features, observer=old.observer, transitions=old.transitions)

    # State, for reading

    @property
    def non_root(self) -> bool:
        """Guest mode."""
        return self.operation.guest_mode

    @property
    def transitions(self) -> int:
        """How many VMRUNs and #VMEXITs there have been."""
        return self.operation.transitions

    @property
    def last_failure(self) -> VmrunFailure | None:
        """Why the last VMRUN failed that did."""
        return self.operation.last_failure

    def explain(self) -> list[Violation]:
        """Every rule that the VMCB last run breaks; empty if there was none."""
        return RULES.explain(new_context(self.operation, self.operation.vmcb)) if self.operation.address else []

    # The seam

    @property
    def holds_interrupts(self) -> bool:
        """See `Virtualization.holds_interrupts`."""
        return holds_interrupts(self.operation)

    @property
    def interrupts_ignore_if(self) -> bool:
        """See `Virtualization.interrupts_ignore_if`."""
        return self.operation.guest_mode and self.operation.masks_interrupts

    @property
    def holds_nmis(self) -> bool:
        """See `Virtualization.holds_nmis`."""
        svm = self.operation
        return not svm.processor.state.gif or (svm.guest_mode and svm.uses_virtual_nmi)

    @property
    def init_is_blocked(self) -> bool:
        """INIT waits while the global interrupt flag is clear."""
        return not self.operation.processor.state.gif

    def init(self) -> bool:
        """See `Virtualization.init`. An INIT that is not intercepted ends guest mode without a trace."""
        svm = self.operation
        if svm.intercepted(Exit.INIT):
            perform_exit(svm, Vmexit(Exit.INIT))
            return True
        svm.guest_mode = False
        avic.stop(svm)
        svm.processor.mmu.second_level, svm.processor.mmu.asid = NO_SECOND_LEVEL, 0
        return False

    def start_up(self, vector: int) -> bool:
        """Start-up IPIs have no intercept."""
        return False

    def smi(self) -> None:
        """A system-management interrupt arrives, to be taken at the next boundary at which it is not held."""
        self.operation.smi_pending = True

    def execute(self, instruction: Instruction) -> bool:
        """See `Virtualization.execute`."""
        return instructions.execute(self.operation, instruction)

    def shortcut(self, instruction: Instruction) -> Callable[[], bool] | None:
        """See `Virtualization.shortcut`."""
        return shortcut(self.operation, instruction)

    def is_disabled(self, instruction: Instruction) -> bool:
        """See `Virtualization.is_disabled`: the one control that makes instructions invalid is about broadcasts."""
        return instruction.mnemonic in _BROADCASTS and self.operation.forbids_broadcasts

    def intercept(self, operation: Operation, instruction: Instruction) -> bool:
        """See `Virtualization.intercept`."""
        svm = self.operation
        kind = type(operation)
        if kind is Simple and operation == _PAUSE:
            return self._pause(instruction)
        record = exit_of(svm, operation, instruction)
        if record is None:
            return kind in _OF_REGISTERS and self._virtualize_register(operation, instruction)
        perform_exit(svm, record)
        return True

    def control_register_written(self, number: int) -> None:
        """See `Virtualization.control_register_written`."""
        self._exit_if(control_register_trap(self.operation, number))

    def efer_written(self) -> None:
        """See `Virtualization.efer_written`."""
        self._exit_if(efer_trap(self.operation))

    def intercept_event(self, event: Event, fault: Fault | None) -> bool:
        """See `Virtualization.intercept_event`."""
        return self._exit_if(events.exception_exit(self.operation, event, fault))

    def delivery_fault(self, delivering: Event, fault: Fault | None) -> bool:
        """See `Virtualization.delivery_fault`."""
        return self._exit_if(events.delivery_exit(self.operation, delivering, fault))

    def second_level_fault(self, fault: SecondLevelFault, delivering: Event | None) -> bool:
        """See `Virtualization.second_level_fault`."""
        return self._exit_if(events.second_level_exit(self.operation, fault, delivering))

    def virtualize_access(self, refused: RefusedInstruction) -> SecondLevelFault | None:
        """See `Virtualization.virtualize_access`: the reserved page is that of AVIC's registers."""
        if not isinstance(refused.access, ReservedPageAccess):
            raise NotModelled("second-level event")
        avic_access.virtualize(self.operation, refused, refused.access)
        return None

    def boundary(self) -> bool:
        """See `Virtualization.boundary`."""
        svm = self.operation
        if not svm.guest_mode:
            if svm.smi_pending and svm.processor.state.gif and svm.processor.state.smm is None:
                svm.smi_pending = False
                svm.processor.enter_smm()
                return True
            return False
        due = boundary_event(svm)
        if isinstance(due, Event):
            svm.processor.deliver(due)
            return True
        if due is None and svm.smi_pending and svm.processor.state.gif:
            svm.smi_pending = False
            svm.processor.enter_smm()
            return True
        return self._exit_if(due)

    def next_deadline(self) -> int | None:
        """SVM has no timer."""
        return None

    def wants_boundary(self) -> bool:
        """See `Virtualization.wants_boundary`."""
        return wants_boundary(self.operation)

    def wants_interrupt_window(self) -> bool:
        """See `Virtualization.wants_interrupt_window`."""
        return wants_interrupt_window(self.operation)

    def enter_smm(self) -> SmmSuspension | None:
        """See `Virtualization.enter_smm`."""
        return smm.suspend(self.operation)

    def leave_smm(self, suspended: tuple[int, ...]) -> None:
        """See `Virtualization.leave_smm`."""
        smm.resume(self.operation, suspended)

    def read_control_register(self, number: int) -> int:
        """SVM has no read shadows."""
        state = self.operation.processor.state
        return state.cr0 if number == 0 else state.cr4

    def merge_control_register(self, number: int, value: int) -> int:
        """SVM has no guest/host masks."""
        return value

    def control_register_fixed_ok(self, number: int, value: int) -> bool:
        """SVM fixes no bits."""
        return True

    def iret_unblocks_nmi(self) -> bool:
        """Always: with virtual NMIs, it is those whose blocking ends."""
        return True

    def guest_tsc(self, tsc: int) -> int:
        """See `Virtualization.guest_tsc`."""
        return self.operation.guest_tsc(tsc) & MASK64

    # Behind the seam

    def exit(self, record: Vmexit) -> Outcome:
        """Perform the #VMEXIT that ``record`` describes; in guest mode only. For tools that stand in for a guest."""
        return perform_exit(self.operation, record)

    def _exit_if(self, record: Vmexit | None) -> bool:
        if record is None:
            return False
        perform_exit(self.operation, record)
        return True

    def _retire(self, instruction: Instruction) -> None:
        state = self.operation.processor.state
        if state.rflags & _TF:
            state.pending_debug |= _PENDING_BS
        state.rip = next_rip(self.operation, instruction)
        state.rflags &= ~_RF
        state.shadow = Shadow.NONE

    def _pause(self, instruction: Instruction) -> bool:
        svm = self.operation
        if not svm.intercepted(Exit.PAUSE):
            return False
        if pause_filter.exits(svm):
            perform_exit(svm, Vmexit(Exit.PAUSE, next_rip=next_rip(svm, instruction)))
            return True
        svm.processor.charge(PAUSE_TICKS)
        self._retire(instruction)
        svm.last_pause = svm.processor.tsc()
        return True

    def _virtualize_register(self, operation: Operation, instruction: Instruction) -> bool:
        """CR8 is V_TPR under V_INTR_MASKING and with AVIC; x2APIC MSRs are in the backing page in x2AVIC mode.

        Spec: APM Vol. 2, "Masking Interrupts in Local APIC", "VMCB Changes for AVIC", "x2AVIC".
        """
        svm = self.operation
        record = None
        match operation:
            case MoveFromControlRegister(number=8, register=register) if svm.virtualizes_task_priority:
                svm.processor.state.gpr[register] = avic_access.read_cr8(svm)
            case MoveToControlRegister(number=8, value=value) if svm.virtualizes_task_priority and not value >> 4:
                avic_access.write_cr8(svm, value)
                record = control_register_trap(svm, 8)
            case ReadMsr(index=index) if svm.avic is not None and avic_access.is_register(svm.avic, index):
                if self._exit_if(avic_access.read_msr(svm, svm.avic, index)):
                    return True
            case WriteMsr(index=index, value=value) if svm.avic is not None and avic_access.is_register(
                svm.avic, index
            ):
                if self._exit_if(avic_access.refuse_write(index, value)):
                    return True
                record = avic_access.write_msr(svm.avic, index, value)
            case _:
                return False
        self._retire(instruction)
        self._exit_if(record)
        return True

    def _ring_doorbell(self, index: int, destination: int) -> bool:
        self.operation.processor.ring_doorbell(destination)
        return True

    def doorbell(self) -> None:
        """Some processor says that an interrupt has been requested in the running guest's backing page."""
        if self.operation.avic is not None:
            self.operation.avic.evaluate()
