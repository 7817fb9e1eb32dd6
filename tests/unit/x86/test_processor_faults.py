"""Page faults and other memory faults of real instructions: CR2, error code and RIP exact, no partial effect.

Spec: SDM Vol. 3, "Interrupt 14—Page-Fault Exception (#PF)".
"""

from __future__ import annotations

import pytest
from processor_bench import ABSENT, CODE, DATA, GDT, PRESENT, STACK, TABLES, USER, WRITABLE, ProcessorBench, long_mode

from vtx.x86.outcome import Vector
from vtx.x86.state import Gpr

P, W, U, I = 1, 2, 4, 16  # noqa: E741 - the manual's names of the error-code bits
NON_CANONICAL = 0x0000_8000_0000_0000

A, C, D, B, SP, BP, SI, DI = range(8)

# Code, registers, the expected CR2, whether it is a write.
ABSENT_PAGE = {
    "load": ("488b07", {DI: ABSENT + 0x123}, ABSENT + 0x123, False),
    "load-8": ("8a07", {DI: ABSENT + 0xFFF}, ABSENT + 0xFFF, False),
    "load-crossing-into": ("488b07", {DI: ABSENT - 3}, ABSENT, False),
    "load-crossing-out-of": ("488b07", {DI: ABSENT + 0xFFD}, ABSENT + 0xFFD, False),
    "store": ("488907", {DI: ABSENT + 0x10}, ABSENT + 0x10, True),
    "store-crossing-into": ("488907", {DI: ABSENT - 1}, ABSENT, True),
    "store-immediate": ("c70712345678", {DI: ABSENT + 4}, ABSENT + 4, True),
    "store-base-index": ("89443e08", {SI: ABSENT, DI: 0x20}, ABSENT + 0x28, True),
    "load-scaled": ("8b04cf", {DI: ABSENT, C: 5}, ABSENT + 40, False),
    "load-absolute": ("8b042510900000", {}, 0x9010, False),
    "load-rip-relative": ("8b05fa7f0000", {}, ABSENT, False),
    "load-address-size": ("678b07", {DI: 0xFFFF_FFFF_0000_0000 | ABSENT}, ABSENT, False),
    "push": ("50", {SP: ABSENT + 0x18}, ABSENT + 0x10, True),
    "push-down-into": ("50", {SP: ABSENT + 0x1000}, ABSENT + 0xFF8, True),
    "push-immediate": ("6a01", {SP: ABSENT + 8}, ABSENT, True),
    "push-from-memory": ("ff37", {DI: ABSENT + 0x40}, ABSENT + 0x40, False),
    "pop": ("58", {SP: ABSENT + 0x18}, ABSENT + 0x18, False),
    "pop-to-memory": ("8f07", {DI: ABSENT + 0x30}, ABSENT + 0x30, True),
    "call": ("e800000000", {SP: ABSENT + 0x20}, ABSENT + 0x18, True),
    "call-through-memory": ("ff17", {DI: ABSENT + 0x50}, ABSENT + 0x50, False),
    "return": ("c3", {SP: ABSENT + 0x20}, ABSENT + 0x20, False),
    "jump-through-memory": ("ff27", {DI: ABSENT + 0x58}, ABSENT + 0x58, False),
    "leave": ("c9", {BP: ABSENT + 0x60}, ABSENT + 0x60, False),
    "enter": ("c8080000", {SP: ABSENT + 0x10}, ABSENT + 8, True),
    "movs-source": ("a4", {SI: ABSENT + 5, DI: DATA}, ABSENT + 5, False),
    "movs-destination": ("a4", {SI: DATA, DI: ABSENT + 6}, ABSENT + 6, True),
    "stos": ("48ab", {DI: ABSENT + 7}, ABSENT + 7, True),
    "lods": ("ac", {SI: ABSENT + 8}, ABSENT + 8, False),
    "scas": ("ae", {DI: ABSENT + 9}, ABSENT + 9, False),
    "cmps-second": ("a6", {SI: DATA, DI: ABSENT + 10}, ABSENT + 10, False),
    "xlat": ("d7", {B: ABSENT, A: 0x77}, ABSENT + 0x77, False),
    "test-memory": ("8407", {DI: ABSENT + 11}, ABSENT + 11, False),
    "cmp-memory": ("3807", {DI: ABSENT + 12}, ABSENT + 12, False),
    "movups-crossing-into": ("0f1007", {DI: ABSENT - 8}, ABSENT, False),
    "movaps-store": ("0f2907", {DI: ABSENT + 0x10}, ABSENT + 0x10, True),
    "fld": ("dd07", {DI: ABSENT + 13}, ABSENT + 13, False),
    "fstp": ("dd1f", {DI: ABSENT + 14}, ABSENT + 14, True),
    "lgdt": ("0f0117", {DI: ABSENT + 15}, ABSENT + 15, False),
    "sidt": ("0f010f", {DI: ABSENT + 16}, ABSENT + 16, True),
    "movbe": ("0f38f007", {DI: ABSENT + 17}, ABSENT + 17, False),
    "outs": ("6e", {SI: ABSENT + 18}, ABSENT + 18, False),
    "ins": ("6c", {DI: ABSENT + 19}, ABSENT + 19, True),
    "pushf": ("9c", {SP: ABSENT + 0x20}, ABSENT + 0x18, True),
    "popf": ("9d", {SP: ABSENT + 0x20}, ABSENT + 0x20, False),
    "iret": ("48cf", {SP: ABSENT + 0x20}, ABSENT + 0x20, False),
    "lock-add": ("f04801 07".replace(" ", ""), {DI: ABSENT + 20}, ABSENT + 20, True),
    "xchg": ("4887 07".replace(" ", ""), {DI: ABSENT + 21}, ABSENT + 21, True),
}


