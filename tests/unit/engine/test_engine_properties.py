"""However a program is cut into runs, the result, the time and the instruction count are the same.

The expectation for time and count is made by decoding (iced-x86) the instruction at RIP before each single step.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from engine_bench import CODE, DATA, EngineBench
from hypothesis import given, settings
from hypothesis import strategies as st
from iced_x86 import Decoder, Mnemonic

from vtx.x86.execution import BudgetSpent, InstructionTrap, Stepped
from vtx.x86.mmu import Grant

FUNCTION = 0x1F00  # INC R8; MOV [RSI+40h], R8; RET
HLT = 0xF4
REPEATED = {Mnemonic.MOVSB, Mnemonic.STOSB}


def _simple(pieces: list[str]) -> st.SearchStrategy[bytes]:
    return st.sampled_from([bytes.fromhex(piece) for piece in pieces])


_STRAIGHT = _simple(
    [
        "48ffc0",  # INC RAX
        "4801d8",  # ADD RAX, RBX
        "4831c3",  # XOR RBX, RAX
        "48f7e3",  # MUL RBX
        "90",
        "668bd0",  # MOV DX, AX
        "488946 10".replace(" ", ""),  # MOV [RSI+10h], RAX
        "480346 10".replace(" ", ""),  # ADD RAX, [RSI+10h]
        "48015e18",  # ADD [RSI+18h], RBX
        "505b",  # PUSH RAX; POP RBX
        "f30f5846 20".replace(" ", ""),  # ADDSS XMM0, [RSI+20h]
        "fa",  # CLI
        "fb",  # STI
        "9b",  # WAIT
        "0fa2",  # CPUID: the model's
        "f9",
        "0f94c2",  # SETE DL
        "7403" + "48ffc3",  # JE over INC RBX
        "7501" + "f5",  # JNE over CMC
        "eb00",
    ]
)


@st.composite
def _repeated(draw: st.DrawFn) -> bytes:
    count = draw(st.integers(0, 5))
    operation = draw(st.sampled_from([b"\xf3\xa4", b"\xf3\xaa"]))
    # PUSH RSI; PUSH RDI; MOV ECX, count; REP ...; POP RDI; POP RSI
    return b"\x56\x57" + b"\xb9" + count.to_bytes(4, "little") + operation + b"\x5f\x5e"


@st.composite
def _loop(draw: st.DrawFn) -> bytes:
    count = draw(st.integers(1, 6))
    body = b"".join(draw(st.lists(_STRAIGHT, min_size=0, max_size=4)))
    while b"\x0f\xa2" in body:
        body = body.replace(b"\x0f\xa2", b"\x90\x90")  # the model's CPUID would change RCX on a real machine
    # MOV ECX, count; body; LOOP body
    return b"\xb9" + count.to_bytes(4, "little") + body + b"\xe2" + (-len(body) - 2).to_bytes(1, "little", signed=True)


_PIECES = st.one_of(_STRAIGHT, _STRAIGHT, _repeated(), _loop(), st.just(("call", b"")))
PROGRAMS = st.lists(_PIECES, min_size=1, max_size=25)


def assemble(pieces: list[bytes | tuple[str, bytes]]) -> bytes:
    code = b""
    for piece in pieces:
        if isinstance(piece, tuple):
            code += b"\xe8" + (FUNCTION - (CODE + len(code) + 5)).to_bytes(4, "little", signed=True)
        else:
            code += piece
    return code + bytes((HLT,))


class Program:
    """One engine about to run a program."""

    def __init__(self, code: bytes, *, compiled: bool = True) -> None:
        self.bench = bench = EngineBench(code, compiled=compiled)
        bench.put(FUNCTION, "49ffc04c894640c3")
        bench.state.gpr[6], bench.state.gpr[7] = DATA, DATA + 0x80

    def _skip(self) -> bool:
        """Do the model's part of a trap; whether the program has ended."""
        state = self.bench.state
        opcode = self.bench.memory.read_u8(state.rip)
        if opcode == 0x0F:
            state.rip += 2
        return opcode == HLT

    def in_one_go(self) -> tuple[object, ...]:
        while True:
            assert self.bench.run() == InstructionTrap()
            if self._skip():
                return self.result()

    def in_slices(self, seed: int) -> tuple[object, ...]:
        source = random.Random(seed)
        engine = self.bench.engine
        while True:
            how = source.randrange(4)
            size = source.randrange(0, 40)
            elapsed, count = engine.elapsed(), engine.instructions()
            if how == 0:
                event = self.bench.run(step=True)
            elif how == 1:
                event = self.bench.run(instruction_limit=count + size)
                assert engine.instructions() <= count + size
            else:
                event = self.bench.run(budget=size)
                assert engine.elapsed() - elapsed <= size
            assert event in (InstructionTrap(), BudgetSpent(), Stepped())
            if event == InstructionTrap() and self._skip():
                return self.result()
            if source.randrange(10) == 0:
                engine.flush(None)
                self.bench.reload()

    def in_steps(self) -> tuple[object, ...]:
        """With the time and the count made by decoding."""
        elapsed = count = 0
        state = self.bench.state
        while True:
            instruction = Decoder(64, self.bench.memory.read(state.rip, 15)).decode()
            before, rcx = state.rip, state.gpr[1]
            event = self.bench.run(step=True)
            if event == InstructionTrap():
                if self._skip():
                    assert (self.bench.engine.elapsed(), self.bench.engine.instructions()) == (elapsed, count)
                    return self.result()
                continue
            assert event == Stepped()
            passes = 1
            if instruction.mnemonic in REPEATED and rcx and state.rip != before:
                passes = 2  # the one that finds RCX = 0
            elapsed += instruction.len * passes
            count += passes

    def result(self) -> tuple[object, ...]:
        bench = self.bench
        state = bench.state
        memory = bench.memory.read(DATA, 0x100)
        result = (
            tuple(state.gpr), state.rip, state.rflags, memory, state.shadow,
            bench.engine.elapsed(), bench.engine.instructions(), bench.engine.fpu(),
        )  # fmt: skip
        bench.close()
        return result


