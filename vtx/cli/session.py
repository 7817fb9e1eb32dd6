"""One run of a machine, under control from outside: time-out, signals, serial input.

The machine runs in a thread of its own, for the engine can stay in compiled code as long as the guest likes, while
Python handles signals in the main thread only. What wants the machine to stop asks `Machine.interrupt` until it does.
"""

from __future__ import annotations

import enum
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vtx.cli.console import SerialOutput, pump_input
from vtx.cli.status import INTERRUPTED, LIMIT_REACHED, OUTPUT_CLOSED, TERMINATED

if TYPE_CHECKING:
    from vtx.machine import Machine, RunResult

_TICK_SECONDS: Final = 0.05
_GRACE_SECONDS: Final = 10.0


class Cause(enum.Enum):
    """What ended the run from outside, with the exit status it gives."""

    TIMEOUT = LIMIT_REACHED
    INTERRUPT = INTERRUPTED
    TERMINATE = TERMINATED
    OUTPUT_CLOSED = OUTPUT_CLOSED


@frozen
class Ended:
    """How the run ended; ``cause`` is None if the machine ended it by itself. ``wall`` is in seconds."""

    result: RunResult
    cause: Cause | None
    wall: float


class Session:
    """Runs ``machine``; ``output`` is flushed now and then while it does."""

    def __init__(self, machine: Machine, output: SerialOutput) -> None:
        self._machine = machine
        self._output = output
        self._input: deque[bytes] = deque()
        self._cause: Cause | None = None
        self._done = threading.Event()
        self._result: RunResult | None = None
        self._error: BaseException | None = None

    def connect_input(self) -> None:
        """Pass standard input to the guest while it runs."""
        waiting = self._machine.uart.state.waiting

        def feed(data: bytes) -> None:
            self._input.append(data)
            self._machine.interrupt()

        pump_input(lambda: len(waiting) + sum(map(len, tuple(self._input))), feed)

    def run(self, *, max_instructions: int | None = None, timeout: float | None = None) -> Ended:
        """Run to the end, or to the limit of instructions or of wall time in seconds.

        What the machine raises is raised here. A machine that does not react to being interrupted takes the whole
        process down, after a grace period, rather than hang.
        """
        start = time.monotonic()
        deadline = None if timeout is None else start + timeout
        thread = threading.Thread(target=self._work, args=(max_instructions,), name="machine", daemon=True)
        with self._signals():
            thread.start()
            stopping_since: float | None = None
            while not self._done.wait(_TICK_SECONDS if deadline is None else self._patience(deadline)):
                self._output.flush()
                now = time.monotonic()
                self._look_for_cause(now, deadline)
                if self._cause is not None:
                    stopping_since = stopping_since or now
                    self._machine.interrupt()
                    if now - stopping_since > _GRACE_SECONDS:
                        os._exit(self._cause.value)
        self._output.flush()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return Ended(self._result, self._ended_from_outside(), time.monotonic() - start)

    @staticmethod
    def _patience(deadline: float) -> float:
        return max(min(_TICK_SECONDS, deadline - time.monotonic()), 0.001)

    def _look_for_cause(self, now: float, deadline: float | None) -> None:
        if self._cause is not None:
            return
        if self._output.closed:
            self._cause = Cause.OUTPUT_CLOSED
        elif deadline is not None and now >= deadline:
            self._cause = Cause.TIMEOUT

    def _ended_from_outside(self) -> Cause | None:
        from vtx.machine import StopReason  # noqa: PLC0415 - loaded by now

        assert self._result is not None
        if self._output.closed:
            return Cause.OUTPUT_CLOSED
        return self._cause if self._result.reason is StopReason.INTERRUPTED else None

    def _work(self, max_instructions: int | None) -> None:
        from vtx.machine import StopReason  # noqa: PLC0415 - loaded by now

        machine = self._machine
        try:
            while True:
                while self._input:
                    machine.feed(self._input.popleft())
                self._result = machine.run(max_instructions=max_instructions)
                if self._result.reason is not StopReason.INTERRUPTED or self._cause is not None:
                    return
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as wishes to stop; the second one is a command."""

        def handle(number: int, frame: FrameType | None) -> None:
            cause = Cause.INTERRUPT if number == signal.SIGINT else Cause.TERMINATE
            if self._cause is cause:
                os._exit(cause.value)
            self._cause = cause

        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
