"""FRED as machine code: how it is enabled, its instructions, and the ones that it takes over or away.

Spec: SDM Vol. 3, "Flexible Return and Event Delivery (FRED)"; SDM Vol. 2, the instructions' pages.
"""

from __future__ import annotations

import pytest
from processor_bench import CODE, DATA, GDT, STACK, ProcessorBench, long_mode

from vtx.machine import Machine
from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile
from vtx.x86.state import SegmentRegister

FRED, CET = 1 << 32, 1 << 23
ENTRY = 0xD000
RING_0_ENTRY = ENTRY + 256
STACK_0 = 0xF000  # IA32_FRED_RSP0
LEVEL_1 = 0xE000  # IA32_FRED_RSP1
IA32_EFER, IA32_STAR = 0xC000_0080, 0xC000_0081
FRED_RSP0, FRED_RSP3, STKLVLS, FRED_SSP1, FRED_SSP3, FRED_CONFIG = 0x1CC, 0x1CF, 0x1D0, 0x1D1, 0x1D3, 0x1D4
PL0_SSP = 0x6A4
RAX, RCX, RDX, RSP = 0, 1, 2, 4
TF = 1 << 8
USER_CODE, USER_STACK = 0x33, 0x2B  # 16 and 8 beyond STAR[63:48]
HLT, SYSCALL, SYSENTER, SYSRETQ, SYSEXIT, SWAPGS, IRETQ = (
    "f4",
    "0f05",
    "0f34",
    "480f07",
    "0f35",
    "0f01f8",
    "48cf",
)
ERETS, ERETU, LKGS_AX, LKGS_MEMORY = "f20f01ca", "f30f01ca", "f20f00f0", "f20f0037"
SETSSBSY, CLRSSBSY = "f30f01e8", "f30fae37"
RDMSR, WRMSR = "0f32", "0f30"
GS = SegmentRegister.GS


def bench_of(
    code: str, cpl: int = 0, *, fred: bool = True, deliver: bool = False, compatibility: bool = False
) -> ProcessorBench:
    state = long_mode(cpl, compatibility=compatibility)
    state.cr4 |= FRED if fred else 0
    state.fred_config, state.fred_rsp[:] = ENTRY, (STACK_0, LEVEL_1, 0, 0)
    if cpl == 3:
        state.cs.selector, state.ss.selector = USER_CODE, USER_STACK
    bench = ProcessorBench(code + HLT, state, profile=load_profile("everything"), deliver=deliver)
    bench.put(ENTRY, HLT)
    bench.put(RING_0_ENTRY, HLT)
    bench.processor.msrs.values[IA32_STAR] = 0x0023_0008 << 32
    return bench


def frame_at(bench: ProcessorBench, address: int) -> list[int]:
    return [bench.memory.read_u64(address + 8 * number) for number in range(8)]


def put_frame(bench: ProcessorBench, *words: int) -> None:
    for number, word in enumerate((0, *words, 0, 0)):
        bench.memory.write_u64(STACK + 8 * number, word)


def fault_of(bench: ProcessorBench) -> tuple[int, int | None]:
    event = bench.event()
    assert bench.places[-1] == CODE
    return event.vector, event.error_code


