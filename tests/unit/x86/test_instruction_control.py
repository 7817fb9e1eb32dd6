"""Control and debug registers, TLB invalidation, FS and GS bases, executed as machine code.

Spec: SDM Vol. 2, the instructions' pages; Vol. 3, "Control Registers", "Debug Registers".
"""

from __future__ import annotations

import pytest
from processor_bench import (
    ABSENT,
    CODE,
    DATA,
    PRESENT,
    TABLES,
    USER,
    WRITABLE,
    ProcessorBench,
    long_mode,
    protected_mode,
)

from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
GP0 = (Vector.GP, 0)
UD = (Vector.UD, None)

PE, MP, TS, ET, NE, WP, AM, NW, CD, PG = (1 << n for n in (0, 1, 3, 4, 5, 16, 18, 29, 30, 31))
PAE, PCIDE, OSXSAVE, SMEP, UMIP, DE, FSGSBASE, SMAP, LA57, TSD = (1 << n for n in (5, 17, 18, 20, 11, 3, 16, 21, 12, 2))


def fault(code: str, state: CpuState | None = None, **registers: int) -> tuple[object, object]:
    """Vector and error code of the fault that ``code`` raises, with RIP at it and registers unchanged."""
    bench = prepared(code, state, **registers)
    before = list(bench.state.gpr), bench.state.cr0, bench.state.cr3, bench.state.cr4, bench.state.dr7
    event = bench.event()
    assert bench.state.rip == CODE
    assert (list(bench.state.gpr), bench.state.cr0, bench.state.cr3, bench.state.cr4, bench.state.dr7) == before
    return event.vector, event.error_code


def prepared(code: str, state: CpuState | None = None, **registers: int) -> ProcessorBench:
    bench = ProcessorBench(code + "f4", state)
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    for name, value in registers.items():
        bench.state.gpr[names.index(name)] = value
    return bench


def after(code: str, state: CpuState | None = None, **registers: int) -> CpuState:
    """The state after ``code`` and a HLT."""
    return prepared(code, state, **registers).run()


class TestMoveToCr0:
    """MOV CR0, RAX."""

    LONG = PG | PE | NE | ET | WP

    @pytest.mark.parametrize(
        "value",
        [
            pytest.param(LONG & ~PE, id="PG-without-PE"),
            pytest.param(LONG | NW, id="NW-without-CD"),
            pytest.param(LONG | 1 << 32, id="bit-32"),
            pytest.param(LONG | 1 << 63, id="bit-63"),
            pytest.param(LONG & ~PG, id="clear-PG-in-64-bit-mode"),
        ],
    )
    def test_rejects(self, value: int) -> None:
        assert fault("0f22c0", rax=value) == GP0

    def test_extension_type_is_hard_wired(self) -> None:
        assert after("0f22c0", rax=self.LONG & ~ET).cr0 & ET

    def test_undefined_low_bits_are_ignored(self) -> None:
        assert after("0f22c0", rax=self.LONG | 1 << 7 | 1 << 20).cr0 == self.LONG

    def test_mod_field_is_ignored(self) -> None:
        """SDM Vol. 2: the two mod bits are treated as 11B whatever they are."""
        assert after("0f2200", rax=self.LONG | TS).cr0 == self.LONG | TS

    def test_write_protection_counts_at_once(self) -> None:
        """A read-only page becomes writable for the supervisor when WP is cleared, and back."""
        bench = prepared("0f22c088070f22c38807", rax=self.LONG & ~WP, rbx=self.LONG, rdi=ABSENT)
        bench.page(ABSENT, PRESENT)
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.PF, 3)
        assert bench.state.rip == CODE + 8
        assert bench.memory.read_u8(ABSENT) == bench.state.gpr[RAX] & 0xFF

    def test_enabling_paging_activates_long_mode(self) -> None:
        state = protected_mode()
        state.cr4, state.efer = PAE, 0x100
        result = after("0f22c0", state, rax=PG | PE | NE)
        assert result.efer == 0x500
        assert result.cr0 == PG | PE | NE | ET

    def test_long_mode_needs_pae(self) -> None:
        state = protected_mode()
        state.cr4, state.efer = 0, 0x100
        assert fault("0f22c0", state, rax=PG | PE) == GP0

    def test_fpu_instructions_trap_at_once(self) -> None:
        bench = prepared("0f22c0d9e8", rax=self.LONG | TS)
        assert bench.event().vector == Vector.NM
        assert bench.state.rip == CODE + 3


