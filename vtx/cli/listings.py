"""``vtx guests`` and ``vtx profiles``: what there is to run, and on what."""

from __future__ import annotations

import sys

import click

from vtx.cli.images import DESCRIPTIONS, bundled_names
from vtx.cli.table import print_table


@click.command()
def guests() -> int:
    """List the bundled guests."""
    built = bundled_names()
    rows = [(name, DESCRIPTIONS.get(name, "")) for name in built]
    rows += [(name, f"{text} (not built: make guests)") for name, text in DESCRIPTIONS.items() if name not in built]
    print_table(("guest", "what it is"), rows)
    return 0


@click.command()
def profiles() -> int:
    """List the processors that a machine can have."""
    from vtx.x86.profile import load_profile, profile_names  # noqa: PLC0415 - kept off the way to `vtx run`

    found = [load_profile(name) for name in profile_names()]
    print_table(
        ("profile", "what it is", "physical", "linear", "TSC"),
        [
            (
                each.name,
                each.description,
                f"{each.physical_address_width} bits",
                f"{each.linear_address_width} bits",
                f"{each.tsc_frequency / 1e9:g} GHz",
            )
            for each in found
        ],
    )
    sys.stdout.flush()
    return 0
