"""VM exits of events and during their delivery: interruption and IDT-vectoring information."""

from __future__ import annotations

import pytest
from vmx_machine import launch

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.vmx.ept import EptMisconfiguration, EptViolation, PageModificationLogFull
from vtx.x86.decode import decode
from vtx.x86.event import Event, EventKind
from vtx.x86.operations import TaskSwitch, TaskSwitchSource
from vtx.x86.outcome import Fault, NotModelled, Vector
from vtx.x86.second_level import SecondLevelFault

VALID, CODE = 1 << 31, 1 << 11
RF = 1 << 16
NMI_UNBLOCKING = 1 << 12
PHYSICAL, LINEAR = GuestPhysicalAddress(0x1234_5678), LinearAddress(0x7FFF_0123)

INT3 = Event(3, EventKind.SOFTWARE_EXCEPTION, instruction_length=1)
INTO = Event(4, EventKind.SOFTWARE_EXCEPTION, instruction_length=1)
INT1 = Event(1, EventKind.PRIVILEGED_SOFTWARE_EXCEPTION, instruction_length=1)
INT_80 = Event(0x80, EventKind.SOFTWARE_INTERRUPT, instruction_length=2)
INTERRUPT = Event(0x41, EventKind.EXTERNAL_INTERRUPT)
NMI = Event(2, EventKind.NMI)


@pytest.mark.parametrize(
    ("event", "word", "length", "rf"),
    [
        (Event(6), VALID | 3 << 8 | 6, None, RF),
        (Event(13, error_code=0x18), VALID | CODE | 3 << 8 | 13, None, RF),
        (INT3, VALID | 6 << 8 | 3, 1, 0),
        (INTO, VALID | 6 << 8 | 4, 1, 0),
        (INT1, VALID | 5 << 8 | 1, 1, 0),
    ],
)
def test_exceptions(event: Event, word: int, length: int | None, rf: int) -> None:
    _, vmx, vmcs = launch(fields={f.EXCEPTION_BITMAP: 1 << event.vector})
    vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] = 0x77
    assert vmx.intercept_event(event, None)
    assert vmcs[f.EXIT_REASON] == Reason.EXCEPTION_OR_NMI
    assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == word
    assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == (length or 0x77)
    assert vmcs[f.GUEST_RFLAGS] == 2 | rf
    assert vmcs[f.IDT_VECTORING_INFORMATION] == 0
    if event.error_code is not None:
        assert vmcs[f.VM_EXIT_INTERRUPTION_ERROR_CODE] == event.error_code


@pytest.mark.parametrize("event", [INT_80, INTERRUPT, NMI])
def test_events_that_are_no_exceptions__are_not_the_bitmaps(event: Event) -> None:
    _, vmx, _ = launch(fields={f.EXCEPTION_BITMAP: 0xFFFF_FFFF})
    assert not vmx.intercept_event(event, None)


def test_not_selected__no_exit() -> None:
    _, vmx, _ = launch(fields={f.EXCEPTION_BITMAP: 0xFFFF_FFFF & ~(1 << 6)})
    assert not vmx.intercept_event(Event(6), None)


def test_debug_exception__reports_its_causes_and_leaves_dr6() -> None:
    processor, vmx, vmcs = launch(fields={f.EXCEPTION_BITMAP: 2})
    fault = Fault(Vector.DB, debug=1 << 14 | 1)
    assert vmx.intercept_event(Event.from_fault(fault), fault)
    assert vmcs[f.EXIT_QUALIFICATION] == 1 << 14 | 1
    assert processor.state.dr6 == 0xFFFF_0FF0
    assert vmcs[f.GUEST_RFLAGS] == 2  # a trap leaves RF alone


