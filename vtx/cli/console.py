"""The guest's serial port on standard input and output."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, Final

_CHUNK: Final = 4096
_READ_AHEAD: Final = 1 << 16
_PATIENCE_SECONDS: Final = 0.05


class SerialOutput:
    """Bytes of the guest to a binary stream, out at each newline and whenever `flush` is called.

    ``closed`` becomes True when nobody reads the other end any more; what the guest writes from then on is lost.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.closed = False

    def write(self, data: bytes) -> None:
        """Take some output."""
        if self.closed:
            return
        try:
            self._stream.write(data)
            if b"\n" in data:
                self._stream.flush()
        except OSError:
            self.closed = True

    def flush(self) -> None:
        """Pass on what waits for its newline."""
        if self.closed:
            return
        try:
            self._stream.flush()
        except OSError:
            self.closed = True


def whole_input() -> bytes | None:
    """All of standard input if it is a file, so that the same file gives the same run; None if it is anything else."""
    try:
        descriptor = sys.stdin.fileno()
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return sys.stdin.buffer.read()
    except (AttributeError, OSError, ValueError):  # there may be no standard input at all
        return b""
    return None


def pump_input(waiting: Callable[[], int], feed: Callable[[bytes], None]) -> None:
    """Start passing standard input to ``feed`` from a thread of its own, chunk by chunk, until it ends.

    ``waiting`` tells how many bytes the guest has not taken; the thread does not read far ahead of it.
    """
    descriptor = sys.stdin.fileno()

    def pump() -> None:
        while True:
            while waiting() > _READ_AHEAD:
                time.sleep(_PATIENCE_SECONDS)
            try:
                if _in_background(descriptor):
                    return
                data = os.read(descriptor, _CHUNK)
            except OSError:
                return
            if not data:
                return
            feed(data)

    threading.Thread(target=pump, name="serial input", daemon=True).start()


def _in_background(descriptor: int) -> bool:
    """Whether reading would stop the process, as the terminal belongs to another one."""
    return os.isatty(descriptor) and os.tcgetpgrp(descriptor) != os.getpgrp()
