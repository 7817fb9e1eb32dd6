"""SSE arithmetic while MXCSR unmasks a SIMD floating-point exception: #XM, before the instruction has any effect.

The engine gives masked responses only. It stops before such an instruction as long as an exception is unmasked, and
what the masked response met tells whether it stands.

Spec: SDM Vol. 1, "SIMD Floating-Point Exception Conditions", "MXCSR Control and Status Register"; Vol. 3,
"Interrupt 19—SIMD Floating-Point Exception (#XM)".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from vtx.x86.decode import Instruction
from vtx.x86.instructions.sse_control import MXCSR_OFFSET, require_sse
from vtx.x86.outcome import Fault, InstructionAborted, NotModelled, Vector, ud
from vtx.x86.state import Cr4

if TYPE_CHECKING:
    from vtx.x86.processor import LogicalProcessor

_BEFORE_COMPUTATION: Final = 0b0000111
"""Invalid operation, denormal, divide-by-zero: the others are not looked at if one of them is not masked."""

_DENORMAL: Final = 1 << 1
_ALL: Final = 0x3F
_MASKS_SHIFT: Final = 7
_OSXMMEXCPT: Final = int(Cr4.OSXMMEXCPT)

ARITHMETIC: Final = frozenset(
    getattr(Mnemonic, name)
    for name in (
        *(
            f"{operation}{kind}"
            for operation in ("ADD", "SUB", "MUL", "DIV", "MIN", "MAX", "SQRT", "CMP", "ROUND")
            for kind in ("PS", "PD", "SS", "SD")
        ),
        *(f"{operation}{kind}" for operation in ("ADDSUB", "HADD", "HSUB", "DP") for kind in ("PS", "PD")),
        *(f"{operation}{kind}" for operation in ("COMI", "UCOMI") for kind in ("SS", "SD")),
        *("CVTDQ2PS", "CVTPI2PS", "CVTSI2SS", "CVTSI2SD"),
        *("CVTPD2DQ", "CVTPD2PI", "CVTPD2PS", "CVTPS2DQ", "CVTPS2PD", "CVTPS2PI"),
        *("CVTSD2SI", "CVTSD2SS", "CVTSS2SD", "CVTSS2SI"),
        *("CVTTPD2DQ", "CVTTPD2PI", "CVTTPS2DQ", "CVTTPS2PI", "CVTTSD2SI", "CVTTSS2SI"),
    )
)
"""What can raise a SIMD floating-point exception. The mnemonic CMPSD is also that of a string instruction."""


def arithmetic(cpu: LogicalProcessor, instruction: Instruction) -> None:
    """An instruction of `ARITHMETIC`."""
    state, engine = cpu.state, cpu.engine
    area = bytearray(engine.legacy_area())
    mxcsr = int.from_bytes(area[MXCSR_OFFSET : MXCSR_OFFSET + 4], "little")
    masks = mxcsr >> _MASKS_SHIFT & _ALL
    if masks == _ALL:
        raise ud()  # the engine stopped because it does not have the instruction
    require_sse(cpu)
    if not masks & _DENORMAL:
        raise NotModelled("denormal exception of SSE instructions, unmasked")
    before = list(state.gpr), state.rip, state.rflags, state.shadow, state.pending_debug
    cpu.native(instruction)
    met = engine.simd_exceptions()
    unmasked = met & ~masks
    if not unmasked:
        return
    if unmasked & _BEFORE_COMPUTATION:
        met &= _BEFORE_COMPUTATION
    state.gpr[:], state.rip, state.rflags, state.shadow, state.pending_debug = before
    area[MXCSR_OFFSET : MXCSR_OFFSET + 4] = (mxcsr | met).to_bytes(4, "little")
    engine.set_legacy_area(bytes(area))
    raise InstructionAborted(Fault(Vector.XM)) if state.cr4 & _OSXMMEXCPT else ud()


HANDLERS: Final = dict.fromkeys(ARITHMETIC, arithmetic)