class TestMoveToCr3AndCr4:
    """MOV CR3, RAX and MOV CR4, RAX."""

    @pytest.mark.parametrize("bit", [46, 51, 52, 62, 63])
    def test_cr3_beyond_the_physical_width(self, bit: int) -> None:
        assert fault("0f22d8", rax=TABLES | 1 << bit) == GP0

    def test_cr3_bit_63_is_a_request_with_pcids(self) -> None:
        state = long_mode()
        state.cr4 |= PCIDE
        assert after("0f22d8", state, rax=TABLES | 1 << 63 | 5).cr3 == TABLES | 5

    @pytest.mark.parametrize(
        ("bits", "clear"),
        [(1 << 15, 0), (1 << 14, 0), (1 << 24, 0), (1 << 23, 0), (1 << 31, 0), (1 << 32, 0), (LA57, 0), (0, PAE)],
        ids=["bit-15", "SMXE", "PKS", "CET", "bit-31", "bit-32", "LA57", "clear-PAE"],
    )
    def test_cr4_rejects(self, bits: int, clear: int) -> None:
        assert fault("0f22e0", rax=0x620 & ~clear | bits) == GP0

    def test_pcide_needs_pcid_0(self) -> None:
        state = long_mode()
        state.cr3 |= 0x18
        assert fault("0f22e0", state, rax=0x620 | PCIDE) == GP0
        assert after("0f22e0", rax=0x620 | PCIDE).cr4 == 0x620 | PCIDE

    def test_pcide_needs_long_mode(self) -> None:
        assert fault("0f22e0", protected_mode(), rax=0x600 | PCIDE) == GP0

    def test_smep_counts_at_once(self) -> None:
        bench = prepared("0f22e090", rax=0x620 | SMEP)
        event = bench.event()  # all pages are user pages
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 0x11, CODE + 3)

    def test_smap_counts_at_once_and_ac_lifts_it(self) -> None:
        # MOV CR4; STAC; load; CLAC; load
        bench = prepared("0f22e00f01cb8a070f01ca8a07", rax=0x620 | SMAP, rdi=ABSENT)
        bench.page(CODE, PRESENT)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 1, ABSENT)
        assert bench.state.rip == CODE + 11


class TestOtherControlRegisters:
    """CR2, CR8, reads, undefined numbers."""

    def test_reads(self) -> None:
        state = long_mode()
        state.cr2 = 0x1234_5678_9ABC_DEF0
        bench = prepared("0f20c00f20d10f20da0f20e3440f20c6", state)
        bench.platform.task_priority = 9
        state = bench.run()
        assert state.gpr[:4] == [state.cr0, 0x1234_5678_9ABC_DEF0, TABLES, state.cr4]
        assert state.gpr[RSI] == 9

    def test_write_cr2(self) -> None:
        assert after("0f22d0", rax=0xFEED_0000_0000_0001).cr2 == 0xFEED_0000_0000_0001

    def test_write_cr8(self) -> None:
        bench = prepared("440f22c0", rax=0xC)
        bench.run()
        assert bench.platform.task_priority == 0xC

    @pytest.mark.parametrize("value", [0x10, 1 << 63])
    def test_cr8_has_four_bits(self, value: int) -> None:
        assert fault("440f22c0", rax=value) == GP0

    @pytest.mark.parametrize("code", ["0f22c8", "0f22e8", "0f22f8", "0f20c8", "440f22c8", "440f20f8"])
    def test_others_do_not_exist(self, code: str) -> None:
        assert fault(code) == UD

    def test_32_bit_code_uses_32_bits(self) -> None:
        state = protected_mode()
        state.cr2 = 0xABCD_0000
        assert after("0f20d0", state).gpr[RAX] == 0xABCD_0000