@pytest.mark.parametrize("cpl", [0, 3], ids=["kernel", "user"])
@pytest.mark.parametrize(("code", "registers", "cr2", "write"), ABSENT_PAGE.values(), ids=ABSENT_PAGE)
def test_absent_page(code: str, registers: dict[int, int], cr2: int, write: bool, cpl: int) -> None:
    state = long_mode(cpl)
    if cpl and code in ("0f0117", "6e", "6c"):
        pytest.skip("faults differently at CPL 3")
    bench = ProcessorBench(code + "f4", state)
    bench.page(ABSENT, 0)
    for number, value in registers.items():
        state.gpr[number] = value
    before = list(state.gpr)
    event = bench.event()
    assert event.vector == Vector.PF
    assert event.address == cr2
    assert event.error_code == (W if write else 0) | (U if cpl else 0)
    assert state.rip == CODE
    assert state.gpr == before


READ_ONLY = ("store", "push", "pop-to-memory", "call", "stos", "movs-destination", "movaps-store", "sidt", "pushf")


@pytest.mark.parametrize("name", [*READ_ONLY, "lock-add", "xchg"])
@pytest.mark.parametrize("cpl", [0, 3], ids=["kernel", "user"])
def test_read_only_page(name: str, cpl: int) -> None:
    code, registers, cr2, _ = ABSENT_PAGE[name]
    state = long_mode(cpl)
    bench = ProcessorBench(code + "f4", state)
    bench.page(ABSENT, PRESENT | USER)
    for number, value in registers.items():
        state.gpr[number] = value
    event = bench.event()
    assert (event.vector, event.address) == (Vector.PF, cr2)
    assert event.error_code == P | W | (U if cpl else 0)


@pytest.mark.parametrize("code", ["0007", "ff07", "0fba2f03", "f61f", "0fb007", "d007"])
def test_read_modify_write_of_a_read_only_page__is_a_write(code: str) -> None:
    """ADD, INC, BTS, NEG, CMPXCHG, ROL."""
    bench = ProcessorBench(code + "f4")
    bench.page(ABSENT, PRESENT)
    bench.state.gpr[DI] = ABSENT + 3
    event = bench.event()
    assert (event.vector, event.address, event.error_code) == (Vector.PF, ABSENT + 3, P | W)
    assert bench.memory.read_u8(ABSENT + 3) == 0


def test_user_access_to_a_supervisor_page() -> None:
    bench = ProcessorBench("8a07f4", long_mode(3))
    bench.page(ABSENT, PRESENT | WRITABLE)
    bench.state.gpr[DI] = ABSENT + 1
    event = bench.event()
    assert (event.address, event.error_code) == (ABSENT + 1, P | U)


