"""``vtx bench``: the figures, the targets, the other emulators."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from vtx.cli.images import Unusable
from vtx.cli.table import print_table

if TYPE_CHECKING:
    from vtx.bench.measure import Measurement

_HEADER = ("what", "vtx", "target", "met", "Bochs", "vtx/Bochs", "QEMU", "vtx/QEMU")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--check", is_flag=True, help="End with status 1 if a target is missed.")
def bench(as_json: bool, check: bool) -> int:
    """Measure speed and memory, next to Bochs and QEMU where they are installed.

    Times are processor time, but for the one from start to exit, which other work on this computer makes longer.
    """
    from vtx.bench.emulators import Unavailable  # noqa: PLC0415 - the machine comes with it
    from vtx.bench.measure import measurements  # noqa: PLC0415

    found = []
    try:
        for measurement in measurements():
            found.append(measurement)
            if sys.stderr.isatty():
                print(f"measured: {measurement.name}", file=sys.stderr)  # noqa: T201
    except Unavailable as error:
        raise Unusable(f"cannot measure: {error}") from None
    if as_json:
        print(json.dumps([_as_json(each) for each in found], indent=2))  # noqa: T201
    else:
        print_table(_HEADER, [_row(each) for each in found], right=frozenset({1, 2, 4, 5, 6, 7}))
        for reason in sorted(
            {f"{name}: {each}" for m in found for name, each in m.others.items() if isinstance(each, str)}
        ):
            print(reason)  # noqa: T201
    return int(check and any(each.met is False for each in found))


def _row(measurement: Measurement) -> tuple[str, ...]:
    target, met = "", ""
    if measurement.target is not None:
        sign = ">=" if measurement.target.at_least else "<="
        unit = "x " + measurement.compared_with if measurement.compared_with else measurement.unit
        target = f"{sign} {measurement.target.value:g} {unit}"
        met = {True: "yes", False: "no", None: "unknown"}[measurement.met]
    row = [measurement.name, f"{measurement.figure:.3g} {measurement.unit}", target, met]
    for other in ("Bochs", "QEMU"):
        figure, ratio = measurement.others.get(other), measurement.ratio(other)
        row.append(f"{figure:.3g} {measurement.unit}" if isinstance(figure, float) else "")
        row.append(f"{ratio:.2f}" if ratio is not None else "")
    return tuple(row)


def _as_json(measurement: Measurement) -> dict[str, object]:
    others = dict(measurement.others)
    return {
        "name": measurement.name,
        "unit": measurement.unit,
        "vtx": measurement.figure,
        "others": others,
        "ratios": {other: measurement.ratio(other) for other in others},
        "target": measurement.target.value if measurement.target else None,
        "compared_with": measurement.compared_with,
        "met": measurement.met,
    }
