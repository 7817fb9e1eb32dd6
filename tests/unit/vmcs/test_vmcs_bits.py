"""Layouts and predicates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcs import capabilities, instruction_information, layouts, qualifications
from vmcs.bits import (
    MASK64,
    Layout,
    Slice,
    bit_numbers,
    bit_range,
    canonicalize,
    describe_bits,
    is_aligned,
    is_canonical,
    mask,
)

FIELD_LAYOUTS = tuple(value for value in vars(layouts).values() if isinstance(value, Layout))
EVERY_LAYOUT = (
    *FIELD_LAYOUTS,
    *qualifications.LAYOUTS,
    *instruction_information.LAYOUTS,
    capabilities.BASIC,
    capabilities.MISC,
    capabilities.EPT_VPID,
)


@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=lambda layout: layout.name)
@given(st.data())
def test_layout__encode_and_decode_are_inverse(layout: Layout, data: st.DataObject) -> None:
    value = data.draw(st.integers(0, mask(layout.width)))
    parts = layout.decode(value)
    assert list(parts) == [part.name for part in layout.slices]
    assert layout.encode(parts) == value & ~layout.reserved
    assert layout.decode(layout.encode(parts)) == parts


@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=lambda layout: layout.name)
def test_layout__slices_and_reserved_bits_tile_the_value(layout: Layout) -> None:
    assert layout.defined | layout.reserved == mask(layout.width)
    assert not layout.defined & layout.reserved
    assert sum(part.mask for part in layout.slices) == layout.defined


def test_layout__refuses_overlap_and_overflow() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Layout("twice", 8, (Slice("low", 0, 4), Slice("middle", 3, 2)))
    with pytest.raises(ValueError, match="outside"):
        Layout("beyond", 8, (Slice("high", 7, 2),))


def test_layout__refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="RPL is 2 bits wide, 0x4 does not fit"):
        layouts.SELECTOR.encode(RPL=4)
    with pytest.raises(KeyError):
        layouts.SELECTOR.encode(XPL=1)


def test_layout__describes_values() -> None:
    assert layouts.SELECTOR.describe(0) == "0"
    assert layouts.SELECTOR.describe(0x2B) == "RPL=0x3, index=0x5"
    assert layouts.ACTIVITY_STATE.describe(1) == "state=HLT"
    assert layouts.ACTIVITY_STATE.describe(9) == "state=reserved 0x9"
    assert layouts.INTERRUPTIBILITY_STATE.describe(0x22) == "blocking by MOV SS, reserved bit 5"
    assert (
        layouts.ENTRY_INTERRUPTION_INFORMATION.describe(0x8000_0B0D)
        == "vector=0xd, type=hardware exception, deliver error code, valid"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, ""),
        (1, "bit 0"),
        (0x3, "bits 1:0"),
        (0x5, "bits 2 and 0"),
        (0xFFFF_F081, "bits 31:12, 7 and 0"),
        (1 << 63, "bit 63"),
    ],
)
def test_describe_bits__lists_runs(value: int, text: str) -> None:
    assert describe_bits(value) == text


@given(st.integers(0, MASK64))
def test_bit_numbers__sum_to_the_value(value: int) -> None:
    assert sum(1 << number for number in bit_numbers(value)) == value


@pytest.mark.parametrize(
    ("address", "width", "canonical"),
    [
        (0, 48, True),
        (0x0000_7FFF_FFFF_FFFF, 48, True),
        (0x0000_8000_0000_0000, 48, False),
        (0xFFFF_7FFF_FFFF_FFFF, 48, False),
        (0xFFFF_8000_0000_0000, 48, True),
        (0x0000_8000_0000_0000, 57, True),
        (0x0100_0000_0000_0000, 57, False),
        (0xFEFF_FFFF_FFFF_FFFF, 57, False),
        (0xFF00_0000_0000_0000, 57, True),
    ],
)
def test_is_canonical__at_the_edges(address: int, width: int, canonical: bool) -> None:
    assert is_canonical(address, width) is canonical


@given(st.integers(0, MASK64), st.sampled_from((48, 57)))
def test_canonicalize__gives_the_canonical_address_with_the_same_low_bits(address: int, width: int) -> None:
    result = canonicalize(address, width)
    assert is_canonical(result, width)
    assert result & mask(width) == address & mask(width)
    assert (result == address) is is_canonical(address, width)


def test_masks() -> None:
    assert mask(0) == 0
    assert bit_range(11, 8) == 0xF00
    assert bit_range(63, 0) == MASK64
    assert is_aligned(0x3000, 4096)
    assert not is_aligned(0x3008, 16)
