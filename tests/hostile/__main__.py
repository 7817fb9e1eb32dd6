"""Hostile programs by the thousand: `make hostile`, or `python tests/hostile --programs 1000 --first 5000`.

Prints what they did, and for each finding the seed and the smallest program that still does it. Ends with 1 if there
is a finding.
"""

from __future__ import annotations

import argparse
import os
import sys

from hostile_sweep import Report, smallest, sweep


def _show(report: Report) -> None:
    line = f"\r{report.programs} programs, {report.instructions} instructions, {len(report.findings)} findings"
    sys.stderr.write(line)
    sys.stderr.flush()


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compare-every", type=int, default=4, help="compare the ways to run every Nth program")
    parser.add_argument("--minimize", action="store_true")
    options = parser.parse_args()
    report = sweep(
        options.first,
        options.programs,
        jobs=options.jobs,
        compare_every=options.compare_every,
        progress=_show,
    )
    out = sys.stdout.write
    out(f"\n{report.programs} programs in {report.runs} runs, {report.instructions} instructions, ")
    out(f"{report.exits} VM exits, {report.seconds:.0f} s of processor time, {report.memory >> 10} MiB at most\n")
    for end, count in report.ends.most_common():
        out(f"  {count:6} {end}\n")
    out(f"{len(report.findings)} findings\n")
    for finding in report.findings:
        out(f"  {finding.seed} {finding.what}\n{finding.details}\n")
        if options.minimize:
            limit, blanks = smallest(finding.seed)
            out(f"    --limit {limit} {' '.join(f'--blank {begin}-{end}' for begin, end in blanks)}\n")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
