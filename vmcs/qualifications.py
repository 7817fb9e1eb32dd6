"""Exit qualifications: the layout of each, and typed functions that assemble the ones with several parts.

``LAYOUT.decode(value)`` takes any of them apart again.

Spec: SDM Vol. 3, "VM Exits", "Basic VM-Exit Information".
"""

from __future__ import annotations

import enum
from typing import Final

from vmcs.bits import Layout, Slice, flags
from vmcs.instruction_information import REGISTERS


class ControlRegisterAccessType(enum.IntEnum):
    """How an instruction accessed a control register."""

    MOV_TO_CR = 0
    MOV_FROM_CR = 1
    CLTS = 2
    LMSW = 3


class TaskSwitchSource(enum.IntEnum):
    """What initiated a task switch."""

    CALL = 0
    IRET = 1
    JMP = 2
    TASK_GATE_IN_IDT = 3


class ApicAccessType(enum.IntEnum):
    """How the APIC-access page was accessed."""

    LINEAR_READ = 0
    LINEAR_WRITE = 1
    LINEAR_FETCH = 2
    LINEAR_EVENT_DELIVERY = 3
    GUEST_PHYSICAL_EVENT_DELIVERY = 10
    GUEST_PHYSICAL_FETCH_OR_DATA = 15


class EntryFailure(enum.IntEnum):
    """Exit qualification of a VM entry that failed on guest state."""

    DEFAULT = 0
    PDPTES = 2
    NMI_INJECTION = 3
    VMCS_LINK_POINTER = 4


def _meanings(kind: type[enum.IntEnum]) -> dict[int, str]:
    return {member.value: member.name.lower().replace("_", " ") for member in kind}


DEBUG_EXCEPTION: Final = Layout(
    "debug exception",
    64,
    flags(((0, "B0"), (1, "B1"), (2, "B2"), (3, "B3"), (11, "BLD"), (13, "BD"), (14, "BS"), (16, "RTM"))),
)

STARTUP_IPI: Final = Layout("start-up IPI", 64, (Slice("vector", 0, 8),))

TASK_SWITCH: Final = Layout(
    "task switch", 64, (Slice("TSS selector", 0, 16), Slice("source", 30, 2, _meanings(TaskSwitchSource)))
)

CONTROL_REGISTER_ACCESS: Final = Layout(
    "control-register access",
    64,
    (
        Slice("control register", 0, 4),
        Slice("access type", 4, 2, _meanings(ControlRegisterAccessType)),
        Slice("LMSW memory operand", 6),
        Slice("register", 8, 4, REGISTERS),
        Slice("LMSW source data", 16, 16),
    ),
)

MOV_DR: Final = Layout(
    "MOV DR",
    64,
    (
        Slice("debug register", 0, 3),
        Slice("direction", 4, 1, {0: "MOV to DR", 1: "MOV from DR"}),
        Slice("register", 8, 4, REGISTERS),
    ),
)

IO_INSTRUCTION: Final = Layout(
    "I/O instruction",
    64,
    (
        Slice("size", 0, 3, {0: "1 byte", 1: "2 bytes", 3: "4 bytes"}),
        Slice("direction", 3, 1, {0: "OUT", 1: "IN"}),
        Slice("string", 4),
        Slice("REP prefixed", 5),
        Slice("operand encoding", 6, 1, {0: "DX", 1: "immediate"}),
        Slice("port", 16, 16),
    ),
)

MWAIT: Final = Layout("MWAIT", 64, (Slice("monitoring armed", 0),))

APIC_ACCESS: Final = Layout(
    "APIC access",
    64,
    (
        Slice("offset", 0, 12),
        Slice("access type", 12, 4, _meanings(ApicAccessType)),
        Slice("asynchronous", 16),
    ),
)

VIRTUALIZED_EOI: Final = Layout("virtualized EOI", 64, (Slice("vector", 0, 8),))

APIC_WRITE: Final = Layout("APIC write", 64, (Slice("offset", 0, 12),))

EPT_VIOLATION: Final = Layout(
    "EPT violation",
    64,
    flags(
        (
            (0, "data read"),
            (1, "data write"),
            (2, "instruction fetch"),
            (3, "readable"),
            (4, "writable"),
            (5, "executable"),
            (6, "executable for user-mode linear addresses"),
            (7, "guest-linear address valid"),
            (8, "access to the translation of a linear address"),
            (9, "user-mode linear address"),
            (10, "read/write linear address"),
            (11, "execute-disable linear address"),
            (12, "NMI unblocking due to IRET"),
            (13, "shadow-stack access"),
            (14, "supervisor shadow-stack page"),
            (15, "guest-paging verification"),
            (16, "asynchronous"),
        )
    ),
)

