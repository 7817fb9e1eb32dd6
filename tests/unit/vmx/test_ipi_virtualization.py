"""IPI virtualization: which commands are virtualized, what they post, whom they notify, and what exits instead."""

from __future__ import annotations

import pytest
from attrs import define
from vmx_machine import GUEST_RIP, PAGE_TABLES, FakeProcessor, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.machine import Machine
from vtx.vmx.outcome import VmEntered
from vtx.x86.access import Operand
from vtx.x86.decode import decode
from vtx.x86.operations import WriteMsr
from vtx.x86.outcome import InstructionAborted
from vtx.x86.profile import load_profile
from vtx.x86.second_level import AccessKind, ReservedPageAccess

ACCESS, VIRTUAL, TABLE, DESCRIPTOR = 0x3_7000, 0x3_5000, 0x3_6000, 0x3_8040
ICR_LOW, ICR_HIGH, ICR_MSR = 0x300, 0x310, 0x830
NOTIFICATION, TARGET = 0xF2, 0x1234_5607
ON, SN = 1, 2
WRMSR = decode(bytes.fromhex("0f30"), 64)
MOV = bytes.fromhex("8903")
IA32_APIC_BASE = 0x1B


@define
class Store:
    """A store of ``value`` at ``offset`` of the APIC-access page, about to be executed."""

    processor: FakeProcessor
    offset: int
    value: int

    @property
    def access(self) -> ReservedPageAccess:
        linear = ACCESS + self.offset
        return ReservedPageAccess(GuestPhysicalAddress(linear), LinearAddress(linear), AccessKind.WRITE)

    def operands(self) -> list[Operand]:
        return [Operand(ACCESS + self.offset, 4, reads=False, writes=True, stack=False)]

    def execute(self) -> bool:
        self.processor.mmu.write(ACCESS + self.offset, 4, self.value)
        return True


class Guest:
    def __init__(self, *, x2apic: bool, enable: bool = True, last: int = 9, information: int | None = None) -> None:
        self.processor, self.vmx = make_vmx(load_profile("everything"))
        self.x2apic = x2apic
        mode = c.VIRTUALIZE_X2APIC_MODE if x2apic else c.VIRTUALIZE_APIC_ACCESSES
        prepare(
            self.vmx,
            c.USE_TPR_SHADOW,
            mode,
            c.ACTIVATE_TERTIARY_CONTROLS,
            c.USE_MSR_BITMAPS,
            fields={
                f.TERTIARY_PROCESSOR_BASED_CONTROLS: c.IPI_VIRTUALIZATION.mask if enable else 0,
                f.VIRTUAL_APIC_ADDRESS: VIRTUAL,
                f.APIC_ACCESS_ADDRESS: ACCESS,
                f.MSR_BITMAP_ADDRESS: 0x3_9000,
                f.PID_POINTER_TABLE_ADDRESS: TABLE,
                f.LAST_PID_POINTER_INDEX: last,
                f.GUEST_CR3: PAGE_TABLES,
            },
        )
        memory = self.processor.memory
        memory.write_u64(TABLE + 8 * 7, DESCRIPTOR | 1)
        if information is None:
            information = NOTIFICATION << 16 | TARGET << 32
        memory.write_u64(DESCRIPTOR + 32, information)
        assert self.vmx.vmlaunch() == VmEntered(), self.vmx.last_failure
        memory.write(self.processor.state.rip, MOV)

    def send(self, command: int, destination: int = 7) -> bool:
        """Whether the guest runs on."""
        if self.x2apic:
            assert self.vmx.intercept(WriteMsr(ICR_MSR, destination << 32 | command), WRMSR)
        else:
            self.vmx.virtualize_access(Store(self.processor, ICR_HIGH, destination << 24))
            if self.vmx.non_root:
                self.vmx.virtualize_access(Store(self.processor, ICR_LOW, command))
        return self.vmx.non_root

    @property
    def requests(self) -> set[int]:
        data = int.from_bytes(self.processor.memory.read(DESCRIPTOR, 32), "little")
        return {vector for vector in range(256) if data >> vector & 1}

    @property
    def information(self) -> int:
        return self.processor.memory.read_u64(DESCRIPTOR + 32)


