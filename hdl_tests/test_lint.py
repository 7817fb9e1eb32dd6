"""The RTL stays in the subset that simulators and synthesis agree on."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

# Constructs that Icarus ignores, mistreats or crashes on; checks belong into formal/ and the testbench.
FORBIDDEN = (
    r"\binside\b",
    r"\bassert\b",
    r"\bassume\b",
    r"\bcover\b",
    r"\binterface\b",
    r"\bunion\b",
    r"\bunique\b",
    r"\binitial\b",
    r"\$display\b",
    r"'\{",
    r"\bparameter\s+type\b",
    r"\bint\s+unsigned\b",
    r"\b\w+_pkg::(?!\*)",
)


def test_rtl__avoids_what_icarus_mistreats(block):
    for source in block.sources:
        code = re.sub(r"//.*", "", source.read_text())
        for pattern in FORBIDDEN:
            assert not re.search(pattern, code), f"{source.name}: {pattern}"


def test_rtl__lints_with_verilator(block):
    if shutil.which("verilator") is None:
        pytest.skip("verilator is not installed (optional)")
    command = ["verilator", "--lint-only", "-Wall", "-Wno-UNUSED", "--top-module", block.simulation("edge").top]
    lint = subprocess.run([*command, *block.sources], capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stderr
