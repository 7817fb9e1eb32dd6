"""The handlers of all modules in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.instructions import (
    bounds,
    broadcast,
    control,
    descriptor_tables,
    extended_state,
    flow,
    fred,
    identification,
    interrupt_flag,
    missing,
    msr,
    msr_list,
    near,
    port_io,
    protection_keys,
    segment_loads,
    shadow_stacks,
    simd,
    sse_control,
    system,
    tasks,
    user_interrupts,
    wait,
)
from vtx.x86.near_branches import FAR_TRANSFERS

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

Handler = Callable[["LogicalProcessor", Instruction], None]

HANDLERS: Final[Mapping[int, Handler]] = {
    mnemonic: handler
    for module in (
        *(system, identification, msr, control, segment_loads, descriptor_tables, flow, interrupt_flag, tasks),
        *(port_io, missing, wait, broadcast, msr_list, extended_state, sse_control, simd, protection_keys),
        *(near, shadow_stacks, fred, bounds, user_interrupts),
    )
    for mnemonic, handler in module.HANDLERS.items()
}
"""Handler by iced mnemonic number."""

_PRIVILEGE_FIRST: Final = frozenset(
    (
        Mnemonic.XSETBV,
        *(Mnemonic.VMRUN, Mnemonic.VMLOAD, Mnemonic.VMSAVE, Mnemonic.STGI, Mnemonic.CLGI),
        *(Mnemonic.SKINIT, Mnemonic.INVLPGA),
        *(Mnemonic.CLI, Mnemonic.STI, Mnemonic.POPF, Mnemonic.POPFD),  # of the virtual interrupt flag
    )
)


_QUIET: Final = frozenset(
    (
        *(Mnemonic.CPUID, Mnemonic.RDTSC, Mnemonic.RDTSCP, Mnemonic.RDPMC, Mnemonic.RDMSR, Mnemonic.PAUSE),
        *(Mnemonic.RDRAND, Mnemonic.RDSEED, Mnemonic.RDPID, Mnemonic.INVD, Mnemonic.WBINVD, Mnemonic.WBNOINVD),
        *(Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ, Mnemonic.INVLPG, Mnemonic.INVPCID),
        *(Mnemonic.SGDT, Mnemonic.SIDT, Mnemonic.SLDT, Mnemonic.STR, Mnemonic.SMSW),
        *(Mnemonic.RDPKRU, Mnemonic.WRPKRU, Mnemonic.RET, Mnemonic.RDSSPD, Mnemonic.RDSSPQ),
        *(Mnemonic.RDFSBASE, Mnemonic.RDGSBASE, Mnemonic.MOVBE, Mnemonic.ADCX, Mnemonic.ADOX),
        *(Mnemonic.RESERVEDNOP, *near.CONDITIONAL),
        *(Mnemonic.VMREAD, Mnemonic.VMWRITE, Mnemonic.VMPTRST, Mnemonic.INVEPT, Mnemonic.INVVPID),
    )
)
_CR3: Final = 3

# The engine is needed to execute these after all, and it cannot be while it runs.
_ENGINE_NEEDED: Final = frozenset(simd.HANDLERS)


def is_answered(instruction: Instruction) -> bool:
    """Whether the model executes the instruction without the engine's help, so that it can do so during a run."""
    return instruction.mnemonic not in _ENGINE_NEEDED and instruction.code not in FAR_TRANSFERS


def is_quiet(instruction: Instruction) -> bool:
    """Whether the instruction affects nothing but GPRs, RIP, SSP, bounds, RFLAGS, memory and translations, or faults.

    After such an instruction no event can be due that was not due before, but by the passing of time.
    """
    if instruction.mnemonic == Mnemonic.MOV:
        return instruction.registers[0] is not None or instruction.system_registers[0] == _CR3
    if instruction.mnemonic in (Mnemonic.CALL, Mnemonic.JMP):  # an indirect one is tracked
        return instruction.memory is None and instruction.registers[0] is None
    return instruction.mnemonic in _QUIET


def has_earlier_fault(instruction: Instruction) -> bool:
    """Whether the model may know a fault that comes before the #GP(0) for lack of privilege an engine raises."""
    if instruction.mnemonic == Mnemonic.MOV:
        return control.is_control_or_debug_move(instruction)
    return instruction.mnemonic in _PRIVILEGE_FIRST
