"""Which operations of a guest exit, with what reason and qualification: one row per decision."""

from __future__ import annotations

from typing import get_args

import pytest
from vmx_machine import launch

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vtx.vmx import intercepts
from vtx.x86 import operations as op
from vtx.x86.decode import Instruction, decode
from vtx.x86.operations import Operation, Plain, Simple
from vtx.x86.outcome import Fault, Vector

IO_A, IO_B, MSR_BITMAP = 0x10_0000, 0x10_1000, 0x10_2000
CPUID = bytes.fromhex("0fa2")


def instruction(encoding: bytes | str = CPUID) -> Instruction:
    decoded = decode(bytes.fromhex(encoding) if isinstance(encoding, str) else encoding, 64)
    assert decoded is not None
    return decoded


def exit_reason(
    operation: Operation,
    *controls: Control,
    fields: dict[Field, int] | None = None,
    encoding: str = "0fa2",
    memory: dict[int, int] | None = None,
) -> tuple[Reason, int] | None:
    """(Reason, qualification) of the exit ``operation`` causes in a new guest, or None."""
    processor, vmx, vmcs = launch(
        *controls,
        fields={
            f.IO_BITMAP_A_ADDRESS: IO_A,
            f.IO_BITMAP_B_ADDRESS: IO_B,
            f.MSR_BITMAP_ADDRESS: MSR_BITMAP,
            **(fields or {}),
        },
    )
    for address, value in (memory or {}).items():
        processor.memory.write_u8(address, value)
    rip = processor.state.rip
    exited = vmx.intercept(operation, instruction(encoding))
    assert exited != vmx.non_root
    if not exited:
        assert processor.state.rip == rip
        return None
    assert vmcs[f.GUEST_RIP] == rip
    assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == len(encoding) // 2
    return Reason(vmcs[f.EXIT_REASON]), vmcs[f.EXIT_QUALIFICATION]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Plain.CPUID, Reason.CPUID),
        (Plain.INVD, Reason.INVD),
        (Plain.XSETBV, Reason.XSETBV),
        (Plain.GETSEC, Reason.GETSEC),
    ],
)
def test_unconditional(kind: Plain, reason: Reason) -> None:
    assert exit_reason(Simple(kind)) == (reason, 0)


@pytest.mark.parametrize(
    ("kind", "control", "reason"),
    [
        (Plain.HLT, c.HLT_EXITING, Reason.HLT),
        (Plain.RDPMC, c.RDPMC_EXITING, Reason.RDPMC),
        (Plain.RDTSC, c.RDTSC_EXITING, Reason.RDTSC),
        (Plain.RDTSCP, c.RDTSC_EXITING, Reason.RDTSCP),
        (Plain.MONITOR, c.MONITOR_EXITING, Reason.MONITOR),
        (Plain.PAUSE, c.PAUSE_EXITING, Reason.PAUSE),
        (Plain.WBINVD, c.WBINVD_EXITING, Reason.WBINVD),
        (Plain.RDRAND, c.RDRAND_EXITING, Reason.RDRAND),
        (Plain.RDSEED, c.RDSEED_EXITING, Reason.RDSEED),
    ],
)
def test_one_control_decides(kind: Plain, control: Control, reason: Reason) -> None:
    encoding = {Plain.RDRAND: "0fc7f0", Plain.RDSEED: "0fc7f8"}.get(kind, "0fa2")
    assert exit_reason(Simple(kind), control, encoding=encoding) == (reason, 0)
    assert exit_reason(Simple(kind), encoding=encoding) is None


@pytest.mark.parametrize("armed", [False, True])
def test_mwait_tells_whether_the_monitor_is_armed(armed: bool) -> None:
    operation = op.MonitorWait(armed=armed)
    assert exit_reason(operation, c.MWAIT_EXITING, encoding="0f01c9") == (Reason.MWAIT, int(armed))
    assert exit_reason(operation, encoding="0f01c9") is None


