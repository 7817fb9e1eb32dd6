"""A hypervisor of a few instructions, for measuring transitions: set up from Python, run as machine code.

The host gets every VM exit, reads why (three VMREADs), skips the guest's instruction (one VMWRITE) and resumes, as
often as R15 says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control, ControlWord
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.bench.listing import code
from vtx.machine import Machine
from vtx.vmx.outcome import VmSucceed
from vtx.x86.msr_table import IA32_FEATURE_CONTROL
from vtx.x86.state import AccessRights, Cr0, Cr4, Gpr, Segment

HOST_CODE: Final = 0x20_0000
HOST_EXIT: Final = HOST_CODE + 5
GUEST_CODE: Final = 0x20_1000
VMXON_REGION: Final = 0x30_0000
VMCS_REGION: Final = 0x30_1000

HOST: Final = """\
0f 01 c2                        ; vmlaunch
eb 26                           ; jmp short $+28h
ba 02 44 00 00                  ; mov edx,4402h
0f 78 d0                        ; vmread rax,rdx
ba 0c 44 00 00                  ; mov edx,440Ch
0f 78 d1                        ; vmread rcx,rdx
ba 1e 68 00 00                  ; mov edx,681Eh
0f 78 d3                        ; vmread rbx,rdx
48 01 cb                        ; add rbx,rcx
0f 79 d3                        ; vmwrite rdx,rbx
49 ff cf                        ; dec r15
74 0a                           ; je short $+0Ch
0f 01 c3                        ; vmresume
b8 01 00 00 00                  ; mov eax,1
eb 02                           ; jmp short $+4
31 c0                           ; xor eax,eax
ba f4 00 00 00                  ; mov edx,0F4h
ef                              ; out dx,eax
f4                              ; hlt
"""
"""VMLAUNCH, then the handler of VM exits at `HOST_EXIT`; ends with 0, or 1 if a VM entry failed."""

GUEST: Final = """\
0f a2                           ; cpuid
eb fc                           ; jmp short $-2
"""

_CONTROL_FIELDS: Final = {
    ControlWord.PIN_BASED: f.PIN_BASED_CONTROLS,
    ControlWord.PRIMARY: f.PRIMARY_PROCESSOR_BASED_CONTROLS,
    ControlWord.SECONDARY: f.SECONDARY_PROCESSOR_BASED_CONTROLS,
    ControlWord.EXIT: f.VM_EXIT_CONTROLS,
    ControlWord.ENTRY: f.VM_ENTRY_CONTROLS,
}
_SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
_FEATURE_CONTROL: Final = 0b101  # locked, VMX enabled outside SMX
_HOST_TR: Final = 0x28  # never loaded from memory, but must not be null
_NO_LINK: Final = (1 << 64) - 1
_RESET_DR7: Final = 0x400


def install(
    machine: Machine,
    *,
    host: bytes = code(HOST),
    guest: bytes = code(GUEST),
    controls: Iterable[Control] = (),
    fields: Mapping[Field, int] | None = None,
    exits: int = 1,
) -> Vmcs:
    """Make ``machine`` ready to run ``host``, in VMX operation with a current VMCS for ``guest``; that VMCS.

    Both run in 64-bit mode with memory mapped one to one, ``host`` from `HOST_CODE` with ``exits`` in R15. ``controls``
    are set in addition to the necessary ones, ``fields`` override what the VMCS would hold.
    """
    machine.load(elf64({HOST_CODE: host, GUEST_CODE: guest}))
    _enter_vmx_operation(machine)
    cpu = machine.cpu
    cpu.state.gpr[Gpr.R15] = exits
    values = _valid_fields(machine)
    for control in controls:
        values[_CONTROL_FIELDS[control.word]] |= control.mask
        if control.word is ControlWord.SECONDARY:
            values[f.PRIMARY_PROCESSOR_BASED_CONTROLS] |= c.ACTIVATE_SECONDARY_CONTROLS.mask
    for field, value in (values | dict(fields or {})).items():
        _must(cpu.vmx.vmwrite(field, value), f"VMWRITE of {field.name}")
    assert cpu.vmx.current_vmcs is not None
    return cpu.vmx.current_vmcs


def _enter_vmx_operation(machine: Machine) -> None:
    cpu, vmx = machine.cpu, machine.cpu.vmx
    cpu.state.cr0 |= int(Cr0.NE)
    cpu.state.cr4 |= int(Cr4.VMXE)
    cpu.state.tr = Segment(_HOST_TR, 0, 0xFFFF, 0x8B)
    cpu.load_control_state()
    cpu.msrs.write(IA32_FEATURE_CONTROL, _FEATURE_CONTROL)
    revision = vmx.operation.capabilities.revision_identifier
    for region in (VMXON_REGION, VMCS_REGION):
        machine.memory.write_u32(region, revision)
    _must(vmx.vmxon(VMXON_REGION), "VMXON")
    _must(vmx.vmclear(VMCS_REGION), "VMCLEAR")
    _must(vmx.vmptrld(VMCS_REGION), "VMPTRLD")


def _must(outcome: object, what: str) -> None:
    if type(outcome) is not VmSucceed:
        raise RuntimeError(f"{what} failed: {outcome}")


def _valid_fields(machine: Machine) -> dict[Field, int]:
    """What lets the guest run where the host runs, with as few controls as the processor allows."""
    allowed = machine.cpu.vmx.operation.capabilities.allowed
    values = {field: allowed[word].must_be_1 for word, field in _CONTROL_FIELDS.items()}
    values[f.VM_EXIT_CONTROLS] |= c.EXIT_HOST_ADDRESS_SPACE_SIZE.mask
    values[f.VM_ENTRY_CONTROLS] |= c.ENTRY_IA32E_MODE_GUEST.mask
    state = machine.cpu.state
    values |= {
        f.VMCS_LINK_POINTER: _NO_LINK,
        f.HOST_CR0: state.cr0,
        f.HOST_CR3: state.cr3,
        f.HOST_CR4: state.cr4,
        f.HOST_RIP: HOST_EXIT,
        f.HOST_RSP: state.gpr[Gpr.RSP],
        f.HOST_CS_SELECTOR: state.segments[1].selector,
        f.HOST_SS_SELECTOR: state.segments[2].selector,
        f.HOST_TR_SELECTOR: state.tr.selector,
        f.HOST_GDTR_BASE: state.gdtr.base,
        f.GUEST_CR0: state.cr0,
        f.GUEST_CR3: state.cr3,
        f.GUEST_CR4: state.cr4,
        f.GUEST_DR7: _RESET_DR7,
        f.GUEST_RIP: GUEST_CODE,
        f.GUEST_RSP: state.gpr[Gpr.RSP],
        f.GUEST_RFLAGS: state.rflags,
        f.GUEST_GDTR_BASE: state.gdtr.base,
        f.GUEST_GDTR_LIMIT: state.gdtr.limit,
    }
    for name, segment in zip(_SEGMENTS, (*state.segments, state.ldtr, state.tr), strict=True):
        values[getattr(f, f"GUEST_{name}_SELECTOR")] = segment.selector
        values[getattr(f, f"GUEST_{name}_LIMIT")] = segment.limit
        values[getattr(f, f"GUEST_{name}_ACCESS_RIGHTS")] = segment.access_rights
    values[f.GUEST_LDTR_ACCESS_RIGHTS] = int(AccessRights.UNUSABLE)
    return values


def elf64(parts: Mapping[int, bytes]) -> bytes:
    """An ELF64 executable that loads each of ``parts`` at its physical address and starts at the first.

    Spec: System V Application Binary Interface, "ELF Header", "Program Header".
    """
    identification = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header_size, entry_size = 64, 56
    header = identification + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, min(parts), header_size, 0, 0, header_size, entry_size, len(parts), 0, 0, 0
    )
    offset = header_size + entry_size * len(parts)
    entries, contents = b"", b""
    for address, data in parts.items():
        entries += struct.pack("<IIQQQQQQ", 1, 7, offset + len(contents), address, address, len(data), len(data), 1)
        contents += data
    return header + entries + contents
