"""Shadow stacks and indirect-branch tracking as machine code: near branches, the tracker, the instructions.

Spec: SDM Vol. 1, "Shadow Stacks", "Indirect Branch Tracking"; SDM Vol. 2, the instructions' pages.
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import ABSENT, CODE, DATA, PRESENT, STACK, TABLES, USER, WRITABLE, ProcessorBench, long_mode

from vtx.engine.unicorn_engine import UnicornEngine
from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile
from vtx.x86.state import CpuState

CET = 1 << 23
DIRTY = 1 << 6
SH_STK_EN, WR_SHSTK_EN, ENDBR_EN, LEG_IW_EN, NO_TRACK_EN, SUPPRESS_DIS = (1 << bit for bit in range(6))
SUPPRESS, WAITING = 1 << 10, 1 << 11
SHADOW = 0xA000  # a page that is a shadow stack
SSP = SHADOW + 0x800
RAX, RCX, RSP, RDI = 0, 1, 4, 7
ENTRY = 0x1100
ENDBR64, ENDBR32 = "f30f1efa", "f30f1efb"
CALL_RAX, JMP_RAX, NOTRACK_JMP_RAX, RET, HLT, NOP = "ffd0", "ffe0", "3effe0", "c3", "f4", "90"
NEAR_RET, ENDBRANCH, RSTORSSP, SETSSBSY = 1, 3, 4, 5
CF, ZF, OF = 1, 1 << 6, 1 << 11


def state_with(cet: int, *, cpl: int = 0, compatibility: bool = False, **registers: int) -> CpuState:
    state = long_mode(cpl, compatibility=compatibility)
    state.cr4 |= CET
    state.ssp = SSP
    if cpl == 3:
        state.u_cet = cet
    else:
        state.s_cet = cet
    for name, value in registers.items():
        state.gpr[("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi").index(name)] = value
    return state


def bench_of(code: str, state: CpuState, entry: str = HLT, **more: bool) -> ProcessorBench:
    bench = ProcessorBench(code + HLT, state, profile=load_profile("everything"), **more)
    bench.put(ENTRY, entry)
    bench.page(SHADOW, PRESENT | DIRTY | (USER if state.cpl == 3 else 0))
    bench.page(ABSENT, 0)
    return bench


def quadwords(bench: ProcessorBench, address: int, count: int) -> list[int]:
    return [bench.memory.read_u64(address + 8 * number) for number in range(count)]


def fault_of(bench: ProcessorBench) -> tuple[int, int | None]:
    event = bench.event()
    return event.vector, event.error_code


class TestNearBranches:
    @pytest.mark.parametrize("cpl", [0, 3])
    def test_call_pushes_the_return_address_twice(self, cpl: int) -> None:
        bench = bench_of("e8fb000000", state_with(SH_STK_EN, cpl=cpl))
        bench.run_to(ENTRY)
        state = bench.state
        assert (state.gpr[RSP], state.ssp) == (STACK - 8, SSP - 8)
        assert bench.memory.read_u64(STACK - 8) == bench.memory.read_u64(SSP - 8) == CODE + 5

    def test_call_and_return(self) -> None:
        state = bench_of("e8fb000000" + "48ffc0", state_with(SH_STK_EN, rax=0), "48ffc0" + RET).run()
        assert (state.rip, state.gpr[RAX], state.gpr[RSP], state.ssp) == (CODE + 9, 2, STACK, SSP)

    def test_a_call_of_the_next_instruction_is_not_pushed(self) -> None:
        state = bench_of("e800000000" + "58", state_with(SH_STK_EN)).run()
        assert (state.gpr[RAX], state.ssp) == (CODE + 5, SSP)

    def test_an_indirect_call_of_the_next_instruction_is_pushed(self) -> None:
        state = bench_of(CALL_RAX + "58", state_with(SH_STK_EN, rax=CODE + 2)).run()
        assert state.ssp == SSP - 8

    def test_call_through_memory(self) -> None:
        bench = bench_of("ff17", state_with(SH_STK_EN, rdi=DATA))
        bench.memory.write_u64(DATA, ENTRY)
        bench.run_to(ENTRY)
        assert quadwords(bench, SSP - 8, 1) == [CODE + 2]

    def test_return_releases_parameters(self) -> None:
        bench = bench_of("c21000", state_with(SH_STK_EN))
        bench.memory.write_u64(STACK, ENTRY)
        bench.memory.write_u64(SSP, ENTRY)
        bench.run_to(ENTRY)
        assert (bench.state.gpr[RSP], bench.state.ssp) == (STACK + 24, SSP + 8)

    def test_return_to_somewhere_else(self) -> None:
        bench = bench_of(RET, state_with(SH_STK_EN))
        bench.memory.write_u64(STACK, ENTRY)
        bench.memory.write_u64(SSP, ENTRY + 1)
        assert fault_of(bench) == (Vector.CP, NEAR_RET)
        assert (bench.state.rip, bench.state.gpr[RSP], bench.state.ssp) == (CODE, STACK, SSP)

    def test_addresses_are_as_wide_as_the_code(self) -> None:
        """In compatibility mode 4 bytes are pushed and popped, whatever the operand size."""
        bench = bench_of("e8fb000000", state_with(SH_STK_EN, compatibility=True), RET)
        bench.memory.write_u64(SSP - 8, 0x1111_1111_1111_1111)
        bench.run()
        assert bench.memory.read_u64(SSP - 8) == CODE + 5 << 32 | 0x1111_1111
        state = bench_of("66e8fc00", state_with(SH_STK_EN, compatibility=True), "66c3").run()
        assert (state.rip, state.gpr[RSP], state.ssp) == (CODE + 5, STACK, SSP)

    @pytest.mark.parametrize(
        ("flags", "error"),
        [
            pytest.param(PRESENT | WRITABLE | DIRTY, 0b100_0011, id="writable"),
            pytest.param(PRESENT, 0b100_0011, id="clean"),
            pytest.param(PRESENT | DIRTY | USER, 0b100_0011, id="of-the-user"),
            pytest.param(0, 0b100_0010, id="absent"),
        ],
    )
    def test_the_page_must_be_one_of_a_shadow_stack(self, flags: int, error: int) -> None:
        bench = bench_of("e8fb000000", state_with(SH_STK_EN))
        bench.page(SHADOW, flags)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, error, SSP - 8)
        assert (bench.state.rip, bench.state.gpr[RSP], bench.state.ssp) == (CODE, STACK, SSP)

    def test_the_tables_above_must_be_writable(self) -> None:
        bench = bench_of(RET, state_with(SH_STK_EN))
        bench.memory.write_u64(TABLES + 0x2000, TABLES + 0x3000 | PRESENT | USER)
        bench.page(STACK, PRESENT | DIRTY | USER)
        assert fault_of(bench) == (Vector.PF, 0b100_0001)

    def test_code_cannot_write_to_it(self) -> None:
        assert fault_of(bench_of("488907", state_with(SH_STK_EN, rdi=SSP))) == (Vector.PF, 3)

    def test_targets_that_are_not_canonical(self) -> None:
        bench = bench_of(CALL_RAX, state_with(SH_STK_EN, rax=1 << 47))
        assert fault_of(bench) == (Vector.GP, 0)
        assert (bench.state.ssp, bench.memory.read_u64(STACK - 8)) == (SSP, 0)

    def test_nothing_happens_without_cr4_cet(self) -> None:
        state = state_with(SH_STK_EN)
        state.cr4 &= ~CET
        assert bench_of("e8fb000000", state, "58" + HLT).run().ssp == SSP

    def test_user_and_supervisor_have_controls_of_their_own(self) -> None:
        state = state_with(SH_STK_EN, cpl=3)
        state.s_cet, state.u_cet = SH_STK_EN, 0
        bench = bench_of("e8fb000000", state, "0f0b")
        assert (bench.event().vector, bench.places, bench.state.ssp) == (Vector.UD, [ENTRY], SSP)

    def test_the_trap_flag(self) -> None:
        state = state_with(SH_STK_EN)
        state.rflags |= 0x100
        bench = bench_of("e8fb000000", state)
        event = bench.event()
        assert (event.vector, event.debug, bench.places) == (Vector.DB, 1 << 14, [ENTRY])

    def test_while_the_engine_runs(self) -> None:
        """A hundred calls, answered in the middle of a run, with the same counts as one by one."""
        counts = []
        for answers in (True, False):
            bench = bench_of("48c7c164000000" + "e8f4000000" + "48ffc9" + "75f6", state_with(SH_STK_EN), "48ffc0" + RET)
            processor = bench.processor
            processor.engine = UnicornEngine(bench.memory, processor, answers=answers)
            processor.mmu.flush_engine = processor.engine.flush
            processor.reload = True
            state = bench.run()
            assert (state.gpr[RAX], state.gpr[RSP], state.ssp) == (0x10 + 100, STACK, SSP)
            counts.append((processor.instructions, processor.engine.elapsed()))
        assert counts[0] == counts[1]
        assert counts[0][0] == 1 + 5 * 100 + 1


class TestTracker:
    @pytest.mark.parametrize(("branch", "target"), [(CALL_RAX, ENTRY), (JMP_RAX, ENTRY)])
    def test_endbranch_follows(self, branch: str, target: int) -> None:
        state = bench_of(branch, state_with(ENDBR_EN, rax=target), ENDBR64 + HLT).run()
        assert (state.rip, state.s_cet) == (target + 5, ENDBR_EN)

    @pytest.mark.parametrize("entry", [NOP, ENDBR32, RET, "0f0b", "06"])
    def test_something_else_follows(self, entry: str) -> None:
        """Even where it is an invalid opcode. The tracker goes on waiting, for the handler to see."""
        bench = bench_of(JMP_RAX, state_with(ENDBR_EN, rax=ENTRY), entry)
        assert fault_of(bench) == (Vector.CP, ENDBRANCH)
        assert (bench.state.rip, bench.state.s_cet) == (ENTRY, ENDBR_EN | WAITING)

    def test_in_compatibility_mode(self) -> None:
        state = state_with(ENDBR_EN, compatibility=True, rax=ENTRY)
        assert bench_of(JMP_RAX, state, ENDBR32 + HLT).run().s_cet == ENDBR_EN
        state = state_with(ENDBR_EN, compatibility=True, rax=ENTRY)
        assert fault_of(bench_of(JMP_RAX, state, ENDBR64)) == (Vector.CP, ENDBRANCH)

    def test_a_breakpoint_may_be_in_its_place(self) -> None:
        bench = bench_of(JMP_RAX, state_with(ENDBR_EN, rax=ENTRY), "cc")
        assert bench.event().vector == Vector.BP
        assert bench.state.s_cet == ENDBR_EN | WAITING

    @pytest.mark.parametrize("branch", ["e9fb000000", "e8fb000000", "eb00", "7500"])
    def test_direct_branches_are_not_tracked(self, branch: str) -> None:
        assert bench_of(branch, state_with(ENDBR_EN)).run().s_cet == ENDBR_EN

    def test_returns_are_not_tracked(self) -> None:
        bench = bench_of(RET, state_with(ENDBR_EN))
        bench.memory.write_u64(STACK, ENTRY)
        assert bench.run().s_cet == ENDBR_EN

    def test_the_prefix(self) -> None:
        state = bench_of(NOTRACK_JMP_RAX, state_with(ENDBR_EN | NO_TRACK_EN, rax=ENTRY), NOP + HLT).run()
        assert state.s_cet == ENDBR_EN | NO_TRACK_EN
        bench = bench_of(NOTRACK_JMP_RAX, state_with(ENDBR_EN, rax=ENTRY), NOP)
        assert fault_of(bench) == (Vector.CP, ENDBRANCH)

    def test_endbranch_does_nothing_where_none_is_expected(self) -> None:
        assert bench_of(ENDBR64 + ENDBR32, state_with(ENDBR_EN)).run().s_cet == ENDBR_EN

    def test_a_tracker_that_rests(self) -> None:
        """It neither follows branches nor minds what follows them, until the next ENDBR64."""
        state = state_with(ENDBR_EN | SUPPRESS, rax=ENTRY)
        bench = bench_of(JMP_RAX, state, NOP + ENDBR64 + HLT)
        bench.run_to(ENTRY + 1)
        assert bench.state.s_cet == ENDBR_EN | SUPPRESS
        assert bench.run().s_cet == ENDBR_EN

    @pytest.mark.parametrize(
        ("control", "bit", "after"),
        [
            (LEG_IW_EN, 1, SUPPRESS),
            (LEG_IW_EN | SUPPRESS_DIS, 1, 0),
            (LEG_IW_EN, 0, None),
            (0, 1, None),
        ],
    )
    def test_legacy_code(self, control: int, bit: int, after: int | None) -> None:
        """One bit of the bitmap for each page of code."""
        control |= ENDBR_EN | DATA
        page = 0x2A000
        bench = bench_of(JMP_RAX, state_with(control, rax=page))
        bench.put(page, NOP + HLT)
        bench.memory.write(DATA + 5, bytes((bit << 2,)))
        if after is None:
            assert fault_of(bench) == (Vector.CP, ENDBRANCH)
        else:
            assert bench.run().s_cet == control | after

    def test_an_interrupt_comes_first(self) -> None:
        state = state_with(ENDBR_EN, rax=ENTRY)
        bench = bench_of(JMP_RAX, state, ENDBR64)
        bench.run_to(ENTRY)
        state.rflags |= 0x200
        bench.platform.vector = 0x40
        assert (bench.event().vector, bench.places) == (0x40, [ENTRY])
        assert state.s_cet == ENDBR_EN | WAITING


SAVEPREVSSP, SETSSBSY_CODE = "f30f01ea", "f30f01e8"
RSTORSSP_RDI, CLRSSBSY_RDI = "f30f012f", "f30fae37"
INCSSPD_EAX, INCSSPQ_RAX = "f30faee8", "f3480faee8"
RDSSPD_EAX, RDSSPQ_RAX = "f30f1ec8", "f3480f1ec8"
WRSSD, WRSSQ = "0f38f607", "480f38f607"  # EAX or RAX to [RDI]
WRUSSD, WRUSSQ = "660f38f507", "66480f38f507"


class TestInstructions:
    @pytest.mark.parametrize(
        ("code", "size", "count", "reads"),
        [
            (INCSSPD_EAX, 4, 3, 8),
            (INCSSPQ_RAX, 8, 3, 16),
            (INCSSPQ_RAX, 8, 0, 0),
            (INCSSPQ_RAX, 8, 0x1FF, 8 * 254),
        ],
    )
    def test_increment(self, code: str, size: int, count: int, reads: int) -> None:
        """The low byte of the register counts; the first and the last value are read."""
        state = state_with(SH_STK_EN, rax=count)
        state.ssp = SHADOW
        assert bench_of(code, state).run().ssp == SHADOW + size * (count & 0xFF)
        state = state_with(SH_STK_EN, rax=count)
        state.ssp = SHADOW + 0x1000 - reads  # what is read last is in the next page
        if reads:
            bench = bench_of(code, state)
            event = bench.event()
            assert (event.vector, event.error_code, event.address) == (Vector.PF, 0x41, SHADOW + 0x1000)
            assert bench.state.ssp == SHADOW + 0x1000 - reads

    def test_read(self) -> None:
        state = state_with(SH_STK_EN, rax=1 << 63)
        state.ssp = 0x1234_5678_9ABC
        assert bench_of(RDSSPQ_RAX, state).run().gpr[RAX] == 0x1234_5678_9ABC
        state = state_with(SH_STK_EN, rax=1 << 63)
        state.ssp = 0x1234_5678_9ABC
        assert bench_of(RDSSPD_EAX, state).run().gpr[RAX] == 0x5678_9ABC

    @pytest.mark.parametrize("code", [RDSSPQ_RAX, RDSSPD_EAX])
    def test_read_is_a_nop_without_a_shadow_stack(self, code: str) -> None:
        assert bench_of(code, state_with(ENDBR_EN, rax=1 << 63 | 5)).run().gpr[RAX] == 1 << 63 | 5
        assert bench_of(code, state_with(0, rax=1 << 63 | 5)).run().gpr[RAX] == 1 << 63 | 5

    def test_restore_and_save(self) -> None:
        """To another shadow stack, leaving a token on the first to come back to."""
        other = SHADOW + 0x400
        bench = bench_of(RSTORSSP_RDI, state_with(SH_STK_EN, rdi=other))
        bench.memory.write_u64(other, other + 8 | 1)
        bench.state.rflags |= CF | ZF | OF
        bench.run_to(CODE + 4)
        assert (bench.state.ssp, bench.memory.read_u64(other)) == (other, SSP | 3)
        assert not bench.state.rflags & (CF | ZF | OF)
        bench.put(CODE + 4, SAVEPREVSSP + HLT)
        state = bench.run()
        assert (state.ssp, bench.memory.read_u64(SSP - 8)) == (other + 8, SSP | 1)

    def test_restore_with_a_hole(self) -> None:
        other = SHADOW + 0x400
        bench = bench_of(RSTORSSP_RDI, state_with(SH_STK_EN, rdi=other))
        bench.memory.write_u64(other, other + 12 | 1)
        assert bench.run().rflags & CF

    @pytest.mark.parametrize("token", [0, 8, 8 | 3, 16 | 1, 1])
    def test_restore_without_its_token(self, token: int) -> None:
        other = SHADOW + 0x400
        bench = bench_of(RSTORSSP_RDI, state_with(SH_STK_EN, rdi=other))
        bench.memory.write_u64(other, other + token if token else 0)
        assert fault_of(bench) == (Vector.CP, RSTORSSP)
        assert (bench.state.ssp, bench.memory.read_u64(other)) == (SSP, other + token if token else 0)

    def test_save_in_compatibility_mode_passes_over_the_hole(self) -> None:
        state = state_with(SH_STK_EN, compatibility=True)
        state.rflags |= CF
        bench = bench_of(SAVEPREVSSP, state)
        previous = SHADOW + 0x104
        bench.memory.write_u64(SSP, previous | 2)
        assert bench.run().ssp == SSP + 12
        assert bench.memory.read_u64(SHADOW + 0xF8) == previous
        assert bench.memory.read_u32(SHADOW + 0x100) == 0

    @pytest.mark.parametrize(
        ("token", "carry", "ssp", "hole"),
        [
            pytest.param(SHADOW + 0x100, 0, SSP, 0, id="not-previous"),
            pytest.param(SHADOW + 0x100 | 2, CF, SSP, 0, id="hole-in-64-bit-mode"),
            pytest.param(SHADOW + 0x100 | 2, 0, SSP + 4, 0, id="unaligned"),
        ],
    )
    def test_save_faults(self, token: int, carry: int, ssp: int, hole: int) -> None:
        state = state_with(SH_STK_EN)
        state.rflags |= carry
        state.ssp = ssp
        bench = bench_of(SAVEPREVSSP, state)
        bench.memory.write_u64(SSP, token)
        assert fault_of(bench) == (Vector.GP, 0)
        assert bench.state.ssp == ssp

    @pytest.mark.parametrize(("code", "stored"), [(WRSSD, 0x8765_4321), (WRSSQ, 0x1234_5678_8765_4321)])
    def test_store(self, code: str, stored: int) -> None:
        bench = bench_of(code, state_with(SH_STK_EN | WR_SHSTK_EN, rax=0x1234_5678_8765_4321, rdi=SSP))
        bench.run()
        assert bench.memory.read_u64(SSP) == stored

    @pytest.mark.parametrize("code", [WRUSSD, WRUSSQ])
    def test_store_to_the_users(self, code: str) -> None:
        state = state_with(0, rax=0x5555, rdi=SSP)
        bench = bench_of(code, state)
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.PF, 0b100_0111)  # supervisor's page
        bench = bench_of(code, state_with(0, rax=0x5555, rdi=SSP))
        bench.page(SHADOW, PRESENT | DIRTY | USER)
        bench.run()
        assert bench.memory.read_u64(SSP) == 0x5555

    def test_set_and_clear_busy(self) -> None:
        state = state_with(SH_STK_EN, rdi=SHADOW + 0xFF8)
        state.pl_ssp[0] = SHADOW + 0xFF8
        bench = bench_of(SETSSBSY_CODE, state)
        bench.memory.write_u64(SHADOW + 0xFF8, SHADOW + 0xFF8)
        bench.run_to(CODE + 4)
        assert (bench.state.ssp, bench.memory.read_u64(SHADOW + 0xFF8)) == (SHADOW + 0xFF8, SHADOW + 0xFF9)
        bench.put(CODE + 4, CLRSSBSY_RDI + HLT)
        bench.state.rflags |= CF | ZF
        state = bench.run()
        assert (state.ssp, bench.memory.read_u64(SHADOW + 0xFF8), state.rflags & (CF | ZF)) == (0, SHADOW + 0xFF8, 0)

    def test_clear_what_is_not_busy(self) -> None:
        bench = bench_of(CLRSSBSY_RDI, state_with(SH_STK_EN, rdi=SSP))
        bench.memory.write_u64(SSP, SSP)
        state = bench.run()
        assert (state.ssp, state.rflags & CF, bench.memory.read_u64(SSP)) == (0, CF, SSP)

    @pytest.mark.parametrize("token", [SSP | 1, 0, SSP + 8])
    def test_set_busy_without_a_token_that_is_free(self, token: int) -> None:
        state = state_with(SH_STK_EN)
        state.pl_ssp[0] = SSP
        bench = bench_of(SETSSBSY_CODE, state)
        bench.memory.write_u64(SSP, token)
        assert fault_of(bench) == (Vector.CP, SETSSBSY)
        assert bench.memory.read_u64(SSP) == token

    @pytest.mark.parametrize(
        ("code", "cet", "cpl", "vector"),
        [
            *(
                (code, WR_SHSTK_EN, cpl, Vector.UD)
                for code in (INCSSPQ_RAX, SAVEPREVSSP, RSTORSSP_RDI)
                for cpl in (0, 3)
            ),
            (WRSSQ, SH_STK_EN, 0, Vector.UD),
            (WRSSQ, WR_SHSTK_EN, 3, Vector.UD),
            (SETSSBSY_CODE, 0, 0, Vector.UD),
            (CLRSSBSY_RDI, 0, 0, Vector.UD),
            (WRUSSQ, SH_STK_EN, 3, Vector.GP),
        ],
    )
    def test_not_enabled(self, code: str, cet: int, cpl: int, vector: Vector) -> None:
        assert bench_of(code, state_with(cet, cpl=cpl, rdi=SSP)).event().vector == vector

    @pytest.mark.parametrize("code", [SETSSBSY_CODE, CLRSSBSY_RDI])
    def test_for_the_supervisor_alone(self, code: str) -> None:
        state = state_with(0, cpl=3, rdi=SSP)
        state.s_cet = SH_STK_EN
        assert fault_of(bench_of(code, state)) == (Vector.GP, 0)

    @pytest.mark.parametrize("code", [RSTORSSP_RDI, CLRSSBSY_RDI, WRSSQ, WRUSSQ])
    def test_operands_must_be_aligned(self, code: str) -> None:
        state = state_with(SH_STK_EN | WR_SHSTK_EN, rdi=SSP + 4)
        assert fault_of(bench_of(code, state)) == (Vector.GP, 0)

    @pytest.mark.parametrize(
        "code", [INCSSPD_EAX, INCSSPQ_RAX, SAVEPREVSSP, RSTORSSP_RDI, WRSSD, WRUSSQ, SETSSBSY_CODE, CLRSSBSY_RDI]
    )
    def test_a_processor_without_them(self, code: str) -> None:
        state = long_mode()
        state.gpr[RDI] = DATA
        assert ProcessorBench(code + HLT, state).event().vector == Vector.UD

    @pytest.mark.parametrize("code", [RDSSPQ_RAX, ENDBR64])
    def test_the_hints_of_a_processor_without_them(self, code: str) -> None:
        assert ProcessorBench(code + HLT).run().gpr[RAX] == 0x10


def test_system_registers() -> None:
    processor = bench_of("", state_with(0)).processor
    msrs = processor.msrs
    for index in (0x6A0, 0x6A2):
        assert msrs.write(index, 0x7FFF_FFFF_F83F)
        assert msrs.read(index) == 0x7FFF_FFFF_F83F
        for reserved in (0x40, 0x200, SUPPRESS | WAITING, 1 << 57):
            assert not msrs.write(index, reserved), hex(reserved)
    for level in range(4):
        assert msrs.write(0x6A4 + level, 0x7FFF_FFFF_FFFC - 8 * level)
        assert not msrs.write(0x6A4 + level, 1)
        assert not msrs.write(0x6A4 + level, 2)
        assert not msrs.write(0x6A4 + level, 1 << 57)
    assert processor.state.pl_ssp == [0x7FFF_FFFF_FFFC - 8 * level for level in range(4)]
    assert msrs.write(0x6A8, 0x1234_5678)
    assert processor.state.interrupt_ssp_table == 0x1234_5678


def test_xsaves_has_their_states() -> None:
    """Components 11 (IA32_U_CET, IA32_PL3_SSP) and 12 (the other pointers), one behind the other."""
    state = state_with(0, rax=3 << 11, rdx=0, rdi=DATA)
    state.cr4 |= 1 << 18
    state.xcr0, state.u_cet, state.pl_ssp = 3, ENDBR_EN, [0x10, 0x20, 0x30, 0x40]
    bench = bench_of("480fc72f", state)
    assert bench.processor.msrs.write(0xDA0, 3 << 11)
    bench.run_to(CODE + 4)
    assert bench.memory.read(DATA + 512, 16) == struct.pack("<QQ", 3 << 11, 1 << 63 | 3 << 11)
    assert quadwords(bench, DATA + 576, 5) == [ENDBR_EN, 0x40, 0x10, 0x20, 0x30]
    bench.memory.write(DATA + 576, struct.pack("<QQQQQ", SH_STK_EN, 0x80, 0x90, 0xA0, 0xB0))
    bench.put(CODE + 4, "480fc71f" + HLT)
    state = bench.run()
    assert (state.u_cet, state.pl_ssp) == (SH_STK_EN, [0x90, 0xA0, 0xB0, 0x80])


def test_xrstors_takes_all_or_nothing() -> None:
    state = state_with(0, rax=3 << 11, rdx=0, rdi=DATA)
    state.cr4 |= 1 << 18
    state.xcr0, state.u_cet, state.pl_ssp = 3, ENDBR_EN, [0x10, 0x20, 0x30, 0x40]
    bench = bench_of("480fc71f", state)
    assert bench.processor.msrs.write(0xDA0, 3 << 11)
    bench.memory.write(DATA + 512, struct.pack("<QQ", 3 << 11, 1 << 63 | 3 << 11))
    bench.memory.write(DATA + 576, struct.pack("<QQQQQ", SH_STK_EN, 0x81, 0x90, 0xA0, 0xB0))
    assert fault_of(bench) == (Vector.GP, 0)
    assert (state.u_cet, state.pl_ssp) == (ENDBR_EN, [0x10, 0x20, 0x30, 0x40])


@pytest.mark.parametrize(
    ("code", "cr0", "cr4", "rax"),
    [
        pytest.param("0f22e0", 0x8000_0033, 0x620, 0x620 | CET, id="cet-without-write-protect"),
        pytest.param("0f22c0", 0x8001_0033, 0x620 | CET, 0x8000_0033, id="write-protect-off-with-cet"),
    ],
)
def test_cet_needs_write_protect(code: str, cr0: int, cr4: int, rax: int) -> None:
    state = long_mode()
    state.cr0, state.cr4, state.gpr[RAX] = cr0, cr4, rax
    assert fault_of(bench_of(code, state)) == (Vector.GP, 0)
