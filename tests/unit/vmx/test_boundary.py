"""VM exits between instructions, and their priorities."""

from __future__ import annotations

import pytest
from vmx_machine import GUEST_RIP, PAGE_TABLES, FakeProcessor, launch, make_vmx, prepare, vmx_pc

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vtx.vmx import Vmx
from vtx.vmx.outcome import VmEntered
from vtx.x86.state import Activity, Shadow

VALID = 1 << 31
IF = 1 << 9


def reason_at_boundary(vmx: Vmx) -> Reason | None:
    vmcs = vmx.current_vmcs
    assert vmcs is not None
    return Reason(vmcs[f.EXIT_REASON]) if vmx.boundary() else None


class TestMonitorTrapFlag:
    def test_exits_after_one_instruction(self) -> None:
        _, vmx, _ = launch(c.MONITOR_TRAP_FLAG)
        assert vmx.wants_boundary()
        assert reason_at_boundary(vmx) is None
        assert reason_at_boundary(vmx) == Reason.MONITOR_TRAP_FLAG
        assert not vmx.wants_boundary()
        assert not vmx.boundary()

    def test_injected_event__exits_before_the_first_instruction(self) -> None:
        fields = {f.VM_ENTRY_INTERRUPTION_INFORMATION: VALID | 3 << 8 | 6}
        processor, vmx, _ = launch(c.MONITOR_TRAP_FLAG, fields=fields)
        assert len(processor.delivered) == 1
        assert reason_at_boundary(vmx) == Reason.MONITOR_TRAP_FLAG

    @pytest.mark.parametrize("controls", [(), (c.MONITOR_TRAP_FLAG,)])
    def test_injected_pending_exit__needs_no_control(self, controls: tuple[Control, ...]) -> None:
        processor, vmx, _ = launch(*controls, fields={f.VM_ENTRY_INTERRUPTION_INFORMATION: VALID | 7 << 8})
        assert not processor.delivered
        assert vmx.wants_boundary()
        assert reason_at_boundary(vmx) == Reason.MONITOR_TRAP_FLAG

    def test_halted__waits_for_the_event_that_wakes(self) -> None:
        processor, vmx, _ = launch(c.MONITOR_TRAP_FLAG, fields={f.GUEST_ACTIVITY_STATE: 1})
        assert not vmx.boundary()
        assert not vmx.boundary()
        processor.state.activity = Activity.ACTIVE
        assert not vmx.boundary()
        assert reason_at_boundary(vmx) == Reason.MONITOR_TRAP_FLAG

    def test_other_exit__disarms(self) -> None:
        _, vmx, vmcs = launch(c.MONITOR_TRAP_FLAG)
        vmx.boundary()
        vmx.vmcall()
        vmx.vmwrite(
            f.PRIMARY_PROCESSOR_BASED_CONTROLS,
            vmcs[f.PRIMARY_PROCESSOR_BASED_CONTROLS] & ~c.MONITOR_TRAP_FLAG.mask,
        )
        vmx.vmresume()
        assert not vmx.wants_boundary()
        assert not vmx.boundary()


class TestPreemptionTimer:
    CONTROLS = (c.ACTIVATE_VMX_PREEMPTION_TIMER,)

    @pytest.mark.parametrize("value", [0, 1, 1000])
    def test_expires_on_its_tick(self, value: int) -> None:
        processor, vmx = make_vmx()
        processor.ticks = 12345
        prepare(vmx, *self.CONTROLS, fields={f.VMX_PREEMPTION_TIMER_VALUE: value})
        vmx.vmlaunch()
        deadline = vmx.next_deadline()
        assert deadline == 12345 + value
        processor.ticks = deadline - 1
        if value:
            assert not vmx.boundary()
        processor.ticks = deadline
        assert reason_at_boundary(vmx) == Reason.PREEMPTION_TIMER_EXPIRED
        assert vmx.next_deadline() is None

    @pytest.mark.parametrize(
        ("activity", "exits"), [(Activity.HLT, True), (Activity.SHUTDOWN, True), (Activity.WAIT_FOR_SIPI, False)]
    )
    def test_inactive_states(self, activity: Activity, exits: bool) -> None:
        fields = {f.VMX_PREEMPTION_TIMER_VALUE: 0, f.GUEST_ACTIVITY_STATE: activity}
        _, vmx, _ = launch(*self.CONTROLS, fields=fields)
        assert vmx.boundary() == exits

    def test_without_the_control__no_deadline(self) -> None:
        _, vmx, _ = launch(fields={f.VMX_PREEMPTION_TIMER_VALUE: 0})
        assert vmx.next_deadline() is None
        assert not vmx.boundary()


