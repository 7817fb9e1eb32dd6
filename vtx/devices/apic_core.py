"""The interrupt logic of a local APIC: who is addressed, what is accepted, requested, in service, and what comes next.

`vtx.devices.local_apic` puts software's access to the registers on top of it. IRR, ISR and TMR are one integer each, so
the highest requested vector is a bit length.

Spec: SDM Vol. 3, "Handling Interrupts", "Issuing Interprocessor Interrupts", "Local Vector Table".
"""

from __future__ import annotations

from typing import Final, Protocol

from attrs import define, field, frozen

from vtx.devices.apic_registers import (
    BROADCAST,
    FIRST_LEGAL_VECTOR,
    LVT_REGISTERS,
    ApicBase,
    DeliveryMode,
    Esr,
    Icr,
    InterruptMessage,
    Lvt,
    Register,
    Shorthand,
    Svr,
)
from vtx.devices.apic_timer import MASK32, ApicTimer, divisor
from vtx.devices.clock import Clock

DEFAULT_BASE = 0xFEE0_0000


_LVT_TIMER: Final = int(Register.LVT_TIMER)  # of a member of an enumeration, the look-up takes longer than its use


class ApicBus(Protocol):
    """Where messages of a local APIC go."""

    def send_ipi(self, message: InterruptMessage) -> bool:
        """Deliver an interprocessor interrupt (any shorthand but SELF); whether a local APIC accepted it."""
        ...

    def broadcast_eoi(self, vector: int) -> None:
        """Tell the I/O APICs that service of the level-triggered interrupt ``vector`` ended."""
        ...

    def requests_dropped(self) -> None:
        """A local APIC was reset and its requested interrupts are gone."""
        ...


class ProcessorPins(Protocol):
    """What a local APIC asks of its processor besides delivering interrupts."""

    def nmi(self) -> None:
        """A non-maskable interrupt becomes pending."""
        ...

    def smi(self) -> None:
        """A system-management interrupt becomes pending."""
        ...

    def local_apic_moved(self) -> None:
        """The local APIC's page is at another address than before, or hidden or seen again."""
        ...

    def init(self) -> None:
        """An INIT signal becomes pending; the processor calls `LocalApic.init_reset` when it takes it."""
        ...

    def interrupt_requested(self) -> None:
        """An interrupt is requested, here or from the 8259s; whether the processor takes it is its own affair."""
        ...

    def start_up(self, vector: int) -> None:
        """A start-up IPI (SIPI) arrives; ``vector`` is 8 bits."""
        ...


@frozen
class ApicProfile:
    """What is fixed about a local APIC.

    ``max_physical_address`` is MAXPHYADDR in bits; ``timer_input_ticks`` the ticks of the time-stamp counter in one
    period of the timer's input clock.
    """

    apic_id: int = 0
    bootstrap: bool = True
    x2apic: bool = True
    tsc_deadline: bool = True
    cmci: bool = True
    max_physical_address: int = 46
    version: int = 0x15
    timer_input_ticks: int = 1

    @property
    def version_register(self) -> int:
        """Version, index of the last LVT entry, and bit 24: EOI-broadcast suppression is supported."""
        return self.version | (6 if self.cmci else 5) << 16 | 1 << 24


def _reset_registers() -> list[int]:
    registers = [0] * 64
    registers[Register.DFR] = MASK32
    registers[Register.SVR] = 0xFF
    for lvt in LVT_REGISTERS:
        registers[lvt] = Lvt.MASKED
    return registers


@define(slots=True)
class LocalApicState:
    """Everything of a local APIC a snapshot needs.

    ``registers`` holds the plainly stored registers by number. ``irr``, ``isr`` and ``tmr`` are 256-bit integers with
    bit n for vector n. ``errors`` are those detected since ESR was last written.
    """

    apic_base: int
    xapic_id: int
    timer: ApicTimer
    registers: list[int] = field(factory=_reset_registers)
    irr: int = 0
    isr: int = 0
    tmr: int = 0
    errors: int = 0
    error_interrupt_armed: bool = True
    local_pins: list[bool] = field(factory=lambda: [False, False])
    external_message: bool = False


