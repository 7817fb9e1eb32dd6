"""Sensitive instructions executed by the client in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import define, field
from engine_bench import CODE, REFUSAL, Client, EngineBench

from vtx.addresses import PAGE_SHIFT, PAGE_SIZE
from vtx.x86.execution import (
    ANSWERED,
    NOT_ANSWERED,
    UNPLANNED,
    BudgetSpent,
    ExceptionTrap,
    InstructionTrap,
    Interrupted,
    Place,
)
from vtx.x86.outcome import Vector

CPUID, PAUSE, VMREAD, HLT, LOCKED_BT = "0fa2", "f390", "0f78d0", "f4", "f00fa3c9"
FIRST_SENSITIVE = "48ffc3 48ffc3 0fa2 48ffc3 48ffc3 f4"  # inc rbx twice, cpuid, inc rbx twice, hlt
CARRY = 1


@define(slots=False)
class AnsweringClient(Client):
    """Answers as ``on_answer`` says, and records where RIP was."""

    bench: EngineBench | None = None
    on_answer: Callable[[EngineBench], int] = lambda bench: NOT_ANSWERED
    places: list[tuple[int, Place]] = field(factory=list)

    def answer(self, place: Place) -> int:
        assert self.bench is not None
        self.places.append((self.bench.state.rip, place))
        return self.on_answer(self.bench)


def answering(
    code: str, on_answer: Callable[[EngineBench], int], **options: bool
) -> tuple[EngineBench, AnsweringClient]:
    client = AnsweringClient(on_answer=on_answer)
    client.bench = bench = EngineBench(code, client=client, **options)
    bench.state.gpr[3] = 0
    return bench, client


def skip(length: int, budget: int = UNPLANNED) -> Callable[[EngineBench], int]:
    def on_answer(bench: EngineBench) -> int:
        bench.state.rip += length
        return budget

    return on_answer


def test_answered_instruction__does_not_end_the_run_and_the_rest_of_the_block_runs() -> None:
    bench, client = answering(
        FIRST_SENSITIVE, lambda bench: NOT_ANSWERED if bench.state.rip > CODE + 6 else skip(2)(bench)
    )
    assert bench.run() == InstructionTrap()
    assert bench.state.gpr[3] == 4
    assert [rip for rip, _ in client.places] == [CODE + 6, CODE + 14]
    bench.close()


def test_state_at_the_instruction__is_exact_and_taken_back_as_the_client_leaves_it() -> None:
    # add al, 0FFh sets CF; cpuid; setc bl; hlt
    def on_answer(bench: EngineBench) -> int:
        if bench.state.rip != CODE + 2:
            return NOT_ANSWERED
        seen.append((bench.state.gpr[0] & 0xFF, bench.state.rflags & CARRY))
        bench.state.rflags &= ~CARRY
        bench.state.gpr[2] = 0x1234_5678_9ABC_DEF0
        return skip(2)(bench)

    seen: list[tuple[int, int]] = []
    bench, _ = answering("04ff" + CPUID + "0f92c3" + HLT, on_answer)
    bench.state.gpr[0] = 2
    bench.state.gpr[3] = 0x55
    assert bench.run() == InstructionTrap()
    assert seen == [(1, CARRY)]
    assert bench.state.gpr[3] & 0xFF == 0
    assert bench.state.gpr[2] == 0x1234_5678_9ABC_DEF0
    bench.close()


def test_time_and_instructions__are_those_of_runs_that_end_at_each_instruction() -> None:
    loop = "48ffc3" + CPUID + "4883fb20 75f5" + HLT  # inc rbx; cpuid; cmp rbx,20h; jne back; hlt

    def figures(*, answers: bool) -> tuple[int, int, int]:
        bench, _ = answering(loop, lambda bench: skip(2)(bench) if bench.state.rip == CODE + 3 else NOT_ANSWERED)
        bench.engine.answers = answers
        while bench.run() == InstructionTrap() and bench.state.rip == CODE + 3:
            bench.state.rip += 2
        result = bench.engine.elapsed(), bench.engine.instructions(), bench.state.gpr[3]
        bench.close()
        return result

    # CPUID itself is the client's to count: two bytes and one instruction less per pass.
    assert figures(answers=True) == figures(answers=False) == (0x20 * 9, 0x20 * 3, 0x20)


def test_client_that_wants_to_stop__ends_the_run_behind_the_instruction() -> None:
    def on_answer(bench: EngineBench) -> int:
        skip(2)(bench)
        return ANSWERED

    bench, client = answering(FIRST_SENSITIVE, on_answer)
    assert bench.run() == Interrupted()
    assert (bench.state.rip, bench.state.gpr[3]) == (CODE + 8, 2)
    client.on_answer = lambda bench: NOT_ANSWERED
    assert bench.run() == InstructionTrap()
    assert bench.state.gpr[3] == 4
    bench.close()


def test_budget_of_an_answer__replaces_that_of_the_run() -> None:
    bench, _ = answering(CPUID + "48ffc3" + "ebfb", skip(2, budget=50))  # cpuid; inc rbx; jmp to the inc
    assert bench.run() == BudgetSpent()
    assert bench.state.gpr[3] == 10
    bench.close()


def test_instruction_limit__counts_what_was_answered() -> None:
    bench, client = answering(CPUID + "ebfc", skip(2))  # cpuid; jmp back
    assert bench.run(instruction_limit=6) == BudgetSpent()
    assert bench.state.rip == CODE
    assert len(client.places) == bench.engine.instructions() == 3
    bench.close()


@pytest.mark.parametrize("refused", [False, True])
def test_instruction_limit__holds_although_what_follows_enters_no_block(refused: bool) -> None:
    """Behind the last instruction allowed is one that traps before it is translated, or whose fetch is refused."""
    target = CODE + PAGE_SIZE if refused else CODE + 2

    def on_answer(bench: EngineBench) -> int:
        bench.state.rip = target
        return UNPLANNED

    bench, client = answering(CPUID + LOCKED_BT, on_answer)
    client.pages[CODE + PAGE_SIZE >> PAGE_SHIFT] = REFUSAL
    assert bench.run(instruction_limit=1) == Interrupted()
    assert bench.state.rip == target
    assert len(client.places) == 1
    bench.close()


def test_request_to_stop__ends_the_run_behind_the_instruction() -> None:
    def on_answer(bench: EngineBench) -> int:
        bench.engine.request_stop()
        return skip(2)(bench)

    bench, _ = answering(FIRST_SENSITIVE, on_answer)
    assert bench.run() == Interrupted()
    assert bench.state.rip == CODE + 8
    bench.close()


def test_steps__are_never_answered() -> None:
    bench, client = answering(CPUID + HLT, skip(2))
    assert bench.run(step=True) == InstructionTrap()
    assert not client.places
    bench.close()


def test_instruction_unknown_to_the_engine__is_offered_as_such() -> None:
    bench, client = answering(VMREAD + PAUSE, lambda bench: NOT_ANSWERED)
    event = bench.run()
    assert isinstance(event, ExceptionTrap) and event.vector == Vector.UD
    bench.state.rip += 3
    assert bench.run() == InstructionTrap()
    assert [place.known for _, place in client.places] == [False, True]
    bench.close()


def test_place__is_the_same_until_the_code_changes() -> None:
    def on_answer(bench: EngineBench) -> int:
        skip(2)(bench)
        return UNPLANNED if len(client.places) % 4 else ANSWERED

    bench, client = answering(CPUID + "ebfc", on_answer)  # cpuid; jmp back
    bench.run()
    first, *others = [place for _, place in client.places]
    assert others and all(place is first for place in others)
    client.places.clear()
    bench.put(CODE, PAUSE)
    bench.state.rip = CODE
    bench.run()
    assert client.places and all(place is not first for _, place in client.places)
    bench.close()


def test_failure_of_the_client__comes_out_of_the_run() -> None:
    def on_answer(bench: EngineBench) -> int:
        raise ZeroDivisionError

    bench, _ = answering(CPUID, on_answer)
    try:
        bench.run()
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("the failure was lost")
    bench.close()
