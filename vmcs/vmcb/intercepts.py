"""Intercepts and exit codes: what can end the execution of a guest, and what EXITINFO1 and EXITINFO2 then say.

An intercept's bit number in the six intercept words is also the code of the #VMEXIT it causes. Exit codes beyond those
words belong to events that need no intercept.

Spec: APM Vol. 2, "SVM Intercept Codes", "Instruction Intercepts", "Layout of VMCB".
"""

from __future__ import annotations

import enum
from typing import Final

from attrs import frozen

from vmcs.bits import MASK64


class Exit(enum.IntEnum):
    """EXITCODE. Up to `LAST_INTERCEPT`, also the number of the intercept."""

    CR0_READ = 0x00
    CR0_WRITE = 0x10
    DR0_READ = 0x20
    DR0_WRITE = 0x30
    EXCEPTION_0 = 0x40
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MWAIT_CONDITIONAL = 0x8C
    XSETBV = 0x8D
    RDPRU = 0x8E
    EFER_WRITE_TRAP = 0x8F
    CR0_WRITE_TRAP = 0x90
    INVLPGB = 0xA0
    INVLPGB_ILLEGAL = 0xA1
    INVPCID = 0xA2
    MCOMMIT = 0xA3
    TLBSYNC = 0xA4
    BUS_LOCK = 0xA5
    IDLE_HLT = 0xA6
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_NOACCEL = 0x402
    INVALID = MASK64


LAST_INTERCEPT: Final = 0xBF
INTERCEPT_WORDS: Final = 6

_EXCEPTIONS: Final = (
    *("DE", "DB", "vector 2", "BP", "OF", "BR", "UD", "NM", "DF", "vector 9", "TS", "NP", "SS", "GP", "PF"),
    *("vector 15", "MF", "AC", "MC", "XF", "vector 20", "CP"),
    *(f"vector {vector}" for vector in range(22, 28)),
    *("HV", "VC", "SX", "vector 31"),
)


@frozen
class ExitCode:
    """An exit code: its name, and what EXITINFO1 and EXITINFO2 hold (empty: nothing defined).

    ``saves_next_rip``: the exit is due to an instruction, and nRIP is that of the one after it.
    """

    number: int
    name: str
    info1: str = ""
    info2: str = ""
    saves_next_rip: bool = False


_DECODE_CR: Final = "number of the general register; bit 63 tells MOV from other instructions"
_DECODE_DR: Final = "number of the general register"

# The named codes that are due to an instruction and have nothing in EXITINFO1 and EXITINFO2.
_PLAIN_INSTRUCTIONS: Final = (
    *(Exit.IDTR_READ, Exit.GDTR_READ, Exit.LDTR_READ, Exit.TR_READ, Exit.IDTR_WRITE, Exit.GDTR_WRITE),
    *(Exit.LDTR_WRITE, Exit.TR_WRITE, Exit.RDTSC, Exit.RDPMC, Exit.PUSHF, Exit.POPF, Exit.CPUID, Exit.RSM, Exit.IRET),
    *(Exit.INVD, Exit.PAUSE, Exit.HLT, Exit.VMRUN, Exit.VMMCALL, Exit.VMLOAD, Exit.VMSAVE, Exit.STGI, Exit.CLGI),
    *(Exit.SKINIT, Exit.RDTSCP, Exit.ICEBP, Exit.WBINVD, Exit.MONITOR, Exit.MWAIT_CONDITIONAL, Exit.XSETBV),
    *(Exit.RDPRU, Exit.INVPCID, Exit.MCOMMIT, Exit.TLBSYNC, Exit.INVLPGB, Exit.INVLPGB_ILLEGAL),
    Exit.IDLE_HLT,
)


def _title(code: Exit) -> str:
    return {Exit.MWAIT_CONDITIONAL: "MWAIT (armed)", Exit.IDLE_HLT: "HLT (idle)"}.get(code, code.name)


def _exception(vector: int, name: str) -> ExitCode:
    info2 = {1: "", 14: "faulting linear address"}.get(vector, "")
    info1 = "error code" if vector in (8, 10, 11, 12, 13, 14, 17, 21, 29, 30) else ""
    return ExitCode(Exit.EXCEPTION_0 + vector, f"exception #{name}", info1, info2, vector in (3, 4, 5))


_TABLE: Final = (
    *(ExitCode(Exit.CR0_READ + n, f"CR{n} read", _DECODE_CR, "", True) for n in range(16)),
    *(ExitCode(Exit.CR0_WRITE + n, f"CR{n} write", _DECODE_CR, "", True) for n in range(16)),
    *(ExitCode(Exit.DR0_READ + n, f"DR{n} read", _DECODE_DR, "", True) for n in range(16)),
    *(ExitCode(Exit.DR0_WRITE + n, f"DR{n} write", _DECODE_DR, "", True) for n in range(16)),
    *(_exception(vector, name) for vector, name in enumerate(_EXCEPTIONS)),
    ExitCode(Exit.INTR, "physical interrupt"),
    ExitCode(Exit.NMI, "physical NMI"),
    ExitCode(Exit.SMI, "physical SMI", "bit 0: external; bit 1: I/O instruction"),
    ExitCode(Exit.INIT, "physical INIT"),
    ExitCode(Exit.VINTR, "virtual interrupt"),
    ExitCode(Exit.CR0_SEL_WRITE, "selective CR0 write", _DECODE_CR, "", True),
    ExitCode(Exit.SWINT, "software interrupt", "vector", "", True),
    ExitCode(Exit.INVLPG, "INVLPG", "linear address", "", True),
    ExitCode(Exit.INVLPGA, "INVLPGA", "linear address", "", True),
    ExitCode(
        Exit.IOIO, "I/O instruction", "port, size and kind of the access", "address of the next instruction", True
    ),
    ExitCode(Exit.MSR, "MSR access", "0 for RDMSR, 1 for WRMSR", "", True),
    ExitCode(Exit.TASK_SWITCH, "task switch", "selector of the TSS", "kind of the switch and error code"),
    ExitCode(Exit.FERR_FREEZE, "FERR freeze"),
    ExitCode(Exit.SHUTDOWN, "shutdown"),
    ExitCode(Exit.MWAIT, "MWAIT", "1 if the monitor was armed", "", True),
    ExitCode(Exit.EFER_WRITE_TRAP, "EFER written", "EFER"),
    *(ExitCode(Exit.CR0_WRITE_TRAP + n, f"CR{n} written", f"CR{n}") for n in range(16)),
    *(ExitCode(code, _title(code), saves_next_rip=True) for code in _PLAIN_INSTRUCTIONS),
    ExitCode(Exit.BUS_LOCK, "bus lock"),
    ExitCode(Exit.NPF, "nested page fault", "error code of the nested walk", "guest-physical address"),
    ExitCode(Exit.AVIC_INCOMPLETE_IPI, "AVIC incomplete IPI", "ICR", "why"),
    ExitCode(Exit.AVIC_NOACCEL, "AVIC access not accelerated", "offset of the register", "vector"),
    ExitCode(Exit.INVALID, "VMEXIT_INVALID"),
)

EXIT_CODES: Final = tuple(sorted(_TABLE, key=lambda each: each.number))
BY_NUMBER: Final = {each.number: each for each in EXIT_CODES}


def name_of(number: int) -> str:
    """The name of an exit code, its number in hexadecimal if it has none."""
    known = BY_NUMBER.get(number)
    return known.name if known else f"{number:#x}"
