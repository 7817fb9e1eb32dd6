"""A bundled guest that runs states, on other emulators: Bochs and QEMU as Debian builds them."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vtx.bench.emulators import start_bochs, start_qemu
from vtx.fuzz.exchange import LAST_LINE
from vtx.fuzz.on_vtx import MEMORY, booted
from vtx.fuzz.rom import rom_of
from vtx.x86.profile import Profile

_POLL_SECONDS: Final = 0.02
_SECONDS_WITHOUT_A_LINE: Final = 5.0

Starter = Callable[[Path, Path, Path], "subprocess.Popen[bytes]"]


def on_bochs(processor: Sequence[str], profile: Profile, image: bytes, module: bytes) -> str:
    """What the guest ``image`` prints for a ``module``; ``processor`` are lines of Bochs's configuration.

    ``profile`` is that of the machine whose memory is taken. Unavailable if Bochs is not installed, ValueError if the
    module is too long for a ROM.
    """

    def start(folder: Path, rom: Path, serial: Path) -> subprocess.Popen[bytes]:
        return start_bochs(folder, serial, f"megs: {MEMORY >> 20}", f"romimage: file={rom}", *processor)

    return _printed(start, profile, image, module)


def on_qemu(model: str, profile: Profile, image: bytes, module: bytes) -> str:
    """The same on QEMU's translating engine, never KVM; ``model`` is what its option -cpu is given."""

    def start(folder: Path, rom: Path, serial: Path) -> subprocess.Popen[bytes]:
        return start_qemu(serial, "-m", f"{MEMORY >> 20}", "-cpu", model, "-bios", str(rom))

    return _printed(start, profile, image, module)


def _printed(start: Starter, profile: Profile, image: bytes, module: bytes) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rom, serial = folder / "rom", folder / "serial"
        rom.write_bytes(rom_of(booted(profile, image, module, [])))
        process = start(folder, rom, serial)
        try:
            return watch(process, serial)
        finally:
            process.kill()
            process.wait()


def watch(process: subprocess.Popen[bytes], serial: Path) -> str:
    """What is printed to the file ``serial`` until the last line comes, or none for a while, or the process has ended.

    A state can reset the other machine, and the guest begins anew, for ever: its second first line is the end, too.
    """
    printed, deadline = b"", time.monotonic() + _SECONDS_WITHOUT_A_LINE
    while True:
        ended = process.poll() is not None
        if more := _read_from(serial, len(printed)):
            deadline = time.monotonic() + _SECONDS_WITHOUT_A_LINE
            known = len(printed)
            printed += more
            first = printed[: printed.find(b"\n") + 1]
            again = printed.find(b"\n" + first, max(known - len(first), 0)) if first else -1
            if again >= 0:
                return printed[: again + 1].decode("latin-1")
            if printed.rstrip().endswith(LAST_LINE.encode()):
                return printed.decode("latin-1")
        elif ended or time.monotonic() > deadline:
            return printed.decode("latin-1")
        time.sleep(_POLL_SECONDS)


def _read_from(serial: Path, start: int) -> bytes:
    if not serial.exists():
        return b""
    with serial.open("rb") as file:
        file.seek(start)
        return file.read()
