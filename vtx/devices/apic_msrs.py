"""The MSRs through which software reaches a local APIC, and what a local APIC takes from a CPU profile.

Spec: SDM Vol. 4, "Architectural MSRs"; Vol. 3, "x2APIC Register Address Space".
"""

from __future__ import annotations

from vtx.devices.apic_core import ApicProfile
from vtx.devices.local_apic import LocalApic
from vtx.x86.msr_table import IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC_MSRS
from vtx.x86.msrs import MsrFile
from vtx.x86.profile import Profile

TSC_AND_CRYSTAL_LEAF = 0x15


def apic_profile(profile: Profile, apic_id: int, bootstrap: bool) -> ApicProfile:
    """The local APIC of processor ``apic_id`` of a machine of ``profile``."""
    crystal_ticks, _ = profile.tsc_crystal_ratio
    return ApicProfile(
        apic_id=apic_id,
        bootstrap=bootstrap,
        x2apic=profile.has("x2APIC"),
        tsc_deadline=profile.has("TSC-Deadline"),
        max_physical_address=profile.physical_address_width,
        timer_input_ticks=crystal_ticks if _has_slow_clock(profile) else 1,
    )


def _has_slow_clock(profile: Profile) -> bool:
    """Whether the timer counts another clock than the time-stamp counter; AMD processors do not tell its frequency."""
    return profile.is_amd or profile.highest_basic_leaf >= TSC_AND_CRYSTAL_LEAF


def bind_local_apic(msrs: MsrFile, apic: LocalApic) -> None:
    """Let ``apic`` stand for IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC registers of ``msrs``."""

    def write_deadline(index: int, value: int) -> bool:
        apic.tsc_deadline = value
        return True

    msrs.bind(IA32_APIC_BASE, lambda index: apic.state.apic_base, lambda index, value: apic.apic_base_write(value))
    msrs.bind(IA32_TSC_DEADLINE, lambda index: apic.tsc_deadline, write_deadline)
    msrs.bind(X2APIC_MSRS, apic.msr_read, apic.msr_write)
