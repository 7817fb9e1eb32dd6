"""Runs hostile programs, one line of JSON each, in a process that may crash.

Usage: hostile_child.py FIRST COUNT [--limit N] [--blank BEGIN-END]... [--compare-every N]
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hostile_program import VARIANTS, Outcome, Program, choose, difference, run

SECONDS = 60
"""A program that takes longer hangs; the slowest takes a second or two."""

ADDRESS_SPACE = 6 << 30


def peak_memory() -> int:
    """Most memory this program has had resident, in KiB; getrusage would count what the parent had when it forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("the kernel does not tell the peak of resident memory")


def _record(program: Program, variants: Sequence[str]) -> dict[str, Any]:
    choice, _ = choose(program.seed)
    record: dict[str, Any] = {"seed": program.seed, "mode": choice.mode, "extension": choice.extension}
    outcomes: list[Outcome] = []
    begin = time.process_time()
    for variant in variants:
        try:
            outcomes.append(run(program, variant))
        except BaseException as failure:
            if isinstance(failure, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(failure.__traceback__)[-1]
            record["exception"] = f"{variant}: {type(failure).__name__}: {failure} ({where.filename}:{where.lineno})"
            record["details"] = traceback.format_exc()
            return record
    first = outcomes[0]
    record |= {"reason": first.reason, "message": first.message, "instructions": first.instructions}
    record |= {"runs": len(outcomes), "exits": first.exits, "seconds": time.process_time() - begin}
    for variant, other in zip(variants[1:], outcomes[1:], strict=True):
        found = difference(first, other)
        if found:
            record["difference"] = f"{variants[0]} / {variant}: {found}"
            break
    return record


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--blank", action="append", default=[])
    parser.add_argument("--compare-every", type=int, default=1)
    options = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    blanks = tuple((int(begin), int(end)) for begin, _, end in (each.partition("-") for each in options.blank))
    for seed in range(options.first, options.first + options.count):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        variants = VARIANTS[: 1 if seed % options.compare_every else None]
        record = _record(Program(seed, options.limit, blanks), variants)
        record["memory"] = peak_memory()
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
