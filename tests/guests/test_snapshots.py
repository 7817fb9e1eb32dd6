"""A restored run continues as the original did: same events at the same times, same output, same end."""

from __future__ import annotations

from functools import cache

import pytest
from conftest import need_bundled
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.cli.images import find_image
from vtx.events import MachineStopped, TraceEvent
from vtx.machine import Machine, RunResult


class Recorder:
    """A machine that runs a bundled guest, with what it prints and traces."""

    def __init__(self) -> None:
        self.printed = bytearray()
        self.events: list[TraceEvent] = []
        self.machine = Machine(memory=64 << 20, serial=self.printed.extend, tracer=self)

    def emit(self, event: TraceEvent) -> None:
        if not isinstance(event, MachineStopped):
            self.events.append(event)

    def load(self, name: str) -> Recorder:
        self.machine.load(find_image(need_bundled(name)).data, name=name)
        return self


@cache
def reference(name: str) -> tuple[RunResult, bytes, tuple[TraceEvent, ...], dict[str, int]]:
    """The whole run, never stopped on its way."""
    recorder = Recorder().load(name)
    result = recorder.machine.run()
    assert result.exit_value == 0
    return result, bytes(recorder.printed), tuple(recorder.events), dict(recorder.machine.exit_counts)


def assert_continues_alike(name: str, first: Recorder) -> None:
    """``first`` is somewhere on its way: it and another machine can be put back there, and end as they should."""
    result, printed, events, exits = reference(name)
    snapshot = first.machine.snapshot()
    seen, length = len(first.events), len(first.printed)
    first.machine.run()
    for recorder in (first, Recorder()):
        del recorder.events[:], recorder.printed[:]
        recorder.machine.restore(snapshot)
        assert recorder.machine.run() == result
        assert bytes(recorder.printed) == printed[length:]
        assert tuple(recorder.events) == events[seen:]
        assert recorder.machine.exit_counts == exits


@pytest.mark.parametrize("instructions", [1, 400_000, 700_000])
def test_nested_guest(instructions: int) -> None:
    recorder = Recorder().load("nested")
    recorder.machine.run(max_instructions=instructions)
    assert_continues_alike("nested", recorder)


@settings(max_examples=12, deadline=None)
@given(instructions=st.integers(1, 25_000))
def test_hello_at_any_point(instructions: int) -> None:
    recorder = Recorder().load("hello")
    recorder.machine.run(max_instructions=instructions)
    assert_continues_alike("hello", recorder)


@pytest.mark.parametrize("line", [b"[L3] running at", b"[L3] port", b"[L3] at guest-physical"])
def test_nested_guest_while_the_third_level_prints_a_line(line: bytes) -> None:
    recorder = Recorder().load("nested")
    limit = 0
    while not recorder.printed.endswith(line):
        done = recorder.printed.rfind(b"\n[L2] launching L3") >= 0
        limit += 20 if done else 2000
        recorder.machine.run(max_instructions=limit)
    assert recorder.machine.cpu.vmx.non_root
    assert_continues_alike("nested", recorder)


def test_all_of_ram_is_as_it_was() -> None:
    machine = Recorder().load("nested").machine
    machine.run(max_instructions=500_000)
    snapshot, ram = machine.snapshot(), machine.memory.read(0, 64 << 20)
    machine.run()
    assert machine.memory.read(0, 64 << 20) != ram
    machine.restore(snapshot)
    assert machine.memory.read(0, 64 << 20) == ram
