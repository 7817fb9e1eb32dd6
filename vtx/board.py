"""The board of a PC: its devices, the ports and addresses they answer at, their interrupt lines and their time.

A `Socket` holds what belongs to one processor, its local APIC, and is the `Platform` the processor sees. Everything
else is on the `Board`, once.

Devices that act by themselves are asked for their next deadline only when it may have changed: after an access to one
of them or to an interrupt controller, and when time has reached the deadline. Until then it is one stored number. A
device whose interrupt every controller masks has no deadline; the access that unmasks it brings it up to date first.
Neither has one whose interrupt is requested already and waits for a processor: another request would change nothing.
So a processor that halts with interrupts off is seen to be halted for good, whatever timer runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from attrs import frozen

from vtx import pc_map
from vtx.addresses import PAGE_SHIFT
from vtx.devices import test_storage
from vtx.devices.acpi_pm import AcpiPm
from vtx.devices.apic_bus import InterruptBus
from vtx.devices.apic_core import ProcessorPins
from vtx.devices.apic_msrs import apic_profile, bind_local_apic
from vtx.devices.apic_registers import Register
from vtx.devices.apm_control import ApmControl
from vtx.devices.clock import Clock
from vtx.devices.debug_exit import DebugExit
from vtx.devices.fw_cfg import FwCfg, standard_items
from vtx.devices.hpet import Hpet
from vtx.devices.interrupt_lines import InterruptTestLines
from vtx.devices.interrupt_routing import Hearing, InterruptLines, LineSwitch
from vtx.devices.io_apic import PINS, IoApic
from vtx.devices.keyboard_controller import KeyboardController
from vtx.devices.local_apic import LocalApic
from vtx.devices.pci_config import PciConfig
from vtx.devices.performance_counters import (
    PerformanceCounters,
    Work,
    bind_performance_counters,
    freeze_on_interrupt,
)
from vtx.devices.pic import PicPair
from vtx.devices.pit import Pit8254, SystemControlPort
from vtx.devices.ports import PortDevice
from vtx.devices.post_port import PostPort
from vtx.devices.reset_ports import BootPort, ResetControlPort, SystemControlPortA
from vtx.devices.rtc import Rtc, memory_size_bytes
from vtx.devices.test_storage import TestMemory, TestPorts
from vtx.devices.uart import Uart16550
from vtx.x86.memory import HIGH_RAM_START, MmioDevice, PhysicalMemory
from vtx.x86.msrs import MsrFile
from vtx.x86.profile import Profile

WINDOW_SIZE: Final = 0x1000

_RESET_BY_THEMSELVES: Final = ("rtc", "acpi pm", "uart")


class Stateful(Protocol):
    """A device: all that the guest can change is in ``state``, one record of plain data."""

    state: Any


@frozen
class SavedDevices:
    """States of devices, as bytes of this process: unpacking them is the fastest way to independent copies."""

    _packed: bytes

    @classmethod
    def of(cls, states: Mapping[str, object]) -> SavedDevices:
        """Keep ``states``, by name, as they are now."""
        return cls(pickle.dumps(states, pickle.HIGHEST_PROTOCOL))

    def states(self) -> dict[str, Any]:
        """The states by name, new each time."""
        return dict(pickle.loads(self._packed))


@frozen
class PortEntry:
    """Who answers at one port: ``offset`` within ``device``, and which accesses may change what is due when."""

    device: PortDevice
    offset: int
    timed_reads: bool
    timed_writes: bool


class PowerControl(Protocol):
    """What the guest can ask of the machine as a whole."""

    def power_off(self) -> None:
        """Switch it off."""
        ...

    def init_processors(self) -> None:
        """Give every processor an INIT signal."""
        ...

    def reset(self) -> None:
        """Reset processors and devices, as soon as the running processor has completed its instruction."""
        ...

    def boot(self) -> None:
        """Boot the image (again), likewise."""
        ...


class Board:
    """The devices of a machine whose time-stamp counters run at ``tick_frequency`` Hz.

    ``serial`` receives what the guest writes to COM1, ``exit_run`` what it writes to the debug-exit port; ``power``
    does what it asks of the machine as a whole. ``due_changed`` is called when an access by the guest may have changed
    what is due when, so that the current run can be cut short; after port writes the processor looks by itself.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        clock: Clock,
        tick_frequency: int,
        *,
        cpus: int,
        serial: Callable[[bytes], None],
        exit_run: Callable[[int], None],
        power: PowerControl,
        due_changed: Callable[[], None],
    ) -> None:
        self.sockets: list[Socket] = []
        self.running: Socket
        self._memory = memory
        self._ports: dict[int, PortEntry] = {}
        self._clock = clock
        self.due_changed = due_changed
        self._deadline: int | None = None
        self._request_waits = False
        self._add_interrupt_controllers()
        self._add_timers(memory, tick_frequency, power)
        self._add_reset_ports(power)
        self.uart = Uart16550(serial, self.lines.driver(pc_map.COM1_IRQ))
        self._attach(pc_map.COM1_PORT, 8, self.uart)
        self._post = PostPort()
        self._fw_cfg = FwCfg(standard_items(memory.size, cpus))
        self._pci = PciConfig()
        self._attach(pc_map.POST_PORT, 1, self._post)
        self._attach(pc_map.DEBUG_EXIT_PORT, 4, DebugExit(exit_run))
        self._attach(pc_map.FW_CFG_PORT, 2, self._fw_cfg)
        self._attach(pc_map.PCI_CONFIG_PORT, 8, self._pci)
        self._attach(pc_map.RESET_CONTROL_PORT, 1, self._reset_control)
        self._attach(
            pc_map.TEST_LINES_PORT, PINS, InterruptTestLines([self.lines.driver(number) for number in range(PINS)])
        )
        self._test_ports, self._test_memory = TestPorts(), TestMemory()
        self._attach(pc_map.TEST_STORAGE_PORT, test_storage.PORTS, self._test_ports)
        memory.add_window(pc_map.TEST_MEMORY_ADDRESS, test_storage.MEMORY_SIZE, self._test_memory)
        memory.add_window(pc_map.IO_APIC_ADDRESS, WINDOW_SIZE, _TimedWindow(self, self.io_apic))
        memory.add_window(pc_map.HPET_ADDRESS, WINDOW_SIZE, _TimedWindow(self, self.hpet))
        memory.own_device = _LocalApicWindow(self)
        self._power_up = self.save()

    def _add_interrupt_controllers(self) -> None:
        self.bus = InterruptBus(self._requests_dropped)
        self.io_apic = IoApic(self.bus, identity=pc_map.IO_APIC_ID)
        self.bus.eoi_listeners.append(self.io_apic.end_of_interrupt)
        self.pic = PicPair(self._external_interrupt)
        self.lines = InterruptLines(self.pic, self.io_apic)
        self._attach(pc_map.PIC_MASTER_PORT, 2, self.pic.master, timed=True, timed_reads=True)
        self._attach(pc_map.PIC_SLAVE_PORT, 2, self.pic.slave, timed=True, timed_reads=True)
        self._attach(pc_map.PIC_EDGE_LEVEL_PORT, 2, self.pic.edge_level, timed=True)

    def _add_timers(self, memory: PhysicalMemory, frequency: int, power: PowerControl) -> None:
        clock, lines = self._clock, self.lines
        self._legacy_timers = LineSwitch(lines.driver(pc_map.TIMER_IRQ)), LineSwitch(lines.driver(pc_map.RTC_IRQ))
        self.pit = Pit8254(clock, frequency, self._legacy_timers[0].drive)
        low = memory.ram[0].size
        high = sum(ram.size for ram in memory.ram if ram.start >= HIGH_RAM_START)
        self.rtc = Rtc(clock, frequency, self._legacy_timers[1].drive, cmos=memory_size_bytes(low, high))
        self.hpet = Hpet(clock, frequency, [lines.driver(number) for number in range(PINS)], self._replace_legacy)
        self.acpi_pm = AcpiPm(clock, frequency, lines.driver(pc_map.SCI_IRQ), power.power_off)
        self._attach(pc_map.PIT_PORT, 4, self.pit, timed=True)
        self._system_control = SystemControlPort(self.pit)
        self._attach(pc_map.SYSTEM_CONTROL_PORT, 1, self._system_control)
        self._attach(pc_map.RTC_PORT, 2, self.rtc, timed=True, timed_reads=True)
        self._attach(pc_map.ACPI_PM_PORT, 12, self.acpi_pm, timed=True)

    def _add_reset_ports(self, power: PowerControl) -> None:
        keyboard, mouse = self.lines.driver(pc_map.KEYBOARD_IRQ), self.lines.driver(pc_map.MOUSE_IRQ)
        self._keyboard = KeyboardController(power.init_processors, keyboard, mouse)
        self._port_a = SystemControlPortA(power.init_processors)
        self._apm = ApmControl(self._interrupt_running)
        self._attach(pc_map.APM_PORT, 2, self._apm)
        self._reset_control = ResetControlPort(power.init_processors, power.reset)
        for port in (pc_map.KEYBOARD_DATA_PORT, pc_map.KEYBOARD_COMMAND_PORT):
            offset = port - pc_map.KEYBOARD_DATA_PORT
            self._ports[port] = PortEntry(self._keyboard, offset, timed_reads=False, timed_writes=True)
        self._attach(pc_map.SYSTEM_CONTROL_PORT_A, 1, self._port_a)
        self._attach(pc_map.BOOT_PORT, 1, BootPort(power.boot))

    def _interrupt_running(self) -> None:
        self.running.pins.smi()

    def _attach(
        self, first: int, count: int, device: PortDevice, *, timed: bool = False, timed_reads: bool = False
    ) -> None:
        for offset in range(count):
            self._ports[first + offset] = PortEntry(device, offset, timed_reads, timed)

    def port_read(self, port: int, size: int) -> int:
        """Value of ``size`` bytes at an I/O port; ones where nothing answers."""
        entry = self._ports.get(port)
        if entry is None:
            return (1 << 8 * size) - 1
        if entry.timed_reads:
            return self._timed_read(entry.device.port_read, entry.offset, size)
        return entry.device.port_read(entry.offset, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """Store ``size`` bytes at an I/O port."""
        entry = self._ports.get(port)
        if entry is None:
            return
        if entry.timed_writes:
            self.timed_write(entry.device.port_write, entry.offset, size, value)
        else:
            entry.device.port_write(entry.offset, size, value)

    def select(self, socket: Socket) -> None:
        """The processor in ``socket`` runs from now on, and sees its local APIC where it has put it."""
        self.running = socket
        self.local_apic_moved()

    def local_apic_moved(self) -> None:
        """The running processor may have put its local APIC elsewhere."""
        address = self.running.apic.page_address
        self._memory.own_page = None if address is None else address >> PAGE_SHIFT

    def port_device(self, port: int) -> str:
        """Name of the device at an I/O port, ``none`` where nothing answers."""
        entry = self._ports.get(port)
        return "none" if entry is None else type(entry.device).__name__

    def _timed_read(self, read: Callable[[int, int], int], offset: int, size: int) -> int:
        """A read that may change what is due when, as one that acknowledges an interrupt does."""
        before = self._deadline
        self._bring_up_to_date()
        value = read(offset, size)
        self._plan()
        if self._deadline != before:
            self.due_changed()
        return value

    def timed_write(self, write: Callable[[int, int, int], None], offset: int, size: int, value: int) -> None:
        """A write that may change what is due when."""
        self._bring_up_to_date()
        write(offset, size, value)
        self._plan()

    # Snapshots.

    def states(self) -> dict[str, object]:
        """The state of every device by name, as the devices use them at this moment."""
        return {name: part.state for name, part in self._parts().items()}

    def save(self) -> SavedDevices:
        """The state of every device: later accesses do not change what is saved."""
        return SavedDevices.of(self.states())

    def restore(self, saved: SavedDevices) -> None:
        """Put the devices back to what `save` of a board built alike returned."""
        states = saved.states()
        for name, part in self._parts().items():
            part.state = states[name]
        self._plan()

    def reset(self) -> None:
        """Put the devices into their power-up states.

        Each socket's local APIC is reset with its processor. Some devices keep something: the clock its time, the power
        management timer its count, the serial port the input that waits.
        """
        for device in (self.rtc, self.acpi_pm, self.uart):
            device.reset()
        self._external_interrupt(False)
        power_up = self._power_up.states()
        for name, part in self._parts().items():
            if name in power_up and name not in _RESET_BY_THEMSELVES:
                part.state = power_up[name]
        self._plan()

    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {
            "pic master": self.pic.master,
            "pic slave": self.pic.slave,
            "io apic": self.io_apic,
            "lines": self.lines,
            "pit": self.pit,
            "system control": self._system_control,
            "rtc": self.rtc,
            "hpet": self.hpet,
            "acpi pm": self.acpi_pm,
            "uart": self.uart,
            "post": self._post,
            "fw_cfg": self._fw_cfg,
            "pci": self._pci,
            "keyboard": self._keyboard,
            "port a": self._port_a,
            "apm": self._apm,
            "reset control": self._reset_control,
            "test ports": self._test_ports,
            "test memory": self._test_memory,
        }
        parts |= {f"pit channel {number}": channel for number, channel in enumerate(self.pit.channels)}
        parts |= {f"legacy timer {number}": switch for number, switch in enumerate(self._legacy_timers)}
        parts |= {f"local apic {number}": socket.apic for number, socket in enumerate(self.sockets)}
        for number, socket in enumerate(self.sockets):
            if socket.counters is not None:
                parts[f"performance counters {number}"] = socket.counters
        return parts

    # Time.

    def next_deadline(self) -> int | None:
        """The tick at which a device next interrupts by itself, or None; a stored number."""
        return self._deadline

    def advance(self, now: int) -> None:
        """Let devices do what is due at tick ``now``."""
        if self._deadline is not None and self._deadline <= now:
            self._bring_up_to_date()
            self._plan()

    def _bring_up_to_date(self) -> None:
        now = self._clock.now()
        self.pit.advance(now)
        self.rtc.advance(now)
        self.hpet.advance(now)
        self.acpi_pm.advance(now)

    def _plan(self) -> None:
        """Find the next deadline of a device whose interrupt would get through."""
        self._request_waits = False
        is_heard = self._is_heard
        deadlines = [self.hpet.next_deadline(is_heard)]
        if not self.hpet.replaces_legacy:
            if is_heard(pc_map.TIMER_IRQ):
                deadlines.append(self.pit.next_deadline())
            if is_heard(pc_map.RTC_IRQ):
                deadlines.append(self.rtc.next_deadline())
        if is_heard(pc_map.SCI_IRQ):
            deadlines.append(self.acpi_pm.next_deadline())
        self._deadline = min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _is_heard(self, line: int) -> bool:
        hearing = self.lines.hearing(line)
        self._request_waits |= hearing is Hearing.WAITING
        return hearing is Hearing.OPEN

    # Interrupts.

    def acknowledge(self, acknowledge: Callable[[], int]) -> int:
        """Run an interrupt-acknowledge cycle: a line whose request it takes is heard again."""
        if not self._request_waits:
            return acknowledge()
        self._bring_up_to_date()
        vector = acknowledge()
        self._plan()
        return vector

    def _requests_dropped(self) -> None:
        if self._request_waits:
            self._bring_up_to_date()
            self._plan()

    def _external_interrupt(self, level: bool) -> None:
        """The output of the 8259 pair: LINT0 of every processor, and the first input of the I/O APIC."""
        for socket in self.sockets:
            socket.apic.set_local_pin(0, level)
        self.io_apic.set_pin(0, level)

    def _replace_legacy(self, replaced: bool) -> None:
        for switch in self._legacy_timers:
            switch.close(not replaced)


class Socket:
    """One processor's place on the board: its local APIC, and the board as it sees it (`Platform`)."""

    apic: LocalApic
    pins: ProcessorPins
    counters: PerformanceCounters | None = None

    def __init__(self, board: Board) -> None:
        self.board = board

    def insert(self, profile: Profile, index: int, work: Work, pins: ProcessorPins, msrs: MsrFile) -> None:
        """Give the processor ``index`` its local APIC and performance counters; processor 0 is the bootstrap one."""
        self.pins = pins
        self.apic = LocalApic(apic_profile(profile, index, bootstrap=index == 0), work, self.board.bus, pins)
        bind_local_apic(msrs, self.apic)
        if profile.performance is not None:
            self.counters = PerformanceCounters(profile.performance, work, lambda: self._counter_overflowed(msrs))
            bind_performance_counters(msrs, self.counters)
        self.board.bus.attach(self.apic)
        self.board.sockets.append(self)
        if index == 0:
            self.apic.set_virtual_wire_mode()
            self.board.select(self)

    def reset(self) -> None:
        """Power-up and RESET of what belongs to the processor."""
        self.apic.reset()
        if self.counters is not None:
            self.counters.reset()

    def _counter_overflowed(self, msrs: MsrFile) -> None:
        assert self.counters is not None
        freeze_on_interrupt(msrs, self.counters)
        self.apic.signal(Register.LVT_PERFORMANCE)

    def port_read(self, port: int, size: int) -> int:
        """Value of ``size`` bytes at an I/O port."""
        return self.board.port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """Store ``size`` bytes at an I/O port."""
        self.board.port_write(port, size, value)

    def port_device(self, port: int) -> str:
        """Name of the device at an I/O port."""
        return self.board.port_device(port)

    def interrupt_pending(self) -> bool:
        """Whether an interrupt controller requests service for a vector above the task priority."""
        return self.apic.pending_vector() is not None or self._external()

    def _external(self) -> bool:
        return self.board.pic.pending() and (not self.apic.enabled or self.apic.external_interrupt_pending())

    def acknowledge_interrupt(self) -> int:
        """Run an interrupt-acknowledge cycle; the vector to deliver."""
        return self.board.acknowledge(self._acknowledge)

    def end_of_interrupt(self) -> None:
        """Dismiss the interrupt in service from the local APIC."""
        self.apic.end_of_interrupt()

    def _acknowledge(self) -> int:
        if self._external():
            self.apic.external_interrupt_acknowledged()
            return self.board.pic.acknowledge()
        return self.apic.acknowledge()

    def next_deadline(self) -> int | None:
        """The tick at which the local APIC, a counter or a device of the board next acts by itself, or None."""
        mine, others = self.apic.next_deadline(), self.board.next_deadline()
        if self.counters is not None and (counted := self.counters.deadline) is not None:
            others = counted if others is None else min(counted, others)
        if mine is None or others is None:
            return others if mine is None else mine
        return min(mine, others)

    def advance(self, now: int) -> None:
        """Let devices do what is due at tick ``now``."""
        self.apic.advance(now)
        self.board.advance(now)
        if self.counters is not None:
            self.counters.advance(now)

    @property
    def apic_enabled(self) -> bool:
        """IA32_APIC_BASE.EN."""
        return self.apic.enabled

    @property
    def task_priority(self) -> int:
        """CR8."""
        return self.apic.cr8

    @task_priority.setter
    def task_priority(self, value: int) -> None:
        self.apic.cr8 = value


class _TimedWindow:
    """Memory-mapped registers of ``device``, to which writes may change what is due when."""

    def __init__(self, board: Board, device: MmioDevice) -> None:
        self._board = board
        self._device = device

    def mmio_read(self, offset: int, size: int) -> int:
        return self._device.mmio_read(offset, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self._board.timed_write(self._device.mmio_write, offset, size, value)
        self._board.due_changed()


class _LocalApicWindow:
    """The page at which a processor finds its own local APIC."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def mmio_read(self, offset: int, size: int) -> int:
        return self._board.running.apic.mmio_read(offset, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self._board.running.apic.mmio_write(offset, size, value)
        self._board.due_changed()
