"""Yosys as a command, on the native library of the ``pyosys`` wheel: ``native_yosys.py -ql LOG SCRIPT``.

Understands just what SymbiYosys passes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run SCRIPT with its messages going to LOG; Yosys itself ends the process with status 1 if it fails."""
    if len(arguments) != 3 or arguments[0] != "-ql":
        sys.stderr.write("usage: native_yosys.py -ql LOG SCRIPT\n")
        return 2
    log, script = arguments[1:]
    commands = [line.split("#")[0].strip() for line in Path(script).read_text().splitlines()]
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), sys.stdout.fileno())
    from pyosys import libyosys  # noqa: PLC0415 - it writes to standard output from here on

    design = libyosys.Design()
    for command in filter(None, commands):
        libyosys.run_pass(command, design)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
