"""Near-valid VMCBs: the same for a seed, near to valid, and such that the harness survives them."""

from itertools import islice

import pytest

from vmcs.vmcb.fields import BY_NAME, Vmcb
from vmcs.vmcb.intercepts import Exit
from vtx.fuzz.drawing import State
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.experiment import ORACLES
from vtx.fuzz.vmruns.programs import PROGRAMS, SLOT, Program
from vtx.fuzz.vmruns.states import VmrunGenerator, program_of
from vtx.x86.state import Gpr

COUNT = 1500


def generator(oracle: str = "qemu", seed: int = 1) -> VmrunGenerator:
    return ORACLES[oracle].generator(seed)


@pytest.fixture(scope="module")
def states() -> list[State]:
    return list(islice(generator(), COUNT))


def block_of(made: VmrunGenerator, state: State) -> Vmcb:
    made.load(state)
    return made.structure


def test_the_same_seed_gives_the_same_states(states: list[State]) -> None:
    assert list(islice(generator(), COUNT)) == states
    assert list(islice(generator(seed=2), COUNT)) != states


@pytest.mark.parametrize("oracle", ORACLES)
def test_every_base_is_valid_and_comes_first(oracle: str) -> None:
    made = generator(oracle)
    first = [State(number, ()) for number in range(len(scene.BASES))]
    assert list(islice(made, len(first))) == first
    assert [made.violation(state) for state in first] == [None] * len(first)


def test_states_are_near_valid(states: list[State]) -> None:
    made = generator()
    broken = [made.violation(state) for state in states]
    assert COUNT // 2 < broken.count(None) < COUNT * 9 // 10
    assert len({violation.rule.id for violation in broken if violation}) > 15


def test_every_program_is_drawn(states: list[State]) -> None:
    made = generator()
    programs = {program_of(state.base, made.fields(state)) for state in states}
    assert set(PROGRAMS) <= programs


def program_at(base: str, rip: int) -> Program | None:
    number = next(number for number, each in enumerate(scene.BASES) if each.name == base)
    return program_of(number, scene.fields_of(scene.BASES[number]) | {scene.RIP: rip})


def test_a_program_is_where_it_is_looked_for() -> None:
    code = b"".join(scene.memory()[scene.CODE + page * scene.PAGE] for page in range(scene.CODE_PAGES))
    for number, program in enumerate(PROGRAMS):
        assert code[number * SLOT :].startswith(program.code)
        assert len(program.code) < SLOT
        assert program_at("64-bit", scene.CODE + number * SLOT) is program
    assert program_at("64-bit", scene.CODE + 1) is None
    assert program_at("64-bit", 0) is None
    assert program_at("64-bit", scene.CODE | 1 << 32) is None
    assert program_at("PAE paging", scene.CODE | 1 << 32) is PROGRAMS[0]


def test_a_guest_comes_back(states: list[State]) -> None:
    made = generator()
    for state in states:
        block = block_of(made, state)
        for number in (Exit.VMMCALL, Exit.HLT, Exit.SHUTDOWN, Exit.MWAIT):
            assert block[scene.INTERCEPTS[number >> 5]] >> (number & 31) & 1, made.describe(state)


def test_ports_of_the_harness_are_out_of_reach(states: list[State]) -> None:
    made = generator()
    assert scene.memory()[scene.IOPM][0x3F8 >> 3] == 0xFF
    for state in states:
        block = block_of(made, state)
        intercepted = block[scene.INTERCEPTS[3]] >> (Exit.IOIO & 31) & 1
        if not intercepted or block[BY_NAME["IOPM_BASE_PA"]] & ~0xFFF != scene.IOPM:
            assert block[scene.REGISTERS[Gpr.RDX]] & 0xFFFF not in range(0x3F8, 0x400)


def test_a_state_in_words() -> None:
    assert generator().describe(State(0, ((scene.RIP.encoding, 0x10),))) == "64-bit: RIP = 0x10"