class TestEnabling:
    def test_mov_to_cr4(self) -> None:
        bench = bench_of("0f22e0", fred=False)
        bench.state.gpr[RAX] = bench.state.cr4 | FRED
        assert bench.run().cr4 & FRED

    def test_not_on_a_processor_without(self) -> None:
        bench = ProcessorBench("0f22e0" + HLT, profile=load_profile("skylake-server"))
        bench.state.gpr[RAX] = bench.state.cr4 | FRED
        assert fault_of(bench) == (Vector.GP, 0)

    def test_paging_stays_on(self) -> None:
        bench = bench_of("0f22c0", compatibility=True)
        bench.state.gpr[RAX] = bench.state.cr0 & ~(1 << 31)
        assert fault_of(bench) == (Vector.GP, 0)

    @pytest.mark.parametrize(
        ("index", "value", "fits"),
        [
            (FRED_RSP0, 0xFFFF_8000_0000_0040, True),
            (FRED_RSP0, 0x20, False),
            (FRED_RSP3, 0x8000_0000_0000, False),
            (STKLVLS, 0xFFFF_FFFF_FFFF_FFFF, True),
            (FRED_SSP1, 0x1008, True),
            (FRED_SSP3, 0x1004, False),
            (FRED_SSP3, 0x8000_0000_0000, False),
            (FRED_CONFIG, 0xFFFF_8000_0000_17CB & ~0x1000, True),
            (FRED_CONFIG, 1 << 2, False),
            (FRED_CONFIG, 1 << 4, False),
            (FRED_CONFIG, 1 << 5, False),
            (FRED_CONFIG, 1 << 11, False),
            (FRED_CONFIG, 0x8000_0000_0000, False),
            (PL0_SSP, 0x1008, True),
        ],
    )
    def test_msrs(self, index: int, value: int, fits: bool) -> None:
        bench = bench_of(WRMSR + "31c031d2" + RDMSR)
        bench.state.gpr[RAX], bench.state.gpr[RCX], bench.state.gpr[RDX] = value & 0xFFFF_FFFF, index, value >> 32
        if fits:
            state = bench.run()
            assert state.gpr[RDX] << 32 | state.gpr[RAX] == value
        else:
            assert fault_of(bench) == (Vector.GP, 0)

    @pytest.mark.parametrize("index", [FRED_RSP0, STKLVLS, FRED_SSP1, FRED_CONFIG])
    def test_no_msrs_on_a_processor_without(self, index: int) -> None:
        bench = ProcessorBench(RDMSR, profile=load_profile("skylake-server"))
        bench.state.gpr[RCX] = index
        assert fault_of(bench) == (Vector.GP, 0)

    @pytest.mark.parametrize("code", [ERETS, ERETU, LKGS_AX])
    def test_no_instructions_on_a_processor_without(self, code: str) -> None:
        assert fault_of(ProcessorBench(code, profile=load_profile("skylake-server"))) == (Vector.UD, None)


class TestEvents:
    def test_an_exception(self) -> None:
        bench = bench_of("0f0b", deliver=True)
        state = bench.run()
        assert state.rip == RING_0_ENTRY + 1
        information = 0x10 | 6 << 32 | 3 << 48 | 1 << 57
        assert frame_at(bench, state.gpr[RSP]) == [0, CODE, 0x08, 0x1_0002, STACK, information, 0, 0]

    def test_a_page_fault(self) -> None:
        bench = bench_of("488b0425" + "00f00f00", deliver=True)
        bench.page(0xF_F000, 0)
        state = bench.run()
        assert frame_at(bench, state.gpr[RSP])[6] == state.cr2 == 0xF_F000

    def test_int_n_from_ring_3_needs_no_gate(self) -> None:
        bench = bench_of("cd0d", 3, deliver=True)
        state = bench.run()
        assert (state.rip, state.gpr[RSP], state.cpl) == (ENTRY + 1, STACK_0 - 64, 0)
        information = USER_STACK | 1 << 17 | 13 << 32 | 4 << 48 | 1 << 57 | 2 << 60
        assert frame_at(bench, STACK_0 - 64) == [0, CODE + 2, USER_CODE, 2, STACK, information, 0, 0]

    @pytest.mark.parametrize(("code", "vector"), [(SYSCALL, 1), (SYSENTER, 2)])
    @pytest.mark.parametrize("cpl", [0, 3])
    def test_system_calls(self, code: str, vector: int, cpl: int) -> None:
        bench = bench_of(code, cpl, deliver=True)
        state = bench.run()
        assert state.rip == (ENTRY if cpl else RING_0_ENTRY) + 1
        frame = frame_at(bench, state.gpr[RSP])
        assert (frame[1], frame[3], frame[6]) == (CODE + 2, 2, 0)
        assert frame[5] == (USER_STACK if cpl else 0x10) | 1 << 17 | vector << 32 | 7 << 48 | 1 << 57 | 2 << 60
        assert (state.gpr[RCX], state.gpr[11]) == (0x20, 0xC0)

    def test_syscall_needs_no_enable(self) -> None:
        """EFER.SCE is for the other kind of SYSCALL."""
        bench = bench_of(SYSCALL)
        bench.state.efer &= ~1
        event = bench.event()
        assert (event.vector, int(event.kind)) == (1, 7)

    def test_there_and_back(self) -> None:
        """A system call from ring 3, answered by ERETU; bit 17 of SS makes it no trap without TF."""
        bench = bench_of(SYSCALL + "cd80", 3, deliver=True)
        bench.put(ENTRY, "48ffc3" + ERETU)
        state = bench.state
        bench.state.gpr[3] = 0
        for _ in range(40):
            bench.processor.run_once()
            if state.gpr[3] == 2:
                break
        assert state.gpr[3] == 2
        assert frame_at(bench, STACK_0 - 64)[1] == CODE + 4

    def test_a_stepped_system_call_traps_behind_it(self) -> None:
        """The handler returns, but halts if the event is a hardware exception."""
        bench = bench_of(SYSCALL + "90", 3, deliver=True)
        bench.put(ENTRY, "807c242e03" + "7404" + ERETU + HLT)
        bench.state.rflags |= TF
        bench.run()
        frame = frame_at(bench, STACK_0 - 64)
        assert (frame[1], frame[5] >> 32 & 0xFF, frame[6]) == (CODE + 2, 1, 1 << 14)


