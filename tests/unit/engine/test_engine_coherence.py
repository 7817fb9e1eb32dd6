"""Code that changes: by itself, through another mapping, by the model; and pages that hold code and data."""

from __future__ import annotations

import pytest
from engine_bench import CODE, DATA, EngineBench

from vtx.x86.execution import InstructionTrap, RefusedFill
from vtx.x86.mmu import Grant
from vtx.x86.second_level import AccessKind

ALIAS = 0x20000
INC_EAX, INC_EBX = b"\xff\xc0", b"\xff\xc3"


def make(code: bytes | str, *, compiled: bool = True) -> EngineBench:
    """The code page is mapped a second time at `ALIAS`."""
    bench = EngineBench(code, compiled=compiled)
    bench.client.pages[ALIAS >> 12] = Grant(CODE >> 12, 7)
    bench.state.gpr[0] = bench.state.gpr[3] = 0
    return bench


@pytest.mark.parametrize("base", [CODE, ALIAS], ids=["same-mapping", "alias"])
@pytest.mark.parametrize("distance", [0, 1, 20])
def test_store_changes_an_instruction_ahead_in_the_same_block(base: int, distance: int) -> None:
    """SDM Vol. 3, "Handling Self- and Cross-Modifying Code": through the same linear address it takes effect at once.

    Through another linear address the manual asks for a serializing instruction in between; here there is CPUID.
    """
    # MOV BYTE [RDI], 0xC3; (CPUID through the alias); NOPs; INC EAX -> INC EBX; HLT
    lead = b"\xc6\x07\xc3" + (b"\x0f\xa2" if base == ALIAS else b"") + b"\x90" * distance
    bench = make(lead + INC_EAX + b"\xf4")
    for round_ in range(8):  # the page becomes one of code and data on the way
        bench.put(CODE + len(lead), INC_EAX)
        bench.state.rip = CODE
        bench.state.gpr[0] = bench.state.gpr[3] = 0
        bench.state.gpr[7] = base + len(lead) + 1
        assert bench.run() == InstructionTrap()
        if base == ALIAS:
            bench.state.rip += 2
            assert bench.run() == InstructionTrap()
        assert (bench.state.gpr[0], bench.state.gpr[3]) == (0, 1), round_
    bench.close()


def test_store_changes_an_instruction_ahead_after_another_store_to_the_page() -> None:
    # MOV BYTE [RDI], 0 elsewhere in the page; MOV BYTE [RSI], 0xC3; INC EAX -> INC EBX; HLT
    bench = make("c60700 c606c3 ffc0 f4")
    for round_ in range(8):
        bench.put(CODE + 6, INC_EAX)
        bench.state.rip = CODE
        bench.state.gpr[0] = bench.state.gpr[3] = 0
        bench.state.gpr[6], bench.state.gpr[7] = CODE + 7, CODE + 0x500
        assert bench.run() == InstructionTrap()
        assert (bench.state.gpr[0], bench.state.gpr[3]) == (0, 1), round_
    bench.close()


def test_store_changes_the_loop_it_is_in() -> None:
    # L: INC EAX; XOR BYTE [rip: the ModRM byte of INC], 3; DEC ECX; JNZ L; HLT. Alternates INC EAX and INC EBX.
    bench = make("ffc08035f8ffffff03ffc975f3f4")
    bench.state.gpr[1] = 1000
    assert bench.run() == InstructionTrap()
    assert (bench.state.gpr[0], bench.state.gpr[3]) == (500, 500)
    assert bench.engine.instructions() == 4000
    assert bench.engine.elapsed() == 1000 * 13
    bench.close()


def test_push_changes_code() -> None:
    # MOV RSP, imm; PUSH RAX over the INC EAX; ...
    bench = make("")
    bench.put(CODE, "50909090909090" + "ffc0" * 4 + "f4")
    bench.state.gpr[4] = CODE + 7 + 8
    bench.state.gpr[0] = int.from_bytes(INC_EBX * 4, "little")
    assert bench.run() == InstructionTrap()
    assert bench.state.gpr[3] == 4
    bench.close()


