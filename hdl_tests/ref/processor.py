"""A logical processor with memory, MMU and MSRs but nothing that fetches instructions: VMX is driven from Python.

Spec: SDM Vol. 3, "Enabling and Entering VMX Operation".
"""

from __future__ import annotations

from attrs import evolve

from vmcs.capabilities import CapabilityMsr
from vtx.x86.event import Event
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Mmu
from vtx.x86.msrs import MsrFile, bind_registers
from vtx.x86.profile import Profile, load_profile
from vtx.x86.state import AccessRights, CpuState, Efer, Rflags

MISC_VMWRITE_ANY = 1 << 29  # of IA32_VMX_MISC

_CODE = 0xB | AccessRights.CODE_OR_DATA | AccessRights.PRESENT | AccessRights.GRANULARITY
_DATA = 0x3 | AccessRights.CODE_OR_DATA | AccessRights.PRESENT | AccessRights.GRANULARITY | AccessRights.DEFAULT_BIG
CODE_64 = int(_CODE | AccessRights.LONG)
CODE_32 = int(_CODE | AccessRights.DEFAULT_BIG)
DATA = int(_DATA)
BUSY_TSS = 0xB | int(AccessRights.PRESENT)
UNUSABLE = int(AccessRights.UNUSABLE)

CR0_PAGING = 0x8000_0031  # PG, NE, ET, PE: what VMX operation needs
CR0_REAL = 0x6000_0030  # CD, NW, NE, ET
CR4_VMXE = 1 << 13


def profile_with(vmwrite_any: int) -> Profile:
    """The default processor, able (1) or unable (0) to VMWRITE read-only data fields."""
    profile = load_profile()
    capabilities = dict(profile.vmx_capabilities)
    misc = capabilities[CapabilityMsr.MISC] & ~MISC_VMWRITE_ANY
    capabilities[CapabilityMsr.MISC] = misc | (MISC_VMWRITE_ANY if vmwrite_any else 0)
    return evolve(profile, vmx_capabilities=capabilities)


class BareProcessor:
    """What `vtx.x86.virtualization.Processor` asks of a processor, without devices and without a clock."""

    def __init__(self, profile: Profile, memory_size: int) -> None:
        self.index = 0
        self.profile = profile
        self.state = CpuState()
        self.memory = PhysicalMemory(memory_size)
        self.mmu = Mmu(self.memory, profile.physical_address_width)
        self.msrs = MsrFile(profile)
        bind_registers(self.msrs, lambda: self.state, lambda: None)

    def set_mode(self, *, long: bool, protected: bool, virtual_8086: bool, code_64: bool, cpl: int) -> None:
        """Put the registers that tell the operating mode to it: IA-32e mode if ``long``, 64-bit mode if ``code_64``."""
        state = self.state
        state.efer = int(Efer.LME | Efer.LMA) if long else 0
        state.cr0 = CR0_PAGING if protected else CR0_REAL
        state.rflags = Rflags.FIXED_1 | (Rflags.VM if virtual_8086 else 0)
        state.segments[1].access_rights = (CODE_64 if code_64 else CODE_32) | cpl << 5
        state.segments[2].access_rights = DATA | cpl << 5

    def tsc(self) -> int:
        """A clock that stands still."""
        return 0

    def load_control_state(self) -> None:
        """Pass on what the MMU caches of the registers."""
        self.mmu.update(self.state)

    def changed_system_state(self) -> None:
        """There is no engine to reload; the MMU has followed already."""

    def interrupt_pending(self) -> bool:
        """Nothing interrupts."""
        return False

    def acknowledge_interrupt(self) -> int:
        """Not called: nothing is pending."""
        raise AssertionError("no interrupt is pending")

    def nmi_pending(self) -> bool:
        """Nothing interrupts."""
        return False

    def acknowledge_nmi(self) -> None:
        """Not called: nothing is pending."""
        raise AssertionError("no NMI is pending")

    def deliver(self, event: Event) -> None:
        """Not called: no entry injects."""
        raise AssertionError(f"{event} is delivered")

    def task_priority(self) -> int:
        """No local APIC."""
        return 0

    def set_task_priority(self, value: int) -> None:
        """No local APIC."""

    def shut_down(self, reason: str) -> None:
        """No exit aborts with the host state this adapter sets up."""
        raise AssertionError(f"shutdown: {reason}")
