"""An engine with a client under the test's control: flat memory, any mode, translations by table."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define, field

from vtx.addresses import PAGE_SHIFT
from vtx.engine.unicorn_engine import UnicornEngine
from vtx.x86.execution import NOT_ANSWERED, EngineEvent, Place, Plan, Stepped
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Basis, Grant, Refusal, Translations
from vtx.x86.outcome import Fault, Vector
from vtx.x86.second_level import ALL_PERMISSIONS, AccessKind
from vtx.x86.state import CpuState, Segment

CODE = 0x1000
DATA = 0x8000
STACK = 0xA000
MEMORY = 0x40000

REFUSAL = Fault(Vector.PF, 0)


@define(slots=False)
class Client:
    """Maps each page to itself with all permissions unless ``pages`` says otherwise (None refuses)."""

    pages: dict[int, Grant | Refusal] = field(factory=dict)
    fills: list[tuple[int, AccessKind, int, bool]] = field(factory=list)
    on_fill: Callable[[int, AccessKind], None] = lambda page, kind: None
    port_values: dict[int, int] = field(factory=dict)
    port_writes: list[tuple[int, int, int]] = field(factory=list)
    port_levels: list[int] = field(factory=list)

    def fill(self, linear_page: int, kind: AccessKind, cpl: int, ac: bool) -> Grant | Refusal:
        self.fills.append((linear_page, kind, cpl, ac))
        self.on_fill(linear_page, kind)
        page = linear_page >> PAGE_SHIFT
        grant = self.pages.get(page, Grant(page, ALL_PERMISSIONS))
        if isinstance(grant, Grant) and not grant.permissions & kind:
            return REFUSAL
        return grant

    plan = Plan()

    def answer(self, place: Place) -> int:
        return NOT_ANSWERED

    def translations(self) -> Translations | None:
        return None

    def basis(self, linear_page: int) -> Basis | None:
        raise AssertionError("nothing is remembered without translations")

    def port_in(self, port: int, size: int, cpl: int) -> int | None:
        self.port_levels.append(cpl)
        return self.port_values.get(port)

    def port_out(self, port: int, size: int, value: int, cpl: int) -> bool:
        self.port_levels.append(cpl)
        if port not in self.port_values:
            return False
        self.port_writes.append((port, size, value))
        return True


def _flat(code_rights: int, cpl: int, data_rights: int, limit: int) -> list[Segment]:
    data = data_rights | cpl << 5
    segments = [Segment(0x10 | cpl, 0, limit, data) for _ in range(6)]
    segments[1] = Segment(0x08 | cpl, 0, limit, code_rights | cpl << 5)
    return segments


def state_for(mode: str) -> CpuState:
    """Registers for ``mode``: real16, virtual16, protected16, protected32, compatibility32 or long64, at CPL 0.

    A suffix ``-user`` makes it CPL 3 (virtual16 always is). RIP is at `CODE`, RSP at `STACK`; segments are flat and
    paging is on in IA-32e mode. Each general register holds a value of its own.
    """
    name, _, suffix = mode.partition("-")
    cpl = 3 if suffix == "user" or name == "virtual16" else 0
    state = CpuState()
    state.gpr[:] = [0x0101_0101_0101_0101 * (i + 1) for i in range(16)]
    if not name.startswith("long"):
        state.gpr[:] = [value & 0xFFFF_FFFF for value in state.gpr[:8]] + [0] * 8
    state.gpr[4] = STACK
    state.rip = CODE
    state.cr4 = 0x220  # PAE, OSFXSR
    state.cr0 = 0x11
    if name == "real16":
        state.cr0 = 0x10
        state.segments = [Segment(0, 0, 0xFFFF, 0x93) for _ in range(6)]
        state.segments[1].access_rights = 0x9B
    elif name == "virtual16":
        state.rflags |= 1 << 17
        state.segments = [Segment(0, 0, 0xFFFF, 0xF3) for _ in range(6)]
    elif name == "protected16":
        state.segments = _flat(0x9B, cpl, 0x93, 0xFFFF)
    elif name == "protected32":
        state.segments = _flat(0xC09B, cpl, 0xC093, 0xFFFF_FFFF)
    else:
        state.cr0 = 0x8000_0011
        state.efer = 0xD01
        state.segments = _flat(0xA09B if name == "long64" else 0xC09B, cpl, 0xC093, 0xFFFF_FFFF)
    return state


class EngineBench:
    """Code bytes at `CODE` in a given mode, run event by event."""

    def __init__(
        self, code: bytes | str = b"", mode: str = "long64", *, compiled: bool = True, client: Client | None = None
    ) -> None:
        self.memory = PhysicalMemory(MEMORY)
        self.client = client or Client()
        self.engine = UnicornEngine(self.memory, self.client, allow_compiled=compiled)
        self.state = state_for(mode)
        self.put(CODE, code)
        self._reload = True

    def put(self, address: int, code: bytes | str) -> None:
        """Store machine code, given as bytes or as hexadecimal digits."""
        self.memory.write(address, bytes.fromhex(code) if isinstance(code, str) else code)

    def run(
        self,
        *,
        budget: int | None = 100_000,
        step: bool = False,
        watch_if: bool = False,
        instruction_limit: int | None = None,
    ) -> EngineEvent:
        """To the next event; a guest that spins ends by budget rather than never."""
        reload, self._reload = self._reload, False
        return self.engine.run(self.state, Plan(budget, instruction_limit, step, watch_if), reload=reload)

    def step(self, count: int = 1) -> None:
        """Execute ``count`` instructions one by one."""
        for _ in range(count):
            event = self.run(step=True)
            assert event == Stepped(), event

    def reload(self) -> None:
        """The test changed more than GPRs, RIP and RFLAGS."""
        self._reload = True

    def close(self) -> None:
        self.engine.close()
