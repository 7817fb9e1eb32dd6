"""When the output of another emulator is at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vtx.fuzz.on_others import watch

WIDTHS, RESULT, END = "widths 3028", "0 valid 7", "end"

# Writes lines to a file, one after the other with a pause, then ends or, told to, goes on for ever.
_WRITER = """\
import sys, time
file, for_ever, lines = open(sys.argv[1], "w"), sys.argv[2] == "for ever", sys.argv[3:]
while True:
    for line in lines:
        print(line, file=file, flush=True)
        time.sleep(0.01)
    if not for_ever:
        break
"""


def watched(tmp_path: Path, *lines: str, for_ever: bool = False) -> list[str]:
    serial = tmp_path / "serial"
    way = "for ever" if for_ever else "once"
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(serial), way, *lines])
    try:
        return watch(process, serial).splitlines()
    finally:
        process.kill()
        process.wait()


def test_the_last_line(tmp_path: Path) -> None:
    assert watched(tmp_path, WIDTHS, RESULT, END) == [WIDTHS, RESULT, END]


def test_the_end_of_the_process(tmp_path: Path) -> None:
    assert watched(tmp_path, WIDTHS, RESULT) == [WIDTHS, RESULT]


def test_nothing(tmp_path: Path) -> None:
    assert watched(tmp_path) == []


def test_a_reset(tmp_path: Path) -> None:
    assert watched(tmp_path, WIDTHS, RESULT, for_ever=True) == [WIDTHS, RESULT]


@pytest.mark.parametrize("line", ["1 valid 7", "10 widths 3028", "widths 30285"])
def test_lines_that_are_no_reset(tmp_path: Path, line: str) -> None:
    assert watched(tmp_path, WIDTHS, RESULT, line, END) == [WIDTHS, RESULT, line, END]