@pytest.mark.parametrize("controls", [(), (c.EXTERNAL_INTERRUPT_EXITING,)], ids=["delivered", "exiting"])
@pytest.mark.parametrize("activity", [Activity.HLT, Activity.SHUTDOWN])
def test_external_interrupt__wakes_from_hlt_alone(controls: tuple[Control, ...], activity: Activity) -> None:
    machine = vmx_pc()
    cpu = machine.cpu
    fields = {f.GUEST_CR3: PAGE_TABLES, f.GUEST_RFLAGS: 0x202, f.GUEST_ACTIVITY_STATE: activity}
    prepare(cpu.vmx, *controls, fields=fields)
    assert cpu.vmx.vmlaunch() == VmEntered(), cpu.vmx.last_failure
    cpu.socket.apic.set_virtual_wire_mode()
    cpu.socket.apic.send(0x41, cpu.socket.apic.apic_id)
    assert cpu.awake == (activity is Activity.HLT)
    cpu.run_once()
    if activity is Activity.HLT:
        assert cpu.state.activity is Activity.ACTIVE
    else:
        assert (cpu.vmx.non_root, cpu.state.activity, cpu.state.rip) == (True, Activity.SHUTDOWN, GUEST_RIP)
        assert cpu.platform.interrupt_pending()


@pytest.mark.parametrize(
    ("rflags", "shadow", "activity", "opens"),
    [
        (IF, Shadow.NONE, Activity.ACTIVE, True),
        (0, Shadow.NONE, Activity.ACTIVE, False),
        (IF, Shadow.STI, Activity.ACTIVE, False),
        (IF, Shadow.MOV_SS, Activity.ACTIVE, False),
        (IF, Shadow.NONE, Activity.HLT, True),
        (IF, Shadow.NONE, Activity.SHUTDOWN, False),
        (IF, Shadow.NONE, Activity.WAIT_FOR_SIPI, False),
    ],
)
def test_interrupt_window(rflags: int, shadow: Shadow, activity: Activity, opens: bool) -> None:
    processor, vmx, _ = launch(c.INTERRUPT_WINDOW_EXITING)
    state = processor.state
    state.rflags, state.shadow, state.activity = 2 | rflags, shadow, activity
    assert vmx.wants_interrupt_window()
    assert reason_at_boundary(vmx) == (Reason.INTERRUPT_WINDOW if opens else None)


@pytest.mark.parametrize(
    ("blocked", "shadow", "activity", "opens"),
    [
        (False, Shadow.NONE, Activity.ACTIVE, True),
        (True, Shadow.NONE, Activity.ACTIVE, False),
        (False, Shadow.MOV_SS, Activity.ACTIVE, False),
        (False, Shadow.NONE, Activity.HLT, True),
        (False, Shadow.NONE, Activity.SHUTDOWN, True),
        (False, Shadow.NONE, Activity.WAIT_FOR_SIPI, False),
    ],
)
def test_nmi_window(blocked: bool, shadow: Shadow, activity: Activity, opens: bool) -> None:
    processor, vmx, _ = launch(c.NMI_EXITING, c.VIRTUAL_NMIS, c.NMI_WINDOW_EXITING)
    state = processor.state
    state.nmi_blocked, state.shadow, state.activity = blocked, shadow, activity
    assert reason_at_boundary(vmx) == (Reason.NMI_WINDOW if opens else None)


class TestNmi:
    def test_exits(self) -> None:
        processor, vmx, vmcs = launch(c.NMI_EXITING)
        processor.nmi = True
        assert reason_at_boundary(vmx) == Reason.EXCEPTION_OR_NMI
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == VALID | 2 << 8 | 2
        assert not processor.nmi
        assert processor.state.nmi_blocked

    def test_without_exiting__is_the_processors(self) -> None:
        processor, vmx, _ = launch()
        processor.nmi = True
        assert not vmx.boundary()
        assert processor.nmi

    @pytest.mark.parametrize(("virtual", "exits"), [(False, False), (True, True)])
    def test_blocking__is_the_guests_own_with_virtual_nmis(self, virtual: bool, exits: bool) -> None:
        controls = (c.NMI_EXITING, c.VIRTUAL_NMIS) if virtual else (c.NMI_EXITING,)
        processor, vmx, _ = launch(*controls, fields={f.GUEST_INTERRUPTIBILITY_STATE: 8})
        processor.nmi = True
        assert vmx.boundary() == exits


