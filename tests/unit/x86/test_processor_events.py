"""Interrupts, traps, halting and time at the boundaries between instructions of real code."""

from __future__ import annotations

import pytest
from processor_bench import (
    ABSENT,
    CODE,
    DATA,
    IDT,
    STACK,
    ProcessorBench,
    long_mode,
    protected_mode,
    real_mode,
)

from vtx.x86.event import EventKind
from vtx.x86.outcome import Vector
from vtx.x86.processor import TICKS_PER_BYTE
from vtx.x86.state import Activity, CpuState, Shadow

IF, TF = 0x200, 0x100
DR6_BS = 1 << 14


class TestInterrupts:
    """External interrupts come at the first boundary that lets them (SDM Vol. 3, "Masking Maskable Hardware Interrupts")."""  # noqa: E501

    def pending(self, code: str, state: CpuState | None = None) -> ProcessorBench:
        bench = ProcessorBench(code, state)
        bench.platform.vector = 0x41
        return bench

    def test_interrupts_enabled__before_the_next_instruction(self) -> None:
        bench = self.pending("ffc0f4")
        bench.state.rflags |= IF
        event = bench.event()
        assert (event.vector, event.kind) == (0x41, EventKind.EXTERNAL_INTERRUPT)
        assert bench.state.rip == CODE

    @pytest.mark.parametrize("make", [long_mode, protected_mode, real_mode])
    def test_sti__after_one_more_instruction(self, make: object) -> None:
        bench = self.pending("fb9090f4", make())  # type: ignore[operator]
        bench.event()
        assert bench.state.rip == CODE + 2

    def test_sti_sti__shadow_is_not_renewed(self) -> None:
        """SDM Vol. 2, "STI—Set Interrupt Flag": only the STI that sets IF blocks."""
        bench = self.pending("fbfbfb90f4")
        bench.event()
        assert bench.state.rip == CODE + 2

    def test_sti_cli__lets_nothing_in(self) -> None:
        bench = self.pending("fbfa900fa2")
        bench.run_to(CODE + 5)

    def test_popf__at_once(self) -> None:
        bench = self.pending("9d90f4")
        bench.memory.write_u64(STACK, 0x202)
        bench.event()
        assert bench.state.rip == CODE + 1

    def test_iret__at_the_target(self) -> None:
        bench = self.pending("48cf")
        for i, value in enumerate((0x2000, 0x08, 0x202, 0xB000, 0x10)):
            bench.memory.write_u64(STACK + 8 * i, value)
        bench.put(0x2000, "90f4")
        bench.event()
        assert bench.state.rip == 0x2000

    def test_mov_ss__after_one_more_instruction(self) -> None:
        bench = self.pending("8ed09090f4")
        bench.state.gpr[0] = 0x10
        bench.state.rflags |= IF
        bench.platform.vector = None
        bench.platform.deadline = TICKS_PER_BYTE
        bench.platform.on_deadline = lambda: setattr(bench.platform, "vector", 0x41)
        bench.event()
        assert bench.state.rip == CODE + 3

    def test_sti_hlt__wakes_at_once(self) -> None:
        bench = self.pending("fbf490")
        bench.event()
        assert bench.state.rip == CODE + 2

    def test_interrupts_disabled__never(self) -> None:
        bench = self.pending("90" * 10 + "0fa2")
        bench.run_to(CODE + 12)

    def test_spinning_guest__is_interrupted_at_the_deadline(self) -> None:
        for compiled in (True, False):
            bench = ProcessorBench("ffc0ebfc", compiled=compiled)
            bench.state.rflags |= IF
            bench.state.gpr[0] = 0
            bench.platform.deadline = 4003 * TICKS_PER_BYTE + 1
            bench.platform.on_deadline = lambda bench=bench: setattr(bench.platform, "vector", 0x33)
            bench.event()
            # The first boundary at which the deadline has passed: 4004 bytes are 1001 rounds.
            assert bench.processor.engine.elapsed() == 4004
            assert bench.state.gpr[0] == 1001
            assert bench.state.rip == CODE

    def test_jump_to_itself__is_interrupted(self) -> None:
        bench = ProcessorBench("ebfe")
        bench.state.rflags |= IF
        bench.platform.deadline = 1001 * TICKS_PER_BYTE
        bench.platform.on_deadline = lambda: setattr(bench.platform, "vector", 0x33)
        bench.event()
        assert bench.processor.engine.elapsed() == 1002

    def test_repeated_string_instruction__is_interrupted_between_iterations(self) -> None:
        bench = ProcessorBench("f3aaf4")
        bench.state.rflags |= IF
        bench.state.gpr[1], bench.state.gpr[7] = 1000, DATA
        bench.platform.deadline = 100 * TICKS_PER_BYTE
        bench.platform.on_deadline = lambda: setattr(bench.platform, "vector", 0x33)
        bench.event()
        assert bench.state.rip == CODE
        assert bench.state.gpr[1] == 950
        assert bench.state.gpr[7] == DATA + 50