def to_cr(number: int, value: int, register: int = 3) -> Operation:
    return op.MoveToControlRegister(number, register, value)


CR0_TS, CR0_MP = 8, 2


@pytest.mark.parametrize(
    ("mask", "shadow", "value", "exits"),
    [
        (0, 0, 0xFFFF_FFFF, False),
        (CR0_TS, 0, CR0_MP, False),
        (CR0_TS, 0, CR0_TS, True),
        (CR0_TS, CR0_TS, CR0_TS, False),
        (CR0_TS, CR0_TS, 0, True),
        (1 << 31, 1 << 31, 1 << 31, False),
    ],
)
@pytest.mark.parametrize("number", [0, 4])
def test_mov_to_cr0_cr4__exits_on_a_host_owned_bit_that_differs(
    number: int, mask: int, shadow: int, value: int, exits: bool
) -> None:
    masks, shadows = (
        (f.CR0_GUEST_HOST_MASK, f.CR0_READ_SHADOW) if number == 0 else (f.CR4_GUEST_HOST_MASK, f.CR4_READ_SHADOW)
    )
    expected = (Reason.CR_ACCESS, number | 3 << 8) if exits else None
    assert exit_reason(to_cr(number, value), fields={masks: mask, shadows: shadow}) == expected


@pytest.mark.parametrize(
    ("count", "value", "exits"), [(0, 0x5000, True), (2, 0x6000, False), (2, 0x7000, True), (3, 0x7000, False)]
)
def test_mov_to_cr3__targets(count: int, value: int, exits: bool) -> None:
    fields = {
        f.CR3_TARGET_COUNT: count,
        f.CR3_TARGET_VALUE_0: 0x5000,
        f.CR3_TARGET_VALUE_1: 0x6000,
        f.CR3_TARGET_VALUE_2: 0x7000,
    }
    expected = (Reason.CR_ACCESS, 3 | 3 << 8) if exits else None
    assert exit_reason(to_cr(3, value), c.CR3_LOAD_EXITING, fields=fields) == expected
    assert exit_reason(to_cr(3, value), fields=fields) is None


def test_mov_from_cr3_and_cr8() -> None:
    for number, control in ((3, c.CR3_STORE_EXITING), (8, c.CR8_STORE_EXITING)):
        operation = op.MoveFromControlRegister(number, 15)
        assert exit_reason(operation, control) == (Reason.CR_ACCESS, number | 1 << 4 | 15 << 8)
        assert exit_reason(operation) is None


def test_mov_to_cr8() -> None:
    assert exit_reason(to_cr(8, 5), c.CR8_LOAD_EXITING) == (Reason.CR_ACCESS, 8 | 3 << 8)
    assert exit_reason(to_cr(8, 5)) is None


@pytest.mark.parametrize(
    ("mask", "shadow", "exits"), [(0, CR0_TS, False), (CR0_TS, 0, False), (CR0_TS, CR0_TS, True), (CR0_MP, 0xF, False)]
)
def test_clts(mask: int, shadow: int, exits: bool) -> None:
    fields = {f.CR0_GUEST_HOST_MASK: mask, f.CR0_READ_SHADOW: shadow}
    assert exit_reason(op.ClearTaskSwitched(), fields=fields) == ((Reason.CR_ACCESS, 2 << 4) if exits else None)


@pytest.mark.parametrize(
    ("mask", "shadow", "source", "exits"),
    [
        (0, 0, 0xF, False),
        (1, 0, 1, True),
        (1, 1, 0, False),  # LMSW cannot clear PE
        (1, 1, 1, False),
        (CR0_TS, CR0_TS, 0, True),
        (CR0_TS, 0, CR0_TS, True),
        (CR0_TS, 0, CR0_MP, False),
        (0xFFF0, 0, 0xFFF0, False),  # only bits 3:0 count
    ],
)
def test_lmsw(mask: int, shadow: int, source: int, exits: bool) -> None:
    fields = {f.CR0_GUEST_HOST_MASK: mask, f.CR0_READ_SHADOW: shadow}
    expected = (Reason.CR_ACCESS, 3 << 4 | source << 16) if exits else None
    assert exit_reason(op.LoadMachineStatusWord(source, None), fields=fields) == expected


