"""The machine: RAM, one processor with its virtualization extension, devices, and the run loop.

This is the Python API: build a `Machine`, `load` an image, `run` it; or drive VMX directly through ``machine.cpu.vmx``
without any guest code.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vtx.board import Board, Socket
from vtx.boot import acpi, firmware
from vtx.boot.image import BootOptions, Module
from vtx.boot.loaders import load
from vtx.cpu import Cpu
from vtx.engine.coherence import Coherence
from vtx.engine.unicorn_engine import UnicornEngine
from vtx.events import MachineStopped, Tracer
from vtx.power import Power
from vtx.scheduler import Scheduler
from vtx.x86.memory import PhysicalMemory
from vtx.x86.memory_image import RamHistory
from vtx.x86.outcome import NotModelled
from vtx.x86.processor import LogicalProcessor
from vtx.x86.profile import DEFAULT_PROFILE, Profile, load_profile
from vtx.x86.tracing import ProcessorTracing

if TYPE_CHECKING:
    from vtx.snapshot.model import Snapshot
    from vtx.vmx.explanations import Explain

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


class Machine:
    """A PC with ``cpus`` processors, of which the first boots.

    ``profile`` names a CPU profile or is one; ``memory`` is the RAM size in bytes. ``serial`` receives what the guest
    writes to COM1, ``tracer`` every event, ``explain`` what is wrong when a VM entry or a VMX instruction fails or an
    EPT entry is misconfigured. ``exit_counts`` counts VM exits by name. ``compiled=False`` keeps the
    engine from using its compiled helper (the results are the same). RDRAND and RDSEED follow from ``seed`` (64 bits).
    """

    def __init__(
        self,
        *,
        profile: str | Profile = DEFAULT_PROFILE,
        memory: int = DEFAULT_MEMORY,
        cpus: int = 1,
        serial: Callable[[bytes], None] | None = None,
        tracer: Tracer | None = None,
        explain: Explain | None = None,
        compiled: bool = True,
        seed: int = 0,
    ) -> None:
        self.profile = load_profile(profile) if isinstance(profile, str) else profile
        self.memory = PhysicalMemory(memory, firmware.rom())
        self.exit_counts: Counter[str] = Counter()
        self.exit_value: int | None = None
        self._interrupted = False
        self.image: tuple[bytes, BootOptions] | None = None
        self.power = Power(self)
        self.board = Board(
            self.memory,
            self,
            self.profile.tsc_frequency,
            cpus=cpus,
            serial=serial or (lambda data: None),
            exit_run=self._debug_exit,
            power=self.power,
            due_changed=self.due_changed,
        )
        self.uart = self.board.uart
        self.tracer = tracer
        self._explain = explain
        self._compiled = compiled
        self._seed = seed
        self._coherence = Coherence(self.memory.dirty)
        self.history = RamHistory(self.memory, self._coherence.withdraw_writes)
        self._latest = 0
        self.cpus = [self._add_cpu(index, cpus) for index in range(cpus)]
        self.cpu = self.cpus[0]
        self.scheduler = Scheduler(self.cpus, self._switch)

    def _add_cpu(self, index: int, count: int) -> Cpu:
        socket = Socket(self.board)

        def engine_factory(memory: PhysicalMemory, client: LogicalProcessor) -> UnicornEngine:
            return UnicornEngine(memory, client, coherence=self._coherence, allow_compiled=self._compiled)

        cpu = Cpu(
            self.memory,
            self.profile,
            socket,
            engine_factory,
            index=index,
            count=count,
            seed=_seed_of(self._seed, index),
        )
        if not index:
            self.running = cpu
        cpu.attach(self, socket)
        if self.profile.is_amd:
            from vtx.svm.tracing import SvmTracing  # noqa: PLC0415 - see `Cpu.attach`

            cpu.svm.operation.observer = SvmTracing(cpu, self.exit_counts, self.tracer)
        else:
            from vtx.vmx.tracing import VmxTracing  # noqa: PLC0415

            cpu.vmx.operation.observer = VmxTracing(cpu, self.exit_counts, self.tracer, self._explain)
        if self.tracer is not None:
            cpu.tracing = ProcessorTracing(cpu, self.tracer)
        return cpu

    def now(self) -> int:
        """Virtual time: ticks of the time-stamp counter since power-up, as far as any processor has come."""
        self._latest = max(self._latest, self.running.now())
        return self._latest

    def _switch(self, index: int) -> None:
        self.running = self.cpus[index]
        self.board.select(self.running.socket)

    def due_changed(self) -> None:
        """The running processor did something to a device that its run was not planned for."""
        self.running.device_written()

    def _debug_exit(self, value: int) -> None:
        self.exit_value = value
        self.running.stop_requested = True

    def load(
        self, image: bytes, *, name: str = "image", command_line: str = "", modules: Sequence[Module] = ()
    ) -> None:
        """Put a boot image into memory and the processor into the state its boot protocol asks for.

        ``name`` and ``command_line`` are what the image is told: its command line is the one, then the other.
        Raises `vtx.boot.BootError` with one clear line for an image that cannot be booted here.
        """
        self.image = image, BootOptions(name=name, command_line=command_line, modules=tuple(modules))
        self.boot()

    def boot(self) -> None:
        """Do what firmware does before it starts the ``image``, and put that into memory (again)."""
        assert self.image is not None
        image, options = self.image
        acpi.install(self.memory, len(self.cpus))
        firmware.install(self.memory, self.board.port_write)
        self.cpu.socket.apic.set_virtual_wire_mode()
        self.cpu.clear_registers()
        load(image, self.memory, options, self.cpu.state)
        self.cpu.load_control_state()

    def close(self) -> None:
        """Release what the processors' engines hold of the host's memory; the machine cannot be run afterwards.

        A machine that nobody has is closed as well. ``with Machine() as machine:`` closes it at the end.
        """
        for cpu in self.cpus:
            cpu.engine.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def snapshot(self) -> Snapshot:
        """The whole machine as it is, between two runs: for `restore`, here or in a machine built alike.

        Copies the pages of RAM written since the last snapshot or `restore`.
        """
        from vtx.snapshot.model import capture  # noqa: PLC0415 - few runs need it, and all would wait for it

        return capture(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to ``snapshot``; what follows is the same as what followed it.

        Copies the pages of RAM that differ. What the guest wrote to the serial port stays written. Raises
        `vtx.snapshot.SnapshotError` if the snapshot is of a machine of another configuration.
        """
        from vtx.snapshot.model import restore  # noqa: PLC0415

        restore(self, snapshot)

    def set_time(self, running: int, latest: int) -> None:
        """The processor ``running`` ran last, and the machine has come to tick ``latest``."""
        self._latest = latest
        self._switch(running)

    def feed(self, data: bytes) -> None:
        """Give the guest serial input."""
        self.uart.feed(data)

    def interrupt(self) -> None:
        """Make `run` return soon with `StopReason.INTERRUPTED`; may be called from another thread."""
        self._interrupted = True
        for cpu in self.cpus:
            cpu.stop_requested = True
            cpu.engine.request_stop()

    def run(self, *, max_instructions: int | None = None) -> RunResult:
        """Run until the guest ends the run, something ends it for good, or ``max_instructions`` (from power-up).

        With several processors the limit applies to each of them.
        """
        for cpu in self.cpus:
            cpu.limit_instructions(max_instructions)
        try:
            self._run_processors()
            while self.power.act():
                self._run_processors()
        except NotModelled as missing:
            return self._result(StopReason.NOT_MODELLED, str(missing))
        if self.exit_value is not None:
            return self._result(StopReason.DEBUG_EXIT, f"the guest ended the run with {self.exit_value:#x}")
        if self._interrupted:
            self._interrupted = False
            for cpu in self.cpus:
                cpu.stop_requested = False
            return self._result(StopReason.INTERRUPTED, "interrupted")
        for cpu in self.cpus:
            if cpu.halt is not None:
                reason = StopReason.SHUTDOWN if cpu.halt.shutdown else StopReason.HALTED
                return self._result(reason, cpu.halt.reason)
        if any(cpu.at_instruction_limit for cpu in self.cpus):
            return self._result(StopReason.INSTRUCTION_LIMIT, f"instruction limit of {max_instructions} reached")
        return self._result(StopReason.HALTED, "all processors are halted with nothing to wake them")

    def _run_processors(self) -> None:
        if len(self.cpus) == 1:
            self.cpu.run()
        else:
            self.scheduler.run()

    def _result(self, reason: StopReason, message: str) -> RunResult:
        result = RunResult(reason, self.exit_value, message, sum(cpu.instructions for cpu in self.cpus), self.now())
        if self.tracer is not None:
            stopped = MachineStopped(0, result.ticks, reason.value, message, result.instructions, result.exit_value)
            self.tracer.emit(stopped)
        return result


def _seed_of(seed: int, index: int) -> int:
    """The seed of processor ``index``: far from the others', and the machine's own for the first."""
    return seed ^ index << 56
