"""What the rules of VM entry may know of a processor, taken from its profile and its MSRs.

Spec: SDM Vol. 3, "VM Entries".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from vmcs.region import Vmcs
from vmcs.rules import EntryContext
from vtx.x86 import msr_table as m
from vtx.x86.msr_table import Msr
from vtx.x86.profile import Profile
from vtx.x86.state import MASK64

_PERF_GLOBAL_CTRL: Final = 0x38F


def rule_context(
    vmcs: Vmcs, profile: Profile, msrs: Mapping[int, Msr], address: int, read_physical: Callable[[int, int], int]
) -> EntryContext:
    """The context for ``vmcs``, whose region is at ``address``, on a processor with the MSRs ``msrs``."""

    def reserved(index: int) -> int:
        msr = msrs.get(index)
        return MASK64 if msr is None else MASK64 & ~(msr.writable | msr.ignored)

    return EntryContext(
        vmcs,
        vmcs.capabilities,
        physical_address_width=profile.physical_address_width,
        linear_address_width=profile.linear_address_width,
        vmcs_address=address,
        read_physical=read_physical,
        efer_reserved=reserved(m.IA32_EFER),
        debugctl_reserved=reserved(m.IA32_DEBUGCTL),
        spec_ctrl_reserved=reserved(m.IA32_SPEC_CTRL),
        perf_global_ctrl_reserved=reserved(_PERF_GLOBAL_CTRL),
        s_cet_reserved=reserved(m.IA32_S_CET),
        linear_address_masking=profile.has("LAM"),
    )