def test_lmsw_from_memory__reports_the_linear_address() -> None:
    _, vmx, vmcs = launch(fields={f.CR0_GUEST_HOST_MASK: 8})
    assert vmx.intercept(op.LoadMachineStatusWord(8, 0x1234), instruction("0f0130"))
    assert vmcs[f.EXIT_QUALIFICATION] == 3 << 4 | 1 << 6 | 8 << 16
    assert vmcs[f.GUEST_LINEAR_ADDRESS] == 0x1234


@pytest.mark.parametrize("write", [True, False])
def test_mov_dr(write: bool) -> None:
    operation = op.MoveDebugRegister(7, 2, write)
    direction = 0 if write else 1 << 4
    assert exit_reason(operation, c.MOV_DR_EXITING) == (Reason.DR_ACCESS, 7 | direction | 2 << 8)
    assert exit_reason(operation) is None


def test_invlpg_and_invpcid() -> None:
    assert exit_reason(op.InvalidatePage(0x1234), c.INVLPG_EXITING) == (Reason.INVLPG, 0x1234)
    assert exit_reason(op.InvalidatePage(0x1234)) is None
    invpcid = "660f38824808"  # INVPCID RCX, [RAX + 8]
    operation = op.InvalidateProcessContext()
    assert exit_reason(operation, c.INVLPG_EXITING, c.ENABLE_INVPCID, encoding=invpcid) == (Reason.INVPCID, 8)
    assert exit_reason(operation, c.ENABLE_INVPCID, encoding=invpcid) is None


@pytest.mark.parametrize(
    ("encoding", "local", "reason", "identity"),
    [
        ("0f0100", False, Reason.GDTR_IDTR_ACCESS, 0),
        ("0f0108", False, Reason.GDTR_IDTR_ACCESS, 1),
        ("0f0110", False, Reason.GDTR_IDTR_ACCESS, 2),
        ("0f0118", False, Reason.GDTR_IDTR_ACCESS, 3),
        ("0f0000", True, Reason.LDTR_TR_ACCESS, 0),
        ("0f0008", True, Reason.LDTR_TR_ACCESS, 1),
        ("0f0010", True, Reason.LDTR_TR_ACCESS, 2),
        ("0f0018", True, Reason.LDTR_TR_ACCESS, 3),
    ],
    ids=["SGDT", "SIDT", "LGDT", "LIDT", "SLDT", "STR", "LLDT", "LTR"],
)
def test_descriptor_tables(encoding: str, local: bool, reason: Reason, identity: int) -> None:
    operation = op.DescriptorTableAccess(local)
    assert exit_reason(operation, encoding=encoding) is None
    _, vmx, vmcs = launch(c.DESCRIPTOR_TABLE_EXITING)
    assert vmx.intercept(operation, instruction(encoding))
    assert vmcs[f.EXIT_REASON] == reason
    assert vmcs[f.VM_EXIT_INSTRUCTION_INFORMATION] >> 28 & 3 == identity


