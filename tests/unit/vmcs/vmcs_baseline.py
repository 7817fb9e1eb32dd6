"""A processor with every VMX capability, and VMCSs that pass every check on it. Values typed by hand, not computed."""

from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.region import Vmcs
from vmcs.rules import EntryContext

REVISION = 0x1234
VMCS_ADDRESS = 0x5000

# Everything may be 1; must-be-1 bits are those the true capability MSRs of real processors still insist on.
FULL_MSRS = {
    0x480: REVISION | 0x1000 << 32 | 1 << 49 | 6 << 50 | 1 << 54 | 1 << 55,
    0x481: 0xFF_0000_0016,
    0x482: 0xFFFF_FFFE_0401_E172,
    0x483: 0xFFFF_FFFF_0003_6DFF,
    0x484: 0x01FF_FFFF_0000_11FF,
    0x485: 0x2000_0000 | 0x4000_0000 | 4 << 16 | 0x1C0 | 0x20,
    0x486: 0x8000_0021,
    0x487: 0xFFFF_FFFF,
    0x488: 0x2000,
    0x489: 0x1_13FF_FFFF,
    0x48A: 0x54,
    0x48B: 0xFFFF_FFFF_0000_0000,
    0x48C: 0x0F01_0733_4141 | 1 << 7 | 1 << 23,
    0x48D: 0xFF_0000_0016,
    0x48E: 0xFFFF_FFFE_0400_6172,
    0x48F: 0xFFFF_FFFF_0003_6DFB,
    0x490: 0x01FF_FFFF_0000_11FB,
    0x491: 0x1,
    0x492: 0x1DF,
    0x493: 0xF,
}

FULL = Capabilities(FULL_MSRS)

# A processor of the first generation: 32-bit addresses in VMX structures, no secondary controls, no true MSRs.
OLD = Capabilities(
    {
        0x480: 0x7 | 0x400 << 32 | 1 << 48 | 6 << 50,
        0x481: 0x3F_0000_0016,
        0x482: 0x77B9_FFFE_0401_E172,
        0x483: 0x0003_EFFF_0003_6DFF,
        0x484: 0x0000_1FFF_0000_11FF,
        0x485: 4 << 16 | 0x1C0,
        0x486: 0x8000_0021,
        0x487: 0xFFFF_FFFF,
        0x488: 0x2000,
        0x489: 0x27FF,
    }
)


class Memory:
    """Sparse physical memory that reads as ones where nothing was put."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    def put(self, address: int, value: int, size: int) -> None:
        for offset, byte in enumerate(value.to_bytes(size, "little")):
            self.bytes[address + offset] = byte

    def read(self, address: int, size: int) -> int:
        return int.from_bytes(bytes(self.bytes.get(address + offset, 0xFF) for offset in range(size)), "little")


def long_mode_guest(capabilities: Capabilities = FULL) -> Vmcs:
    """A 64-bit guest with EPT, VPID and "unrestricted guest", under a 64-bit host."""
    vmcs = Vmcs(capabilities)
    for field, value in {
        f.PIN_BASED_CONTROLS: 0x16,
        f.PRIMARY_PROCESSOR_BASED_CONTROLS: 0x8400_6172,
        f.SECONDARY_PROCESSOR_BASED_CONTROLS: 0xA2,
        f.VM_EXIT_CONTROLS: 0x3_6FFB,
        f.VM_ENTRY_CONTROLS: 0x13FB,
        f.VPID: 1,
        f.EPT_POINTER: 0x10_001E,
        f.VMCS_LINK_POINTER: 0xFFFF_FFFF_FFFF_FFFF,
        f.HOST_CR0: 0x8001_0033,
        f.HOST_CR3: 0x1000,
        f.HOST_CR4: 0x2020,
        f.HOST_CS_SELECTOR: 0x8,
        f.HOST_SS_SELECTOR: 0x10,
        f.HOST_TR_SELECTOR: 0x18,
        f.HOST_RIP: 0xFFFF_8000_0010_0000,
        f.HOST_RSP: 0xFFFF_8000_0020_0000,
        f.HOST_IA32_EFER: 0xD01,
        f.HOST_IA32_PAT: 0x0007_0406_0007_0406,
        f.GUEST_CR0: 0x8001_0033,
        f.GUEST_CR3: 0x2000,
        f.GUEST_CR4: 0x2020,
        f.GUEST_DR7: 0x400,
        f.GUEST_RFLAGS: 0x202,
        f.GUEST_RIP: 0x10_0000,
        f.GUEST_RSP: 0x20_0000,
        f.GUEST_IA32_EFER: 0xD01,
        f.GUEST_IA32_PAT: 0x0007_0406_0007_0406,
        f.GUEST_CS_SELECTOR: 0x8,
        f.GUEST_CS_ACCESS_RIGHTS: 0xA09B,
        f.GUEST_CS_LIMIT: 0xFFFF_FFFF,
        f.GUEST_SS_SELECTOR: 0x10,
        f.GUEST_SS_ACCESS_RIGHTS: 0xC093,
        f.GUEST_SS_LIMIT: 0xFFFF_FFFF,
        f.GUEST_DS_SELECTOR: 0x10,
        f.GUEST_DS_ACCESS_RIGHTS: 0xC093,
        f.GUEST_DS_LIMIT: 0xFFFF_FFFF,
        f.GUEST_ES_SELECTOR: 0x10,
        f.GUEST_ES_ACCESS_RIGHTS: 0xC093,
        f.GUEST_ES_LIMIT: 0xFFFF_FFFF,
        f.GUEST_FS_ACCESS_RIGHTS: 0x1_0000,
        f.GUEST_GS_ACCESS_RIGHTS: 0x1_0000,
        f.GUEST_TR_SELECTOR: 0x18,
        f.GUEST_TR_ACCESS_RIGHTS: 0x8B,
        f.GUEST_TR_LIMIT: 0x67,
        f.GUEST_LDTR_ACCESS_RIGHTS: 0x1_0000,
        f.GUEST_GDTR_LIMIT: 0x2F,
        f.GUEST_IDTR_LIMIT: 0xFFF,
    }.items():
        vmcs[field] = value
    return vmcs


def context_of(vmcs: Vmcs, **more: object) -> EntryContext:
    """The context in which the VMCSs of this module pass, with empty memory."""
    return EntryContext(vmcs, vmcs.capabilities, vmcs_address=VMCS_ADDRESS, **more)  # type: ignore[arg-type]