@pytest.fixture(params=[False, True], ids=["xapic", "x2apic"])
def x2apic(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("vector", [0x10, 0x55, 0xFF])
def test_posts_and_notifies(vector: int) -> None:
    guest = Guest(x2apic=True)
    assert guest.send(vector)
    assert guest.requests == {vector}
    assert guest.information == NOTIFICATION << 16 | TARGET << 32 | ON
    # The local APIC is in xAPIC mode: its 8-bit destinations are in bits 15:8 of the field.
    assert guest.processor.sent == [(NOTIFICATION, 0x56)]
    assert guest.processor.memory.read_u64(VIRTUAL + ICR_LOW) == 7 << 32 | vector
    assert guest.processor.state.rip == GUEST_RIP + 2


def test_notification__in_x2apic_mode_has_32_bits() -> None:
    guest = Guest(x2apic=True)
    guest.processor.msrs.write(IA32_APIC_BASE, 0xFEE0_0800)
    assert guest.processor.msrs.write(IA32_APIC_BASE, 0xFEE0_0C00)
    assert guest.send(0x41)
    assert guest.processor.sent == [(NOTIFICATION, TARGET)]


@pytest.mark.parametrize("flags", [ON, SN, ON | SN])
def test_notification__only_if_none_is_outstanding_or_suppressed(flags: int) -> None:
    guest = Guest(x2apic=True, information=NOTIFICATION << 16 | flags)
    assert guest.send(0x41)
    assert guest.requests == {0x41}
    assert guest.information == NOTIFICATION << 16 | flags
    assert guest.processor.sent == []


def test_second_vector__joins_the_first() -> None:
    guest = Guest(x2apic=True)
    assert guest.send(0x41)
    assert guest.send(0x42)
    assert guest.requests == {0x41, 0x42}
    assert len(guest.processor.sent) == 1


@pytest.mark.parametrize(
    "command",
    [
        0x0F,  # the vector of an exception
        0x4_0041,  # shorthand: self
        0x8_0041,  # all
        0xC_0041,  # all but self
        0x8041,  # level-triggered
        0x841,  # logical destination
        *(mode << 8 | 0x41 for mode in range(1, 8)),
    ],
)
def test_other_commands__exit_after_the_write(x2apic: bool, command: int) -> None:
    guest = Guest(x2apic=x2apic)
    if not x2apic:
        # Without APIC-register virtualization a guest cannot write the high half.
        guest.processor.memory.write_u32(VIRTUAL + ICR_HIGH, 7 << 24)
        guest.vmx.virtualize_access(Store(guest.processor, ICR_LOW, command))
    else:
        guest.send(command)
    assert not guest.vmx.non_root
    vmcs = guest.vmx.current_vmcs
    assert vmcs is not None
    assert (vmcs[f.EXIT_REASON], vmcs[f.EXIT_QUALIFICATION]) == (Reason.APIC_WRITE, ICR_LOW)
    assert guest.processor.memory.read_u32(VIRTUAL + ICR_LOW) == command
    assert guest.requests == set()


def test_xapic__takes_the_destination_from_the_high_half() -> None:
    guest = Guest(x2apic=False)
    guest.processor.memory.write_u32(VIRTUAL + ICR_HIGH, 7 << 24)
    guest.vmx.virtualize_access(Store(guest.processor, ICR_LOW, 0x4041))  # level: assert, which does not matter
    assert guest.vmx.non_root
    assert guest.requests == {0x41}


@pytest.mark.parametrize(
    ("destination", "entry"),
    [(10, DESCRIPTOR | 1), (0xFFFF_FFFF, None), (7, DESCRIPTOR), (7, DESCRIPTOR | 3), (7, 1 << 46 | DESCRIPTOR | 1)],
)
def test_destination__without_a_valid_descriptor_exits(destination: int, entry: int | None) -> None:
    guest = Guest(x2apic=True)
    if entry is not None:
        guest.processor.memory.write_u64(TABLE + 8 * destination, entry)
    assert not guest.send(0x41, destination)
    assert guest.requests == set()
    assert guest.processor.sent == []


@pytest.mark.parametrize("bit", [12, 13, 16, 17, 20, 31])
def test_x2apic__reserved_bits_fault(bit: int) -> None:
    guest = Guest(x2apic=True)
    with pytest.raises(InstructionAborted):
        guest.send(1 << bit | 0x41)
    assert guest.processor.memory.read_u64(VIRTUAL + ICR_LOW) == 0


def test_without_the_control() -> None:
    guest = Guest(x2apic=True, enable=False)
    assert not guest.vmx.intercept(WriteMsr(ICR_MSR, 7 << 32 | 0x41), WRMSR)  # to the local APIC itself
    guest = Guest(x2apic=False, enable=False)
    guest.vmx.virtualize_access(Store(guest.processor, ICR_LOW, 0x41))
    vmcs = guest.vmx.current_vmcs
    assert vmcs is not None
    assert vmcs[f.EXIT_REASON] == Reason.APIC_ACCESS


def test_notification__reaches_the_other_processor() -> None:
    machine = Machine(profile="everything", memory=4 << 20, cpus=2)
    first, second = machine.cpus
    for cpu in (first, second):
        cpu.socket.apic.mmio_write(0xF0, 4, 0x1FF)  # software-enabled
    assert not second.platform.interrupt_pending()
    first.send_interrupt(NOTIFICATION, 1)
    assert second.platform.interrupt_pending()
    assert second.platform.acknowledge_interrupt() == NOTIFICATION
    assert not first.platform.interrupt_pending()
