"""A hostile program is a number: the machine that follows from it, what a run of it ends with, and a second opinion.

A run must end, for a reason the machine can name, and end the same whether sensitive instructions are answered inside
the engine or after it has stopped, and whether or not its compiled helpers are used.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import hostile_code
import hostile_places as at
import hostile_user_interrupts
from attrs import evolve, field, frozen
from hostile_extensions import install_svm, install_vmx
from hostile_modes import MODES, bits_of, install_descriptors, install_page_tables, new_state

import vtx.x86.processor
from vtx.boot import acpi, firmware
from vtx.events import TraceEvent
from vtx.machine import Machine, StopReason

# A processor that does nothing but fault is found out sooner than elsewhere.
vtx.x86.processor.MOST_FRUITLESS = 300  # type: ignore[misc]

EXTENSIONS = ("none", "none", "none", "vmx", "vmx guest", "vmx guest", "svm", "svm guest")
VARIANTS = ("answers", "stops", "plain")
"""Answered inside the engine; after it has stopped; without compiled helpers."""


@frozen
class Program:
    """What to run: everything follows from ``seed``. The rest makes a program smaller.

    ``limit`` is the number of instructions, None for the program's own. ``blanks`` are ranges of the code that are
    NOPs instead.
    """

    seed: int
    limit: int | None = None
    blanks: tuple[tuple[int, int], ...] = ()


@frozen
class Outcome:
    """How a run of a program ended. ``state`` is what must not depend on how it was run."""

    reason: str
    message: str
    instructions: int
    exits: int
    state: dict[str, Any] = field(repr=False)
    trace: tuple[str, ...] = field(repr=False)


class _Recorder:
    """A tracer that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def emit(self, event: TraceEvent) -> None:
        self.lines.append(str(event))


@frozen
class _Choice:
    """What kind of program it is."""

    mode: str
    extension: str
    profile: str
    cpl: int
    cpus: int
    limit: int
    traced: bool


def choose(seed: int) -> tuple[_Choice, random.Random]:
    """The kind of program ``seed`` is, and the source of the rest."""
    source = random.Random(f"hostile {seed}")
    mode = MODES[seed % len(MODES)]
    extension = EXTENSIONS[seed // len(MODES) % len(EXTENSIONS)]
    profile = "everything-amd" if extension.startswith("svm") else "everything"
    if extension == "none":
        profile = source.choice(("everything", "everything", "nehalem-server", "skylake-server", "zen-server"))
    cpl = 3 if mode == "virtual-8086" else 0
    if mode not in ("real", "virtual-8086", "protected-16") and source.random() < 0.25:
        cpl = 3
    limit = source.choice((100, 200, 300, 500, 1500))
    cpus = 2 if source.random() < 0.08 else 1
    return _Choice(mode, extension, profile, cpl, cpus, limit, source.random() < 0.3), source


def build(program: Program, *, compiled: bool, tracer: _Recorder | None) -> tuple[Machine, _Choice]:
    """The machine that is about to run ``program``."""
    choice, source = choose(program.seed)
    traced = tracer if choice.traced else None
    machine = Machine(
        profile=choice.profile, memory=at.MEMORY, cpus=choice.cpus, tracer=traced, compiled=compiled, seed=program.seed
    )
    memory, cpu = machine.memory, machine.cpu
    acpi.install(memory, choice.cpus)
    firmware.install(memory, machine.board.port_write)
    cpu.socket.apic.set_virtual_wire_mode()
    memory.write(at.DATA, source.randbytes(0x1000))
    kind = choice.extension.partition(" ")[0]
    code, starts = hostile_code.page(source, bits_of(choice.mode), kind, at.CODE_SIZE)
    install_descriptors(memory, source, choice.mode, starts)
    cr3 = install_page_tables(memory, source, choice.mode)
    enforced = choice.profile == "everything" and choice.mode not in ("real", "virtual-8086") and source.random() < 0.25
    bounds = machine.profile.has("MPX") and source.random() < 0.35
    state = new_state(memory, source, choice.mode, cr3, choice.cpl, with_control_flow=enforced, with_bounds=bounds)
    guest = state if choice.extension.endswith("guest") else None
    if guest is None:
        cpu.state = state
    if choice.profile == "everything" and source.random() < 0.5:
        hostile_user_interrupts.install(machine, source, state)
    if kind == "vmx":
        install_vmx(machine, source, guest, choice.mode)
    elif kind == "svm":
        install_svm(machine, source, guest)
    memory.write(at.CODE, _blanked(code, program.blanks))
    cpu.load_control_state()
    return machine, choice


def _blanked(code: bytes, blanks: tuple[tuple[int, int], ...]) -> bytes:
    result = bytearray(code)
    for begin, end in blanks:
        result[begin:end] = b"\x90" * (end - begin)
    return bytes(result)


def run(program: Program, variant: str = "answers") -> Outcome:
    """Run ``program``; any exception is a finding."""
    recorder = _Recorder()
    machine, choice = build(program, compiled=variant != "plain", tracer=recorder)
    try:
        for cpu in machine.cpus:
            cpu.engine.answers = variant != "stops"  # type: ignore[attr-defined]
        result = machine.run(max_instructions=program.limit or choice.limit)
        if result.reason is StopReason.INTERRUPTED:
            raise AssertionError("interrupted, by nobody")
        return Outcome(
            reason=result.reason.value,
            message=result.message,
            instructions=result.instructions,
            exits=sum(machine.exit_counts.values()),
            state=_state(machine) | {"ticks": result.ticks, "end": f"{result}"},
            trace=tuple(recorder.lines),
        )
    finally:
        for cpu in machine.cpus:
            cpu.engine.close()  # type: ignore[attr-defined]


def _state(machine: Machine) -> dict[str, Any]:
    result: dict[str, Any] = {"exits": dict(machine.exit_counts)}
    for cpu in machine.cpus:
        state = evolve(cpu.state, fpu=b"")
        result[f"processor {cpu.index}"] = f"{state}"
        result[f"x87/SSE {cpu.index}"] = cpu.engine.legacy_area().hex()
        result[f"time {cpu.index}"] = cpu.now(), cpu.instructions
    result["memory"] = zlib.crc32(machine.memory.backing)
    return result


def difference(one: Outcome, other: Outcome) -> str | None:
    """In one line what two runs of one program differ in, None if in nothing."""
    for a, b in zip(one.trace, other.trace, strict=False):
        if a != b:
            return f"trace: {a} / {b}"
    for name, value in one.state.items():
        if value != other.state[name]:
            return f"{name}: {value} / {other.state[name]}"
    if len(one.trace) != len(other.trace):
        return f"length of trace: {len(one.trace)} / {len(other.trace)}"
    return None
