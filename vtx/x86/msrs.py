"""The MSRs of one logical processor: RDMSR and WRMSR without the instructions around them.

What an MSR accepts is data (`vtx.x86.msr_table`); what it does beyond holding a value is bound by whoever does it: the
processor binds the MSRs that are views of its registers, a local APIC binds its registers, a clock binds the counter.

Spec: SDM Vol. 2, "RDMSR—Read from Model Specific Register", "WRMSR—Write to Model Specific Register"; Vol. 4,
"Architectural MSRs".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attrs import evolve, fields, frozen

from vtx.x86.cpuid import MISC_ENABLE_XD_DISABLE
from vtx.x86.msr_table import (
    APIC_BASE_BSP,
    APIC_BASE_EXTD,
    IA32_APERF,
    IA32_APIC_BASE,
    IA32_BNDCFGS,
    IA32_DEBUGCTL,
    IA32_EFER,
    IA32_FRED_CONFIG,
    IA32_FRED_RSP0,
    IA32_FRED_SSP1,
    IA32_FRED_STKLVLS,
    IA32_FS_BASE,
    IA32_GS_BASE,
    IA32_INTERRUPT_SSP_TABLE_ADDR,
    IA32_KERNEL_GS_BASE,
    IA32_MISC_ENABLE,
    IA32_MPERF,
    IA32_PKRS,
    IA32_PL0_SSP,
    IA32_S_CET,
    IA32_TIME_STAMP_COUNTER,
    IA32_TSC_ADJUST,
    IA32_U_CET,
    MSR_LASTBRANCHFROMIP,
    SMM_BASE,
    X2APIC_MSRS,
    msrs_of,
)
from vtx.x86.profile import Profile
from vtx.x86.state import MASK64, CpuState, Cr0, Efer, LastBranch, SegmentRegister

Reader = Callable[[int], int | None]
"""Value of the MSR of an index, or None for a general-protection fault."""

Writer = Callable[[int, int], bool]
"""Writes a value to the MSR of an index; False, with nothing changed, for a general-protection fault."""


_CONTROLS: Final = (
    (IA32_U_CET, "u_cet"),
    (IA32_S_CET, "s_cet"),
    (IA32_INTERRUPT_SSP_TABLE_ADDR, "interrupt_ssp_table"),
    (IA32_BNDCFGS, "bndcfgs"),
)


@frozen
class _Binding:
    reader: Reader
    writer: Writer


class MsrFile:
    """The MSRs that a logical processor of ``profile`` has, at their reset values.

    ``values`` holds the unbound ones by index: plain data, to be saved, restored and switched. ``bootstrap`` is
    whether this processor is the bootstrap processor.
    """

    def __init__(self, profile: Profile, bootstrap: bool = True) -> None:
        self.profile: Final = profile
        self.table: Final = msrs_of(profile)
        self.values: dict[int, int] = {}
        self._bootstrap = bootstrap
        self._bindings: dict[int, _Binding] = {}
        self.reset()

    def reset(self) -> None:
        """Put every unbound MSR to its reset value. INIT, unlike power-up, leaves MSRs alone."""
        self.values = {index: msr.reset for index, msr in self.table.items()}
        if self._bootstrap and IA32_APIC_BASE in self.values:
            self.values[IA32_APIC_BASE] |= APIC_BASE_BSP

    def bind(self, indices: int | range, reader: Reader, writer: Writer) -> None:
        """Let ``reader`` and ``writer`` stand for the MSRs of ``indices`` instead of `values`.

        The table's checks still come first: the writer sees only values whose reserved bits are clear and whose
        ignored bits are as they were. An index that the profile does not have stays absent, except in the x2APIC
        range, whose registers the local APIC alone knows.
        """
        for index in (indices,) if isinstance(indices, int) else indices:
            self._bindings[index] = _Binding(reader, writer)

    def exists(self, index: int) -> bool:
        """Whether the profile has MSR ``index`` (in the x2APIC range: whether it may be asked for now)."""
        if index in X2APIC_MSRS:
            return index in self._bindings and bool((self.read(IA32_APIC_BASE) or 0) & APIC_BASE_EXTD)
        return index in self.table

    def read(self, index: int) -> int | None:
        """The 64-bit value that RDMSR gives for ``index`` (32 bits); None if it faults with #GP(0).

        Spec: SDM Vol. 2B, "RDMSR—Read from Model Specific Register".
        """
        if not self.exists(index):
            return None
        binding = self._bindings.get(index)
        if binding:
            return binding.reader(index)
        return None if self.table[index].write_only else self.values[index]

    def write(self, index: int, value: int) -> bool:
        """Execute WRMSR of a 64-bit ``value`` to ``index``; False if it faults with #GP(0), with nothing changed.

        Spec: SDM Vol. 2D, "WRMSR—Write to Model Specific Register".
        """
        if not self.exists(index):
            return False
        binding = self._bindings.get(index)
        msr = self.table.get(index)
        if msr is not None:
            if msr.read_only or value & ~(msr.writable | msr.ignored):
                return False
            old = self._current(index)
            value = (value & msr.writable) | (old & ~msr.writable)
            if msr.check is not None and not msr.check(self.profile, old, value):
                return False
        if binding:
            return binding.writer(index, value)
        self.values[index] = value
        return True

    def _current(self, index: int) -> int:
        binding = self._bindings.get(index)
        return (binding.reader(index) or 0) if binding else self.values[index]

    def snapshot(self) -> dict[int, int]:
        """The unbound values, for `restore`."""
        return dict(self.values)

    def restore(self, snapshot: Mapping[int, int]) -> None:
        """Take the unbound values back from a `snapshot` of a file of the same profile."""
        self.values = dict(snapshot)


def bind_registers(msrs: MsrFile, state: Callable[[], CpuState], changed: Callable[[], None]) -> None:
    """Bind the MSRs that are views of the processor's current ``state``.

    ``changed`` is called after IA32_EFER, IA32_FS_BASE or IA32_GS_BASE was written.

    While IA32_MISC_ENABLE disables execute-disable pages, IA32_EFER.NXE is reserved.

    Spec: SDM Vol. 4, "Architectural MSRs"; Vol. 3A, "Initializing IA-32e Mode" (IA32_EFER.LME with paging enabled).
    """

    def write_efer(index: int, value: int) -> bool:
        current = state()
        if (value ^ current.efer) & Efer.LME and current.cr0 & Cr0.PG:
            return False
        if value & Efer.NXE and msrs.values.get(IA32_MISC_ENABLE, 0) & MISC_ENABLE_XD_DISABLE:
            return False
        current.efer = value
        changed()
        return True

    def bind_segment(index: int, register: SegmentRegister) -> None:
        def write(index: int, value: int) -> bool:
            state().segments[register].base = value
            changed()
            return True

        msrs.bind(index, lambda index: state().segments[register].base, write)

    def bind_last_branch(index: int, name: str) -> None:
        def write(index: int, value: int) -> bool:
            state().last_branch = evolve(state().last_branch, **{name: value})
            return True

        msrs.bind(index, lambda index: getattr(state().last_branch, name), write)

    def write_debugctl(index: int, value: int) -> bool:
        state().debugctl = value
        return True

    def write_kernel_gs_base(index: int, value: int) -> bool:
        state().kernel_gs_base = value
        return True

    msrs.bind(IA32_EFER, lambda index: state().efer, write_efer)

    def write_smbase(index: int, value: int) -> bool:
        state().smbase = value
        return True

    msrs.bind(IA32_DEBUGCTL, lambda index: state().debugctl, write_debugctl)
    msrs.bind(SMM_BASE, lambda index: state().smbase, write_smbase)
    for offset, field in enumerate(fields(LastBranch)):
        bind_last_branch(MSR_LASTBRANCHFROMIP + offset, field.name)
    bind_segment(IA32_FS_BASE, SegmentRegister.FS)
    bind_segment(IA32_GS_BASE, SegmentRegister.GS)
    msrs.bind(IA32_KERNEL_GS_BASE, lambda index: state().kernel_gs_base, write_kernel_gs_base)


def bind_control_flow(msrs: MsrFile, state: Callable[[], CpuState], changed: Callable[[], None]) -> None:
    """Bind the MSRs of control-flow enforcement and Intel MPX to ``state``; ``changed`` is called when one was written.

    Spec: SDM Vol. 4, "Architectural MSRs"; Vol. 1, "Control-Flow Enforcement Technology (CET)", "Read and Write of
    IA32_BNDCFGS".
    """

    for index, name in _CONTROLS:
        _bind_field(msrs, index, state, name, changed)
    _bind_list(msrs, range(IA32_PL0_SSP, IA32_PL0_SSP + 4), lambda: state().pl_ssp)


def bind_fred(msrs: MsrFile, state: Callable[[], CpuState]) -> None:
    """Bind the MSRs of FRED to ``state``.

    Spec: SDM Vol. 4, "Architectural MSRs"; Vol. 3, "Flexible Return and Event Delivery (FRED)".
    """
    _bind_field(msrs, IA32_FRED_CONFIG, state, "fred_config")
    _bind_field(msrs, IA32_FRED_STKLVLS, state, "fred_stack_levels")
    _bind_list(msrs, range(IA32_FRED_RSP0, IA32_FRED_RSP0 + 4), lambda: state().fred_rsp)
    _bind_list(msrs, range(IA32_FRED_SSP1, IA32_FRED_SSP1 + 3), lambda: state().fred_ssp)


def _bind_field(
    msrs: MsrFile, index: int, state: Callable[[], CpuState], name: str, changed: Callable[[], None] = lambda: None
) -> None:
    def write(index: int, value: int) -> bool:
        setattr(state(), name, value)
        changed()
        return True

    msrs.bind(index, lambda index: getattr(state(), name), write)


def _bind_list(msrs: MsrFile, indices: range, values: Callable[[], list[int]]) -> None:
    """MSRs of consecutive ``indices`` are the elements of a list."""

    def write(index: int, value: int) -> bool:
        values()[index - indices.start] = value
        return True

    msrs.bind(indices, lambda index: values()[index - indices.start], write)


def bind_protection_keys(msrs: MsrFile, changed: Callable[[int], None]) -> None:
    """Tell ``changed`` of the new value when software writes IA32_PKRS.

    Spec: SDM Vol. 4, "Architectural MSRs"; Vol. 3, "Protection Keys".
    """

    def write(index: int, value: int) -> bool:
        msrs.values[index] = value
        changed(value)
        return True

    msrs.bind(IA32_PKRS, lambda index: msrs.values[index], write)


def bind_clock(msrs: MsrFile, now: Callable[[], int], changed: Callable[[], None]) -> None:
    """Let IA32_TIME_STAMP_COUNTER count with ``now``, in ticks since reset; `tsc_of` turns ticks into its value.

    Software that moves the counter moves IA32_TSC_ADJUST by as much and the other way round, so the adjustment is
    the one value to keep. ``changed`` is called when it was written.

    Spec: SDM Vol. 3B, "Time-Stamp Counter Adjustment".
    """

    def write_counter(index: int, value: int) -> bool:
        msrs.values[IA32_TSC_ADJUST] = (value - now()) & MASK64
        changed()
        return True

    def write_adjustment(index: int, value: int) -> bool:
        msrs.values[IA32_TSC_ADJUST] = value
        changed()
        return True

    msrs.values.setdefault(IA32_TSC_ADJUST, 0)
    msrs.bind(IA32_TIME_STAMP_COUNTER, lambda index: tsc_of(msrs, now()), write_counter)
    msrs.bind(IA32_TSC_ADJUST, lambda index: msrs.values[IA32_TSC_ADJUST], write_adjustment)


def bind_effective_frequency(msrs: MsrFile, unhalted: Callable[[], int]) -> None:
    """Let IA32_MPERF and IA32_APERF count with ``unhalted``, the ticks in which the processor was not halted.

    Their unbound values hold what software has set them off by. The frequency never changes: they count the same.

    Spec: SDM Vol. 3B, "P-State Hardware Coordination"; APM Vol. 2, "Determining Processor Effective Frequency".
    """

    def write(index: int, value: int) -> bool:
        msrs.values[index] = (value - unhalted()) & MASK64
        return True

    for counter in (IA32_MPERF, IA32_APERF):
        msrs.bind(counter, lambda index: (msrs.values[index] + unhalted()) & MASK64, write)


def tsc_of(msrs: MsrFile, ticks: int) -> int:
    """The time-stamp counter ``ticks`` after reset, as software has adjusted it (64 bits)."""
    return (ticks + msrs.values.get(IA32_TSC_ADJUST, 0)) & MASK64
