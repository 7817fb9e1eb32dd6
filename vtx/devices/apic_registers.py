"""The local APIC's registers as data: number, access in xAPIC and x2APIC mode, writable bits.

A register's number is its offset in the xAPIC page divided by 16 and its MSR index in x2APIC mode minus 800H.

Spec: SDM Vol. 3, "The Local APIC Block Diagram", "Local APIC Register Address Map"; "x2APIC Register Address Space".
"""

from __future__ import annotations

import enum

from attrs import frozen

X2APIC_MSR_BASE = 0x800
BROADCAST = 0xFFFF_FFFF
XAPIC_BROADCAST = 0xFF
FIRST_LEGAL_VECTOR = 16


class Register(enum.IntEnum):
    """Register numbers; ISR, TMR and IRR are eight registers of 32 vectors each."""

    ID = 0x02
    VERSION = 0x03
    TPR = 0x08
    APR = 0x09
    PPR = 0x0A
    EOI = 0x0B
    RRD = 0x0C
    LDR = 0x0D
    DFR = 0x0E
    SVR = 0x0F
    ISR = 0x10
    TMR = 0x18
    IRR = 0x20
    ESR = 0x28
    LVT_CMCI = 0x2F
    ICR_LOW = 0x30
    ICR_HIGH = 0x31
    LVT_TIMER = 0x32
    LVT_THERMAL = 0x33
    LVT_PERFORMANCE = 0x34
    LVT_LINT0 = 0x35
    LVT_LINT1 = 0x36
    LVT_ERROR = 0x37
    INITIAL_COUNT = 0x38
    CURRENT_COUNT = 0x39
    DIVIDE_CONFIGURATION = 0x3E
    SELF_IPI = 0x3F


class Access:
    """What software may do with a register: a set of bits."""

    NONE = 0
    READ = 1
    WRITE = 2
    READ_WRITE = 3