@pytest.mark.parametrize(
    ("index", "read_byte", "write_byte"),
    [
        (0x10, MSR_BITMAP + 2, MSR_BITMAP + 0x802),
        (0x1FFF, MSR_BITMAP + 0x3FF, MSR_BITMAP + 0xBFF),
        (0xC000_0080, MSR_BITMAP + 0x410, MSR_BITMAP + 0xC10),
        (0xC000_1FFF, MSR_BITMAP + 0x7FF, MSR_BITMAP + 0xFFF),
    ],
)
def test_msr_bitmaps(index: int, read_byte: int, write_byte: int) -> None:
    bit = 1 << (index & 7)
    read, write = op.ReadMsr(index), op.WriteMsr(index, 0)
    for operation, mine, others, reason in (
        (read, read_byte, write_byte, Reason.RDMSR),
        (write, write_byte, read_byte, Reason.WRMSR),
    ):
        assert exit_reason(operation, c.USE_MSR_BITMAPS, memory={mine: bit}) == (reason, 0)
        assert exit_reason(operation, c.USE_MSR_BITMAPS, memory={mine: bit ^ 0xFF, others: 0xFF}) is None


@pytest.mark.parametrize("index", [0x2000, 0xBFFF_FFFF, 0xC000_2000, 0xFFFF_FFFF])
def test_msr_outside_the_bitmaps__exits(index: int) -> None:
    assert exit_reason(op.ReadMsr(index), c.USE_MSR_BITMAPS) == (Reason.RDMSR, 0)


def test_msr_without_bitmaps__exits() -> None:
    assert exit_reason(op.WriteMsr(0x10, 0)) == (Reason.WRMSR, 0)


def port(number: int, size: int = 1, **more: bool) -> op.PortIo:
    return op.PortIo(number, size, more.get("is_in", False), more.get("string", False), more.get("rep", False), False)


@pytest.mark.parametrize(
    ("number", "size", "set_byte", "set_bit", "exits"),
    [
        (0x5000, 1, IO_A + 0xA00, 0, True),
        (0x5000, 1, IO_A + 0xA00, 1, False),
        (0x7FFF, 1, IO_A + 0xFFF, 7, True),
        (0x7FFF, 2, IO_B, 0, True),  # the second port of the access is in bitmap B
        (0x8000, 1, IO_B, 0, True),
        (0x4FFD, 4, IO_A + 0xA00, 0, True),
        (0x4FFC, 4, IO_A + 0xA00, 0, False),
        (0xFFFF, 1, IO_B + 0xFFF, 7, True),
        (0xFFFF, 1, IO_A, 0, False),
        (0xFFFF, 2, IO_A, 0, True),  # wraps
    ],
)
def test_io_bitmaps(number: int, size: int, set_byte: int, set_bit: int, exits: bool) -> None:
    result = exit_reason(port(number, size), c.USE_IO_BITMAPS, memory={set_byte: 1 << set_bit})
    assert result == ((Reason.IO_INSTRUCTION, number << 16 | size - 1) if exits else None)


def test_io_wrap__exits_with_empty_bitmaps() -> None:
    assert exit_reason(port(0xFFFF, 2), c.USE_IO_BITMAPS) == (Reason.IO_INSTRUCTION, 0xFFFF << 16 | 1)


def test_io_bitmaps__overrule_unconditional_exiting() -> None:
    assert exit_reason(port(0x80), c.UNCONDITIONAL_IO_EXITING) == (Reason.IO_INSTRUCTION, 0x80 << 16)
    assert exit_reason(port(0x80), c.UNCONDITIONAL_IO_EXITING, c.USE_IO_BITMAPS) is None
    assert exit_reason(port(0x80)) is None


def test_string_io__qualification_and_information() -> None:
    _, vmx, vmcs = launch(c.UNCONDITIONAL_IO_EXITING)
    operation = op.PortIo(0x3F8, 2, is_in=False, string=True, rep=True, immediate=False, linear=0x9876)
    assert vmx.intercept(operation, instruction("f366656f"))  # REP OUTS DX, WORD PTR GS:[RSI]
    assert vmcs[f.EXIT_QUALIFICATION] == 0x3F8 << 16 | 1 << 5 | 1 << 4 | 1
    assert vmcs[f.GUEST_LINEAR_ADDRESS] == 0x9876
    assert vmcs[f.VM_EXIT_INSTRUCTION_INFORMATION] == 2 << 7 | 5 << 15