class TestExternalInterrupt:
    @pytest.mark.parametrize("rflags", [0, IF])
    @pytest.mark.parametrize("acknowledge", [True, False])
    def test_exits_whatever_if_says(self, rflags: int, acknowledge: bool) -> None:
        controls = (c.EXTERNAL_INTERRUPT_EXITING,)
        if acknowledge:
            controls += (c.EXIT_ACKNOWLEDGE_INTERRUPT_ON_EXIT,)
        processor, vmx, vmcs = launch(*controls)
        processor.state.rflags = 2 | rflags
        processor.interrupt = 0x41
        assert vmx.interrupts_ignore_if
        assert reason_at_boundary(vmx) == Reason.EXTERNAL_INTERRUPT
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == (VALID | 0x41 if acknowledge else 0)
        assert (processor.interrupt is None) == acknowledge

    def test_without_exiting__is_the_processors(self) -> None:
        processor, vmx, _ = launch()
        processor.interrupt = 0x41
        processor.state.rflags |= IF
        assert not vmx.interrupts_ignore_if
        assert not vmx.boundary()
        assert processor.interrupt == 0x41

    def test_blocked_by_mov_ss(self) -> None:
        processor, vmx, _ = launch(c.EXTERNAL_INTERRUPT_EXITING)
        processor.interrupt = 0x41
        processor.state.shadow = Shadow.MOV_SS
        assert not vmx.boundary()


def everything_pending() -> tuple[FakeProcessor, Vmx]:
    processor, vmx, _ = launch(
        c.MONITOR_TRAP_FLAG,
        c.ACTIVATE_VMX_PREEMPTION_TIMER,
        c.NMI_EXITING,
        c.VIRTUAL_NMIS,
        c.NMI_WINDOW_EXITING,
        c.INTERRUPT_WINDOW_EXITING,
        c.EXTERNAL_INTERRUPT_EXITING,
        fields={f.VMX_PREEMPTION_TIMER_VALUE: 10, f.GUEST_INTERRUPTIBILITY_STATE: 8},
    )
    vmx.boundary()  # the flag is armed for the next boundary
    processor.ticks += 10
    processor.nmi = True
    processor.interrupt = 0x41
    processor.state.nmi_blocked = False
    processor.state.rflags |= IF
    return processor, vmx


def test_priorities() -> None:
    """Each exit removes its own cause; the next one in the manual's order follows."""
    processor, vmx = everything_pending()
    operation = vmx.operation
    seen = []
    removals = {
        Reason.MONITOR_TRAP_FLAG: c.MONITOR_TRAP_FLAG,
        Reason.PREEMPTION_TIMER_EXPIRED: c.ACTIVATE_VMX_PREEMPTION_TIMER,
        Reason.NMI_WINDOW: c.NMI_WINDOW_EXITING,
        Reason.INTERRUPT_WINDOW: c.INTERRUPT_WINDOW_EXITING,
    }
    while (reason := reason_at_boundary(vmx)) is not None:
        seen.append(reason)
        vmcs = operation.current_vmcs
        control = removals.get(reason)
        for word, field in (
            (c.ControlWord.PIN_BASED, f.PIN_BASED_CONTROLS),
            (c.ControlWord.PRIMARY, f.PRIMARY_PROCESSOR_BASED_CONTROLS),
        ):
            if control is not None and control.word is word:
                vmx.vmwrite(field, vmcs[field] & ~control.mask)
        if reason is Reason.EXTERNAL_INTERRUPT:
            processor.interrupt = None
        vmx.vmwrite(f.VMX_PREEMPTION_TIMER_VALUE, 0)
        vmx.vmresume()
        if operation.trap_flag:
            vmx.boundary()
    assert seen == [
        Reason.MONITOR_TRAP_FLAG,
        Reason.PREEMPTION_TIMER_EXPIRED,
        Reason.NMI_WINDOW,
        Reason.EXCEPTION_OR_NMI,
        Reason.INTERRUPT_WINDOW,
        Reason.EXTERNAL_INTERRUPT,
    ]


def test_debug_trap__comes_before_the_timer_but_after_the_trap_flag() -> None:
    processor, vmx, _ = launch(c.ACTIVATE_VMX_PREEMPTION_TIMER, fields={f.VMX_PREEMPTION_TIMER_VALUE: 0})
    processor.state.pending_debug = 1 << 14
    assert not vmx.boundary()
    processor.state.pending_debug = 0
    assert vmx.boundary()
    processor, vmx, _ = launch(c.MONITOR_TRAP_FLAG)
    vmx.boundary()
    processor.state.pending_debug = 1 << 14
    assert reason_at_boundary(vmx) == Reason.MONITOR_TRAP_FLAG


def test_in_root__nothing_happens() -> None:
    processor, vmx = make_vmx()
    prepare(vmx, c.EXTERNAL_INTERRUPT_EXITING)
    processor.interrupt = 0x41
    assert not vmx.boundary()
    assert not vmx.wants_boundary()
    assert not vmx.wants_interrupt_window()
