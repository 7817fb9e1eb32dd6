"""Operands that must not be accessed: alignment that is always needed, #AC, and segment limits and rights.

Spec: SDM Vol. 1, "Alignment of 128-bit Operands"; Vol. 3, "Limit Checking", "Type Checking", "Interrupt 17—Alignment
Check Exception (#AC)".
"""

from __future__ import annotations

import pytest
from processor_bench import CODE, DATA, STACK, ProcessorBench, long_mode, protected_mode, real_mode

from vtx.x86.event import Event
from vtx.x86.execution import OperandTrap
from vtx.x86.outcome import Vector
from vtx.x86.refusal import _Refused
from vtx.x86.second_level import AccessKind, ReservedPageAccess
from vtx.x86.state import CpuState, Segment

GP, SS, AC, UD, NM = Vector.GP, Vector.SS, Vector.AC, Vector.UD, Vector.NM
AM, AC_FLAG = 1 << 18, 1 << 18
EM, TS, OSFXSR = 1 << 2, 1 << 3, 1 << 9

ENGINES = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])


def bench_of(code: str, state: CpuState, *, compiled: bool = True, **registers: int) -> ProcessorBench:
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    for name, value in registers.items():
        state.gpr[names.index(name)] = value
    return ProcessorBench(code + "f4", state, compiled=compiled)


def fault_at(bench: ProcessorBench, offset: int) -> Event:
    """The one event, raised at `CODE` + ``offset``."""
    event = bench.event()
    assert bench.places.pop() == CODE + offset
    return event


# Instruction with [RDI], and whether it demands alignment.
SSE = {
    "movaps-load": ("0f2807", True),
    "movaps-store": ("0f2907", True),
    "movapd": ("660f2807", True),
    "movdqa": ("660f6f07", True),
    "movntps": ("0f2b07", True),
    "movntdq": ("660fe707", True),
    "movntdqa": ("660f382a07", True),
    "addps": ("0f5807", True),
    "pxor": ("660fef07", True),
    "paddd": ("660ffe07", True),
    "unpcklps": ("0f1407", True),
    "cvtdq2ps": ("0f5b07", True),
    "pshufd": ("660f700700", True),
    "aesenc": ("660f38dc07", True),
    "fxsave": ("0fae07", True),
    "cmpxchg16b": ("480fc70f", True),
    "movups": ("0f1007", False),
    "movdqu": ("f30f6f07", False),
    "lddqu": ("f20ff007", False),
    "pcmpistri": ("660f3a630700", False),
    "movss": ("f30f1007", False),
    "addsd": ("f20f5807", False),
    "movq": ("f30f7e07", False),
    "cvtdq2pd": ("f30fe607", False),
    "movlps": ("0f1207", False),
    "pmovzxbw": ("660f383007", False),
    "movq-mmx": ("0f6f07", False),
}


@ENGINES
@pytest.mark.parametrize(("code", "aligned"), SSE.values(), ids=SSE)
def test_misaligned_128_bit_operand(code: str, aligned: bool, compiled: bool) -> None:
    bench = bench_of("90" + code, long_mode(), compiled=compiled, rdi=DATA + 8)
    if aligned:
        event = fault_at(bench, 1)
        assert (event.vector, event.error_code) == (GP, 0)
        bench.state.gpr[7] = DATA
        bench.state.rip = CODE
    bench.run()


@pytest.mark.parametrize(
    ("cr0", "cr4", "vector"),
    [(EM, OSFXSR, UD), (0, 0, UD), (TS, OSFXSR, NM)],
)
def test_misaligned_but_not_available(cr0: int, cr4: int, vector: Vector) -> None:
    state = long_mode()
    state.cr0, state.cr4 = state.cr0 & ~(EM | TS) | cr0, state.cr4 & ~OSFXSR | cr4
    assert fault_at(bench_of("0f2807", state, rdi=DATA + 1), 0).vector == vector


# Code whose last instruction accesses DATA + 0x28 (misaligned) if RDI is DATA and RAX 8, however it gets there.
DERIVED = {
    "displacement": "0f284728",
    "index": "0f2844c7e8",  # RDI + 8 * RAX - 18H
    "add": "4883c7280f2807",
    "sub": "4883efd80f2807",
    "lea": "488d5f280f2803",
    "mov": "4889fb0f284328",
    "push-pop": "57586a00500f28442428",  # of the stack: RSP - 16 + 28H
    "loaded": "4889fb488b07900f28440328",  # RBX + what [RDI] holds + 28H
    "loaded-pointer": "48893f488b0f0f284128",
    "zero-extended": "4889fb01c031c00f28440328",
    "rip": "0f2805f8ffffff",
    "swapped": "4887fb0f284328",
    "gs": "650f28042518000000",
}


