"""What guests execute: short programs of bytes that mean the same in every mode, each about one instruction.

A program gets its operands in registers. Where it is about memory, rBX and rDI hold the same address, so that the
ModRM byte 07 means it in 16-, 32- and 64-bit code. After each program comes VMMCALL, which always exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import field, frozen

from vmcs.vmcb.intercepts import Exit
from vtx.x86.state import Gpr

SLOT: Final = 32
VMMCALL: Final = bytes.fromhex("0f01d9")

# Offsets from the code of what programs access, in pages of `vtx.fuzz.vmruns.scene`.
_STACK, _DATA, _READ_ONLY, _NOT_THERE, _NOT_NESTED = (page << 12 for page in range(8, 13))

# A control block, at an address that needs no translation.
BLOCK: Final = 0x0282_D000

# Ports where nothing answers, or where an answer is of no consequence, and MSRs that a guest may have.
SAFE_PORTS: Final = (0x80, 0x81, 0x82, 0x83, *range(0x1230, 0x1240), 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF)
SAFE_MSRS: Final = (
    *(0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084),
    *(0xC000_0100, 0xC000_0101, 0xC000_0102),
)


def _code(digits: str) -> bytes:
    return bytes.fromhex(digits)


@frozen(eq=False)
class Program:
    """``code``, with what is in registers when it starts; ``memory`` is the offset from the code of what it accesses.

    ``intercepts`` are what it is about. Processors may differ in ``unpredictable`` registers.
    """

    name: str
    code: bytes = field(converter=_code)
    intercepts: tuple[int, ...] = ()
    registers: Mapping[Gpr, int] = field(factory=dict)
    memory: int | None = None
    unpredictable: tuple[Gpr, ...] = ()

    @property
    def is_port_io(self) -> bool:
        """Whether it accesses the port in DX."""
        return Exit.IOIO in self.intercepts

    @property
    def is_msr_access(self) -> bool:
        """Whether it accesses the MSR in ECX."""
        return Exit.MSR in self.intercepts


_ALL_OF_CPUID: Final = (Gpr.RAX, Gpr.RBX, Gpr.RCX, Gpr.RDX)
_TIME: Final = (Gpr.RAX, Gpr.RDX)


def _exception(vector: int) -> tuple[int, ...]:
    return (Exit.EXCEPTION_0 + vector,)


def _control_registers() -> tuple[Program, ...]:
    reads = (
        Program(f"MOV EAX, CR{number}", f"0f20{0xC0 | number << 3:02x}", (Exit.CR0_READ + number,))
        for number in (0, 2, 3, 4, 5)
    )
    # Each reads the register, changes bits and writes it back.
    changes = (
        *((0, "MP", 0x02), (0, "EM", 0x04), (0, "TS", 0x08), (0, "NE", 0x20), (0, "nothing", 0)),
        *((2, "bit 0", 1), (3, "nothing", 0), (3, "PWT", 8), (4, "TSD", 4), (4, "nothing", 0)),
    )
    writes = (
        Program(
            f"a change of {what} in CR{number}",
            f"0f20{0xC0 | number << 3:02x}83f0{bits:02x}0f22{0xC0 | number << 3:02x}",
            (Exit.CR0_WRITE + number, *((Exit.CR0_SEL_WRITE,) if number == 0 else ())),
        )
        for number, what, bits in changes
    )
    return *reads, *writes


def _debug_registers() -> tuple[Program, ...]:
    moves = []
    for number in (0, 3, 4, 6, 7):
        modrm = 0xC1 | number << 3
        moves.append(Program(f"MOV ECX, DR{number}", f"0f21{modrm:02x}", (Exit.DR0_READ + number,)))
        value = {Gpr.RCX: 0x400 if number == 7 else 0xFFFF_0FF0}
        moves.append(Program(f"MOV DR{number}, ECX", f"0f23{modrm:02x}", (Exit.DR0_WRITE + number,), value))
    return tuple(moves)


def _ports() -> tuple[Program, ...]:
    accesses = (
        ("IN AL, 80H", "e480", 0),
        ("OUT 80H, AL", "e680", 0),
        ("OUT 60H, EAX", "e760", 0),
        ("IN AL, DX", "ec", 0x1234),
        ("IN EAX, DX", "ed", 0x1235),
        ("IN EAX, DX: partly intercepted", "ed", 0x123E),
        ("OUT DX, AL", "ee", 0x80),
        ("OUT DX, EAX: beyond FFFFH", "ef", 0xFFFE),
        ("OUT DX, AX or EAX", "66ef", 0x122F),
    )
    inputs = (("INSB", "6c"), ("INSW or INSD", "6d"), ("REP INSB", "f36c"))
    outputs = (("OUTSB", "6e"), ("REP OUTSB", "f36e"), ("OUTSW or OUTSD", "666f"))
    return (
        *(Program(name, code, (Exit.IOIO,), {Gpr.RDX: at}, unpredictable=(Gpr.RAX,)) for name, code, at in accesses),
        *(Program(name, code, (Exit.IOIO,), {Gpr.RDX: 0x70, Gpr.RCX: 2}, _DATA) for name, code in inputs),
        *(Program(name, code, (Exit.IOIO,), {Gpr.RDX: 0x1230, Gpr.RCX: 2}, _DATA) for name, code in outputs),
        *(
            Program(f"{name} at read-only data", code, (Exit.IOIO,), {Gpr.RDX: 0x70}, _READ_ONLY)
            for name, code in inputs
        ),
        Program("OUTSB of what is not there", "6e", (Exit.IOIO,), {Gpr.RDX: 0x80}, _NOT_THERE),
    )


def _msrs() -> tuple[Program, ...]:
    indices = (0x174, 0x1B, 0x2000, 0xC000_0080, 0xC000_0082, 0xC000_0100, 0xC000_2000, 0xC001_0015)
    return (
        *(Program(f"RDMSR {index:X}H", "0f32", (Exit.MSR,), {Gpr.RCX: index}) for index in indices),
        *(Program(f"WRMSR {index:X}H", "0f30", (Exit.MSR,), {Gpr.RCX: index, Gpr.RAX: 0x10}) for index in indices),
    )


def _memory() -> tuple[Program, ...]:
    places = (("data", _DATA), ("read-only data", _READ_ONLY), ("no page", _NOT_THERE), ("no memory", _NOT_NESTED))
    faults = _exception(14)
    return (
        *(Program(f"a load from {name}", "8b07", faults, memory=at + 8) for name, at in places),
        *(Program(f"a store to {name}", "8907", faults, memory=at + 0x10) for name, at in places),
    )


def _simple() -> tuple[Program, ...]:
    operand = _DATA + 0x200
    return (
        Program("CPUID", "0fa2", (Exit.CPUID,), {Gpr.RAX: 0}, unpredictable=_ALL_OF_CPUID),
        Program("HLT", "f4", (Exit.HLT,)),
        Program("RDTSC", "0f31", (Exit.RDTSC,), unpredictable=_TIME),
        Program("RDTSCP", "0f01f9", (Exit.RDTSCP,), unpredictable=(*_TIME, Gpr.RCX)),
        Program("RDPMC", "0f33", (Exit.RDPMC,), {Gpr.RCX: 0x99}),
        Program("PUSHF", "9c", (Exit.PUSHF,)),
        Program("POPF", "9c9d", (Exit.POPF,)),
        Program("IRET", "cf", (Exit.IRET,)),
        Program("INVD", "0f08", (Exit.INVD,)),
        Program("WBINVD", "0f09", (Exit.WBINVD,)),
        Program("PAUSE", "f390", (Exit.PAUSE,)),
        Program("RSM", "0faa", (Exit.RSM,)),
        Program("MONITOR", "0f01c8", (Exit.MONITOR,)),
        Program("MWAIT", "0f01c9", (Exit.MWAIT,)),
        Program("XSETBV", "0f01d1", (Exit.XSETBV,), {Gpr.RAX: 1}),
        Program("RDPRU", "0f01fd", (Exit.RDPRU,)),
        Program("VMRUN", "0f01d8", (Exit.VMRUN,), {Gpr.RAX: BLOCK}),
        Program("VMLOAD", "0f01da", (Exit.VMLOAD,), {Gpr.RAX: BLOCK}),
        Program("VMSAVE", "0f01db", (Exit.VMSAVE,), {Gpr.RAX: BLOCK}),
        Program("STGI", "0f01dc", (Exit.STGI,)),
        Program("CLGI", "0f01dd", (Exit.CLGI,)),
        Program("SKINIT", "0f01de", (Exit.SKINIT,)),
        Program("INVLPGA", "0f01df", (Exit.INVLPGA,)),
        Program("VMMCALL", "0f01d9", (Exit.VMMCALL,)),
        Program("CLTS", "0f06", (Exit.CR0_WRITE,)),
        Program("SMSW", "0f01e0", (Exit.CR0_READ,)),
        Program("LMSW", "0f01f0", (Exit.CR0_WRITE, Exit.CR0_SEL_WRITE), {Gpr.RAX: 3}),
        Program("INVLPG", "0f013f", (Exit.INVLPG,), memory=operand),
        Program("INVPCID", "660f388207", (Exit.INVPCID,), memory=operand),
        Program("SGDT", "0f0107", (Exit.GDTR_READ,), memory=operand),
        Program("SIDT", "0f010f", (Exit.IDTR_READ,), memory=operand),
        Program("LGDT", "0f0117", (Exit.GDTR_WRITE,), memory=operand),
        Program("LIDT", "0f011f", (Exit.IDTR_WRITE,), memory=operand),
        Program("SLDT", "0f00c0", (Exit.LDTR_READ,)),
        Program("STR", "0f00c8", (Exit.TR_READ,)),
        Program("LLDT", "0f00d0", (Exit.LDTR_WRITE,)),
        Program("LTR", "0f00d8", (Exit.TR_WRITE,)),
    )


def _exceptions() -> tuple[Program, ...]:
    return (
        Program("INT3", "cc", _exception(3)),
        Program("INT 30H", "cd30", (Exit.SWINT,)),
        Program("INTO", "ce", _exception(4)),
        Program("INT1", "f1", (Exit.ICEBP,)),
        Program("UD2", "0f0b", _exception(6)),
        Program("a division by zero", "f7f1", _exception(0)),
        Program("BOUND", "6207", _exception(5), {Gpr.RAX: 5}, memory=_DATA),
        Program("MOV DS, AX: not present", "8ed8", _exception(11), {Gpr.RAX: 0x30}),
        Program("MOV DS, AX: beyond the limit", "8ed8", _exception(13), {Gpr.RAX: 0xFFF8}),
        Program("MOV SS, AX: null", "8ed0", _exception(13)),
        Program("SYSCALL", "0f05"),
        Program("SYSENTER", "0f34"),
        Program("SWAPGS", "0f01f8"),
        Program("STI", "fb90"),
        Program("CLI", "fa"),
    )


PROGRAMS: Final = (
    Program("nothing", ""),
    *_simple(),
    *_control_registers(),
    *_debug_registers(),
    *_ports(),
    *_msrs(),
    *_memory(),
    *_exceptions(),
)
