"""What the documentation says of the command line is what the command line says of itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import text_of

from vtx.cli import status

VTX = Path(sys.executable).with_name("vtx")


def vtx(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(VTX), *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def options(help_text: str) -> set[str]:
    return set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", help_text, re.MULTILINE)) - {"--help"}


def test_every_option_of_run_is_documented() -> None:
    documented = set(re.findall(r"^\| `(--[a-z-]+)", text_of("docs/getting-started.md"), re.MULTILINE))
    assert options(vtx("run", "--help").stdout) == documented


def test_every_exit_status_is_documented() -> None:
    documented = set(re.findall(r"^\| (\d+) \|", text_of("docs/getting-started.md"), re.MULTILINE))
    named = (status.CANNOT_START, status.LIMIT_REACHED, status.GUEST_DIED, status.INTERRUPTED, status.INTERNAL_ERROR)
    assert {str(each) for each in named} <= documented


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md", "docs/testing.md"])
def test_commands_mentioned_exist(page: str) -> None:
    mentioned = set(re.findall(r"(?:`|^)vtx ([a-z]+)", text_of(page), re.MULTILINE))
    assert mentioned
    listed = set(re.findall(r"^  ([a-z]+) ", vtx("--help").stdout.partition("Commands:")[2], re.MULTILINE))
    assert mentioned <= listed


@pytest.mark.parametrize("command", ["run", "guests", "profiles", "explain", "bench", "conformance"])
def test_every_command_has_help(command: str) -> None:
    done = vtx(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: vtx {command}")


def test_bundled_guests_are_documented() -> None:
    names = re.findall(r"^([a-z]+) ", vtx("guests").stdout, re.MULTILINE)
    assert {"hello", "nested"} <= set(names)
    for name in set(names) - {"guest"}:
        assert f"`{name}/`" in text_of("guests/README.md"), name


def test_profiles_are_documented() -> None:
    names = re.findall(r"^([a-z-]+) ", vtx("profiles").stdout, re.MULTILINE)
    for name in set(names) - {"profile"}:
        assert f"## {name}" in text_of("docs/tables/profiles.md"), name
