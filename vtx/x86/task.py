"""Task switches: by a task gate, CALL or JMP to a TSS or task gate, and IRET with NT set.

Up to the commit point a fault leaves the processor where it was. Past it, the old task is gone: faults while the new
task's segments are loaded are raised with ``state`` already in the new task, as the manual says.

Spec: SDM Vol. 3, "Task Management", "Task Switching", "Exception Conditions Checked During a Task Switch".
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from attrs import evolve, frozen

from vtx.x86 import descriptors, task_shadow_stack
from vtx.x86.descriptors import Descriptor, is_null, null_segment, selector_fault
from vtx.x86.linear import LinearMemory, system_address
from vtx.x86.outcome import Vector, gp
from vtx.x86.stack import Stack
from vtx.x86.state import CpuState, Cr0, Cr4, Gpr, Rflags, Segment, SegmentRegister, Shadow

DEFINED_RFLAGS: Final = 0x3F_7FD5
"""The RFLAGS bits that exist, bit 1 (always set) not among them."""
PENDING_TASK_SWITCH: Final = 1 << 15
"""Of `CpuState.pending_debug`, where DR6.BT is: the VMCS has no such bit, because its guests never switch tasks."""
_NT: Final = Rflags.NT.value
_DR7_LOCAL_ENABLES: Final = 0x155  # L0 to L3 and LE
_CODE, _DATA = SegmentRegister.CS, (SegmentRegister.DS, SegmentRegister.ES, SegmentRegister.FS, SegmentRegister.GS)


class TaskSwitchSource(enum.IntEnum):
    """What asked for the task switch, with the encoding of the exit qualification for task switches."""

    CALL = 0
    IRET = 1
    JMP = 2
    TASK_GATE = 3  # in the IDT


@frozen
class _Layout:
    """Where a TSS keeps what; offsets in bytes. Segment selectors and GPRs are in encoding order."""

    word: int
    minimum_limit: int
    ip: int
    flags: int
    gpr: int
    selectors: int
    selector_count: int
    ldtr: int
    cr3: int | None
    trap: int | None


_TSS_16: Final = _Layout(
    word=2,
    minimum_limit=0x2B,
    ip=0x0E,
    flags=0x10,
    gpr=0x12,
    selectors=0x22,
    selector_count=4,
    ldtr=0x2A,
    cr3=None,
    trap=None,
)
_TSS_32: Final = _Layout(
    word=4,
    minimum_limit=0x67,
    ip=0x20,
    flags=0x24,
    gpr=0x28,
    selectors=0x48,
    selector_count=6,
    ldtr=0x60,
    cr3=0x1C,
    trap=0x64,
)


@frozen
class _TaskImage:
    """The state of a task as read from its TSS."""

    rip: int
    rflags: int
    gpr: tuple[int, ...]
    selectors: tuple[int, ...]
    ldtr: int
    cr3: int | None
    trap: bool
    ssp: int


def _refuse_pae(state: CpuState, cr3: int) -> None:
    if state.cr4 & Cr4.PAE:
        raise ValueError("a task switch with PAE paging needs a hook that loads CR3")
    state.cr3 = cr3


@frozen
class TaskSwitchHooks:
    """What the processor around the switch wants to do.

    ``intercept(selector, source)`` runs once the checks of the new TSS descriptor are through and nothing has changed:
    a VM exit is raised from there. ``load_cr3(state, value)`` replaces CR3 when paging is on: it also owns the
    translation caches and the PDPTRs.
    """

    intercept: Callable[[int, TaskSwitchSource], None] = lambda selector, source: None
    load_cr3: Callable[[CpuState, int], None] = _refuse_pae


NO_HOOKS: Final = TaskSwitchHooks()


def check_tss(
    state: CpuState, memory: LinearMemory, selector: int, source: TaskSwitchSource, external: int
) -> Descriptor:
    """The TSS descriptor of ``selector``, fit to be switched to.

    Raises #GP (#TS for IRET) for a selector that names no TSS of the right busy state, #NP, and #TS for one too small.
    """
    wanted, vector = descriptors.AVAILABLE_TSS_TYPES, Vector.GP
    if source == TaskSwitchSource.IRET:
        wanted, vector = descriptors.BUSY_TSS_TYPES, Vector.TS
    if selector & descriptors.TABLE_INDICATOR:
        raise selector_fault(vector, selector, external)
    tss = descriptors.read_descriptor(state, memory, selector)
    if tss is None or tss.system_type not in wanted:
        raise selector_fault(vector, selector, external)
    if not tss.present:
        raise selector_fault(Vector.NP, selector, external)
    if state.cr4 & Cr4.CET and tss.access_rights & 0xF not in descriptors.TSS_32_TYPES:
        raise selector_fault(Vector.TS, selector, external)
    least = task_shadow_stack.MINIMUM_LIMIT if state.cr4 & Cr4.CET else 0
    if tss.limit < max(least, _layout(tss.access_rights).minimum_limit):
        raise selector_fault(Vector.TS, selector, external)
    return tss


def task_switch(
    state: CpuState,
    memory: LinearMemory,
    selector: int,
    source: TaskSwitchSource,
    *,
    rip: int,
    rflags: int,
    external: int = 0,
    error_code: int | None = None,
    hooks: TaskSwitchHooks = NO_HOOKS,
) -> None:
    """Switch to the task whose TSS is ``selector``.

    ``rip`` and ``rflags`` are what the old task's TSS receives: the return address and the flags image of the event.
    ``external`` is the EXT bit of error codes, ``error_code`` what is pushed on the new task's stack. The privilege
    checks of CALL, JMP and INT n come before, at the instruction.
    """
    new_tss = check_tss(state, memory, selector, source, external)
    hooks.intercept(selector, source)
    nested = source in (TaskSwitchSource.CALL, TaskSwitchSource.TASK_GATE)
    _check_old_tss(state, external)
    image = _read_task(state, memory, new_tss)
    if source == TaskSwitchSource.IRET:
        rflags &= ~_NT
    passage = task_shadow_stack.Passage()
    if state.cr4 & Cr4.CET:
        cpl = 3 if image.rflags & Rflags.VM else image.selectors[_CODE] & 3
        returns = source == TaskSwitchSource.IRET
        passage = task_shadow_stack.leave_task(state, memory, cpl, rip, nests=nested, returns=returns)
    _save_task(state, memory, rip, rflags)
    if nested:
        memory.write(system_address(state, new_tss.base, 0), 2, state.tr.selector)
    if source != TaskSwitchSource.IRET:
        descriptors.set_tss_busy(state, memory, selector, busy=True)
    if not nested and state.tr.selector & 0xFFF8 != selector & 0xFFF8:
        descriptors.set_tss_busy(state, memory, state.tr.selector, busy=False)
    if nested:
        image = evolve(image, rflags=image.rflags | _NT)

    _commit(state, new_tss, selector, image, hooks)
    passage.left.commit(state)
    _load_segments(state, memory, external)
    if state.cr4 & Cr4.CET:
        task_shadow_stack.enter_task(state, memory, passage, None if source == TaskSwitchSource.IRET else image.ssp)
    _enter(state, memory, _layout(new_tss.access_rights).word, external, error_code)
    if image.trap:
        state.pending_debug |= PENDING_TASK_SWITCH


def _layout(tss_rights: int) -> _Layout:
    return _TSS_32 if tss_rights & 0xF in descriptors.TSS_32_TYPES else _TSS_16


def _check_old_tss(state: CpuState, external: int) -> None:
    """Raise #TS unless the current TSS can hold the state of the old task."""
    layout = _layout(state.tr.access_rights)
    last = layout.selectors + layout.selector_count * layout.word
    last -= 3 if layout.word == 4 else 1
    if not state.tr.usable or state.tr.limit < last:
        raise selector_fault(Vector.TS, state.tr.selector, external)