def test_string_store_changes_code_on_another_page() -> None:
    # CALL target; REP MOVSB new code over it; CALL target; HLT
    bench = make("ffd5f3a4ffd5f4")
    target = 0x3000
    bench.state.gpr[5] = bench.state.gpr[7] = target
    bench.put(target, "ffc0c3")
    bench.put(DATA, "ffc3c3")
    bench.state.gpr[6], bench.state.gpr[1] = DATA, 3
    assert bench.run() == InstructionTrap()
    assert (bench.state.gpr[0], bench.state.gpr[3]) == (1, 1)
    bench.close()


def test_store_across_a_page_boundary_changes_code_in_the_second_page() -> None:
    # CALL target; MOV [target - 2], RAX; CALL target; HLT
    bench = make("ffd5488945feffd5f4")
    target = 0x3000
    bench.state.gpr[5] = target
    bench.put(target, "ffc3c3")
    bench.state.gpr[0] = int.from_bytes(b"\x00\x00\xff\xc2\xc3\x90\x90\x90", "little")  # INC EDX; RET
    bench.state.gpr[2] = 0
    assert bench.run() == InstructionTrap()
    assert (bench.state.gpr[3], bench.state.gpr[2]) == (1, 1)
    bench.close()


def test_model_writes_into_executed_code() -> None:
    bench = make("ffc0f4")
    for i in range(8):
        bench.state.rip = CODE
        bench.state.gpr[0] = bench.state.gpr[3] = 0
        bench.memory.write(CODE, (INC_EAX, INC_EBX)[i & 1])
        assert bench.run() == InstructionTrap()
        assert (bench.state.gpr[0], bench.state.gpr[3]) == ((1, 0), (0, 1))[i & 1]
    bench.close()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_model_writes_of_any_width_are_noticed(width: int) -> None:
    bench = make("ffc0" * 4 + "f4")
    assert bench.run() == InstructionTrap()
    value = int.from_bytes((INC_EBX * 4)[:width], "little")
    writer = {1: bench.memory.write_u8, 2: bench.memory.write_u16, 4: bench.memory.write_u32, 8: bench.memory.write_u64}
    writer[width](CODE, value)
    bench.state.rip = CODE
    bench.state.gpr[0] = bench.state.gpr[3] = 0
    if width == 1:
        return  # the first byte of both is the same
    assert bench.run() == InstructionTrap()
    assert bench.state.gpr[3] == width // 2
    bench.close()


def test_model_write_while_the_code_runs_is_seen_from_the_next_block_on() -> None:
    # OUT 10h, AL; JMP +0; INC EAX; HLT, where the device writes INC EBX
    bench = make("e610eb00ffc0f4")
    bench.client.port_values = {0x10: 0}
    original = bench.client.port_out

    def port_out(port: int, size: int, value: int, cpl: int) -> bool:
        bench.memory.write(CODE + 4, INC_EBX)
        return original(port, size, value, cpl)

    bench.client.port_out = port_out  # type: ignore[method-assign]
    assert bench.run() == InstructionTrap()
    assert (bench.state.gpr[0], bench.state.gpr[3]) == (0, 1)
    bench.close()


def test_code_and_data_on_one_page__settles_on_sharing_it() -> None:
    """A loop that stores to its own page must not ask for the page again and again."""
    # L: MOV [rip + 0x100], EAX; INC EAX; DEC ECX; JNZ L; HLT
    bench = make("890500010000ffc0ffc975f4f4")
    bench.state.gpr[1] = 20_000
    while bench.run(budget=50_000) != InstructionTrap():
        pass
    assert bench.memory.read_u32(CODE + 0x106) == 19_999
    assert bench.state.gpr[0] == 20_000
    assert len(bench.client.fills) < 50
    bench.close()


def test_code_and_data_on_one_page__stays_correct_after_flushes() -> None:
    # L: INC DWORD [rip + 0x100]; CALL [RDI]; DEC ECX; JNZ L; HLT; the called code patches itself through the alias
    bench = make("ff0500010000ffd7ffc975f4f4")
    bench.put(CODE + 0x200, "ffc08035f8ffffff03c3")
    bench.state.gpr[7] = CODE + 0x200
    bench.state.gpr[1] = 1000
    while bench.run(budget=97) != InstructionTrap():
        bench.engine.flush(None)
        if bench.state.gpr[1] % 7 == 0:
            bench.run(step=True)
    assert bench.memory.read_u32(CODE + 0x106) == 1000
    assert (bench.state.gpr[0], bench.state.gpr[3]) == (500, 500)
    bench.close()