@ENGINES
@pytest.mark.parametrize("code", DERIVED.values(), ids=DERIVED)
def test_misaligned_by_every_way_to_make_an_address(code: str, compiled: bool) -> None:
    state = long_mode()
    state.segments[5].base = DATA + 0x10
    bench = bench_of(code, state, compiled=compiled, rdi=DATA, rax=8)
    event = bench.event()
    assert (event.vector, event.error_code) == (GP, 0)
    last = bench.places.pop()
    assert bench.processor.fetch() is not None
    assert last + len(bench.processor.fetch().encoding) == CODE + len(code) // 2  # type: ignore[union-attr]


@ENGINES
def test_in_a_loop__the_iteration_that_is_misaligned_faults(compiled: bool) -> None:
    # 1: MOVAPS XMM0, [RDI]; ADD RDI, RAX; SHR RAX, 1; DEC RCX; JNZ 1
    bench = bench_of("0f28074801c748d1e848ffc975f2", long_mode(), compiled=compiled, rdi=DATA, rax=64, rcx=10)
    event = fault_at(bench, 0)
    assert (event.vector, bench.state.gpr[7], bench.state.gpr[1]) == (GP, DATA + 64 + 32 + 16 + 8, 6)
    assert bench.processor.instructions == 4 * 5


def test_swapgs_in_the_block() -> None:
    state = long_mode()
    state.segments[5].base, state.kernel_gs_base = DATA, DATA + 8
    bench = bench_of("650f280425000000000f01f8650f28042500000000", state)
    event = fault_at(bench, 12)
    assert event.vector == GP


class TestAlignmentCheck:
    """#AC at privilege level 3 with CR0.AM and RFLAGS.AC."""

    @staticmethod
    def state(cpl: int = 3, cr0: int = AM, flags: int = AC_FLAG) -> CpuState:
        state = long_mode(cpl)
        state.cr0 |= cr0
        state.rflags |= flags
        return state

    CASES = {
        "word": ("668b07", 1, True),
        "word-aligned": ("668b07", 2, False),
        "doubleword": ("8b07", 2, True),
        "quadword": ("488b07", 4, True),
        "store": ("488907", 4, True),
        "byte": ("8a07", 1, False),
        "movups": ("0f1007", 4, True),
        "movups-8": ("0f1007", 8, False),
        "movss": ("f30f1007", 2, True),
        "movss-4": ("f30f1007", 4, False),
        "fld-80": ("db2f", 4, True),
        "fld-80-8": ("db2f", 8, False),
        "fstenv-4": ("d937", 4, False),
        "fstenv": ("d937", 2, True),
        "bt-far": ("0fa307", 2, True),
        "read-modify-write": ("830701", 2, True),
        "string": ("a5", 2, True),
    }

    @pytest.mark.parametrize(("code", "distance", "faults"), CASES.values(), ids=CASES)
    def test_operand(self, code: str, distance: int, faults: bool) -> None:
        bench = bench_of("90" + code + "cc", self.state(), rdi=DATA + distance, rsi=DATA)
        event = bench.event()
        if faults:
            assert (event.vector, event.error_code, bench.places[-1]) == (AC, 0, CODE + 1)
        else:
            assert event.vector == Vector.BP

    @pytest.mark.parametrize(("cpl", "cr0", "flags"), [(0, AM, AC_FLAG), (3, 0, AC_FLAG), (3, AM, 0)])
    def test_not_checked(self, cpl: int, cr0: int, flags: int) -> None:
        bench = bench_of("8b07cc", self.state(cpl, cr0, flags), rdi=DATA + 1)
        assert bench.event().vector == Vector.BP

    def test_stack(self) -> None:
        event = bench_of("50", self.state(), rsp=STACK + 4).event()
        assert (event.vector, event.error_code) == (AC, 0)

    def test_aligned_code_runs_in_blocks(self) -> None:
        """Only misaligned accesses cost anything: a loop of aligned ones is one run of the engine."""
        bench = bench_of("488b0748ffc975f8cc", self.state(), rdi=DATA, rcx=10_000)
        for _ in range(5):
            if bench.events:
                break
            bench.processor.run_once()
        assert bench.events[0].vector == Vector.BP

    def test_popf_turns_it_on(self) -> None:
        bench = bench_of("9d8b07", self.state(flags=0), rdi=DATA + 1)
        bench.memory.write_u64(STACK, AC_FLAG | 2)
        assert fault_at(bench, 1).vector == AC


