"""Taking turns, with processors that follow a script."""

from collections.abc import Callable

import pytest

from vtx.scheduler import LONGEST_QUANTUM, SHORTEST_QUANTUM, Scheduler

SPIN_TICKS = 400


class Scripted:
    """Executes forever until told otherwise; ``turns`` records (begin, until, end) of each turn."""

    def __init__(self, now: int = 0) -> None:
        self.time = now
        self.awake = True
        self.finished = False
        self.contended = self.spins = False
        self.wake: int | None = None
        self.turns: list[tuple[int, int | None, int]] = []
        self.slept: list[int] = []
        self.work: Callable[[Scripted, int | None], None] = Scripted.compute
        self.gives_way = False
        self.progresses = True

    def compute(self, until: int | None) -> None:
        self.time = self.time + 10_000_000 if until is None else max(until, self.time)

    def spin(self, until: int | None) -> None:
        self.time += SPIN_TICKS
        self.spins = True

    def now(self) -> int:
        return self.time

    def sleep_until(self, tick: int) -> None:
        self.time = max(self.time, tick)
        self.slept.append(tick)
        if self.wake is not None and self.wake <= self.time:
            self.wake, self.awake = None, True

    def idle_until(self, tick: int) -> None:
        self.sleep_until(tick)

    def wake_time(self) -> int | None:
        return self.wake

    def run(self, until: int | None = None) -> None:
        self.gives_way = False
        begin = self.time
        self.work(self, until)
        self.turns.append((begin, until, self.time))

    def give_way(self) -> None:
        self.gives_way = True

    def registers(self) -> tuple[int, ...]:
        return (self.time,) if self.progresses else (7,)


class Bench:
    """``count`` processors; `run` ends after that many turns."""

    def __init__(self, count: int) -> None:
        self.processors = [Scripted() for _ in range(count)]
        self.order: list[int] = []
        self.left = 0
        self.scheduler = Scheduler(self.processors, self._switch)

    def _switch(self, index: int) -> None:
        self.order.append(index)
        self.left -= 1
        self.processors[0].finished = self.left <= 0

    def run(self, turns: int) -> list[int]:
        self.order.clear()
        self.left, self.processors[0].finished = turns, False
        self.scheduler.run()
        return self.order


@pytest.fixture
def two() -> Bench:
    return Bench(2)


def test_furthest_behind_runs_next(two: Bench) -> None:
    assert two.run(6) == [0, 1, 0, 1, 0, 1]
    for processor in two.processors:
        for begin, until, _ in processor.turns:
            assert until is not None
            assert until - begin >= SHORTEST_QUANTUM
    assert abs(two.processors[0].time - two.processors[1].time) <= LONGEST_QUANTUM


def test_quantum_grows_to_its_longest(two: Bench) -> None:
    two.run(100)
    begin, until, _ = two.processors[0].turns[0]
    assert until == begin + SHORTEST_QUANTUM
    assert two.scheduler.turns.quantum == LONGEST_QUANTUM
    lead = [until - begin for begin, until, _ in two.processors[1].turns[1:] if until]
    assert lead == sorted(lead)


def test_one_alone_runs_without_limit() -> None:
    bench = Bench(1)
    bench.run(1)
    assert bench.processors[0].turns[0][1] is None
    assert not bench.processors[0].contended


def test_contended_only_while_others_could_run(two: Bench) -> None:
    two.run(1)
    assert two.processors[0].contended
    two.processors[1].awake = False
    two.run(1)
    assert not two.processors[0].contended


@pytest.mark.parametrize("target", [1, 2])
def test_signal__the_target_has_the_next_turn_and_the_quantum_is_short_again(target: int) -> None:
    bench = Bench(3)
    bench.run(100)

    def send(sender: Scripted, until: int | None) -> None:
        sender.time += 10
        bench.scheduler.signal(target)
        assert sender.gives_way
        sender.work = Scripted.compute

    bench.processors[0].work = send
    while bench.run(1) != [0]:
        pass
    assert bench.scheduler.turns.quantum == SHORTEST_QUANTUM
    assert bench.run(1) == [target]
    assert not bench.scheduler.turns.signalled


def test_signal__wakes_at_the_time_of_the_event(two: Bench) -> None:
    sleeper = two.processors[1]
    sleeper.awake = False

    def send(sender: Scripted, until: int | None) -> None:
        sender.time += 7_000
        sleeper.awake = True
        two.scheduler.signal(1)
        sender.time += 100

    two.processors[0].work = send
    assert two.run(2) == [0, 1]
    assert sleeper.slept == [7_000]
    assert sleeper.turns[0][0] == 7_000


def test_signal__one_that_sleeps_on_gets_no_turn(two: Bench) -> None:
    two.processors[1].awake = False

    def send(sender: Scripted, until: int | None) -> None:
        sender.time += 10
        two.scheduler.signal(1)
        assert not sender.gives_way

    two.processors[0].work = send
    assert two.run(3) == [0, 0, 0]


def test_signal__to_oneself_changes_nothing(two: Bench) -> None:
    def send(sender: Scripted, until: int | None) -> None:
        two.scheduler.signal(0)
        assert not sender.gives_way
        sender.time += 10

    two.processors[0].work = send
    two.run(1)
    assert not two.scheduler.turns.signalled


