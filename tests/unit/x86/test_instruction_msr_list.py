"""RDMSRLIST and WRMSRLIST of a guest: the tables, progress in RCX, faults, VM exits."""

from __future__ import annotations

import struct

import pytest

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.bench.hypervisor import GUEST_CODE, install
from vtx.machine import Machine, RunResult, StopReason

RDMSRLIST, WRMSRLIST = "f20f01c6", "f30f01c6"
ADDRESSES, VALUES, BITMAPS = 0x40_0000, 0x40_1000, 0x40_2000
LSTAR, CSTAR, KERNEL_GS, BARRIER, SPEC_CTRL = 0xC000_0082, 0xC000_0083, 0xC000_0102, 0x2F, 0x48


def setup(rcx: int, rsi: int = ADDRESSES, rdi: int = VALUES) -> str:
    """mov rcx,... ; mov rsi,... ; mov rdi,..."""
    return "".join(opcode + struct.pack("<Q", value).hex() for opcode, value in _operands(rcx, rsi, rdi))


def _operands(rcx: int, rsi: int, rdi: int) -> list[tuple[str, int]]:
    return [("48b9", rcx), ("48be", rsi), ("48bf", rdi)]


CODE = 30  # bytes of `setup`


class Guest:
    """A guest that executes one list instruction and halts; ``entries`` are (position, MSR address, value)."""

    def __init__(
        self,
        code: str,
        entries: list[tuple[int, int, int]],
        *,
        rcx: int | None = None,
        controls: tuple[Control, ...] = (),
        fields: dict[Field, int] | None = None,
        enable: bool = True,
        **operands: int,
    ) -> None:
        self.machine = Machine(profile="everything", memory=16 << 20)
        tertiary = c.ENABLE_MSR_LIST_INSTRUCTIONS.mask if enable else 0
        if rcx is None:
            rcx = sum(1 << position for position, _, _ in entries)
        self.vmcs: Vmcs = install(
            self.machine,
            guest=bytes.fromhex(setup(rcx, **operands) + code + "f4"),
            controls=(c.HLT_EXITING, c.USE_MSR_BITMAPS, c.ACTIVATE_TERTIARY_CONTROLS, *controls),
            fields={
                f.EXCEPTION_BITMAP: 1 << 6 | 1 << 13 | 1 << 14,
                f.MSR_BITMAP_ADDRESS: BITMAPS,
                f.TERTIARY_PROCESSOR_BASED_CONTROLS: tertiary,
                **(fields or {}),
            },
        )
        for position, address, value in entries:
            self.machine.memory.write_u64(ADDRESSES + 8 * position, address)
            self.machine.memory.write_u64(VALUES + 8 * position, value)

    def run(self) -> RunResult:
        return self.machine.run(max_instructions=1000)

    def finish(self) -> Reason:
        result = self.run()
        assert result.exit_value == 0, result.message
        return Reason(self.vmcs[f.EXIT_REASON])

    def value(self, position: int) -> int:
        return self.machine.memory.read_u64(VALUES + 8 * position)


def test_wrmsrlist__writes_from_the_lowest_bit_up() -> None:
    guest = Guest(WRMSRLIST, [(63, LSTAR, 0x1234), (0, LSTAR, 0x999), (5, KERNEL_GS, 0x77), (6, BARRIER, 0)])
    assert guest.finish() is Reason.HLT
    assert guest.machine.cpu.msrs.read(LSTAR) == 0x1234
    assert guest.machine.cpu.msrs.read(KERNEL_GS) == 0x77


def test_rdmsrlist__stores_values() -> None:
    guest = Guest(RDMSRLIST, [(1, LSTAR, 1), (2, CSTAR, 2), (7, BARRIER, 3)])
    guest.machine.cpu.msrs.write(LSTAR, 0xABC)
    guest.machine.cpu.msrs.write(CSTAR, 0xDEF)
    assert guest.finish() is Reason.HLT
    assert [guest.value(position) for position in (0, 1, 2, 7)] == [0, 0xABC, 0xDEF, 0]


