"""The conditions for generating a double fault, and the loop that delivers one event after another."""

from __future__ import annotations

import copy

import pytest
from event_fixtures import IDT, STACK_3, protected_machine, real_machine

from vtx.x86.delivery import Event, EventKind
from vtx.x86.double_fault import Delivered, Intercepted, TripleFault, combine, deliver_with_faults
from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import DescriptorTable, Gpr
from vtx.x86.task import TaskSwitchHooks, TaskSwitchSource

EXCEPTION = EventKind.HARDWARE_EXCEPTION

# Typed from the manual's tables, independently of the code.
BENIGN = (1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19)
CONTRIBUTORY = (0, 10, 11, 12, 13, 21)
PAGE_FAULTS = (14, 20)
SECOND, DOUBLE, SHUTDOWN = "second", "double", "shutdown"


def expected(first: int, second: int) -> str:
    if first == 8:
        return SECOND if second in BENIGN else SHUTDOWN
    if first in CONTRIBUTORY and second in CONTRIBUTORY:
        return DOUBLE
    if first in PAGE_FAULTS and second in CONTRIBUTORY + PAGE_FAULTS:
        return DOUBLE
    return SECOND


@pytest.mark.parametrize("first", [*BENIGN, *CONTRIBUTORY, *PAGE_FAULTS, 8])
@pytest.mark.parametrize("second", [0, 10, 11, 12, 13, 14, 17, 20, 21])
def test_combine(first: int, second: int) -> None:
    event = Event(first, EXCEPTION)
    fault = Fault(Vector(second), 0x10, address=0x5000 if second == 14 else None)
    found = combine(event, fault)
    match expected(first, second):
        case "second":
            address = 0x5000 if second == 14 else None
            assert found == Event(second, EXCEPTION, error_code=0x10, address=address)
        case "double":
            assert found == Event(8, EXCEPTION, error_code=0)
        case _:
            assert found == TripleFault(event, fault)


@pytest.mark.parametrize("kind", [kind for kind in EventKind if kind != EXCEPTION])
@pytest.mark.parametrize("vector", [0, 8, 13, 14, 0x40])
def test_interrupts_and_software_events__are_benign(kind: EventKind, vector: int) -> None:
    assert combine(Event(vector, kind), Fault(Vector.GP, 3)) == Event(13, EXCEPTION, error_code=3)


def test_serial_delivery__an_interrupt_without_a_gate_becomes_a_general_protection_fault() -> None:
    state, memory = protected_machine()
    memory.gate(13, 0x08, 0x2000, 0x8E)
    outcome = deliver_with_faults(state, memory, Event(0x40, EventKind.EXTERNAL_INTERRUPT))
    assert outcome == Delivered(Event(13, EXCEPTION, error_code=0x40 * 8 + 3))
    assert memory.words(STACK_3 - 16, 4, 4) == [0x203, 0x40_1234, 0x08, 0x1_0202]


def test_double_fault__has_error_code_0() -> None:
    state, memory = protected_machine()
    memory.gate(8, 0x08, 0x3000, 0x8E)
    outcome = deliver_with_faults(state, memory, Event(13, EXCEPTION, error_code=0x58))
    assert outcome == Delivered(Event(8, EXCEPTION, error_code=0))
    assert memory.words(STACK_3 - 16, 4, 4) == [0, 0x40_1234, 0x08, 0x1_0202]


def test_page_fault_during_page_fault__shows_the_second_address_in_cr2() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(14, 0x08, 0x2000, 0x8E)
    memory.gate(8, 0x80, 0, 0x85)
    memory.refused.add(7)
    seen: list[tuple[int, int]] = []

    def observe(event: Event, fault: Fault) -> bool:
        seen.append((event.vector, fault.vector))
        return fault.vector == Vector.DF

    event = Event(14, EXCEPTION, error_code=4, address=0xDEAD_0000)
    outcome = deliver_with_faults(state, memory, event, observe)
    assert outcome == Intercepted(event, Fault(Vector.DF, 0))
    assert seen == [(14, 14), (14, 8)]
    assert state.cr2 == 0x7FFC
    assert state.gpr[Gpr.RSP] == STACK_3


def test_page_fault_taken_by_the_observer__leaves_cr2_to_the_first() -> None:
    state, memory = protected_machine(cpl=3)
    memory.gate(14, 0x08, 0x2000, 0x8E)
    memory.refused.add(7)
    event = Event(14, EXCEPTION, error_code=4, address=0xDEAD_0000)
    outcome = deliver_with_faults(state, memory, event, lambda event, fault: True)
    assert outcome == Intercepted(event, Fault(Vector.PF, 2, address=0x7FFC))
    assert state.cr2 == 0xDEAD_0000


def test_triple_fault() -> None:
    state, memory = protected_machine()
    state.idtr = DescriptorTable(IDT, 0)
    outcome = deliver_with_faults(state, memory, Event(6, EXCEPTION))
    assert outcome == TripleFault(Event(8, EXCEPTION, error_code=0), Fault(Vector.GP, 8 * 8 + 3))


def test_triple_fault_in_real_mode() -> None:
    state, memory = real_machine()
    state.idtr = DescriptorTable(0, 0)
    assert isinstance(deliver_with_faults(state, memory, Event(6, EXCEPTION)), TripleFault)


def test_observer__may_take_the_second_exception() -> None:
    state, memory = protected_machine()
    before = copy.deepcopy(state)
    event = Event(0x40, EventKind.EXTERNAL_INTERRUPT)
    outcome = deliver_with_faults(state, memory, event, lambda event, fault: fault.vector == Vector.GP)
    assert outcome == Intercepted(event, Fault(Vector.GP, 0x203))
    assert state == before


def test_recognized_events__show_even_if_delivery_faults() -> None:
    state, memory = protected_machine()
    outcome = deliver_with_faults(state, memory, Event(2, EventKind.NMI), lambda event, fault: True)
    assert isinstance(outcome, Intercepted)
    assert state.nmi_blocked
    event = Event(1, EXCEPTION, debug=0x4000)
    state.dr7 = 0x2400
    deliver_with_faults(state, memory, event, lambda event, fault: True)
    assert (state.dr6, state.dr7) == (0xFFFF_4FF0, 0x400)


def test_other_causes__stop_delivery() -> None:
    state, memory = protected_machine()
    memory.gate(0x40, 0x80, 0, 0x85)

    def leave(selector: int, source: TaskSwitchSource) -> None:
        raise InstructionAborted(("exit", selector, source))

    before = copy.deepcopy(state)
    event = Event(0x40, EventKind.EXTERNAL_INTERRUPT)
    outcome = deliver_with_faults(state, memory, event, hooks=TaskSwitchHooks(intercept=leave))
    assert outcome == Intercepted(event, ("exit", 0x80, TaskSwitchSource.TASK_GATE))
    assert state == before
