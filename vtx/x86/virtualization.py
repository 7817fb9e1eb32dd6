"""The seam between the processor and a virtualization extension (VMX or SVM).

The processor executes instructions and delivers events; in VMX non-root operation (SVM guest mode) it asks the
extension before every sensitive step. Each question that can end in a VM exit returns True when it did: by then the
extension has saved the guest, loaded the host, and the processor simply goes on with the new state.

Spec: SDM Vol. 3, "VMX Non-Root Operation"; APM Vol. 2, "Secure Virtual Machine".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from vtx.x86.access import Operand
    from vtx.x86.decode import Instruction
    from vtx.x86.delivery import Event
    from vtx.x86.memory import PhysicalMemory
    from vtx.x86.mmu import Mmu
    from vtx.x86.monitor import Monitor
    from vtx.x86.msrs import MsrFile
    from vtx.x86.operations import Operation
    from vtx.x86.outcome import Fault
    from vtx.x86.profile import Profile
    from vtx.x86.second_level import ReservedPageAccess, SecondLevelFault, SubPageWrite
    from vtx.x86.state import CpuState


class Processor(Protocol):
    """What an extension may use of the processor it extends."""

    index: int
    state: CpuState
    memory: PhysicalMemory
    mmu: Mmu
    msrs: MsrFile
    profile: Profile
    monitor: Monitor | None
    """What MONITOR has armed."""

    def tsc(self) -> int:
        """The time-stamp counter without any guest offset, exact to the current instruction."""
        ...

    def charge(self, ticks: int) -> None:
        """Let time pass without executing code."""
        ...

    def load_control_state(self) -> None:
        """Tell the processor that CR0, CR3, CR4, EFER or segments changed behind its back."""
        ...

    def changed_system_state(self) -> None:
        """Tell the processor that segments, tables or control registers changed, of which its MMU knows already."""
        ...

    def interrupt_pending(self) -> bool:
        """Whether the local APIC or PIC has an interrupt to deliver, ignoring RFLAGS.IF."""
        ...

    def acknowledge_interrupt(self) -> int:
        """Acknowledge the highest-priority pending interrupt and return its vector."""
        ...

    def end_of_interrupt(self) -> None:
        """Dismiss the interrupt acknowledged last from the local APIC, as writing its EOI register does."""
        ...

    def send_interrupt(self, vector: int, destination: int) -> None:
        """Have the local APIC send a fixed interrupt to the processor whose APIC ID is ``destination``."""
        ...

    def ring_doorbell(self, destination: int) -> None:
        """Signal the processor whose APIC ID is ``destination``, if there is one: an AVIC doorbell."""
        ...

    def nmi_pending(self) -> bool:
        """Whether a non-maskable interrupt waits to be delivered, ignoring blocking."""
        ...

    def acknowledge_nmi(self) -> None:
        """Take the pending non-maskable interrupt: it is being delivered or has caused a VM exit."""
        ...

    def deliver(self, event: Event) -> None:
        """Deliver ``event`` through the IDT now, with all that may happen on the way: further exceptions, VM exits."""
        ...

    def enter_smm(self) -> None:
        """Deliver a system-management interrupt now."""
        ...

    def fetch(self) -> Instruction | None:
        """The instruction at RIP, None if its bytes are none; raises `InstructionAborted` with a fault of the fetch."""
        ...

    def task_priority(self) -> int:
        """CR8, 0 to 15."""
        ...

    def set_task_priority(self, value: int) -> None:
        """Write CR8."""
        ...

    def shut_down(self, reason: str) -> None:
        """Enter the shutdown state (triple fault, VMX abort) for ``reason``."""
        ...


@frozen
class SmmSuspension:
    """VMX operation (guest mode) interrupted by an SMI.

    ``state`` is the extension's own; ``shown`` is what the save-state map says of the guest, by the names of its rows.
    """

    state: tuple[int, ...]
    shown: Mapping[str, int]


class RefusedInstruction(Protocol):
    """The instruction at RIP, which the engine began to execute and whose ``access`` the MMU refused."""

    @property
    def access(self) -> ReservedPageAccess | SubPageWrite:
        """The access."""
        ...

    def operands(self) -> list[Operand]:
        """The memory operands of the instruction, explicit and implicit."""
        ...

    def execute(self) -> bool:
        """Let the engine execute it once more, under the translations of this moment; whether it completed."""
        ...


class Virtualization(Protocol):
    """What the processor asks its virtualization extension."""

    @property
    def non_root(self) -> bool:
        """VMX non-root operation or SVM guest mode."""
        ...

    intercepts_flow: bool
    """Whether INT n, INT1, IRET, PUSHF and POPF can be intercepted: `intercept` is asked about them only if so."""

    @property
    def holds_interrupts(self) -> bool:
        """Whether the processor holds physical interrupts back, whatever RFLAGS.IF says.

        In VMX in the shutdown state, which VM entry can bring about; in SVM while the global interrupt flag is clear,
        or where virtual interrupts replace them.
        """
        ...

    @property
    def interrupts_ignore_if(self) -> bool:
        """Whether physical interrupts that are not held back are taken whatever RFLAGS.IF says."""
        ...

    @property
    def holds_nmis(self) -> bool:
        """The same for physical NMIs."""
        ...

    @property
    def init_is_blocked(self) -> bool:
        """Whether an INIT signal stays pending."""
        ...

    def init(self) -> bool:
        """Non-root only: an INIT signal that is not blocked; whether it was taken care of."""
        ...

    def reset(self) -> None:
        """The processor is being reset: nothing of the extension's state stays."""
        ...

    def start_up(self, vector: int) -> bool:
        """Non-root only: a start-up IPI for a processor that waits for one; whether it was taken care of."""
        ...

    iret_unblocked_nmi: bool
    """For the processor to set when it executes an IRET that ends blocking by NMI: exits due to its faults say so.

    The extension clears it at the next instruction boundary.
    """

    def iret_unblocks_nmi(self) -> bool:
        """Non-root only: whether IRET ends blocking by NMI."""
        ...

    @property
    def transitions(self) -> int:
        """How many VM entries and VM exits there have been; unchanged after `execute` means an ordinary instruction."""
        ...

    @property
    def mnemonics(self) -> Collection[int]:
        """The extension's own instructions: those that `execute` knows, by iced mnemonic number."""
        ...

    def execute(self, instruction: Instruction) -> bool:
        """Execute one of the extension's own instructions, in any mode, and commit RIP, RFLAGS or a VM exit.

        False if the instruction is not the extension's (the processor then raises #UD). Faults are raised as
        `InstructionAborted`.
        """
        ...

    def shortcut(self, instruction: Instruction) -> Callable[[], bool] | None:
        """A quicker way to `execute` this very instruction again and again, if there is one.

        The function does what `execute` would do and returns True, or returns False and does nothing. It never causes
        a fault, a VM entry or a VM exit, and what it does goes unobserved.
        """
        ...

    def is_disabled(self, instruction: Instruction) -> bool:
        """Non-root only: whether controls make ``instruction`` an invalid opcode (RDTSCP, INVPCID, XSAVES, INVLPGB...).

        Comes before the instruction's own faults.
        """
        ...

    def intercept(self, operation: Operation, instruction: Instruction) -> bool:
        """Non-root only: whether ``operation`` was taken care of: it caused a VM exit, or was virtualized and retired.

        Called after the instruction's own faults.
        """
        ...

    def control_register_written(self, number: int) -> None:
        """Non-root only: an instruction has written CR``number`` and is complete; performs the exit that traps it."""
        ...

    def efer_written(self) -> None:
        """The same for EFER."""
        ...

    def intercept_event(self, event: Event, fault: Fault | None) -> bool:
        """Non-root only: whether the exception (or INT3, INTO, INT1) about to be delivered caused a VM exit.

        ``fault`` carries the CR2 or DR6 payload of a hardware exception.
        """
        ...

    def delivery_fault(self, delivering: Event, fault: Fault | None) -> bool:
        """Non-root only: an exception arose while ``delivering``; record IDT-vectoring information.

        ``fault`` is the second exception (already combined into a double fault if so) or None for a triple fault.
        Returns whether a VM exit happened.
        """
        ...

    def second_level_fault(self, fault: SecondLevelFault, delivering: Event | None) -> bool:
        """Non-root only: a second-level translation failed; always a VM exit in VMX without #VE."""
        ...

    def virtualize_access(self, refused: RefusedInstruction) -> SecondLevelFault | None:
        """Non-root only: an instruction accessed the MMU's reserved page, or writes where its exact bytes matter.

        Executes it if that is allowed, or exits; or gives the fault that it comes to.
        """
        ...

    def boundary(self) -> bool:
        """Called before each instruction that follows an event; performs the highest-priority pending VM exit.

        Virtual interrupts are delivered here too. Returns whether anything was done.

        Covers, in the manual's order, pending trap exits: MTF, preemption timer, NMI window, interrupt window,
        NMI exiting, external-interrupt exiting.
        """
        ...

    def next_deadline(self) -> int | None:
        """Absolute TSC at which `boundary` must be called again (preemption timer), or None."""
        ...

    def wants_boundary(self) -> bool:
        """Whether `boundary` must be called exactly once before every instruction (monitor trap flag and the like)."""
        ...

    def wants_interrupt_window(self) -> bool:
        """Whether `boundary` must be called as soon as RFLAGS.IF is 1 (interrupt-window exiting)."""
        ...

    def enter_smm(self) -> SmmSuspension | None:
        """An SMI is being delivered: leave VMX operation (guest mode); None if outside it, else what brings it back."""
        ...

    def leave_smm(self, suspended: tuple[int, ...]) -> None:
        """RSM has restored the registers: return to VMX operation (guest mode)."""
        ...

    def read_control_register(self, number: int) -> int:
        """Non-root only: what MOV from CR0 or CR4, or SMSW, sees through the guest/host mask and read shadow."""
        ...

    def merge_control_register(self, number: int, value: int) -> int:
        """Non-root only: the value a non-exiting guest write gives CR0 or CR4 (masked bits keep the host's)."""
        ...

    def control_register_fixed_ok(self, number: int, value: int) -> bool:
        """Whether VMX operation allows ``value`` in CR0 or CR4 (IA32_VMX_CR0_FIXED0 and companions)."""
        ...

    def guest_tsc(self, tsc: int) -> int:
        """What RDTSC returns for the raw counter ``tsc`` (TSC offsetting and scaling)."""
        ...
