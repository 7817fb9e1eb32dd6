"""The register transfer in Python and its compiled twin do the same."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtx.engine import layout, native, transfer
from vtx.engine.transfer import RegisterTransfer, Taken, register_transfer
from vtx.x86.state import MASK32, MASK64, DescriptorTable, Segment

NEED_COMPILED = pytest.mark.skipif(transfer._transfer is None, reason="the compiled transfer has not been built")
U64 = st.integers(0, 2**64 - 1)
ARITHMETIC_AND_DF = 0x8D5 | 0x400
SEGMENTS = st.builds(
    Segment, st.integers(0, 0xFFFF), U64, st.integers(0, 2**32 - 1), st.integers(0, 0x1FFFF).map(lambda r: r & 0x1F0FF)
)
CC_OPS = st.sampled_from((1, 6, 9, 14, 20))  # 1: EFLAGS; others compute the flags from cc_dst and cc_src


class Side:
    """One engine with a context, and its transfer."""

    def __init__(self, *, compiled: bool) -> None:
        self.handle, self.context = ctypes.c_void_p(), ctypes.c_void_p()
        native.check(native.library.uc_open(native.ARCH_X86, native.MODE_64, ctypes.byref(self.handle)), "opening")
        native.library.uc_context_alloc(self.handle, ctypes.byref(self.context))
        buffer = (ctypes.c_char * layout.CONTEXT_SIZE).from_address(self.context.value or 0)
        self.image = memoryview(buffer).cast("B")
        self.transfer: RegisterTransfer = register_transfer(
            self.handle, self.context, self.image, allow_compiled=compiled
        )
        self.transfer.save()
        self.transfer.take([0] * 16)

    def put(self, registers: list[int], operation: int, direction: int, hidden: int, base: int) -> None:
        struct.pack_into("<21Q", self.image, layout.GPR, *registers)
        struct.pack_into("<IiI", self.image, layout.CC_OP, operation, direction, hidden)
        struct.pack_into("<Q", self.image, layout.SEGMENTS + layout.SEGMENT.size + 8, base)
        self.transfer.restore()

    def found(self) -> tuple[list[int], Taken]:
        self.transfer.save()
        gprs = [0] * 16
        rest = self.transfer.take(gprs)
        return gprs, rest


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    pair = Side(compiled=False), Side(compiled=True)
    yield pair
    for side in pair:
        side.image.release()
        native.library.uc_context_free(side.context)
        native.library.uc_close(side.handle)


@NEED_COMPILED
@given(
    registers=st.lists(U64, min_size=21, max_size=21),
    operation=CC_OPS,
    direction=st.sampled_from((1, -1)),
    hidden=st.sampled_from((0, layout.CS32, layout.CODE64 | layout.CS32)),
    base=st.integers(0, 2**32 - 1),
    segments=st.lists(SEGMENTS, min_size=8, max_size=8),
    tables=st.lists(st.builds(DescriptorTable, U64, st.integers(0, 0xFFFF)), min_size=2, max_size=2),
    controls=st.lists(U64, min_size=5, max_size=5),
    changes=st.tuples(st.lists(U64, min_size=16, max_size=16), U64, st.integers(0, 2**22 - 1)),
)
def test_twins_agree(
    sides: tuple[Side, Side],
    registers: list[int],
    operation: int,
    direction: int,
    hidden: int,
    base: int,
    changes: tuple[list[int], int, int],
    segments: list[Segment],
    tables: list[DescriptorTable],
    controls: list[int],
) -> None:
    registers[17] &= ~ARITHMETIC_AND_DF
    results = []
    for side in sides:
        side.put(registers, operation, direction, hidden, base)
        first = side.found()
        gprs, rip, rflags = changes
        side.transfer.give(gprs, rip, rflags)
        second = side.found()
        side.transfer.give(first[0], first[1][0], second[1][1])
        third = side.found()
        side.transfer.put_system(*segments, *tables, *controls)
        written = [struct.unpack_from("<Q", side.image, place)[0] for place in layout.CONTROLS]
        assert written == controls
        side.transfer.put(*changes, hidden)
        fourth = side.found()
        results.append((first, second, third, fourth, bytes(side.image[layout.SEGMENTS : layout.SEGMENTS_END])))
    assert results[0] == results[1]
    (gprs, (rip, *_)), (changed, (changed_rip, flags, *_)), third, fourth, image = results[0]
    seen = MASK64 if hidden & layout.CODE64 else MASK32  # outside 64-bit mode there is less of the legacy registers
    legacy = [value & seen for value in changes[0][:8]]
    assert (fourth[0], fourth[1][0], fourth[1][2]) == (legacy + changes[0][8:], changes[1], hidden)
    assert fourth[1][1] & ARITHMETIC_AND_DF == changes[2] & ARITHMETIC_AND_DF
    assert not third[1][5]
    for i, segment in enumerate(segments):
        selector, base, limit, rights = layout.SEGMENT.unpack_from(image, layout.SEGMENT.size * i)
        assert (selector, base, limit) == (segment.selector, segment.base, segment.limit)
        assert rights == (0 if segment.access_rights & 0x1_0000 else (segment.access_rights & 0xF0FF) << 8)
    assert gprs == registers[:16] and rip == registers[16]
    assert changed == changes[0] and changed_rip == changes[1]
    assert flags & ARITHMETIC_AND_DF == changes[2] & ARITHMETIC_AND_DF


@NEED_COMPILED
@pytest.mark.parametrize("wrong", [[0] * 15, (0,) * 16, None, ["x"] * 16, [-1] * 16])
def test_compiled_twin__refuses_what_is_no_register_file(sides: tuple[Side, Side], wrong: object) -> None:
    with pytest.raises((TypeError, OverflowError)):
        sides[1].transfer.give(wrong, 0, 0)  # type: ignore[arg-type]