class TestReturns:
    def test_erets(self) -> None:
        bench = bench_of(ERETS)
        put_frame(bench, CODE + 0x100, 0x08, 0x2, DATA, 0x10)
        bench.put(CODE + 0x100, HLT)
        state = bench.run()
        assert (state.rip, state.gpr[RSP], state.rflags) == (CODE + 0x101, DATA, 2)

    def test_blocking_by_sti_holds_one_instruction(self) -> None:
        bench = bench_of(ERETS)
        put_frame(bench, CODE + 0x100, 0x08, 0x202, DATA, 0x10 | 1 << 16)
        bench.put(CODE + 0x100, "9090" + HLT)
        bench.platform.vector = 0x40
        assert bench.event().vector == 0x40
        assert bench.places == [CODE + 0x101]

    def test_bit_18_ends_blocking_by_nmi(self) -> None:
        bench = bench_of(ERETS)
        bench.state.nmi_blocked = True
        put_frame(bench, CODE + 4, 0x08, 0x2, DATA, 0x10 | 1 << 18)
        assert not bench.run().nmi_blocked

    def test_without_bit_18_nmis_stay_blocked(self) -> None:
        bench = bench_of(ERETS)
        bench.state.nmi_blocked = True
        put_frame(bench, CODE + 4, 0x08, 0x2, DATA, 0x10)
        assert bench.run().nmi_blocked

    def test_a_fault_leaves_nmis_blocked(self) -> None:
        bench = bench_of(ERETS)
        bench.state.nmi_blocked = True
        put_frame(bench, CODE + 4, 0x10, 0x2, DATA, 0x10 | 1 << 18)
        assert fault_of(bench) == (Vector.GP, 0)
        assert bench.state.nmi_blocked

    def test_eretu(self) -> None:
        bench = bench_of(ERETU)
        put_frame(bench, CODE + 4, USER_CODE, 0x2, DATA, USER_STACK)
        bench.put(CODE + 4, "cd40")
        bench.state.gpr[RSP] = STACK
        assert bench.event().vector == 0x40
        assert (bench.state.cpl, bench.state.cs.selector, bench.state.gpr[RSP]) == (3, USER_CODE, DATA)


class TestGs:
    @pytest.mark.parametrize("code", [LKGS_AX, LKGS_MEMORY])
    def test_lkgs(self, code: str) -> None:
        bench = bench_of(code, fred=False)
        state = bench.state
        state.segments[GS].base, state.gpr[RAX], state.gpr[7] = 0x7000, 0x28, DATA
        bench.memory.write_u64(DATA, 0x28)
        bench.descriptor(0x28, 0x12CF_9334_5678_FFFF)
        bench.run()
        assert (state.segments[GS].selector, state.segments[GS].base) == (0x28, 0x7000)
        assert state.kernel_gs_base == 0x1234_5678

    def test_lkgs_of_a_null_selector(self) -> None:
        bench = bench_of(LKGS_AX)
        bench.state.gpr[RAX], bench.state.kernel_gs_base = 0, 0x9000
        bench.run()
        assert (bench.state.segments[GS].selector, bench.state.kernel_gs_base) == (0, 0)

    def test_lkgs_faults_as_a_load_does(self) -> None:
        bench = bench_of(LKGS_AX)
        bench.state.gpr[RAX] = 0x78
        assert fault_of(bench) == (Vector.GP, 0x78)

    @pytest.mark.parametrize(("cpl", "compatibility"), [(3, False), (0, True)])
    def test_lkgs_is_invalid_there(self, cpl: int, compatibility: bool) -> None:
        assert fault_of(bench_of(LKGS_AX, cpl, fred=False, compatibility=compatibility)) == (Vector.UD, None)

    def test_swapgs_without_fred(self) -> None:
        bench = bench_of(SWAPGS, fred=False)
        bench.state.segments[GS].base, bench.state.kernel_gs_base = 0x7000, 0x8000
        bench.processor.load_control_state()
        state = bench.run()
        assert (state.segments[GS].base, state.kernel_gs_base) == (0x8000, 0x7000)


