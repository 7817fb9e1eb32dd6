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

from vtx.board import Board, Socket
from vtx.boot import acpi, firmware
from vtx.boot.image import BootOptions, Module
from vtx.boot.loaders import load
from vtx.engine.unicorn_engine import UnicornEngine
from vtx.events import MachineStopped, Tracer
from vtx.vmx import Vmx
from vtx.vmx.tracing import VmxTracing
from vtx.x86.memory import PhysicalMemory
from vtx.x86.outcome import NotModelled
from vtx.x86.processor import Halt, LogicalProcessor
from vtx.x86.profile import DEFAULT_PROFILE, Profile, load_profile
from vtx.x86.tracing import ProcessorTracing

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
    writes to COM1, ``tracer`` every event. ``exit_counts`` counts VM exits by name. ``compiled=False`` keeps the
    engine from using its compiled helper (the results are the same).
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
        self.board = Board(
            self.memory,
            self,
            self.profile.tsc_frequency,
            cpus=1,
            serial=serial or (lambda data: None),
            exit_run=self._debug_exit,
            power_off=self._power_off,
            due_changed=self._due_changed,
        )
        self.uart = self.board.uart
        socket = Socket(self.board)

        def engine_factory(memory: PhysicalMemory, client: LogicalProcessor) -> UnicornEngine:
            return UnicornEngine(memory, client, allow_compiled=compiled)

        self.cpu = Cpu(self.memory, self.profile, socket, engine_factory)
        socket.insert(self.profile, 0, self.cpu, self.cpu, self.cpu.msrs)
        self.cpu.vmx = Vmx(self.cpu)
        self.cpu.virtualization = self.cpu.vmx
        self.tracer = tracer
        self.cpu.vmx.operation.observer = VmxTracing(self.cpu, self.exit_counts, tracer)
        if tracer is not None:
            self.cpu.tracing = ProcessorTracing(self.cpu, tracer)

    def now(self) -> int:
        """Virtual time: ticks of the time-stamp counter since power-up."""
        return self.cpu.now()

    def _due_changed(self) -> None:
        self.cpu.device_written()

    def _power_off(self) -> None:
        self.cpu.halt = Halt("the guest switched the machine off", shutdown=False)
        self.cpu.stop_requested = True

    def _debug_exit(self, value: int) -> None:
        self._exit_value = value
        self.cpu.stop_requested = True

    def load(self, image: bytes, *, command_line: str = "", modules: Sequence[Module] = ()) -> None:
        """Put a boot image into memory and the processor into the state its boot protocol asks for.

        Raises `vtx.boot.BootError` with one clear line for an image that cannot be booted here.
        """
        options = BootOptions(command_line=command_line, modules=tuple(modules))
        acpi.install(self.memory, 1)
        firmware.install(self.memory, self.board.port_write)
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
