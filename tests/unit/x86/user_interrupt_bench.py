"""A processor with user interrupts whose ordinary events are recorded, all but notifications."""

from __future__ import annotations

from processor_bench import CODE, ProcessorBench, long_mode

from vtx.x86.event import Event, EventKind
from vtx.x86.processor import LogicalProcessor
from vtx.x86.profile import load_profile
from vtx.x86.state import CpuState

UINTR = 1 << 25
IF = 1 << 9
RR, HANDLER, STACKADJUST, MISC, PD, TT = range(0x985, 0x98B)
ENTRY = 0x2100  # the user's handler
UPID, UITT = 0xA000, 0xB000
UINV = 0xEC
HLT, NOP = "f4", "90"
RSP = 4


def state_with(*, cpl: int = 3, uif: bool = True, compatibility: bool = False, **registers: int) -> CpuState:
    """User interrupts enabled, interrupts too."""
    state = long_mode(cpl, compatibility=compatibility)
    state.cr4 |= UINTR
    state.rflags |= IF
    state.user_interrupt_flag = uif
    for name, value in registers.items():
        state.gpr[("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi").index(name)] = value
    return state


class UserInterruptBench(ProcessorBench):
    """``code`` at `CODE`, a handler at `ENTRY`, a descriptor at `UPID`, a target table of one entry at `UITT`."""

    def __init__(self, code: str = NOP, state: CpuState | None = None, *, entry: str = NOP * 8, **msrs: int) -> None:
        super().__init__(code + NOP * 8, state or state_with(), profile=load_profile("everything"))
        self.put(ENTRY, entry)
        values = {"handler": ENTRY, "misc": UINV << 32, "pd": UPID, "tt": UITT | 1} | msrs
        for name, value in values.items():
            index = {"rr": RR, "handler": HANDLER, "stackadjust": STACKADJUST, "misc": MISC, "pd": PD, "tt": TT}[name]
            assert self.processor.msrs.write(index, value), name
        self.sent: list[tuple[int, int]] = []
        self.processor.send_interrupt = lambda *sent: self.sent.append(sent)  # type: ignore[method-assign]

    def _record(self, event: Event) -> None:
        notified = self.state.cr4 & UINTR and self.state.efer & 0x400 and event.vector == self.msr(MISC) >> 32
        if event.kind is EventKind.EXTERNAL_INTERRUPT and notified:
            LogicalProcessor.deliver(self.processor, event)
        else:
            super()._record(event)

    def msr(self, index: int) -> int:
        value = self.processor.msrs.read(index)
        assert value is not None
        return value

    def descriptor(self, control: int, requests: int = 0) -> None:  # type: ignore[override]
        """Fill the descriptor."""
        self.memory.write_u64(UPID, control)
        self.memory.write_u64(UPID + 8, requests)

    def descriptor_at(self, selector: int, value: int) -> None:
        """Fill a descriptor of the GDT."""
        super().descriptor(selector, value)

    def posted(self) -> tuple[int, int]:
        """Control and requests of the descriptor."""
        return self.memory.read_u64(UPID), self.memory.read_u64(UPID + 8)

    def target(self, low: int = 1, address: int = UPID, *, number: int = 0) -> None:
        """Fill an entry of the target table."""
        self.memory.write_u64(UITT + 16 * number, low)
        self.memory.write_u64(UITT + 16 * number + 8, address)

    def quadwords(self, address: int, count: int) -> list[int]:
        return [self.memory.read_u64(address + 8 * number) for number in range(count)]

    def steps(self, count: int = 1) -> CpuState:
        for _ in range(count):
            self.processor.run_once()
        return self.state


__all__ = ["CODE", "UserInterruptBench", "state_with"]