def test_repeated_move__stops_at_the_first_byte_that_faults() -> None:
    bench = ProcessorBench("f3a4f4")
    bench.page(ABSENT, 0)
    state = bench.state
    state.gpr[C], state.gpr[SI], state.gpr[DI] = 100, 0x2000, ABSENT - 10
    bench.put(0x2000, bytes(range(100)))
    event = bench.event()
    assert (event.vector, event.address, event.error_code) == (Vector.PF, ABSENT, W)
    assert (state.rip, state.gpr[C], state.gpr[SI], state.gpr[DI]) == (CODE, 90, 0x200A, ABSENT)
    assert bench.memory.read(ABSENT - 10, 10) == bytes(range(10))


def test_store_across_pages__writes_nothing_if_the_second_faults() -> None:
    bench = ProcessorBench("488907f4")
    bench.page(ABSENT, 0)
    bench.state.gpr[DI], bench.state.gpr[A] = ABSENT - 4, (1 << 64) - 1
    event = bench.event()
    assert event.address == ABSENT
    assert bench.memory.read(ABSENT - 4, 4) == b"\0\0\0\0"


class TestFetch:
    """Instruction fetches."""

    @pytest.mark.parametrize("cpl", [0, 3])
    def test_jump_to_an_absent_page(self, cpl: int) -> None:
        bench = ProcessorBench("ffe7", long_mode(cpl))
        bench.page(ABSENT, 0)
        bench.state.gpr[DI] = ABSENT + 0x321
        event = bench.event()
        assert (event.vector, event.address) == (Vector.PF, ABSENT + 0x321)
        assert event.error_code == I | (U if cpl else 0)
        assert bench.state.rip == ABSENT + 0x321

    def test_jump_to_a_page_without_execute_permission(self) -> None:
        bench = ProcessorBench("ffe7")
        bench.page(ABSENT, 1 << 63 | PRESENT)
        bench.state.gpr[DI] = ABSENT + 8
        event = bench.event()
        assert (event.address, event.error_code) == (ABSENT + 8, P | I)

    @pytest.mark.parametrize("before", range(1, 5))
    def test_instruction_that_crosses_into_an_absent_page(self, before: int) -> None:
        bench = ProcessorBench()
        bench.page(ABSENT, 0)
        start = ABSENT - before
        bench.memory.write(start, bytes.fromhex("b811223344")[:before])  # MOV EAX, imm32
        bench.state.rip = start
        event = bench.event()
        assert (event.vector, event.address, event.error_code) == (Vector.PF, ABSENT, I)
        assert bench.state.rip == start

    def test_instruction_that_ends_at_an_absent_page(self) -> None:
        bench = ProcessorBench()
        bench.page(ABSENT, 0)
        start = ABSENT - 4
        bench.put(start, "ffc0ffc3")
        bench.state.gpr[A] = bench.state.gpr[B] = 0
        bench.state.rip = start
        event = bench.event()
        assert (event.address, bench.state.rip) == (ABSENT, ABSENT)
        assert (bench.state.gpr[A], bench.state.gpr[B]) == (1, 1)

    def test_jump_at_the_end_of_the_last_page_never_fetches_the_next(self) -> None:
        bench = ProcessorBench()
        bench.page(ABSENT, 0)
        bench.put(ABSENT - 2, "eb80")
        bench.put(ABSENT - 0x80, "f4")
        bench.state.rip = ABSENT - 2
        bench.run()

    def test_trapped_instruction_that_crosses_into_another_frame(self) -> None:
        """The two halves of a CPUID need not be neighbours in physical memory."""
        bench = ProcessorBench()
        bench.page(ABSENT, PRESENT, frame=0x2000)
        bench.put(ABSENT - 1, "0f")
        bench.put(0x2000, "a2f4")
        bench.state.rip, bench.state.gpr[A] = ABSENT - 1, 0
        bench.run()
        assert bench.state.gpr[B].to_bytes(4, "little") == b"Genu"

    def test_supervisor_fetch_from_a_user_page__with_smep(self) -> None:
        state = long_mode()
        state.cr4 |= 1 << 20
        bench = ProcessorBench("ffe7", state)
        bench.page(CODE, PRESENT | WRITABLE)
        bench.state.gpr[DI] = ABSENT
        event = bench.event()
        assert (event.address, event.error_code) == (ABSENT, P | I)