def test_int1__reports_the_data_breakpoints_held_back_until_it() -> None:
    processor, vmx, vmcs = launch(fields={f.EXCEPTION_BITMAP: 2})
    assert vmx.intercept_event(Event(1, EventKind.PRIVILEGED_SOFTWARE_EXCEPTION, instruction_length=1, debug=5), None)
    assert (vmcs[f.EXIT_QUALIFICATION], processor.state.dr6) == (5, 0xFFFF_0FF0)


def test_page_fault__reports_its_address_and_leaves_cr2() -> None:
    processor, vmx, vmcs = launch(fields={f.EXCEPTION_BITMAP: 1 << 14})
    fault = Fault(Vector.PF, 6, 0xFFFF_8000_1234_5678)
    assert vmx.intercept_event(Event.from_fault(fault), fault)
    assert vmcs[f.EXIT_QUALIFICATION] == 0xFFFF_8000_1234_5678
    assert vmcs[f.VM_EXIT_INTERRUPTION_ERROR_CODE] == 6
    assert processor.state.cr2 == 0


@pytest.mark.parametrize(
    ("delivering", "word", "length"),
    [
        (INTERRUPT, VALID | 0x41, None),
        (NMI, VALID | 2 << 8 | 2, None),
        (Event(13, error_code=8), VALID | CODE | 3 << 8 | 13, None),
        (INT_80, VALID | 4 << 8 | 0x80, 2),
        (INT3, VALID | 6 << 8 | 3, 1),
        (INT1, VALID | 5 << 8 | 1, 1),
    ],
)
class TestDuringDelivery:
    def test_exception(self, delivering: Event, word: int, length: int | None) -> None:
        _, vmx, vmcs = launch(fields={f.EXCEPTION_BITMAP: 1 << 11})
        vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] = 0x77
        assert vmx.delivery_fault(delivering, Fault(Vector.NP, 0x1A))
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == VALID | CODE | 3 << 8 | 11
        assert vmcs[f.VM_EXIT_INTERRUPTION_ERROR_CODE] == 0x1A
        assert vmcs[f.IDT_VECTORING_INFORMATION] == word
        assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == (length or 0x77)
        if delivering.error_code is not None:
            assert vmcs[f.IDT_VECTORING_ERROR_CODE] == delivering.error_code

    def test_ept_violation(self, delivering: Event, word: int, length: int | None) -> None:
        _, vmx, vmcs = launch()
        assert vmx.second_level_fault(EptViolation(PHYSICAL, LINEAR, 0x182), delivering)
        assert vmcs[f.EXIT_REASON] == Reason.EPT_VIOLATION
        assert vmcs[f.IDT_VECTORING_INFORMATION] == word
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == 0

    def test_double_fault__reports_no_original_event(self, delivering: Event, word: int, length: int | None) -> None:
        _, vmx, vmcs = launch(fields={f.EXCEPTION_BITMAP: 1 << 8})
        assert vmx.delivery_fault(delivering, Fault(Vector.DF, 0))
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == VALID | CODE | 3 << 8 | 8
        assert vmcs[f.IDT_VECTORING_INFORMATION] == 0

    def test_triple_fault__exits_whatever_the_bitmap(self, delivering: Event, word: int, length: int | None) -> None:
        _, vmx, vmcs = launch()
        assert vmx.delivery_fault(delivering, None)
        assert vmcs[f.EXIT_REASON] == Reason.TRIPLE_FAULT
        assert vmcs[f.IDT_VECTORING_INFORMATION] == 0

    def test_exception_not_selected(self, delivering: Event, word: int, length: int | None) -> None:
        _, vmx, _ = launch()
        assert not vmx.delivery_fault(delivering, Fault(Vector.NP, 0))


def test_ept_violation__outside_delivery() -> None:
    _, vmx, vmcs = launch()
    assert vmx.second_level_fault(EptViolation(PHYSICAL, LINEAR, 0x184), None)
    assert (vmcs[f.EXIT_REASON], vmcs[f.EXIT_QUALIFICATION]) == (Reason.EPT_VIOLATION, 0x184)
    assert (vmcs[f.GUEST_PHYSICAL_ADDRESS], vmcs[f.GUEST_LINEAR_ADDRESS]) == (PHYSICAL, LINEAR)
    assert vmcs[f.GUEST_RFLAGS] == 2 | RF