def limited(base: int, limit: int, rights: int = 0x4093) -> Segment:
    return Segment(0x28, base, limit, rights)


READ_ONLY, EXECUTE_ONLY, EXECUTE_READ, EXPAND_DOWN, EXPAND_DOWN_16 = 0x4091, 0x4099, 0x409B, 0x4097, 0x0097

LIMITS = {
    # code, segment, EDI, vector or None
    "last-byte": ("8a07", limited(DATA, 0xFF), 0xFF, None),
    "beyond": ("8a07", limited(DATA, 0xFF), 0x100, GP),
    "last-doubleword": ("8b07", limited(DATA, 0xFF), 0xFC, None),
    "across-the-limit": ("8b07", limited(DATA, 0xFF), 0xFD, GP),
    "far-beyond": ("8907", limited(DATA, 0xFF), 0xFFFF_FFFF, GP),
    "read-only-read": ("8b07", limited(DATA, 0xFF, READ_ONLY), 0, None),
    "read-only-write": ("8907", limited(DATA, 0xFF, READ_ONLY), 0, GP),
    "read-only-modify": ("ff07", limited(DATA, 0xFF, READ_ONLY), 0, GP),
    "flat-read-only-write": ("8907", limited(0, 0xFFFF_FFFF, 0xC091), DATA, GP),
    "execute-only": ("8b07", limited(DATA, 0xFF, EXECUTE_ONLY), 0, GP),
    "execute-read": ("8b07", limited(DATA, 0xFF, EXECUTE_READ), 0, None),
    "code-write": ("8907", limited(DATA, 0xFF, EXECUTE_READ), 0, GP),
    "expand-down-below": ("8b07", limited(0, DATA - 1, EXPAND_DOWN), DATA - 1, GP),
    "expand-down-above": ("8b07", limited(0, DATA - 1, EXPAND_DOWN), DATA, None),
    "expand-down-16": ("8b07", limited(0, DATA - 1, EXPAND_DOWN_16), 0xFFFC, None),
    "expand-down-16-beyond": ("8b07", limited(0, DATA - 1, EXPAND_DOWN_16), 0xFFFD, GP),
    "null": ("8b07", Segment(0, 0, 0, 0x1_0000), DATA, GP),
    "lea": ("8d07", limited(DATA, 0xFF), 0x100, None),
    "fnsave": ("dd37", limited(DATA, 0xFF), 0xFF - 100, GP),
    "misaligned-and-beyond": ("0f2807", limited(DATA, 0xFF), 0xF8, GP),
    "based-aligned": ("0f2807", limited(DATA + 8, 0xFF), 8, None),
    "based-misaligned": ("0f2807", limited(DATA + 8, 0xFF), 0x10, GP),
    "bit-string": ("0fa307", limited(DATA, 0xFF), 0xF8, GP),  # bit 1000H of it
    "bit-string-inside": ("0fba6f0801", limited(DATA, 0xFF), 0xF0, None),
}