class ApicCore:
    """A local APIC without software's access to it."""

    def __init__(self, profile: ApicProfile, clock: Clock, bus: ApicBus, pins: ProcessorPins) -> None:
        self.profile = profile
        self._clock = clock
        self._bus = bus
        self._pins = pins
        base = DEFAULT_BASE | ApicBase.EN | (ApicBase.BSP if profile.bootstrap else 0)
        timer = ApicTimer(divide=profile.timer_input_ticks * divisor(0))
        self.state = LocalApicState(apic_base=base, xapic_id=profile.apic_id & 0xFF, timer=timer)

    # --- Modes -------------------------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """IA32_APIC_BASE.EN."""
        return bool(self.state.apic_base & ApicBase.EN)

    @property
    def x2apic_mode(self) -> bool:
        """IA32_APIC_BASE.EXTD: registers are MSRs, the page does not answer."""
        return bool(self.state.apic_base & ApicBase.EXTD)

    @property
    def software_enabled(self) -> bool:
        """The enable bit of the spurious-interrupt vector register."""
        return bool(self.state.registers[Register.SVR] & Svr.SOFTWARE_ENABLE)

    @property
    def apic_id(self) -> int:
        """The current APIC ID: 8 bits in xAPIC mode, 32 bits in x2APIC mode."""
        return self.profile.apic_id if self.x2apic_mode else self.state.xapic_id

    @property
    def logical_id(self) -> int:
        """LDR; in x2APIC mode derived from the ID: cluster in bits 31:16, one bit in 15:0."""
        if self.x2apic_mode:
            identity = self.profile.apic_id
            return (identity >> 4 & 0xFFFF) << 16 | 1 << (identity & 0xF)
        return self.state.registers[Register.LDR]

    # --- Sending and receiving ---------------------------------------------------------------------------------------

    def send(self, command: int, destination: int) -> None:
        """Issue the interprocessor interrupt that ICR bits 31:0 describe."""
        mode = DeliveryMode(command >> 8 & 7)
        vector = command & 0xFF
        level_triggered = bool(command & Icr.LEVEL_TRIGGERED)
        if mode in (DeliveryMode.RESERVED, DeliveryMode.EXTINT):
            return
        if mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY) and vector < FIRST_LEGAL_VECTOR:
            self.detect(Esr.SEND_ILLEGAL_VECTOR)
            return
        if mode is DeliveryMode.INIT and level_triggered and not command & Icr.ASSERT:
            return  # INIT level de-assert synchronizes arbitration IDs, which no longer exist
        message = InterruptMessage(
            delivery_mode=mode,
            vector=vector,
            destination=destination,
            logical=bool(command & Icr.LOGICAL),
            shorthand=Shorthand(command >> 18 & 3),
            source=self.profile.apic_id,
        )
        if message.shorthand is Shorthand.SELF:
            self.receive(message)
        else:
            self._bus.send_ipi(message)

    def is_addressed(self, destination: int, logical: bool) -> bool:
        """Whether a message for ``destination`` is for this APIC.

        Spec: SDM Vol. 3, "Determining IPI Destination".
        """
        if not self.enabled:
            return False
        if destination == BROADCAST:
            return True
        if not logical:
            return destination == self.apic_id
        if self.x2apic_mode:
            same_cluster = destination >> 16 == self.logical_id >> 16
            return same_cluster and bool(destination & self.logical_id & 0xFFFF)
        mine = self.logical_id >> 24
        if self.state.registers[Register.DFR] >> 28 == 0xF:
            return bool(destination & mine)
        same_cluster = destination >> 4 in (mine >> 4, 0xF)
        return same_cluster and bool(destination & mine & 0xF)

    def receive(self, message: InterruptMessage) -> bool:
        """Take a message this APIC is addressed by; False if it does not accept it."""
        return self._dispatch(message.delivery_mode, message.vector, message.level_triggered)

    def signal(self, lvt: Register) -> None:
        """A local source (thermal, performance counters, CMCI) asks for the interrupt its LVT entry describes."""
        self._local_interrupt(lvt)
        if lvt == Register.LVT_PERFORMANCE:
            self.state.registers[lvt] |= Lvt.MASKED

    def _local_interrupt(self, lvt: Register) -> None:
        entry = self.state.registers[lvt]
        if not entry & Lvt.MASKED and self.enabled:
            self._dispatch(DeliveryMode(entry >> 8 & 7), entry & 0xFF, False)

    def _dispatch(self, mode: DeliveryMode, vector: int, level_triggered: bool) -> bool:
        match mode:
            case DeliveryMode.FIXED | DeliveryMode.LOWEST_PRIORITY:
                return self.accept_interrupt(vector, level_triggered)
            case DeliveryMode.SMI:
                self._pins.smi()
            case DeliveryMode.NMI:
                self._pins.nmi()
            case DeliveryMode.INIT:
                self._pins.init()
            case DeliveryMode.START_UP:
                self._pins.start_up(vector)
            case DeliveryMode.EXTINT:
                self.state.external_message = True
                self._pins.interrupt_requested()
        return True

    def accept_interrupt(self, vector: int, level_triggered: bool) -> bool:
        """Request the fixed interrupt ``vector``; False if the APIC does not take it.

        Spec: SDM Vol. 3, "Interrupt Acceptance for Fixed Interrupts".
        """
        if not self.enabled or not self.software_enabled:
            return False
        if vector < FIRST_LEGAL_VECTOR:
            self.detect(Esr.RECEIVE_ILLEGAL_VECTOR)
            return False
        bit = 1 << vector
        state = self.state
        state.irr |= bit
        state.tmr = state.tmr | bit if level_triggered else state.tmr & ~bit
        self._pins.interrupt_requested()
        return True

    def detect(self, error: int) -> None:
        """Log an error; the first since ESR was written also raises the error interrupt."""
        state = self.state
        state.errors |= error
        if state.error_interrupt_armed and not state.registers[Register.LVT_ERROR] & Lvt.MASKED:
            state.error_interrupt_armed = False
            self._local_interrupt(Register.LVT_ERROR)

    # --- Local interrupt pins ----------------------------------------------------------------------------------------

    def set_local_pin(self, number: int, asserted: bool) -> None:
        """Drive LINT0 or LINT1 (``number`` 0 or 1); while the APIC is disabled they are the INTR and NMI pins.

        Spec: SDM Vol. 3, "Local Vector Table".
        """
        rising = asserted and not self.state.local_pins[number]
        self.state.local_pins[number] = asserted
        if rising and number == 0:
            self._pins.interrupt_requested()
        if not self.enabled:
            if rising and number == 1:
                self._pins.nmi()
            return
        lvt = Register(Register.LVT_LINT0 + number)
        if self._is_level_sensitive(lvt):
            self.sense_level()
        elif rising and self.state.registers[lvt] >> 8 & 7 != DeliveryMode.EXTINT:
            self._local_interrupt(lvt)

    def external_interrupt_pending(self) -> bool:
        """Whether an 8259's interrupt reaches the processor, which then runs the acknowledge cycle with the 8259."""
        state = self.state
        if not self.enabled:
            return state.local_pins[0]
        for number, asserted in enumerate(state.local_pins):
            entry = state.registers[Register.LVT_LINT0 + number]
            if asserted and not entry & Lvt.MASKED and entry >> 8 & 7 == DeliveryMode.EXTINT:
                return True
        return state.external_message

    def external_interrupt_acknowledged(self) -> None:
        """The acknowledge cycle for `external_interrupt_pending` ran."""
        self.state.external_message = False

    def _is_level_sensitive(self, lvt: Register) -> bool:
        """Only LINT0 with fixed delivery can be level-triggered."""
        entry = self.state.registers[lvt]
        return lvt == Register.LVT_LINT0 and bool(entry & Lvt.LEVEL_TRIGGERED) and entry & 0x700 == 0

    def sense_level(self) -> None:
        """Request LINT0's interrupt while its level is active and no earlier request of it awaits EOI."""
        registers = self.state.registers
        entry = registers[Register.LVT_LINT0]
        if not self._is_level_sensitive(Register.LVT_LINT0) or not self.state.local_pins[0]:
            return
        if not entry & (Lvt.MASKED | Lvt.REMOTE_IRR) and self.accept_interrupt(entry & 0xFF, True):
            registers[Register.LVT_LINT0] |= Lvt.REMOTE_IRR

    # --- What the processor asks -------------------------------------------------------------------------------------

    def processor_priority(self) -> int:
        """PPR: the higher of task priority and the interrupt in service."""
        task = self.state.registers[Register.TPR]
        in_service = max(self.state.isr.bit_length() - 1, 0)
        return task if task >> 4 >= in_service >> 4 else in_service & 0xF0

    def pending_vector(self) -> int | None:
        """The requested interrupt the processor is to take when it can, or None if none beats its priority."""
        irr = self.state.irr
        if not irr:
            return None
        vector = irr.bit_length() - 1
        return vector if vector >> 4 > self.processor_priority() >> 4 else None

    def acknowledge(self) -> int:
        """Move the pending interrupt into service and return its vector; the spurious vector if there is none."""
        self.advance(self._clock.now())
        vector = self.pending_vector()
        if vector is None:
            return self.state.registers[Register.SVR] & 0xFF
        self.state.irr &= ~(1 << vector)
        self.state.isr |= 1 << vector
        return vector

    def end_of_interrupt(self) -> int | None:
        """EOI: end service of the highest interrupt in service.

        Returns its vector if it was level-triggered and the bus was told, None otherwise.
        """
        state = self.state
        if not state.isr:
            return None
        vector = state.isr.bit_length() - 1
        state.isr &= ~(1 << vector)
        lint0 = state.registers[Register.LVT_LINT0]
        if lint0 & Lvt.REMOTE_IRR and lint0 & 0xFF == vector:
            state.registers[Register.LVT_LINT0] = lint0 & ~Lvt.REMOTE_IRR
            self.sense_level()
        if not state.tmr >> vector & 1 or state.registers[Register.SVR] & Svr.SUPPRESS_EOI_BROADCAST:
            return None
        self._bus.broadcast_eoi(vector)
        return vector

    # --- Time --------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """The tick at which the timer next has an effect other than on its own registers."""
        timer = self.state.timer
        entry = self.state.registers[_LVT_TIMER]
        if entry & Lvt.MASKED or self.state.irr >> (entry & 0xFF) & 1:
            return None
        return timer.next_expiry(self._clock.now())

    def advance(self, now: int) -> None:
        """Let the timer expire if tick ``now`` has reached its deadline; missed periods count once."""
        if self.state.timer.expire(now):
            self._local_interrupt(Register.LVT_TIMER)
