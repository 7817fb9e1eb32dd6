"""A local APIC behind the MSR file of a processor."""

from apic_machine import BASE, BSP, EN, EXTD, TIMER, Machine
from attrs import evolve

from vtx.devices.apic_msrs import apic_profile, bind_local_apic
from vtx.x86.msrs import MsrFile
from vtx.x86.profile import load_profile

SKYLAKE = load_profile("skylake-server")


def bound() -> tuple[MsrFile, Machine]:
    machine = Machine()
    msrs = MsrFile(SKYLAKE)
    bind_local_apic(msrs, machine.apic)
    return msrs, machine


def test_apic_base_is_the_apics() -> None:
    msrs, machine = bound()
    assert msrs.read(0x1B) == BASE | BSP | EN
    assert not msrs.write(0x1B, BASE | EXTD)
    assert not msrs.write(0x1B, BASE | EN | 1)
    assert msrs.write(0x1B, 0xFED4_0000 | BSP | EN)
    assert machine.apic.page_address == 0xFED4_0000


def test_x2apic_registers_exist_in_x2apic_mode_only() -> None:
    msrs, _ = bound()
    assert msrs.read(0x803) is None
    assert not msrs.write(0x808, 0x50)
    assert msrs.write(0x1B, BASE | BSP | EN | EXTD)
    assert msrs.read(0x803) == 0x0106_0015
    assert msrs.write(0x808, 0x50)
    assert msrs.read(0x808) == 0x50
    assert msrs.read(0x80B) is None
    assert not msrs.write(0x808, 0x100)


def test_tsc_deadline() -> None:
    msrs, machine = bound()
    machine.write(TIMER, 2 << 17 | 0x40)
    assert msrs.write(0x6E0, 100)
    assert msrs.read(0x6E0) == 100
    machine.wait(100)
    assert msrs.read(0x6E0) == 0
    assert machine.serve() == 0x40


def test_profile_of_a_processor() -> None:
    apic = apic_profile(SKYLAKE, apic_id=3, bootstrap=False)
    assert (apic.apic_id, apic.bootstrap, apic.x2apic, apic.tsc_deadline) == (3, False, True, True)
    assert apic.max_physical_address == 46
    slow_crystal = evolve(SKYLAKE, tsc_frequency=2_000_000_000, crystal_frequency=25_000_000)
    assert apic_profile(slow_crystal, 0, True).timer_input_ticks == 80
    assert apic_profile(evolve(slow_crystal, highest_basic_leaf=0xD), 0, True).timer_input_ticks == 1
