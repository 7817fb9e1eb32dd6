"""UMONITOR, UMWAIT and TPAUSE: faults, flags, time, and their VM exits."""

from __future__ import annotations

import pytest

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.bench.hypervisor import GUEST_CODE, install
from vtx.machine import Machine

UMONITOR, UMWAIT, TPAUSE = "f30faef0", "f20faef1", "660faef1"  # of RAX, ECX, ECX
UMWAIT_CONTROL = 0xE1
MOV_ECX_0, MOV_ECX_1, MOV_ECX_2 = "b900000000", "b901000000", "b902000000"
FAR_AWAY = "31c0ba00000001"  # xor eax,eax; mov edx,1000000h: a deadline of EDX:EAX
LONG_AGO = "31c031d2"
STC = "f9"
HLT = "f4"
RESULT = "9c5b" + HLT  # pushfq; pop rbx

EXCEPTIONS: dict[Field, int] = {f.EXCEPTION_BITMAP: 1 << 6 | 1 << 13}


def run(
    listing: str, *controls: Control, limit: int = 0, profile: str = "everything", enable: bool = True
) -> tuple[Machine, Vmcs]:
    machine = Machine(profile=profile, memory=16 << 20)
    wanted = (c.HLT_EXITING, *controls, *((c.ENABLE_USER_WAIT_AND_PAUSE,) if enable else ()))
    vmcs = install(machine, guest=bytes.fromhex(listing), controls=wanted, fields=EXCEPTIONS)
    if limit:
        assert machine.cpu.msrs.write(UMWAIT_CONTROL, limit)
    result = machine.run(max_instructions=1000)
    assert result.exit_value == 0, result.message
    return machine, vmcs


def exception(vmcs: Vmcs) -> int:
    assert vmcs[f.EXIT_REASON] == Reason.EXCEPTION_OR_NMI
    return vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] & 0xFF


@pytest.mark.parametrize("code", [UMONITOR, UMWAIT, TPAUSE])
def test_are_invalid_without_the_control(code: str) -> None:
    _, vmcs = run(MOV_ECX_0 + code + HLT, enable=False)
    assert exception(vmcs) == 6
    assert vmcs[f.GUEST_RIP] == GUEST_CODE + 5


@pytest.mark.parametrize("code", [UMONITOR, UMWAIT, TPAUSE])
def test_are_invalid_without_the_feature(code: str) -> None:
    """And not the MFENCE that their bytes are without the prefix."""
    _, vmcs = run(MOV_ECX_0 + code + HLT, enable=False, profile="skylake-server")
    assert exception(vmcs) == 6


@pytest.mark.parametrize("code", [UMWAIT, TPAUSE])
def test_reserved_bits_of_the_operand_fault(code: str) -> None:
    _, vmcs = run(MOV_ECX_2 + code + HLT, c.RDTSC_EXITING)
    assert exception(vmcs) == 13


@pytest.mark.parametrize(("code", "reason"), [(UMWAIT, Reason.UMWAIT), (TPAUSE, Reason.TPAUSE)])
def test_exit_with_rdtsc_exiting(code: str, reason: Reason) -> None:
    _, vmcs = run(MOV_ECX_1 + code + HLT, c.RDTSC_EXITING)
    assert vmcs[f.EXIT_REASON] == reason
    assert vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == 4
    assert vmcs[f.VM_EXIT_INSTRUCTION_INFORMATION] == 1 << 3 | 1 << 11  # ECX, 32 bits
    assert vmcs[f.EXIT_QUALIFICATION] == 0


def test_umonitor__never_exits_and_reads_its_address() -> None:
    _, vmcs = run("48c7c000002000" + UMONITOR + HLT, c.RDTSC_EXITING)  # mov rax,200000h
    assert vmcs[f.EXIT_REASON] == Reason.HLT
    _, vmcs = run("48b80000000000800000" + UMONITOR + HLT)  # mov rax,800000000000h
    assert exception(vmcs) == 13


@pytest.mark.parametrize(
    ("code", "deadline", "limit", "carry"),
    [
        (TPAUSE, FAR_AWAY, 0, 0),
        (TPAUSE, FAR_AWAY, 1000, 1),
        (TPAUSE, FAR_AWAY, 1 << 20, 0),  # the model gives up before the limit
        (TPAUSE, LONG_AGO, 1000, 0),
        (UMWAIT, FAR_AWAY, 100, 1),
        (UMWAIT, FAR_AWAY, 0, 0),
    ],
)
def test_carry__tells_that_the_limit_ended_the_wait(code: str, deadline: str, limit: int, carry: int) -> None:
    machine, vmcs = run(MOV_ECX_0 + deadline + STC + code + RESULT, limit=limit & ~3)
    assert vmcs[f.EXIT_REASON] == Reason.HLT
    assert vmcs[f.GUEST_RFLAGS] & 1 == carry
    assert machine.cpu.state.gpr[3] != 0


def test_tpause__lets_time_pass() -> None:
    def ticks(deadline: str, limit: int = 0) -> int:
        return run(MOV_ECX_0 + deadline + TPAUSE + HLT, limit=limit)[0].now()

    assert ticks(FAR_AWAY) - ticks(LONG_AGO) > 3000
    assert 800 < ticks(FAR_AWAY, limit=1000) - ticks(LONG_AGO) < 1000


def test_control_msr__has_reserved_bits() -> None:
    msrs = Machine(profile="everything", memory=2 << 20).cpu.msrs
    assert msrs.write(UMWAIT_CONTROL, 0xFFFF_FFFD)
    assert not msrs.write(UMWAIT_CONTROL, 2)
    assert not msrs.write(UMWAIT_CONTROL, 1 << 32)
    assert not Machine(memory=2 << 20).cpu.msrs.exists(UMWAIT_CONTROL)
