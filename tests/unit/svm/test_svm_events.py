"""Exceptions, shutdown and nested page faults; interrupts, NMIs and SMIs between instructions, physical and virtual."""

from __future__ import annotations

import pytest
from svm_machine import CLGI, GUEST_RIP, Machine

from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import Activity, Shadow

INTR, NMI, SMI, INIT, VINTR, SHUTDOWN = 0x60, 0x61, 0x62, 0x63, 0x64, 0x7F
V_IRQ, V_GIF, V_NMI, V_NMI_MASK, V_IGN_TPR = 1 << 8, 1 << 9, 1 << 11, 1 << 12, 1 << 20
V_INTR_MASKING, V_GIF_ENABLE, V_NMI_ENABLE = 1 << 24, 1 << 25, 1 << 26
CONTROL = "virtual interrupt control"


def running(*intercepts: int, **fields: int) -> Machine:
    machine = Machine()
    for number in intercepts:
        machine.intercept(number)
    machine.fields |= {name.replace("_", " "): value for name, value in fields.items()}
    machine.run()
    return machine


@pytest.mark.parametrize(
    ("fault", "info1", "info2"),
    [
        (Fault(Vector.UD), 0, 0),
        (Fault(Vector.GP, 0x53), 0x53, 0),
        (Fault(Vector.PF, 2, 0x1234_5678), 2, 0x1234_5678),
    ],
)
def test_exception_intercept(fault: Fault, info1: int, info2: int) -> None:
    event = Event.from_fault(fault)
    machine = running()
    assert not machine.svm.intercept_event(event, fault)
    machine = running(0x40 + fault.vector, CR2=7)
    assert machine.svm.intercept_event(event, fault)
    assert (machine.stored("EXITCODE"), machine.stored("EXITINTINFO")) == (0x40 + fault.vector, 0)
    assert (machine.stored("EXITINFO1"), machine.stored("EXITINFO2")) == (info1, info2)
    assert (machine.stored("CR2"), machine.stored("nRIP"), machine.stored("RIP")) == (7, 0, GUEST_RIP)


def test_debug_exception_updates_dr6_before_the_exit() -> None:
    machine = running(0x41, DR7=0x2455)
    fault = Fault(Vector.DB, debug=1 << 14)
    assert machine.svm.intercept_event(Event.from_fault(fault), fault)
    assert machine.stored("DR6") == 0xFFFF_4FF0
    assert not machine.stored("DR7") & 0x2000


def test_software_exceptions_have_a_next_rip() -> None:
    machine = running(0x43)
    assert machine.svm.intercept_event(Event(3, EventKind.SOFTWARE_EXCEPTION, instruction_length=1), None)
    assert (machine.stored("EXITCODE"), machine.stored("nRIP")) == (0x43, GUEST_RIP + 1)


def test_bound_has_a_next_rip() -> None:
    machine = running(0x45)
    machine.memory.write(GUEST_RIP, bytes.fromhex("8b07"))  # as long as the BOUND that 64-bit mode lacks
    fault = Fault(Vector.BR)
    assert machine.svm.intercept_event(Event.from_fault(fault), fault)
    assert (machine.stored("EXITCODE"), machine.stored("nRIP")) == (0x45, GUEST_RIP + 2)


@pytest.mark.parametrize("kind", [EventKind.PRIVILEGED_SOFTWARE_EXCEPTION, EventKind.SOFTWARE_INTERRUPT, EventKind.NMI])
def test_events_that_are_no_exceptions(kind: EventKind) -> None:
    machine = running(0x41, 0x42)
    assert not machine.svm.intercept_event(Event(1, kind), None)
    assert not machine.svm.intercept_event(Event(2, kind), None)


@pytest.mark.parametrize(
    ("delivering", "word"),
    [
        (Event(0x21, EventKind.EXTERNAL_INTERRUPT), 0x8000_0021),
        (Event(2, EventKind.NMI), 0x8000_0202),
        (Event(14, error_code=2), 0x2_8000_0B0E),
        (Event(3, EventKind.SOFTWARE_EXCEPTION), 0x8000_0303),
        (Event(0x80, EventKind.SOFTWARE_INTERRUPT), 0x8000_0480),
    ],
)
def test_fault_during_delivery(delivering: Event, word: int) -> None:
    machine = running(0x4D)
    assert machine.svm.delivery_fault(delivering, Fault(Vector.GP, 9))
    assert (machine.stored("EXITCODE"), machine.stored("EXITINFO1"), machine.stored("EXITINTINFO")) == (0x4D, 9, word)


