"""A processor without an engine, for tests that drive SVM instruction by instruction."""

from __future__ import annotations

from vmcs.vmcb.fields import BY_NAME, IMAGE, Vmcb
from vtx.svm import Svm
from vtx.x86.decode import Instruction, decode
from vtx.x86.event import Event
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Mmu
from vtx.x86.monitor import Monitor
from vtx.x86.msrs import MsrFile, bind_registers
from vtx.x86.outcome import Fault, InstructionAborted
from vtx.x86.profile import Profile, load_profile
from vtx.x86.second_level import AccessKind
from vtx.x86.state import CpuState, DescriptorTable, Segment

HOST_SAVE = 0x1000
VMCB = 0x2000
MSRPM = 0x3000
IOPM = 0x5000
PAGE_TABLES = 0x10000
NESTED_TABLES = 0x20000
HOST_RIP = 0x8000
GUEST_RIP = 0x4000

CODE_64 = 0xA09B
DATA = 0xC093

VMRUN, VMMCALL, VMLOAD, VMSAVE = (bytes((0x0F, 0x01, last)) for last in (0xD8, 0xD9, 0xDA, 0xDB))
STGI, CLGI, SKINIT, INVLPGA = (bytes((0x0F, 0x01, last)) for last in (0xDC, 0xDD, 0xDE, 0xDF))

# Intercept bits that VMRUN wants, or that tests switch on: (field, bit).
VMRUN_INTERCEPT = ("intercept vector 4", 1)


class FakeProcessor:
    """A `Processor` whose clock, interrupts and shutdown are under the test's control."""

    def __init__(self, profile: Profile | None = None) -> None:
        self.index = 0
        self.profile = profile or load_profile("everything-amd")
        self.state = CpuState()
        self.memory = PhysicalMemory(0x40_0000)
        self.mmu = Mmu(self.memory, self.profile.physical_address_width, amd=True)
        self.msrs = MsrFile(self.profile)
        bind_registers(self.msrs, lambda: self.state, lambda: None)
        self.monitor: Monitor | None = None
        self.ticks = 0
        self.interrupt: int | None = None
        self.nmi = False
        self.cr8 = 0
        self.delivered: list[Event] = []
        self.shutdown: str | None = None
        self.smis = 0

    def tsc(self) -> int:
        return self.ticks

    def charge(self, ticks: int) -> None:
        self.ticks += ticks

    def load_control_state(self) -> None:
        self.mmu.update(self.state)

    def interrupt_pending(self) -> bool:
        return self.interrupt is not None

    def acknowledge_interrupt(self) -> int:
        vector, self.interrupt = self.interrupt, None
        assert vector is not None
        return vector

    def end_of_interrupt(self) -> None:
        raise AssertionError

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

    def enter_smm(self) -> None:
        self.smis += 1

    def shut_down(self, reason: str) -> None:
        self.shutdown = reason


def instruction(code: bytes, bits: int = 64) -> Instruction:
    """The instruction that ``code`` begins with."""
    found = decode(code, bits)
    assert found is not None
    return found


class Machine:
    """A 64-bit host at CPL 0 with SVM enabled, and a control block of a 64-bit guest that VMRUN accepts."""

    def __init__(self, profile: str = "everything-amd") -> None:
        self.processor = FakeProcessor(load_profile(profile))
        self.memory = self.processor.memory
        self._map(PAGE_TABLES, user=False)
        self._map(NESTED_TABLES, user=True)
        self.processor.state = self._host()
        self.processor.msrs.write(0xC001_0117, HOST_SAVE)
        self.processor.load_control_state()
        self.svm = Svm(self.processor)
        self.fields: dict[str, int] = self._guest()

    @property
    def state(self) -> CpuState:
        return self.processor.state

    def _map(self, root: int, *, user: bool) -> None:
        """4-level tables at ``root`` that map the first GiB to itself in 2-MByte pages, writable."""
        flags = 7 if user else 3
        self.memory.write_u64(root, root + 0x1000 | flags)
        self.memory.write_u64(root + 0x1000, root + 0x2000 | flags)
        for i in range(512):
            self.memory.write_u64(root + 0x2000 + 8 * i, i << 21 | 0x80 | flags)

    @staticmethod
    def _host() -> CpuState:
        state = CpuState()
        state.cr0, state.cr3, state.cr4, state.efer = 0x8005_0033, PAGE_TABLES, 0x20, 0x1D01
        state.rip, state.rflags = HOST_RIP, 2
        state.segments = [Segment(0x10, 0, 0xFFFF_FFFF, DATA) for _ in range(6)]
        state.segments[1] = Segment(0x08, 0, 0xFFFF_FFFF, CODE_64)
        state.gdtr, state.idtr = DescriptorTable(0x6000, 0xFFFF), DescriptorTable(0x6800, 0xFFF)
        state.gpr[0], state.gpr[4] = VMCB, 0x9000
        return state

    @staticmethod
    def _guest() -> dict[str, int]:
        fields = {
            "intercept vector 4": 1,
            "guest ASID": 1,
            "MSRPM_BASE_PA": MSRPM,
            "IOPM_BASE_PA": IOPM,
            "EFER": 0x1D01,
            "CR0": 0x8005_0033,
            "CR3": PAGE_TABLES,
            "CR4": 0x20,
            "DR6": 0xFFFF_0FF0,
            "DR7": 0x400,
            "RFLAGS": 2,
            "RIP": GUEST_RIP,
            "RSP": 0x7000,
            "RAX": 0x1234,
            "G_PAT": 0x0007_0406_0007_0406,
            "GDTR limit": 0x27,
            "GDTR base": 0x6000,
            "IDTR limit": 0xFFF,
            "IDTR base": 0x6800,
            "CS selector": 0x08,
            "CS attributes": 0x29B,
            "CS limit": 0xFFFF_FFFF,
        }
        for name in ("ES", "SS", "DS"):
            fields |= {f"{name} selector": 0x10, f"{name} attributes": 0xC93, f"{name} limit": 0xFFFF_FFFF}
        return fields

    def intercept(self, number: int) -> None:
        """Switch an intercept on in the control block to be."""
        names = ("CR intercepts", "DR intercepts", "exception intercepts")
        name = names[number >> 5] if number < 96 else f"intercept vector {number >> 5}"
        self.fields[name] = self.fields.get(name, 0) | 1 << (number & 31)

    def use_nested_paging(self) -> None:
        self.fields |= {"nested paging and encryption control": 1, "N_CR3": NESTED_TABLES}

    def execute(self, code: bytes) -> bool:
        """Execute an SVM instruction at RIP; raises `InstructionAborted`."""
        return self.svm.execute(instruction(code))

    def fault_of(self, code: bytes) -> Fault:
        try:
            self.execute(code)
        except InstructionAborted as aborted:
            assert isinstance(aborted.cause, Fault)
            return aborted.cause
        raise AssertionError("no fault")

    def store(self) -> None:
        """Put the control block into memory."""
        vmcb = Vmcb()
        for name, value in self.fields.items():
            vmcb[BY_NAME[name]] = value
        self.memory.write(VMCB, vmcb.to_image())

    def run(self) -> None:
        """VMRUN of the control block as the fields have it."""
        self.store()
        self.state.gpr[0] = VMCB
        self.execute(VMRUN)

    def stored(self, name: str) -> int:
        """A field as it is in memory now."""
        return Vmcb.from_image(self.memory.read(VMCB, IMAGE.size))[BY_NAME[name]]