@ENGINES
@pytest.mark.parametrize(("code", "segment", "offset", "vector"), LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("mode", ["protected", "compatibility"])
def test_segment(code: str, segment: Segment, offset: int, vector: Vector | None, mode: str, compiled: bool) -> None:
    state = protected_mode() if mode == "protected" else long_mode(compatibility=True)
    state.cr4 |= OSFXSR
    state.segments[3] = segment.copy()
    bench = bench_of("90" + code, state, compiled=compiled, rdi=offset, rax=0x1000)
    if vector is None:
        bench.run()
    else:
        event = fault_at(bench, 1)
        assert (event.vector, event.error_code) == (vector, 0)


STACKS = {
    "push": ("50", 0x100, None),
    "push-above": ("50", 0x104, None),
    "push-beyond": ("50", 0x108, SS),
    "push-wraps": ("50", 2, SS),
    "pop": ("58", 0xFC, None),
    "pop-beyond": ("58", 0xFD, SS),
    "call": ("e800000000", 0x104, SS),
    "ret": ("c3", 0x100, SS),
    "ebp": ("8b4500", 0x80, SS),
    "esp": ("8b8424ff000000", 0, SS),
    "pusha": ("60", 0x1C, SS),
    "enter": ("c8000100", 0x02, SS),
    "second-push": ("5050", 4, SS),
}


@ENGINES
@pytest.mark.parametrize(("code", "pointer", "vector"), STACKS.values(), ids=STACKS)
def test_stack_segment(code: str, pointer: int, vector: Vector | None, compiled: bool) -> None:
    state = protected_mode()
    state.segments[2] = Segment(0x10, DATA, 0xFF, 0x4093)
    if code == "50" and pointer == 0x104:
        vector = SS
    bench = bench_of("90" + code, state, compiled=compiled, rsp=pointer, rbp=0x100)
    if vector is None:
        bench.run()
    else:
        event = bench.event()
        assert (event.vector, event.error_code) == (vector, 0)


def test_segment_override() -> None:
    state = protected_mode()
    state.segments[4] = limited(DATA, 0xFF)
    bench = bench_of("8b07648b07", state, rdi=DATA)
    event = fault_at(bench, 2)
    assert (event.vector, event.error_code) == (GP, 0)


def test_limit_loaded_in_the_same_run() -> None:
    """MOV DS brings a limit that counts from the next instruction on."""
    bench = bench_of("8b078ed88b07", protected_mode(), rdi=DATA, rax=0x28)
    bench.descriptor(0x28, 0x0040_9300_0000_0FFF)
    assert fault_at(bench, 2 + 2).vector == GP


@ENGINES
@pytest.mark.parametrize(
    ("code", "offset", "vector"),
    [
        ("8b05", 0xFFFE, None),  # MOV AX, [DI]
        ("8b05", 0xFFFF, GP),
        ("8a05", 0xFFFF, None),
        ("8b4501", 0xFFFE, GP),
        ("8b4501", 0xFFFF, None),  # wraps to offset 0
        ("668b05", 0xFFFD, GP),
        ("678b07", 0x1_0000, GP),  # MOV AX, [EDI]
        ("678a07", 0x1_0000, GP),
        ("50", 1, None),
        ("a5", 0xFFFF, GP),
        ("368b05", 0xFFFF, SS),
    ],
)
@pytest.mark.parametrize("virtual", [False, True], ids=["real", "virtual-8086"])
def test_8086_modes(code: str, offset: int, vector: Vector | None, virtual: bool, compiled: bool) -> None:
    state = real_mode()
    if virtual:
        state.cr0 |= 1
        state.rflags |= 1 << 17 | 3 << 12
        for segment in state.segments:
            segment.access_rights = 0xF3
    bench = bench_of("90" + code + "cc", state, compiled=compiled, rdi=offset, rsi=DATA)
    event = bench.event()
    if vector is None:
        assert event.vector == Vector.BP
    else:
        assert (event.vector, event.error_code, bench.places[-1]) == (vector, 0, CODE + 1)


def test_repeated_string_instruction__stops_at_the_limit() -> None:
    state = protected_mode()
    state.segments[0] = limited(DATA, 0xF)
    bench = bench_of("f3ab", state, rdi=0, rcx=10, rax=0x11223344)
    event = fault_at(bench, 0)
    assert (event.vector, bench.state.gpr[7], bench.state.gpr[1]) == (GP, 0x10, 6)
    assert bench.memory.read_u64(DATA + 8) == 0x1122_3344_1122_3344


def test_repeated_string_instruction__count_of_zero() -> None:
    state = protected_mode()
    state.segments[0] = limited(DATA, 0xF)
    bench_of("f3ab", state, rdi=0x100, rcx=0).run()


@pytest.mark.parametrize("count", [1, 300])
def test_many_instructions_guarded_by_themselves(count: int) -> None:
    """More pointers loaded in one block than the engine can guard one by one."""
    state = long_mode()
    bench = bench_of("488b07 0f2800".replace(" ", "") * count, state, rdi=DATA)
    bench.memory.write_u64(DATA, DATA + 0x40)
    bench.run()
    assert bench.processor.instructions == 2 * count + 1


@pytest.mark.parametrize(("offset", "executes"), [(0, True), (0x100, False)])
def test_instruction_executed_for_a_virtualization_extension(offset: int, executes: bool) -> None:
    """What the engine cannot vouch for is looked at once, and then executed for good."""
    state = protected_mode()
    state.segments[3] = limited(DATA, 0xFF)
    bench = bench_of("0fa307", state, rdi=offset, rax=0)
    refused = _Refused(bench.processor, ReservedPageAccess(DATA, DATA, AccessKind.READ))
    assert refused.execute() is executes
    assert state.rip == CODE + (3 if executes else 0)
    assert executes or refused.event == OperandTrap()
