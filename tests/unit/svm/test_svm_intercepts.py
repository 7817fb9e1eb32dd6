"""Which operations exit, with what EXITCODE, EXITINFO1, EXITINFO2 and nRIP."""

from __future__ import annotations

from typing import get_args

import pytest
from svm_machine import (
    CLGI,
    GUEST_RIP,
    INVLPGA,
    IOPM,
    MSRPM,
    STGI,
    VMLOAD,
    VMMCALL,
    VMRUN,
    VMSAVE,
    Machine,
    instruction,
)

from vtx.svm import intercepts
from vtx.x86 import operations as op
from vtx.x86.event import Event
from vtx.x86.operations import Plain, Simple, TaskSwitchSource
from vtx.x86.outcome import Fault, Vector

MOV = 1 << 63
NOP = b"\x90"

PLAIN = [
    (Plain.CPUID, 0x72),
    (Plain.HLT, 0x78),
    (Plain.INVD, 0x76),
    (Plain.WBINVD, 0x89),
    (Plain.RDTSC, 0x6E),
    (Plain.RDTSCP, 0x87),
    (Plain.RDPMC, 0x6F),
    (Plain.PAUSE, 0x77),
    (Plain.MONITOR, 0x8A),
    (Plain.RDPRU, 0x8E),
    (Plain.MCOMMIT, 0xA3),
    (Plain.TLBSYNC, 0xA4),
    (Plain.XSETBV, 0x8D),
    (Plain.RSM, 0x73),
    (Plain.PUSHF, 0x70),
    (Plain.POPF, 0x71),
    (Plain.IRET, 0x74),
    (Plain.ICEBP, 0x88),
]

# Operation, code of its instruction, intercept that is on, expected EXITINFO1.
CASES = [
    *((Simple(kind), NOP, number, 0) for kind, number in PLAIN),
    (op.MonitorWait(armed=False), NOP, 0x8B, 0),
    (op.MonitorWait(armed=True), NOP, 0x8B, 1),
    (op.MonitorWait(armed=True), NOP, 0x8C, 0),
    (op.MoveToControlRegister(0, 3, 0), NOP, 0x10, MOV | 3),
    (op.MoveToControlRegister(2, 1, 0), NOP, 0x12, MOV | 1),
    (op.MoveToControlRegister(8, 15, 0), NOP, 0x18, MOV | 15),
    (op.MoveFromControlRegister(4, 9), NOP, 0x04, MOV | 9),
    (op.ClearTaskSwitched(), NOP, 0x10, 0),
    (op.LoadMachineStatusWord(0, None), NOP, 0x10, 0),
    (op.LoadMachineStatusWord(0x33, None), NOP, 0x65, 0),
    (op.StoreMachineStatusWord(), NOP, 0x00, 0),
    (op.MoveDebugRegister(7, 2, write=True), NOP, 0x37, 2),
    (op.MoveDebugRegister(7, 2, write=False, encoded=5), NOP, 0x25, 2),
    (op.InvalidatePage(0xFFFF_8000_1234_5678), NOP, 0x79, 0xFFFF_8000_1234_5678),
    (op.InvalidateProcessContext(), NOP, 0xA2, 0),
    (op.BroadcastInvalidation(legal=True), NOP, 0xA0, 0),
    (op.BroadcastInvalidation(legal=False), NOP, 0xA0, 0),
    (op.BroadcastInvalidation(legal=False), NOP, 0xA1, 0),
    (op.DescriptorTableAccess(local=False), b"\x0f\x01\x08", 0x66, 0),  # SIDT
    (op.DescriptorTableAccess(local=False), b"\x0f\x01\x00", 0x67, 0),  # SGDT
    (op.DescriptorTableAccess(local=True), b"\x0f\x00\x00", 0x68, 0),  # SLDT
    (op.DescriptorTableAccess(local=True), b"\x0f\x00\x08", 0x69, 0),  # STR
    (op.DescriptorTableAccess(local=False), b"\x0f\x01\x18", 0x6A, 0),  # LIDT
    (op.DescriptorTableAccess(local=False), b"\x0f\x01\x10", 0x6B, 0),  # LGDT
    (op.DescriptorTableAccess(local=True), b"\x0f\x00\x10", 0x6C, 0),  # LLDT
    (op.DescriptorTableAccess(local=True), b"\x0f\x00\x18", 0x6D, 0),  # LTR
    (op.SoftwareInterrupt(0x80), b"\xcd\x80", 0x75, 0x80),
    (op.ReadMsr(0x4000_0000), b"\x0f\x32", 0x7C, 0),
    (op.WriteMsr(0xC000_2000, 0), b"\x0f\x30", 0x7C, 1),
]