@pytest.mark.parametrize("compiled", [True, False])
def test_deadline_in_thousands_of_years(compiled: bool) -> None:
    """Beyond the 64 bits in which the engine counts."""
    bench = ProcessorBench("0fa2" * 20 + "f4", compiled=compiled)
    bench.platform.deadline = 1 << 70
    for _ in range(100):
        if bench.state.rip == CODE + 40:
            break
        bench.processor.run_once()
    assert bench.state.rip == CODE + 40
    assert bench.processor.now() < 1_000_000


class TestHalt:
    """HLT (SDM Vol. 2, "HLT—Halt")."""

    def test_skips_exactly_to_the_deadline(self) -> None:
        bench = ProcessorBench("f4")
        bench.state.rflags |= IF
        bench.platform.deadline = 1_000_000
        bench.platform.on_deadline = lambda: setattr(bench.platform, "vector", 0x30)
        event = bench.event()
        assert event.vector == 0x30
        assert bench.processor.now() == 1_000_000
        assert bench.state.rip == CODE + 1

    def test_nothing_to_wake_it__halts_for_good(self) -> None:
        bench = ProcessorBench("f4")
        bench.processor.run()
        assert bench.processor.halt is not None
        assert not bench.processor.halt.shutdown
        assert bench.state.activity is Activity.HLT

    def test_nmi_wakes_it(self) -> None:
        bench = ProcessorBench("f4")
        bench.processor.run_once()
        assert bench.state.activity is Activity.HLT
        bench.processor.nmi()
        event = bench.event()
        assert (event.vector, event.kind) == (Vector.NMI, EventKind.NMI)
        assert bench.state.rip == CODE + 1

    def test_masked_interrupt_does_not_wake_it(self) -> None:
        bench = ProcessorBench("f490")
        bench.platform.vector = 0x30
        bench.processor.run()
        assert bench.processor.halt is not None
        assert not bench.events


