"""The storage that conformance suites use for device accesses."""

import pytest

from vtx.devices.test_storage import MEMORY_SIZE, TestMemory, TestPorts


def test_ports__hold_bytes_read_together_or_apart():
    ports = TestPorts()
    ports.port_write(0, 4, 0x4433_2211)
    assert [ports.port_read(offset, 1) for offset in range(4)] == [0x11, 0x22, 0x33, 0x44]
    assert ports.port_read(1, 2) == 0x3322


def test_ports__drop_what_lies_beyond_the_last():
    ports = TestPorts()
    ports.port_write(3, 4, 0x4433_2211)
    assert ports.port_read(0, 4) == 0x1100_0000
    assert ports.port_read(3, 2) == 0x11


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_memory__remembers(size):
    memory = TestMemory()
    value = 0x8877_6655_4433_2211 & ((1 << 8 * size) - 1)
    memory.mmio_write(MEMORY_SIZE - size, size, value)
    assert memory.mmio_read(MEMORY_SIZE - size, size) == value
    assert memory.mmio_read(MEMORY_SIZE - size - 1, 1) == 0
