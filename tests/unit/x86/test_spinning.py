"""How long a PAUSE takes."""

import pytest

from vtx.x86.spinning import ITERATION_TICKS, LONGEST_PAUSE, PAUSE_TICKS, Spin

REST = 300


class Loop:
    """A loop around one PAUSE."""

    def __init__(self) -> None:
        self.spin = Spin()
        self.now = 1_000
        self.gpr = list(range(16))

    def pause(self, rip: int = 0x1000, *, longer: bool = True) -> tuple[bool, int]:
        again = self.spin.pause(self.now, rip, self.gpr, longer=longer)
        self.now += self.spin.ticks + REST
        return again, self.spin.ticks


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_doubles_up_to_the_longest(loop: Loop) -> None:
    taken = [loop.pause() for _ in range(16)]
    assert taken[0] == (False, PAUSE_TICKS)
    assert [ticks for _, ticks in taken[1:13]] == [PAUSE_TICKS << n for n in range(1, 13)]
    assert all(again for again, _ in taken[1:])
    assert taken[-1] == (True, LONGEST_PAUSE)


def test_waits_at_most_twice_as_long_as_asked(loop: Loop) -> None:
    for deadline in (3_000, 50_000, 1_000_000):
        begin = loop.now = loop.now + 10_000
        while loop.now - begin < deadline:
            loop.pause()
        assert loop.now - begin <= 2 * deadline + PAUSE_TICKS + REST


@pytest.mark.parametrize("register", [3, 4, 5, 12, 13, 14, 15])
def test_another_value_in_a_register_that_functions_keep__is_another_loop(loop: Loop, register: int) -> None:
    loop.pause()
    loop.pause()
    loop.gpr[register] += 1
    assert loop.pause() == (False, PAUSE_TICKS)


@pytest.mark.parametrize("register", [0, 1, 2, 6, 7, 8, 9, 10, 11])
def test_other_registers_may_hold_the_time(loop: Loop, register: int) -> None:
    loop.pause()
    loop.gpr[register] += 1
    assert loop.pause() == (True, 2 * PAUSE_TICKS)


def test_another_place_or_a_longer_iteration__is_another_loop(loop: Loop) -> None:
    loop.pause()
    assert loop.pause(0x2000) == (False, PAUSE_TICKS)
    loop.now += ITERATION_TICKS
    assert loop.pause(0x2000) == (False, PAUSE_TICKS)


def test_not_longer__when_others_can_run_meanwhile(loop: Loop) -> None:
    loop.pause()
    assert loop.pause(longer=False) == (True, PAUSE_TICKS)
    assert loop.pause(longer=False) == (True, PAUSE_TICKS)