def test_remapped_page_runs_the_new_frames_code() -> None:
    bench = make("ffd7f4")
    bench.put(0x5000, "ffc0c3")
    bench.put(0x6000, "ffc3c3")
    bench.state.gpr[7] = 0x30000
    for i in range(6):
        bench.client.pages[0x30] = Grant(5 + (i & 1), 7)
        bench.engine.flush(None)
        bench.state.rip = CODE
        bench.state.gpr[0] = bench.state.gpr[3] = 0
        assert bench.run() == InstructionTrap()
        assert (bench.state.gpr[0], bench.state.gpr[3]) == ((1, 0), (0, 1))[i & 1]
    bench.close()


def test_remapped_code_of_the_same_size_is_counted_anew() -> None:
    """Facts about a block belong to its frame, not to its linear address."""
    bench = make("ffd7f4")
    bench.put(0x5000, "90909090c3")  # five instructions
    bench.put(0x6000, "0f1f4000c3")  # two
    bench.state.gpr[7] = 0x30000
    for frame, count in ((5, 5), (6, 2), (5, 5), (6, 2)):
        bench.client.pages[0x30] = Grant(frame, 7)
        bench.engine.flush(None)
        bench.state.rip = CODE
        before = bench.engine.instructions()
        assert bench.run() == InstructionTrap()
        assert bench.engine.instructions() - before == count + 1
    bench.close()


def test_writes_after_a_flush_still_drop_translations() -> None:
    """A frame stays executed although the TLB forgot about it."""
    bench = make("ffd7f4")
    bench.put(0x5000, "ffc0c3")
    bench.state.gpr[7] = 0x5000
    assert bench.run() == InstructionTrap()
    bench.engine.flush(None)
    # MOV BYTE [5001h], C3h; CALL RDI; HLT
    bench.put(0x7000, "c6042501500000c3ffd7f4")
    bench.state.rip = 0x7000
    bench.state.gpr[0] = bench.state.gpr[3] = 0
    assert bench.run() == InstructionTrap()
    assert (bench.state.gpr[0], bench.state.gpr[3]) == (0, 1)
    bench.close()


def test_two_engines_on_one_memory() -> None:
    """What one processor writes, the other executes."""
    from vtx.engine.unicorn_engine import UnicornEngine  # noqa: PLC0415

    bench = make("ffc0f4")
    other = EngineBench("c6042501100000c3f4")  # MOV BYTE [1001h], C3h
    other.engine.close()
    other.memory.write(0x1000, b"\0" * 16)
    other.memory = bench.memory
    other.put(0x7000, "c6042501100000c3f4")
    other.engine = UnicornEngine(bench.memory, other.client, coherence=bench.engine.coherence)
    for _ in range(6):
        bench.put(CODE, INC_EAX)
        bench.state.rip = CODE
        bench.state.gpr[0] = bench.state.gpr[3] = 0
        assert bench.run() == InstructionTrap()
        assert bench.state.gpr[0] == 1
        other.state.rip = 0x7000
        other.reload()
        assert other.run() == InstructionTrap()
        bench.state.rip = CODE
        assert bench.run() == InstructionTrap()
        assert bench.state.gpr[3] == 1
    other.close()
    bench.close()


def test_read_only_page_is_never_handed_out_writable() -> None:
    bench = make("8807f4")
    bench.client.pages[DATA >> 12] = Grant(DATA >> 12, AccessKind.READ | AccessKind.EXECUTE)
    bench.state.gpr[7] = DATA
    for _ in range(8):
        bench.state.rip = CODE
        event = bench.run()
        assert isinstance(event, RefusedFill)
        bench.engine.flush(None)
    bench.close()


def test_single_step_over_an_instruction_that_stores_to_itself() -> None:
    # L: MOV BYTE [rip: its own opcode], C6h; JMP L
    bench = make("c605f9ffffffc6ebf7")
    for i in range(20):
        bench.step(2)
        assert bench.state.rip == CODE
        assert (bench.engine.elapsed(), bench.engine.instructions()) == (9 * (i + 1), 2 * (i + 1))
    bench.close()