def _read_task(state: CpuState, memory: LinearMemory, tss: Descriptor) -> _TaskImage:
    layout = _layout(tss.access_rights)

    def word(offset: int, size: int = layout.word) -> int:
        return memory.read(system_address(state, tss.base, offset), size)

    # A 16-bit TSS leaves ones above each register, as processors have been seen to do; the manual does not say.
    upper = 0xFFFF_0000 if layout.word == 2 else 0
    gpr = [upper | word(layout.gpr + index * layout.word) for index in range(8)]
    selectors = [word(layout.selectors + index * layout.word, 2) for index in range(layout.selector_count)]
    return _TaskImage(
        rip=word(layout.ip),
        rflags=word(layout.flags) & DEFINED_RFLAGS | Rflags.FIXED_1.value,
        gpr=tuple(gpr),
        selectors=tuple(selectors) + (0,) * (6 - layout.selector_count),
        ldtr=word(layout.ldtr, 2),
        cr3=None if layout.cr3 is None else word(layout.cr3),
        trap=layout.trap is not None and bool(word(layout.trap, 2) & 1),
        ssp=word(task_shadow_stack.SSP_OFFSET) if state.cr4 & Cr4.CET else 0,
    )


def _save_task(state: CpuState, memory: LinearMemory, rip: int, rflags: int) -> None:
    layout = _layout(state.tr.access_rights)
    mask = (1 << layout.word * 8) - 1

    def store(offset: int, value: int, size: int = layout.word) -> None:
        memory.write(system_address(state, state.tr.base, offset), size, value & mask)

    store(layout.ip, rip)
    store(layout.flags, rflags)
    for index in range(8):
        store(layout.gpr + index * layout.word, state.gpr[index])
    for index in range(layout.selector_count):
        store(layout.selectors + index * layout.word, state.segments[index].selector, 2)