class TestNmi:
    """SDM Vol. 3, "Handling Multiple NMIs"."""

    def bench(self, code: str) -> ProcessorBench:
        bench = ProcessorBench(code, deliver=True)
        gate = 0x2000 | 8 << 16 | 0x8E00 << 32
        bench.memory.write_u64(IDT + 16 * 2, gate)
        return bench

    def test_blocked_until_iret(self) -> None:
        bench = self.bench("90" * 8 + "f4")
        bench.put(0x2000, "909048cf")
        bench.processor.nmi()
        bench.processor.run_once()
        assert (bench.state.rip, bench.state.nmi_blocked) == (0x2000, True)
        bench.processor.nmi()  # latched while the handler runs
        boundaries = 0
        while bench.state.nmi_blocked and boundaries < 10:
            bench.processor.run_once()
            boundaries += 1
        assert bench.state.rip == CODE
        bench.processor.run_once()
        assert bench.state.rip == 0x2000
        assert bench.state.nmi_blocked

    def test_is_taken_before_the_next_instruction_without_if(self) -> None:
        bench = ProcessorBench("90f4")
        bench.processor.nmi()
        event = bench.event()
        assert (event.vector, bench.state.rip) == (Vector.NMI, CODE)

    @pytest.mark.parametrize(("code", "length", "shadow"), [("8ed0", 2, Shadow.MOV_SS), ("fb", 1, Shadow.STI)])
    def test_waits_for_the_end_of_the_shadow(self, code: str, length: int, shadow: Shadow) -> None:
        bench = ProcessorBench(code + "9090f4")
        bench.state.gpr[0] = 0x10
        bench.processor.step_next = True
        bench.processor.run_once()
        assert bench.state.shadow is shadow
        bench.processor.nmi()
        bench.event()
        assert bench.state.rip == CODE + length + 1

    @pytest.mark.parametrize("blocked", [False, True])
    def test_at_the_end_of_a_turn__is_taken_before_it_ends(self, blocked: bool) -> None:
        """Otherwise an NMI that another processor sends meanwhile would be lost in it."""
        bench = self.bench("90f4")
        bench.state.nmi_blocked = blocked
        bench.processor.nmi()
        bench.processor.run(until=bench.processor.now())
        assert bench.state.rip == (CODE if blocked else 0x2000)
        assert bench.processor.nmi_pending() == blocked

    def test_for_a_processor_that_gives_way__is_taken_first(self) -> None:
        bench = self.bench("e64290f4")  # OUT 42H
        bench.put(0x2000, "f4")

        def write(port: int, size: int, value: int) -> None:
            bench.processor.nmi()
            bench.processor.give_way()

        bench.platform.port_write = write  # type: ignore[method-assign]
        bench.processor.run(until=10_000)
        assert (bench.state.rip, bench.processor.nmi_pending()) == (0x2000, False)


class TestSingleStep:
    """RFLAGS.TF (SDM Vol. 3, "Single-Step Exception Condition")."""

    def trap(self, code: str, state: CpuState | None = None, **registers: int) -> ProcessorBench:
        bench = ProcessorBench(code, state)
        bench.state.rflags |= TF
        for name, value in registers.items():
            bench.state.gpr[("rax", "rcx", "rdx", "rbx", "rsp").index(name)] = value
        return bench

    @pytest.mark.parametrize(
        ("code", "after"),
        [
            pytest.param("90", 1, id="NOP"),
            pytest.param("0fa2", 2, id="CPUID-of-the-model"),
            pytest.param("9c", 1, id="PUSHF-of-the-model"),
            pytest.param("eb10", 18, id="JMP"),
            pytest.param("8ed8", 2, id="MOV-DS"),
            pytest.param("e610", 2, id="OUT"),
            pytest.param("0f20c0", 3, id="MOV-from-CR0"),
        ],
    )
    def test_traps_after_each_instruction(self, code: str, after: int) -> None:
        bench = self.trap(code + "90" * 32, rax=0x10)
        event = bench.event()
        assert (event.vector, event.debug) == (Vector.DB, DR6_BS)
        assert bench.state.rip == CODE + after

    def test_mov_ss_suppresses_it_for_one_instruction(self) -> None:
        bench = self.trap("8ed09090", rax=0x10)
        bench.event()
        assert bench.state.rip == CODE + 3

    def test_popf_that_sets_tf__traps_after_the_next_instruction(self) -> None:
        bench = ProcessorBench("9d9090")
        bench.memory.write_u64(STACK, 0x102)
        bench.event()
        assert bench.state.rip == CODE + 2

    def test_popf_that_clears_tf__still_traps(self) -> None:
        """The trap depends on TF as it was when the instruction began."""
        bench = self.trap("9d9090")
        bench.memory.write_u64(STACK, 0x2)
        bench.event()
        assert bench.state.rip == CODE + 1

    def test_iret_that_sets_tf__traps_after_the_target(self) -> None:
        bench = ProcessorBench("48cf")
        for i, value in enumerate((0x2000, 0x08, 0x102, 0xB000, 0x10)):
            bench.memory.write_u64(STACK + 8 * i, value)
        bench.put(0x2000, "9090")
        bench.event()
        assert bench.state.rip == 0x2001

    def test_pushf_pushes_the_flag_that_is_set(self) -> None:
        bench = self.trap("9c")
        bench.event()
        assert bench.memory.read_u64(STACK - 8) == 0x102

    def test_pushf_while_the_model_steps__shows_no_trap_flag(self) -> None:
        bench = ProcessorBench("9cf4")
        bench.processor.step_next = True
        bench.run()
        assert bench.memory.read_u64(STACK - 8) == 0x2

    def test_repeated_string_instruction__traps_after_each_iteration(self) -> None:
        bench = self.trap("f3aa90", rcx=3, rax=0)
        bench.state.gpr[7] = DATA
        for left, rip in ((2, CODE), (1, CODE), (0, CODE + 2)):
            bench.event()
            assert (bench.state.gpr[1], bench.state.rip) == (left, rip)

    def test_fault_has_priority_over_the_trap(self) -> None:
        bench = self.trap("488b07")
        bench.page(ABSENT, 0)
        bench.state.gpr[7] = ABSENT
        assert bench.event().vector == Vector.PF

    def test_int_n_clears_tf_and_traps_not(self) -> None:
        bench = self.trap("cd80")
        event = bench.event()
        assert (event.vector, event.kind) == (0x80, EventKind.SOFTWARE_INTERRUPT)

    def test_with_a_deadline_close__is_no_different(self) -> None:
        """The engine's own stepping and the guest's must not be confused."""
        bench = self.trap("90" * 8)
        bench.platform.deadline = 3 * TICKS_PER_BYTE
        for i in range(1, 8):
            event = bench.event()
            assert (event.vector, event.debug) == (Vector.DB, DR6_BS)
            assert bench.state.rip == CODE + i


