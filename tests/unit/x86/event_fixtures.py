"""Linear memory for tests of event delivery, and machines set up from literal descriptors.

The descriptors are written out as the manual's figures show them, not encoded by the code under test.
"""

from __future__ import annotations

from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.state import CpuState, Cr0, DescriptorTable, Efer, Gpr, Segment, SegmentRegister

GDT, LDT, IDT, TSS, TASK_32, TASK_16, STACK_0, STACK_3 = (
    0x1000,
    0x1800,
    0x2000,
    0x3000,
    0x4000,
    0x5000,
    0x8000,
    0x9000,
)

GDT_ENTRIES = {
    0x08: 0x00CF9B000000FFFF,  # code, 32-bit, DPL 0
    0x10: 0x00CF93000000FFFF,  # data, writable, DPL 0
    0x18: 0x00CFFB000000FFFF,  # code, 32-bit, DPL 3
    0x20: 0x00CFF3000000FFFF,  # data, writable, DPL 3
    0x28: 0x00008B0030000067,  # 32-bit TSS, busy, at 3000H
    0x30: 0x00CF9F000000FFFF,  # conforming code, DPL 0
    0x38: 0x00009B010000FFFF,  # code, 16-bit, at 10000H
    0x40: 0x00CF1B000000FFFF,  # code, not present
    0x48: 0x00CFBB000000FFFF,  # code, DPL 1
    0x50: 0x00CFB3000000FFFF,  # data, DPL 1
    0x58: 0x00AF9B000000FFFF,  # 64-bit code, DPL 0
    0x60: 0x00AFFB000000FFFF,  # 64-bit code, DPL 3
    0x68: 0x00409B0000000FFF,  # code, limit FFFH
    0x70: 0x0040930000000FFF,  # data, limit FFFH
    0x78: 0x000093020000FFFF,  # data, 16-bit stack, at 20000H
    0x80: 0x0000890040000067,  # 32-bit TSS, available, at 4000H
    0x88: 0x000081005000002B,  # 16-bit TSS, available, at 5000H
    0x90: 0x000082001800001F,  # LDT at 1800H
    0x98: 0x00CF9A000000FFFF,  # code, not accessed
    0xA0: 0x00CF92000000FFFF,  # data, not accessed
    0xA8: 0x00CF91000000FFFF,  # data, read-only
    0xB0: 0x00CF13000000FFFF,  # data, not present
    0xB8: 0x00EF9B000000FFFF,  # code with both L and D
    0xC0: 0x00CF970000000FFF,  # data, expand-down: valid above FFFFFFH
    0xC8: 0x0000F3020000FFFF,  # data, 16-bit stack, DPL 3
    0xD0: 0x00AFBB000000FFFF,  # 64-bit code, DPL 1
}