@pytest.mark.parametrize(("operation", "code", "number", "info1"), CASES)
def test_operation_exits_with_its_intercept_alone(
    operation: op.Operation, code: bytes, number: int, info1: int
) -> None:
    machine = Machine()
    machine.run()
    assert not machine.svm.intercept(operation, instruction(code))
    assert machine.svm.non_root
    machine = Machine()
    machine.intercept(number)
    machine.run()
    assert machine.svm.intercept(operation, instruction(code))
    assert not machine.svm.non_root
    assert (machine.stored("EXITCODE"), machine.stored("EXITINFO1")) == (number, info1)
    assert (machine.stored("RIP"), machine.stored("nRIP")) == (GUEST_RIP, GUEST_RIP + len(code))


def test_cr0_write_comes_before_the_selective_one() -> None:
    machine = Machine()
    machine.intercept(0x10)
    machine.intercept(0x65)
    machine.run()
    assert machine.svm.intercept(op.MoveToControlRegister(0, 0, 0xC005_0033), instruction(NOP))
    assert machine.stored("EXITCODE") == 0x10


@pytest.mark.parametrize(
    ("value", "exits"), [(0xC005_0033, True), (0x8005_0031, False), (0x8005_003B, False), (0x8005_0013, True)]
)
def test_selective_cr0_write(value: int, exits: bool) -> None:
    machine = Machine()
    machine.intercept(0x65)
    machine.run()
    assert machine.svm.intercept(op.MoveToControlRegister(0, 4, value), instruction(NOP)) is exits
    if exits:
        assert (machine.stored("EXITCODE"), machine.stored("EXITINFO1")) == (0x65, MOV | 4)


def test_every_operation_has_a_decision() -> None:
    assert set(get_args(op.Operation)) == set(intercepts._DECISIONS)


# What only VMX can intercept, or SVM in another way: with all intercepts on, the guest goes on.
@pytest.mark.parametrize(
    "what", [op.ExtendedStateTransfer(save=True, supervisor=1), op.ReadMsrList(0x10), op.WriteMsrList(0x10, 0)]
)
def test_operation_without_an_intercept(what: op.Operation) -> None:
    machine = Machine()
    for number in range(0xC0):
        machine.intercept(number)
    machine.run()
    assert not machine.svm.intercept(what, instruction(NOP))


def test_clts_is_no_selective_write() -> None:
    machine = Machine()
    machine.intercept(0x65)
    machine.run()
    assert not machine.svm.intercept(op.ClearTaskSwitched(), instruction(NOP))


@pytest.mark.parametrize(
    ("code", "number"),
    [(VMMCALL, 0x81), (VMLOAD, 0x82), (VMSAVE, 0x83), (STGI, 0x84), (CLGI, 0x85), (INVLPGA, 0x7A), (VMRUN, 0x80)],
)
def test_svm_instruction_in_a_guest(code: bytes, number: int) -> None:
    machine = Machine()
    machine.intercept(number)
    machine.run()
    machine.state.gpr[0] = 0x123
    assert machine.execute(code)
    assert (machine.stored("EXITCODE"), machine.stored("nRIP")) == (number, GUEST_RIP + 3)
    assert machine.stored("EXITINFO1") == (0x123 if number == 0x7A else 0)


@pytest.mark.parametrize(("code", "number"), [(VMRUN, 0x80), (VMLOAD, 0x82), (VMSAVE, 0x83)])
@pytest.mark.parametrize("address", [0x123, 1 << 48])
def test_bad_address__comes_before_the_intercept_unless_cpuid_says_otherwise(
    code: bytes, number: int, address: int
) -> None:
    for profile in ("zen-server", "everything-amd"):
        machine = Machine(profile)
        machine.intercept(number)
        machine.run()
        machine.state.gpr[0] = address
        if profile == "zen-server":
            assert machine.fault_of(code) == Fault(Vector.GP, 0)
            assert machine.svm.non_root
        else:
            assert machine.execute(code)
            assert machine.stored("EXITCODE") == number


