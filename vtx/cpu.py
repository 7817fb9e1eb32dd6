"""A processor of the machine: the logical processor with VMX and its pins, INIT and start-up among them.

Spec: SDM Vol. 3, "Multiple-Processor (MP) Initialization"; "Processor State After INIT"; "Other Causes of VM Exits"
(INIT signals, start-up IPIs).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Final

from attrs import fields

from vtx import pc_map
from vtx.board import Socket
from vtx.devices.apic_registers import ApicBase
from vtx.x86 import smm
from vtx.x86.msrs import bind_clock, tsc_of
from vtx.x86.processor import LogicalProcessor
from vtx.x86.second_level import IdentitySecondLevel
from vtx.x86.state import Activity, CpuState, Cr0, Gpr
from vtx.x86.timing import EVENT_TICKS

if TYPE_CHECKING:
    from vtx.machine import Machine
    from vtx.svm import Svm
    from vtx.vmx import Vmx
    from vtx.x86.mmu import Mmu

_CACHE_BITS: Final = int(Cr0.CD | Cr0.NW)
_KEPT_BY_INIT: Final = frozenset(
    {
        *("fpu", "xcr0", "pkru", "kernel_gs_base", "debugctl", "last_branch", "smbase"),
        *("fred_config", "fred_stack_levels", "fred_rsp", "fred_ssp"),
    }
)


class Cpu(LogicalProcessor):
    """One of the machine's processors. ``vmx`` is its virtualization extension, ``socket`` its place on the board."""

    vmx: Vmx
    svm: Svm
    socket: Socket
    machine: Machine
    synchronous_ports = frozenset((pc_map.APM_PORT,))

    def attach(self, machine: Machine, socket: Socket) -> None:
        """Put the processor into its socket. All but the bootstrap processor wait for a start-up IPI."""
        self.machine, self.socket = machine, socket
        socket.insert(self.profile, self.index, self, self, self.msrs)
        bind_clock(self.msrs, self.observed_time, self._tsc_moved)
        # A machine has one of the extensions, and each takes a while to import.
        if self.profile.is_amd:
            from vtx.svm import Svm  # noqa: PLC0415

            self.svm = Svm(self)
            self.virtualization = self.svm
        else:
            from vtx.vmx import Vmx  # noqa: PLC0415

            self.vmx = Vmx(self)
            self.virtualization = self.vmx
        if self.index:
            self.state.activity = Activity.WAIT_FOR_SIPI

    def observed_time(self) -> int:
        """`now`, when software looks: a processor that is behind what any has seen catches up."""
        behind = self.machine.now() - self.now()
        if behind > 0:
            self.charge(behind)
        return self.now()

    def _tsc_moved(self) -> None:
        """IA32_TSC_ADJUST changed, and with it the tick at which a TSC deadline is reached."""
        self.socket.apic.set_tsc_offset(tsc_of(self.msrs, 0))

    def all_mmus(self) -> Iterable[Mmu]:
        """Those of all processors of the machine."""
        return (cpu.mmu for cpu in self.machine.cpus)

    # Pins.

    def send_interrupt(self, vector: int, destination: int) -> None:
        """Have the local APIC send a fixed interrupt to the processor whose APIC ID is ``destination``, or to all."""
        apic = self.socket.apic
        apic.send(vector, apic.physical_destination(destination))

    def ring_doorbell(self, destination: int) -> None:
        """Signal the processor whose APIC ID is ``destination``: its guest's backing page has a new request."""
        for cpu in self.machine.cpus:
            if cpu.socket.apic.apic_id == destination:
                cpu.svm.doorbell()
                cpu._signalled()

    def nmi(self) -> None:
        """A non-maskable interrupt, perhaps by a store of the running code: no run was planned for it."""
        super().nmi()
        extension = self.virtualization
        if not self.state.nmi_blocked or (extension is not None and extension.non_root):
            self._signalled()

    def smi(self) -> None:
        """A system-management interrupt: latched, and taken at the next boundary at which it is not blocked."""
        self.smi_pending = True
        self._signalled()

    def interrupt_requested(self) -> None:
        """The local APIC has an interrupt; a run of this processor is planned anew after what can cause one."""
        if self.machine.running is not self:
            self.machine.scheduler.signal(self.index)

    def _signalled(self) -> None:
        """Something arrived that no run was planned for."""
        if self.machine.running is self:
            self.engine.request_stop()
        else:
            self.machine.scheduler.signal(self.index)

    def local_apic_moved(self) -> None:
        """The page of the local APIC is elsewhere, or hidden."""
        self.socket.board.local_apic_moved()
        self.mmu.flush_engine(None)

    def init(self) -> None:
        """An INIT signal: latched, and taken at the next boundary at which it is not blocked."""
        self.init_pending = True
        self._signalled()

    def start_up(self, vector: int) -> None:
        """A start-up IPI, which only a processor that waits for one takes."""
        self._take_init()
        state = self.state
        if state.activity is not Activity.WAIT_FOR_SIPI:
            return
        extension = self.virtualization
        if extension is not None and extension.non_root and extension.start_up(vector):
            self.reload = True
        else:
            state.cs.selector, state.cs.base, state.rip = vector << 8, vector << 12, 0
            state.activity = Activity.ACTIVE
            self.changed_system_state()
        self._signalled()

    @property
    def awake(self) -> bool:
        """Whether it executes instructions or may take an event that is pending."""
        return (
            super().awake
            or (self.smi_pending and not self._smi_is_blocked())
            or (self.init_pending and not self._init_is_blocked())
        )

    @property
    def finished(self) -> bool:
        """Whether it must not run any more: for good, or before the machine is reset or booted again."""
        return super().finished or self.machine.power.wanted

    def _init_is_blocked(self) -> bool:
        extension = self.virtualization
        return self.state.smm is not None or (extension is not None and extension.init_is_blocked)

    def _smi_is_blocked(self) -> bool:
        state = self.state
        waits = bool(state.shadow) or not state.gif or state.activity is Activity.WAIT_FOR_SIPI
        return waits or state.smm is not None

    def enter_smm(self) -> None:
        """Deliver a system-management interrupt now."""
        self.monitor = None
        smm.enter(self)
        self.charge(EVENT_TICKS)

    def _take_signal(self) -> bool:
        if self.smi_pending and not self._smi_is_blocked():
            self.smi_pending = False
            if not self.profile.is_amd or not self.svm.non_root:
                self.enter_smm()
                return True
            self.svm.smi()  # whose boundary says whether it is intercepted
        return self._take_init()

    def _take_init(self) -> bool:
        if not self.init_pending or self._init_is_blocked():
            return False
        self.init_pending = False
        extension = self.virtualization
        if extension is not None and extension.non_root and extension.init():
            self.reload = True
        else:
            self._reset_by_init()
        return True

    def _reset_by_init(self) -> None:
        """INIT leaves the caches' enables, the x87/SSE state and the MSRs alone, and resets the rest."""
        state = self.state
        cache_bits = state.cr0 & _CACHE_BITS
        self.clear_registers(_KEPT_BY_INIT)
        if self.virtualization is not None and self.virtualization.non_root:
            self._leave_guest()
        state.cr0 = state.cr0 & ~_CACHE_BITS | cache_bits
        self.socket.apic.init_reset()
        self._begin()

    def reset(self) -> None:
        """As after power-up, but that the time-stamp counter goes on."""
        self.acknowledge_nmi()
        self.init_pending = self.smi_pending = False
        self.halt = None
        self.clear_registers()
        engine = self.engine
        engine.resume(engine.elapsed(), engine.instructions(), engine.power_up_fpu())
        self.msrs.reset()
        self.socket.reset()
        self._tsc_moved()
        self._leave_guest()
        self.mmu.tlb.clear()
        self.mmu.flush_engine(None)
        self._begin()

    def _leave_guest(self) -> None:
        if self.virtualization is not None:
            self.virtualization.reset()
        self.mmu.reserved_page = None
        self.mmu.vm_transition(self.state, IdentitySecondLevel(), 0, flush=True)

    def clear_registers(self, kept: Container[str] = ()) -> None:
        """Put the registers but those of the names ``kept`` into their state after power-up."""
        fresh = CpuState()
        for field in fields(CpuState):
            if field.name not in kept:
                setattr(self.state, field.name, getattr(fresh, field.name))

    def _begin(self) -> None:
        """The bootstrap processor starts at the reset vector, the others wait for a start-up IPI."""
        self.state.gpr[Gpr.RDX] = self.profile.signature
        bootstrap = self.socket.apic.state.apic_base & ApicBase.BSP
        self.state.activity = Activity.ACTIVE if bootstrap else Activity.WAIT_FOR_SIPI
        self.load_control_state()
