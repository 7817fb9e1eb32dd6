"""Answering instructions in the middle of a run is an optimization: without it, everything is the same."""

from __future__ import annotations

from vtx.cli.images import find_image
from vtx.events import TraceEvent
from vtx.machine import Machine, RunResult


class Recorder:
    def __init__(self) -> None:
        self.events: list[TraceEvent] = []

    def emit(self, event: TraceEvent) -> None:
        self.events.append(event)


def run(guest: str, *, answers: bool) -> tuple[list[TraceEvent], RunResult, bytes]:
    recorder, output = Recorder(), bytearray()
    machine = Machine(tracer=recorder, serial=output.extend)
    machine.cpu.engine.answers = answers
    machine.load(find_image(guest).data)
    return recorder.events, machine.run(), bytes(output)


def test_answers__change_no_event_no_time_and_no_output(bundled: str) -> None:
    events, result, output = run(bundled, answers=True)
    slow_events, slow_result, slow_output = run(bundled, answers=False)
    assert result == slow_result and output == slow_output
    assert events == slow_events
    assert len(events) > 100 and result.exit_value == 0
