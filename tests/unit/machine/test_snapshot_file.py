"""Snapshots in files: what is read is what was written, and what cannot be read is one clear line."""

import contextlib
import struct
from pathlib import Path

import pytest
from flat_guest import EXIT_0, START, machine_with, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.machine import Machine
from vtx.snapshot import Snapshot, SnapshotError, file, load_snapshot, save_snapshot
from vtx.snapshot.codec import CodecError, decode, encode, shape
from vtx.vmx.saved import SavedVmcs
from vtx.x86.profile import profile_names
from vtx.x86.saved import SavedProcessor
from vtx.x86.state import Activity, CpuState

MIB = 1 << 20
CODE = START + wait_for(1) + EXIT_0


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    machine = machine_with(2, CODE)
    machine.run(max_instructions=30)
    return machine.snapshot()


@pytest.fixture(scope="module")
def data(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("snapshots") / "s"
    save_snapshot(snapshot, path)
    return path.read_bytes()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(SnapshotError) as caught:
        load_snapshot(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"cannot use the snapshot {str(path)!r}: ")
    return message.removeprefix(f"cannot use the snapshot {str(path)!r}: ")


def test_what_is_read_is_what_was_written(snapshot: Snapshot, tmp_path: Path) -> None:
    save_snapshot(snapshot, tmp_path / "s")
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]
    read = load_snapshot(tmp_path / "s")
    assert (read.configuration, read.run, read.cpus) == (snapshot.configuration, snapshot.run, snapshot.cpus)
    assert read.devices.states() == snapshot.devices.states()
    assert dict(read.ram.pages) == dict(snapshot.ram.pages)
    assert type(read.cpus[0].processor.state.activity) is Activity


def test_a_run_goes_on_from_a_file(snapshot: Snapshot, tmp_path: Path) -> None:
    save_snapshot(snapshot, tmp_path / "s")
    ends = []
    for each in (snapshot, load_snapshot(tmp_path / "s")):
        machine = Machine(memory=1 << 20, cpus=2)
        machine.restore(each)
        ends.append((machine.run(), [cpu.now() for cpu in machine.cpus]))
    assert ends[0] == ends[1]
    assert ends[0][0].exit_value == 0


def test_the_same_snapshot_is_the_same_file(snapshot: Snapshot, data: bytes, tmp_path: Path) -> None:
    save_snapshot(snapshot, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data


@pytest.mark.parametrize(
    "foreign", [b"", b"hello\n", b"\x7fELF" + bytes(1000), bytes(1000), b"vtx snapshot\n\n\n\n" * 9]
)
def test_foreign_files_are_refused(foreign: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path / "f", foreign) == "it is not a snapshot of vtx"


def test_truncated_files_are_refused_wherever_they_end(data: bytes, tmp_path: Path) -> None:
    for length in {*range(1, 140), *range(140, len(data), max(1, len(data) // 100)), len(data) - 1}:
        assert refusal(tmp_path / "t", data[:length]) == "it is truncated", length


def test_other_versions_are_refused(data: bytes, tmp_path: Path) -> None:
    other = data[:16] + struct.pack("<I", 7) + data[20:]
    assert refusal(tmp_path / "v", other) == "it has version 7, this vtx reads version 1"
    other = data[:20] + bytes(32) + data[52:]
    assert refusal(tmp_path / "v", other) == "it was written by another version of vtx"


def test_every_damaged_byte_is_noticed(data: bytes, tmp_path: Path) -> None:
    for offset in {*range(52, 110), *range(110, len(data), max(1, len(data) // 100))}:
        damaged = bytearray(data)
        damaged[offset] ^= 1
        assert refusal(tmp_path / "d", bytes(damaged)) in ("it is damaged", "it is truncated")
    assert refusal(tmp_path / "d", data + b"\0") == "it is damaged"


def test_files_that_cannot_be_opened(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"^cannot read the snapshot .*: No such file or directory$"):
        load_snapshot(tmp_path / "missing")
    with pytest.raises(SnapshotError, match=r"^cannot read the snapshot .*: Is a directory$"):
        load_snapshot(tmp_path)
    with pytest.raises(SnapshotError, match=r"^cannot write the snapshot .*: No such file or directory$"):
        save_snapshot(snapshot, tmp_path / "no" / "s")


def test_states_of_all_devices_are_known_to_the_format() -> None:
    machines = (Machine(memory=4 * MIB, cpus=2, profile=name) for name in profile_names())
    states = {type(state) for machine in machines for state in machine.board.states().values()}
    assert states == set(file.DEVICE_STATES)


def test_the_shape_of_the_state_has_every_record() -> None:
    text = shape(SavedProcessor)
    for name in (
        "CpuState(",
        "Segment(",
        "TlbTag(",
        "Translation(",
        "shadow: Shadow",
        "fpu: bytes",
        "pdptrs: list[int]",
    ):
        assert name in text
    assert shape(SavedVmcs) != shape(SavedProcessor)


# --- The codec ---


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 1 << 300),
        (int | None, None),
        (bytes, b"\0\xff"),
        (bytearray, bytearray(b"x")),
        (dict[int, str], {3: "c", 1: "a"}),
        (tuple[int, ...], (1, 2)),
        (tuple[int, bool], (1, True)),
        (frozenset[int], frozenset({5, 2})),
        (list[Activity], [Activity.HLT]),
        (CpuState, CpuState(rip=5, fpu=b"z")),
    ],
)
def test_values_come_back(kind: object, value: object) -> None:
    back = decode(kind, encode(value))
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, dict):
        assert list(back) == list(value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True),
        (int, 1.5),
        (int, "1"),
        (bool, 1),
        (bytes, "?"),
        (dict[int, int], [[1]]),
        (dict[int, int], {"1": 1}),
        (tuple[int, int], [1]),
        (Activity, 77),
        (CpuState, {}),
        (CpuState, [1]),
        (list[int], None),
    ],
)
def test_other_values_are_refused(kind: object, value: object) -> None:
    with pytest.raises(CodecError):
        decode(kind, value)


def test_what_is_no_data_cannot_be_saved() -> None:
    with pytest.raises(TypeError):
        encode(object())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(value=JSON)
def test_no_json_value_does_more_than_be_refused(value: object) -> None:
    for kind in (SavedProcessor, SavedVmcs, CpuState, tuple[int, ...], dict[int, bytes]):
        with contextlib.suppress(CodecError):
            decode(kind, value)