def _commit(state: CpuState, tss: Descriptor, selector: int, image: _TaskImage, hooks: TaskSwitchHooks) -> None:
    """Make the new task current; its segment registers hold selectors whose descriptors are yet to be loaded."""
    paging = state.paging
    state.tr = tss.segment(selector)
    state.tr.access_rights |= descriptors.TSS_BUSY
    state.cr0 |= Cr0.TS.value
    state.dr7 &= ~_DR7_LOCAL_ENABLES
    state.shadow = Shadow.NONE
    state.rip, state.rflags = image.rip, image.rflags
    state.gpr[:8] = image.gpr
    # Until SS is loaded the task runs at the least privilege, so a fault handler brings its own stack.
    state.segments[:] = [null_segment(each, 3) for each in image.selectors]
    state.ldtr = null_segment(image.ldtr)
    if paging and image.cr3 is not None and image.cr3 != state.cr3:
        hooks.load_cr3(state, image.cr3)


def _load_segments(state: CpuState, memory: LinearMemory, external: int) -> None:
    _load_ldtr(state, memory, external)
    selectors = [segment.selector for segment in state.segments]
    if state.virtual_8086:
        state.segments[:] = [descriptors.real_mode_segment(selector, 0xF3) for selector in selectors]
        return
    code = _new_code_segment(state, memory, selectors[_CODE], external)
    stack = _new_stack_segment(state, memory, selectors, external)
    state.segments[SegmentRegister.SS] = stack
    state.segments[_CODE] = code
    for register in _DATA:
        state.segments[register] = _new_data_segment(state, memory, selectors[register], external)


def _load_ldtr(state: CpuState, memory: LinearMemory, external: int) -> None:
    selector = state.ldtr.selector
    if is_null(selector):
        return
    ldt = None if selector & descriptors.TABLE_INDICATOR else descriptors.read_descriptor(state, memory, selector)
    if ldt is None or ldt.system_type != descriptors.SystemType.LDT or not ldt.present:
        raise selector_fault(Vector.TS, selector, external)
    state.ldtr = ldt.segment(selector)


def _fetch(state: CpuState, memory: LinearMemory, selector: int, external: int) -> Descriptor:
    found = None if is_null(selector) else descriptors.read_descriptor(state, memory, selector)
    if found is None:
        raise selector_fault(Vector.TS, selector, external)
    return found


def _new_code_segment(state: CpuState, memory: LinearMemory, selector: int, external: int) -> Segment:
    code = _fetch(state, memory, selector, external)
    rpl = selector & 3
    if not code.is_code or (code.dpl > rpl if code.is_conforming else code.dpl != rpl):
        raise selector_fault(Vector.TS, selector, external)
    if not code.present:
        raise selector_fault(Vector.NP, selector, external)
    return descriptors.set_accessed(state, memory, selector, code).segment(selector)


def _new_stack_segment(state: CpuState, memory: LinearMemory, selectors: list[int], external: int) -> Segment:
    selector = selectors[SegmentRegister.SS]
    cpl = selectors[_CODE] & 3
    stack = _fetch(state, memory, selector, external)
    if not stack.is_writable_data or stack.dpl != cpl:
        raise selector_fault(Vector.TS, selector, external)
    if not stack.present:
        raise selector_fault(Vector.SS, selector, external)
    if selector & 3 != stack.dpl:
        raise selector_fault(Vector.TS, selector, external)
    return descriptors.set_accessed(state, memory, selector, stack).segment(selector)


def _new_data_segment(state: CpuState, memory: LinearMemory, selector: int, external: int) -> Segment:
    if is_null(selector):
        return null_segment(selector)
    data = _fetch(state, memory, selector, external)
    privilege = max(state.cpl, selector & 3)
    if not data.is_readable or (not data.is_conforming and data.dpl < privilege):
        raise selector_fault(Vector.TS, selector, external)
    if not data.present:
        raise selector_fault(Vector.NP, selector, external)
    return descriptors.set_accessed(state, memory, selector, data).segment(selector)


def _enter(state: CpuState, memory: LinearMemory, word: int, external: int, error_code: int | None) -> None:
    """Push the error code and check the first instruction pointer, both in the new task."""
    if error_code is not None:
        stack = Stack.of(state, memory, error_code=external)
        stack.push(error_code, size=word)
        state.gpr[Gpr.RSP] = stack.pointer
    if state.rip > state.cs.limit:
        raise gp(external)
