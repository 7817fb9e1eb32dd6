"""What Unicorn sees at physical addresses: RAM shared with the model, devices, and private frames of the engine.

Guest memory is mapped where the guest has it, without a copy; each device window calls back. A few frames are beyond
every address a guest can use: what stands for nothing at all, for ROM, and for the processor's own page.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, Final

from vtx.addresses import PAGE_SHIFT, PAGE_SIZE
from vtx.engine import native
from vtx.x86.memory import PhysicalMemory

# Private frames, beyond every guest-visible physical address; a guest reaches them only through the grants below.
PRIVATE: Final = 1 << 45
VMCB_FRAME: Final = PRIVATE  # the library reads its MSR permission map through it
PERMISSION_MAP: Final = PRIVATE + 0x1000
PERMISSION_MAP_SIZE: Final = 0x3000
VOID_CODE: Final = PRIVATE + 0x4000  # what is fetched where there is no RAM: all ones
VOID_DATA: Final = PRIVATE + 0x5000  # what is read there: all ones; writes vanish
OWN_PAGE: Final = PRIVATE + 0x6000  # the processor's own device, wherever the processor has put it
ROM_FRAME: Final = PRIVATE + 0x7000
_VMCB_MSRPM_BASE: Final = 0x48

Read = Callable[[int, int], int]
Write = Callable[[int, int, int], None]


def _write(handle: ctypes.c_void_p, address: int, data: bytes) -> None:
    status = native.library.uc_mem_write(handle, ctypes.c_uint64(address), data, len(data))
    native.check(status, "a write")


def _reserve(handle: ctypes.c_void_p, start: int, size: int) -> None:
    native.check(native.library.uc_mem_map(handle, start, size, native.PROT_ALL), "memory")


def map_memory(
    handle: ctypes.c_void_p,
    memory: PhysicalMemory,
    on_read: Callable[[Read, int, int], int],
    on_write: Callable[[Write, int, int, int], None],
    keep: list[Any],
) -> int:
    """Map everything; the host address of RAM.

    ``on_read`` and ``on_write`` make the accesses to devices, given the device's function and what to call it with. The
    callbacks are put into ``keep``, which must live as long as ``handle``.
    """

    def map_device(start: int, size: int, read: Read, write: Write) -> None:
        callbacks = (
            native.MmioReadCallback(lambda handle, offset, length, data: on_read(read, offset, length)),
            native.MmioWriteCallback(
                lambda handle, offset, length, value, data: on_write(write, offset, length, value)
            ),
        )
        keep.append(callbacks)
        pointers = [ctypes.cast(callback, ctypes.c_void_p) for callback in callbacks]
        place = ctypes.c_uint64(start), ctypes.c_uint64(size)
        status = native.library.uc_mmio_map(handle, *place, pointers[0], None, pointers[1], None)
        native.check(status, "mapping a device")

    base = ctypes.addressof(ctypes.c_char.from_buffer(memory.backing))
    for ram in memory.ram:
        start, pointer = ctypes.c_uint64(ram.start), ctypes.c_void_p(base + ram.offset)
        native.check(
            native.library.uc_mem_map_ptr(handle, start, ctypes.c_uint64(ram.size), native.PROT_ALL, pointer),
            "mapping RAM",
        )
    for window in memory.windows:
        map_device(window.start, window.size, window.device.mmio_read, window.device.mmio_write)
    _reserve(handle, PRIVATE, VOID_DATA - PRIVATE)
    _write(handle, VMCB_FRAME + _VMCB_MSRPM_BASE, struct.pack("<Q", PERMISSION_MAP))
    _write(handle, PERMISSION_MAP, b"\xff" * (PERMISSION_MAP_SIZE + PAGE_SIZE))  # VOID_CODE included
    _reserve(handle, ROM_FRAME, PAGE_SIZE)
    _write(handle, ROM_FRAME, memory.rom)
    map_device(OWN_PAGE, PAGE_SIZE, memory.own_device.mmio_read, memory.own_device.mmio_write)
    map_device(VOID_DATA, PAGE_SIZE, lambda offset, size: (1 << 8 * size) - 1, lambda offset, size, value: None)
    return base


class SlowStores:
    """Frames at each store to which the library looks for translations, even while they must not be executed.

    It does so where there is a hook of some kinds. The one chosen is for fetches from memory that is mapped without
    permission to execute: there is none, so it is never called.
    """

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self._handle = handle
        self._frames: set[int] = set()
        self._callback = native.ProtectionCallback(lambda *_: False)

    def at(self, frame: int) -> None:
        """Make the stores to ``frame`` slow, for ever."""
        if frame not in self._frames:
            self._frames.add(frame)
            where = frame << PAGE_SHIFT
            native.add_hook(self._handle, native.HOOK_FETCH_PROTECTED, self._callback, at=where, size=PAGE_SIZE)