class DeliveryMode(enum.IntEnum):
    """Delivery mode of an interrupt message or a local vector table entry."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    RESERVED = 3
    NMI = 4
    INIT = 5
    START_UP = 6
    EXTINT = 7


class Shorthand(enum.IntEnum):
    """Destination shorthand of an interprocessor interrupt."""

    NONE = 0
    SELF = 1
    ALL_INCLUDING_SELF = 2
    ALL_EXCLUDING_SELF = 3


class Lvt:
    """Bits of a local vector table entry."""

    DELIVERY_STATUS = 1 << 12
    ACTIVE_LOW = 1 << 13
    REMOTE_IRR = 1 << 14
    LEVEL_TRIGGERED = 1 << 15
    MASKED = 1 << 16


class Icr:
    """Bits of the interrupt command register."""

    LOGICAL = 1 << 11
    DELIVERY_STATUS = 1 << 12
    ASSERT = 1 << 14
    LEVEL_TRIGGERED = 1 << 15


class Svr:
    """Bits of the spurious-interrupt vector register."""

    SOFTWARE_ENABLE = 1 << 8
    FOCUS_PROCESSOR_CHECKING = 1 << 9
    SUPPRESS_EOI_BROADCAST = 1 << 12


class Esr:
    """Bits of the error status register."""

    SEND_ILLEGAL_VECTOR = 1 << 5
    RECEIVE_ILLEGAL_VECTOR = 1 << 6
    ILLEGAL_REGISTER_ADDRESS = 1 << 7


class ApicBase:
    """Bits of IA32_APIC_BASE below the base address."""

    BSP = 1 << 8
    EXTD = 1 << 10
    EN = 1 << 11


@frozen
class RegisterInfo:
    """One register.

    ``writable`` are the bits software may set. ``ignored`` bits are read-only, so a write may hold any value there; the
    rest is reserved: dropped in xAPIC mode, refused in x2APIC mode.
    """

    number: int
    xapic: int
    x2apic: int
    writable: int = 0
    ignored: int = 0


_VECTOR = 0x0FF
_DELIVERY_MODE = 0x700
_TIMER_MODE = 0x6_0000
_LINT = _VECTOR | _DELIVERY_MODE | Lvt.ACTIVE_LOW | Lvt.LEVEL_TRIGGERED | Lvt.MASKED
_SVR = _VECTOR | Svr.SOFTWARE_ENABLE | Svr.FOCUS_PROCESSOR_CHECKING | Svr.SUPPRESS_EOI_BROADCAST
_ICR = _VECTOR | _DELIVERY_MODE | Icr.LOGICAL | Icr.ASSERT | Icr.LEVEL_TRIGGERED | 0xC_0000

_R, _W, _RW, _NONE = Access.READ, Access.WRITE, Access.READ_WRITE, Access.NONE
_TABLE = (
    RegisterInfo(Register.ID, _RW, _R, 0xFF00_0000),
    RegisterInfo(Register.VERSION, _R, _R),
    RegisterInfo(Register.TPR, _RW, _RW, 0xFF),
    RegisterInfo(Register.APR, _R, _NONE),
    RegisterInfo(Register.PPR, _R, _R),
    RegisterInfo(Register.EOI, _W, _W),
    RegisterInfo(Register.RRD, _R, _NONE),
    RegisterInfo(Register.LDR, _RW, _R, 0xFF00_0000),
    RegisterInfo(Register.DFR, _RW, _NONE, 0xF000_0000),
    RegisterInfo(Register.SVR, _RW, _RW, _SVR),
    *(RegisterInfo(Register.ISR + index, _R, _R) for index in range(8)),
    *(RegisterInfo(Register.TMR + index, _R, _R) for index in range(8)),
    *(RegisterInfo(Register.IRR + index, _R, _R) for index in range(8)),
    RegisterInfo(Register.ESR, _RW, _RW),
    RegisterInfo(Register.LVT_CMCI, _RW, _RW, _VECTOR | _DELIVERY_MODE | Lvt.MASKED, Lvt.DELIVERY_STATUS),
    RegisterInfo(Register.ICR_LOW, _RW, _RW, _ICR, Icr.DELIVERY_STATUS),
    RegisterInfo(Register.ICR_HIGH, _RW, _NONE, 0xFF00_0000),
    RegisterInfo(Register.LVT_TIMER, _RW, _RW, _VECTOR | Lvt.MASKED | _TIMER_MODE, Lvt.DELIVERY_STATUS),
    RegisterInfo(Register.LVT_THERMAL, _RW, _RW, _VECTOR | _DELIVERY_MODE | Lvt.MASKED, Lvt.DELIVERY_STATUS),
    RegisterInfo(Register.LVT_PERFORMANCE, _RW, _RW, _VECTOR | _DELIVERY_MODE | Lvt.MASKED, Lvt.DELIVERY_STATUS),
    RegisterInfo(Register.LVT_LINT0, _RW, _RW, _LINT, Lvt.DELIVERY_STATUS | Lvt.REMOTE_IRR),
    RegisterInfo(Register.LVT_LINT1, _RW, _RW, _LINT, Lvt.DELIVERY_STATUS | Lvt.REMOTE_IRR),
    RegisterInfo(Register.LVT_ERROR, _RW, _RW, _VECTOR | Lvt.MASKED, Lvt.DELIVERY_STATUS),
    RegisterInfo(Register.INITIAL_COUNT, _RW, _RW, 0xFFFF_FFFF),
    RegisterInfo(Register.CURRENT_COUNT, _R, _R),
    RegisterInfo(Register.DIVIDE_CONFIGURATION, _RW, _RW, 0x0B),
    RegisterInfo(Register.SELF_IPI, _NONE, _W, _VECTOR),
)
REGISTERS = {info.number: info for info in _TABLE}
LVT_REGISTERS = (
    Register.LVT_CMCI,
    Register.LVT_TIMER,
    Register.LVT_THERMAL,
    Register.LVT_PERFORMANCE,
    Register.LVT_LINT0,
    Register.LVT_LINT1,
    Register.LVT_ERROR,
)


@frozen
class InterruptMessage:
    """What travels between APICs: an interprocessor interrupt or an I/O APIC's message.

    ``destination`` is an 8-bit (xAPIC) or 32-bit (x2APIC) ID, `BROADCAST` for everyone; in ``logical`` mode the
    receiver compares it with its logical destination. ``source`` is the APIC ID of the sender, None for an I/O APIC.
    """

    delivery_mode: DeliveryMode
    vector: int
    destination: int = BROADCAST
    logical: bool = False
    shorthand: Shorthand = Shorthand.NONE
    level_triggered: bool = False
    source: int | None = None
