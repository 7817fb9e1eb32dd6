"""Fills that the engine is given again without asking, and everything that makes it ask again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
from attrs import define, field
from engine_bench import CODE, DATA, MEMORY, Client, EngineBench, state_for
from hypothesis import given, settings
from hypothesis import strategies as st

from vtx.addresses import PAGE_SHIFT, PAGE_SIZE
from vtx.engine import fills
from vtx.engine.coherence import Coherence
from vtx.engine.unicorn_engine import UnicornEngine
from vtx.x86.execution import InstructionTrap, RefusedFill
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Basis, Grant, Translations
from vtx.x86.outcome import Fault, Vector
from vtx.x86.second_level import AccessKind

READ, WRITE = "488b07f4", "488907f4"  # MOV RAX, [RDI] and MOV [RDI], RAX; HLT
ENTRY = 0x20000
"""Where the paging-structure entry is that the data page's translation was made of."""
OTHER = 0x30000
AC = 1 << 18
PAGE = DATA >> PAGE_SHIFT
EXECUTE = AccessKind.EXECUTE

needs_compiled = pytest.mark.skipif(fills._fills is None, reason="the compiled memory of fills has not been built")


@define(slots=False)
class TranslatingClient(Client):
    """Says what its fills rest on; the bench has no real translations."""

    found: dict[int, Basis] = field(factory=dict)
    kept: Translations = field(factory=lambda: Translations(1, {}, {}, set(), set()))
    remembers: bool = True

    def translations(self) -> Translations | None:
        return self.kept if self.remembers else None

    def basis(self, linear_page: int) -> Basis | None:
        return self.found.get(linear_page >> PAGE_SHIFT)


class Bench(EngineBench):
    """``code`` accesses `DATA`, whose translation was made of the entry at `ENTRY`."""

    def __init__(self, code: str, *, compiled: bool = True, mode: str = "long64") -> None:
        self.translator = client = TranslatingClient()
        super().__init__(code, mode, compiled=compiled, client=client)
        self.memory.write_u64(ENTRY, 0x1234)
        client.found[PAGE] = Basis(object(), None, ((ENTRY, 0x1234),))
        client.found[CODE >> PAGE_SHIFT] = Basis(object(), None, ())
        self.state.gpr[7] = DATA
        self.state.gpr[0] = 0

    def asked(self, *, flushed: bool = True) -> list[int]:
        """Run once more, the TLB of the engine being empty; the pages of which the client was asked."""
        self.translator.fills.clear()
        if flushed:
            self.engine.flush(None)
        self.state.rip = CODE
        assert self.run() == InstructionTrap()
        return [address >> PAGE_SHIFT for address, *_ in self.translator.fills]

    def warm(self) -> None:
        """All that is asked for has been asked for, and would be given again."""
        for _ in range(3):
            self.asked()
        assert self.asked() == []