@settings(max_examples=40, deadline=None)
@given(PROGRAMS, st.integers(0, 1 << 32))
def test_cuts_change_nothing(pieces: list[bytes | tuple[str, bytes]], seed: int) -> None:
    code = assemble(pieces)
    whole = Program(code).in_one_go()
    assert Program(code).in_steps()[:-1] == whole[:-1]
    assert Program(code).in_slices(seed)[:-1] == whole[:-1]
    assert Program(code, compiled=False).in_slices(seed + 1)[:-1] == whole[:-1]
    assert Program(code, compiled=False).in_one_go() == whole


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(PROGRAMS, st.integers(0, 1 << 32))
def test_cuts_change_nothing__at_length(pieces: list[bytes | tuple[str, bytes]], seed: int) -> None:
    code = assemble(pieces)
    whole = Program(code).in_one_go()
    assert Program(code).in_steps()[:-1] == whole[:-1]
    assert Program(code).in_slices(seed)[:-1] == whole[:-1]


# Code that writes code.

# Code, the number of its instructions, what it does to RBX. Some have one size but different numbers.
SNIPPETS: list[tuple[bytes, int, Callable[[int], int]]] = [
    (bytes.fromhex("48ffc3"), 1, lambda b: b + 1),
    (bytes.fromhex("4883c311"), 1, lambda b: b + 0x11),
    (bytes.fromhex("9048ffc3"), 2, lambda b: b + 1),
    (bytes.fromhex("486bdb05"), 1, lambda b: b * 5),
    (bytes.fromhex("4883f37f"), 1, lambda b: b ^ 0x7F),
    (bytes.fromhex("48d1e3"), 1, lambda b: b << 1),
    (bytes.fromhex("48f7d3"), 1, lambda b: ~b),
    (bytes.fromhex("48f7d348ffc3"), 2, lambda b: -b),
    (bytes.fromhex("909090 48ffcb"), 4, lambda b: b - 1),
]
MASK = (1 << 64) - 1
ALIAS = 0x20000  # linear pages here map the same frames as CODE and on
OWN_PAGE, NEXT_PAGE, FAR_PAGE = CODE + 0xE00, CODE + 0x1000 + 0x100, CODE + 0x5000


@st.composite
def _writes(draw: st.DrawFn) -> list[tuple[int, int, bool, bool]]:
    """(snippet, place, write through the alias, execute through the alias)."""
    return draw(
        st.lists(
            st.tuples(
                st.integers(0, len(SNIPPETS) - 1),
                st.sampled_from([OWN_PAGE, OWN_PAGE + 8, OWN_PAGE + 0xF8, NEXT_PAGE, NEXT_PAGE + 0x10, FAR_PAGE]),
                st.booleans(),
                st.booleans(),
            ),
            min_size=1,
            max_size=30,
        )
    )


def _driver(writes: list[tuple[int, int, bool, bool]]) -> bytes:
    code = b""
    for snippet, place, write_alias, execute_alias in writes:
        body = (SNIPPETS[snippet][0] + b"\xc3").ljust(8, b"\x90")
        code += b"\x48\xb8" + body  # MOV RAX, imm64
        code += b"\x48\xbf" + (place + (ALIAS - CODE if write_alias else 0)).to_bytes(8, "little")  # MOV RDI, imm64
        code += b"\x48\x89\x07"  # MOV [RDI], RAX
        code += b"\x48\xbf" + (place + (ALIAS - CODE if execute_alias else 0)).to_bytes(8, "little")
        code += b"\xff\xd7"  # CALL RDI
    return code + bytes((HLT,))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=60, deadline=None)
@given(_writes(), st.integers(1, 3))
def test_written_code_is_the_code_that_runs(
    compiled: bool, writes: list[tuple[int, int, bool, bool]], rounds: int
) -> None:
    bench = EngineBench(_driver(writes), compiled=compiled)
    for page in range(8):
        frame = (CODE >> 12) + page
        bench.client.pages[(ALIAS >> 12) + page] = Grant(frame, 7)
    count = elapsed = 0
    for _ in range(rounds):
        bench.state.rip, bench.state.gpr[3] = CODE, 0
        assert bench.run() == InstructionTrap()
        expected = 0
        for snippet, *_ in writes:
            expected = SNIPPETS[snippet][2](expected) & MASK
            count += 6 + SNIPPETS[snippet][1]
            elapsed += 35 + len(SNIPPETS[snippet][0]) + 1
        assert bench.state.gpr[3] == expected
        assert bench.engine.instructions() == count
        assert bench.engine.elapsed() == elapsed
    bench.close()
