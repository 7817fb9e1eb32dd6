"""The interrupt lines a guest drives itself."""

from functools import partial

from vtx.devices.interrupt_lines import InterruptTestLines


def test_writes_drive_the_line_of_the_port() -> None:
    driven: list[tuple[int, bool]] = []

    def drive(number: int, level: bool) -> None:
        driven.append((number, level))

    device = InterruptTestLines([partial(drive, number) for number in range(16)])
    device.port_write(11, 4, 1)
    device.port_write(11, 1, 0x100)
    device.port_write(3, 2, 0x8000)
    device.port_write(16, 1, 1)
    assert driven == [(11, True), (11, False), (3, True)]
    assert device.port_read(11, 4) == 0