@pytest.mark.parametrize("code", [RDMSRLIST, WRMSRLIST])
def test_nothing_to_do(code: str) -> None:
    assert Guest(code, [], rcx=0).finish() is Reason.HLT


@pytest.mark.parametrize("code", [RDMSRLIST, WRMSRLIST])
@pytest.mark.parametrize(
    ("entries", "operands"),
    [
        ([(0, LSTAR, 0x5), (3, 0x1_0000_0010, 0), (4, LSTAR, 0x6)], {}),
        ([(0, LSTAR, 0x5), (2, 0x1FFF, 0)], {}),
        ([(0, LSTAR, 0)], {"rsi": ADDRESSES + 4}),
        ([(0, LSTAR, 0)], {"rdi": VALUES + 1}),
        ([(0, LSTAR, 0)], {"rsi": 1 << 63}),
    ],
)
def test_faults__come_after_what_could_be_done(
    code: str, entries: list[tuple[int, int, int]], operands: dict[str, int]
) -> None:
    guest = Guest(code, entries, **operands)
    guest.machine.cpu.msrs.write(LSTAR, 0x7)
    assert guest.finish() is Reason.EXCEPTION_OR_NMI
    assert guest.vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] & 0xFF == 13
    assert guest.vmcs[f.GUEST_RIP] == GUEST_CODE + CODE
    begun = len(entries) > 1
    if code == WRMSRLIST:
        assert guest.machine.cpu.msrs.read(LSTAR) == (0x5 if begun else 0x7)
    else:
        assert guest.value(0) == (0x7 if begun else 0)


def test_wrmsrlist__faults_as_wrmsr_would() -> None:
    guest = Guest(WRMSRLIST, [(0, KERNEL_GS, 5), (1, LSTAR, 1 << 63), (2, CSTAR, 6)])
    assert guest.finish() is Reason.EXCEPTION_OR_NMI
    assert guest.machine.cpu.msrs.read(KERNEL_GS) == 5
    assert guest.machine.cpu.msrs.read(CSTAR) == 0


@pytest.mark.parametrize("code", [RDMSRLIST, WRMSRLIST])
def test_are_invalid_without_the_control(code: str) -> None:
    guest = Guest(code, [(0, LSTAR, 0)], enable=False)
    assert guest.finish() is Reason.EXCEPTION_OR_NMI
    assert guest.vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] & 0xFF == 6


@pytest.mark.parametrize(
    ("code", "bitmap", "reason"),
    [(RDMSRLIST, 0x400, Reason.RDMSRLIST), (WRMSRLIST, 0xC00, Reason.WRMSRLIST)],
)
def test_exit__names_the_msr_after_the_ones_before_are_done(code: str, bitmap: int, reason: Reason) -> None:
    guest = Guest(code, [(0, LSTAR, 0x11), (1, CSTAR, 0x22), (2, KERNEL_GS, 0x33)])
    offset = CSTAR & 0x1FFF
    guest.machine.memory.write_u8(BITMAPS + bitmap + offset // 8, 1 << offset % 8)
    guest.machine.cpu.msrs.write(LSTAR, 0x55)
    assert guest.finish() is reason
    assert guest.vmcs[f.EXIT_QUALIFICATION] == CSTAR
    assert guest.vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == 4
    if reason is Reason.WRMSRLIST:
        assert guest.vmcs[f.MSR_DATA] == 0x22
        assert guest.machine.cpu.msrs.read(LSTAR) == 0x11
    else:
        assert guest.value(0) == 0x55
        assert guest.value(1) == 0x22


def test_virtualized_msr__is_not_modelled() -> None:
    virtualize = c.VIRTUALIZE_IA32_SPEC_CTRL.mask | c.ENABLE_MSR_LIST_INSTRUCTIONS.mask
    guest = Guest(RDMSRLIST, [(0, SPEC_CTRL, 0)], fields={f.TERTIARY_PROCESSOR_BASED_CONTROLS: virtualize})
    result = guest.run()
    assert result.reason is StopReason.NOT_MODELLED
    assert "RDMSRLIST or WRMSRLIST of an MSR that is virtualized" in result.message
