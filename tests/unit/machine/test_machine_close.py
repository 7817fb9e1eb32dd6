"""What a machine holds of the host's memory is released: when it is closed, and when nobody has it any more."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from vtx.engine import native
from vtx.engine.selfcheck import require_known_library
from vtx.machine import Machine

HLT = b"\xfa\xf4"


class Calls:
    """A library whose functions of certain names are counted."""

    def __init__(self, library: Any, *names: str) -> None:
        self._library = library
        self.counts = dict.fromkeys(names, 0)

    def __getattr__(self, name: str) -> Any:
        function: Callable[..., Any] = getattr(self._library, name)
        if name not in self.counts:
            return function

        def counted(*arguments: Any) -> Any:
            self.counts[name] += 1
            return function(*arguments)

        return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    require_known_library()  # uses a processor, once
    gc.collect()  # nothing of earlier tests is to be counted
    calls = Calls(native.library, "uc_close", "uc_context_free")
    monkeypatch.setattr(native, "library", calls)
    return calls


def halted_machine(cpus: int = 1) -> Machine:
    machine = Machine(memory=1 << 20, cpus=cpus)
    machine.memory.write(0x7C00, HLT)
    state = machine.cpu.state
    state.cs.selector, state.cs.base, state.rip = 0, 0, 0x7C00
    machine.cpu.load_control_state()
    machine.run(max_instructions=10)
    return machine


def test_closed_once__by_itself_or_by_its_block(calls: Calls) -> None:
    with halted_machine(cpus=2) as machine:
        assert calls.counts == {"uc_close": 0, "uc_context_free": 0}
    assert calls.counts == {"uc_close": 2, "uc_context_free": 2}
    machine.close()
    del machine
    gc.collect()
    assert calls.counts == {"uc_close": 2, "uc_context_free": 2}


def test_closed_when_nobody_has_it(calls: Calls) -> None:
    machine = halted_machine()
    gone = weakref.ref(machine)
    del machine
    gc.collect()
    assert gone() is None
    assert calls.counts == {"uc_close": 1, "uc_context_free": 1}