def test_signals_to_many__all_have_their_turns() -> None:
    bench = Bench(4)
    for sleeper in bench.processors[1:]:
        sleeper.awake = False

    def send(sender: Scripted, until: int | None) -> None:
        sender.time += 500
        for index in (3, 1, 2):
            bench.processors[index].awake = True
            bench.scheduler.signal(index)
        sender.work = Scripted.compute

    bench.processors[0].work = send
    assert bench.run(4) == [0, 1, 2, 3]


def test_spinning__the_clock_goes_on_to_where_the_next_is(two: Bench) -> None:
    spinner, worker = two.processors
    spinner.work = Scripted.spin
    worker.time = 50_000
    assert two.run(2) == [0, 1]
    assert spinner.time == 50_001


def test_spinning__no_device_is_late(two: Bench) -> None:
    spinner, worker = two.processors
    spinner.work = Scripted.spin
    spinner.wake, worker.time = 20_000, 50_000
    two.run(1)
    assert spinner.time == 20_000


def test_all_spin__time_skips_ahead_but_not_past_what_is_due() -> None:
    bench = Bench(3)
    for processor in bench.processors[:2]:
        processor.work = Scripted.spin
    sleeper = bench.processors[2]
    sleeper.awake, sleeper.wake = False, 40_000_000
    order = bench.run(400)
    assert order.index(2) < 120
    assert sleeper.turns[0][0] == 40_000_000


def test_one_that_works_keeps_the_others_from_skipping(two: Bench) -> None:
    spinner, worker = two.processors
    spinner.work = Scripted.spin

    def steps(processor: Scripted, until: int | None) -> None:
        processor.time += 3_000

    worker.work = steps
    two.run(60)
    assert abs(spinner.time - worker.time) <= 3_000 + SPIN_TICKS


def test_nobody_awake__time_passes_to_the_first_event(two: Bench) -> None:
    for processor, wake in zip(two.processors, (9_000, 5_000), strict=True):
        processor.awake, processor.wake = False, wake
    assert two.run(3) == [1, 1, 0]
    assert (two.processors[0].turns, two.processors[1].turns[0][0]) == ([], 5_000)


def test_sleeper_is_woken_by_its_own_event_while_another_runs(two: Bench) -> None:
    sleeper = two.processors[1]
    sleeper.awake, sleeper.wake = False, 5_000
    assert two.run(3) == [0, 1, 0]
    assert two.processors[0].turns[0][1] == 5_000
    assert sleeper.awake


def test_nobody_will_ever_run(two: Bench) -> None:
    for processor in two.processors:
        processor.awake = False
    assert two.run(5) == []


def test_signal__to_one_that_is_ahead_waits_until_the_sender_has_caught_up(two: Bench) -> None:
    sender, target = two.processors
    target.time = 50_000

    def send(processor: Scripted, until: int | None) -> None:
        processor.time += 10
        two.scheduler.signal(1)
        assert not processor.gives_way
        processor.time = until or 0

    sender.work = send
    assert two.run(2) == [0, 1]
    assert sender.time <= 50_000 + 2 * SHORTEST_QUANTUM


def test_registers_that_stay_the_same__short_turns_and_a_clock_that_goes_along(two: Bench) -> None:
    waiting, worker = two.processors
    waiting.progresses = False
    two.run(80)
    assert two.scheduler.turns.stuck == {0}
    assert two.scheduler.turns.quantum == LONGEST_QUANTUM
    begin, _, end = waiting.turns[-1]
    assert end - begin == SHORTEST_QUANTUM
    assert worker.turns[-1][2] - worker.turns[-1][0] > LONGEST_QUANTUM // 2
    assert abs(waiting.time - worker.time) <= LONGEST_QUANTUM + SHORTEST_QUANTUM


def test_registers_that_change_again__end_the_short_turns(two: Bench) -> None:
    waiting = two.processors[0]
    waiting.progresses = False
    two.run(80)
    waiting.progresses = True
    two.run(6)
    assert not two.scheduler.turns.stuck
    begin, _, end = waiting.turns[-1]
    assert end - begin > SHORTEST_QUANTUM


def test_short_turns__miss_no_deadline(two: Bench) -> None:
    waiting, worker = two.processors
    waiting.progresses = False
    two.run(80)
    while two.run(1) != [1]:
        pass
    assert waiting.time + 2 * SHORTEST_QUANTUM < worker.time
    due = waiting.wake = waiting.time + SHORTEST_QUANTUM + 500
    assert two.run(1) == [0]
    assert waiting.time == due


def test_both_wait__neither_skips_ahead_of_the_other(two: Bench) -> None:
    for processor in two.processors:
        processor.progresses = False
    two.run(200)
    assert two.scheduler.turns.stuck == {0, 1}
    assert abs(two.processors[0].time - two.processors[1].time) <= 2 * SHORTEST_QUANTUM


def test_copy_of_turns__is_independent(two: Bench) -> None:
    two.processors[0].progresses = False
    two.run(20)
    turns = two.scheduler.turns
    copy = turns.copy()
    assert copy == turns
    two.run(9)
    assert copy != turns
