"""The machine that a job runs on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vtx.machine import Machine
from vtx.x86.profile import Profile


def most_processors() -> int:
    """The number of processors that a machine can have."""
    return 64 if "cpus" in inspect.signature(Machine).parameters else 1


def new_machine(profile: Profile, memory: int, processors: int, serial: Callable[[bytes], None]) -> Machine:
    """A machine with ``memory`` bytes of RAM that gives what its COM1 sends to ``serial``."""
    more: dict[str, Any] = {"cpus": processors} if processors > 1 else {}
    return Machine(profile=profile, memory=memory, serial=serial, **more)
