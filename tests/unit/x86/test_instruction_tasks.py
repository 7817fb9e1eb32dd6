"""Far CALL and JMP as machine code: to code the engine executes them, to a task the model switches.

Spec: SDM Vol. 3, "Task Switching"; SDM Vol. 2, "CALL—Call Procedure", "JMP—Jump".
"""

from __future__ import annotations

import struct

import pytest
from processor_bench import CODE, DATA, IDT, STACK, TSS, ProcessorBench, long_mode, protected_mode, real_mode

from vtx.x86.operations import TaskSwitch, TaskSwitchSource
from vtx.x86.outcome import Vector

OLD, NEW, GATE, CODE_32, DATA_SELECTOR = 0x30, 0x38, 0x40, 0x18, 0x10
NEW_TSS = 0x7000
ENTRY = 0x3000
NT = 1 << 14


def tss_descriptor(base: int, kind: int = 9, dpl: int = 0, present: bool = True) -> int:
    rights = kind | dpl << 5 | present << 7
    return 0x67 | (base & 0xFF_FFFF) << 16 | rights << 40 | (base >> 24) << 56


def make(code: str, *, deliver: bool = False) -> ProcessorBench:
    """Code in task A (at `TSS`); task B (at `NEW_TSS`) is ready to run at `ENTRY`, where IRET and HLT are."""
    bench = ProcessorBench(code + "f4", protected_mode(), deliver=deliver)
    state = bench.state
    state.segments[1].selector = CODE_32
    state.tr.selector = OLD
    bench.descriptor(OLD, tss_descriptor(TSS, 11))
    bench.descriptor(NEW, tss_descriptor(NEW_TSS))
    bench.descriptor(GATE, NEW << 16 | 0x85 << 40)
    tss = bytearray(0x68)
    struct.pack_into("<II", tss, 0x20, ENTRY, 0x2)
    struct.pack_into("<8I", tss, 0x28, *range(0xB0, 0xB8))
    struct.pack_into("<I", tss, 0x38, STACK - 0x800)
    struct.pack_into("<6I", tss, 0x48, *[DATA_SELECTOR, CODE_32, *[DATA_SELECTOR] * 4])
    bench.memory.write(NEW_TSS, bytes(tss))
    bench.put(ENTRY, "cff4")
    bench.put(DATA, struct.pack("<IH", 0, NEW))
    return bench


# Offsets in the pointers are ignored for tasks.
FORMS = {
    "jmp-ptr": ("ea785634123800", 7, TaskSwitchSource.JMP),
    "call-ptr": ("9a785634123800", 7, TaskSwitchSource.CALL),
    "jmp-memory": ("ff2d00800000", 6, TaskSwitchSource.JMP),
    "call-memory": ("ff1d00800000", 6, TaskSwitchSource.CALL),
    "jmp-gate": ("ea000000004000", 7, TaskSwitchSource.JMP),
    "call-gate": ("9a000000004000", 7, TaskSwitchSource.CALL),
    "call-rpl": ("9a000000003800", 7, TaskSwitchSource.CALL),
}


@pytest.mark.parametrize(("code", "length", "source"), FORMS.values(), ids=FORMS)
def test_switches_to_the_task(code: str, length: int, source: TaskSwitchSource) -> None:
    bench = make("90" + code)
    while bench.state.rip < ENTRY or bench.state.rip > ENTRY + 2:
        bench.processor.run_once()
        assert not bench.events
    state = bench.state
    assert (state.rip, state.tr.selector, state.gpr[0], state.gpr[4]) == (ENTRY, NEW, 0xB0, STACK - 0x800)
    nested = source is TaskSwitchSource.CALL
    assert bool(state.rflags & NT) is nested
    assert bench.memory.read_u32(TSS + 0x20) == CODE + 1 + length
    assert (bench.memory.read_u16(NEW_TSS) == OLD) is nested
    assert bench.processor.instructions == 2
    if nested:
        bench.run()
        assert (state.rip, state.tr.selector) == (CODE + 1 + length + 1, OLD)
        assert not state.rflags & NT


@pytest.mark.parametrize(
    ("descriptor", "vector"),
    [
        pytest.param(tss_descriptor(NEW_TSS, 11), Vector.GP, id="busy"),
        pytest.param(tss_descriptor(NEW_TSS, present=False), Vector.NP, id="not-present"),
    ],
)
def test_unfit_task(descriptor: int, vector: Vector) -> None:
    bench = make("ea000000003800")
    bench.descriptor(NEW, descriptor)
    event = bench.event()
    assert (event.vector, event.error_code) == (vector, NEW)
    assert (bench.state.rip, bench.state.tr.selector) == (CODE, OLD)


