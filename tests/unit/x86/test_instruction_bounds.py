"""The instructions of Intel MPX as machine code: NOPs where it is not enabled, bounds and bound tables where it is.

Spec: SDM Vol. 1, "Intel MPX Instruction Summary", "Intel MPX and Operating Modes", "BOUND Instruction and Intel MPX";
SDM Vol. 2, the instructions' pages.
"""

from __future__ import annotations

import struct

import pytest
from bounds_bench import ALL, ENABLE, HLT, OSXSAVE, PRESERVE, bench_of, bound, give, state_with
from processor_bench import (
    ABSENT,
    CODE,
    DATA,
    PRESENT,
    WRITABLE,
    ProcessorBench,
    long_mode,
    protected_mode,
    real_mode,
)

from vtx.x86.bounds import legal_configuration
from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile

RAX, RSP, RBP = 0, 4, 5
DIRECTORY = 0xA000
TABLE = 0x20000
LOW = (1 << 32) - 1


VALID = {
    "bndmk": "f30f1b07",
    "bndcl": "f30f1a07",
    "bndcu": "f20f1a07",
    "bndcn": "f20f1b07",
    "bndmov-load": "660f1a07",
    "bndmov-store": "660f1b07",
    "bndmov": "660f1ac1",
    "bndldx": "0f1a07",
    "bndstx": "0f1b07",
}
INVALID = {
    "bnd4": "f30f1b27",
    "bnd4-as-rm": "660f1ac4",
    "bnd7-bndcl": "f30f1a3f",
    "bnd5-bndcu": "f20f1a2f",
    "bnd6-bndcn": "f20f1b37",
    "bnd4-bndldx": "0f1a27",
    "bnd8": "f3440f1b07",
    "bnd8-as-rm": "66410f1ac0",
    "bndmk-relative": "f30f1b0500000000",
    "bndldx-relative": "0f1a0500000000",
    "bndstx-relative": "0f1b0500000000",
}


