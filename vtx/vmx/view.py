"""The control words of one VMCS as the processor uses them: gated, combined, ready for the hot paths.

A `ControlView` is derived from the VMCS at VM entry and holds until the controls change; hypervisors change them
rarely, so most entries reuse it. Fields that hypervisors do change often (masks, shadows, the exception bitmap) are
read from the VMCS where they are needed instead.

Spec: SDM Vol. 3, "Virtual Machine Control Structures", "VM-Execution Control Fields".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import define, field

from vmcs import controls as c
from vmcs import fields as f
from vmcs.controls import Control
from vmcs.exits import Reason
from vtx.x86.hlat import Hlat
from vtx.x86.operations import Plain

# Fields that a ControlView depends on; a write to any of them makes the view stale.
VIEW_FIELDS: Final = frozenset(
    field_.encoding
    for field_ in (
        f.PIN_BASED_CONTROLS,
        f.PRIMARY_PROCESSOR_BASED_CONTROLS,
        f.SECONDARY_PROCESSOR_BASED_CONTROLS,
        f.TERTIARY_PROCESSOR_BASED_CONTROLS,
        f.VM_EXIT_CONTROLS,
        f.SECONDARY_VM_EXIT_CONTROLS,
        f.VM_ENTRY_CONTROLS,
        f.EPT_POINTER,
        f.VPID,
        f.TSC_OFFSET,
        f.TSC_MULTIPLIER,
        f.IO_BITMAP_A_ADDRESS,
        f.IO_BITMAP_B_ADDRESS,
        f.MSR_BITMAP_ADDRESS,
        f.CR3_TARGET_COUNT,
        f.CR3_TARGET_VALUE_0,
        f.CR3_TARGET_VALUE_1,
        f.CR3_TARGET_VALUE_2,
        f.CR3_TARGET_VALUE_3,
        f.VMREAD_BITMAP_ADDRESS,
        f.VMWRITE_BITMAP_ADDRESS,
        f.VIRTUAL_APIC_ADDRESS,
        f.APIC_ACCESS_ADDRESS,
        f.SUB_PAGE_PERMISSION_TABLE_POINTER,
        f.HLAT_POINTER,
        f.HLAT_PREFIX_SIZE,
    )
)

_CR3_TARGETS: Final = (
    f.CR3_TARGET_VALUE_0.encoding,
    f.CR3_TARGET_VALUE_1.encoding,
    f.CR3_TARGET_VALUE_2.encoding,
    f.CR3_TARGET_VALUE_3.encoding,
)

# Instructions without parameters that exit in every guest, and those that one control makes exit.
_UNCONDITIONAL: Final = {
    Plain.CPUID: Reason.CPUID,
    Plain.GETSEC: Reason.GETSEC,
    Plain.INVD: Reason.INVD,
    Plain.XSETBV: Reason.XSETBV,
}
_PRIMARY: Final = (
    (Plain.HLT, c.HLT_EXITING.mask, Reason.HLT),
    (Plain.RDPMC, c.RDPMC_EXITING.mask, Reason.RDPMC),
    (Plain.RDTSC, c.RDTSC_EXITING.mask, Reason.RDTSC),
    (Plain.RDTSCP, c.RDTSC_EXITING.mask, Reason.RDTSCP),
    (Plain.MONITOR, c.MONITOR_EXITING.mask, Reason.MONITOR),
    (Plain.PAUSE, c.PAUSE_EXITING.mask, Reason.PAUSE),
    (Plain.UMWAIT, c.RDTSC_EXITING.mask, Reason.UMWAIT),
    (Plain.TPAUSE, c.RDTSC_EXITING.mask, Reason.TPAUSE),
)
_SECONDARY: Final = (
    (Plain.WBINVD, c.WBINVD_EXITING.mask, Reason.WBINVD),
    (Plain.RDRAND, c.RDRAND_EXITING.mask, Reason.RDRAND),
    (Plain.RDSEED, c.RDSEED_EXITING.mask, Reason.RDSEED),
)

# Controls a profile could advertise that this model does not carry out.
UNMODELLED: Final = (
    c.ENABLE_ENCLS_EXITING,
    c.PASID_TRANSLATION,
    c.INTEL_PT_USES_GUEST_PHYSICAL_ADDRESSES,
    c.ENABLE_PCONFIG,
    c.ENABLE_ENCLV_EXITING,
    c.VMM_BUS_LOCK_DETECTION,
    c.LOADIWKEY_EXITING,
    c.EPT_PAGING_WRITE_CONTROL,
    c.GUEST_PAGING_VERIFICATION,
    c.APIC_TIMER_VIRTUALIZATION,
    c.ENTRY_TO_SMM,
    c.ENTRY_DEACTIVATE_DUAL_MONITOR_TREATMENT,
)


@define(slots=True)
class ControlView:
    """Control words with ungated ones zeroed, and what follows from them.

    ``plain_exits`` gives the exit reason of each parameterless operation that exits. ``eptp`` is None without EPT;
    ``vpid`` is 0 without VPIDs. ``shadowing_bitmaps`` are the addresses for VMREAD and VMWRITE, None without VMCS
    shadowing. ``apic_access_page`` is None unless APIC accesses are virtualized, ``hlat`` None without HLAT.
    ``tsc_multiplier`` has 48 fractional bits and is None without TSC scaling.
    """

    pin: int
    primary: int
    secondary: int
    tertiary: int
    exit: int
    secondary_exit: int
    entry: int
    plain_exits: Mapping[Plain, Reason]
    eptp: int | None
    vpid: int
    tsc_offset: int
    tsc_multiplier: int | None
    cr3_targets: tuple[int, ...]
    io_bitmaps: tuple[int, int] | None
    msr_bitmaps: int | None
    shadowing_bitmaps: tuple[int, int] | None
    apic_access_page: int | None
    hlat: Hlat | None
    unrestricted_guest: bool = field(init=False)
    window_or_flag: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.unrestricted_guest = bool(self.secondary & c.UNRESTRICTED_GUEST.mask)
        self.window_or_flag = bool(
            self.primary & (c.MONITOR_TRAP_FLAG.mask | c.NMI_WINDOW_EXITING.mask | c.INTERRUPT_WINDOW_EXITING.mask)
        )


def build_view(values: Mapping[int, int]) -> ControlView:
    """The view of the VMCS whose fields are ``values``, by encoding."""
    primary = values[f.PRIMARY_PROCESSOR_BASED_CONTROLS.encoding]
    secondary = tertiary = 0
    if primary & c.ACTIVATE_SECONDARY_CONTROLS.mask:
        secondary = values[f.SECONDARY_PROCESSOR_BASED_CONTROLS.encoding]
    if primary & c.ACTIVATE_TERTIARY_CONTROLS.mask:
        tertiary = values[f.TERTIARY_PROCESSOR_BASED_CONTROLS.encoding]
    exit_controls = values[f.VM_EXIT_CONTROLS.encoding]
    secondary_exit = 0
    if exit_controls & c.EXIT_ACTIVATE_SECONDARY_CONTROLS.mask:
        secondary_exit = values[f.SECONDARY_VM_EXIT_CONTROLS.encoding]
    offsetting = primary & c.USE_TSC_OFFSETTING.mask
    scaling = offsetting and secondary & c.USE_TSC_SCALING.mask
    io_bitmaps = None
    if primary & c.USE_IO_BITMAPS.mask:
        io_bitmaps = (values[f.IO_BITMAP_A_ADDRESS.encoding], values[f.IO_BITMAP_B_ADDRESS.encoding])
    msr_bitmaps = values[f.MSR_BITMAP_ADDRESS.encoding] if primary & c.USE_MSR_BITMAPS.mask else None
    shadowing_bitmaps = None
    if secondary & c.VMCS_SHADOWING.mask:
        shadowing_bitmaps = (values[f.VMREAD_BITMAP_ADDRESS.encoding], values[f.VMWRITE_BITMAP_ADDRESS.encoding])
    targets = _CR3_TARGETS[: values[f.CR3_TARGET_COUNT.encoding]]
    return ControlView(
        pin=values[f.PIN_BASED_CONTROLS.encoding],
        primary=primary,
        secondary=secondary,
        tertiary=tertiary,
        exit=exit_controls,
        secondary_exit=secondary_exit,
        entry=values[f.VM_ENTRY_CONTROLS.encoding],
        plain_exits=_plain_exits(primary, secondary),
        eptp=values[f.EPT_POINTER.encoding] if secondary & c.ENABLE_EPT.mask else None,
        vpid=values[f.VPID.encoding] if secondary & c.ENABLE_VPID.mask else 0,
        tsc_offset=values[f.TSC_OFFSET.encoding] if offsetting else 0,
        tsc_multiplier=values[f.TSC_MULTIPLIER.encoding] if scaling else None,
        cr3_targets=tuple(values[encoding] for encoding in targets),
        io_bitmaps=io_bitmaps,
        msr_bitmaps=msr_bitmaps,
        shadowing_bitmaps=shadowing_bitmaps,
        apic_access_page=(
            values[f.APIC_ACCESS_ADDRESS.encoding] if secondary & c.VIRTUALIZE_APIC_ACCESSES.mask else None
        ),
        hlat=(
            Hlat(values[f.HLAT_POINTER.encoding], bool(values[f.HLAT_PREFIX_SIZE.encoding]))
            if tertiary & c.ENABLE_HLAT.mask
            else None
        ),
    )


def unmodelled_control(view: ControlView) -> Control | None:
    """The first control in force that the model does not carry out; None if it carries out all of them."""
    words = {
        c.ControlWord.PIN_BASED: view.pin,
        c.ControlWord.SECONDARY: view.secondary,
        c.ControlWord.TERTIARY: view.tertiary,
        c.ControlWord.EXIT: view.exit,
        c.ControlWord.SECONDARY_EXIT: view.secondary_exit,
        c.ControlWord.ENTRY: view.entry,
    }
    return next((control for control in UNMODELLED if words[control.word] & control.mask), None)


def _plain_exits(primary: int, secondary: int) -> dict[Plain, Reason]:
    exits = dict(_UNCONDITIONAL)
    exits |= {operation: reason for operation, mask, reason in _PRIMARY if primary & mask}
    exits |= {operation: reason for operation, mask, reason in _SECONDARY if secondary & mask}
    return exits
