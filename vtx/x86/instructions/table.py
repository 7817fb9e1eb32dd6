"""The handlers of all modules in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.instructions import (
    control,
    descriptor_tables,
    flow,
    identification,
    missing,
    msr,
    port_io,
    stack_segment,
    system,
    tasks,
)

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

Handler = Callable[["LogicalProcessor", Instruction], None]

HANDLERS: Final[Mapping[int, Handler]] = {
    mnemonic: handler
    for module in (
        *(system, identification, msr, control, stack_segment, descriptor_tables, flow, tasks),
        *(port_io, missing),
    )
    for mnemonic, handler in module.HANDLERS.items()
}
"""Handler by iced mnemonic number."""

_PRIVILEGE_FIRST: Final = frozenset(
    (
        Mnemonic.XSETBV,
        *(Mnemonic.VMRUN, Mnemonic.VMLOAD, Mnemonic.VMSAVE, Mnemonic.STGI, Mnemonic.CLGI),
        *(Mnemonic.SKINIT, Mnemonic.INVLPGA),
    )
)


def has_earlier_fault(instruction: Instruction) -> bool:
    """Whether the model may know a fault that comes before the #GP(0) for lack of privilege an engine raises."""
    if instruction.mnemonic == Mnemonic.MOV:
        return control.is_control_or_debug_move(instruction)
    return instruction.mnemonic in _PRIVILEGE_FIRST