def test_privilege_of_the_descriptor() -> None:
    bench = make("ea000000003b00")  # RPL 3, DPL 0
    event = bench.event()
    assert (event.vector, event.error_code) == (Vector.GP, NEW)


def test_pointer_in_absent_memory() -> None:
    bench = make("ff2d00800000")
    bench.state.segments[3].limit = DATA + 2
    event = bench.event()
    assert (event.vector, event.error_code) == (Vector.GP, 0)


@pytest.mark.parametrize("code", ["ea003000001800", "ff2d00810000"])
def test_far_jump_to_code(code: str) -> None:
    bench = make("90" + code)
    bench.put(DATA + 0x100, struct.pack("<IH", ENTRY, CODE_32))
    bench.put(ENTRY, "f4")
    state = bench.run()
    assert (state.rip, state.segments[1].selector) == (ENTRY + 1, CODE_32)
    assert bench.processor.instructions == 3


def test_far_call_to_code_and_back() -> None:
    bench = make("9a003000001800")
    bench.put(ENTRY, "cb")
    state = bench.run()
    assert (state.rip, state.gpr[4]) == (CODE + 8, STACK)
    assert bench.processor.instructions == 3


def test_far_jumps_between_modes_stay_native() -> None:
    """In real mode and in IA-32e mode there are no tasks to switch."""
    bench = ProcessorBench("ea00300000f4", real_mode())
    bench.put(ENTRY, "f4")
    assert bench.run().rip == ENTRY + 1
    bench = ProcessorBench("48ff2ff4", long_mode())
    bench.put(DATA, struct.pack("<QH", ENTRY, 0x08))
    bench.state.gpr[7] = DATA
    bench.put(ENTRY, "f4")
    assert bench.run().rip == ENTRY + 1


def test_interrupt_through_a_task_gate_and_back() -> None:
    bench = make("cd4090", deliver=True)
    bench.memory.write_u64(IDT + 8 * 0x40, NEW << 16 | 0xE5 << 40)
    bench.processor.run_once()
    assert (bench.state.rip, bench.state.tr.selector) == (ENTRY, NEW)
    bench.run()
    assert (bench.state.rip, bench.state.tr.selector) == (CODE + 4, OLD)


class _Extension:
    """A virtualization extension in non-root operation that intercepts task switches only."""

    non_root = True
    transitions = 0
    iret_unblocked_nmi = False

    def __init__(self) -> None:
        self.seen: list[tuple[TaskSwitch, int]] = []

    def intercept(self, operation: object, instruction: object) -> bool:
        if isinstance(operation, TaskSwitch):
            self.seen.append((operation, instruction.length))  # type: ignore[attr-defined]
            return True
        return False

    def __getattr__(self, name: str) -> object:
        if name == "next_deadline":
            return lambda: None
        return lambda *arguments: False


@pytest.mark.parametrize(
    ("code", "source", "length"),
    [
        ("ea000000003800", TaskSwitchSource.JMP, 7),
        ("ff1d00800000", TaskSwitchSource.CALL, 6),
        ("cd40", TaskSwitchSource.GATE, 2),
        ("cf", TaskSwitchSource.IRET, 1),
    ],
)
def test_extension_is_asked_before_anything_changed(code: str, source: TaskSwitchSource, length: int) -> None:
    """Task switches cause VM exits unconditionally (SDM Vol. 3, "Other Causes of VM Exits")."""
    bench = make(code, deliver=True)
    bench.memory.write_u64(IDT + 8 * 0x40, NEW << 16 | 0xE5 << 40)
    if source is TaskSwitchSource.IRET:
        bench.state.rflags |= NT
        bench.memory.write_u16(TSS, NEW)
        bench.descriptor(NEW, tss_descriptor(NEW_TSS, 11))
    extension = _Extension()
    bench.processor.virtualization = extension  # type: ignore[assignment]
    bench.processor.run_once()
    ((operation, seen_length),) = extension.seen
    assert (operation.selector, operation.source, seen_length) == (NEW, source, length)
    assert (bench.state.rip, bench.state.tr.selector, bench.state.gpr[4]) == (CODE, OLD, STACK)
    if source is TaskSwitchSource.GATE:
        assert operation.delivering is not None
        assert operation.delivering.vector == 0x40
    else:
        assert operation.delivering is None


@pytest.mark.parametrize("code", ["ea785634123800", "9a785634123800"])
def test_trap_flag_of_the_new_task(code: str) -> None:
    """A debug exception with DR6.BT, in the new task and before its first instruction."""
    bench = make(code)
    bench.memory.write_u16(NEW_TSS + 0x64, 1)
    event = bench.event()
    assert (event.vector, event.debug, bench.places) == (Vector.DB, 1 << 15, [ENTRY])
    assert bench.state.tr.selector == NEW
