"""The stack of event delivery and IRET in 64-bit mode: frames that are written and read in few accesses."""

import pytest
from event_fixtures import FakeMemory

from vtx.x86.outcome import Fault, InstructionAborted, Vector
from vtx.x86.stack import Stack, within_limit
from vtx.x86.state import Segment

TOP = 0x7000
FRAME = (0x11, 0x2222_2222_2222_2222, 0x33, 1 << 64 | 0x44, 0x55, 0x66)


def stack_at(memory: FakeMemory, pointer: int) -> Stack:
    return Stack(memory, Segment(), pointer, 64, False, True, 0, 48)


@pytest.mark.parametrize("pointer", range(TOP - 256, TOP + 64, 8))
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_frame__is_the_same_wherever_it_lies(pointer: int, count: int) -> None:
    memory = FakeMemory()
    stack = stack_at(memory, pointer)
    stack.check_room(count, 8)
    stack.push(*FRAME[:count], size=8)
    assert stack.pointer == pointer - 8 * count
    pushed = [value & (1 << 64) - 1 for value in FRAME[:count]]
    assert memory.words(stack.pointer, count, 8) == pushed[::-1]
    assert {access[3:] for access in memory.accesses} == {(False, True)}
    stack.read_ahead(count, 8)
    assert [stack.pop(8) for _ in range(count)] == pushed[::-1]
    assert stack.pointer == pointer
    memory.poke(pointer, 0x77, 8)
    assert stack.pop(8) == 0x77


def test_frame_in_one_block__takes_few_accesses() -> None:
    memory = FakeMemory()
    stack = stack_at(memory, TOP)
    stack.push(*FRAME[:5], size=8)
    stack.read_ahead(5, 8)
    assert [(access[0], access[2]) for access in memory.accesses] == [("write", 40), ("read", 40)]


@pytest.mark.parametrize("below", range(0, 48, 8))
def test_push__faults_at_the_first_value_that_does_not_fit(below: int) -> None:
    """The page of the stack ends ``below`` bytes under the pointer."""
    memory = FakeMemory()
    memory.refused.add((TOP >> 12) - 1)
    with pytest.raises(InstructionAborted) as aborted:
        stack_at(memory, TOP + below).push(*FRAME, size=8)
    assert aborted.value.cause == Fault(Vector.PF, 2, address=TOP - 8)
    assert [access[0] for access in memory.accesses] == ["write"] * (below // 8)


@pytest.mark.parametrize("above", range(0, 40, 8))
def test_pop__faults_at_the_first_value_that_is_not_there(above: int) -> None:
    memory = FakeMemory()
    memory.refused.add(TOP >> 12)
    stack = stack_at(memory, TOP - above)
    with pytest.raises(InstructionAborted) as aborted:
        stack.read_ahead(5, 8)
        for _ in range(5):
            stack.pop(8)
    assert aborted.value.cause == Fault(Vector.PF, 0, address=TOP)
    assert stack.pointer == TOP


@pytest.mark.parametrize("pointer", [0x0000_8000_0000_0008, 0xFFFF_8000_0000_0010, 8])
def test_non_canonical_frame(pointer: int) -> None:
    """Its last value crosses into the hole, its first is beyond it, or it wraps around, which is no fault."""
    stack = stack_at(FakeMemory(), pointer)
    if pointer == 8:
        stack.check_room(5, 8)
        stack.push(*FRAME[:5], size=8)
        assert stack.pointer == (1 << 64) - 32
        return
    with pytest.raises(InstructionAborted) as aborted:
        stack.check_room(5, 8)
    assert aborted.value.cause == Fault(Vector.SS, 0)


@pytest.mark.parametrize(
    ("rights", "limit", "offset", "size", "within"),
    [
        (0x4093, 0xFFF, 0xFFC, 4, True),
        (0x4093, 0xFFF, 0xFFD, 4, False),
        (0x4093, 0xFFF, 0x1000, 1, False),
        # Expand-down: what is above the limit, up to the end that the size of the stack gives.
        (0x4097, 0xFFF, 0x1000, 4, True),
        (0x4097, 0xFFF, 0xFFF, 4, False),
        (0x4097, 0xFFF, 0xFFFF_FFFC, 4, True),
        (0x4097, 0xFFF, 0xFFFF_FFFD, 4, False),
        (0x0097, 0xFFF, 0xFFFC, 4, True),
        (0x0097, 0xFFF, 0xFFFD, 4, False),
    ],
)
def test_limit(rights: int, limit: int, offset: int, size: int, within: bool) -> None:
    """SDM Vol. 3, "Limit Checking"."""
    assert within_limit(Segment(0x10, 0, limit, rights), offset, size) == within