def test_double_fault_is_not_said_to_have_interrupted_anything() -> None:
    """The exception that comes of two is an exception of its own: EXITINTINFO is for the one that is not delivered."""
    machine = running(0x48)
    assert machine.svm.delivery_fault(Event(13, error_code=0), Fault(Vector.DF, 0))
    assert (machine.stored("EXITCODE"), machine.stored("EXITINTINFO")) == (0x48, 0)


def test_shutdown() -> None:
    assert not running().svm.delivery_fault(Event(8, error_code=0), None)
    machine = running(SHUTDOWN)
    assert machine.svm.delivery_fault(Event(8, error_code=0), None)
    assert machine.stored("EXITCODE") == SHUTDOWN


# Intercept, V_INTR_MASKING, IF of the host, IF of the guest; what comes of a pending interrupt.
@pytest.mark.parametrize(
    ("intercept", "masking", "host_if", "guest_if", "outcome"),
    [
        (True, False, False, True, "exit"),
        (True, False, True, False, None),
        (True, True, True, False, "exit"),
        (True, True, False, True, None),
        (False, False, True, True, None),  # delivered by the processor
        (False, True, True, False, "deliver"),
        (False, True, False, True, None),
    ],
)
def test_physical_interrupt(intercept: bool, masking: bool, host_if: bool, guest_if: bool, outcome: str | None) -> None:
    machine = Machine()
    if intercept:
        machine.intercept(INTR)
    machine.fields |= {CONTROL: V_INTR_MASKING if masking else 0, "RFLAGS": 0x202 if guest_if else 2}
    machine.state.rflags |= 0x200 if host_if else 0
    machine.run()
    machine.processor.interrupt = 0x31
    assert machine.svm.interrupts_ignore_if is masking
    assert machine.svm.boundary() is (outcome is not None)
    assert machine.svm.holds_interrupts is ((masking and not host_if) or outcome == "exit")
    if outcome == "exit":
        assert machine.stored("EXITCODE") == INTR
        assert machine.processor.interrupt == 0x31
    elif outcome == "deliver":
        assert [event.vector for event in machine.processor.delivered] == [0x31]


def test_shadow_holds_an_interrupt_by_the_guests_flag() -> None:
    machine = running(INTR, RFLAGS=0x202)
    machine.processor.interrupt = 0x31
    machine.state.shadow = Shadow.STI
    assert not machine.svm.boundary()
    machine.state.shadow = Shadow.NONE
    assert machine.svm.boundary()


def test_nothing_physical_with_gif_clear() -> None:
    machine = running(INTR, NMI, SMI, RFLAGS=0x202)
    machine.execute(CLGI)
    machine.processor.interrupt, machine.processor.nmi = 0x31, True
    machine.svm.smi()
    assert not machine.svm.boundary()
    assert machine.svm.holds_interrupts and machine.svm.holds_nmis and machine.svm.init_is_blocked
    machine.state.gif = True
    assert machine.svm.boundary()
    assert machine.stored("EXITCODE") == SMI
    assert machine.processor.nmi


def test_nmi_stays_pending_at_the_exit() -> None:
    machine = running(NMI)
    machine.processor.nmi = True
    assert machine.svm.boundary()
    assert (machine.stored("EXITCODE"), machine.processor.nmi) == (NMI, True)


def test_blocked_nmi_does_not_exit() -> None:
    machine = running(NMI)
    machine.processor.nmi = machine.state.nmi_blocked = True
    assert not machine.svm.boundary()


def test_smi_of_the_host_waits_for_the_global_interrupt_flag() -> None:
    machine = Machine()
    machine.execute(CLGI)
    machine.svm.smi()
    assert not machine.svm.boundary()
    machine.state.gif = True
    assert machine.svm.boundary()
    assert machine.processor.smis == 1
    machine.intercept(SMI)
    machine.run()
    assert not machine.svm.boundary()


