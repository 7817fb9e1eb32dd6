"""A valid VMCS to start from: a 64-bit guest under a 64-bit host, as far as the processor allows.

Spec: SDM Vol. 3, "Virtual Machine Control Structures", "Initializing a VMCS".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.controls import Control, ControlWord
from vmcs.fields import CONTROL_FIELDS, Field
from vmcs.region import Vmcs

# Set where the processor allows them.
_CONTROLS: Final[tuple[Control, ...]] = (
    c.EXTERNAL_INTERRUPT_EXITING,
    c.NMI_EXITING,
    c.HLT_EXITING,
    c.ACTIVATE_SECONDARY_CONTROLS,
    c.ENABLE_EPT,
    c.ENABLE_VPID,
    c.UNRESTRICTED_GUEST,
    c.EXIT_HOST_ADDRESS_SPACE_SIZE,
    c.EXIT_SAVE_IA32_EFER,
    c.EXIT_LOAD_IA32_EFER,
    c.ENTRY_IA32E_MODE_GUEST,
    c.ENTRY_LOAD_IA32_EFER,
)

_CODE_64: Final = 0xA09B  # execute/read, accessed, DPL 0, present, L, G
_DATA: Final = 0xC093  # read/write, accessed, DPL 0, present, B, G
_BUSY_TSS: Final = 0x8B
_UNUSABLE: Final = 1 << 16
_LIMIT: Final = 0xFFFF_FFFF
_EFER: Final = 0xD01  # SCE, LME, LMA, NXE

_FIELDS: Final[Mapping[Field, int]] = {
    f.VPID: 1,
    f.EPT_POINTER: 0x10_001E,  # write-back, page-walk length 4
    f.VMCS_LINK_POINTER: (1 << 64) - 1,
    f.HOST_CR0: 0x8001_0033,  # PG, WP, NE, ET, MP, PE
    f.HOST_CR3: 0x1000,
    f.HOST_CR4: 0x2620,  # VMXE, OSXMMEXCPT, OSFXSR, PAE
    f.HOST_CS_SELECTOR: 0x08,
    f.HOST_SS_SELECTOR: 0x10,
    f.HOST_DS_SELECTOR: 0x10,
    f.HOST_ES_SELECTOR: 0x10,
    f.HOST_TR_SELECTOR: 0x18,
    f.HOST_RIP: 0x20_0000,
    f.HOST_RSP: 0x30_0000,
    f.HOST_IA32_EFER: _EFER,
    f.GUEST_CR0: 0x8001_0033,
    f.GUEST_CR3: 0x2000,
    f.GUEST_CR4: 0x2620,
    f.GUEST_DR7: 0x400,
    f.GUEST_RFLAGS: 0x202,
    f.GUEST_RIP: 0x10_0000,
    f.GUEST_RSP: 0x18_0000,
    f.GUEST_IA32_EFER: _EFER,
    f.GUEST_CS_SELECTOR: 0x08,
    f.GUEST_CS_LIMIT: _LIMIT,
    f.GUEST_CS_ACCESS_RIGHTS: _CODE_64,
    **{
        field: value
        for selector, limit, rights in (
            (f.GUEST_SS_SELECTOR, f.GUEST_SS_LIMIT, f.GUEST_SS_ACCESS_RIGHTS),
            (f.GUEST_DS_SELECTOR, f.GUEST_DS_LIMIT, f.GUEST_DS_ACCESS_RIGHTS),
            (f.GUEST_ES_SELECTOR, f.GUEST_ES_LIMIT, f.GUEST_ES_ACCESS_RIGHTS),
        )
        for field, value in ((selector, 0x10), (limit, _LIMIT), (rights, _DATA))
    },
    f.GUEST_FS_ACCESS_RIGHTS: _UNUSABLE,
    f.GUEST_GS_ACCESS_RIGHTS: _UNUSABLE,
    f.GUEST_LDTR_ACCESS_RIGHTS: _UNUSABLE,
    f.GUEST_TR_SELECTOR: 0x18,
    f.GUEST_TR_LIMIT: 0x67,
    f.GUEST_TR_ACCESS_RIGHTS: _BUSY_TSS,
    f.GUEST_GDTR_LIMIT: 0x2F,
    f.GUEST_IDTR_LIMIT: 0xFFF,
}


def template(capabilities: Capabilities) -> Vmcs:
    """A clear VMCS with which VMLAUNCH succeeds on a processor in IA-32e mode."""
    vmcs = Vmcs(capabilities)
    for word in ControlWord:
        if capabilities.has(CONTROL_FIELDS[word]):
            vmcs[CONTROL_FIELDS[word]] = capabilities.allowed[word].must_be_1
    for control in _CONTROLS:
        if capabilities.allows(control):
            vmcs[CONTROL_FIELDS[control.word]] |= control.mask
    for field, value in _FIELDS.items():
        if capabilities.has(field):
            vmcs[field] = value
    return vmcs
