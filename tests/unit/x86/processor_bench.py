"""A processor on its engine with a platform under the test's control, without a virtualization extension.

Memory is mapped to itself by 4-level tables of 4-KByte pages, user-accessible and writable unless `page` says
otherwise. Events are recorded instead of delivered, unless a test asks for delivery.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import define, field

from vtx.engine.unicorn_engine import UnicornEngine
from vtx.x86.event import Event
from vtx.x86.memory import PhysicalMemory
from vtx.x86.processor import LogicalProcessor
from vtx.x86.profile import Profile, load_profile
from vtx.x86.state import CpuState, DescriptorTable, Segment

CODE = 0x1000
GDT = 0x4000
IDT = 0x5000
TSS = 0x6000
DATA = 0x8000
ABSENT = 0x9000  # tests unmap this one
STACK = 0xC000
TABLES = 0x10000
MEMORY = 0x20_0000

PRESENT, WRITABLE, USER, NO_EXECUTE = 1, 2, 4, 1 << 63

KERNEL_CODE_64 = 0x00AF_9B00_0000_FFFF
KERNEL_CODE_32 = 0x00CF_9B00_0000_FFFF
KERNEL_DATA = 0x00CF_9300_0000_FFFF
USER_DATA = 0x00CF_F300_0000_FFFF


@define(slots=False)
class FakePlatform:
    """Ports, one pending vector, one deadline; all set by the test."""

    vector: int | None = None
    deadline: int | None = None
    on_deadline: Callable[[], None] = lambda: None
    ports: dict[int, int] = field(factory=dict)
    written: list[tuple[int, int, int]] = field(factory=list)
    task_priority: int = 0
    apic_enabled: bool = True
    dismissed: int = 0

    def port_read(self, port: int, size: int) -> int:
        return self.ports.get(port, (1 << 8 * size) - 1)

    def port_write(self, port: int, size: int, value: int) -> None:
        self.written.append((port, size, value))

    def port_device(self, port: int) -> str:
        return "none"

    def interrupt_pending(self) -> bool:
        return self.vector is not None

    def acknowledge_interrupt(self) -> int:
        vector, self.vector = self.vector, None
        assert vector is not None
        return vector

    def end_of_interrupt(self) -> None:
        self.dismissed += 1

    def next_deadline(self) -> int | None:
        return self.deadline

    def advance(self, now: int) -> None:
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self.on_deadline()


def long_mode(cpl: int = 0, *, compatibility: bool = False) -> CpuState:
    """IA-32e mode with flat segments; RIP at `CODE`, RSP at `STACK`."""
    state = CpuState()
    state.cr0, state.cr3, state.cr4, state.efer = 0x8001_0033, TABLES, 0x620, 0xD01  # WP; OSFXSR; NXE
    code = 0xC09B if compatibility else 0xA09B
    state.segments = [Segment(0x10 | cpl, 0, 0xFFFF_FFFF, 0xC093 | cpl << 5) for _ in range(6)]
    state.segments[1] = Segment(0x08 | cpl, 0, 0xFFFF_FFFF, code | cpl << 5)
    state.ldtr = Segment(0, 0, 0, 0x1_0000)
    state.tr = Segment(0x30, TSS, 0x67, 0x8B)
    state.gdtr = DescriptorTable(GDT, 0x7F)
    state.idtr = DescriptorTable(IDT, 0xFFF)
    state.rip, state.rflags = CODE, 2
    state.gpr[:] = [0x10 * (i + 1) for i in range(16)]
    state.gpr[4] = STACK
    return state


def protected_mode(cpl: int = 0, *, bits: int = 32) -> CpuState:
    """Protected mode without paging, flat."""
    state = long_mode(cpl)
    state.cr0, state.cr4, state.efer = 0x33, 0x600, 0
    state.segments[1].access_rights = (0xC09B if bits == 32 else 0x809B) | cpl << 5
    return state


def real_mode() -> CpuState:
    """Real-address mode with segments at 0."""
    state = CpuState()
    state.segments = [Segment(0, 0, 0xFFFF, 0x93) for _ in range(6)]
    state.segments[1].access_rights = 0x9B
    state.rip, state.rflags, state.gpr[4] = CODE, 2, STACK
    state.cr0 = 0x30
    return state


class ProcessorBench:
    """A `LogicalProcessor` with ``code`` (bytes or hexadecimal) at `CODE`."""

    def __init__(
        self,
        code: bytes | str = b"",
        state: CpuState | None = None,
        *,
        deliver: bool = False,
        profile: Profile | None = None,
        compiled: bool = True,
    ) -> None:
        self.memory = PhysicalMemory(MEMORY)
        self.platform = FakePlatform()
        self.events: list[Event] = []
        self.places: list[int] = []
        self.processor = LogicalProcessor(
            self.memory,
            profile or load_profile(),
            self.platform,
            lambda memory, client: UnicornEngine(memory, client, allow_compiled=compiled, answers=False),
        )
        self.state = self.processor.state = state or long_mode()
        self._map()
        self.put(CODE, code)
        for selector, descriptor in ((0x08, KERNEL_CODE_64), (0x10, KERNEL_DATA), (0x18, KERNEL_CODE_32)):
            self.memory.write_u64(GDT + selector, descriptor)
        self.memory.write_u64(GDT + 0x20, USER_DATA)
        self.processor.load_control_state()
        if not deliver:
            self.processor.deliver = self._record  # type: ignore[method-assign]

    def _record(self, event: Event) -> None:
        self.events.append(event)
        self.places.append(self.state.rip)

    def _map(self) -> None:
        flags = PRESENT | WRITABLE | USER
        for level in range(3):
            self.memory.write_u64(TABLES + 0x1000 * level, TABLES + 0x1000 * (level + 1) | flags)
        for page in range(512):
            self.memory.write_u64(TABLES + 0x3000 + 8 * page, page << 12 | flags)

    def page(self, address: int, flags: int, frame: int | None = None) -> None:
        """Set the page-table entry of ``address`` before anything has used it."""
        frame = address & ~0xFFF if frame is None else frame
        self.memory.write_u64(TABLES + 0x3000 + 8 * (address >> 12), frame | flags)

    def put(self, address: int, code: bytes | str) -> None:
        self.memory.write(address, bytes.fromhex(code) if isinstance(code, str) else code)

    def descriptor(self, selector: int, value: int) -> None:
        self.memory.write_u64(GDT + selector, value)

    def event(self, limit: int = 200) -> Event:
        """Run to the next event; it is the only one."""
        for _ in range(limit):
            self.processor.run_once()
            if self.events:
                assert len(self.events) == 1
                return self.events.pop()
        raise AssertionError(f"no event; RIP is {self.state.rip:#x}")

    def run_to(self, address: int, limit: int = 1000) -> None:
        """Run until RIP is ``address``; events are failures."""
        for _ in range(limit):
            if self.state.rip == address:
                return
            self.processor.run_once()
            assert not self.events, (self.events, hex(self.places[-1]))
        raise AssertionError(f"RIP is {self.state.rip:#x}")

    def run(self, code: bytes | str | None = None) -> CpuState:
        """Execute the instructions up to a HLT behind them."""
        if code is not None:
            self.put(CODE, code)
            self.state.rip = CODE
        for _ in range(1000):
            if self.state.activity:
                return self.state
            self.processor.run_once()
            assert not self.events, (self.events, hex(self.places[-1]))
        raise AssertionError(f"RIP is {self.state.rip:#x}")