def test_io_qualification__in_with_an_immediate_port() -> None:
    operation = op.PortIo(0x60, 4, is_in=True, string=False, rep=False, immediate=True)
    expected = (Reason.IO_INSTRUCTION, 0x60 << 16 | 1 << 6 | 1 << 3 | 3)
    assert exit_reason(operation, c.UNCONDITIONAL_IO_EXITING, encoding="e560") == expected


def test_task_switch__exits_always() -> None:
    operation = op.TaskSwitch(0x28, op.TaskSwitchSource.JMP)
    assert exit_reason(operation) == (Reason.TASK_SWITCH, 0x28 | 2 << 30)


@pytest.mark.parametrize(
    ("encoding", "information"),
    [("0fc7f3", 3 << 3 | 1 << 11), ("660fc7f3", 3 << 3), ("490fc7f7", 15 << 3 | 2 << 11)],
    ids=["32-bit", "16-bit", "64-bit"],
)
def test_rdrand__destination_and_operand_size(encoding: str, information: int) -> None:
    _, vmx, vmcs = launch(c.RDRAND_EXITING)
    assert vmx.intercept(Simple(Plain.RDRAND), instruction(encoding))
    assert vmcs[f.VM_EXIT_INSTRUCTION_INFORMATION] == information


@pytest.mark.parametrize(
    ("bitmap", "mask", "match", "error_code", "exits"),
    [
        (1 << 14, 0, 0, 5, True),
        (0, 0, 0, 5, False),
        (1 << 14, 1, 1, 5, True),
        (1 << 14, 1, 1, 4, False),
        (0, 1, 1, 4, True),
        (0, 1, 1, 5, False),
        (1 << 14, 0, 0xFFFF_FFFF, 0, False),  # the idiom for no page faults at all
        (0, 0, 0xFFFF_FFFF, 0, True),
    ],
)
def test_page_faults__by_error_code(bitmap: int, mask: int, match: int, error_code: int, exits: bool) -> None:
    fields = {
        f.EXCEPTION_BITMAP: bitmap,
        f.PAGE_FAULT_ERROR_CODE_MASK: mask,
        f.PAGE_FAULT_ERROR_CODE_MATCH: match,
    }
    _, vmx, vmcs = launch(fields=fields)
    fault = Fault(Vector.PF, error_code, 0xDEAD_B000)
    assert vmx.intercept(op.RaiseException(fault), instruction()) == exits
    if exits:
        assert vmcs[f.EXIT_REASON] == Reason.EXCEPTION_OR_NMI
        assert vmcs[f.EXIT_QUALIFICATION] == 0xDEAD_B000
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == 1 << 31 | 1 << 11 | 3 << 8 | 14
        assert vmcs[f.VM_EXIT_INTERRUPTION_ERROR_CODE] == error_code


def test_instruction_exits__save_rf_as_0() -> None:
    processor, vmx, vmcs = launch()
    processor.state.rflags |= 1 << 16
    assert vmx.intercept(Simple(Plain.CPUID), instruction())
    assert vmcs[f.GUEST_RFLAGS] == 2


@pytest.mark.parametrize(
    ("encoding", "control"),
    [("0f01f9", c.ENABLE_RDTSCP), ("f30fc7f8", c.ENABLE_RDTSCP), ("660f388208", c.ENABLE_INVPCID)],
    ids=["RDTSCP", "RDPID", "INVPCID"],
)
def test_instructions_that_controls_disable(encoding: str, control: Control) -> None:
    _, vmx, _ = launch()
    assert vmx.is_disabled(instruction(encoding))
    _, vmx, _ = launch(control)
    assert not vmx.is_disabled(instruction(encoding))
    vmx.vmcall()
    assert not vmx.is_disabled(instruction(encoding))


def test_every_operation_has_a_decision() -> None:
    assert set(get_args(Operation)) == set(intercepts._DECISIONS)