PAGE_MODIFICATION_LOG_FULL: Final = Layout(
    "page-modification log full", 64, flags(((12, "NMI unblocking due to IRET"), (16, "asynchronous")))
)

SPP_RELATED_EVENT: Final = Layout(
    "SPP-related event",
    64,
    (
        Slice("event", 11, 1, {0: "SPP misconfiguration", 1: "SPP miss"}),
        Slice("NMI unblocking due to IRET", 12),
        Slice("asynchronous", 16),
    ),
)

INSTRUCTION_TIMEOUT: Final = Layout("instruction timeout", 64, (Slice("context invalid", 0),))

ENTRY_FAILURE: Final = Layout("VM-entry failure", 64, (Slice("cause", 0, 64, _meanings(EntryFailure)),))

LAYOUTS: Final = (
    DEBUG_EXCEPTION,
    STARTUP_IPI,
    TASK_SWITCH,
    CONTROL_REGISTER_ACCESS,
    MOV_DR,
    IO_INSTRUCTION,
    MWAIT,
    APIC_ACCESS,
    VIRTUALIZED_EOI,
    APIC_WRITE,
    EPT_VIOLATION,
    PAGE_MODIFICATION_LOG_FULL,
    SPP_RELATED_EVENT,
    INSTRUCTION_TIMEOUT,
    ENTRY_FAILURE,
)


def mov_cr(number: int, register: int, *, to_cr: bool) -> int:
    """MOV to or from control register ``number`` with general-purpose register ``register``."""
    access = ControlRegisterAccessType.MOV_TO_CR if to_cr else ControlRegisterAccessType.MOV_FROM_CR
    return number & 0xF | access << 4 | (register & 0xF) << 8


def clts() -> int:
    """CLTS."""
    return ControlRegisterAccessType.CLTS << 4


def lmsw(source: int, *, memory_operand: bool) -> int:
    """LMSW with its 16-bit source operand; the linear address of a memory operand goes to its own field."""
    return ControlRegisterAccessType.LMSW << 4 | memory_operand << 6 | (source & 0xFFFF) << 16


def mov_dr(number: int, register: int, *, from_dr: bool) -> int:
    """MOV to or from debug register ``number``."""
    return number & 7 | from_dr << 4 | (register & 0xF) << 8


def io_instruction(
    port: int, size: int, *, is_in: bool, string: bool = False, rep: bool = False, immediate: bool = False
) -> int:
    """IN, OUT, INS or OUTS of ``size`` bytes (1, 2 or 4) at ``port``."""
    return size - 1 | is_in << 3 | string << 4 | rep << 5 | immediate << 6 | (port & 0xFFFF) << 16


def task_switch(selector: int, source: TaskSwitchSource) -> int:
    """A task switch to the TSS at ``selector``."""
    return selector & 0xFFFF | source << 30


def apic_access(offset: int, access: ApicAccessType, *, asynchronous: bool = False) -> int:
    """An access to ``offset`` in the APIC-access page. Guest-physical accesses leave the offset undefined: pass 0."""
    return offset & 0xFFF | access << 12 | asynchronous << 16


def ept_violation(
    *,
    read: bool,
    write: bool,
    fetch: bool,
    permissions: int,
    user_executable: bool = False,
    linear_valid: bool = False,
    final: bool = False,
    advanced: int = 0,
    nmi_unblocking: bool = False,
    asynchronous: bool = False,
) -> int:
    """An EPT violation.

    ``permissions`` are the AND of bits 2:0 of the EPT entries used (0 if one was not present). ``final`` tells an
    access to the translation of the linear address from one to a paging structure; it counts only with
    ``linear_valid``. ``advanced`` is bits 11:9 shifted down: user-mode, writable, execute-disable; only for
    processors that report advanced information, and only with ``final``.
    """
    value = read | write << 1 | fetch << 2 | (permissions & 7) << 3 | user_executable << 6
    if linear_valid:
        value |= 1 << 7 | final << 8
        if final:
            value |= (advanced & 7) << 9
    return value | nmi_unblocking << 12 | asynchronous << 16
