"""Several processors of one machine that have nothing to do with each other: what it costs that they take turns.

All begin at the same code in flat 32-bit protected mode, each with a megabyte of its own for data and stack, and a
count in ECX. FS is flat. The last to arrive at the end ends the run.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from vtx.bench.emulators import Unavailable
from vtx.bench.listing import code
from vtx.bench.programs import COMPUTE, Body

if TYPE_CHECKING:
    from vtx.machine import Machine

MIB: Final = 1 << 20
_CODE: Final = 0x8000
_STACK: Final = 0x7000
_DATA_RIGHTS, _CODE_RIGHTS = 0xC093, 0xC09B

ARRIVE: Final = """\
b8 01 00 00 00                  ; mov eax,1
64 f0 0f c1 05 00 90 00 00      ; lock xadd [fs:9000h],eax
40                              ; inc eax
39 f8                           ; cmp eax,edi
75 08                           ; jne short $+0Ah
31 c0                           ; xor eax,eax
ba f4 00 00 00                  ; mov edx,0F4h
ef                              ; out dx,eax
f4                              ; hlt
eb fd                           ; jmp short $-1
"""


def machine_of(processors: int, body: Body, count: int) -> Machine:
    """``processors`` of them, about to execute ``body`` with ``count`` in ECX."""
    from vtx.machine import Machine  # noqa: PLC0415 - not before something is measured
    from vtx.x86.state import Activity, Gpr, Segment, SegmentRegister  # noqa: PLC0415

    machine = Machine(cpus=processors, memory=(processors + 1) * MIB)
    machine.memory.write(_CODE, code(body.listing) + code(ARRIVE))
    for index, cpu in enumerate(machine.cpus):
        state = cpu.state
        state.cr0 = 0x11
        state.segments = [Segment(0x10, (index + 1) * MIB, 0xFFFF_FFFF, _DATA_RIGHTS) for _ in range(6)]
        state.segments[SegmentRegister.FS].base = 0
        state.segments[SegmentRegister.CS] = Segment(8, 0, 0xFFFF_FFFF, _CODE_RIGHTS)
        state.rip, state.activity = _CODE, Activity.ACTIVE
        state.gpr[Gpr.RSP], state.gpr[Gpr.RCX], state.gpr[Gpr.RDI] = _STACK, count, processors
        cpu.load_control_state()
    return machine


def compute_time(processors: int, passes: int) -> float:
    """Processor time in seconds for a machine of ``processors``, each of which executes ``passes`` of `COMPUTE`."""
    start = time.process_time()
    machine = machine_of(processors, COMPUTE, passes)
    result = machine.run()
    if result.exit_value != 0:
        raise Unavailable(result.message)
    return time.process_time() - start
