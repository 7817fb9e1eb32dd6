"""The state of FRED in a VMCS: loaded at VM entry, saved and loaded at VM exit.

IA32_FRED_RSP0 and IA32_PL0_SSP, which matter at returns to ring 3 and for events there, are no part of it.

Spec: SDM Vol. 3, "Loading Guest State" (control registers, debug registers, and MSRs), "Saving Guest State", "Loading
Host State".
"""

from __future__ import annotations

from typing import Final

from vmcs import fields as f
from vtx.x86.state import CpuState

_Area = tuple[int, int, tuple[int, int, int], tuple[int, int, int]]

GUEST: Final[_Area] = (
    f.GUEST_IA32_FRED_CONFIG.encoding,
    f.GUEST_IA32_FRED_STKLVLS.encoding,
    (f.GUEST_IA32_FRED_RSP1.encoding, f.GUEST_IA32_FRED_RSP2.encoding, f.GUEST_IA32_FRED_RSP3.encoding),
    (f.GUEST_IA32_FRED_SSP1.encoding, f.GUEST_IA32_FRED_SSP2.encoding, f.GUEST_IA32_FRED_SSP3.encoding),
)
HOST: Final[_Area] = (
    f.HOST_IA32_FRED_CONFIG.encoding,
    f.HOST_IA32_FRED_STKLVLS.encoding,
    (f.HOST_IA32_FRED_RSP1.encoding, f.HOST_IA32_FRED_RSP2.encoding, f.HOST_IA32_FRED_RSP3.encoding),
    (f.HOST_IA32_FRED_SSP1.encoding, f.HOST_IA32_FRED_SSP2.encoding, f.HOST_IA32_FRED_SSP3.encoding),
)


def load(state: CpuState, values: dict[int, int], area: _Area) -> None:
    """Load the registers from the fields of ``area``, `GUEST` or `HOST`; ``values`` are those of the VMCS."""
    config, levels, rsps, ssps = area
    state.fred_config, state.fred_stack_levels = values[config], values[levels]
    state.fred_rsp[1:] = [values[encoding] for encoding in rsps]
    state.fred_ssp[:] = [values[encoding] for encoding in ssps]


def saved(state: CpuState) -> list[tuple[int, int]]:
    """Encoding and value of the guest-state fields."""
    config, levels, rsps, ssps = GUEST
    registers = [(config, state.fred_config), (levels, state.fred_stack_levels)]
    registers += zip(rsps, state.fred_rsp[1:], strict=True)
    registers += zip(ssps, state.fred_ssp, strict=True)
    return registers