class TestNotEnabled:
    """The bytes are those of NOPs then, in the engine, with its own idea of Intel MPX off."""

    @pytest.mark.parametrize("code", [*VALID.values(), *INVALID.values()], ids=[*VALID, *INVALID])
    @pytest.mark.parametrize("why", ["osxsave", "bndregs", "bndcsr", "enable", "privilege"])
    def test_nop(self, code: str, why: str) -> None:
        state = give(state_with(rdi=ABSENT), 5, 6)
        if why == "osxsave":
            state.cr4 &= ~OSXSAVE
        elif why in ("bndregs", "bndcsr"):
            state.xcr0 &= ~(8 if why == "bndregs" else 16)
        else:
            state.bndcfgs, state.bndcfgu = 0 if why == "enable" else PRESERVE, ENABLE
        after = bench_of(code + "ffc0", state).run()
        assert (after.rip, after.gpr[RAX]) == (CODE + len(code) // 2 + 3, 0x11)
        assert (bound(after), after.bndstatus) == ((5, 6), 0)

    def test_forms_that_are_nops_even_where_it_is(self) -> None:
        """BNDMK, BNDLDX and BNDSTX of registers, of any number."""
        after = bench_of("f30f1bc1" + "0f1ac1" + "0f1bf9", give(state_with(), 5, 6)).run()
        assert (after.rip, bound(after)) == (CODE + 11, (5, 6))

    def test_a_processor_without_it(self) -> None:
        state = long_mode()
        bench = ProcessorBench("".join(VALID.values()) + HLT, state, profile=load_profile("nehalem-server"))
        assert bench.run().rip == CODE + len("".join(VALID.values())) // 2 + 1

    @pytest.mark.parametrize("code", ["f00f1b07", "f0660f1b07", "f0f30f1b07"])
    def test_lock(self, code: str) -> None:
        assert bench_of(code, long_mode()).event().vector == Vector.UD


class TestInvalid:
    @pytest.mark.parametrize("code", INVALID.values(), ids=INVALID)
    def test_in_64_bit_mode(self, code: str) -> None:
        bench = bench_of("90" + code)
        assert (bench.event().vector, bench.places) == (Vector.UD, [CODE + 1])

    @pytest.mark.parametrize("code", [VALID[name] for name in VALID if name != "bndmov-store"])
    def test_lock(self, code: str) -> None:
        assert bench_of("f0" + code, state_with(rdi=DATA)).event().vector == Vector.UD

    def test_lock_before_a_store(self) -> None:
        bench = bench_of("f0660f1b07", give(state_with(rdi=DATA), 5, 6))
        bench.run()
        assert (bench.memory.read_u64(DATA), bench.memory.read_u64(DATA + 8)) == (5, 6)
        assert bench_of("f0660f1b27", state_with(rdi=DATA)).event().vector == Vector.UD

    @pytest.mark.parametrize("code", [code for name, code in VALID.items() if name != "bndmov"])
    @pytest.mark.parametrize("bits", [16, 32])
    def test_16_bit_addresses(self, code: str, bits: int) -> None:
        narrow = code if bits == 16 else "67" + code
        assert bench_of(narrow, state_with(state=protected_mode(bits=bits))).event().vector == Vector.UD

    @pytest.mark.parametrize("bits", [16, 32])
    @pytest.mark.parametrize("prefix", ["", "67"])
    def test_registers_have_no_address_size(self, prefix: str, bits: int) -> None:
        state = give(state_with(state=protected_mode(bits=bits)), 5, 6, 1)
        assert bound(bench_of(prefix + "660f1ac1", state).run()) == (5, 6)


class TestMake:
    @pytest.mark.parametrize(
        ("code", "lower", "end"),
        [
            pytest.param("f30f1b07", 0x5000, 0x5000, id="base"),
            pytest.param("f30f1b443710", 0x5000, 0x5000 + 0x30 + 0x10, id="base-index-displacement"),
            pytest.param("f30f1b44f7f0", 0x5000, 0x5000 + 8 * 0x30 - 0x10, id="scale"),
            pytest.param("f30f1b042534120000", 0, 0x1234, id="displacement-alone"),
            pytest.param("f30f1b04f500010000", 0, 0x100 + 8 * 0x30, id="index-alone"),
            pytest.param("f3480f1b07", 0x5000, 0x5000, id="rex-w"),
        ],
    )
    def test_bounds(self, code: str, lower: int, end: int) -> None:
        state = bench_of(code, state_with(rdi=0x5000, rsi=0x30)).run()
        assert bound(state) == (lower, ALL ^ end)

    @pytest.mark.parametrize("code", ["67f30f1b07", "f3670f1b07", "4867f30f1b07"])
    def test_addresses_have_64_bits_in_64_bit_mode(self, code: str) -> None:
        assert bound(bench_of(code, state_with(rdi=0x1_2345_0000_0000)).run())[0] == 0x1_2345_0000_0000

    def test_rex_that_the_prefix_makes_void(self) -> None:
        """REX.R before another prefix does not make BND8 of BND0."""
        assert bound(bench_of("4467f30f1b07", state_with(rdi=0x5000)).run())[0] == 0x5000

    def test_other_registers(self) -> None:
        state = bench_of("f3410f1b18" + "f30f1b0f", state_with(rdi=0x5000)).run()
        assert state.lower_bounds == [0, 0x5000, 0, 0x90]  # R8

    def test_32_bits(self) -> None:
        state = state_with(state=long_mode(compatibility=True), rdi=0x1_0000_5000)
        assert bound(bench_of("f30f1b4708", state).run()) == (0x5000, LOW ^ 0x5008)

    def test_16_bit_code(self) -> None:
        state = state_with(state=real_mode(), rdi=0x1_2345)
        assert bound(bench_of("67f30f1b07", state).run()) == (0x1_2345, LOW ^ 0x1_2345)

    def test_no_access(self) -> None:
        bench_of("f30f1b07", state_with(rdi=1 << 63)).run()


class TestChecks:
    BNDCL, BNDCU, BNDCN = "f30f1a", "f20f1a", "f20f1b"

    @pytest.mark.parametrize(
        ("code", "lower", "upper", "address", "inside"),
        [
            (BNDCL, 0x5000, 0, 0x5000, True),
            (BNDCL, 0x5000, 0, 0x4FFF, False),
            (BNDCL, 0, 0, 0, True),
            (BNDCU, 0, ALL ^ 0x5000, 0x5000, True),
            (BNDCU, 0, ALL ^ 0x5000, 0x5001, False),
            (BNDCU, 0, 0, ALL, True),
            (BNDCN, 0, 0x5000, 0x5000, True),
            (BNDCN, 0, 0x5000, 0x5001, False),
            (BNDCN, 0, 0, 1, False),
        ],
    )
    @pytest.mark.parametrize("operand", ["07", "c7"], ids=["memory", "register"])
    def test_address(self, code: str, lower: int, upper: int, address: int, inside: bool, operand: str) -> None:
        state = give(state_with(rdi=address), lower, upper)
        state.bndstatus = 0x77
        bench = bench_of("90" + code + operand, state)
        if inside:
            assert bench.run().bndstatus == 0x77
        else:
            event = bench.event()
            assert (event.vector, event.error_code, bench.places) == (Vector.BR, None, [CODE + 1])
            assert state.bndstatus == 1

    def test_effective_addresses_have_no_segment_base(self) -> None:
        state = give(state_with(rdi=0x5000), 0x5000, 0)
        state.segments[4].base = 1 << 40
        bench_of("64" + self.BNDCL + "07", give(state, 0x5000, ALL ^ 0x5000)).run()

    def test_relative_to_rip(self) -> None:
        """The address is that of what follows the instruction, 8 bytes from its begin, 9 with a prefix."""
        for prefix, end in (("", 8), ("67", 9)):
            bench_of(prefix + self.BNDCN + "0500000000", give(state_with(), 0, CODE + end)).run()
            state = give(state_with(), 0, CODE + end - 1)
            assert bench_of(prefix + self.BNDCN + "0500000000", state).event().vector == Vector.BR

    def test_32_bits(self) -> None:
        """The upper halves of registers and of bounds have no part in it."""
        state = give(state_with(state=long_mode(compatibility=True), rdi=0x1_0000_5000), 0, LOW ^ 0x5000)
        bench_of(self.BNDCU + "c7", state).run()
        state = give(state_with(state=long_mode(compatibility=True), rdi=0x5001), 0, LOW ^ 0x5000)
        assert bench_of(self.BNDCU + "c7", state).event().vector == Vector.BR

    def test_of_the_user(self) -> None:
        state = give(state_with(state=long_mode(3), rdi=1), 2, 0)
        assert bench_of(self.BNDCL + "07", state).event().vector == Vector.BR
        assert state.bndstatus == 1


class TestMove:
    def test_memory(self) -> None:
        bench = bench_of("660f1b07" + "660f1a17", give(state_with(rdi=DATA + 4), 5, 1 << 63))
        state = bench.run()
        assert bench.memory.read(DATA + 4, 16) == struct.pack("<QQ", 5, 1 << 63)
        assert bound(state, 2) == (5, 1 << 63)

    def test_memory_of_32_bits(self) -> None:
        state = state_with(state=long_mode(compatibility=True), rdi=DATA)
        bench = bench_of("660f1a07" + "660f1b4708", give(state, 1 << 40, 1 << 40))
        bench.memory.write(DATA, struct.pack("<IIQQ", 5, 0x8000_0000, ALL, ALL))
        assert bound(bench.run()) == (5, 0x8000_0000)
        assert bench.memory.read(DATA + 8, 16) == struct.pack("<IIQ", 5, 0x8000_0000, ALL)

    def test_registers_both_ways(self) -> None:
        state = bench_of("660f1acb" + "660f1bc3", give(give(state_with(), 5, 6, 3), 7, 8, 0)).run()
        assert [bound(state, number) for number in range(4)] == [
            (7, 8),
            (5, 6),
            (0, 0),
            (7, 8),
        ]  # from and to ModRM.r/m

    @pytest.mark.parametrize(("code", "error"), [("660f1a07", 0), ("660f1b07", 2)])
    def test_page_faults(self, code: str, error: int) -> None:
        """Of the second page of two: neither bound is stored."""
        bench = bench_of(code, give(state_with(rdi=ABSENT - 8), 5, 6))
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, error, ABSENT)
        assert (bench.memory.read_u64(ABSENT - 8), bound(bench.state)) == (0, (5, 6))

    @pytest.mark.parametrize(("register", "vector"), [("07", Vector.GP), ("4500", Vector.SS)])
    def test_addresses_that_are_not_canonical(self, register: str, vector: int) -> None:
        event = bench_of("660f1a" + register, state_with(rdi=1 << 47, rbp=1 << 47)).event()
        assert (event.vector, event.error_code) == (vector, 0)

    def test_segment_limits(self) -> None:
        state = state_with(state=protected_mode(), rdi=DATA)
        state.segments[3].limit = DATA + 7
        bench_of("660f1a07", state).run()
        state = state_with(state=protected_mode(), rdi=DATA)
        state.segments[3].limit = DATA + 6
        assert bench_of("660f1a07", state).event().vector == Vector.GP

    @pytest.mark.parametrize(("offset", "faults"), [(8, False), (4, True)])
    def test_alignment_is_checked_for_the_user(self, offset: int, faults: bool) -> None:
        state = state_with(state=long_mode(3), rdi=DATA + offset)
        state.cr0 |= 1 << 18
        state.rflags |= 1 << 18
        bench = bench_of("660f1a07" + "0f0b", state)
        event = bench.event()
        assert event.vector == (Vector.AC if faults else Vector.UD)

    def test_data_breakpoints(self) -> None:
        bench = bench_of("660f1b07", state_with(rdi=DATA))
        bench.state.dr[0], bench.state.dr7 = DATA + 8, 0x400 | 1 | 0b1001 << 16
        event = bench.event()
        assert (event.vector, event.debug) == (Vector.DB, 1)

    def test_nothing_is_accessed_by_the_others(self) -> None:
        bench = bench_of("f30f1b07" + "f30f1a07", state_with(rdi=DATA))
        bench.state.dr[0], bench.state.dr7 = DATA, 0x400 | 1 | 0b1011 << 16
        bench.run()