class FakeMemory:
    """Sparse bytes, zero where never written; ``refused`` pages fault, ``read_only`` ones when written."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self.refused: set[int] = set()
        self.read_only: set[int] = set()
        self.accesses: list[tuple[str, int, int, bool, bool]] = []

    def _check(self, linear: int, size: int, user: bool, write: bool) -> None:
        for address in range(linear, linear + size):
            page = address >> 12
            if page in self.refused or (write and page in self.read_only):
                code = int(page in self.read_only) | write << 1 | user << 2
                raise InstructionAborted(Fault(Vector.PF, code, address=address))

    def read(self, linear: int, size: int, *, user: bool = False, ac: bool = False) -> int:
        self._check(linear, size, user, False)
        self.accesses.append(("read", linear, size, user, ac))
        return self.peek(linear, size)

    def write(self, linear: int, size: int, value: int, *, user: bool = False, ac: bool = False) -> None:
        assert 0 <= value < 1 << size * 8
        self._check(linear, size, user, True)
        self.accesses.append(("write", linear, size, user, ac))
        self.poke(linear, value, size)

    def shadow_read(self, linear: int, size: int, *, user: bool) -> int:
        self._check(linear, size, user, False)
        self.accesses.append(("shadow read", linear, size, user, False))
        return self.peek(linear, size)

    def shadow_write(self, linear: int, size: int, value: int, *, user: bool) -> None:
        self._check(linear, size, user, True)
        self.accesses.append(("shadow write", linear, size, user, False))
        self.poke(linear, value, size)

    def peek(self, linear: int, size: int) -> int:
        return sum(self.bytes.get(linear + index, 0) << 8 * index for index in range(size))

    def poke(self, linear: int, value: int, size: int) -> None:
        for index in range(size):
            self.bytes[linear + index] = value >> 8 * index & 0xFF

    def words(self, linear: int, count: int, size: int) -> list[int]:
        """``count`` values of ``size`` bytes from ``linear`` upwards."""
        return [self.peek(linear + index * size, size) for index in range(count)]

    def gate(self, vector: int, selector: int, offset: int, attributes: int) -> None:
        """An 8-byte gate; ``attributes`` is the byte with P, DPL and type."""
        at = IDT + vector * 8
        self.poke(at, offset & 0xFFFF, 2)
        self.poke(at + 2, selector, 2)
        self.poke(at + 4, 0, 1)
        self.poke(at + 5, attributes, 1)
        self.poke(at + 6, offset >> 16, 2)

    def gate64(self, vector: int, selector: int, offset: int, attributes: int, ist: int = 0) -> None:
        """A 16-byte gate."""
        at = IDT + vector * 16
        self.poke(at, offset & 0xFFFF, 2)
        self.poke(at + 2, selector, 2)
        self.poke(at + 4, ist, 1)
        self.poke(at + 5, attributes, 1)
        self.poke(at + 6, offset >> 16 & 0xFFFF, 2)
        self.poke(at + 8, offset >> 32, 4)
        self.poke(at + 12, 0, 4)


def memory_with_gdt() -> FakeMemory:
    memory = FakeMemory()
    for selector, raw in GDT_ENTRIES.items():
        memory.poke(GDT + selector, raw, 8)
    memory.poke(TSS + 4, STACK_0, 4)
    memory.poke(TSS + 8, 0xFFFF_0010, 4)
    memory.poke(TSS + 12, 0xA000, 4)
    memory.poke(TSS + 16, 0x51, 2)
    return memory


def protected_machine(cpl: int = 0) -> tuple[CpuState, FakeMemory]:
    """32-bit protected mode at ``cpl`` 0 or 3: EIP 401234H, ESP 9000H, IF set."""
    state = CpuState()
    state.cr0 = Cr0.PE | Cr0.ET | Cr0.NE
    state.gdtr = DescriptorTable(GDT, 0xFF)
    state.idtr = DescriptorTable(IDT, 0x7FF)
    state.tr = Segment(0x28, TSS, 0x67, 0x8B)
    state.ldtr = Segment(0, 0, 0, 0x10000)
    code, data = (0x18 | 3, 0x20 | 3) if cpl else (0x08, 0x10)
    dpl = cpl << 5
    for register in SegmentRegister:
        state.segments[register] = Segment(data, 0, 0xFFFF_FFFF, 0xC093 | dpl)
    state.segments[SegmentRegister.CS] = Segment(code, 0, 0xFFFF_FFFF, 0xC09B | dpl)
    state.rip = 0x40_1234
    state.gpr[Gpr.RSP] = STACK_3
    state.rflags = 0x202
    return state, memory_with_gdt()


def long_machine(cpl: int = 0) -> tuple[CpuState, FakeMemory]:
    """64-bit mode at ``cpl`` 0 or 3: RIP FFFF8000_00401234H, RSP 9008H (not 16-byte aligned), IF set."""
    state, memory = protected_machine(cpl)
    state.cr0 |= Cr0.PG.value
    state.cr4 = 0x20
    state.efer = Efer.LMA | Efer.LME | Efer.SCE
    state.idtr = DescriptorTable(IDT, 0xFFF)
    state.tr = Segment(0x28, TSS, 0x67, 0x8B)
    dpl = cpl << 5
    state.segments[SegmentRegister.CS] = Segment(0x63 if cpl else 0x58, 0, 0xFFFF_FFFF, 0xA09B | dpl)
    state.rip = 0xFFFF_8000_0040_1234
    state.gpr[Gpr.RSP] = 0x9008
    memory.poke(TSS + 4, 0xFFFF_8800_0000_8008, 8)
    memory.poke(TSS + 36, 0xFFFF_8800_0001_0000, 8)  # IST1
    return state, memory


def real_machine() -> tuple[CpuState, FakeMemory]:
    """Real-address mode at 1000:0234 with SS:SP = 2000:0100 and the IVT at 0."""
    state = CpuState()
    state.idtr = DescriptorTable(0, 0x3FF)
    for register in SegmentRegister:
        state.segments[register] = Segment(0x2000, 0x20000, 0xFFFF, 0x93)
    state.segments[SegmentRegister.CS] = Segment(0x1000, 0x10000, 0xFFFF, 0x9B)
    state.rip = 0x234
    state.gpr[Gpr.RSP] = 0x100
    state.rflags = 0x4_0302  # AC, IF, TF
    return state, FakeMemory()


def virtual_8086_machine(iopl: int = 0) -> tuple[CpuState, FakeMemory]:
    """Virtual-8086 mode at 1000:0234, SS:SP = 2000:0100; ES, DS, FS, GS = 3000H, 4000H, 5000H, 6000H."""
    state, memory = protected_machine()
    values = {"ES": 0x3000, "CS": 0x1000, "SS": 0x2000, "DS": 0x4000, "FS": 0x5000, "GS": 0x6000}
    for name, selector in values.items():
        state.segments[SegmentRegister[name]] = Segment(selector, selector << 4, 0xFFFF, 0xF3)
    state.rip = 0x234
    state.gpr[Gpr.RSP] = 0x100
    state.rflags = 0x2_0202 | iopl << 12
    return state, memory
