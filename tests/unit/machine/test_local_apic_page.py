"""Where a processor finds its local APIC: at the address in its own IA32_APIC_BASE, and nowhere else."""

import pytest
from flat_guest import COUNTER, EXIT_0, SOFTWARE_ENABLE, START, machine_with, store, wait_for

from vtx.machine import Machine

DEFAULT, ELSEWHERE, OVER_RAM = 0xFEE0_0000, 0xFED4_0000, 0x4_0000
EN, EXTD, BSP = 1 << 11, 1 << 10, 1 << 8
VERSION = 0x30
RESULT = 0x9100


def write_apic_base(value: int) -> bytes:
    """MOV ECX, 1BH; MOV EAX, value; XOR EDX, EDX; WRMSR."""
    return b"\xb9\x1b\x00\x00\x00\xb8" + value.to_bytes(4, "little") + b"\x31\xd2\x0f\x30"


def copy(source: int, target: int) -> bytes:
    """MOV EAX, [source]; MOV [target], EAX."""
    return b"\xa1" + source.to_bytes(4, "little") + b"\xa3" + target.to_bytes(4, "little")


def run(machine: Machine) -> None:
    assert machine.run(max_instructions=100_000).exit_value == 0


def results(machine: Machine, count: int) -> list[int]:
    return [machine.memory.read_u32(RESULT + 4 * number) for number in range(count)]


@pytest.mark.parametrize("address", [ELSEWHERE, OVER_RAM])
def test_page_follows_the_base(address: int) -> None:
    code = copy(DEFAULT + VERSION, RESULT) + write_apic_base(address | EN | BSP)
    code += copy(address + VERSION, RESULT + 4) + copy(DEFAULT + VERSION, RESULT + 8)
    code += write_apic_base(DEFAULT | EN | BSP) + copy(DEFAULT + VERSION, RESULT + 12)
    machine = machine_with(1, code + EXIT_0)
    run(machine)
    version = machine.cpu.socket.apic.profile.version_register
    assert results(machine, 4) == [version, version, 0xFFFF_FFFF, version]


def test_page_over_ram_hides_it() -> None:
    store_inside = store(OVER_RAM + 0x80, 0x20)  # the task priority
    code = store_inside + write_apic_base(OVER_RAM | EN | BSP) + store(OVER_RAM + 0x80, 0x35)
    code += write_apic_base(DEFAULT | EN | BSP) + copy(OVER_RAM + 0x80, RESULT) + copy(DEFAULT + 0x80, RESULT + 4)
    machine = machine_with(1, code + EXIT_0)
    run(machine)
    assert results(machine, 2) == [0x20, 0x35]


@pytest.mark.parametrize("mode", [0, EN | EXTD])
def test_no_page_when_disabled_or_in_x2apic_mode(mode: int) -> None:
    code = write_apic_base(DEFAULT | mode | BSP) + store(DEFAULT + 0x80, 0x50) + copy(DEFAULT + 0x80, RESULT)
    machine = machine_with(1, code + EXIT_0)
    run(machine)
    assert results(machine, 1) == [0xFFFF_FFFF]
    assert machine.cpu.socket.apic.cr8 == 0


def test_each_processor_has_its_own_base() -> None:
    """Processor 0 moves its page over the counter that processor 1 raises: only processor 0 sees the APIC there."""
    page = COUNTER & ~0xFFF
    move = write_apic_base(page | EN | BSP) + copy(page + VERSION, 0x5000)
    machine = machine_with(2, START + move + write_apic_base(DEFAULT | EN | BSP) + wait_for(1) + EXIT_0)
    run(machine)
    assert machine.memory.read_u32(0x5000) == machine.cpu.socket.apic.profile.version_register
    assert machine.memory.read_u16(COUNTER) == 1


def test_model_finds_the_page_too() -> None:
    machine = machine_with(2, SOFTWARE_ENABLE + write_apic_base(ELSEWHERE | EN | BSP) + EXIT_0)
    run(machine)
    memory, version = machine.memory, machine.cpu.socket.apic.profile.version_register
    assert memory.read_u32(ELSEWHERE + VERSION) == version
    assert memory.read_u32(DEFAULT + VERSION) == 0xFFFF_FFFF
    machine.board.select(machine.cpus[1].socket)
    assert memory.read_u32(ELSEWHERE + VERSION) == 0xFFFF_FFFF
    assert memory.read_u32(DEFAULT + VERSION) == version
