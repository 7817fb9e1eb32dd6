"""Control structures that point to where no RAM is: the processor reads ones there, and that has consequences."""

from __future__ import annotations

import pytest
from tiny_guests import PRIVATE, UNBACKED

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import AbortIndicator, InstructionError
from vmcs.fields import Field
from vtx.bench.hypervisor import GUEST_CODE, HOST_CODE, VMCS_REGION, VMXON_REGION, install
from vtx.bench.listing import code
from vtx.cli.summary import entry_failure
from vtx.machine import Machine, RunResult, StopReason
from vtx.vmx.outcome import VmFailInvalid, VmFailValid, VmSucceed

NOWHERE = pytest.mark.parametrize("nowhere", [UNBACKED, PRIVATE], ids=hex)

# Ends with the basic exit reason, which the host reads after the first VM exit.
REPORT = code("""\
0f 01 c2                ; vmlaunch
eb 0a                   ; jmp failed
ba 02 44 00 00          ; mov edx, 0x4402
0f 78 d0                ; vmread rax, rdx
eb 05                   ; jmp end
b8 ff 00 00 00          ; failed: mov eax, 0xff
ba f4 00 00 00          ; end: mov edx, 0xf4
ef                      ; out dx, eax
f4                      ; hlt
""")
FAILED = 0xFF
IN_GUEST = code("e4 80                   ; in al, 0x80")
RDMSR_GUEST = code("""\
b9 10 00 00 00          ; mov ecx, 0x10
0f 32                   ; rdmsr
""")


def run(
    guest: bytes,
    controls: tuple[c.Control, ...] = (),
    fields: dict[Field, int] | None = None,
    host: bytes = REPORT,
) -> tuple[Machine, RunResult]:
    machine = Machine(memory=16 << 20)
    install(machine, host=host, guest=guest + b"\xf4", controls=controls, fields=fields)
    return machine, machine.run(max_instructions=1_000_000)


@NOWHERE
def test_io_bitmaps_of_ones__make_every_port_exit(nowhere: int) -> None:
    fields = {f.IO_BITMAP_A_ADDRESS: nowhere, f.IO_BITMAP_B_ADDRESS: nowhere}
    _, result = run(IN_GUEST, (c.USE_IO_BITMAPS,), fields)
    assert result.exit_value == 30


@NOWHERE
def test_an_msr_bitmap_of_ones__makes_every_msr_exit(nowhere: int) -> None:
    _, result = run(RDMSR_GUEST, (c.USE_MSR_BITMAPS,), {f.MSR_BITMAP_ADDRESS: nowhere})
    assert result.exit_value == 31


def test_bitmaps_of_zeros__let_everything_pass() -> None:
    empty = {f.IO_BITMAP_A_ADDRESS: 0x40_0000, f.IO_BITMAP_B_ADDRESS: 0x40_0000, f.MSR_BITMAP_ADDRESS: 0x40_0000}
    vmcall = b"\x0f\x01\xc1"
    machine, result = run(IN_GUEST + RDMSR_GUEST + vmcall, (c.USE_IO_BITMAPS, c.USE_MSR_BITMAPS), empty)
    assert result.exit_value == 18
    assert machine.exit_counts == {"VMCALL": 1}


@NOWHERE
def test_ept_of_ones__is_a_misconfiguration(nowhere: int) -> None:
    _, result = run(b"\x90", (c.ENABLE_EPT,), {f.EPT_POINTER: nowhere | 0x1E})
    assert result.exit_value == 49


@NOWHERE
def test_an_msr_load_area_of_ones__fails_the_entry_at_its_first_entry(nowhere: int) -> None:
    fields = {f.VM_ENTRY_MSR_LOAD_COUNT: 1, f.VM_ENTRY_MSR_LOAD_ADDRESS: nowhere}
    machine, result = run(b"\x90", (), fields)
    assert result.exit_value == 1 << 31 | 34
    assert machine.cpu.vmx.current_vmcs is not None
    assert machine.cpu.vmx.current_vmcs[f.EXIT_QUALIFICATION] == 1


@NOWHERE
def test_a_host_msr_load_area_of_ones__aborts(nowhere: int) -> None:
    fields = {f.VM_EXIT_MSR_LOAD_COUNT: 1, f.VM_EXIT_MSR_LOAD_ADDRESS: nowhere}
    machine, result = run(b"\x0f\xa2", (), fields)
    assert result.reason is StopReason.SHUTDOWN
    assert result.message.startswith("VMX abort 4")
    assert machine.memory.read_u32(VMCS_REGION + 4) == AbortIndicator.LOADING_HOST_MSRS


@NOWHERE
def test_a_host_that_is_not_there__is_a_triple_fault(nowhere: int) -> None:
    _, result = run(b"\x0f\xa2", (), {f.HOST_CR3: nowhere})
    assert result.reason is StopReason.SHUTDOWN
    assert "triple fault" in result.message


@NOWHERE
def test_a_guest_whose_page_tables_are_not_there__exits_with_a_triple_fault(nowhere: int) -> None:
    _, result = run(b"\x90", (), {f.GUEST_CR3: nowhere})
    assert result.exit_value == 2


@NOWHERE
def test_regions_that_are_not_there__have_a_wrong_revision(nowhere: int) -> None:
    machine = Machine(memory=16 << 20)
    install(machine)
    vmx = machine.cpu.vmx
    assert vmx.vmptrld(nowhere) == VmFailValid(InstructionError.VMPTRLD_WITH_INCORRECT_VMCS_REVISION_IDENTIFIER)
    assert vmx.vmclear(nowhere) == VmSucceed()
    vmx.vmxoff()
    assert vmx.vmxon(nowhere) == VmFailInvalid()


def test_the_last_failing_entry__is_explained() -> None:
    machine, result = run(b"\x90", (), {f.GUEST_RFLAGS: 0})
    assert result.exit_value == 1 << 31 | 33
    why = entry_failure(machine)
    assert why is not None
    assert why.startswith("guest.rflags-fixed: ")
    assert "Guest RFLAGS" in why
    assert "SDM Vol. 3" in why


def test_no_failing_entry__needs_no_explanation() -> None:
    machine, result = run(b"\x0f\xa2")
    assert result.exit_value == 10
    assert entry_failure(machine) is None


def test_vmx_regions_are_apart() -> None:
    assert len({HOST_CODE, GUEST_CODE, VMXON_REGION, VMCS_REGION}) == 4
