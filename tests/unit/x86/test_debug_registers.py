"""Breakpoints, INT1 and single-stepping of real code: which debug exception comes when, and what DR6 says of it.

Spec: SDM Vol. 3, "Debug Exceptions"; "Masking Exceptions and Interrupts When Switching Stacks".
"""

from __future__ import annotations

from processor_bench import CODE, DATA, IDT, STACK, ProcessorBench, long_mode

from vtx.x86.state import CpuState

HANDLER = 0x3000
DR6_RESET = 0xFFFF_0FF0
WRITE, PORT, READ_WRITE = 1, 2, 3
LENGTH = {1: 0, 2: 1, 8: 2, 4: 3}


def breakpoint_state(*points: tuple[int, int, int], state: CpuState | None = None) -> CpuState:
    """64-bit mode with enabled breakpoints (address, kind, length) from number 0."""
    state = state or long_mode()
    for number, (address, kind, length) in enumerate(points):
        state.dr[number] = address
        state.dr7 |= 2 << 2 * number | (kind | LENGTH[length] << 2) << 16 + 4 * number
    return state


def delivering_bench(code: str, state: CpuState, *vectors: int) -> ProcessorBench:
    """A bench whose IDT sends each of ``vectors`` to a HLT at `HANDLER` + 16 times the vector."""
    bench = ProcessorBench(code, state, deliver=True)
    for vector in vectors:
        handler = HANDLER + 16 * vector
        bench.memory.write_u64(IDT + 16 * vector, handler & 0xFFFF | 0x08 << 16 | 0x8E00 << 32)
        bench.put(handler, "f4")
    return bench


class TestHeldBackByMovSs:
    """A data breakpoint on the operand of MOV SS waits for one more instruction."""

    @staticmethod
    def bench(next_instruction: str, *vectors: int) -> ProcessorBench:
        state = breakpoint_state((DATA, READ_WRITE, 4))
        state.gpr[7] = DATA
        bench = delivering_bench("8e17" + next_instruction, state, *vectors)  # MOV SS, [RDI]
        bench.memory.write_u64(DATA, 0x10)
        return bench

    def test_ordinary_instruction__one_trap_after_it(self) -> None:
        bench = self.bench("9090", 1)
        bench.run()
        assert bench.memory.read_u64(STACK - 40) == CODE + 3
        assert (bench.state.dr6, bench.state.rip) == (DR6_RESET | 1, HANDLER + 16 + 1)

    def test_int1__reports_it_in_its_own_exception(self) -> None:
        bench = self.bench("f1", 1)
        bench.run()
        assert bench.state.gpr[4] == STACK - 40  # one frame
        assert bench.memory.read_u64(STACK - 40) == CODE + 3
        assert (bench.state.dr6, bench.state.pending_debug) == (DR6_RESET | 1, 0)

    def test_int_n__traps_before_the_first_instruction_of_its_handler(self) -> None:
        bench = self.bench("cd80", 1, 0x80)
        bench.run()
        assert bench.state.gpr[4] == STACK - 88  # two frames, the second aligned
        assert bench.memory.read_u64(STACK - 40) == CODE + 4
        assert bench.memory.read_u64(STACK - 88) == HANDLER + 16 * 0x80
        assert bench.state.dr6 == DR6_RESET | 1

    def test_int1_with_nothing_held_back__leaves_dr6_alone(self) -> None:
        state = long_mode()
        state.dr6 = DR6_RESET | 0x4002
        bench = delivering_bench("f1", state, 1)
        bench.run()
        assert (bench.state.dr6, bench.memory.read_u64(STACK - 40)) == (DR6_RESET | 0x4002, CODE + 1)

    def test_int1_while_single_stepping__does_not_report_the_step(self) -> None:
        bench = delivering_bench("8ed0f1", long_mode(), 1)  # MOV SS, AX; INT1
        bench.state.gpr[0] = 0x10
        bench.state.rflags |= 0x100
        bench.run()
        assert (bench.state.dr6, bench.memory.read_u64(STACK - 40)) == (DR6_RESET, CODE + 3)
