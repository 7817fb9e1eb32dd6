"""Firmware configuration: the machine's facts (RAM size, CPU count, files) behind a selector and a data port.

Offset 0 is the 16-bit selector (write only), offset 1 the 8-bit data port. Selecting an item rewinds it; each read of
the data port yields the next byte, then zeros; an item that does not exist has no bytes. The DMA interface is absent,
and the identification item says so.

Threats: the guest chooses the selector and how often it reads. Items are fixed before the run and read only, the
position stops at the end of the item, so nothing grows and nothing of the host is reachable.

Spec: QEMU documentation, "QEMU Firmware Configuration (fw_cfg) Device".
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping

from attrs import define

FIRST_FILE_SELECTOR = 0x20
FILE_NAME_SIZE = 56


class Item(enum.IntEnum):
    """Selectors with a fixed meaning."""

    SIGNATURE = 0x00
    ID = 0x01
    RAM_SIZE = 0x03
    NB_CPUS = 0x05
    INITRD_SIZE = 0x0B
    MAX_CPUS = 0x0F
    INITRD_DATA = 0x12
    CMDLINE_SIZE = 0x14
    CMDLINE_DATA = 0x15
    FILE_DIR = 0x19


ID_TRADITIONAL = 1 << 0


def standard_items(ram_size: int, cpus: int, command_line: bytes = b"", initrd: bytes = b"") -> dict[int, bytes]:
    """The items every machine has; ``ram_size`` in bytes, numbers little-endian as the interface has them."""
    terminated = command_line + b"\0"
    return {
        Item.RAM_SIZE: struct.pack("<Q", ram_size),
        Item.NB_CPUS: struct.pack("<H", cpus),
        Item.MAX_CPUS: struct.pack("<H", cpus),
        Item.INITRD_SIZE: struct.pack("<I", len(initrd)),
        Item.INITRD_DATA: initrd,
        Item.CMDLINE_SIZE: struct.pack("<I", len(terminated)),
        Item.CMDLINE_DATA: terminated,
    }


def _directory(files: Mapping[str, bytes]) -> bytes:
    """The file directory: a count, then size, selector and name of each file in name order; big-endian."""
    directory = struct.pack(">I", len(files))
    for selector, name in enumerate(sorted(files), FIRST_FILE_SELECTOR):
        encoded = name.encode()
        if len(encoded) >= FILE_NAME_SIZE:
            raise ValueError(f"fw_cfg file name longer than {FILE_NAME_SIZE - 1} bytes: {name}")
        directory += struct.pack(f">IHH{FILE_NAME_SIZE}s", len(files[name]), selector, 0, encoded)
    return directory


@define(slots=True)
class FwCfgState:
    """The selected item and the position of the next byte in it."""

    selector: int = 0
    position: int = 0


class FwCfg:
    """The device; ``items`` maps selectors to contents, ``files`` names to contents."""

    def __init__(self, items: Mapping[int, bytes], files: Mapping[str, bytes] | None = None) -> None:
        files = files or {}
        self.state = FwCfgState()
        self._items: dict[int, bytes] = {
            Item.SIGNATURE: b"QEMU",
            Item.ID: struct.pack("<I", ID_TRADITIONAL),
            Item.FILE_DIR: _directory(files),
            **items,
        }
        for selector, name in enumerate(sorted(files), FIRST_FILE_SELECTOR):
            self._items[selector] = files[name]

    def port_read(self, offset: int, size: int) -> int:
        """The next byte of the item from the data port; ones from the write-only selector or a wider access."""
        if offset != 1 or size != 1:
            return (1 << (8 * size)) - 1
        content = self._items.get(self.state.selector, b"")
        if self.state.position >= len(content):
            return 0
        self.state.position += 1
        return content[self.state.position - 1]

    def port_write(self, offset: int, size: int, value: int) -> None:
        """Select an item by a 16-bit write to offset 0; every other write is ignored."""
        if offset == 0 and size == 2:
            self.state = FwCfgState(selector=value & 0xFFFF)
