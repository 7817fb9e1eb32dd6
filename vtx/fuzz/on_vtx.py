"""The harness on this model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from vtx.boot.image import Module
from vtx.fuzz.exchange import LAST_LINE
from vtx.machine import Machine
from vtx.x86.profile import Profile

MEMORY: Final = 128 << 20
_SECONDS_WITHOUT_OUTPUT: Final = 20.0


def booted(profile: Profile, image: bytes, module: bytes, output: list[bytes]) -> Machine:
    """A machine about to run the harness; ``output`` collects what it prints."""
    machine = Machine(profile=profile, memory=MEMORY, serial=output.append)
    machine.load(image, modules=[Module(module)])
    return machine


def on_vtx(profile: Profile, image: bytes, module: bytes) -> str:
    """What the harness ``image`` prints for a ``module``; if it does not come to its end, the last line says why."""
    output: list[bytes] = []
    machine = booted(profile, image, module, output)
    with _interrupted_if_silent(machine, output):
        result = machine.run()
    text = b"".join(output).decode("latin-1")
    return text if text.rstrip().endswith(LAST_LINE) else f"{text}\n{result.message}\n"


@contextmanager
def _interrupted_if_silent(machine: Machine, output: list[bytes]) -> Iterator[None]:
    done = threading.Event()

    def watch() -> None:
        seen = -1
        while not done.wait(_SECONDS_WITHOUT_OUTPUT):
            if len(output) == seen:
                machine.interrupt()
            seen = len(output)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
