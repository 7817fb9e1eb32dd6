"""The command as a process: signals, closed pipes, input, and what it does not load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtx.bench.hypervisor import elf64
from vtx.bench.listing import code

ENDLESS = b"\xeb\xfe"
READY = code("""\
66 ba f8 03             ; mov dx, 0x3f8
b0 2b                   ; mov al, '+'
ee                      ; out dx, al
""")
ECHO = code("""\
66 ba fd 03             ; again: mov dx, 0x3fd
ec                      ; in al, dx
a8 01                   ; test al, 1
74 f7                   ; jz again
66 ba f8 03             ; mov dx, 0x3f8
ec                      ; in al, dx
ee                      ; out dx, al
3c 0a                   ; cmp al, '\\n'
75 ed                   ; jne again
31 c0                   ; xor eax, eax
66 ba f4 00             ; mov dx, 0xf4
ef                      ; out dx, eax
f4                      ; hlt
""")
FLOOD = code("""\
66 ba f8 03             ; mov dx, 0x3f8
b0 0a                   ; mov al, '\\n'
ee                      ; again: out dx, al
eb fd                   ; jmp again
""")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image"


def start(image: Path, program: bytes, *options: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    image.write_bytes(elf64({0x20_0000: program}))
    return subprocess.Popen(
        [sys.executable, "-m", "vtx.cli", "run", str(image), *options],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_output(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1) == b"+"


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal__ends_a_guest_that_never_traps(image: Path, number: int, status: int, word: str) -> None:
    process = start(image, READY + ENDLESS)
    wait_for_output(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert err.decode().splitlines()[-1] == f"vtx: {word}"
    assert b"Traceback" not in err


def test_a_signal__leaves_a_whole_trace(image: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    process = start(image, READY + ENDLESS, "--trace", str(trace))
    wait_for_output(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert trace.read_text().splitlines()[-1].startswith('{"event":"machine_stopped"')


def test_output_without_a_newline__appears_while_the_guest_runs(image: Path) -> None:
    process = start(image, READY + ENDLESS)
    wait_for_output(process)
    process.kill()
    process.communicate()


def test_a_reader_that_goes_away__ends_the_run_quietly(image: Path) -> None:
    process = start(image, FLOOD)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=30) == 141
    assert b"Traceback" not in err
    assert b"Exception" not in err


def test_input_from_a_pipe__reaches_the_guest(image: Path) -> None:
    process = start(image, ECHO, stdin=subprocess.PIPE)
    out, err = process.communicate(b"to be echoed, all of it, byte by byte\n", timeout=60)
    assert process.returncode == 0, err
    assert out == b"to be echoed, all of it, byte by byte\n"


def test_input_from_a_file__gives_the_same_run_every_time(image: Path, tmp_path: Path) -> None:
    text = tmp_path / "input"
    text.write_bytes(b"x" * 100 + b"\n")
    traces = []
    for number in range(2):
        trace = tmp_path / f"{number}.jsonl"
        with text.open("rb") as file:
            process = start(image, ECHO, "--trace", str(trace), stdin=file.fileno())
            out, _ = process.communicate(timeout=60)
        assert out == text.read_bytes()
        traces.append(trace.read_bytes())
    assert traces[0] == traces[1]


def test_no_standard_input_at_all__is_no_input(image: Path) -> None:
    image.write_bytes(
        elf64({0x20_0000: code("31 c0 66 ba f4 00 ef f4 ; xor eax, eax; mov dx, 0xf4; out dx, eax; hlt")})
    )
    done = subprocess.run(
        f"{sys.executable} -m vtx.cli run {image} <&-", shell=True, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_full_disk__under_the_trace_is_one_line(image: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    process = start(image, READY + ENDLESS, "--trace", "/dev/full", "--max-instructions", "1000")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"No space left" in err
    assert b"Traceback" not in err


def test_time_out__counts_wall_time(image: Path) -> None:
    begin = time.monotonic()
    process = start(image, ENDLESS, "--timeout", "0.5")
    process.communicate(timeout=60)
    assert process.returncode == 124
    assert time.monotonic() - begin > 0.5


@pytest.mark.parametrize("module", ["rich", "jsonschema", "asyncio", "vtx.bench", "vtx.cli.bench", "vtx.trace"])
def test_running_a_guest__does_not_load(image: Path, module: str) -> None:
    image.write_bytes(elf64({0x20_0000: b"\xf4"}))
    program = (
        "import sys; from vtx.cli.main import main; "
        f"status = main(['run', {str(image)!r}]); sys.exit(100 if {module!r} in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 125, done.stderr


def test_termination__ends_the_other_emulator_too(tmp_path: Path) -> None:
    other = tmp_path / "bochs"
    other.write_text("#!/bin/sh\nexec sleep 1000\n")
    other.chmod(0o755)
    command = [sys.executable, "-m", "vtx.cli", "fuzz", "entries", "--count", "1"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not children.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = children.read_text().split()
    while Path(f"/proc/{child}/comm").read_text() != "sleep\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # it is being watched by now
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (143, b"")
    assert not Path(f"/proc/{child}").exists()
