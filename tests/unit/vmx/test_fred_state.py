"""FRED across VM entry and VM exit: its registers, injected events, events under delivery.

Spec: SDM Vol. 3, "Loading Guest State", "Saving Guest State", "Loading Host State", "Vectored-Event Injection",
"Information for VM Exits That Occur During Event Delivery".
"""

from __future__ import annotations

import pytest
from vmx_machine import FakeProcessor, launch, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.bench.hypervisor import GUEST_CODE, install
from vtx.machine import Machine
from vtx.vmx import Vmx
from vtx.vmx.ept import EptViolation
from vtx.vmx.outcome import EntryFailed, VmEntered, VmFailValid
from vtx.vmx.record import VmExit
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import Fault, Vector
from vtx.x86.profile import load_profile

CPUID = 10
CR4_FRED = 1 << 32
VALID, ERROR_CODE, NESTED = 1 << 31, 1 << 11, 1 << 13
IN_64_BIT_MODE, NESTED_IN_FRAME = 1 << 57, 1 << 58

GUEST = {
    f.GUEST_IA32_FRED_CONFIG: 0xFFFF_8000_0000_13C9,
    f.GUEST_IA32_FRED_STKLVLS: 0x1234_5678_9ABC_DEF0,
    f.GUEST_IA32_FRED_RSP1: 0x1040,
    f.GUEST_IA32_FRED_RSP2: 0x2080,
    f.GUEST_IA32_FRED_RSP3: 0xFFFF_8000_0000_30C0,
    f.GUEST_IA32_FRED_SSP1: 0x4008,
    f.GUEST_IA32_FRED_SSP2: 0x5010,
    f.GUEST_IA32_FRED_SSP3: 0xFFFF_8000_0000_6018,
}
HOST = {
    f.HOST_IA32_FRED_CONFIG: 0x7000,
    f.HOST_IA32_FRED_STKLVLS: 0x11,
    f.HOST_IA32_FRED_RSP1: 0x140,
    f.HOST_IA32_FRED_RSP2: 0x180,
    f.HOST_IA32_FRED_RSP3: 0x1C0,
    f.HOST_IA32_FRED_SSP1: 0x108,
    f.HOST_IA32_FRED_SSP2: 0x110,
    f.HOST_IA32_FRED_SSP3: 0x118,
}
OWN = (0x9000, 0x22, 0x240, 0x280, 0x2C0, 0x208, 0x210, 0x218)


def set_own(processor: FakeProcessor, values: tuple[int, ...] = OWN) -> None:
    state = processor.state
    state.fred_config, state.fred_stack_levels = values[:2]
    state.fred_rsp[:] = (0xABC0, *values[2:5])
    state.fred_ssp[:] = values[5:]


def loaded(processor: FakeProcessor) -> list[int]:
    state = processor.state
    assert state.fred_rsp[0] == 0xABC0  # no part of the VMCS
    return [state.fred_config, state.fred_stack_levels, *state.fred_rsp[1:], *state.fred_ssp]


def entered(
    *controls: c.Control, secondary_exit: int = 0, fields: dict[Field, int] | None = None
) -> tuple[FakeProcessor, Vmx, Vmcs]:
    processor, vmx = make_vmx(load_profile("everything"))
    set_own(processor)
    fields = GUEST | HOST | {f.SECONDARY_VM_EXIT_CONTROLS: secondary_exit} | (fields or {})
    activate = (c.EXIT_ACTIVATE_SECONDARY_CONTROLS,) if secondary_exit else ()
    vmcs = prepare(vmx, *controls, *activate, fields=fields)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    return processor, vmx, vmcs


