"""The state of a logical processor apart from its virtualization extension, saved and restored for snapshots.

What is saved is plain data that nobody changes: restoring copies it, so one snapshot can be restored many times. What
follows from it (the paging context, the engine's own translations) is derived again.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve, fields, frozen

from vtx.addresses import PhysicalAddress
from vtx.x86.core import Halt
from vtx.x86.monitor import Monitor, Wait
from vtx.x86.processor import LogicalProcessor
from vtx.x86.spinning import Spin
from vtx.x86.state import CpuState, DescriptorTable, Segment
from vtx.x86.tlb import SavedTlb

_NAMES = tuple(each.name for each in fields(CpuState))


@frozen
class SavedMmu:
    """What the MMU knows beyond the control registers and the second level."""

    asid: int
    pkrs: int
    reserved_page: PhysicalAddress | None
    tlb: SavedTlb


@frozen
class SavedEngine:
    """Bytes of code and instructions the engine has executed, and its x87/SSE state (opaque)."""

    elapsed: int
    instructions: int
    fpu: bytes


@frozen
class SavedProcessor:
    """A processor between two instructions. The names are those of the attributes of `LogicalProcessor`."""

    state: CpuState
    msrs: Mapping[int, int]
    mmu: SavedMmu
    engine: SavedEngine
    random_state: int
    halt: Halt | None
    stop_requested: bool
    spin: Spin
    monitor: Monitor | None
    wait: Wait | None
    retired: int
    halted: int
    nmi: bool
    extra_ticks: int
    transitions_seen: int


def save_processor(processor: LogicalProcessor) -> SavedProcessor:
    """The state of ``processor``, which must not be running."""
    mmu, engine = processor.mmu, processor.engine
    return SavedProcessor(
        state=_assign(CpuState(), processor.state),
        msrs=processor.msrs.snapshot(),
        mmu=SavedMmu(mmu.asid, mmu.pkrs, mmu.reserved_page, mmu.tlb.save()),
        engine=SavedEngine(engine.elapsed(), engine.instructions(), engine.fpu()),
        random_state=processor.random_state,
        halt=processor.halt,
        stop_requested=processor.stop_requested,
        spin=evolve(processor.spin),
        monitor=processor.monitor,
        wait=processor.wait,
        retired=processor.retired,
        halted=processor.halted,
        nmi=processor._nmi,
        extra_ticks=processor._extra_ticks,
        transitions_seen=processor.transitions_seen,
    )


def restore_processor(processor: LogicalProcessor, saved: SavedProcessor) -> None:
    """Put ``processor`` back; the virtualization extension, and with it ``mmu.second_level``, has been restored."""
    mmu, engine = processor.mmu, processor.engine
    _assign(processor.state, saved.state)
    processor.msrs.restore(saved.msrs)
    engine.resume(saved.engine.elapsed, saved.engine.instructions, saved.engine.fpu)
    processor.random_state = saved.random_state
    processor.halt = saved.halt
    processor.stop_requested = saved.stop_requested
    processor.spin = evolve(saved.spin)
    processor.monitor, processor.wait = saved.monitor, saved.wait
    processor.retired = saved.retired
    processor.halted = saved.halted
    processor._nmi = saved.nmi
    processor._extra_ticks = saved.extra_ticks
    processor.transitions_seen = saved.transitions_seen
    processor.reload, processor.step_next, processor._approached = True, False, None
    mmu.asid, mmu.pkrs = saved.mmu.asid, saved.mmu.pkrs
    mmu.reserved_page = saved.mmu.reserved_page
    mmu.update(processor.state)
    mmu.tlb.restore(saved.mmu.tlb)
    engine.flush(None)


def _assign(target: CpuState, source: CpuState) -> CpuState:
    """Make ``target``, which others may hold, equal to ``source`` without sharing anything that can change."""
    for name in _NAMES:
        value = getattr(source, name)
        if isinstance(value, list):
            value = [each.copy() if isinstance(each, Segment) else each for each in value]
        elif isinstance(value, Segment):
            value = value.copy()
        elif isinstance(value, DescriptorTable):
            value = DescriptorTable(value.base, value.limit)
        setattr(target, name, value)
    return target
