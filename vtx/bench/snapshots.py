"""What going back to a snapshot costs: the whole machine in the middle of a guest, without and with written pages."""

from __future__ import annotations

import time
from typing import Final

from vtx.addresses import PAGE_SIZE
from vtx.bench.hypervisor import install
from vtx.machine import Machine
from vtx.snapshot import Snapshot

DIRTY_PAGES: Final = 1024
_FIRST_DIRTY: Final = 0x100_0000
_ROUNDS: Final = 100
_STARTED: Final = 1000  # instructions, of which the first hundred set up


def restore_times() -> tuple[float, float]:
    """Seconds of processor time: of a restore with nothing written, and of each written page beyond that."""
    machine = Machine()
    install(machine, exits=_STARTED)
    machine.run(max_instructions=_STARTED)
    pages = range(_FIRST_DIRTY, _FIRST_DIRTY + DIRTY_PAGES * PAGE_SIZE, PAGE_SIZE)
    for address in pages:
        machine.memory.write_u64(address, address)
    snapshot = machine.snapshot()
    empty = min(_restore(machine, snapshot, range(0)) for _ in range(_ROUNDS))
    full = min(_restore(machine, snapshot, pages) for _ in range(_ROUNDS // 10))
    return empty, (full - empty) / DIRTY_PAGES


def _restore(machine: Machine, snapshot: Snapshot, written: range) -> float:
    for address in written:
        machine.memory.write_u64(address + 8, 1)
    start = time.process_time()
    machine.restore(snapshot)
    return time.process_time() - start
