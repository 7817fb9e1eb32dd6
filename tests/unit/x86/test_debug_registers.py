"""Breakpoints, INT1 and single-stepping of real code: which debug exception comes when, and what DR6 says of it.

Spec: SDM Vol. 3, "Debug Exceptions"; "Masking Exceptions and Interrupts When Switching Stacks".
"""

from __future__ import annotations

import pytest
from processor_bench import ABSENT, CODE, DATA, IDT, STACK, ProcessorBench, long_mode

from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile
from vtx.x86.state import CpuState

HANDLER = 0x3000
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
TF, RF, CR4_DE, BS, BD, GD = 1 << 8, 1 << 16, 1 << 3, 1 << 14, 1 << 13, 1 << 13
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

    @pytest.mark.parametrize("faulting", ["0f0b", "0f21c0"], ids=["UD2", "general detect"])
    def test_single_step_of_mov_ss__is_lost_if_the_next_instruction_faults(self, faulting: str) -> None:
        state = long_mode()
        state.dr7, state.rflags = state.dr7 | GD, state.rflags | TF
        bench = delivering_bench("8ed0" + faulting, state, 1, 6)  # MOV SS, AX
        bench.state.gpr[0] = 0x10
        bench.run()
        assert bench.state.gpr[4] == STACK - 40  # one frame
        assert bench.state.dr6 == (DR6_RESET | BD if faulting != "0f0b" else DR6_RESET)

    def test_int1_while_single_stepping__does_not_report_the_step(self) -> None:
        bench = delivering_bench("8ed0f1", long_mode(), 1)  # MOV SS, AX; INT1
        bench.state.gpr[0] = 0x10
        bench.state.rflags |= 0x100
        bench.run()
        assert (bench.state.dr6, bench.memory.read_u64(STACK - 40)) == (DR6_RESET, CODE + 3)