class TestWhatItTakesAway:
    @pytest.mark.parametrize("code", [SWAPGS, SYSRETQ, SYSEXIT])
    def test_invalid_opcodes(self, code: str) -> None:
        assert fault_of(bench_of(code)) == (Vector.UD, None)

    @pytest.mark.parametrize("code", [SETSSBSY, CLRSSBSY])
    def test_busy_bits_of_shadow_stacks(self, code: str) -> None:
        bench = bench_of(code)
        bench.state.cr4 |= CET
        bench.state.s_cet, bench.state.gpr[7] = 1, DATA
        bench.processor.load_control_state()
        assert fault_of(bench) == (Vector.UD, None)

    def test_iret_to_ring_3(self) -> None:
        bench = bench_of(IRETQ)
        bench.descriptor(0x28, 0x00AF_FB00_0000_FFFF)
        for number, word in enumerate((CODE, 0x2B, 2, STACK, 0x23)):
            bench.memory.write_u64(STACK + 8 * number, word)
        assert fault_of(bench) == (Vector.GP, 0x28)

    def test_iret_to_32_bit_code_of_ring_0(self) -> None:
        bench = bench_of(IRETQ)
        for number, word in enumerate((CODE, 0x18, 2, STACK, 0x10)):
            bench.memory.write_u64(STACK + 8 * number, word)
        assert fault_of(bench) == (Vector.GP, 0x18)

    def test_iret_on_the_same_level(self) -> None:
        bench = bench_of(IRETQ)
        for number, word in enumerate((CODE + 0x100, 0x08, 2, DATA, 0x10)):
            bench.memory.write_u64(STACK + 8 * number, word)
        bench.put(CODE + 0x100, HLT)
        assert bench.run().rip == CODE + 0x101

    def test_a_far_return_to_ring_3(self) -> None:
        bench = bench_of("48cb")
        bench.descriptor(0x28, 0x00AF_FB00_0000_FFFF)
        for number, word in enumerate((CODE, 0x2B, STACK, 0x23)):
            bench.memory.write_u64(STACK + 8 * number, word)
        assert fault_of(bench) == (Vector.GP, 0x28)

    @pytest.mark.parametrize("code", ["48ff1f", "48ff2f"], ids=["CALL", "JMP"])
    def test_far_transfers_to_32_bit_code_of_ring_0(self, code: str) -> None:
        bench = bench_of(code)
        bench.state.gpr[7] = DATA
        bench.memory.write_u64(DATA, CODE)
        bench.memory.write_u64(DATA + 8, 0x18)
        assert fault_of(bench) == (Vector.GP, 0x18)

    def test_a_call_gate_to_ring_0(self) -> None:
        bench = bench_of("48ff1f", 3)
        bench.state.gpr[7] = DATA
        bench.memory.write_u64(DATA + 8, 0x2B)
        bench.memory.write_u64(GDT + 0x28, 0x0000_EC00_0008_1000)
        bench.memory.write_u64(GDT + 0x30, 0)
        assert fault_of(bench) == (Vector.GP, 0x28)


def test_init_keeps_the_msrs() -> None:
    machine = Machine(memory=2 << 20, profile=load_profile("everything"))
    state = machine.cpu.state
    state.fred_config, state.fred_stack_levels, state.fred_rsp[2], state.fred_ssp[2] = ENTRY, 5, 0x4000, 0x5000
    machine.cpu.init()
    machine.cpu.run_once()
    assert state.rip == 0xFFF0
    assert (state.fred_config, state.fred_stack_levels) == (ENTRY, 5)
    assert (state.fred_rsp[2], state.fred_ssp[2]) == (0x4000, 0x5000)
