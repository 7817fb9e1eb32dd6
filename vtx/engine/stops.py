"""Why the clock stopped the engine at the begin of a block."""

from __future__ import annotations

from vtx.engine.clock import (
    STOPPED_BY_BLOCK,
    STOPPED_BY_GUARD,
    STOPPED_BY_IF,
    STOPPED_BY_LIMIT,
    STOPPED_BY_LIMIT_OF_CS,
    BlockClock,
)
from vtx.engine.code_view import CodeView, StoppedBefore
from vtx.engine.context import Context
from vtx.x86.execution import BudgetSpent, EngineEvent, InstructionTrap, OperandTrap, WindowOpen

_INSTRUCTION_TRAP = InstructionTrap()


def stop_of(clock: BlockClock, context: Context, code: CodeView) -> EngineEvent | StoppedBefore | None:
    """The event for which ``clock`` stopped the engine, None if it did not; ``context`` has been saved since."""
    shared = clock.shared
    if shared.stopped == STOPPED_BY_LIMIT:
        return BudgetSpent()
    if shared.stopped == STOPPED_BY_IF:
        return WindowOpen()
    if shared.stopped == STOPPED_BY_BLOCK:
        stop = code.stop(shared.address, shared.size, context.kind)
        assert stop is not None, "the facts said that there is one"
        if stop.address == context.linear_rip():
            return _INSTRUCTION_TRAP
        return StoppedBefore(shared.address, stop.address, stop.traps)
    if shared.stopped == STOPPED_BY_GUARD:
        there = shared.failed == context.linear_rip()
        return OperandTrap() if there else StoppedBefore(shared.address, shared.failed, False)
    if shared.stopped == STOPPED_BY_LIMIT_OF_CS:
        before = shared.left_address, shared.left_size
        return code.beyond_limit(context.linear_rip(), context.room(), before, context.kind)
    return None
