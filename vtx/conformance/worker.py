"""The process that runs one test: a job as one line of JSON on standard input, the serial port on standard output.

The last line on standard error is how it ended, as JSON. When standard input ends, whoever wanted the result is gone,
and so is this process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Final

from vtx.boot.image import BootError, Module
from vtx.machine import Machine
from vtx.x86.profile import build_profile

_BUFFER: Final = 1 << 12


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run the machine that ``job`` describes to its end; how that was."""
    output = sys.stdout.buffer

    def serial(data: bytes) -> None:
        output.write(data)
        if b"\n" in data:
            output.flush()

    profile = build_profile(job["processor"], job["profile"])
    try:
        machine = Machine(profile=profile, memory=job["memory"], cpus=job["processors"], serial=serial)
        modules = [Module(f"{job['environment']}\n".encode())] if job["environment"] else []
        machine.load(Path(job["image"]).read_bytes(), command_line=job["command_line"], modules=modules)
    except BootError as error:
        return {"died": f"cannot boot: {error}"}
    except OSError as error:
        return {"died": f"cannot start: {error.strerror}"}
    result = machine.run()
    output.flush()
    return {
        "exit_value": result.exit_value,
        "message": result.message,
        "instructions": result.instructions,
        "ticks": result.ticks,
    }


def _watch_input() -> None:
    while os.read(sys.stdin.fileno(), _BUFFER):
        pass
    os._exit(1)


def main() -> None:
    """Run the job on standard input."""
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(sys.stdin.fileno(), 1)
        if not data:
            return
        line += data
    threading.Thread(target=_watch_input, name="input", daemon=True).start()
    ended = run_job(json.loads(line))
    print(json.dumps(ended), file=sys.stderr)  # noqa: T201 - this is how the result is handed over


if __name__ == "__main__":
    main()
