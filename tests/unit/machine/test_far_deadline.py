"""A timer of a device that is due beyond the 64 bits in which the engine counts."""

from __future__ import annotations

import pytest
from flat_guest import EXIT_0, machine_with, store

from vtx.machine import StopReason

CPUID = bytes.fromhex("0fa2")
HPET = 0xFED0_0000
CONFIGURATION, TIMER_0, COMPARATOR_0 = HPET + 0x10, HPET + 0x100, HPET + 0x108
ENABLE, LEGACY_REPLACEMENT, INTERRUPT = 1, 1 << 1, 1 << 2


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_comparator_at_the_end_of_its_range(cpus: int) -> None:
    """At 10 ns a pulse, 2 to the 64th pulses are 5,845 years."""
    arm = store(COMPARATOR_0, 0xFFFF_FFFF) + store(COMPARATOR_0 + 4, 0xFFFF_FFFF) + store(TIMER_0, INTERRUPT)
    machine = machine_with(cpus, arm + store(CONFIGURATION, ENABLE | LEGACY_REPLACEMENT) + CPUID * 50 + EXIT_0)
    machine.cpu.socket.apic.set_virtual_wire_mode()
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)):  # the 8259s hear line 0
        machine.board.port_write(port, 1, value)
    result = machine.run(max_instructions=1 << 80)
    assert (result.reason, result.exit_value) == (StopReason.DEBUG_EXIT, 0)
    assert (machine.cpu.platform.next_deadline() or 0) > (1 << 64) - 1
