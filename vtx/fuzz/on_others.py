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
            return _watch(process, serial)
        finally:
            process.kill()
            process.wait()


def _watch(process: subprocess.Popen[bytes], serial: Path) -> str:
    """What has been printed when the last line comes, or none for a while, or the process has ended."""
    size, deadline = -1, time.monotonic() + _SECONDS_WITHOUT_A_LINE
    while True:
        ended = process.poll() is not None
        now = serial.stat().st_size if serial.exists() else 0
        if now != size:
            size, deadline = now, time.monotonic() + _SECONDS_WITHOUT_A_LINE
            text = serial.read_text("latin-1") if now else ""
            if text.rstrip().endswith(LAST_LINE):
                return text
        if ended or time.monotonic() > deadline:
            return serial.read_text("latin-1") if serial.exists() else ""
        time.sleep(_POLL_SECONDS)
