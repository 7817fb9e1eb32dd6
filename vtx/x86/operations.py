"""Sensitive operations: what a virtualization extension may intercept, as a closed union.

A handler of the processor checks an instruction's own faults, then describes what it is about to do with one of these
records and asks the extension whether that exits. Whether it does is a pure function of the record and the control
structure, for VMX as for SVM.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "Instructions That Cause VM Exits"; APM Vol. 2, "Intercept Operation".
"""

from __future__ import annotations

import enum
from typing import Final

from attrs import field, frozen

from vtx.x86.event import Event
from vtx.x86.outcome import Fault


class Plain(enum.IntEnum):
    """Operations without parameters that matter to an interception."""

    CPUID = enum.auto()
    HLT = enum.auto()
    INVD = enum.auto()
    WBINVD = enum.auto()
    RDTSC = enum.auto()
    RDTSCP = enum.auto()
    RDPMC = enum.auto()
    RDPRU = enum.auto()
    MCOMMIT = enum.auto()
    PAUSE = enum.auto()
    MONITOR = enum.auto()
    XSETBV = enum.auto()
    RDRAND = enum.auto()
    RDSEED = enum.auto()
    RSM = enum.auto()
    GETSEC = enum.auto()
    UMWAIT = enum.auto()
    TPAUSE = enum.auto()
    TLBSYNC = enum.auto()
    PUSHF = enum.auto()
    POPF = enum.auto()
    IRET = enum.auto()
    ICEBP = enum.auto()


@frozen
class Simple:
    """An operation of `Plain`; `SIMPLE` has one of each."""

    kind: Plain


SIMPLE: Final = {kind: Simple(kind) for kind in Plain}


@frozen
class MonitorWait:
    """MWAIT or MWAITX; ``armed`` is whether there is something to wait for, which has not happened yet."""

    armed: bool


@frozen
class MoveToControlRegister:
    """MOV to CR0, CR2, CR3, CR4 or CR8 (writes of CR2 never exit in VMX).

    ``register`` is the source GPR, ``value`` what it holds.
    """

    number: int
    register: int
    value: int


@frozen
class MoveFromControlRegister:
    """MOV from a control register (in VMX, reads of CR3 and CR8 alone can exit) to the GPR ``register``."""

    number: int
    register: int


@frozen
class ClearTaskSwitched:
    """CLTS."""


@frozen
class LoadMachineStatusWord:
    """LMSW; ``source`` is the 16-bit operand, ``linear`` its address if it is in memory."""

    source: int
    linear: int | None


@frozen
class StoreMachineStatusWord:
    """SMSW, which never exits in VMX."""


@frozen
class MoveDebugRegister:
    """MOV to or from debug register ``number``; ``register`` is the GPR.

    ``encoded`` is the number in the instruction, which differs where DR4 and DR5 stand for DR6 and DR7.
    """

    number: int
    register: int
    write: bool
    encoded: int = field()

    @encoded.default
    def _encoded(self) -> int:
        return self.number


@frozen
class InvalidatePage:
    """INVLPG of a linear address."""

    linear: int


@frozen
class InvalidateProcessContext:
    """INVPCID."""


@frozen
class BroadcastInvalidation:
    """INVLPGB; ``legal`` is whether its operands are."""

    legal: bool


@frozen
class DescriptorTableAccess:
    """SGDT, SIDT, LGDT, LIDT (``local`` false) or SLDT, STR, LLDT, LTR (``local`` true)."""

    local: bool


@frozen
class SoftwareInterrupt:
    """INT n, which never exits in VMX."""

    vector: int


@frozen
class ReadMsr:
    """RDMSR of ``index``."""

    index: int


@frozen
class WriteMsr:
    """WRMSR of ``value`` to ``index``."""

    index: int
    value: int


@frozen
class ExtendedStateTransfer:
    """XSAVES (``save``) or XRSTORS; ``supervisor`` are the components of IA32_XSS that it is asked for."""

    save: bool
    supervisor: int


@frozen
class ReadMsrList:
    """RDMSRLIST comes to the MSR of ``index``."""

    index: int


@frozen
class WriteMsrList:
    """WRMSRLIST comes to the MSR of ``index``, with ``value`` for it."""

    index: int
    value: int


@frozen
class SendUserIpi:
    """SENDUIPI has posted a user interrupt and notifies ``destination`` (NDST of the descriptor) with ``vector``."""

    vector: int
    destination: int


@frozen
class PortIo:
    """IN, OUT, INS or OUTS of ``size`` bytes; ``linear`` is the address of a string operand's memory."""

    port: int
    size: int
    is_in: bool
    string: bool
    rep: bool
    immediate: bool
    linear: int | None = None


class TaskSwitchSource(enum.IntEnum):
    """What initiated a task switch, in the encoding of the VM-exit qualification."""

    CALL = 0
    IRET = 1
    JMP = 2
    GATE = 3


@frozen
class TaskSwitch:
    """A task switch to the TSS of ``selector``; ``delivering`` is the event that goes through a task gate."""

    selector: int
    source: TaskSwitchSource
    delivering: Event | None = None


@frozen
class RaiseException:
    """An exception about to be delivered by the instruction or its accesses.

    ``software`` is None for hardware exceptions, else the instruction's mnemonic name: INT3, INTO or INT1.
    """

    fault: Fault
    software: str | None = None


Operation = (
    Simple
    | MonitorWait
    | MoveToControlRegister
    | MoveFromControlRegister
    | ClearTaskSwitched
    | LoadMachineStatusWord
    | StoreMachineStatusWord
    | MoveDebugRegister
    | InvalidatePage
    | InvalidateProcessContext
    | BroadcastInvalidation
    | DescriptorTableAccess
    | SoftwareInterrupt
    | ReadMsr
    | WriteMsr
    | ExtendedStateTransfer
    | ReadMsrList
    | WriteMsrList
    | SendUserIpi
    | PortIo
    | TaskSwitch
    | RaiseException
)
