"""Answering instructions in the middle of a run is an optimization: without it, everything is the same."""

from __future__ import annotations

from typing import Any

from vtx.cli.images import find_image
from vtx.events import TraceEvent
from vtx.machine import Machine, RunResult
from vtx.x86.execution import EngineEvent


class Recorder:
    def __init__(self) -> None:
        self.events: list[TraceEvent] = []

    def emit(self, event: TraceEvent) -> None:
        self.events.append(event)


def run(guest: str, profile: str, *, answers: bool) -> tuple[list[TraceEvent], RunResult, bytes]:
    recorder, output = Recorder(), bytearray()
    machine = Machine(profile=profile, tracer=recorder, serial=output.extend)
    machine.cpu.engine.answers = answers
    machine.load(find_image(guest).data)
    return recorder.events, machine.run(), bytes(output)


def test_answers__change_no_event_no_time_and_no_output(bundled: str) -> None:
    events, result, output = run(bundled, "everything", answers=True)
    slow_events, slow_result, slow_output = run(bundled, "everything", answers=False)
    assert result == slow_result and output == slow_output
    assert events == slow_events
    assert len(events) > 100 and result.exit_value == 0


def starts(guest: str, profile: str, *, answers: bool) -> int:
    """How often the engine starts in a run of ``guest``."""
    machine = Machine(profile=profile)
    machine.cpu.engine.answers = answers
    machine.load(find_image(guest).data)
    run, count = machine.cpu.engine.run, 0

    def counted(*arguments: Any, **keywords: Any) -> EngineEvent:
        nonlocal count
        count += 1
        return run(*arguments, **keywords)

    machine.cpu.engine.run = counted
    assert machine.run().exit_value == 0
    return count


def test_answers__vm_entries_and_exits_need_no_start(hello: str) -> None:
    assert starts(hello, "everything", answers=True) < starts(hello, "everything", answers=False) / 5


def test_answers__neither_do_vmrun_and_what_surrounds_it(svm_hello: str) -> None:
    assert starts(svm_hello, "everything-amd", answers=True) < starts(svm_hello, "everything-amd", answers=False) / 5


def test_answers__change_no_event_of_a_nested_svm_hypervisor(svm_nested: str) -> None:
    events, result, output = run(svm_nested, "everything-amd", answers=True)
    slow_events, slow_result, slow_output = run(svm_nested, "everything-amd", answers=False)
    assert result == slow_result and output == slow_output
    assert events == slow_events
    assert len(events) > 100 and result.exit_value == 0