class TestTripleFault:
    """SDM Vol. 3, "Interrupt 8—Double Fault Exception (#DF)"."""

    def test_no_idt__is_shutdown(self) -> None:
        bench = ProcessorBench("0f0b", deliver=True)
        bench.state.idtr.limit = 0
        bench.processor.run()
        assert bench.processor.halt is not None
        assert bench.processor.halt.shutdown
        assert "triple fault" in bench.processor.halt.reason
        assert bench.state.activity is Activity.SHUTDOWN

    def test_no_stack_and_no_page_fault_handler(self) -> None:
        bench = ProcessorBench("50", deliver=True)
        bench.page(ABSENT, 0)
        bench.state.gpr[4] = ABSENT + 8
        bench.processor.run()
        assert bench.processor.halt is not None
        assert bench.processor.halt.shutdown


class TestTime:
    """Ticks and instructions are the same whichever way they are counted."""

    def run(self, *, compiled: bool, steps: bool) -> tuple[object, ...]:
        bench = ProcessorBench("bd200000000f31b903000000bf00800000f3aaffcd75eef4", compiled=compiled)
        processor = bench.processor
        for _ in range(10_000):
            if bench.state.activity:
                break
            processor.step_next = steps
            processor.run_once()
        return tuple(bench.state.gpr), bench.state.rip, processor.now(), processor.instructions

    def test_compiled_or_not_stepped_or_not(self) -> None:
        expected = self.run(compiled=True, steps=False)
        assert self.run(compiled=False, steps=False) == expected
        assert self.run(compiled=True, steps=True) == expected
        # 1 + 32 * (RDTSC, 2 MOV, 4 passes of REP STOSB, DEC, JNZ) + HLT
        assert expected[3] == 1 + 32 * 9 + 1

    def test_time_stamps_grow(self) -> None:
        bench = ProcessorBench("0f3189c30f31f4")
        state = bench.run()
        assert state.gpr[0] > state.gpr[3]

    def test_instruction_limit__is_exact(self) -> None:
        for limit in range(1, 40):
            bench = ProcessorBench("ffc00fa2909c58ebf6")
            bench.processor.instruction_limit = limit
            bench.processor.run()
            assert bench.processor.instructions == limit

    def test_until__is_kept(self) -> None:
        bench = ProcessorBench("ffc0ebfc")
        bench.processor.run(until=1002 * TICKS_PER_BYTE)
        assert bench.processor.now() == 1002 * TICKS_PER_BYTE
        assert bench.state.rip == CODE + 2
