"""Walks that are remembered give what a walk would give, whatever happened to the entries in between."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtx.x86 import mmu as mmu_module
from vtx.x86.memory import PhysicalMemory
from vtx.x86.mmu import Grant, Mmu
from vtx.x86.outcome import Fault, Vector
from vtx.x86.second_level import AccessKind
from vtx.x86.state import CpuState

READ, WRITE, EXECUTE = AccessKind
P, RW, US, A, D, NX = 1, 2, 4, 0x20, 0x40, 1 << 63
TABLES = (0x1000, 0x2000, 0x3000, 0x4000)
LINEAR = 0x7000
LEAF = 0x4000 + 8 * 7


class Rig:
    """4-level paging with one mapped page, at `LINEAR`, and every translation dropped before each access."""

    def __init__(self, leaf: int = 0x9000 | P | RW | US | A | D) -> None:
        self.memory = PhysicalMemory(1 << 20)
        for table, below in itertools.pairwise(TABLES):
            self.memory.write_u64(table, below | P | RW | US | A)
        self.memory.write_u64(LEAF, leaf)
        self.mmu = Mmu(self.memory, 46)
        self.state = CpuState(cr0=0x8001_0001, cr3=TABLES[0], cr4=0x20, efer=0xD00)
        self.mmu.update(self.state)

    def fill(self, kind: AccessKind = READ, cpl: int = 0) -> object:
        self.mmu.cr3_written(self.state)
        return self.mmu.fill(LINEAR, kind, cpl, False)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each real walk."""
    seen: list[int] = []
    real = mmu_module.walk

    def counted(*arguments: object) -> object:
        seen.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mmu_module, "walk", counted)
    return seen


def test_third_access__walks_no_more(walks: list[int]) -> None:
    rig = Rig()
    grants = [rig.fill() for _ in range(5)]
    assert grants == [Grant(9, READ | WRITE | EXECUTE)] * 5
    assert len(walks) == 2


@pytest.mark.parametrize("level", range(4))
def test_entry_that_changed__is_walked_anew(level: int, walks: list[int]) -> None:
    rig = Rig()
    for _ in range(3):
        rig.fill()
    address = LEAF if level == 3 else TABLES[level]
    rig.memory.write_u64(address, rig.memory.read_u64(address) & ~RW)
    assert rig.fill(WRITE) == Fault(Vector.PF, P | RW, LINEAR)
    assert rig.fill() == Grant(9, READ | EXECUTE)


def test_flag_that_software_cleared__is_set_again(walks: list[int]) -> None:
    rig = Rig()
    for _ in range(3):
        rig.fill()
    rig.memory.write_u64(LEAF, rig.memory.read_u64(LEAF) & ~A)
    rig.fill()
    assert rig.memory.read_u64(LEAF) & A


def test_write_through_a_clean_page__still_sets_the_dirty_flag(walks: list[int]) -> None:
    rig = Rig(0x9000 | P | RW | US | A)
    for _ in range(3):
        assert rig.fill() == Grant(9, READ | EXECUTE)
    assert rig.fill(WRITE) == Grant(9, READ | WRITE | EXECUTE)
    assert rig.memory.read_u64(LEAF) & D


def test_permissions__are_those_of_each_access(walks: list[int]) -> None:
    rig = Rig(0x9000 | P | RW | A | D)
    for _ in range(3):
        rig.fill()
    assert rig.fill(READ, cpl=3) == Fault(Vector.PF, P | US, LINEAR)


def test_registers__select_what_is_remembered(walks: list[int]) -> None:
    rig = Rig()
    for _ in range(3):
        rig.fill()
    other = 0x8000
    rig.memory.write_u64(other, 0)
    rig.state.cr3 = other
    assert rig.fill() == Fault(Vector.PF, 0, LINEAR)
    rig.state.cr3 = TABLES[0]
    assert rig.fill() == Grant(9, READ | WRITE | EXECUTE)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 63), st.sampled_from(AccessKind), st.sampled_from((0, 3)))))
def test_any_changes__give_what_a_fresh_mmu_gives(steps: list[tuple[int, int, AccessKind, int]]) -> None:
    rig, fresh = Rig(), Rig()
    for level, bit, kind, cpl in steps:
        address = LEAF if level == 3 else TABLES[level]
        for each in (rig, fresh):
            each.memory.write_u64(address, each.memory.read_u64(address) ^ 1 << bit)
        fresh.mmu = Mmu(fresh.memory, 46)
        fresh.mmu.update(fresh.state)
        for _ in range(3):
            assert rig.fill(kind, cpl) == fresh.mmu.fill(LINEAR, kind, cpl, False)
            fresh.mmu.cr3_written(fresh.state)
        assert bytes(rig.memory.read(0, 0x5000)) == bytes(fresh.memory.read(0, 0x5000))
