"""The machine: RAM, one processor with its virtualization extension, devices, and the run loop.

This is the Python API: build a `Machine`, `load` an image, `run` it; or drive VMX directly through ``machine.cpu.vmx``
without any guest code.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from attrs import frozen

from vtx.boot.image import BootOptions, Module
from vtx.boot.loaders import load
from vtx.devices.apic_bus import InterruptBus
from vtx.devices.apic_core import DEFAULT_BASE, ApicProfile
from vtx.devices.debug_exit import DebugExit
from vtx.devices.fw_cfg import FwCfg, standard_items
from vtx.devices.local_apic import LocalApic
from vtx.devices.pic import PicPair
from vtx.devices.ports import PortDevice
from vtx.devices.uart import Uart16550
from vtx.engine.unicorn_engine import UnicornEngine
from vtx.events import MachineStopped, Tracer
from vtx.vmx import Vmx
from vtx.vmx.tracing import VmxTracing
from vtx.x86.memory import PhysicalMemory
from vtx.x86.msr_table import IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC_MSRS
from vtx.x86.outcome import NotModelled
from vtx.x86.processor import LogicalProcessor
from vtx.x86.tracing import ProcessorTracing
from vtx.x86.profile import DEFAULT_PROFILE, Profile, load_profile

DEFAULT_MEMORY: Final = 128 << 20


class StopReason(enum.Enum):
    """Why `Machine.run` returned."""

    DEBUG_EXIT = "debug exit"
    SHUTDOWN = "shutdown"
    HALTED = "halted"
    INSTRUCTION_LIMIT = "instruction limit"
    INTERRUPTED = "interrupted"
    NOT_MODELLED = "not modelled"


@frozen
class RunResult:
    """How a run ended.

    ``exit_value`` is what the guest wrote to the debug-exit port, None for other reasons. ``message`` says in one line
    why the run ended. ``instructions`` and ``ticks`` (of the time-stamp counter) count from power-up.
    """

    reason: StopReason
    exit_value: int | None
    message: str
    instructions: int
    ticks: int


class _Board:
    """Ports, interrupt controllers and time, as the processor sees them (`Platform`)."""

    def __init__(self) -> None:
        self.ports: dict[int, tuple[PortDevice, int]] = {}
        self.apic: LocalApic
        self.pic: PicPair

    def attach(self, first: int, count: int, device: PortDevice) -> None:
        for port in range(first, first + count):
            self.ports[port] = (device, port - first)

    def port_read(self, port: int, size: int) -> int:
        entry = self.ports.get(port)
        if entry is None:
            return (1 << 8 * size) - 1
        return entry[0].port_read(entry[1], size)

    def port_write(self, port: int, size: int, value: int) -> None:
        entry = self.ports.get(port)
        if entry is not None:
            entry[0].port_write(entry[1], size, value)

    def port_device(self, port: int) -> str:
        entry = self.ports.get(port)
        return "none" if entry is None else type(entry[0]).__name__

    def interrupt_pending(self) -> bool:
        return self.apic.pending_vector() is not None or self._external()

    def _external(self) -> bool:
        return self.pic.pending() and (not self.apic.enabled or self.apic.external_interrupt_pending())

    def acknowledge_interrupt(self) -> int:
        if self._external():
            self.apic.external_interrupt_acknowledged()
            return self.pic.acknowledge()
        return self.apic.acknowledge()

    def next_deadline(self) -> int | None:
        return self.apic.next_deadline()

    def advance(self, now: int) -> None:
        self.apic.advance(now)

    @property
    def apic_enabled(self) -> bool:
        return self.apic.enabled

    @property
    def task_priority(self) -> int:
        return self.apic.cr8

    @task_priority.setter
    def task_priority(self, value: int) -> None:
        self.apic.cr8 = value


class _ApicWindow:
    """The page at which the local APIC's registers appear, from before there is one."""

    def __init__(self, board: _Board, written: Callable[[], None]) -> None:
        self._board = board
        self._written = written

    def mmio_read(self, offset: int, size: int) -> int:
        return self._board.apic.mmio_read(offset, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self._board.apic.mmio_write(offset, size, value)
        self._written()


class Cpu(LogicalProcessor):
    """The machine's processor; ``vmx`` is its virtualization extension."""

    vmx: Vmx

    def smi(self) -> None:
        """A system-management interrupt."""
        raise NotModelled("system-management mode")

    def init(self) -> None:
        """An INIT signal."""
        raise NotModelled("INIT signal")

    def start_up(self, vector: int) -> None:
        """A start-up IPI; a running processor ignores it (SDM Vol. 3, "MP Initialization Protocol")."""


class Machine:
    """A PC with one processor.

    ``profile`` names a CPU profile or is one; ``memory`` is the RAM size in bytes. ``serial`` receives what the guest
    writes to COM1, ``tracer`` every event. ``exit_counts`` counts VM exits by name. ``compiled=False`` keeps the engine from using its compiled helper (the results are the same).
    """

    def __init__(
        self,
        *,
        profile: str | Profile = DEFAULT_PROFILE,
        memory: int = DEFAULT_MEMORY,
        serial: Callable[[bytes], None] | None = None,
        tracer: Tracer | None = None,
        compiled: bool = True,
    ) -> None:
        self.profile = load_profile(profile) if isinstance(profile, str) else profile
        self.memory = PhysicalMemory(memory)
        self.exit_counts: Counter[str] = Counter()
        self._exit_value: int | None = None
        self._interrupted = False
        self._board = board = _Board()
        self.memory.add_window(DEFAULT_BASE, 0x1000, _ApicWindow(board, self._device_written))

        def engine_factory(memory: PhysicalMemory, client: LogicalProcessor) -> UnicornEngine:
            return UnicornEngine(memory, client, allow_compiled=compiled)

        self.cpu = Cpu(self.memory, self.profile, board, engine_factory)
        self._add_devices(serial or (lambda data: None))
        self.cpu.vmx = Vmx(self.cpu)
        self.cpu.virtualization = self.cpu.vmx
        self.tracer = tracer
        self.cpu.vmx.operation.observer = VmxTracing(self.cpu, self.exit_counts, tracer)
        if tracer is not None:
            self.cpu.tracing = ProcessorTracing(self.cpu, tracer)

    def _add_devices(self, serial: Callable[[bytes], None]) -> None:
        board, cpu = self._board, self.cpu
        bus = InterruptBus()
        profile = ApicProfile(
            x2apic=self.profile.has("x2APIC"),
            tsc_deadline=self.profile.has("TSC-Deadline"),
            max_physical_address=self.profile.physical_address_width,
        )
        board.apic = LocalApic(profile, cpu, bus, cpu)
        board.apic.set_virtual_wire_mode()
        bus.attach(board.apic)
        board.pic = PicPair(lambda level: board.apic.set_local_pin(0, level))
        self.uart = Uart16550(serial, board.pic.line(4))
        board.attach(0x20, 2, board.pic.master)
        board.attach(0xA0, 2, board.pic.slave)
        board.attach(0x4D0, 2, board.pic.edge_level)
        board.attach(0x3F8, 8, self.uart)
        board.attach(0xF4, 4, DebugExit(self._debug_exit))
        board.attach(0x510, 2, FwCfg(standard_items(self.memory.size, 1)))
        msrs, apic = cpu.msrs, board.apic

        def write_deadline(index: int, value: int) -> bool:
            apic.tsc_deadline = value
            return True

        msrs.bind(X2APIC_MSRS, apic.msr_read, apic.msr_write)
        msrs.bind(IA32_APIC_BASE, lambda index: apic.state.apic_base, lambda index, value: apic.apic_base_write(value))
        msrs.bind(IA32_TSC_DEADLINE, lambda index: apic.tsc_deadline, write_deadline)

    def _device_written(self) -> None:
        self.cpu.device_written()

    def _debug_exit(self, value: int) -> None:
        self._exit_value = value
        self.cpu.stop_requested = True

    def load(self, image: bytes, *, command_line: str = "", modules: Sequence[Module] = ()) -> None:
        """Put a boot image into memory and the processor into the state its boot protocol asks for.

        Raises `vtx.boot.BootError` with one clear line for an image that cannot be booted here.
        """
        options = BootOptions(command_line=command_line, modules=tuple(modules))
        load(image, self.memory, options, self.cpu.state)
        self.cpu.load_control_state()

    def feed(self, data: bytes) -> None:
        """Give the guest serial input."""
        self.uart.feed(data)

    def interrupt(self) -> None:
        """Make `run` return soon with `StopReason.INTERRUPTED`; may be called from another thread."""
        self._interrupted = True
        self.cpu.stop_requested = True
        self.cpu.engine.request_stop()

    def run(self, *, max_instructions: int | None = None) -> RunResult:
        """Run until the guest ends the run, something ends it for good, or ``max_instructions`` (from power-up)."""
        cpu = self.cpu
        cpu.instruction_limit = max_instructions
        try:
            cpu.run()
        except NotModelled as missing:
            return self._result(StopReason.NOT_MODELLED, str(missing))
        if self._exit_value is not None:
            return self._result(StopReason.DEBUG_EXIT, f"the guest ended the run with {self._exit_value:#x}")
        if self._interrupted:
            self._interrupted = cpu.stop_requested = False
            return self._result(StopReason.INTERRUPTED, "interrupted")
        if cpu.halt is not None:
            reason = StopReason.SHUTDOWN if cpu.halt.shutdown else StopReason.HALTED
            return self._result(reason, cpu.halt.reason)
        return self._result(StopReason.INSTRUCTION_LIMIT, f"instruction limit of {max_instructions} reached")

    def _result(self, reason: StopReason, message: str) -> RunResult:
        result = RunResult(reason, self._exit_value, message, self.cpu.instructions, self.cpu.now())
        if self.tracer is not None:
            stopped = MachineStopped(0, result.ticks, reason.value, message, result.instructions, result.exit_value)
            self.tracer.emit(stopped)
        return result
