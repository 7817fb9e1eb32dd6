"""Near-valid states: the same for a seed, near to valid, and such that the harness survives them."""

from itertools import islice

import pytest

from vmcs import fields as f
from vmcs.fields import BY_ENCODING
from vmcs.rules import EntryFails
from vtx.fuzz.drawing import State
from vtx.fuzz.entries import scene
from vtx.fuzz.entries.states import EntryGenerator
from vtx.x86.profile import load_profile

PROFILE = load_profile("bochs-skylake-x")
COUNT = 1500


def generator(seed: int = 1) -> EntryGenerator:
    return EntryGenerator.of(PROFILE, seed)


@pytest.fixture(scope="module")
def states() -> list[State]:
    return list(islice(generator(), COUNT))


def test_the_same_seed_gives_the_same_states(states: list[State]) -> None:
    assert list(islice(generator(), COUNT)) == states
    assert list(islice(generator(2), COUNT)) != states


def test_every_base_is_valid_and_comes_first(states: list[State]) -> None:
    assert [state.base for state in states[: len(scene.BASES)]] == list(range(len(scene.BASES)))
    made = generator()
    for state in states[: len(scene.BASES)]:
        assert not state.deltas
        assert made.violation(state) is None, state


@pytest.mark.parametrize("profile", ["skylake-server", "everything"])
def test_bases_are_valid_elsewhere_too(profile: str) -> None:
    EntryGenerator.of(load_profile(profile), 1)


def test_states_are_near_valid(states: list[State]) -> None:
    made = generator()
    found = [made.violation(state) for state in states]
    entered = sum(violation is None for violation in found)
    assert COUNT // 4 < entered < COUNT * 3 // 4
    assert len({violation.rule.id for violation in found if violation}) > 100


def test_changes_are_of_fields_that_software_can_write(states: list[State]) -> None:
    for state in states:
        for encoding, value in state.deltas:
            field = BY_ENCODING[encoding]
            assert not field.read_only
            assert value & ~field.mask == 0


def test_a_vm_exit_finds_the_harness(states: list[State]) -> None:
    made = generator()
    for state in states:
        violation = made.violation(state)
        if violation is None or isinstance(violation.outcome, EntryFails):
            changed = {encoding for encoding, _ in state.deltas}
            assert not changed & {f.HOST_CR3.encoding, f.HOST_RIP.encoding, f.VM_EXIT_MSR_LOAD_COUNT.encoding}, state


def test_a_guest_that_waits_for_sipi_is_never_entered(states: list[State]) -> None:
    made = generator()
    waiting = [state for state in states if dict(state.deltas).get(f.GUEST_ACTIVITY_STATE.encoding) == 3]
    assert waiting
    assert all(made.violation(state) is not None for state in waiting)


def test_a_state_in_words() -> None:
    assert generator().describe(State(0, ((f.GUEST_RIP.encoding, 0x10),))) == "64-bit: Guest RIP = 0x10"
    assert generator().describe(State(0, ())) == "64-bit: as it is"