def test_init() -> None:
    machine = running()
    assert not machine.svm.init()
    assert not machine.svm.non_root
    assert machine.processor.mmu.asid == 0
    machine = running(INIT)
    assert machine.svm.init()
    assert machine.stored("EXITCODE") == INIT


@pytest.mark.parametrize(
    ("control", "guest_if", "shadow", "due"),
    [
        (V_IRQ | 0xF << 16, True, False, True),
        (V_IRQ | 0xF << 16, False, False, False),
        (V_IRQ | 0xF << 16, True, True, False),
        (V_IRQ | 0x8 << 16 | 0xA, True, False, False),
        (V_IRQ | 0x8 << 16 | 0x8, True, False, False),
        (V_IRQ | 0x8 << 16 | 0xA | V_IGN_TPR, True, False, True),
        (V_IRQ | 0xF << 16 | V_GIF_ENABLE, True, False, False),
        (V_IRQ | 0xF << 16 | V_GIF_ENABLE | V_GIF, True, False, True),
        (0xF << 16, True, False, False),
    ],
)
def test_virtual_interrupt(control: int, guest_if: bool, shadow: bool, due: bool) -> None:
    for intercept in (False, True):
        machine = Machine()
        if intercept:
            machine.intercept(VINTR)
        flags = 0x202 if guest_if else 2
        machine.fields |= {CONTROL: control | 0xF1 << 32, "RFLAGS": flags, "interrupt state": int(shadow)}
        machine.run()
        assert machine.svm.boundary() is due
        if not due:
            continue
        if intercept:
            assert machine.stored("EXITCODE") == VINTR
            assert machine.stored(CONTROL) & V_IRQ
        else:
            assert machine.processor.delivered == [Event(0xF1, EventKind.EXTERNAL_INTERRUPT)]
            assert not machine.svm.operation.virtual & V_IRQ


def test_physical_interrupt_before_the_virtual_one() -> None:
    machine = running(INTR, VINTR, RFLAGS=0x202, virtual_interrupt_control=V_IRQ | 0xF << 16)
    machine.processor.interrupt = 0x31
    assert machine.svm.boundary()
    assert machine.stored("EXITCODE") == INTR


def test_window_of_a_virtual_interrupt() -> None:
    machine = running(virtual_interrupt_control=V_IRQ | 0xF << 16)
    assert machine.svm.wants_interrupt_window() and not machine.svm.wants_boundary()
    machine.state.rflags |= 0x200
    assert machine.svm.wants_boundary()


def test_virtual_nmi() -> None:
    machine = Machine()
    machine.intercept(NMI)
    machine.fields[CONTROL] = V_NMI_ENABLE | V_NMI | V_NMI_MASK
    machine.run()
    assert machine.state.nmi_blocked and not machine.svm.boundary()
    machine.state.nmi_blocked = False  # IRET
    assert machine.svm.boundary()
    assert machine.processor.delivered == [Event(2, EventKind.NMI)]
    machine.state.nmi_blocked = True
    machine.processor.nmi = True  # a physical one is not held by the guest's blocking
    assert machine.svm.boundary()
    assert machine.stored("EXITCODE") == NMI
    assert machine.stored(CONTROL) == V_NMI_ENABLE | V_NMI_MASK
    assert not machine.state.nmi_blocked


@pytest.mark.parametrize("shadow", [Shadow.STI, Shadow.MOV_SS])
def test_virtual_nmi_waits_for_the_end_of_an_interrupt_shadow(shadow: Shadow) -> None:
    machine = Machine()
    machine.intercept(NMI)
    machine.fields[CONTROL] = V_NMI_ENABLE | V_NMI
    machine.run()
    machine.state.shadow = shadow
    assert not machine.svm.boundary() and not machine.processor.delivered
    machine.state.shadow = Shadow.NONE
    assert machine.svm.boundary()
    assert machine.processor.delivered == [Event(2, EventKind.NMI)]


def test_debug_traps_come_first() -> None:
    machine = running(NMI)
    machine.processor.nmi = True
    machine.state.pending_debug = 1 << 14
    assert not machine.svm.boundary()


def test_halted_guest_is_saved_as_one_that_runs_on() -> None:
    machine = running(NMI)
    machine.state.activity = Activity.HLT
    machine.processor.nmi = True
    assert machine.svm.boundary()
    assert machine.state.activity is Activity.ACTIVE