class TestBreakpoints:
    """Data, I/O and instruction breakpoints of instructions that the engine or the model executes, or that fault."""

    @staticmethod
    def hit(
        code: str, *points: tuple[int, int, int], state: CpuState | None = None, **registers: int
    ) -> ProcessorBench:
        """The bench after the first event of ``code`` with these breakpoints."""
        bench = ProcessorBench(code, breakpoint_state(*points, state=state))
        for name, value in registers.items():
            bench.state.gpr[REGISTERS.index(name)] = value
        return bench

    @pytest.mark.parametrize(
        ("code", "after"),
        [
            pytest.param("488907", 3, id="store"),
            pytest.param("48 01 07", 3, id="read-modify-write"),
            pytest.param("0f010f", 3, id="SIDT-of-the-model"),
            pytest.param("0f38f107", 4, id="MOVBE-of-the-model"),
            pytest.param("6c", 1, id="INS-of-the-model"),
        ],
    )
    def test_data_write__traps_behind_the_instruction(self, code: str, after: int) -> None:
        bench = self.hit(code + "90", (DATA, WRITE, 1), rdi=DATA, rdx=0x10)
        event = bench.event()
        assert (event.vector, event.debug, bench.state.rip) == (Vector.DB, 1, CODE + after)

    @pytest.mark.parametrize(("code", "kind"), [("488b07", WRITE), ("90", READ_WRITE), ("488907", PORT)])
    def test_access_of_another_kind__does_not_trap(self, code: str, kind: int) -> None:
        self.hit(code + "f4", (DATA, kind, 8), rdi=DATA).run()

    @pytest.mark.parametrize(
        ("address", "length", "operand", "hits"),
        [
            (DATA, 1, DATA, True),
            (DATA + 3, 1, DATA, True),
            (DATA + 4, 1, DATA, False),
            (DATA + 6, 4, DATA + 7, True),  # the breakpoint covers DATA + 4 to DATA + 7
            (DATA + 8, 8, DATA + 5, True),
            (DATA + 8, 8, DATA + 4, False),
            (DATA, 2, DATA + 2, False),
        ],
    )
    def test_which_bytes_it_covers(self, address: int, length: int, operand: int, hits: bool) -> None:
        bench = self.hit("8907f4", (address, WRITE, length), rdi=operand)  # MOV [RDI], EAX
        if hits:
            assert bench.event().debug == 1
        else:
            bench.run()

    def test_each_hit_is_reported(self) -> None:
        points = (DATA, WRITE, 1), (DATA + 0x100, WRITE, 1), (DATA + 1, READ_WRITE, 1)
        assert self.hit("66890790", *points, rdi=DATA).event().debug == 0b101

    @pytest.mark.parametrize("code", ["488907", "0f010f", "0f38f107", "6c"])
    def test_instruction_that_faults__reports_no_data_breakpoint(self, code: str) -> None:
        bench = self.hit(code, (ABSENT - 4, WRITE, 4), rdi=ABSENT - 1, rdx=0x10, rax=0)
        bench.page(ABSENT - 4, 0)
        assert bench.event().vector == Vector.PF
        assert bench.state.pending_debug == 0

    def test_general_protection_fault_in_the_model__reports_none(self) -> None:
        bench = self.hit("0f0017", (DATA, READ_WRITE, 4), rdi=DATA)  # LLDT [RDI] of a data segment
        bench.memory.write_u64(DATA, 0x10)
        assert bench.event().vector == Vector.GP
        assert bench.state.pending_debug == 0

    @pytest.mark.parametrize(("code", "port", "length"), [("e440", 0x40, 1), ("ee", 0x40, 1), ("ef", 0x43, 2)])
    def test_port(self, code: str, port: int, length: int) -> None:
        state = long_mode()
        state.cr4 |= CR4_DE
        bench = self.hit(code + "90", (port, PORT, length), state=state, rdx=0x40)
        event = bench.event()
        assert (event.vector, event.debug, bench.state.rip) == (Vector.DB, 1, CODE + len(code) // 2)

    def test_port_without_cr4_de__does_not_trap(self) -> None:
        self.hit("e440f4", (0x40, PORT, 1)).run()

    def test_instruction__faults_before_it_and_rf_lets_it_pass(self) -> None:
        bench = self.hit("9090f4", (CODE + 1, 0, 1))
        event = bench.event()
        assert (event.debug, bench.state.rip) == (1, CODE + 1)
        bench.state.rflags |= RF
        bench.run()

    def test_instruction_after_mov_ss__is_not_looked_at(self) -> None:
        self.hit("8ed090f4", (CODE + 2, 0, 1), rax=0x10).run()

    def test_single_step_and_data_breakpoint__are_one_exception(self) -> None:
        bench = self.hit("890790", (DATA, WRITE, 1), rdi=DATA)
        bench.state.rflags |= TF
        assert bench.event().debug == 1 | BS

    @pytest.mark.parametrize("enabled", [1, 2, 3])
    def test_local_and_global_enable(self, enabled: int) -> None:
        state = breakpoint_state((DATA, WRITE, 1))
        state.dr7 = state.dr7 & ~3 | enabled
        bench = ProcessorBench("890790", state)
        state.gpr[7] = DATA
        assert bench.event().debug == 1


class TestWithoutGif:
    """The global interrupt flag is clear. APM Vol. 2, "Global Interrupt Flag, STGI and CLGI Instructions"."""

    @staticmethod
    def bench(profile: str, code: str, point: tuple[int, int, int], *, gif: bool = False) -> ProcessorBench:
        state = breakpoint_state(point)
        state.gif, state.cr4, state.gpr[7] = gif, state.cr4 | CR4_DE, DATA
        return ProcessorBench(code, state, profile=load_profile(profile))

    HITS = pytest.mark.parametrize(
        ("code", "point"),
        [
            ("8907f4", (DATA, WRITE, 1)),
            ("8b07f4", (DATA, READ_WRITE, 4)),
            ("90f4", (CODE, 0, 1)),
            ("e440f4", (0x40, PORT, 1)),
        ],
        ids=["write", "read", "instruction", "port"],
    )

    @HITS
    def test_breakpoints_are_discarded(self, code: str, point: tuple[int, int, int]) -> None:
        bench = self.bench("zen-server", code, point)
        bench.run()
        assert (bench.state.dr6, bench.state.pending_debug) == (DR6_RESET, 0)

    @HITS
    @pytest.mark.parametrize(("profile", "gif"), [("zen-server", True), ("everything-amd", False)])
    def test_they_hit_with_it_or_by_the_profile(
        self, profile: str, gif: bool, code: str, point: tuple[int, int, int]
    ) -> None:
        assert self.bench(profile, code, point, gif=gif).event().vector == Vector.DB

    def test_single_stepping_goes_on(self) -> None:
        bench = self.bench("zen-server", "8907f4", (DATA, WRITE, 1))
        bench.state.rflags |= TF
        assert bench.event().debug == BS


class TestBranchRecords:
    """IA32_DEBUGCTL.LBR: the last branch, and the one before the last exception or interrupt."""

    @staticmethod
    def bench(code: str, state: CpuState | None = None, debugctl: int = 1) -> ProcessorBench:
        bench = ProcessorBench(code, state)
        assert bench.processor.msrs.write(0x1D9, debugctl)
        return bench

    @staticmethod
    def records(bench: ProcessorBench) -> list[int | None]:
        return [bench.processor.msrs.read(index) for index in range(0x1DB, 0x1DF)]

    @pytest.mark.parametrize(
        ("code", "origin", "target"),
        [
            pytest.param("90eb02ccccf4", 1, 5, id="JMP"),
            pytest.param("31c07402ccccf4", 2, 6, id="Jcc-taken"),
            pytest.param("e802000000f4f490c3", 8, 5, id="CALL-and-RET"),
            pytest.param("ffe0", 0, 0x100, id="JMP-through-a-register"),
            pytest.param("b902000000e2fef4", 5, 5, id="LOOP"),
            pytest.param("eb00f4", 0, 2, id="JMP-to-the-next"),
            pytest.param("31c07400f4", 2, 4, id="Jcc-to-the-next"),
        ],
    )
    def test_taken_branch(self, code: str, origin: int, target: int) -> None:
        bench = self.bench(code)
        bench.state.gpr[0] = CODE + 0x100
        bench.put(CODE + 0x100, "f4")
        bench.run()
        assert self.records(bench) == [CODE + origin, CODE + target, 0, 0]

    @pytest.mark.parametrize("code", ["9090f4", "31c07502ccccf4"[:8] + "f4", "0fa2f4"])
    def test_anything_else__is_not_recorded(self, code: str) -> None:
        bench = self.bench(code)
        bench.run()
        assert self.records(bench) == [0, 0, 0, 0]

    def test_while_off__the_record_stays(self) -> None:
        bench = self.bench("eb00f4", debugctl=0)
        bench.run()
        assert self.records(bench) == [0, 0, 0, 0]

    def test_iret_in_the_model(self) -> None:
        bench = self.bench("48cf")
        for i, value in enumerate((0x2000, 0x08, 0x2, 0xB000, 0x10)):
            bench.memory.write_u64(STACK + 8 * i, value)
        bench.put(0x2000, "f4")
        bench.run()
        assert self.records(bench) == [CODE, 0x2000, 0, 0]

    def test_exception__saves_the_branch_before_it(self) -> None:
        state = long_mode()
        state.debugctl = 1
        bench = delivering_bench("eb020000 0f0b".replace(" ", ""), state, 6)
        bench.run()
        handler = HANDLER + 16 * 6
        assert self.records(bench) == [CODE + 4, handler, CODE, CODE + 4]

    def test_int_n__is_a_branch_like_any_other(self) -> None:
        state = long_mode()
        state.debugctl = 1
        bench = delivering_bench("cd80", state, 0x80)
        bench.run()
        assert self.records(bench) == [CODE, HANDLER + 16 * 0x80, 0, 0]

    @pytest.mark.parametrize("code", ["f1", "9090"], ids=["INT1", "single-step"])
    def test_debug_exception__is_not_recorded_and_ends_recording(self, code: str) -> None:
        state = long_mode()
        state.debugctl = 3
        bench = delivering_bench(code, state, 1)
        if code == "9090":
            state.debugctl = 1
            state.rflags |= TF
        bench.run()
        assert self.records(bench) == [0, 0, 0, 0]
        assert bench.processor.msrs.read(0x1D9) == 0

    def test_single_stepping_on_branches__traps_behind_a_branch_only(self) -> None:
        bench = self.bench("909031c07502eb029090f4", debugctl=2)  # NOP; NOP; XOR; JNE (not taken); JMP
        bench.state.rflags |= TF
        event = bench.event()
        assert (event.debug, bench.state.rip) == (BS, CODE + 10)
        assert self.records(bench) == [0, 0, 0, 0]

    def test_single_stepping_on_branches__reports_breakpoints_as_ever(self) -> None:
        bench = self.bench("890790", breakpoint_state((DATA, WRITE, 1)), debugctl=2)
        bench.state.gpr[7] = DATA
        bench.state.rflags |= TF
        assert bench.event().debug == 1


class TestMoveToDebugRegisters:
    """What is reserved in DR6 and DR7, and how DR4 and DR5 answer."""

    @pytest.mark.parametrize(
        ("code", "value", "dr6", "dr7"),
        [
            ("0f23f0", 0xFFFF_FFFF, 0xFFFF_EFFF, 0x400),
            ("0f23f0", 0, DR6_RESET, 0x400),
            ("0f23f8", 0xFFFF_FFFF, DR6_RESET, 0xFFFF_27FF),
            ("0f23f8", 0, DR6_RESET, 0x400),
            ("0f23e0", 0x4001, DR6_RESET | 0x4001, 0x400),  # DR4
            ("0f23e8", 0x0100, DR6_RESET, 0x500),  # DR5
        ],
    )
    def test_reserved_bits(self, code: str, value: int, dr6: int, dr7: int) -> None:
        bench = ProcessorBench(code + "f4")
        bench.state.gpr[0] = value
        bench.processor.run_once()
        assert (bench.state.dr6, bench.state.dr7, bench.state.rip) == (dr6, dr7, CODE + 3)

    @pytest.mark.parametrize("code", ["0f23f0", "0f23f8"])
    def test_upper_half__faults(self, code: str) -> None:
        bench = ProcessorBench(code)
        bench.state.gpr[0] = 1 << 32
        assert bench.event().vector == Vector.GP

    @pytest.mark.parametrize("code", ["0f23e0", "0f21e8"])
    def test_dr4_and_dr5_with_debugging_extensions__are_invalid(self, code: str) -> None:
        state = long_mode()
        state.cr4 |= CR4_DE
        assert ProcessorBench(code, state).event().vector == Vector.UD

    @pytest.mark.parametrize("code", ["0f21c0", "0f23c8", "0f21f0", "0f23f8"])
    def test_general_detect__faults_once_and_is_cleared(self, code: str) -> None:
        state = long_mode()
        state.dr7 |= GD
        bench = delivering_bench(code, state, 1)
        bench.run()
        assert (state.dr6, state.dr7) == (DR6_RESET | BD, 0x400)
        assert bench.memory.read_u64(STACK - 40) == CODE
        assert bench.memory.read_u64(STACK - 24) & RF