@pytest.fixture(params=[READ, WRITE], ids=["read", "write"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    made.warm()
    yield made
    made.close()


pytestmark = needs_compiled


def test_given_again__without_a_question() -> None:
    bench = Bench(READ)
    bench.memory.write_u64(DATA, 0x55)
    assert bench.asked() == [CODE >> PAGE_SHIFT, PAGE]
    bench.warm()
    given = bench.engine._fills.given
    bench.memory.write_u64(DATA, 0x66)
    assert bench.asked() == [] and bench.engine._fills.given == given + 2
    assert bench.state.gpr[0] == 0x66


def test_twin_in_python__asks_each_time() -> None:
    bench = Bench(READ, compiled=False)
    for _ in range(5):
        assert bench.asked() == [CODE >> PAGE_SHIFT, PAGE]


def test_entry_changed__asks(bench: Bench) -> None:
    bench.memory.write_u64(ENTRY, 0x1235)
    assert bench.asked() == [PAGE]


def test_entries_unknown__asks() -> None:
    bench = Bench(READ)
    bench.translator.found[PAGE] = Basis(object(), None, None)
    for _ in range(5):
        assert PAGE in bench.asked()


@pytest.mark.parametrize("where", ["local", "global_"])
def test_translation_kept__counts_whatever_the_entries_say(bench: Bench, where: str) -> None:
    getattr(bench.translator.kept, where)[PAGE] = bench.translator.found[PAGE].translation
    bench.memory.write_u64(ENTRY, 0)
    assert bench.asked() == []


@pytest.mark.parametrize("where", ["local", "global_"])
def test_another_translation_kept__asks(bench: Bench, where: str) -> None:
    getattr(bench.translator.kept, where)[PAGE] = object()
    assert bench.asked() == [PAGE]


def test_another_context__asks_and_the_old_one_is_not_forgotten(bench: Bench) -> None:
    kept = bench.translator.kept
    bench.translator.kept = kept._replace(context=2)
    assert bench.asked() == [CODE >> PAGE_SHIFT, PAGE]
    bench.translator.kept = kept
    assert bench.asked() == []


def test_translations_that_must_not_be_remembered__ask(bench: Bench) -> None:
    bench.translator.remembers = False
    assert bench.asked() == [CODE >> PAGE_SHIFT, PAGE]


def test_access_granted_once_only__asks(bench: Bench) -> None:
    bench.translator.kept.implicit.add(0x777)
    assert bench.asked() == [CODE >> PAGE_SHIFT, PAGE]


def test_other_privilege__asks(bench: Bench) -> None:
    bench.state.rflags |= AC
    assert bench.asked() == [CODE >> PAGE_SHIFT, PAGE]
    assert {ac for *_, ac in bench.translator.fills} == {True}


def test_local_apic_moved_to_the_frame__asks(bench: Bench) -> None:
    bench.memory.own_page = PAGE
    assert bench.asked() == [PAGE]


def test_large_page__is_noted_again(bench: Bench) -> None:
    bench.translator.found[PAGE] = bench.translator.found[PAGE]._replace(large=(1 << 21, 7))
    bench.memory.write_u64(ENTRY, 0)
    bench.asked()
    bench.translator.found[PAGE] = bench.translator.found[PAGE]._replace(entries=((ENTRY, 0),))
    bench.warm()
    bench.translator.kept.large.clear()
    assert bench.asked() == []
    assert bench.translator.kept.large == {(1 << 21, 7)}


def test_permission_to_write_given_again__is_noted() -> None:
    bench = Bench(WRITE)
    bench.warm()
    bench.memory.dirty.clear()
    bench.engine.coherence.dirty.clear()
    assert bench.asked() == []
    assert bench.engine.coherence.dirty == {PAGE}


def test_page_that_was_written__is_executed_as_it_is_now() -> None:
    """Write to the page by a grant given again, execute it, write again: each execution sees the latest code."""
    bench = Bench("488907ffd7f4")  # MOV [RDI], RAX; CALL RDI; HLT
    bench.translator.found[DATA >> PAGE_SHIFT] = Basis(object(), None, ())
    bench.state.gpr[3] = 0
    for round_ in range(12):
        bench.state.gpr[4] = 0xA000
        bench.state.gpr[0] = int.from_bytes(bytes((0x48, 0x83, 0xC3, round_, 0xC3, 0x90, 0x90, 0x90)), "little")
        before = bench.state.gpr[3]  # ADD RBX, round_; RET
        bench.asked()
        assert bench.state.gpr[3] == before + round_


def test_code_that_the_model_changed__is_what_runs() -> None:
    bench = Bench("ffc090f4")  # INC EAX
    bench.warm()
    for code, change in (("ffc8", -1), ("ffc0", 1), ("ffc8", -1)):  # DEC EAX
        bench.put(CODE, code)
        before = bench.state.gpr[0] = 100
        bench.asked()
        assert bench.state.gpr[0] == before + change


def test_code_at_another_frame__is_what_runs(bench: Bench) -> None:
    """The context is the same, but the entry of the code page has changed: the old frame must not run."""
    client = bench.translator
    client.found[CODE >> PAGE_SHIFT] = Basis(object(), None, ((ENTRY + 8, 0),))
    bench.memory.write_u64(ENTRY + 8, 1)
    client.kept.local[CODE >> PAGE_SHIFT] = object()
    bench.asked()
    del client.kept.local[CODE >> PAGE_SHIFT]
    client.pages[CODE >> PAGE_SHIFT] = Grant(OTHER >> PAGE_SHIFT, 7)
    bench.put(OTHER, "48c7c034120000f4")  # MOV RAX, 0x1234
    assert CODE >> PAGE_SHIFT in bench.asked()
    assert bench.state.gpr[0] == 0x1234


def test_code_of_two_contexts_at_one_address__is_looked_at_as_it_is(bench: Bench) -> None:
    """Each has a frame of its own there; in the second, VZEROUPPER, which the engine must not execute."""
    client, kept = bench.translator, bench.translator.kept
    codes = "48c7c001000000f4", "c5f877909090 90f4"  # MOV RAX, 1; HLT, and VZEROUPPER; NOPs; HLT
    frames = CODE, OTHER
    for frame, code in zip(frames, codes, strict=True):
        bench.put(frame, code)
    ends = []
    for _ in range(5):
        for context, frame in enumerate(frames, 1):
            client.kept = kept._replace(context=context)
            client.pages[CODE >> PAGE_SHIFT] = Grant(frame >> PAGE_SHIFT, 7)
            bench.asked()
            ends.append(bench.state.rip - CODE)
    assert ends == [7, 0] * 5


def test_store_behind_an_instruction_that_is_undone__never_happens() -> None:
    """The library goes on to the end of the block after an OUT that the client refuses."""
    bench = Bench("ee488907f4")  # OUT DX, AL; MOV [RDI], RAX; HLT
    bench.state.gpr[2], bench.state.gpr[0] = 0x80, 0x11
    bench.translator.port_values[0x80] = 0
    bench.warm()
    assert bench.memory.read_u64(DATA) == 0x11
    del bench.translator.port_values[0x80]
    bench.state.gpr[0] = 0x22
    bench.asked()
    assert bench.state.rip == CODE and bench.memory.read_u64(DATA) == 0x11


def test_refusal__is_never_remembered(bench: Bench) -> None:
    bench.translator.pages[PAGE] = fault = Fault(Vector.PF, 2)
    bench.memory.write_u64(ENTRY, 0)
    for _ in range(3):
        bench.engine.flush(None)
        bench.state.rip = CODE
        assert bench.run() == RefusedFill(DATA, bench.translator.fills[-1][1], fault)
    bench.memory.write_u64(ENTRY, 0x1234)
    del bench.translator.pages[PAGE]
    bench.asked()


def test_many_pages__the_engine_is_emptied_as_often_as_with_questions() -> None:
    """Its TLB is emptied after so many fills (docs/engine.md), given or asked for."""
    reads = "".join("488b07" + "4881c700100000" for _ in range(20)) + "f4"  # MOV RAX, [RDI]; ADD RDI, 4096
    counts = []
    for compiled in (False, True):
        bench = Bench(reads, compiled=compiled)
        bench.engine._fills.most = 8
        for page in range(20):
            bench.translator.found[PAGE + page] = Basis(object(), None, ())
        emptied: list[int] = []
        flush: Callable[[], None] = bench.engine._flush_now
        bench.engine._flush_now = lambda flush=flush, emptied=emptied: (emptied.append(1), flush())[1]  # type: ignore
        for _ in range(4):
            bench.engine._fills.most = 8
            bench.state.gpr[7] = DATA
            bench.asked()
        counts.append(len(emptied))
    assert counts[0] == counts[1] > 4


def test_contexts_that_meet_in_the_memory__are_told_apart(bench: Bench) -> None:
    """There are fewer places than contexts here; no grant of another context may be given."""
    kept = bench.translator.kept
    for context in range(2, 5000):
        bench.translator.kept = kept._replace(context=context)
        assert bench.asked() == [CODE >> PAGE_SHIFT, PAGE]


class Caller(EngineBench):
    """One of two engines of the same memory: stores to `FRAMES`, or calls what is there, through one of two pages."""

    def __init__(self, other: Caller | None, *, compiled: bool) -> None:
        self.client = client = TranslatingClient()
        self.memory = other.memory if other else PhysicalMemory(MEMORY)
        coherence = other.engine.coherence if other else Coherence()
        self.engine = UnicornEngine(self.memory, client, coherence=coherence, allow_compiled=compiled)
        self.state = state_for("long64")
        self._reload = True
        for page in range(0x80):
            frame = page if page < 0x40 else page - 0x40
            client.pages[page] = Grant(frame, 7)
            client.found[page] = Basis(object(), None, ())

    def act(self, entry: int, target: int, value: int, *, flush: bool) -> int:
        if flush:
            self.engine.flush(None)
        self.state.rip, self.state.gpr[7], self.state.gpr[0], self.state.gpr[4] = entry, target, value, 0xA000
        assert self.run() == InstructionTrap()
        return self.state.gpr[0] & 0xFF


FRAMES = (0x10, 0x11)
STORE, CALL = CODE, CODE + 0x10
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("store", "call", "model")),
        st.sampled_from(FRAMES),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    min_size=50,
    max_size=100,
)