class TestTables:
    """A pointer at linear address P has its bounds in the entry that bits 19:3 of P choose of a table (bits 11:2)."""

    POINTER = 0x0000_0000_0012_3458
    STORE, LOAD = "0f1b0437", "0f1a0c37"  # BND0 to, BND1 from, RDI with the pointer's value in RSI
    VALUE = 0x7777_0000_1111

    def bench(self, code: str, pointer: int = POINTER, *, valid: bool = True, config: int = 0) -> ProcessorBench:
        state = give(state_with(ENABLE | DIRECTORY | config, rdi=pointer, rsi=self.VALUE), 0x5000, ALL ^ 0x6000)
        bench = bench_of(code, state)
        bench.memory.write_u64(DIRECTORY + 8 * (pointer >> 20), TABLE | valid)
        return bench

    ENTRY = TABLE + (0x2_3458 >> 3) * 32

    def test_store(self) -> None:
        bench = self.bench(self.STORE)
        bench.run()
        assert bench.memory.read(self.ENTRY, 32) == struct.pack("<QQQQ", 0x5000, ALL ^ 0x6000, self.VALUE, 0)

    def test_load(self) -> None:
        bench = self.bench(self.LOAD)
        bench.memory.write(self.ENTRY, struct.pack("<QQQ", 1, 2, self.VALUE))
        assert bound(bench.run(), 1) == (1, 2)

    def test_load_for_another_pointer(self) -> None:
        bench = self.bench(self.LOAD)
        give(bench.state, 7, 7, 1)
        bench.memory.write(self.ENTRY, struct.pack("<QQQ", 1, 2, self.VALUE + 1))
        assert bound(bench.run(), 1) == (0, 0)

    @pytest.mark.parametrize("code", [STORE, LOAD])
    def test_invalid_entry_of_the_directory(self, code: str) -> None:
        bench = self.bench("90" + code, valid=False)
        assert (bench.event().vector, bench.places) == (Vector.BR, [CODE + 1])
        assert bench.state.bndstatus == DIRECTORY + 8 | 2

    @pytest.mark.parametrize(
        ("code", "pointer", "value"),
        [
            pytest.param("0f1b843734120000", POINTER - 0x1234, VALUE, id="displacement"),
            pytest.param("0f1b04f7", POINTER, VALUE, id="scale-means-nothing"),
            pytest.param("0f1b07", POINTER, 0, id="no-index"),
            pytest.param("670f1b0437", POINTER, VALUE, id="address-size-means-nothing"),
        ],
    )
    def test_operands(self, code: str, pointer: int, value: int) -> None:
        bench = self.bench(code)
        bench.state.gpr[7] = pointer
        bench.run()
        assert bench.memory.read_u64(self.ENTRY + 16) == value

    def test_without_a_base_the_pointer_is_at_0(self) -> None:
        """Whatever the displacement."""
        bench = self.bench("0f1b043534120000", 0)
        bench.run()
        assert bench.memory.read_u64(TABLE + 16) == self.VALUE

    def test_segment_bases_count(self) -> None:
        bench = self.bench("64" + self.STORE)
        bench.state.gpr[7], bench.state.segments[4].base = self.POINTER - 0x10_0000, 0x10_0000
        bench.run()
        assert bench.memory.read_u64(self.ENTRY) == 0x5000

    def test_bits_of_the_address_above_47_do_not_count(self) -> None:
        bench = self.bench(self.STORE)
        bench.state.gpr[7] = self.POINTER | 0x1234 << 48
        bench.run()
        assert bench.memory.read_u64(self.ENTRY) == 0x5000

    def test_bit_47_does(self) -> None:
        bench = self.bench(self.STORE)
        bench.state.gpr[7] = 1 << 47
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 0, DIRECTORY + (1 << 27 + 3))

    @pytest.mark.parametrize(("code", "error"), [(STORE, 2), (LOAD, 0)])
    def test_page_faults_of_the_table(self, code: str, error: int) -> None:
        bench = self.bench(code, 0x10_0020)
        bench.memory.write_u64(DIRECTORY + 8, ABSENT - 4 * 32 - 16 | 1)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, error, ABSENT)
        assert bench.memory.read_u64(ABSENT - 16) == 0

    def test_the_user_needs_pages_of_the_user(self) -> None:
        state = state_with(ENABLE | DIRECTORY, long_mode(3), rdi=self.POINTER)
        bench = bench_of(self.LOAD, state)
        bench.page(DIRECTORY, PRESENT | WRITABLE)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 5, DIRECTORY + 8)

    def test_tables_that_are_not_canonical(self) -> None:
        bench = self.bench(self.LOAD)
        bench.memory.write_u64(DIRECTORY + 8, 1 << 47 | 1)
        assert bench.event().vector == Vector.GP

    def test_a_directory_that_ends_beyond_canonical_addresses(self) -> None:
        bench = bench_of(self.LOAD, state_with(ENABLE | (1 << 47) - 0x1000, rdi=0x200 << 20))
        assert bench.event().vector == Vector.GP

    @pytest.mark.parametrize("store", [True, False])
    def test_32_bits(self, store: bool) -> None:
        """Bits 31:12 choose a doubleword of the directory, bits 11:2 sixteen bytes of a table."""
        pointer, value = 0x0002_3458, 0x9999_8888
        state = state_with(ENABLE | DIRECTORY, long_mode(compatibility=True), rdi=pointer, rsi=value)
        bench = bench_of("0f1b0437" if store else "0f1a0437", give(state, 0x5000, LOW ^ 0x6000))
        bench.memory.write_u32(DIRECTORY + (pointer >> 12) * 4, TABLE | 1)
        entry = TABLE + ((pointer & 0xFFF) >> 2) * 16
        if store:
            bench.run()
            assert bench.memory.read(entry, 16) == struct.pack("<IIII", 0x5000, LOW ^ 0x6000, value, 0)
        else:
            bench.memory.write(entry, struct.pack("<III", 1, 2, value))
            assert bound(bench.run()) == (1, 2)

    def test_invalid_entry_with_32_bits(self) -> None:
        state = state_with(ENABLE | DIRECTORY, long_mode(compatibility=True), rdi=0x2_3458)
        assert bench_of("0f1a0437", state).event().vector == Vector.BR
        assert state.bndstatus == DIRECTORY + 0x23 * 4 | 2

    def test_the_directory_is_at_a_linear_address_the_table_at_an_offset_into_ds(self) -> None:
        """Whatever segment the pointer is in, whose base counts for the pointer alone."""
        state = state_with(ENABLE | DIRECTORY, protected_mode(), rdi=0x14, rsi=7)
        state.segments[3].base, state.segments[0].base = 0x1000, 0x3000
        bench = bench_of("260f1b0437", give(state, 1, 2))
        bench.memory.write_u32(DIRECTORY + 3 * 4, TABLE | 1)
        bench.run()
        assert bench.memory.read(TABLE + 0x1000 + 5 * 16, 16) == struct.pack("<IIII", 1, 2, 7, 0)

    def test_a_store_into_a_segment_that_is_read_only(self) -> None:
        state = state_with(ENABLE | DIRECTORY, protected_mode(), rdi=0x14)
        state.segments[3].access_rights &= ~2
        bench = bench_of("0f1b0437", state)
        bench.memory.write_u32(DIRECTORY, TABLE | 1)
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.GP, 0)

    @pytest.mark.parametrize(
        ("limit", "usable", "allowed"),
        [(TABLE + 5 * 16 + 11, True, True), (TABLE + 5 * 16 + 10, True, False), (LOW, False, False)],
    )
    def test_what_ds_allows(self, limit: int, usable: bool, allowed: bool) -> None:
        """All but the reserved field of the entry has to be within the limit."""
        state = state_with(ENABLE | DIRECTORY, protected_mode(), rdi=0x14, rsi=7)
        state.segments[3].limit = limit
        state.segments[3].access_rights |= 0 if usable else 0x1_0000
        bench = bench_of("260f1a0437" + "0f0b", state)
        bench.memory.write_u32(DIRECTORY, TABLE | 1)
        bench.memory.write(TABLE + 5 * 16, struct.pack("<III", 1, 2, 7))
        event = bench.event()
        assert (event.vector, event.error_code) == ((Vector.UD, None) if allowed else (Vector.GP, 0))
        assert bound(state) == ((1, 2) if allowed else (0, 0))


