"""Runs many hostile programs in child processes, survives what kills them, and makes what it finds small."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from hostile_places import CODE_SIZE

CHILD = (sys.executable, str(Path(__file__).with_name("hostile_child.py")))
BATCH = 50
"""Programs in one process: leaks of memory add up, and a crash costs little."""

Record = dict[str, Any]


@frozen
class Finding:
    """What program ``seed`` did that no program may do."""

    seed: int
    what: str
    details: str = field(default="", repr=False)


@define
class Report:
    """What came out of a sweep. ``seconds`` is processor time, ``memory`` the largest of a process, in KiB."""

    programs: int = 0
    runs: int = 0
    instructions: int = 0
    exits: int = 0
    seconds: float = 0.0
    memory: int = 0
    ends: Counter[str] = field(factory=Counter)
    kinds: Counter[str] = field(factory=Counter)
    findings: list[Finding] = field(factory=list)

    def add(self, record: Record) -> None:
        """Take in what one program did."""
        self.programs += 1
        self.memory = max(self.memory, record.get("memory", 0))
        self.kinds[f"{record.get('extension')}, {record.get('mode')}"] += 1
        for kind in ("exception", "difference", "crash"):
            if kind in record:
                what = f"{record.get('mode')}, {record.get('extension')}: {kind}: {record[kind]}"
                self.findings.append(Finding(record["seed"], what, record.get("details", "")))
        if "reason" in record:
            end = record["message"] if record["reason"] == "not modelled" else record["reason"]
            self.ends[end] += 1
            self.instructions += record["instructions"]
            self.runs += record["runs"]
            self.exits += record["exits"]
            self.seconds += record["seconds"]


def _death(status: int, errors: str) -> str:
    if "Timeout" in errors:
        return "no end"
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def run_batch(first: int, count: int, options: Sequence[str] = (), child: Sequence[str] = CHILD) -> Iterator[Record]:
    """What programs ``first`` and following did, a crash among it; then a new process goes on behind it."""
    end = first + count
    while first < end:
        with tempfile.TemporaryFile("w+") as errors:
            command = [*child, str(first), str(end - first), *options]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    record = json.loads(line)
                    first = record["seed"] + 1
                    yield record
            if first < end:
                errors.seek(0)
                text = errors.read()
                yield {"seed": first, "crash": _death(process.returncode, text), "details": text[-4000:]}
                first += 1


def sweep(
    first: int,
    count: int,
    *,
    jobs: int = 1,
    compare_every: int = 1,
    child: Sequence[str] = CHILD,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run ``count`` programs from ``first`` on in ``jobs`` processes at a time."""
    report = Report()
    options = ("--compare-every", str(compare_every))
    with ThreadPoolExecutor(jobs) as pool:
        batches = [
            pool.submit(lambda begin, size: list(run_batch(begin, size, options, child)), begin, size)
            for begin in range(first, first + count, BATCH)
            if (size := min(BATCH, first + count - begin))
        ]
        for batch in batches:
            for record in batch.result():
                report.add(record)
            progress(report)
    return report


# Making it small.


def _fails(seed: int, limit: int | None, blanks: Sequence[tuple[int, int]]) -> bool:
    options = ["--limit", str(limit)] if limit is not None else []
    options += [each for begin, end in blanks for each in ("--blank", f"{begin}-{end}")]
    (record,) = run_batch(seed, 1, options)
    return any(kind in record for kind in ("exception", "difference", "crash"))


def smallest(seed: int, most: int = 4000) -> tuple[int, list[tuple[int, int]]]:
    """The least limit of instructions with which the program still fails, and ranges of its code that do not matter."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fails(seed, middle, []) else (middle, high)
    blanks: list[tuple[int, int]] = []
    size = CODE_SIZE // 4
    while size >= 16:
        for begin in range(0, CODE_SIZE, size):
            if any(a <= begin and begin + size <= b for a, b in blanks):
                continue
            if _fails(seed, high, [*blanks, (begin, begin + size)]):
                blanks = [each for each in blanks if not begin <= each[0] < begin + size]
                blanks.append((begin, begin + size))
        size //= 4
    return high, sorted(blanks)