class TestImplicitAccess:
    """Descriptor tables are read with supervisor privilege whatever the CPL (SDM Vol. 3, "Access Rights")."""

    def bench(self, code: str) -> ProcessorBench:
        bench = ProcessorBench(code, long_mode(3))
        bench.page(GDT, PRESENT | WRITABLE)
        bench.state.gpr[A] = 0x23
        return bench

    @pytest.mark.parametrize("code", ["8ed8", "8ee0", "0f02d8", "0f03d8", "0f00e0"])
    def test_user_code_may_load_from_a_supervisor_gdt(self, code: str) -> None:
        """MOV DS, MOV FS, LAR, LSL, VERR."""
        bench = self.bench(code + "0fa2")
        bench.run_to(CODE + len(code) // 2 + 2)

    def test_but_may_not_read_it(self) -> None:
        bench = self.bench("488b07")
        bench.state.gpr[DI] = GDT + 8
        event = bench.event()
        assert (event.address, event.error_code) == (GDT + 8, P | U)

    def test_not_even_right_after_a_load(self) -> None:
        """The permission of an implicit access must not linger."""
        bench = self.bench("8ed8488b07")
        bench.state.gpr[DI] = GDT + 8
        event = bench.event()
        assert (event.address, event.error_code) == (GDT + 8, P | U)
        assert bench.state.rip == CODE + 2
        assert bench.state.segments[3].selector == 0x23

    def test_absent_gdt_page__is_a_supervisor_fault(self) -> None:
        bench = self.bench("8ed8")
        bench.page(GDT, 0)
        event = bench.event()
        assert event.vector == Vector.PF
        assert event.error_code is not None
        assert not event.error_code & U
        assert (event.address or 0) & ~0xFFF == GDT


CANONICAL_CASES = {
    "load": ("488b07", {DI: NON_CANONICAL}, Vector.GP),
    "store": ("488907", {DI: NON_CANONICAL}, Vector.GP),
    "load-through-rbp": ("488b4500", {BP: NON_CANONICAL}, Vector.SS),
    "load-through-rsp": ("488b0424", {SP: NON_CANONICAL}, Vector.SS),
    "push": ("50", {SP: NON_CANONICAL + 8}, Vector.SS),
    "pop": ("58", {SP: NON_CANONICAL}, Vector.SS),
    "call": ("e800000000", {SP: NON_CANONICAL + 8}, Vector.SS),
    "return": ("c3", {SP: NON_CANONICAL}, Vector.SS),
    "movs-source": ("a4", {SI: NON_CANONICAL, DI: DATA}, Vector.GP),
    "pop-to-memory": ("8f07", {DI: NON_CANONICAL}, Vector.GP),
    "push-from-memory": ("ff37", {DI: NON_CANONICAL}, Vector.GP),
    "lidt": ("0f011f", {DI: NON_CANONICAL}, Vector.GP),
}


@pytest.mark.parametrize(("code", "registers", "vector"), CANONICAL_CASES.values(), ids=CANONICAL_CASES)
def test_non_canonical_address(code: str, registers: dict[int, int], vector: Vector) -> None:
    """SDM Vol. 1, "Canonical Addressing": #SS for stack references, else #GP, with error code 0."""
    bench = ProcessorBench(code + "f4")
    for number, value in registers.items():
        bench.state.gpr[number] = value
    before = list(bench.state.gpr)
    event = bench.event()
    assert (event.vector, event.error_code) == (vector, 0)
    assert bench.state.rip == CODE
    assert bench.state.gpr == before


@pytest.mark.parametrize(
    ("code", "registers"),
    [
        pytest.param("ffe7", {DI: NON_CANONICAL}, id="jump"),
        pytest.param("ffd7", {DI: NON_CANONICAL + 5}, id="call"),
        pytest.param("ff26", {SI: DATA}, id="jump-through-memory"),
        pytest.param("ff16", {SI: DATA}, id="call-through-memory"),
        pytest.param("c3", {SP: DATA}, id="return"),
        pytest.param("c21000", {SP: DATA}, id="return-with-pop"),
    ],
)
def test_branch_to_a_non_canonical_address__faults_at_the_branch(code: str, registers: dict[int, int]) -> None:
    """SDM Vol. 2, "JMP—Jump", 64-bit mode exceptions: the target is checked before RIP is loaded."""
    bench = ProcessorBench("90" + code)
    bench.memory.write_u64(DATA, NON_CANONICAL)
    for number, value in registers.items():
        bench.state.gpr[number] = value
    before = list(bench.state.gpr)
    event = bench.event()
    assert (event.vector, event.error_code) == (Vector.GP, 0)
    assert bench.state.rip == CODE + 1
    assert bench.state.gpr == before


class TestNativeFaultsThatAreTheModels:
    """What the engine checks first although the processor modelled does not."""

    @pytest.mark.parametrize("code", ["0f01d8", "0f01da", "0f01db", "0f01dc", "0f01dd", "0f01de", "0f01df", "0f01d9"])
    def test_svm_instructions_are_invalid_at_any_level(self, code: str) -> None:
        for cpl in (0, 3):
            event = ProcessorBench(code, long_mode(cpl)).event()
            assert (event.vector, event.error_code) == (Vector.UD, None)

    def test_xsetbv_without_osxsave_is_invalid_at_any_level(self) -> None:
        """SDM Vol. 2, "XSETBV—Set Extended Control Register"."""
        for cpl in (0, 3):
            assert ProcessorBench("0f01d1", long_mode(cpl)).event().vector == Vector.UD

    def test_into__is_a_software_exception_behind_the_instruction(self) -> None:
        state = long_mode(compatibility=True)
        state.rflags |= 0x800
        bench = ProcessorBench("ce", state)
        event = bench.event()
        assert event.vector == Vector.OF
        assert event.is_software
        assert event.saved_rip(state) == CODE + 1

    @pytest.mark.parametrize("code", ["c5f858c1", "c5fc58c1", "62f17c4858c1"])
    def test_vex_without_avx_is_invalid(self, code: str) -> None:
        assert ProcessorBench(code).event().vector == Vector.UD

    @pytest.mark.parametrize(
        ("code", "vector"),
        [("f4", Vector.GP), ("0f22c8", Vector.UD), ("0f22c0", Vector.GP), ("0f06", Vector.GP), ("0f0138", Vector.GP)],
    )
    def test_privileged_instructions_at_cpl_3(self, code: str, vector: Vector) -> None:
        assert ProcessorBench(code, long_mode(3)).event().vector == vector


def test_instruction_across_4_gib__faults_at_address_0() -> None:
    bench = ProcessorBench(state=long_mode(compatibility=True))
    for table, entry, target in ((1, 3, 4), (4, 511, 5), (5, 511, -1)):
        address = TABLES + 0x1000 * target if target > 0 else CODE
        bench.memory.write_u64(TABLES + 0x1000 * table + 8 * entry, address | PRESENT | WRITABLE | USER)
    bench.page(0, 0)
    bench.put(CODE + 0xFFE, "b801")  # MOV EAX, imm32
    bench.state.rip = 0xFFFF_FFFE
    event = bench.event()
    assert (event.vector, event.error_code, event.address) == (Vector.PF, I, 0)
    assert bench.places == [0xFFFF_FFFE]


def test_stack_pointer_is_untouched_by_a_faulting_call() -> None:
    bench = ProcessorBench("e8fb0f0000", long_mode())
    bench.page(STACK - 0x1000, PRESENT)
    bench.state.gpr[Gpr.RSP] = STACK
    event = bench.event()
    assert (event.address, event.error_code) == (STACK - 8, P | W)
    assert bench.state.gpr[Gpr.RSP] == STACK


def test_monitor__reads_through_the_segment_of_its_prefix() -> None:
    bench = ProcessorBench("650f01c8")  # MONITOR GS:RAX
    bench.page(ABSENT, 0)
    bench.state.segments[5].base = ABSENT - 0x100
    bench.state.gpr[A], bench.state.gpr[C], bench.state.gpr[D] = 0x123, 0, 0
    event = bench.event()
    assert (event.vector, event.address) == (Vector.PF, ABSENT + 0x23)
