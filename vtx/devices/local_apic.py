"""The local APIC of one logical processor, in xAPIC and x2APIC mode.

Software reaches it through its page (`LocalApic.mmio_read`), MSRs 800H-8FFH (`msr_read`), IA32_APIC_BASE,
IA32_TSC_DEADLINE and CR8; other APICs through the bus; the processor asks it for the interrupt to deliver. All three
ways of access share one read and one write function over the table in `vtx.devices.apic_registers`.

Interpretations. The page answers aligned 4-byte accesses; other reads get the bytes they cover, other writes are
dropped. IA32_APIC_BASE with EN clear loses all state, as the manual allows. Level and trigger mode of an
interprocessor interrupt other than INIT level de-assert have no meaning, as on every processor since the Pentium 4.
Shorthand combinations the manual calls invalid are delivered. Interrupt pins are logical levels, so the polarity bits
have no effect.

Threats: the guest chooses every register value, and timer rates up to one expiry a tick. Time-outs are computed,
never counted; an expiry that would find its vector requested already is no deadline; an error interrupt that is
itself an error does not recurse. Whatever MSR access the architecture refuses is reported to the caller, who raises
the exception.

Spec: SDM Vol. 3, "Advanced Programmable Interrupt Controller (APIC)".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from attrs import evolve

from vtx.devices.apic_core import DEFAULT_BASE, ApicBus, ApicCore, ApicProfile, LocalApicState, ProcessorPins
from vtx.devices.apic_registers import (
    BROADCAST,
    LVT_REGISTERS,
    REGISTERS,
    X2APIC_MSR_BASE,
    XAPIC_BROADCAST,
    Access,
    ApicBase,
    DeliveryMode,
    Esr,
    Icr,
    Lvt,
    Register,
    RegisterInfo,
    Shorthand,
    Svr,
)
from vtx.devices.apic_timer import MASK32, MASK64, ApicTimer, TimerMode, divisor
from vtx.devices.clock import Clock

ONES = (0, 0xFF, 0xFFFF, 0, MASK32, 0, 0, 0, MASK64)

DISABLED = 0
XAPIC = ApicBase.EN
X2APIC = ApicBase.EN | ApicBase.EXTD
MODE_TRANSITIONS = {DISABLED: (DISABLED, XAPIC), XAPIC: (DISABLED, XAPIC, X2APIC), X2APIC: (DISABLED, X2APIC)}


def _registers_of(profile: ApicProfile) -> dict[int, RegisterInfo]:
    """The registers, and of them the bits, that a local APIC with ``profile`` has."""
    registers: dict[int, RegisterInfo] = dict(REGISTERS)
    if not profile.cmci:
        del registers[Register.LVT_CMCI]
    if not profile.tsc_deadline:
        timer = registers[Register.LVT_TIMER]
        registers[Register.LVT_TIMER] = evolve(timer, writable=timer.writable & ~(1 << 18))
    return registers


class LocalApic(ApicCore):
    """One local APIC in its power-up state: enabled in xAPIC mode, software-disabled, everything masked."""

    def __init__(self, profile: ApicProfile, clock: Clock, bus: ApicBus, pins: ProcessorPins) -> None:
        super().__init__(profile, clock, bus, pins)
        self._registers = _registers_of(profile)
        self._readers: dict[int, Callable[[], int]] = {
            Register.ID: self._read_id,
            Register.VERSION: lambda: profile.version_register,
            Register.PPR: self.processor_priority,
            Register.LDR: lambda: self.logical_id,
            Register.INITIAL_COUNT: self._read_initial_count,
            Register.CURRENT_COUNT: self._read_current_count,
            **{number: partial(self._read_vectors, number) for number in range(Register.ISR, Register.ESR)},
        }
        self._writers: dict[int, Callable[[int], None]] = {
            Register.ID: self._write_id,
            Register.EOI: self._write_eoi,
            Register.DFR: self._write_dfr,
            Register.SVR: self._write_svr,
            Register.ESR: self._write_esr,
            Register.ICR_LOW: self._write_icr_low,
            Register.INITIAL_COUNT: self._write_initial_count,
            Register.DIVIDE_CONFIGURATION: self._write_divide_configuration,
            Register.SELF_IPI: self._write_self_ipi,
            **{lvt: partial(self._write_lvt, lvt) for lvt in LVT_REGISTERS},
        }

    # --- Modes -------------------------------------------------------------------------------------------------------

    @property
    def page_address(self) -> int | None:
        """Physical address of the register page, None while there is none (disabled or x2APIC mode)."""
        base = self.state.apic_base
        if base & X2APIC != XAPIC:
            return None
        return base & ~0xFFF

    def apic_base_write(self, value: int) -> bool:
        """WRMSR to IA32_APIC_BASE; False for reserved bits and illegal transitions, which raise #GP(0).

        Spec: SDM Vol. 3, "x2APIC State Transitions"; "Enabling or Disabling the Local APIC".
        """
        extended = ApicBase.EXTD if self.profile.x2apic else 0
        address = (1 << self.profile.max_physical_address) - (1 << 12)
        if value & ~(address | ApicBase.BSP | ApicBase.EN | extended):
            return False
        old_mode = self.state.apic_base & X2APIC
        new_mode = value & X2APIC
        if new_mode not in MODE_TRANSITIONS[old_mode]:
            return False
        if old_mode and not new_mode:
            self._clear()
            self.state.xapic_id = self.profile.apic_id & 0xFF
        elif new_mode != old_mode and new_mode == X2APIC:
            self.state.registers[Register.ICR_HIGH] = 0
        self._move(value)
        return True

    def _move(self, base: int) -> None:
        before = self.page_address
        self.state.apic_base = base
        if self.page_address != before:
            self._pins.local_apic_moved()

    def reset(self) -> None:
        """Power-up and RESET: everything, IA32_APIC_BASE and the ID included."""
        base = DEFAULT_BASE | ApicBase.EN | (ApicBase.BSP if self.profile.bootstrap else 0)
        self._clear()
        self._move(base)
        self.state.xapic_id = self.profile.apic_id & 0xFF

    def init_reset(self) -> None:
        """INIT: as after power-up but for IA32_APIC_BASE and the ID.

        Spec: SDM Vol. 3, "Local APIC State After an INIT Reset (Wait-for-SIPI State)".
        """
        self._clear()

    def set_virtual_wire_mode(self) -> None:
        """What PC firmware leaves behind: enabled, LINT0 passes the 8259's interrupts, LINT1 is NMI."""
        registers = self.state.registers
        registers[Register.SVR] = Svr.SOFTWARE_ENABLE | 0x0F
        registers[Register.LVT_LINT0] = DeliveryMode.EXTINT << 8
        registers[Register.LVT_LINT1] = DeliveryMode.NMI << 8

    def _clear(self) -> None:
        """Put everything but IA32_APIC_BASE and the ID to its reset value; pins stay as they are driven."""
        old = self.state
        timer = ApicTimer(divide=self.profile.timer_input_ticks * divisor(0), tsc_offset=old.timer.tsc_offset)
        self.state = LocalApicState(old.apic_base, old.xapic_id, timer, local_pins=old.local_pins)
        self._bus.requests_dropped()

    # --- The three ways in -------------------------------------------------------------------------------------------

    def mmio_read(self, offset: int, size: int) -> int:
        """Read the register page; ones where it does not answer."""
        if self.page_address is None:
            return ONES[size]
        value = self._read_checked(offset >> 4) if offset & 0xF < 4 else 0
        return value >> (8 * (offset & 0xF)) & ONES[size]

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Write the register page; reserved bits are dropped."""
        if self.page_address is None or offset & 0xF or size != 4:
            return
        info = self._registers.get(offset >> 4)
        if info is None or not info.xapic:
            self.detect(Esr.ILLEGAL_REGISTER_ADDRESS)
        elif info.xapic & Access.WRITE:
            self._write(info, value)

    def msr_read(self, index: int) -> int | None:
        """RDMSR of 800H-8FFH; None where the access raises #GP(0).

        Spec: SDM Vol. 3, "x2APIC Register Availability", "Reserved Bit Checking".
        """
        info = self._registers.get(index - X2APIC_MSR_BASE)
        if not self.x2apic_mode or info is None or not info.x2apic & Access.READ:
            return None
        value = self._read(info.number)
        if info.number == Register.ICR_LOW:
            value |= self.state.registers[Register.ICR_HIGH] << 32
        return value

    def msr_write(self, index: int, value: int) -> bool:
        """WRMSR to 800H-8FFH; False where the access raises #GP(0): nothing changed then."""
        info = self._registers.get(index - X2APIC_MSR_BASE)
        if not self.x2apic_mode or info is None or not info.x2apic & Access.WRITE:
            return False
        low = value
        if info.number == Register.ICR_LOW:
            low = value & MASK32
        if low & ~(info.writable | info.ignored):
            return False
        if info.number == Register.ICR_LOW:
            self.state.registers[Register.ICR_HIGH] = value >> 32
        self._write(info, low)
        return True

    @property
    def cr8(self) -> int:
        """CR8: bits 7:4 of the task priority. Usable whether or not the APIC is enabled."""
        return self.state.registers[Register.TPR] >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.state.registers[Register.TPR] = (value & 0xF) << 4

    @property
    def tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE; zero when disarmed, expired or not in TSC-deadline mode."""
        self.advance(self._clock.now())
        return self.state.timer.tsc_deadline

    @tsc_deadline.setter
    def tsc_deadline(self, value: int) -> None:
        self.advance(self._clock.now())
        self.state.timer.set_tsc_deadline(value)
        self.advance(self._clock.now())

    def set_tsc_offset(self, offset: int) -> None:
        """Tell the timer what the processor adds to ticks to get its time-stamp counter."""
        self.advance(self._clock.now())
        self.state.timer.tsc_offset = offset

    # --- Registers ---------------------------------------------------------------------------------------------------

    def _read_checked(self, number: int) -> int:
        """A read in xAPIC mode, where a reserved address is an error and a write-only register reads as zero."""
        info = self._registers.get(number)
        if info is None or not info.xapic:
            self.detect(Esr.ILLEGAL_REGISTER_ADDRESS)
            return 0
        return self._read(number) if info.xapic & Access.READ else 0

    def _read(self, number: int) -> int:
        """The value of a register that exists and is readable."""
        reader = self._readers.get(number)
        return self.state.registers[number] if reader is None else reader()

    def _read_id(self) -> int:
        return self.apic_id if self.x2apic_mode else self.apic_id << 24

    def _read_vectors(self, number: int) -> int:
        """32 vectors of ISR, TMR or IRR."""
        self.advance(self._clock.now())
        state = self.state
        vectors = (state.isr, state.tmr, state.irr)[number - Register.ISR >> 3]
        return vectors >> (32 * (number & 7)) & MASK32

    def _read_initial_count(self) -> int:
        return self.state.timer.initial_count

    def _read_current_count(self) -> int:
        now = self._clock.now()
        self.advance(now)
        return self.state.timer.current_count(now)

    def _write(self, info: RegisterInfo, value: int) -> None:
        """Store a register that exists and is writable, ignoring bits that are not."""
        self.advance(self._clock.now())
        value &= info.writable
        writer = self._writers.get(info.number)
        if writer is None:
            self.state.registers[info.number] = value
        else:
            writer(value)

    def _write_id(self, value: int) -> None:
        self.state.xapic_id = value >> 24

    def _write_dfr(self, value: int) -> None:
        self.state.registers[Register.DFR] = value | 0x0FFF_FFFF

    def _write_svr(self, value: int) -> None:
        """Clearing the software enable masks the whole local vector table."""
        registers = self.state.registers
        registers[Register.SVR] = value
        if not value & Svr.SOFTWARE_ENABLE:
            for lvt in LVT_REGISTERS:
                registers[lvt] |= Lvt.MASKED

    def _write_eoi(self, value: int) -> None:
        self.end_of_interrupt()

    def _write_self_ipi(self, value: int) -> None:
        self.send(Shorthand.SELF << 18 | value, 0)

    def _write_esr(self, value: int) -> None:
        """Any write moves the errors detected so far into view and re-arms the error interrupt."""
        state = self.state
        state.registers[Register.ESR] = state.errors
        state.errors = 0
        state.error_interrupt_armed = True

    def _write_lvt(self, lvt: Register, value: int) -> None:
        state = self.state
        if not self.software_enabled:
            value |= Lvt.MASKED
        if lvt == Register.LVT_TIMER:
            state.timer.set_mode(TimerMode(value >> 17 & 3))
        keeps_remote_irr = value & Lvt.LEVEL_TRIGGERED and value & 0x700 == 0
        remote_irr = state.registers[lvt] & Lvt.REMOTE_IRR if keeps_remote_irr else 0
        state.registers[lvt] = value | remote_irr
        if lvt == Register.LVT_LINT0:
            self.sense_level()

    def _write_initial_count(self, value: int) -> None:
        self.state.timer.set_initial_count(self._clock.now(), value)

    def _write_divide_configuration(self, value: int) -> None:
        self.state.registers[Register.DIVIDE_CONFIGURATION] = value
        self.state.timer.set_divide(self._clock.now(), self.profile.timer_input_ticks * divisor(value))

    def _write_icr_low(self, value: int) -> None:
        registers = self.state.registers
        registers[Register.ICR_LOW] = value
        destination = registers[Register.ICR_HIGH]
        if not self.x2apic_mode:
            destination >>= 24
        self.send(value, destination if value & Icr.LOGICAL else self.physical_destination(destination))

    def physical_destination(self, identity: int) -> int:
        """Whom an APIC ID in a command names: FFH is `BROADCAST` in xAPIC mode."""
        return BROADCAST if identity == XAPIC_BROADCAST and not self.x2apic_mode else identity