class TestRegisters:
    def test_all_three_controls(self) -> None:
        both = c.EXIT_SAVE_FRED.mask | c.EXIT_LOAD_FRED.mask
        processor, vmx, vmcs = entered(c.ENTRY_LOAD_FRED, secondary_exit=both)
        assert loaded(processor) == list(GUEST.values())
        changed = tuple(value + 0x1000 for value in OWN)
        set_own(processor, changed)
        vmx.exit(VmExit(CPUID))
        assert [vmcs[field] for field in GUEST] == list(changed)
        assert loaded(processor) == list(HOST.values())

    def test_none_of_them(self) -> None:
        processor, vmx, vmcs = entered()
        assert loaded(processor) == list(OWN)
        vmx.exit(VmExit(CPUID))
        assert [vmcs[field] for field in GUEST] == list(GUEST.values())
        assert loaded(processor) == list(OWN)

    def test_only_saved(self) -> None:
        processor, vmx, vmcs = entered(secondary_exit=c.EXIT_SAVE_FRED.mask)
        vmx.exit(VmExit(CPUID))
        assert [vmcs[field] for field in GUEST] == list(OWN)
        assert loaded(processor) == list(OWN)

    def test_only_the_hosts(self) -> None:
        processor, vmx, vmcs = entered(secondary_exit=c.EXIT_LOAD_FRED.mask)
        vmx.exit(VmExit(CPUID))
        assert [vmcs[field] for field in GUEST] == list(GUEST.values())
        assert loaded(processor) == list(HOST.values())

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            (f.GUEST_IA32_FRED_CONFIG, 1 << 2),
            (f.GUEST_IA32_FRED_CONFIG, 1 << 11),
            (f.GUEST_IA32_FRED_RSP1, 0x20),
            (f.GUEST_IA32_FRED_SSP3, 0x8000_0000_0000),
        ],
    )
    def test_guest_state_that_is_refused(self, field: Field, value: int) -> None:
        _, vmx = make_vmx(load_profile("everything"))
        prepare(vmx, c.ENTRY_LOAD_FRED, fields=GUEST | {field: value})
        assert vmx.vmlaunch() == EntryFailed(Reason.ENTRY_FAILURE_GUEST_STATE | 1 << 31, 0)


WITH_FRED = {f.GUEST_CR4: 0x2020 | CR4_FRED}


def injecting(word: int, **more: int) -> dict[Field, int]:
    """Fields that inject ``word``; ``more`` are error code, instruction length and event data."""
    return {
        f.VM_ENTRY_INTERRUPTION_INFORMATION: VALID | word,
        f.VM_ENTRY_EXCEPTION_ERROR_CODE: more.get("error", 0),
        f.VM_ENTRY_INSTRUCTION_LENGTH: more.get("length", 0),
        f.INJECTED_EVENT_DATA: more.get("data", 0),
        f.GUEST_RFLAGS: 0x202,
    }


class TestInjection:
    @pytest.mark.parametrize("nested", [False, True])
    def test_an_exception(self, nested: bool) -> None:
        word = 3 << 8 | ERROR_CODE | 14 | (NESTED if nested else 0)
        processor, _, _ = entered(fields=WITH_FRED | injecting(word, error=2, data=0x1234))
        event = processor.delivered[0]
        assert (event.vector, event.error_code, event.data, event.nested) == (14, 2, 0x1234, nested)

    @pytest.mark.parametrize("vector", [1, 2], ids=["SYSCALL", "SYSENTER"])
    def test_a_system_call(self, vector: int) -> None:
        processor, vmx, _ = entered(fields=WITH_FRED | injecting(7 << 8 | vector, length=2))
        event = processor.delivered[0]
        assert (event.vector, event.kind, event.instruction_length) == (vector, EventKind.OTHER, 2)
        assert not vmx.operation.pending_trap

    @pytest.mark.parametrize(("word", "fred"), [(7 << 8 | 1, False), (7 << 8 | 3, True), (2 << 8 | NESTED | 2, True)])
    def test_words_that_are_refused(self, word: int, fred: bool) -> None:
        _, vmx = make_vmx(load_profile("everything"))
        prepare(vmx, fields=(WITH_FRED if fred else {}) | injecting(word, length=2))
        assert isinstance(vmx.vmlaunch(), VmFailValid)

    def test_without_fred_there_is_no_data(self) -> None:
        processor, _, _ = entered(fields=injecting(3 << 8 | 6, data=0x1234))
        assert processor.delivered[0].data is None

    @pytest.mark.parametrize(
        ("word", "shadow", "fred", "pending"),
        [
            (0x41, 0, False, 0),  # external interrupt
            (3 << 8 | 6, 0, False, 0),
            (4 << 8 | 0x80, 0, False, 0),
            (4 << 8 | 0x80, 2, False, 0x1001),  # after a MOV SS
            (6 << 8 | 3, 2, False, 0x1001),
            (4 << 8 | 0x80, 2, True, 0),
            (5 << 8 | 1, 2, False, 0),
        ],
    )
    def test_what_becomes_of_pending_debug_exceptions(self, word: int, shadow: int, fred: bool, pending: int) -> None:
        fields = (WITH_FRED if fred else {}) | injecting(word, length=2)
        fields |= {f.GUEST_PENDING_DEBUG_EXCEPTIONS: 0x1001, f.GUEST_INTERRUPTIBILITY_STATE: shadow}
        processor, _, _ = entered(fields=fields)
        assert processor.state.pending_debug == pending


INTERRUPT = Event(0x41, EventKind.EXTERNAL_INTERRUPT)
PAGE_FAULT = Event(14, EventKind.HARDWARE_EXCEPTION, 2, address=0x1234)


