"""Running one boot sector on vtx and on the other emulators, and timing what happens between its two marks.

Time is processor time of the emulator, sampled when a mark arrives on the serial port: what else the computer is doing
matters little to it, and firmware before the first mark not at all.
"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from attrs import frozen

from vtx.bench.programs import END, START

_FLOPPY_SIZE: Final = 1_474_560
_POLL_SECONDS: Final = 0.002
_DEBUGGER_STOPS: Final = 10_000  # more than there will be; a triple fault is one
_BOCHS_FILES: Final = Path("/usr/share/bochs")


class Unavailable(Exception):  # noqa: N818 - not an error: an emulator need not be there
    """The emulator is not installed or did not do what it should; the message says so in one line."""


@frozen
class Emulator:
    """An emulator by name; ``measure(sector, seconds)`` gives the processor time in seconds between the marks."""

    name: str
    measure: Callable[[bytes, float], float]


def on_vtx(sector: bytes, seconds: float) -> float:
    """Time on this process's own machine; Unavailable after ``seconds`` of wall time."""
    from vtx.machine import Machine  # noqa: PLC0415 - the other emulators do without

    marks: dict[bytes, float] = {}

    def mark(data: bytes) -> None:
        marks[data] = time.process_time()

    machine = Machine(serial=mark)
    machine.load(sector)
    timer = threading.Timer(seconds, machine.interrupt)
    timer.start()
    result = machine.run()
    timer.cancel()
    if result.exit_value != 0:
        raise Unavailable(result.message)
    return marks[END] - marks[START]


def on_qemu(sector: bytes, seconds: float) -> float:
    """Time on QEMU's translating engine (never KVM)."""
    with tempfile.TemporaryDirectory() as folder:
        serial = Path(folder, "serial")
        drive = f"format=raw,file={_disk(folder, sector)}"
        return _watch(start_qemu(serial, "-cpu", "max", "-drive", drive), serial, seconds)


def start_qemu(serial: Path, *options: str) -> subprocess.Popen[bytes]:
    """QEMU's translating engine with no devices but a serial port that goes to the file ``serial``."""
    command = [find_program("qemu-system-x86_64"), "-accel", "tcg", "-nodefaults", "-no-reboot", "-display", "none"]
    command += ["-serial", f"file:{serial}", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", *options]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def on_bochs(sector: bytes, seconds: float) -> float:
    """Time on Bochs as Debian builds it: with its debugger, and with a display that wants a terminal."""
    find_program("bochs")
    if not _BOCHS_FILES.exists():
        raise Unavailable("its BIOS is not installed")
    with tempfile.TemporaryDirectory() as folder:
        serial = Path(folder, "serial")
        process = start_bochs(
            Path(folder),
            serial,
            "megs: 32",
            f"romimage: file={_BOCHS_FILES}/BIOS-bochs-latest",
            f"vgaromimage: file={_BOCHS_FILES}/VGABIOS-lgpl-latest",
            "cpu: model=corei7_skylake_x",
            f"floppya: 1_44={_disk(folder, sector)}, status=inserted",
            "boot: floppy",
        )
        return _watch(process, serial, seconds)


def start_bochs(folder: Path, serial: Path, *configuration: str) -> subprocess.Popen[bytes]:
    """Bochs as Debian builds it: with its debugger, which is told to go on, and a display that wants a terminal.

    ``configuration`` are lines beside those for the serial port, which goes to the file ``serial``, and for messages,
    which nobody reads and of which a panic is the end. ``folder`` is for its files; Unavailable if it is not installed.
    """
    program = find_program("bochs")
    common = (
        f"com1: enabled=1, mode=file, dev={serial}",
        "display_library: term",
        "clock: sync=none",
        *("panic: action=fatal", "error: action=ignore", "info: action=ignore"),
        f"log: {folder}/log",
    )
    Path(folder, "rc").write_text("\n".join((*common, *configuration)) + "\n")
    Path(folder, "go").write_text("c\n" * _DEBUGGER_STOPS)
    master, slave = pty.openpty()
    command = [program, "-q", "-f", f"{folder}/rc", "-rc", f"{folder}/go"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=folder)
    os.close(slave)
    threading.Thread(target=_drain, args=(master,), daemon=True).start()
    return process


VTX: Final = Emulator("vtx", on_vtx)
OTHERS: Final = (Emulator("Bochs", on_bochs), Emulator("QEMU", on_qemu))


def find_program(name: str) -> str:
    """Where a program is; Unavailable if it is not installed."""
    program = shutil.which(name)
    if program is None:
        raise Unavailable(f"{name} is not installed")
    return program


def _disk(folder: str, sector: bytes) -> Path:
    path = Path(folder, "disk.img")
    path.write_bytes(sector.ljust(_FLOPPY_SIZE, b"\0"))
    return path


def _drain(descriptor: int) -> None:
    """Read and forget what is written to a pseudo-terminal, until nobody is left to; closes it."""
    with suppress(OSError):  # a pseudo-terminal without anybody on the other side is an error
        while os.read(descriptor, 4096):
            pass
    os.close(descriptor)


def processor_time(pid: int) -> float:
    """Processor time in seconds that another process has used.

    Spec: POSIX.1-2008, clock_getcpuclockid(); the numbers of these clocks are Linux's.
    """
    return time.clock_gettime(~pid << 3 | 2)


def _watch(process: subprocess.Popen[bytes], serial: Path, seconds: float) -> float:
    """Processor time of ``process`` between the marks in the file ``serial``; ends the process.

    It may end by itself right after the second mark: then all the time it used is the time at that mark.
    """
    deadline = time.monotonic() + seconds
    start: float | None = None
    try:
        while time.monotonic() < deadline:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
            now = usage.ru_utime + usage.ru_stime if pid else processor_time(process.pid)
            written = serial.read_bytes() if serial.exists() else b""
            if start is None and START in written:
                start = now
            if END in written and start is not None:
                return now - start
            if pid:
                raise Unavailable(f"ended with status {process.returncode} before the measurement was over")
            time.sleep(_POLL_SECONDS)
        raise Unavailable(f"took longer than {seconds:g} seconds")
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
