"""Near branches and the bound registers of Intel MPX: which branches initialize them, and what keeps them from it.

Spec: SDM Vol. 1, "CALL, RET, JMP and All Jcc".
"""

from __future__ import annotations

import struct

import pytest
from bounds_bench import ALL, ENABLE, HLT, PRESERVE, bench_of, bound, give, state_with
from processor_bench import CODE, DATA, STACK, long_mode, protected_mode

from vtx.engine.unicorn_engine import UnicornEngine
from vtx.x86.outcome import Vector
from vtx.x86.state import CpuState

RAX, RSP = 0, 4


class TestNearBranches:
    """BND1 is in use; which instructions clear it."""

    TARGET = CODE + 0x40

    @staticmethod
    def after(code: str, config: int = ENABLE, **registers: int) -> CpuState:
        state = give(state_with(config, **registers), 5, 6, 1)
        bench = bench_of(code, state)
        bench.put(CODE + 0x40, HLT)
        bench.memory.write_u64(STACK, CODE + 0x40)
        return bench.run()

    # Opcode, bytes of the displacement to the target, what is added to RSP if it is left at all.
    FOLLOWED = {
        "call": ("e8", 4, -8),
        "call-indirect": ("ffd0", 0, -8),
        "jmp": ("e9", 4, 0),
        "jmp-indirect": ("ffe0", 0, 0),
        "ret": ("c3", 0, 8),
        "ret-immediate": ("c20800", 0, 16),
        "jcc-short": ("74", 1, 0),
        "jcc-near": ("0f84", 4, 0),
        "jcc-not-taken": ("75", 1, None),
        "jcc-near-not-taken": ("0f85", 4, None),
    }

    @pytest.mark.parametrize(("opcode", "size", "moved"), FOLLOWED.values(), ids=FOLLOWED)
    @pytest.mark.parametrize(
        ("prefix", "config", "kept"),
        [("", ENABLE, False), ("f2", ENABLE, True), ("", ENABLE | PRESERVE, True), ("", 0, True)],
    )
    def test_branches(self, opcode: str, size: int, moved: int | None, prefix: str, config: int, kept: bool) -> None:
        """What comes before the branch has its effect once."""
        before = bytes.fromhex("ffc1" + "31d2" + prefix + opcode)  # INC ECX; XOR EDX, EDX sets ZF
        behind = CODE + len(before) + size
        code = before + (self.TARGET - behind).to_bytes(size, "little") if size else before
        state = self.after(code.hex(), config, rax=self.TARGET)
        assert bound(state, 1) == ((5, 6) if kept else (0, 0))
        assert state.rip == (behind if moved is None else self.TARGET) + 1
        assert (state.gpr[1], state.gpr[RSP]) == (0x21, STACK + (moved or 0))

    @pytest.mark.parametrize(
        ("code", "registers"),
        [
            pytest.param("eb3e", {}, id="short-jump"),
            pytest.param("e33e", {"rcx": 0}, id="jrcxz"),
            pytest.param("e23e", {"rcx": 5}, id="loop"),
            pytest.param("cc", {}, id="int3"),
            pytest.param("ff2f", {"rdi": DATA}, id="far-jump"),
        ],
    )
    def test_what_never_clears_them(self, code: str, registers: dict[str, int]) -> None:
        state = give(state_with(**registers), 5, 6, 1)
        bench = bench_of(code, state)
        bench.memory.write(DATA, struct.pack("<IH", self.TARGET, 8))
        bench.put(self.TARGET, HLT)
        if code == "cc":
            bench.event()
        else:
            assert bench.run().rip == self.TARGET + 1
        assert bound(state, 1) == (5, 6)

    def test_not_by_a_branch_that_faults(self) -> None:
        state = give(state_with(rax=1 << 47), 5, 6, 1)
        assert bench_of("ffe0", state).event().vector == Vector.GP
        assert bound(state, 1) == (5, 6)

    def test_of_the_user(self) -> None:
        state = give(state_with(state=long_mode(3)), 5, 6, 1)
        bench = bench_of("e900000000" + "0f0b", state)
        assert (bench.event().vector, bound(state, 1)) == (Vector.UD, (0, 0))

    def test_32_bits(self) -> None:
        state = give(state_with(state=protected_mode()), 5, 6, 1)
        bench = bench_of("31c0" + "740090" + "e800000000" + "58", state)
        assert (bound(bench.run(), 1), state.gpr[RAX]) == ((0, 0), CODE + 10)

    def test_again_once_they_are_in_use(self) -> None:
        """What need not be watched while they are 0 must be once they are not: the same branch, then."""
        loop = "f30f1b4f01" + "ffc9" + "75f7"  # BNDMK BND1, [RDI + 1]; DEC ECX; JNZ
        state = bench_of(loop + "660f1ac1", state_with(rcx=50, rdi=0x5000)).run()
        assert (state.gpr[1], bound(state), bound(state, 1)) == (0, (0, 0), (0, 0))

    def test_while_the_engine_runs(self) -> None:
        """Answered in the middle of a run, with the same counts as one by one."""
        code = "f30f1b4f01" + "f30f1acf" + "e8f3000000" + "f20f1acf" + "ffc9" + "f275e9" + "750090" + "f30f1b17"
        routine = "ffc0" + "f2c3"
        counts = []
        for answers in (True, False):
            state = state_with(ENABLE | PRESERVE, rcx=100, rdi=0x5000, rax=0)
            bench = bench_of(code, state)
            bench.put(CODE + 0x101, routine)
            processor = bench.processor
            processor.engine = UnicornEngine(bench.memory, processor, answers=answers)
            processor.mmu.flush_engine = processor.engine.flush
            processor.reload = True
            bench.run()
            assert (state.gpr[RAX], state.gpr[1], bound(state, 1)) == (100, 0, (0x5000, ALL ^ 0x5001))
            assert bound(state, 2) == (0x5000, ALL ^ 0x5000)
            counts.append((processor.instructions, processor.engine.elapsed()))
        assert counts[0] == counts[1]
        assert counts[0][0] == 8 * 100 + 4