class TestExits:
    @pytest.mark.parametrize(("delivering", "data"), [(INTERRUPT, 0), (PAGE_FAULT, 0x1234)])
    def test_an_exception_during_delivery(self, delivering: Event, data: int) -> None:
        _, vmx, vmcs = entered(fields=WITH_FRED | {f.EXCEPTION_BITMAP: 1 << 13, f.ORIGINAL_EVENT_DATA: 0x5555})
        assert vmx.delivery_fault(delivering, Fault(Vector.GP, 0))
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == VALID | ERROR_CODE | NESTED | 3 << 8 | 13
        assert vmcs[f.IDT_VECTORING_INFORMATION] & 0xFF == delivering.vector
        assert vmcs[f.ORIGINAL_EVENT_DATA] == data

    def test_a_double_fault_is_not_nested(self) -> None:
        _, vmx, vmcs = entered(fields=WITH_FRED | {f.EXCEPTION_BITMAP: 1 << 8})
        assert vmx.delivery_fault(PAGE_FAULT, Fault(Vector.DF, 0))
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == VALID | ERROR_CODE | 3 << 8 | 8

    def test_the_original_event_may_be_nested_itself(self) -> None:
        _, vmx, vmcs = entered(fields=WITH_FRED)
        nested = Event(14, EventKind.HARDWARE_EXCEPTION, 2, address=0x1234, nested=True)
        violation = EptViolation(GuestPhysicalAddress(0x5000), LinearAddress(0x5000), 2)
        assert vmx.second_level_fault(violation, nested)
        assert vmcs[f.IDT_VECTORING_INFORMATION] == VALID | ERROR_CODE | NESTED | 3 << 8 | 14
        assert vmcs[f.ORIGINAL_EVENT_DATA] == 0x1234

    def test_a_system_call_that_was_being_delivered(self) -> None:
        _, vmx, vmcs = entered(fields=WITH_FRED)
        violation = EptViolation(GuestPhysicalAddress(0x5000), LinearAddress(0x5000), 2)
        assert vmx.second_level_fault(violation, Event(1, EventKind.OTHER, instruction_length=2))
        assert vmcs[f.IDT_VECTORING_INFORMATION] == VALID | 7 << 8 | 1
        assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == 2

    def test_without_fred_neither_is_recorded(self) -> None:
        _, vmx, vmcs = launch(fields={f.EXCEPTION_BITMAP: 1 << 13})
        assert vmx.delivery_fault(PAGE_FAULT, Fault(Vector.GP, 0))
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == VALID | ERROR_CODE | 3 << 8 | 13
        assert vmcs[f.ORIGINAL_EVENT_DATA] == 0


ENTRY = 0x20_2000


@pytest.mark.parametrize(
    ("word", "rip", "information"),
    [
        (3 << 8 | ERROR_CODE | NESTED | 14, GUEST_CODE, 14 << 32 | 3 << 48 | IN_64_BIT_MODE | NESTED_IN_FRAME),
        (4 << 8 | 0x80, GUEST_CODE + 2, 1 << 17 | 0x80 << 32 | 4 << 48 | IN_64_BIT_MODE | 2 << 60),
        (7 << 8 | 1, GUEST_CODE + 2, 1 << 17 | 1 << 32 | 7 << 48 | IN_64_BIT_MODE | 2 << 60),
    ],
)
def test_the_frame_of_an_injected_event(word: int, rip: int, information: int) -> None:
    """A guest whose entry point halts: the frame has the event data of the VMCS."""
    machine = Machine(profile="everything", memory=16 << 20)
    fields = injecting(word, error=6, length=2, data=0xABCD) | {f.GUEST_IA32_FRED_CONFIG: ENTRY}
    vmcs = install(
        machine,
        guest=b"\xf4",
        controls=(c.HLT_EXITING, c.ENTRY_LOAD_FRED),
        fields=fields,
    )
    vmcs[f.GUEST_CR4] |= CR4_FRED
    machine.memory.write(ENTRY + 256, b"\xf4")
    assert machine.run(max_instructions=1000).exit_value == 0
    assert (vmcs[f.EXIT_REASON], vmcs[f.GUEST_RIP]) == (Reason.HLT, ENTRY + 257)  # the host has skipped it
    frame = [machine.memory.read_u64(vmcs[f.GUEST_RSP] + 8 * number) for number in range(8)]
    error = 6 if word & ERROR_CODE else 0
    assert (frame[0], frame[1], frame[6], frame[7]) == (error, rip, 0xABCD, 0)
    assert frame[5] == vmcs[f.GUEST_SS_SELECTOR] | information
