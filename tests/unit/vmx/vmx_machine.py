"""A processor without an engine, for tests that drive VMX through its Python-facing door, and one that runs guests."""

from __future__ import annotations

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control, ControlWord
from vmcs.fields import Field
from vmcs.region import Vmcs
from vtx.machine import Machine
from vtx.vmx import Vmx
from vtx.vmx.outcome import VmEntered, VmSucceed
from vtx.x86.decode import Instruction, decode
from vtx.x86.event import Event
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Mmu
from vtx.x86.monitor import Monitor
from vtx.x86.msrs import MsrFile, bind_registers
from vtx.x86.profile import DEFAULT_PROFILE, Profile, load_profile
from vtx.x86.second_level import AccessKind
from vtx.x86.state import CpuState, DescriptorTable, Segment

VMXON_REGION = 0x1000
REGION_A = 0x2000
REGION_B = 0x3000
PAGE_TABLES = 0x10000

CODE_64 = 0xA09B
CODE_32 = 0xC09B
DATA = 0xC093
BUSY_TSS = 0x8B
UNUSABLE = 0x1_0000

# IA32_FEATURE_CONTROL: locked, VMX enabled outside SMX.
FEATURE_CONTROL = 0b101


class FakeProcessor:
    """A `Processor` whose clock, interrupts and shutdown are under the test's control."""

    def __init__(self, profile: Profile | None = None) -> None:
        self.index = 0
        self.profile = profile or load_profile()
        self.state = CpuState()
        self.memory = PhysicalMemory(0x40_0000)
        self.mmu = Mmu(self.memory, self.profile.physical_address_width)
        self.msrs = MsrFile(self.profile)
        bind_registers(self.msrs, lambda: self.state, lambda: None)
        self.monitor: Monitor | None = None
        self.ticks = 0
        self.interrupt: int | None = None
        self.nmi = False
        self.cr8 = 0
        self.delivered: list[Event] = []
        self.shutdown: str | None = None
        self.control_loads = 0
        self.dismissed = 0
        self.sent: list[tuple[int, int]] = []

    def tsc(self) -> int:
        return self.ticks

    def charge(self, ticks: int) -> None:
        self.ticks += ticks

    def load_control_state(self) -> None:
        self.control_loads += 1
        self.mmu.update(self.state)

    def changed_system_state(self) -> None:
        self.control_loads += 1

    def interrupt_pending(self) -> bool:
        return self.interrupt is not None

    def acknowledge_interrupt(self) -> int:
        vector, self.interrupt = self.interrupt, None
        assert vector is not None
        return vector

    def end_of_interrupt(self) -> None:
        self.dismissed += 1

    def send_interrupt(self, vector: int, destination: int) -> None:
        self.sent.append((vector, destination))

    def fetch(self) -> Instruction | None:
        return decode(self.memory.read(self.mmu.translate(self.state.rip, AccessKind.EXECUTE), 15), 64)

    def nmi_pending(self) -> bool:
        return self.nmi

    def acknowledge_nmi(self) -> None:
        self.nmi = False

    def deliver(self, event: Event) -> None:
        self.delivered.append(event)

    def task_priority(self) -> int:
        return self.cr8

    def set_task_priority(self, value: int) -> None:
        self.cr8 = value

    def shut_down(self, reason: str) -> None:
        self.shutdown = reason


def long_mode_state() -> CpuState:
    """A 64-bit kernel at CPL 0 with paging on (identity tables at `PAGE_TABLES`), ready for VMXON."""
    state = CpuState()
    state.cr0 = 0x8005_0033
    state.cr3 = PAGE_TABLES
    state.cr4 = 0x2020  # PAE, VMXE
    state.efer = 0xD01
    state.rip = 0x8000
    state.rflags = 2
    state.segments = [Segment(0x10, 0, 0xFFFF_FFFF, DATA) for _ in range(6)]
    state.segments[1] = Segment(0x08, 0, 0xFFFF_FFFF, CODE_64)
    state.ldtr = Segment(0, 0, 0, UNUSABLE)
    state.tr = Segment(0x18, 0x7000, 0x67, BUSY_TSS)
    state.gdtr = DescriptorTable(0x6000, 0xFFFF)
    state.idtr = DescriptorTable(0x6800, 0xFFFF)
    state.gpr[4] = 0x9000
    return state


