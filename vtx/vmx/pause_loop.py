"""PAUSE-loop exiting: a VM exit when the guest's kernel seems to spin.

Interpretation. The gap between two PAUSEs is counted from the end of the first, so that it does not depend on how long
a PAUSE takes here.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "Instructions That Cause VM Exits Conditionally" (PAUSE).
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vtx.vmx.execution import complete
from vtx.vmx.exit import perform_exit
from vtx.vmx.operation import VmxOperation
from vtx.vmx.record import VmExit
from vtx.x86.decode import Instruction
from vtx.x86.operations import Operation, Plain, Simple
from vtx.x86.spinning import PAUSE_TICKS

_PAUSE_LOOP_EXITING: Final = c.PAUSE_LOOP_EXITING.mask
_GAP: Final = f.PLE_GAP.encoding
_WINDOW: Final = f.PLE_WINDOW.encoding
_PAUSE: Final = Simple(Plain.PAUSE)


def virtualize(operation: VmxOperation, action: Operation, instruction: Instruction) -> bool:
    """Execute PAUSE, which does not exit as such, under PAUSE-loop exiting; False if that is not in force."""
    processor, view = operation.processor, operation.view
    if action != _PAUSE or view is None or not view.secondary & _PAUSE_LOOP_EXITING or processor.state.cpl:
        return False
    now, loop, values = processor.tsc(), operation.pause_loop, operation.current_vmcs.values
    if loop is None or now - loop[1] > values[_GAP]:
        first = now
    else:
        first = loop[0]
        if now - first > values[_WINDOW]:
            perform_exit(operation, VmExit(Reason.PAUSE, instruction_length=instruction.length, resume_flag=0))
            return True
    processor.charge(PAUSE_TICKS)
    complete(processor.state, instruction)
    operation.pause_loop = (first, processor.tsc())
    return True