@pytest.mark.parametrize("compiled", [False, True], ids=["python", "compiled"])
@given(actions=ACTIONS)
@settings(max_examples=100, deadline=None)
def test_code_and_data_change_sides__what_runs_is_what_was_stored_last(
    compiled: bool, actions: list[tuple[str, int, bool, bool, bool]]
) -> None:
    first = Caller(None, compiled=compiled)
    both = first, Caller(first, compiled=compiled)
    first.put(STORE, "884701f4")  # MOV [RDI + 1], AL; HLT
    first.put(CALL, "ffd7f4")  # CALL RDI; HLT
    expected = dict.fromkeys(FRAMES, 0)
    for frame in FRAMES:
        first.put(frame << PAGE_SHIFT, "b800000000c3")  # MOV EAX, 0; RET
    for number, (what, frame, second, alias, flush) in enumerate(actions, 1):
        engine, page = both[second], frame + 0x40 * alias
        if what == "call":
            assert engine.act(CALL, page << PAGE_SHIFT, 0, flush=flush) == expected[frame]
        elif what == "store":
            engine.act(STORE, page << PAGE_SHIFT, number, flush=flush)
        else:
            engine.memory.write_u8((frame << PAGE_SHIFT) + 1, number)
        if what != "call":
            expected[frame] = number
    for engine in both:
        engine.close()


def test_engine__is_forgotten_with_its_fills() -> None:
    bench = Bench(READ)
    bench.warm()
    engine = weakref.ref(bench.engine)
    del bench
    gc.collect()
    assert engine() is None


def test_page_size__is_what_the_compiled_part_assumes() -> None:
    assert PAGE_SIZE == 1 << 12 and [int(kind) for kind in (AccessKind.READ, AccessKind.WRITE, EXECUTE)] == [1, 2, 4]