def map_identity(memory: PhysicalMemory) -> None:
    """4-level tables at `PAGE_TABLES` that map the first GiB to itself in 2-MByte pages, writable, supervisor."""
    memory.write_u64(PAGE_TABLES, PAGE_TABLES + 0x1000 | 3)
    memory.write_u64(PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000 | 3)
    for i in range(512):
        memory.write_u64(PAGE_TABLES + 0x2000 + 8 * i, i << 21 | 0x83)


def make_vmx(profile: Profile | None = None) -> tuple[FakeProcessor, Vmx]:
    """A processor in 64-bit mode that may execute VMXON, with revision identifiers in the regions."""
    processor = FakeProcessor(profile)
    processor.state = long_mode_state()
    map_identity(processor.memory)
    processor.msrs.write(0x3A, FEATURE_CONTROL)
    vmx = Vmx(processor)
    for region in (VMXON_REGION, REGION_A, REGION_B):
        processor.memory.write_u32(region, vmx.operation.capabilities.revision_identifier)
    processor.load_control_state()
    return processor, vmx


CONTROL_FIELDS = {
    ControlWord.PIN_BASED: f.PIN_BASED_CONTROLS,
    ControlWord.PRIMARY: f.PRIMARY_PROCESSOR_BASED_CONTROLS,
    ControlWord.SECONDARY: f.SECONDARY_PROCESSOR_BASED_CONTROLS,
    ControlWord.EXIT: f.VM_EXIT_CONTROLS,
    ControlWord.ENTRY: f.VM_ENTRY_CONTROLS,
}

HOST_RIP = 0xFFFF_8000_0000_1000
GUEST_RIP = 0x4000


def valid_fields(vmx: Vmx) -> dict[Field, int]:
    """Fields of a VMCS that enters a 64-bit guest without EPT and returns to a 64-bit host."""
    allowed = vmx.operation.capabilities.allowed
    fields = {field: allowed[word].must_be_1 for word, field in CONTROL_FIELDS.items()}
    fields[f.VM_EXIT_CONTROLS] |= c.EXIT_HOST_ADDRESS_SPACE_SIZE.mask
    fields[f.VM_ENTRY_CONTROLS] |= c.ENTRY_IA32E_MODE_GUEST.mask
    fields |= {
        f.VMCS_LINK_POINTER: 0xFFFF_FFFF_FFFF_FFFF,
        f.HOST_CR0: 0x8005_0033,
        f.HOST_CR3: PAGE_TABLES,
        f.HOST_CR4: 0x2020,
        f.HOST_CS_SELECTOR: 0x08,
        f.HOST_SS_SELECTOR: 0x10,
        f.HOST_DS_SELECTOR: 0x10,
        f.HOST_ES_SELECTOR: 0,
        f.HOST_FS_SELECTOR: 0x20,
        f.HOST_GS_SELECTOR: 0,
        f.HOST_TR_SELECTOR: 0x18,
        f.HOST_FS_BASE: 0xFFFF_8000_0001_0000,
        f.HOST_GS_BASE: 0xFFFF_8000_0002_0000,
        f.HOST_TR_BASE: 0xFFFF_8000_0003_0000,
        f.HOST_GDTR_BASE: 0xFFFF_8000_0004_0000,
        f.HOST_IDTR_BASE: 0xFFFF_8000_0005_0000,
        f.HOST_IA32_SYSENTER_CS: 0x30,
        f.HOST_IA32_SYSENTER_ESP: 0xFFFF_8000_0006_0000,
        f.HOST_IA32_SYSENTER_EIP: 0xFFFF_8000_0007_0000,
        f.HOST_RSP: 0xFFFF_8000_0000_8000,
        f.HOST_RIP: HOST_RIP,
        f.GUEST_CR0: 0x8000_0031,
        f.GUEST_CR3: 0x20000,
        f.GUEST_CR4: 0x2020,
        f.GUEST_DR7: 0x400,
        f.GUEST_RIP: GUEST_RIP,
        f.GUEST_RSP: 0x5000,
        f.GUEST_RFLAGS: 2,
        f.GUEST_GDTR_BASE: 0x6000,
        f.GUEST_GDTR_LIMIT: 0x27,
        f.GUEST_IDTR_BASE: 0x6800,
        f.GUEST_IDTR_LIMIT: 0xFFF,
        f.GUEST_IA32_SYSENTER_CS: 0x10,
        f.GUEST_IA32_SYSENTER_ESP: 0x1000,
        f.GUEST_IA32_SYSENTER_EIP: 0x2000,
    }
    for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR"):
        fields[getattr(f, f"GUEST_{name}_LIMIT")] = 0xFFFF_FFFF
        fields[getattr(f, f"GUEST_{name}_ACCESS_RIGHTS")] = DATA
        fields[getattr(f, f"GUEST_{name}_SELECTOR")] = 0x10
    fields[f.GUEST_CS_SELECTOR] = 0x08
    fields[f.GUEST_CS_ACCESS_RIGHTS] = CODE_64
    fields[f.GUEST_LDTR_SELECTOR] = 0
    fields[f.GUEST_LDTR_ACCESS_RIGHTS] = UNUSABLE
    fields[f.GUEST_TR_SELECTOR] = 0x18
    fields[f.GUEST_TR_LIMIT] = 0x67
    fields[f.GUEST_TR_ACCESS_RIGHTS] = BUSY_TSS
    return fields


