"""What is measured, against which target, and how."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from attrs import field, frozen

from vtx.bench import programs as p
from vtx.bench.emulators import OTHERS, VTX, Emulator, Unavailable

_PATIENCE_SECONDS: Final = 120.0
_COMPUTE_PASSES: Final = 4_000_000
_TRAPS: Final = 20_000
_EXITS: Final = 4_000
_STATES: Final = 20_000
_RUNS: Final = 3
_START_RUNS: Final = 5
_PROCESSORS: Final = 8
_SHARED_PASSES: Final = 2_000_000
_SHARED_RUNS: Final = 2
_TOUCHED_MIB: Final = 64
_PAGES_PER_MIB: Final = 256


@frozen
class Target:
    """What a figure must reach: at least or at most ``value``."""

    value: float
    at_least: bool = False

    def met(self, figure: float) -> bool:
        """Whether ``figure`` reaches it."""
        return figure >= self.value if self.at_least else figure <= self.value


@frozen
class Measurement:
    """One figure of vtx in ``unit``, the same of other emulators, and vtx over Bochs if ``ratio`` is a target.

    ``others`` has a figure, or the reason why there is none. ``target`` holds for ``figure``, or for the ratio to the
    emulator ``compared_with`` if that is given.
    """

    name: str
    unit: str
    figure: float
    target: Target | None = None
    compared_with: str | None = None
    others: Mapping[str, float | str] = field(factory=dict)

    def ratio(self, other: str) -> float | None:
        """This figure over that of ``other``; None if there is none."""
        figure = self.others.get(other)
        return self.figure / figure if isinstance(figure, float) else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none, or nothing to compare with."""
        figure = self.figure if self.compared_with is None else self.ratio(self.compared_with)
        return None if self.target is None or figure is None else self.target.met(figure)


def measurements() -> Iterator[Measurement]:
    """All of them, one after the other; each takes up to some seconds."""
    yield compute()
    yield from start_to_exit()
    yield trap_and_skip()
    yield exit_and_entry()
    yield rule_evaluation()
    yield from snapshot_restore()
    yield several_processors()
    yield resident_memory()


def compute() -> Measurement:
    """Loads, stores and calls, in millions of instructions per second of processor time."""
    sector = p.boot_sector(p.COMPUTE, _COMPUTE_PASSES)
    instructions = p.COMPUTE.per_pass * _COMPUTE_PASSES

    def speed(emulator: Emulator) -> float:
        return instructions / emulator.measure(sector, _PATIENCE_SECONDS) / 1e6

    return Measurement(
        "compute: loads, stores, calls",
        "MIPS",
        speed(VTX),
        Target(3.0, at_least=True),
        compared_with="Bochs",
        others={other.name: _figure_or_reason(lambda other=other: speed(other)) for other in OTHERS},  # type: ignore[misc]
    )


def _figure_or_reason(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except Unavailable as reason:
        return str(reason)


def trap_and_skip() -> Measurement:
    """One instruction that the model executes (WBINVD), without the loop around it, in processor time."""

    def pass_time(body: p.Body, count: int) -> float:
        sector = p.boot_sector(body, count)
        return min(VTX.measure(sector, _PATIENCE_SECONDS) for _ in range(_RUNS)) / count

    cost = pass_time(p.TRAP, _TRAPS) - pass_time(p.LOOP, 10 * _TRAPS)
    return Measurement("trap and skip", "us", cost * 1e6, Target(5.0))


def exit_and_entry() -> Measurement:
    """VM exit of CPUID, three VMREADs and a VMWRITE of the host, VM entry; in processor time per round trip.

    Of each run the best of some: what else the machine does can only add to it.
    """
    from vtx.bench.hypervisor import install  # noqa: PLC0415 - the machine, for this one alone
    from vtx.machine import Machine  # noqa: PLC0415

    def run_time(exits: int) -> float:
        machine = Machine()
        install(machine, exits=exits)
        start = time.process_time()
        result = machine.run()
        if result.exit_value != 0:
            raise Unavailable(result.message)
        return time.process_time() - start

    def best(exits: int) -> float:
        return min(run_time(exits) for _ in range(_RUNS))

    # The difference leaves out what happens once: VMLAUNCH with all its rules, translation of the code.
    cost = (best(_EXITS) - best(_EXITS // 10)) / (_EXITS - _EXITS // 10)
    return Measurement("VM exit and VM entry, CPUID loop", "us", cost * 1e6, Target(100.0))


def rule_evaluation() -> Measurement:
    """VMCSs near a valid one, judged by the rules of VM entry; in thousands per second of processor time."""
    from vtx.bench.rules import states_per_second  # noqa: PLC0415 - the rules, for this one alone

    speed = states_per_second(_STATES) / 1000
    return Measurement("VMCS states judged", "k/s", speed, Target(20.0, at_least=True))


def snapshot_restore() -> tuple[Measurement, Measurement]:
    """Going back to a snapshot in the middle of a guest: all but RAM, and each page written since."""
    from vtx.bench.snapshots import restore_times  # noqa: PLC0415 - the machine, for this one alone

    restore, page = restore_times()
    return (
        Measurement("snapshot restore", "us", restore * 1e6, Target(1000.0)),
        Measurement("snapshot restore, per written page", "us", page * 1e6, Target(1.0)),
    )


def several_processors() -> Measurement:
    """A machine of 8 processors that all compute, over 8 machines of one: what taking turns costs."""
    from vtx.bench.processors import compute_time  # noqa: PLC0415 - the machine, for this one alone

    def best(processors: int) -> float:
        return min(compute_time(processors, _SHARED_PASSES) for _ in range(_SHARED_RUNS))

    ratio = best(_PROCESSORS) / (_PROCESSORS * best(1))
    return Measurement(f"{_PROCESSORS} processors, over {_PROCESSORS} times one", "x", ratio, Target(1.25))


def start_to_exit() -> tuple[Measurement, Measurement]:
    """``vtx run hello`` as a process, interpreter included: the best of some runs, in wall and in processor time."""
    runs = [_run("hello") for _ in range(_START_RUNS)]
    return (
        Measurement("hello, start to exit", "s", min(run.wall for run in runs), Target(0.4)),
        Measurement("hello, processor time", "s", min(run.processor for run in runs)),
    )


def resident_memory() -> Measurement:
    """Peak resident memory of a process whose guest touches 64 MiB, without those."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "touch.img")
        image.write_bytes(p.boot_sector(p.TOUCH, _TOUCHED_MIB * _PAGES_PER_MIB))
        peak = _run(str(image)).peak_mib
    return Measurement("memory beyond the guest's", "MB", (peak - _TOUCHED_MIB) * 1.048576, Target(150.0))


@frozen
class _Process:
    """``wall`` and ``processor`` time in seconds, ``peak_mib`` of resident memory."""

    wall: float
    processor: float
    peak_mib: float


def _run(image: str) -> _Process:
    start = time.perf_counter()
    command = [sys.executable, "-m", "vtx.cli", "run", image]
    # As installed, with byte code that an installer or the first run has left.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Unavailable(f"`vtx run {image}` ended with status {process.returncode}")
    return _Process(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