class TestMachineStatusWord:
    """CLTS, LMSW, SMSW."""

    def test_clts(self) -> None:
        state = long_mode()
        state.cr0 |= TS
        assert not after("0f06d9e8", state).cr0 & TS

    def test_lmsw_sets_the_low_bits_only(self) -> None:
        state = long_mode()
        before = state.cr0
        assert after("0f01f0", state, rax=0xFFFF_FFFF).cr0 == before | 0xF

    def test_lmsw_does_not_clear_pe(self) -> None:
        state = long_mode()
        before = state.cr0
        assert after("0f01f0", state, rax=0).cr0 == before & ~0xE

    def test_lmsw_from_memory(self) -> None:
        bench = prepared("0f0137", rdi=DATA)
        bench.memory.write_u16(DATA, 0x8)
        assert bench.run().cr0 & TS

    @pytest.mark.parametrize(
        ("code", "mask"),
        [("0f01e0", 0xFFFF_FFFF), ("480f01e0", (1 << 64) - 1)],
        ids=["32", "64"],
    )
    def test_smsw_to_a_register(self, code: str, mask: int) -> None:
        state = long_mode()
        assert after(code, state, rax=(1 << 64) - 1).gpr[RAX] & mask == state.cr0

    def test_smsw_to_16_bits_keeps_the_rest(self) -> None:
        state = long_mode()
        assert (
            after("660f01e0", state, rax=0x1111_2222_3333_4444).gpr[RAX] == 0x1111_2222_3333_0000 | state.cr0 & 0xFFFF
        )

    def test_smsw_to_memory_is_16_bits(self) -> None:
        bench = prepared("480f0127", rdi=DATA)
        bench.put(DATA, b"\xee" * 8)
        bench.run()
        assert bench.memory.read(DATA, 8) == (bench.state.cr0 & 0xFFFF).to_bytes(2, "little") + b"\xee" * 6

    @pytest.mark.parametrize("code", ["0f01e0", "0f0107", "0f010f", "0f00c0", "0f00c8"])
    def test_umip(self, code: str) -> None:
        """SMSW, SGDT, SIDT, SLDT, STR."""
        state = long_mode(3)
        state.cr4 |= UMIP
        assert fault(code, state, rdi=DATA) == GP0
        bench = prepared(code + "0fa2", long_mode(3), rdi=DATA)
        bench.run_to(CODE + len(code) // 2 + 2)


class TestDebugRegisters:
    """MOV to and from DRn."""

    def test_addresses_take_64_bits(self) -> None:
        assert after("0f23d8", rax=0xFFFF_8000_1234_5678).dr[3] == 0xFFFF_8000_1234_5678

    def test_status_has_fixed_bits(self) -> None:
        assert after("0f23f0", rax=0).dr6 == 0xFFFF_0FF0
        assert after("0f23f0", rax=0xE00F).dr6 == 0xFFFF_EFFF

    def test_control_has_fixed_bits(self) -> None:
        assert after("0f23f8", rax=0).dr7 == 0x400
        assert after("0f23f8", rax=0xD800).dr7 == 0x400

    @pytest.mark.parametrize("code", ["0f23f0", "0f23f8"])
    def test_upper_half_of_status_and_control_is_reserved(self, code: str) -> None:
        assert fault(code, rax=1 << 32) == GP0

    def test_4_and_5_are_other_names(self) -> None:
        state = long_mode()
        state.dr6 = 0xFFFF_4FF0
        assert after("0f21e00f21eb", state).gpr[RAX] == 0xFFFF_4FF0
        assert state.gpr[RBX] == 0x400

    @pytest.mark.parametrize("code", ["0f21e0", "0f23e8"])
    def test_4_and_5_do_not_exist_with_debugging_extensions(self, code: str) -> None:
        state = long_mode()
        state.cr4 |= DE
        assert fault(code, state) == UD

    @pytest.mark.parametrize("code", ["0f21c0", "0f23c0", "0f21f8"])
    def test_general_detect(self, code: str) -> None:
        state = long_mode()
        state.dr7 |= 1 << 13
        bench = prepared(code, state)
        event = bench.event()
        assert (event.vector, event.debug) == (Vector.DB, 1 << 13)
        assert bench.state.rip == CODE

    @pytest.mark.parametrize("code", ["440f21c0", "440f23c0"])
    def test_8_and_up_do_not_exist(self, code: str) -> None:
        assert fault(code) == UD


class TestInvalidation:
    """Cached translations stay until they are invalidated, and go when they are."""

    def cached(self, code: str, **registers: int) -> ProcessorBench:
        """MOV AL, [RDI]; the code; MOV BL, [RDI]; HLT. The page is remapped while it is cached."""
        bench = prepared("8a070fa2" + code + "8a1f", rdi=ABSENT, **registers)
        bench.put(ABSENT, "11")
        bench.put(0x2000, "22")
        bench.run_to(CODE + 2 + 2)
        bench.page(ABSENT, PRESENT | WRITABLE | USER, frame=0x2000)
        return bench

    def test_nothing__keeps_the_old_translation(self) -> None:
        assert self.cached("90").run().gpr[RBX] & 0xFF == 0x11

    @pytest.mark.parametrize(
        "code",
        ["0f013f", "0f20d80f22d8", "0f20e0488d9880000000 0f22e3 0f22e0".replace(" ", "")],
        ids=["INVLPG", "MOV-CR3", "CR4.PGE-twice"],
    )
    def test_invalidation(self, code: str) -> None:
        assert self.cached(code).run().gpr[RBX] & 0xFF == 0x22

    def test_invlpg_of_another_page_keeps_it(self) -> None:
        bench = self.cached("0f013e", rsi=DATA)
        bench.state.gpr[RSI] = DATA
        assert bench.run().gpr[RBX] & 0xFF == 0x11

    def test_invlpg_of_a_non_canonical_address_does_nothing(self) -> None:
        after("0f013f", rdi=0x8000_0000_0000_0000)

    @pytest.mark.parametrize("kind", [0, 1, 2, 3])
    def test_invpcid(self, kind: int) -> None:
        bench = self.cached("660f388206")
        bench.state.gpr[RAX], bench.state.gpr[RSI] = kind, DATA
        bench.memory.write_u64(DATA + 8, ABSENT)
        assert bench.run().gpr[RBX] & 0xFF == 0x22

    @pytest.mark.parametrize(
        ("kind", "pcid", "linear"),
        [(4, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1 << 12, 0), (0, 0, 1 << 47)],
        ids=["type-4", "type-wide", "pcid-0", "pcid-1", "reserved", "non-canonical"],
    )
    def test_invpcid_rejects(self, kind: int, pcid: int, linear: int) -> None:
        bench = prepared("660f388206", rax=kind, rsi=DATA)
        bench.memory.write_u64(DATA, pcid)
        bench.memory.write_u64(DATA + 8, linear)
        event = bench.event()
        assert (event.vector, event.error_code) == GP0

    def test_accessed_and_dirty_flags_are_set_by_real_accesses(self) -> None:
        bench = prepared("8a070fa28807", rdi=ABSENT)
        bench.run_to(CODE + 4)
        entry = TABLES + 0x3000 + 8 * (ABSENT >> 12)
        assert bench.memory.read_u64(entry) & 0x60 == 0x20
        bench.run()
        assert bench.memory.read_u64(entry) & 0x60 == 0x60


class TestSegmentBases:
    """RDFSBASE and its relatives, SWAPGS, the base MSRs: seen by the code that the engine runs."""

    def state(self) -> CpuState:
        state = long_mode()
        state.cr4 |= FSGSBASE
        return state

    def test_write_then_use(self) -> None:
        # WRFSBASE RAX; MOV BL, FS:[10h]; RDFSBASE RDX
        bench = prepared("f3480faed0648a1c2510000000f3480faec2", self.state(), rax=DATA)
        bench.put(DATA + 0x10, "77")
        state = bench.run()
        assert state.gpr[RBX] & 0xFF == 0x77
        assert state.gpr[RDX] == DATA

    def test_32_bit_form_clears_the_upper_half(self) -> None:
        state = after("f30faed8f30faeca", self.state(), rax=0xFFFF_FFFF_1234_5678, rdx=(1 << 64) - 1)
        assert state.segments[5].base == 0x1234_5678
        assert state.gpr[RDX] == 0x1234_5678

    def test_needs_cr4(self) -> None:
        assert fault("f3480faed0") == UD

    def test_needs_a_canonical_base(self) -> None:
        assert fault("f3480faed0", self.state(), rax=1 << 47) == GP0

    def test_swapgs_and_the_msr(self) -> None:
        # WRMSR KERNEL_GS_BASE; SWAPGS; MOV BL, GS:[0]; RDMSR GS_BASE
        code = "b9020100c00f300f01f8658a1c2500000000b9010100c00f32"
        bench = prepared(code, rax=DATA, rdx=0)
        bench.put(DATA, "5a")
        state = bench.run()
        assert state.gpr[RBX] & 0xFF == 0x5A
        assert state.gpr[RAX] == DATA
        assert state.segments[5].base == DATA
        assert state.kernel_gs_base == 0

    def test_fs_base_msr_counts_at_once(self) -> None:
        bench = prepared("b9000100c00f30648a1c2500000000", rax=DATA, rdx=0)
        bench.put(DATA, "3c")
        assert bench.run().gpr[RBX] & 0xFF == 0x3C


@pytest.mark.parametrize("code", ["0f01ca", "0f01cb"])
def test_clac_and_stac_exist_at_cpl_0_only(code: str) -> None:
    assert fault(code, long_mode(3)) == UD