def prepare(vmx: Vmx, *controls: Control, fields: dict[Field, int] | None = None) -> Vmcs:
    """VMXON, a current VMCS at `REGION_A` ready to be launched, with ``controls`` set and ``fields`` changed."""
    assert vmx.vmxon(VMXON_REGION) == VmSucceed()
    assert vmx.vmclear(REGION_A) == VmSucceed()
    assert vmx.vmptrld(REGION_A) == VmSucceed()
    values = valid_fields(vmx)
    for control in controls:
        values[CONTROL_FIELDS[control.word]] |= control.mask
        if control.word is ControlWord.SECONDARY:
            values[f.PRIMARY_PROCESSOR_BASED_CONTROLS] |= c.ACTIVATE_SECONDARY_CONTROLS.mask
    values |= fields or {}
    for field, value in values.items():
        assert vmx.vmwrite(field, value) == VmSucceed(), field
    assert vmx.current_vmcs is not None
    return vmx.current_vmcs


def launch(*controls: Control, fields: dict[Field, int] | None = None) -> tuple[FakeProcessor, Vmx, Vmcs]:
    """A guest that has just been entered."""
    processor, vmx = make_vmx()
    vmcs = prepare(vmx, *controls, fields=fields)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    return processor, vmx, vmcs


def vmx_pc(profile: str = DEFAULT_PROFILE) -> Machine:
    """A whole machine, in 64-bit mode with linear addresses mapped to themselves, that may execute VMXON."""
    machine = Machine(profile=profile, memory=4 << 20)
    cpu = machine.cpu
    cpu.state = long_mode_state()
    map_identity(machine.memory)
    cpu.msrs.write(0x3A, FEATURE_CONTROL)
    for region in (VMXON_REGION, REGION_A):
        machine.memory.write_u32(region, cpu.vmx.operation.capabilities.revision_identifier)
    cpu.load_control_state()
    return machine


def run_to_exit(machine: Machine, most: int = 50) -> None:
    """Run the guest until it exits, which it must do after at most ``most`` events."""
    for _ in range(most):
        if not machine.cpu.vmx.non_root:
            return
        machine.cpu.run_once()
    assert not machine.cpu.vmx.non_root
