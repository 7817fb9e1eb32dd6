"""A processor on which Intel MPX is enabled, and its bound registers, for tests of what uses them."""

from __future__ import annotations

from processor_bench import ABSENT, ProcessorBench, long_mode

from vtx.x86.state import CpuState

OSXSAVE = 1 << 18
MPX = 3 << 3  # of XCR0
ENABLE, PRESERVE = 1, 2
HLT = "f4"
ALL = (1 << 64) - 1
NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")


def state_with(config: int = ENABLE, state: CpuState | None = None, **registers: int) -> CpuState:
    """A state with ``config`` for its privilege level, whose other configuration enables nothing."""
    state = state or long_mode()
    state.cr4 |= OSXSAVE
    state.xcr0 = 3 | MPX
    state.bndcfgs, state.bndcfgu = (0, config) if state.cpl == 3 else (config, 0)
    for name, value in registers.items():
        state.gpr[NAMES.index(name)] = value
    return state


def bench_of(code: str, state: CpuState | None = None) -> ProcessorBench:
    bench = ProcessorBench(code + HLT, state or state_with())
    bench.page(ABSENT, 0)
    return bench


def bound(state: CpuState, number: int = 0) -> tuple[int, int]:
    return state.lower_bounds[number], state.upper_bounds[number]


def give(state: CpuState, lower: int, upper: int, number: int = 0) -> CpuState:
    state.lower_bounds[number], state.upper_bounds[number] = lower, upper
    return state