def test_ept_violation__without_a_linear_address_leaves_the_field() -> None:
    _, vmx, vmcs = launch()
    vmcs[f.GUEST_LINEAR_ADDRESS] = 0x77
    assert vmx.second_level_fault(EptViolation(PHYSICAL, None, 1), None)
    assert vmcs[f.GUEST_LINEAR_ADDRESS] == 0x77


def test_ept_misconfiguration() -> None:
    _, vmx, vmcs = launch()
    vmcs[f.GUEST_LINEAR_ADDRESS] = 0x77
    assert vmx.second_level_fault(EptMisconfiguration(PHYSICAL, LINEAR), None)
    assert (vmcs[f.EXIT_REASON], vmcs[f.EXIT_QUALIFICATION]) == (Reason.EPT_MISCONFIGURATION, 0)
    assert (vmcs[f.GUEST_PHYSICAL_ADDRESS], vmcs[f.GUEST_LINEAR_ADDRESS]) == (PHYSICAL, 0x77)


def test_page_modification_log_full() -> None:
    _, vmx, vmcs = launch()
    assert vmx.second_level_fault(PageModificationLogFull(PHYSICAL, LINEAR), None)
    assert vmcs[f.EXIT_REASON] == Reason.PAGE_MODIFICATION_LOG_FULL


def test_foreign_second_level_fault__is_not_modelled() -> None:
    _, vmx, _ = launch()
    with pytest.raises(NotModelled):
        vmx.second_level_fault(SecondLevelFault(PHYSICAL, LINEAR), None)


@pytest.mark.parametrize(("delivering", "length"), [(INTERRUPT, 0x77), (INT_80, 2)])
def test_task_gate__reports_the_event_that_uses_it(delivering: Event, length: int) -> None:
    _, vmx, vmcs = launch()
    vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] = 0x77
    instruction = decode(b"\xcd\x80", 64)
    assert instruction is not None
    assert vmx.intercept(TaskSwitch(0x28, TaskSwitchSource.GATE, delivering), instruction)
    assert vmcs[f.EXIT_QUALIFICATION] == 0x28 | 3 << 30
    assert vmcs[f.IDT_VECTORING_INFORMATION] & 0xFF == delivering.vector
    assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == length


class TestNmiUnblockingByIret:
    def test_exception(self) -> None:
        _, vmx, vmcs = launch(fields={f.EXCEPTION_BITMAP: 1 << 13})
        vmx.iret_unblocked_nmi = True
        assert vmx.intercept_event(Event(13, error_code=0), None)
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] & NMI_UNBLOCKING

    def test_ept_violation(self) -> None:
        _, vmx, vmcs = launch()
        vmx.iret_unblocked_nmi = True
        assert vmx.second_level_fault(EptViolation(PHYSICAL, LINEAR, 0x181), None)
        assert vmcs[f.EXIT_QUALIFICATION] == 0x181 | NMI_UNBLOCKING

    def test_during_delivery__is_not_reported(self) -> None:
        _, vmx, vmcs = launch()
        vmx.iret_unblocked_nmi = True
        assert vmx.second_level_fault(EptViolation(PHYSICAL, LINEAR, 0x181), INTERRUPT)
        assert vmcs[f.EXIT_QUALIFICATION] == 0x181

    def test_nmi_exiting_without_virtual_nmis__is_not_reported(self) -> None:
        _, vmx, vmcs = launch(c.NMI_EXITING, fields={f.EXCEPTION_BITMAP: 1 << 13})
        vmx.iret_unblocked_nmi = True
        assert vmx.intercept_event(Event(13, error_code=0), None)
        assert not vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] & NMI_UNBLOCKING