def test_vmmcall_exits_from_user_mode() -> None:
    machine = Machine()
    machine.intercept(0x81)
    machine.fields["CPL"] = 3
    machine.run()
    machine.execute(VMMCALL)
    assert (machine.stored("EXITCODE"), machine.stored("CPL")) == (0x81, 3)


@pytest.mark.parametrize(
    ("index", "byte", "bit"),
    [
        (0, 0, 0),
        (0x1FFF, 0x7FF, 6),
        (0xC000_0080, 0x820, 0),
        (0xC000_1FFF, 0xFFF, 6),
        (0xC001_0117, 0x1045, 6),
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_msr_permissions_map(index: int, byte: int, bit: int, write: bool) -> None:
    operation = op.WriteMsr(index, 0) if write else op.ReadMsr(index)
    for value, exits in ((1 << bit + write, True), (0xFF ^ 1 << bit + write, False)):
        machine = Machine()
        machine.intercept(0x7C)
        machine.memory.write_u8(MSRPM + byte, value)
        machine.run()
        assert machine.svm.intercept(operation, instruction(NOP)) is exits
        if exits:
            assert machine.stored("EXITINFO1") == write


@pytest.mark.parametrize(
    ("port", "size", "bits", "exits"),
    [
        (0x60, 1, {0x60}, True),
        (0x60, 1, {0x5F, 0x61}, False),
        (0x60, 4, {0x63}, True),
        (0x60, 2, {0x62}, False),
        (0x7FFF, 2, {0x8000}, True),
        (0xFFFF, 4, {0x1_0000}, True),
        (0xFFFF, 4, {0x1_0002}, True),
        (0xFFFF, 4, {0x1_0003}, False),
    ],
)
def test_io_permissions_map(port: int, size: int, bits: set[int], exits: bool) -> None:
    machine = Machine()
    machine.intercept(0x7B)
    for bit in bits:
        address = IOPM + bit // 8
        machine.memory.write_u8(address, machine.memory.read_u8(address) | 1 << bit % 8)
    machine.run()
    operation = op.PortIo(port, size, is_in=True, string=False, rep=False, immediate=False)
    assert machine.svm.intercept(operation, instruction(b"\xec")) is exits


@pytest.mark.parametrize(
    ("code", "operation", "info1"),
    [
        (b"\xec", op.PortIo(0x3F8, 1, True, False, False, False), 0x3F8 << 16 | 1 << 9 | 1 << 4 | 1),
        (b"\x66\xef", op.PortIo(0x80, 2, False, False, False, False), 0x80 << 16 | 1 << 9 | 1 << 5),
        (b"\xf3\x6d", op.PortIo(1, 4, True, True, True, False, 0), 1 << 16 | 1 << 9 | 1 << 6 | 0b1101),
        (b"\x67\x64\x6e", op.PortIo(1, 1, False, True, False, False, 0), 1 << 16 | 4 << 10 | 1 << 8 | 1 << 4 | 4),
        (b"\x6e", op.PortIo(1, 1, False, True, False, False, 0), 1 << 16 | 3 << 10 | 1 << 9 | 1 << 4 | 4),
    ],
)
def test_io_information(code: bytes, operation: op.PortIo, info1: int) -> None:
    machine = Machine()
    machine.intercept(0x7B)
    machine.memory.write(IOPM, b"\xff" * 0x2001)
    machine.run()
    assert machine.svm.intercept(operation, instruction(code))
    assert (machine.stored("EXITCODE"), machine.stored("EXITINFO1")) == (0x7B, info1)
    assert machine.stored("EXITINFO2") == machine.stored("nRIP") == GUEST_RIP + len(code)


@pytest.mark.parametrize(
    ("source", "delivering", "info2", "interrupted"),
    [
        (TaskSwitchSource.CALL, None, 0, 0),
        (TaskSwitchSource.IRET, None, 1 << 36, 0),
        (TaskSwitchSource.JMP, None, 1 << 38, 0),
        (TaskSwitchSource.GATE, Event(8, error_code=0), 1 << 44, 0x8000_0B08),
        (TaskSwitchSource.GATE, Event(13, error_code=0x53), 1 << 44 | 0x53, 0x53_8000_0B0D),
    ],
)
def test_task_switch(source: TaskSwitchSource, delivering: Event | None, info2: int, interrupted: int) -> None:
    machine = Machine()
    machine.intercept(0x7D)
    machine.run()
    assert machine.svm.intercept(op.TaskSwitch(0x48, source, delivering), instruction(NOP))
    assert (machine.stored("EXITCODE"), machine.stored("EXITINFO1")) == (0x7D, 0x48)
    assert (machine.stored("EXITINFO2"), machine.stored("EXITINTINFO")) == (info2, interrupted)


def test_without_decode_assists_and_next_rip() -> None:
    from attrs import evolve  # noqa: PLC0415 - for this one test

    machine = Machine()
    machine.svm.operation.features = evolve(machine.svm.operation.features, decode_assists=False, next_rip=False)
    machine.intercept(0x79)
    machine.run()
    assert machine.svm.intercept(op.InvalidatePage(0x1000), instruction(NOP))
    assert (machine.stored("EXITINFO1"), machine.stored("nRIP")) == (0, 0)


@pytest.mark.parametrize(
    ("control", "extra", "code"),
    [
        (0, (), 0xA6),
        (1 << 8 | 1 << 24, (), None),  # V_IRQ, which RFLAGS.IF holds back
        (1 << 8, (), None),
        (1 << 11 | 1 << 26, (0x61,), None),  # a virtual NMI
        (1 << 11, (), 0xA6),
        (0, (0x78,), 0x78),
        (1 << 8, (0x78,), 0x78),
    ],
)
def test_idle_hlt(control: int, extra: tuple[int, ...], code: int | None) -> None:
    machine = Machine()
    for number in (0xA6, *extra):
        machine.intercept(number)
    machine.fields["virtual interrupt control"] = control
    machine.run()
    assert machine.svm.intercept(Simple(Plain.HLT), instruction(b"\xf4")) is (code is not None)
    if code is not None:
        assert (machine.stored("EXITCODE"), machine.stored("nRIP")) == (code, GUEST_RIP + 1)


def test_idle_hlt_of_a_processor_without_it() -> None:
    machine = Machine("zen-server")
    machine.intercept(0xA6)
    machine.run()
    assert not machine.svm.intercept(Simple(Plain.HLT), instruction(b"\xf4"))


class TestPauseFilter:
    """APM Vol. 2, "Pause Intercept Filtering"."""

    PAUSE = Simple(Plain.PAUSE)
    CODE = b"\xf3\x90"

    def machine(self, count: int, threshold: int) -> Machine:
        machine = Machine()
        machine.intercept(0x77)
        machine.fields |= {"PAUSE filter count": count, "PAUSE filter threshold": threshold}
        machine.run()
        return machine

    def pauses_until_exit(self, machine: Machine, most: int = 50, gap: int = 0) -> int | None:
        for number in range(most):
            assert machine.svm.intercept(self.PAUSE, instruction(self.CODE))
            if not machine.svm.non_root:
                return number
            machine.processor.ticks += gap
        return None

    def test_no_count(self) -> None:
        assert self.pauses_until_exit(self.machine(0, 0)) == 0

    def test_count(self) -> None:
        machine = self.machine(9, 0)
        assert self.pauses_until_exit(machine) == 9
        assert machine.stored("RIP") == GUEST_RIP + 18

    def test_threshold(self) -> None:
        assert self.pauses_until_exit(self.machine(9, 100), gap=100) == 9
        assert self.pauses_until_exit(self.machine(9, 100), gap=101) is None


@pytest.mark.parametrize("masking", [False, True])
def test_cr8_under_v_intr_masking(masking: bool) -> None:
    machine = Machine()
    machine.fields["virtual interrupt control"] = (1 << 24 if masking else 0) | 5
    machine.run()
    read, write = op.MoveFromControlRegister(8, 3), op.MoveToControlRegister(8, 3, 0xC)
    assert machine.svm.intercept(read, instruction(NOP)) is masking
    if masking:
        assert (machine.state.gpr[3], machine.state.rip) == (5, GUEST_RIP + 1)
    assert machine.svm.intercept(write, instruction(NOP)) is masking
    assert machine.svm.operation.virtual & 0xFF == (0xC if masking else 5)
    assert not machine.svm.intercept(op.MoveToControlRegister(8, 3, 0x10), instruction(NOP))
    assert machine.processor.cr8 == 0
