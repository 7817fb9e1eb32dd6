"""Running plans: several processes at a time, each with its time limit, results in the order of the plans."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

from attrs import define, field

from vtx.conformance.plan import Job, Plan
from vtx.conformance.results import Died, Ended, Ending, SerialReport, TestResult, TimedOut, Verdict, judge

_CHUNK: Final = 1 << 16
_LONGEST_ERROR: Final = 1 << 16


class Observer(Protocol):
    """Is told what happens while it happens; every call is for one test, by its name."""

    def started(self, name: str) -> None:
        """A process runs it now."""

    def progressed(self, name: str, report: SerialReport) -> None:
        """It wrote something."""

    def finished(self, result: TestResult) -> None:
        """It is over."""


class Silent:
    """An observer for those who only want the results."""

    def started(self, name: str) -> None:
        """Nothing."""

    def progressed(self, name: str, report: SerialReport) -> None:
        """Nothing."""

    def finished(self, result: TestResult) -> None:
        """Nothing."""


@define(slots=True)
class Runner:
    """Runs ``plans``, at most ``jobs`` at a time; time limits are those of the suite times ``timeout_scale``.

    ``results`` grows while `run` runs: it has what is known even if the run is interrupted. ``record`` gets them each
    time that there is another, for who wants to keep them even if the process is killed.
    """

    plans: Sequence[Plan]
    jobs: int = 1
    timeout_scale: float = 1.0
    observer: Observer = field(factory=Silent)
    record: Callable[[Sequence[TestResult]], None] | None = None
    _results: dict[int, TestResult] = field(factory=dict)

    @property
    def results(self) -> list[TestResult]:
        """What is known so far, in the order of the plans."""
        return [self._results[place] for place in sorted(self._results)]

    def run(self) -> list[TestResult]:
        """Run everything; the results in the order of the plans. KeyboardInterrupt ends it, and no process is left."""
        asyncio.run(self._run())
        return self.results

    async def _run(self) -> None:
        slots = asyncio.Semaphore(self.jobs)
        async with asyncio.TaskGroup() as group:
            for place, plan in enumerate(self.plans):
                if plan.job is None:
                    self._finish(place, TestResult(plan.test.name, plan.group, Verdict.SKIP, plan.skip))
                else:
                    group.create_task(self._run_one(place, plan, plan.job, slots))

    async def _run_one(self, place: int, plan: Plan, job: Job, slots: asyncio.Semaphore) -> None:
        async with slots:
            name = plan.test.name
            self.observer.started(name)
            report = SerialReport()
            start = time.monotonic()
            ending = await self._execute(name, job, report)
            wall = time.monotonic() - start
        report.finish()
        verdict, reason = judge(ending, report)
        self._finish(place, TestResult(name, plan.group, verdict, reason, job.processor, report, ending, wall))

    def _finish(self, place: int, result: TestResult) -> None:
        self._results[place] = result
        self.observer.finished(result)
        if self.record is not None:
            self.record(self.results)

    async def _execute(self, name: str, job: Job, report: SerialReport) -> Ending:
        limit = None if job.timeout is None else job.timeout * self.timeout_scale
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vtx.conformance.worker", stdin=PIPE, stdout=PIPE, stderr=PIPE
        )
        try:
            async with asyncio.timeout(limit):
                return await self._follow(name, process, job, report)
        except TimeoutError:
            return TimedOut(limit or 0)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _follow(self, name: str, process: Process, job: Job, report: SerialReport) -> Ending:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(_as_json(job)).encode() + b"\n")
        errors = asyncio.create_task(_tail(process.stderr))
        while data := await process.stdout.read(_CHUNK):
            report.feed(data)
            self.observer.progressed(name, report)
        return _ending(await errors, await process.wait())


async def _tail(stream: asyncio.StreamReader) -> bytes:
    """The end of what ``stream`` has to say."""
    kept = b""
    while data := await stream.read(_CHUNK):
        kept = (kept + data)[-_LONGEST_ERROR:]
    return kept


def _as_json(job: Job) -> dict[str, object]:
    return {
        "image": str(job.image),
        "command_line": job.command_line,
        "memory": job.memory,
        "processors": job.processors,
        "processor": job.processor,
        "profile": dict(job.profile),
        "environment": job.environment,
    }


def _ending(errors: bytes, status: int) -> Ending:
    lines = errors.decode("utf-8", errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    if status:
        killed = f"killed by signal {-status}" if status < 0 else f"ended with {status}"
        return Died(f"the process of the machine {killed}" + (f": {last}" if last else ""))
    try:
        said = json.loads(last)
    except ValueError:
        return Died(f"the process of the machine said {last!r}")
    return Died(said["died"]) if "died" in said else Ended(**said)