class TestOtherModes:
    """Real-address mode is ruled by IA32_BNDCFGS, virtual-8086 mode by BNDCFGU."""

    def test_real_address_mode(self) -> None:
        state = give(state_with(state=real_mode(), rdi=3), 4, 0)
        assert bench_of("67f30f1a07", state).event().vector == Vector.BR

    @pytest.mark.parametrize(("user", "vector"), [(ENABLE, Vector.BR), (0, Vector.UD)])
    def test_virtual_8086_mode(self, user: int, vector: int) -> None:
        state = protected_mode()
        state.rflags |= 1 << 17
        for segment in state.segments:
            segment.selector, segment.base, segment.limit, segment.access_rights = 0, 0, 0xFFFF, 0xF3
        state = give(state_with(state=state, rdi=3), 4, 0)
        state.bndcfgs, state.bndcfgu = ENABLE ^ user, user
        assert bench_of("67f30f1a07" + "0f0b", state).event().vector == vector


class TestBound:
    @pytest.mark.parametrize(("config", "status"), [(ENABLE, 0), (0, 0x77)])
    def test_status(self, config: int, status: int) -> None:
        """BOUND EAX, [EDI] with both limits 0."""
        state = state_with(config, protected_mode(), rdi=DATA, rax=5)
        state.bndstatus = 0x77
        assert bench_of("6207", state).event().vector == Vector.BR
        assert state.bndstatus == status

    def test_an_interrupt_of_the_same_vector(self) -> None:
        """INT 5 is no BOUND."""
        state = state_with(state=protected_mode())
        state.bndstatus = 0x77
        assert bench_of("cd05", state).event().vector == Vector.BR
        assert state.bndstatus == 0x77

    def test_within_the_limits(self) -> None:
        state = state_with(state=protected_mode(), rdi=DATA, rax=0)
        state.bndstatus = 0x77
        assert bench_of("6207", state).run().bndstatus == 0x77


@pytest.mark.parametrize(
    ("value", "legal"),
    [
        (0x1234_5678_9FFF, 0x1234_5678_9003),
        (0x8000_0000_0001, 0xFFFF_8000_0000_0001),
        (0xFFF0_0000_0000_1FFC, 0x1000),
    ],
)
def test_legal_configuration(value: int, legal: int) -> None:
    assert legal_configuration(value, 48) == legal
