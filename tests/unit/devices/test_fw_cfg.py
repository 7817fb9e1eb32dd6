"""Firmware configuration as a guest reads it."""

import struct

import pytest

from vtx.devices.fw_cfg import FwCfg, standard_items


def read_item(device: FwCfg, selector: int, size: int) -> bytes:
    device.port_write(0, 2, selector)
    return bytes(device.port_read(1, 1) for _ in range(size))


@pytest.fixture
def device() -> FwCfg:
    items = standard_items(ram_size=0x1_8000_0000, cpus=2, command_line=b"a b", initrd=b"DATA")
    return FwCfg(items, {"opt/z": b"last", "etc/a": b"first!"})


@pytest.mark.parametrize(
    ("selector", "content"),
    [
        (0x00, b"QEMU"),
        (0x01, b"\1\0\0\0"),
        (0x03, struct.pack("<Q", 0x1_8000_0000)),
        (0x05, b"\2\0"),
        (0x0B, b"\4\0\0\0"),
        (0x0F, b"\2\0"),
        (0x11, bytes(8)),
        (0x12, b"DATA"),
        (0x15, b"a b\0"),
    ],
)
def test_items(device: FwCfg, selector: int, content: bytes) -> None:
    assert read_item(device, selector, len(content)) == content


def test_reads_zeros_past_the_end_and_selection_rewinds(device: FwCfg) -> None:
    assert read_item(device, 0x00, 7) == b"QEMU\0\0\0"
    assert read_item(device, 0x00, 4) == b"QEMU"


def test_unknown_item_reads_zeros(device: FwCfg) -> None:
    assert read_item(device, 0xBEEF, 4) == bytes(4)


def test_directory_leads_to_files(device: FwCfg) -> None:
    assert read_item(device, 0x19, 4) == struct.pack(">I", 2)
    found = {}
    device.port_write(0, 2, 0x19)
    raw = bytes(device.port_read(1, 1) for _ in range(4 + 2 * 64))
    for index in range(2):
        size, selector, _, name = struct.unpack_from(">IHH56s", raw, 4 + 64 * index)
        found[name.rstrip(b"\0").decode()] = read_item(device, selector, size)
    assert found == {"etc/a": b"first!", "opt/z": b"last"}


def test_only_a_16_bit_write_selects(device: FwCfg) -> None:
    device.port_write(0, 2, 0x03)
    device.port_write(0, 1, 0x00)
    device.port_write(1, 1, 0x00)
    assert device.port_read(1, 1) == 0x00
    assert device.state.selector == 0x03


def test_selector_is_write_only(device: FwCfg) -> None:
    assert device.port_read(0, 2) == 0xFFFF


def test_long_file_name_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 55 bytes"):
        FwCfg({}, {"x" * 56: b""})
