"""Snapshots in files: written whole or not at all, and read or refused with one line.

A file is a header and two compressed parts: the state as JSON (see `vtx.snapshot.codec`), and the pages of RAM that are
not zero, their numbers first. The header has the version of this format and a digest of the shape of everything in the
state, so a file that was written by a program with other records is told apart without anybody counting versions.

Threats: a file may be foreign, cut off or damaged, which gives one `SnapshotError`; loading it executes nothing and
builds nothing but records of the known types. It is not proof against forgery: a state that no machine can get into may
make the model fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from vmcs.fields import FIELDS
from vtx.addresses import PAGE_SIZE
from vtx.board import SavedDevices
from vtx.devices.acpi_pm import AcpiPmState
from vtx.devices.apic_core import LocalApicState
from vtx.devices.apm_control import ApmState
from vtx.devices.fw_cfg import FwCfgState
from vtx.devices.hpet import HpetState
from vtx.devices.interrupt_routing import LinesState, SwitchState
from vtx.devices.io_apic import IoApicState
from vtx.devices.keyboard_controller import KeyboardControllerState
from vtx.devices.pci_config import PciConfigState
from vtx.devices.performance_counters import PerformanceState
from vtx.devices.pic import PicState
from vtx.devices.pit import ChannelState, PitState, SystemControlState
from vtx.devices.post_port import PostPortState
from vtx.devices.reset_ports import LatchState
from vtx.devices.rtc import RtcState
from vtx.devices.uart import UartState
from vtx.snapshot.codec import CodecError, decode, encode, shape
from vtx.snapshot.model import Configuration, SavedCpu, SavedRun, Snapshot, SnapshotError
from vtx.x86.memory_image import MemoryImage

MAGIC: Final = b"vtx snapshot\r\n\x1a\n"
VERSION: Final = 1
HEADER: Final = struct.Struct("<16sI32s2Q32s")  # magic, version, shape, sizes of the parts, digest of both
PAGE_NUMBER: Final = struct.Struct("<Q")

DEVICE_STATES: Final[tuple[type, ...]] = (
    AcpiPmState,
    ApmState,
    ChannelState,
    FwCfgState,
    HpetState,
    IoApicState,
    KeyboardControllerState,
    LatchState,
    LinesState,
    LocalApicState,
    PciConfigState,
    PerformanceState,
    PicState,
    PitState,
    PostPortState,
    RtcState,
    SwitchState,
    SystemControlState,
    UartState,
    bytearray,
)
_BY_NAME: Final = {each.__name__: each for each in DEVICE_STATES}


@frozen
class _State:
    """Everything of a snapshot but the contents of RAM."""

    configuration: Configuration
    run: SavedRun
    cpus: tuple[SavedCpu, ...]


def save_snapshot(snapshot: Snapshot, path: str | Path) -> None:
    """Write ``snapshot`` to a file, which replaces what was there when it is complete.

    Raises `SnapshotError` if it cannot be written.
    """
    state = encode(_State(snapshot.configuration, snapshot.run, snapshot.cpus))
    devices = {name: [_name_of(each), encode(each)] for name, each in snapshot.devices.states().items()}
    numbers = sorted(snapshot.ram.pages)
    pages = b"".join([*map(PAGE_NUMBER.pack, numbers), *(snapshot.ram.pages[number] for number in numbers)])
    parts = [zlib.compress(json.dumps([state, devices]).encode("ascii"), 6), zlib.compress(pages, 1)]
    digest = hashlib.sha256(b"".join(parts)).digest()
    header = HEADER.pack(MAGIC, VERSION, _shape(), len(parts[0]), len(parts[1]), digest)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(b"".join((header, *parts)))
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SnapshotError(f"cannot write the snapshot {str(path)!r}: {error.strerror}") from None


def load_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot from a file; `SnapshotError` says in one line why that is not possible."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SnapshotError(f"cannot read the snapshot {str(path)!r}: {why}") from None
    try:
        return _parse(data)
    except SnapshotError as error:
        raise SnapshotError(f"cannot use the snapshot {str(path)!r}: {error}") from None


def _parse(data: bytes) -> Snapshot:
    if not data or data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise SnapshotError("it is not a snapshot of vtx")
    if len(data) < HEADER.size:
        raise SnapshotError("it is truncated")
    _, version, shape_digest, state_size, pages_size, digest = HEADER.unpack_from(data)
    if version != VERSION:
        raise SnapshotError(f"it has version {version}, this vtx reads version {VERSION}")
    if shape_digest != _shape():
        raise SnapshotError("it was written by another version of vtx")
    rest = memoryview(data)[HEADER.size :]
    if len(rest) < state_size + pages_size:
        raise SnapshotError("it is truncated")
    if len(rest) > state_size + pages_size or hashlib.sha256(rest).digest() != digest:
        raise SnapshotError("it is damaged")
    try:
        state, devices = json.loads(zlib.decompress(rest[:state_size]))
        known = decode(_State, state)
        ram = _pages(zlib.decompress(rest[state_size:]))
        return Snapshot(known.configuration, known.run, known.cpus, _devices(devices), ram)
    except (zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SnapshotError(f"it is damaged ({error})") from None


def _name_of(state: object) -> str:
    if type(state) not in DEVICE_STATES:
        raise TypeError(f"{type(state).__name__} is missing in DEVICE_STATES")
    return type(state).__name__


def _pages(data: bytes) -> MemoryImage:
    count, rest = divmod(len(data), PAGE_NUMBER.size + PAGE_SIZE)
    if rest:
        raise CodecError("the pages of RAM are not whole")
    start = count * PAGE_NUMBER.size
    numbers = struct.unpack_from(f"<{count}Q", data)
    contents = (data[at : at + PAGE_SIZE] for at in range(start, len(data), PAGE_SIZE))
    return MemoryImage(dict(zip(numbers, contents, strict=True)))


def _devices(values: Any) -> SavedDevices:
    return SavedDevices.of({name: decode(_BY_NAME[kind], value) for name, (kind, value) in values.items()})


def _shape() -> bytes:
    """Digest of the structure of everything that is in the state."""
    shapes = [shape(_State), *map(shape, DEVICE_STATES), *(each.name for each in FIELDS)]
    return hashlib.sha256("\n".join(shapes).encode()).digest()
