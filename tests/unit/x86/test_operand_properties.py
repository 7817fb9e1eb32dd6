"""Guards of whole blocks find what looking at each instruction finds: the same fault, at the same place.

A block's operands are computed from the registers at its entry; with a breakpoint enabled, the processor looks at each
instruction when it comes to it.
"""

from __future__ import annotations

from copy import deepcopy

from hypothesis import given, settings
from hypothesis import strategies as st
from processor_bench import DATA, STACK, ProcessorBench, long_mode, protected_mode, real_mode

from vtx.x86.state import CpuState, Segment

OSFXSR, AM, AC = 1 << 9, 1 << 18, 1 << 18
REGISTERS = st.sampled_from(range(8))


@st.composite
def operand(draw: st.DrawFn, register: int) -> bytes:
    """ModR/M and what follows, 32-bit addressing: ``register`` and a memory operand."""
    base = draw(st.sampled_from([0, 1, 2, 3, 5, 6, 7]))
    displacement = draw(st.sampled_from([0, 1, 4, 8, 0x7C, -128, -4, -16, -1])).to_bytes(1, "little", signed=True)
    if draw(st.booleans()):
        return bytes([0x40 | register << 3 | base]) + displacement
    index = draw(st.sampled_from([0, 1, 2, 3, 5, 6, 7]))
    scale = draw(st.integers(0, 3))
    return bytes([0x44 | register << 3, scale << 6 | index << 3 | draw(REGISTERS)]) + displacement


@st.composite
def instruction(draw: st.DrawFn) -> bytes:
    """Something that accesses memory, or changes a register that the next one may use."""
    register = draw(REGISTERS)
    other = draw(REGISTERS)
    small = draw(st.integers(-8, 8)).to_bytes(1, "little", signed=True)
    kind = draw(st.integers(0, 16))
    memory = draw(operand(register))
    forms = [
        b"\x8b" + memory,  # MOV r, m
        b"\x89" + memory,
        b"\x88" + memory,
        b"\x66\x01" + memory,
        b"\x8d" + memory,  # LEA
        b"\x0f\x28" + memory,  # MOVAPS
        b"\x0f\x29" + memory,
        b"\x0f\x10" + memory,  # MOVUPS
        bytes([0x50 + register]),
        bytes([0x58 + register]),
        bytes([0x83, 0xC0 + register]) + small,  # ADD
        bytes([0x83, 0xE8 + register]) + small,  # SUB
        bytes([0x89, 0xC0 + 8 * register + other]),
        bytes([0x87, 0xC0 + 8 * register + other]),
        bytes([0x66, 0x89, 0xC0 + 8 * register + other]),
        b"\xc9" if register == 5 else bytes([0xFF, 0xC0 + other]),  # LEAVE, INC
        b"\xff" + bytes([memory[0] & ~0x38 | 0x30]) + memory[1:],  # PUSH m
    ]
    return forms[kind]


def limits(draw: st.DrawFn, rights: int) -> Segment:
    base = draw(st.sampled_from([0, DATA, DATA + 8]))
    limit = draw(st.sampled_from([0xFF, 0x1FF, 0xFFFF, 0xFFFF_FFFF]))
    return Segment(0x10, base, limit, rights)


@st.composite
def states(draw: st.DrawFn) -> CpuState:
    mode = draw(st.sampled_from(["64", "32", "compatibility", "16", "real"]))
    if mode in ("64", "compatibility"):
        cpl = draw(st.sampled_from([0, 3]))
        state = long_mode(cpl, compatibility=mode == "compatibility")
        if cpl:
            state.cr0 |= AM
            state.rflags |= draw(st.sampled_from([0, AC]))
    elif mode == "real":
        state = real_mode()
    else:
        state = protected_mode(bits=int(mode))
    state.cr4 |= OSFXSR
    if mode not in ("64", "real"):
        privilege = state.cpl << 5
        state.segments[3] = limits(draw, draw(st.sampled_from([0x4093, 0x4091, 0x4097, 0x409B])) | privilege)
        state.segments[2] = limits(draw, draw(st.sampled_from([0x4093, 0x0093])) | privilege)
    near = st.sampled_from([0, 8, 0x10, 0xF0, 0xFC, 0x100, 0xFFFC, 0xFFFF, DATA, DATA + 16, DATA + 24, STACK])
    state.gpr[:8] = [draw(near) for _ in range(8)]
    return state


def outcome(code: bytes, state: CpuState, *, step: bool, compiled: bool = True) -> tuple[object, ...]:
    state = deepcopy(state)
    if step:
        state.dr[0], state.dr7 = 0xF_F000, 0x402  # somewhere else
    bench = ProcessorBench(code + b"\xf4", state, compiled=compiled)
    for _ in range(50):
        bench.processor.run_once()
        if bench.events or state.activity:
            break
    event = bench.events[0] if bench.events else None
    what = (event.vector, event.error_code, event.address) if event else None
    flags = state.rflags & 0xFFFF
    memory = bench.memory.read(0, 0x4000), bench.memory.read(0x7000, 0x9000)
    bench.processor.engine.close()  # type: ignore[attr-defined]
    return what, state.rip, flags, list(state.gpr), memory


@settings(max_examples=60, deadline=None)
@given(program=st.lists(instruction(), min_size=1, max_size=8), state=states())
def test_blocks_and_single_instructions_agree(program: list[bytes], state: CpuState) -> None:
    widen = b"\x66\x67" if state.code_bits == 16 else b""  # everything is made of 32-bit forms
    code = b"".join(widen + each for each in program)
    expected = outcome(code, state, step=True)
    assert outcome(code, state, step=False) == expected
    assert outcome(code, state, step=False, compiled=False) == expected
