"""Guests with AVIC: virtual processors on as many processors, each with a control block and a backing page."""

from __future__ import annotations

from collections.abc import Mapping

from svm_guest import MEMORY
from svm_machine import VMRUN, instruction
from svm_machine import Machine as Bench

from vmcs.vmcb.fields import BY_NAME, IMAGE, Vmcb
from vmcs.vmcb.intercepts import Exit
from vtx.cpu import Cpu
from vtx.machine import Machine

APIC = 0x30_0000  # of the guest's, guest-physical
BACKING_PAGES, PHYSICAL_TABLE, LOGICAL_TABLE = 0x38_0000, 0x39_0000, 0x39_1000
CONTROL_BLOCKS, SAVE_AREAS, CODE, STACKS, IDT, HANDLERS = 0x3A_0000, 0x3B_0000, 0x4000, 0x3C_0000, 0x6800, 0x3D_0000
ID, VERSION, TPR, APR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH, LVT_TIMER, CURRENT_COUNT = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310, 0x320, 0x390
AVIC, X2AVIC = 1 << 31, 1 << 30
VALID, RUNNING = 1 << 63, 1 << 62
CONTROL = "virtual interrupt control"
VMMCALL, HLT, STI, CLI, NOP = b"\x0f\x01\xd9", b"\xf4", b"\xfb", b"\xfa", b"\x90"
SPIN = b"\xeb\xfe"
IRETQ = b"\x48\xcf"


def load(offset: int, size: int = 4) -> bytes:
    """MOV (E)AX or AL from the register at ``offset``."""
    opcode = {1: b"\x8a", 2: b"\x66\x8b", 4: b"\x8b", 8: b"\x48\x8b"}[size]
    return opcode + b"\x04\x25" + (APIC + offset).to_bytes(4, "little")


def store(offset: int, value: int) -> bytes:
    """MOV DWORD [register], value."""
    return b"\xc7\x04\x25" + (APIC + offset).to_bytes(4, "little") + value.to_bytes(4, "little")


def wrmsr(index: int, value: int) -> bytes:
    high, low = divmod(value, 1 << 32)
    return (
        b"\xb9"
        + index.to_bytes(4, "little")
        + b"".join(opcode + part.to_bytes(4, "little") for opcode, part in ((b"\xb8", low), (b"\xba", high)))
        + b"\x0f\x30"
    )


def rdmsr(index: int) -> bytes:
    return b"\xb9" + index.to_bytes(4, "little") + b"\x0f\x32"


class Guest:
    """Virtual processors whose APIC IDs are those of their processors, all but the halted ones running.

    ``codes`` has the code of each; ``fields`` are additional ones of all control blocks.
    """

    def __init__(
        self,
        *codes: bytes,
        intercepts: tuple[int, ...] = (),
        x2apic: bool = False,
        fields: Mapping[str, int] | None = None,
        profile: str = "everything-amd",
        nested: bool = True,
    ) -> None:
        bench = Bench(profile)
        for number in (Exit.VMMCALL, *intercepts):
            bench.intercept(number)
        if nested:
            bench.use_nested_paging()
        self.machine = Machine(memory=MEMORY, profile=profile, cpus=len(codes))
        memory = self.memory = self.machine.memory
        memory.write(0, bench.memory.read(0, MEMORY))
        self.images = []
        for number, code in enumerate(codes):
            memory.write(CODE + 0x200 * number, code)
            memory.write(self.backing_page(number) + ID, (number if x2apic else number << 24).to_bytes(4, "little"))
            memory.write_u32(self.backing_page(number) + DFR, 0xFFFF_FFFF)
            memory.write_u64(PHYSICAL_TABLE + 8 * number, VALID | RUNNING | self.backing_page(number) | number)
            memory.write_u32(LOGICAL_TABLE + 4 * number, 1 << 31 | number)
            bench.fields |= {
                "RIP": CODE + 0x200 * number,
                "RSP": STACKS + 0x1000 * number + 0x800,
                CONTROL: AVIC | (X2AVIC if x2apic else 0) | 1 << 24,
                "AVIC APIC_BAR": APIC,
                "AVIC APIC_BACKING_PAGE pointer": self.backing_page(number),
                "AVIC LOGICAL_TABLE pointer": LOGICAL_TABLE,
                "AVIC PHYSICAL_TABLE pointer": PHYSICAL_TABLE | len(codes) - 1,
                "IDTR base": IDT,
            } | dict(fields or {})
            vmcb = Vmcb()
            for name, value in bench.fields.items():
                vmcb[BY_NAME[name]] = value
            self.images.append(vmcb)
            memory.write(CONTROL_BLOCKS + 0x1000 * number, vmcb.to_image())
        self.handlers()
        memory.write_u64(0x6000 + 8, 0x00AF_9B00_0000_FFFF)
        self.state = bench._host

    @staticmethod
    def backing_page(number: int) -> int:
        return BACKING_PAGES + 0x1000 * number

    def handlers(self) -> None:
        """Handler n counts into byte n of the page of `HANDLERS`, and VMMCALLs."""
        for vector in range(0x20, 0x100):
            place = HANDLERS + 0x100 + 0x10 * vector
            self.memory.write(place, b"\xfe\x04\x25" + (HANDLERS + vector).to_bytes(4, "little") + VMMCALL + IRETQ)
            gate = place & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (place >> 16 & 0xFFFF) << 48
            self.memory.write_u64(IDT + 16 * vector, gate)

    def cpu(self, number: int = 0) -> Cpu:
        return self.machine.cpus[number]

    def enter(self, number: int = 0) -> None:
        """VMRUN of virtual processor ``number``."""
        cpu = self.cpu(number)
        if not cpu.state.efer & 0x1000:
            cpu.state = self.state()
            cpu.msrs.write(0xC001_0117, SAVE_AREAS + 0x1000 * number)
        cpu.state.gpr[0] = CONTROL_BLOCKS + 0x1000 * number
        cpu.load_control_state()
        assert cpu.svm.execute(instruction(VMRUN))
        cpu.reload = True

    def run(self, number: int = 0, most: int = 100) -> int:
        """Run virtual processor ``number`` until its #VMEXIT, whose code this is."""
        cpu = self.cpu(number)
        for _ in range(most):
            if not cpu.svm.non_root:
                return self.stored("EXITCODE", number)
            cpu.limit_instructions(cpu.instructions + 1)
            cpu.run_once()
        raise AssertionError(f"no #VMEXIT, RIP is {cpu.state.rip:#x}")

    def stored(self, name: str, number: int = 0) -> int:
        return Vmcb.from_image(self.memory.read(CONTROL_BLOCKS + 0x1000 * number, IMAGE.size))[BY_NAME[name]]

    def register(self, offset: int, number: int = 0) -> int:
        return self.memory.read_u32(self.backing_page(number) + offset)

    def set_register(self, offset: int, value: int, number: int = 0) -> None:
        self.memory.write_u32(self.backing_page(number) + offset, value)

    def bit(self, base: int, vector: int, number: int = 0) -> bool:
        return bool(self.register(base + (vector >> 5 << 4), number) >> (vector & 31) & 1)

    def set_bit(self, base: int, vector: int, number: int = 0) -> None:
        offset = base + (vector >> 5 << 4)
        self.set_register(offset, self.register(offset, number) | 1 << (vector & 31), number)

    def handled(self, vector: int) -> int:
        """How many interrupts of ``vector`` reached a handler."""
        return self.memory.read_u8(HANDLERS + vector)
