"""ERETS and ERETU, LKGS, and SWAPGS, which FRED takes away.

Spec: SDM Vol. 2, "ERETS—Event Return to Supervisor", "ERETU—Event Return to User", "LKGS—Load Into
IA32_KERNEL_GS_BASE", "SWAPGS—Swap GS Base Register".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86 import fred
from vtx.x86.decode import Instruction
from vtx.x86.fred_return import Returned, erets, eretu
from vtx.x86.instructions.common import read_operand, require_feature, require_ring_0
from vtx.x86.instructions.segment_loads import data_segment
from vtx.x86.msr_table import IA32_STAR
from vtx.x86.outcome import ud
from vtx.x86.state import SegmentRegister

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_GS: Final = SegmentRegister.GS


def _complete(cpu: LogicalProcessor, returned: Returned) -> None:
    extension = cpu.virtualization
    if returned.unblocks_nmi and (extension is None or not extension.non_root or extension.iret_unblocks_nmi()):
        cpu.state.nmi_blocked = False
    cpu.load_control_state()
    shadow = cpu.state.shadow
    cpu.completed(single_step=returned.traps)
    cpu.state.shadow = shadow


def return_to_supervisor(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """ERETS."""
    require_feature(cpu, "FRED")
    _complete(cpu, erets(cpu.state, cpu.mmu))


def return_to_user(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """ERETU."""
    require_feature(cpu, "FRED")
    _complete(cpu, eretu(cpu.state, cpu.mmu, cpu.msrs.values[IA32_STAR]))


def load_kernel_gs(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """LKGS: MOV to GS, but the base goes to IA32_KERNEL_GS_BASE."""
    require_feature(cpu, "LKGS")
    state = cpu.state
    if not state.in_64_bit_mode or state.cpl:
        raise ud()
    selector = read_operand(cpu, instruction, 0, 2)
    segment = data_segment(state, cpu.mmu, selector, state.segments[_GS])
    state.kernel_gs_base, segment.base = segment.base, state.segments[_GS].base
    state.segments[_GS] = segment
    cpu.changed_system_state()
    cpu.retire(instruction)


def swap_gs(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """SWAPGS where the engine does not execute it."""
    if not cpu.state.in_64_bit_mode or fred.is_enabled(cpu.state):
        raise ud()
    require_ring_0(cpu)
    fred.swap_gs(cpu.state)
    cpu.changed_system_state()
    cpu.retire(instruction)


HANDLERS: Final = {
    Mnemonic.ERETS: return_to_supervisor,
    Mnemonic.ERETU: return_to_user,
    Mnemonic.LKGS: load_kernel_gs,
    Mnemonic.SWAPGS: swap_gs,
}
