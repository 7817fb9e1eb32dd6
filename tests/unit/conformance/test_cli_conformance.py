"""The command: tables, files, exit status."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from suites import HANG, build, ends_with, say

CONFIGURATION = """
[good]
file = good.flat
groups = g
[bad]
file = bad.flat
groups = g
[other]
file = other.flat
"""
IMAGES = {
    "good": say("PASS: a\nSKIP: b\n") + ends_with(0),
    "bad": say("PASS: a\n" + "".join(f"FAIL: b{n}\n" for n in range(12))) + ends_with(1),
    "spare": say("PASS: a\n") + ends_with(0),
}

COLOURLESS = {**os.environ, "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("suite") / "k", CONFIGURATION, IMAGES, head="0123abcd\n")


def vtx(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vtx.cli", "conformance", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def without_times(table: str) -> list[list[str]]:
    return [[word for word in line.split() if "." not in word] for line in table.splitlines()]


def test_table_of_everything(directory: Path) -> None:
    done = vtx(directory, "--jobs", "2")
    assert done.returncode == 1
    assert done.stderr == ""
    table, _, failures = done.stdout.partition("\n\n")
    assert without_times(table) == [
        ["test", "verdict", "passed", "failed", "skipped", "seconds", "why,", "or", "first", "failure"],
        ["good", "PASS", "1", "1"],
        ["bad", "FAIL", "1", "12", "b0"],
        ["other", "SKIP", "has", "not", "been", "built"],
        ["spare", "SKIP", "runs", "only", "when", "asked", "for"],
        ["total", "2", "12", "1", "1", "PASS,", "1", "FAIL,", "2", "SKIP"],
        ["kvm-unit-tests", "0123abcd,", "built", "for", "x86_64"],
    ]
    assert "x86/other.flat has not been built" in table
    assert failures.splitlines()[0] == "bad: failed checks"
    assert failures.splitlines()[1] == "  FAIL: b0"
    assert failures.splitlines()[-1] == "  and 2 more (--junit has them all)"


def test_success(directory: Path) -> None:
    done = vtx(directory, "--test", "good", "--test", "spare", "--jobs", "1")
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [["good", "PASS"], ["spare", "PASS"]]


def test_junit_file(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.xml"
    done = vtx(directory, "--group", "g", "--exclude", "bad", "--jobs", "1", "--junit", file)
    assert done.returncode == 0
    root = ElementTree.parse(file).getroot()
    assert [case.get("name") for case in root.iter("testcase")] == ["a", "b"]
    properties = {each.get("name"): each.get("value") for each in root.iter("property")}
    assert properties["suite revision"] == "0123abcd"
    assert properties["processor of good"] == "skylake-server -pku"


def test_junit_file_has_what_a_killed_run_knew(tmp_path: Path) -> None:
    images = {"good": IMAGES["good"], "hangs": say("PASS: c\n") + HANG}
    configuration = "[good]\nfile = good.flat\n[hangs]\nfile = hangs.flat\n"
    directory = build(tmp_path / "k", configuration, images)
    file = tmp_path / "result.xml"
    command = [sys.executable, "-m", "vtx.cli", "conformance", directory]
    with subprocess.Popen([*command, "--jobs", "1", "--junit", file], stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not (file.exists() and "good" in file.read_text()):
                time.sleep(0.05)
        finally:
            process.kill()
    root = ElementTree.parse(file).getroot()
    assert [case.get("name") for case in root.iter("testcase")] == ["a", "b"]


def test_json(directory: Path) -> None:
    done = vtx(directory, "--test", "bad", "--jobs", "1", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["suite revision"] == "0123abcd"
    (test,) = found["tests"]
    assert (test["verdict"], test["passed"], test["failed"], test["reason"]) == ("FAIL", 1, 12, "b0")
    assert test["checks"][1] == {"status": "FAIL", "name": "b0"}


def test_list(directory: Path) -> None:
    done = vtx(directory, "--list")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1] == ["good", "g", "good.flat", "1", "128M", "90", "skylake-server", "-pku"]
    assert lines[4][:3] == ["spare", "unlisted", "nodefault"]
    assert [row["test"] for row in json.loads(vtx(directory, "--list", "--json").stdout)] == [
        "good",
        "bad",
        "other",
        "spare",
    ]


def test_flags(directory: Path) -> None:
    rows = json.loads(vtx(directory, "--list", "--json", "--cpu", "-smap,phys-bits=36").stdout)
    assert rows[0]["processor"] == "skylake-server -smap phys-bits=36"
    rows = json.loads(vtx(directory, "--list", "--json", "--cpu", "").stdout)
    assert rows[0]["processor"] == "skylake-server"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "nix"], "no group 'nix' (groups: g, unlisted, nodefault)"),
        (["--test", "nix"], "no test is called 'nix'"),
        (["--profile", "nix"], "profile nix: expected a profile name"),
        (["--junit", "no/such/place.xml"], "cannot write 'no/such/place.xml': No such file or directory"),
        (["--jobs", "0"], "Invalid value for '--jobs'"),
        (["--cpu", "-nix"], "--cpu -nix: unknown flag 'nix'"),
        (["--cpu", "nix"], "--cpu nix: processor property nix"),
    ],
)
def test_wrong_usage_is_one_line(directory: Path, arguments: list[str], message: str) -> None:
    done = vtx(directory, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_directory_that_is_no_build(tmp_path: Path) -> None:
    done = vtx(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"vtx: {tmp_path}: not a kvm-unit-tests build: x86/unittests.cfg: No such file or directory\n"
    )


def test_terminal_sees_progress_and_failures_as_they_come(directory: Path) -> None:
    master, slave = os.openpty()
    command = [sys.executable, "-m", "vtx.cli", "conformance", str(directory), "--test", "*d", "--jobs", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, text=True, check=False, env=COLOURLESS)
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):
        while data := os.read(master, 1 << 16):
            seen += data
    os.close(master)
    assert done.returncode == 1
    assert done.stdout.startswith("test")
    text = seen.decode()
    assert "all tests" in text
    assert "FAIL bad: b0" in text
    assert "PASS" not in text


def test_interrupt_prints_what_is_known(tmp_path: Path) -> None:
    images = {"good": IMAGES["good"], "hangs": say("PASS: a\n") + HANG}
    directory = build(tmp_path / "k", "[good]\nfile = good.flat\n[hangs]\nfile = hangs.flat\n", images)
    master, slave = os.openpty()
    command = [sys.executable, "-m", "vtx.cli", "conformance", str(directory), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True, env=COLOURLESS)
    seen = b""
    while b"hangs" not in seen:
        seen += os.read(master, 1 << 16)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    os.close(slave)
    os.close(master)
    assert process.returncode == 130
    assert [line.split()[0] for line in output.splitlines()[:3]] == ["test", "good", "total"]


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_process_outlives_the_command(tmp_path: Path) -> None:
    directory = build(tmp_path / "k", "[hangs]\nfile = hangs.flat\n", {"hangs": say("PASS: a\n") + HANG})
    command = [sys.executable, "-m", "vtx.cli", "conformance", str(directory), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not children.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (worker,) = children.read_text().split()
    process.kill()
    process.wait()
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)
