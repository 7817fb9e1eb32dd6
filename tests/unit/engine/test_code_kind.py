"""Kinds of code: bits that have room where they are packed, and what Intel MPX makes of code while it is on and off."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vtx.engine import code_kind
from vtx.engine.code_kind import BITS, kind_of
from vtx.engine.code_view import Block
from vtx.x86.state import AccessRights, CpuState, Segment

OSXSAVE, MPX = 1 << 18, 0x18
CODE = 0x1000
# JNZ +0; CALL +0; RET; JMP near +0
BRANCHES = {"jcc": "7500", "call": "e800000000", "ret": "c3", "jmp": "e900000000"}
BND = {"bndmk": "f30f1b07", "bndcl-register": "f30f1ac0", "bndmov-store": "660f1b07", "bndldx": "0f1a0437"}


def test_every_bit_has_room_in_what_identifies_code() -> None:
    """The helper packs the frame that code is in above the kind, as Python does."""
    kinds = [
        getattr(code_kind, name) for name in vars(code_kind) if name.isupper() and name[0] != "_" and name != "BITS"
    ]
    flags = [value for value in kinds if isinstance(value, int) and value & (value - 1) == 0]
    assert len(set(flags)) == len(flags)
    assert max(flags) < 1 << BITS
    source = Path(code_kind.__file__).with_name("_blockclock.c")
    (bits,) = re.findall(r"^#define KIND_BITS (\d+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    assert int(bits) == BITS


def state(*, cr4: int = OSXSAVE, xcr0: int = 3, config: int = 0, bounds: int = 0) -> CpuState:
    """A 64-bit kernel."""
    result = CpuState()
    result.cr0, result.efer, result.cr4 = 0x8000_0011, 0x500, cr4
    result.segments[1] = Segment(8, 0, 0xFFFF_FFFF, int(AccessRights.LONG) | 0x809B)
    result.xcr0, result.bndcfgs, result.upper_bounds[2] = xcr0, config, bounds
    assert result.in_64_bit_mode
    return result


def stops(code: str, of: CpuState) -> bool:
    block = Block.of(CODE, bytes.fromhex(code), kind_of(of), lambda _: False)
    assert not block.guards
    return block.stop is not None


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(state(), id="no-component"),
        pytest.param(state(xcr0=0x1B), id="not-enabled"),
        pytest.param(state(cr4=0, xcr0=0x1B, config=1, bounds=1), id="no-osxsave"),
        pytest.param(state(xcr0=0xB, config=1, bounds=1), id="one-component"),
    ],
)
@pytest.mark.parametrize("code", [*BRANCHES.values(), *BND.values()], ids=[*BRANCHES, *BND])
def test_where_mpx_is_off_nothing_is_watched(code: str, of: CpuState) -> None:
    """The kind of code is that of code without it, so that blocks are the same, too."""
    assert kind_of(of) == kind_of(state(cr4=0))
    assert not stops(code, of)


@pytest.mark.parametrize("code", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize(("config", "bounds", "watched"), [(1, 1, True), (1, 0, False), (3, 1, False)])
def test_branches_are_watched_while_there_is_something_to_initialize(
    code: str, config: int, bounds: int, watched: bool
) -> None:
    assert stops(code, state(xcr0=0x1B, config=config, bounds=bounds)) is watched
    assert not stops("f2" + code, state(xcr0=0x1B, config=config, bounds=bounds))


@pytest.mark.parametrize("code", BND.values(), ids=BND)
@pytest.mark.parametrize("config", [1, 3])
def test_the_instructions_are_watched_while_it_is_on(code: str, config: int) -> None:
    assert stops(code, state(xcr0=0x1B, config=config))
