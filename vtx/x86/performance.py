"""Architectural performance monitoring, version 2: what a profile states about it, and the MSRs that follow.

The counters themselves are a device of the processor (`vtx.devices.performance_counters`).

Spec: SDM Vol. 3B, "Architectural Performance Monitoring", "Architectural Performance Monitoring Version 2".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attrs import frozen

from vtx.x86.toml_section import Section

IA32_PMC0: Final = 0xC1
IA32_PERFEVTSEL0: Final = 0x186
IA32_FIXED_CTR0: Final = 0x309
IA32_FIXED_CTR_CTRL: Final = 0x38D
IA32_PERF_GLOBAL_STATUS: Final = 0x38E
IA32_PERF_GLOBAL_CTRL: Final = 0x38F
IA32_PERF_GLOBAL_OVF_CTRL: Final = 0x390

FREEZE_LBRS_ON_PMI, FREEZE_PERFMON_ON_PMI = 1 << 11, 1 << 12  # of IA32_DEBUGCTL

FIRST_FIXED: Final = 32  # bit of the first fixed counter in the global registers
FIXED_CONTROL_BITS: Final = 4  # per counter in IA32_FIXED_CTR_CTRL
OVERFLOW_BUFFER, CONDITION_CHANGED = 1 << 62, 1 << 63  # further bits of the global status

# Of the seven architectural events, those that happen here: bits of CPUID.0AH:EBX are set for the others.
_EVENTS: Final = 7
_AVAILABLE: Final = 0b111  # core cycles, instructions retired, reference cycles
_SELECT_BITS: Final = 0xFFFF_FFFF & ~(1 << 21)  # any-thread counting came with version 3
_FIXED_BITS: Final = 0b1011
_RDPMC_FIXED: Final = 1 << 30


@frozen
class PerformanceMonitoring:
    """Numbers of counters, and their widths in bits."""

    general: int
    general_width: int
    fixed: int
    fixed_width: int

    @classmethod
    def parse(cls, section: Section) -> PerformanceMonitoring:
        """The facility that the table ``[performance_monitoring]`` of a profile describes."""
        facility = cls(
            section.integer("general_counters", 1, 8),
            section.integer("general_width", 32, 64),
            section.integer("fixed_counters", 1, 3),
            section.integer("fixed_width", 32, 64),
        )
        section.finish()
        return facility

    @property
    def cpuid(self) -> tuple[int, int, int, int]:
        """CPUID leaf 0AH. Spec: SDM Vol. 2A, "CPUID—CPU Identification"."""
        eax = 2 | self.general << 8 | self.general_width << 16 | _EVENTS << 24
        return eax, ((1 << _EVENTS) - 1) & ~_AVAILABLE, 0, self.fixed | self.fixed_width << 5

    @property
    def global_bits(self) -> int:
        """The bits of the counters in IA32_PERF_GLOBAL_CTRL."""
        return (1 << self.general) - 1 | ((1 << self.fixed) - 1) << FIRST_FIXED

    @property
    def fixed_control_bits(self) -> int:
        """The writable bits of IA32_FIXED_CTR_CTRL."""
        return sum(_FIXED_BITS << FIXED_CONTROL_BITS * n for n in range(self.fixed))

    def rdpmc(self, number: int) -> int | None:
        """The MSR of the counter that RDPMC with ECX = ``number`` reads; None if there is none.

        Spec: SDM Vol. 2B, "RDPMC—Read Performance-Monitoring Counters".
        """
        if number < self.general:
            return IA32_PMC0 + number
        if 0 <= number - _RDPMC_FIXED < self.fixed:
            return IA32_FIXED_CTR0 + number - _RDPMC_FIXED
        return None

    def msrs(self) -> Iterator[tuple[int, str, int, int, int]]:
        """Each MSR: index, name, value at power-up, the bits software may write, those whose writes are ignored.

        Spec: SDM Vol. 3A, "Processor State After Reset" (IA32_PERF_GLOBAL_CTRL enables the general counters).
        """
        low = 0xFFFF_FFFF
        for n in range(self.general):
            yield IA32_PERFEVTSEL0 + n, f"IA32_PERFEVTSEL{n}", 0, _SELECT_BITS, 0
            yield IA32_PMC0 + n, f"IA32_PMC{n}", 0, low, low << 32  # bit 31 is extended to the width
        for n in range(self.fixed):
            yield IA32_FIXED_CTR0 + n, f"IA32_FIXED_CTR{n}", 0, (1 << self.fixed_width) - 1, 0
        overflows = self.global_bits | OVERFLOW_BUFFER | CONDITION_CHANGED
        yield IA32_FIXED_CTR_CTRL, "IA32_FIXED_CTR_CTRL", 0, self.fixed_control_bits, 0
        yield IA32_PERF_GLOBAL_CTRL, "IA32_PERF_GLOBAL_CTRL", (1 << self.general) - 1, self.global_bits, 0
        yield IA32_PERF_GLOBAL_OVF_CTRL, "IA32_PERF_GLOBAL_OVF_CTRL", 0, overflows, 0
