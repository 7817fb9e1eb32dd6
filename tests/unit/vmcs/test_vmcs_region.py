"""A VMCS: reading, writing, change tracking and the image of its region."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmcs_baseline import FULL, FULL_MSRS, OLD, REVISION, long_mode_guest

from vmcs import fields as f
from vmcs import rules
from vmcs.bits import MASK64
from vmcs.capabilities import Capabilities
from vmcs.fields import FIELDS
from vmcs.region import IMAGE_SIZE, LaunchState, Vmcs, image_size, slots
from vmcs.rules import EntryContext


def test_fresh__is_zero_and_clear() -> None:
    vmcs = Vmcs(FULL)
    assert all(vmcs[field] == 0 for field in FIELDS)
    assert vmcs.launch_state is LaunchState.CLEAR
    assert not vmcs.shadow
    assert set(vmcs.changed) == {field.encoding for field in FIELDS}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_write__cuts_to_the_width(field: f.Field) -> None:
    vmcs = Vmcs(FULL)
    assert vmcs.write(field.encoding, MASK64)
    assert vmcs.read(field.encoding) == field.mask
    assert vmcs[field] == field.mask


@given(st.sampled_from(FIELDS), st.integers(0, MASK64))
def test_write_then_read__gives_the_value_back(field: f.Field, value: int) -> None:
    vmcs = Vmcs(FULL)
    assert vmcs.write(field.encoding, value)
    assert vmcs.read(field.encoding) == value & field.mask


@given(st.sampled_from([field for field in FIELDS if field.high]), st.integers(0, MASK64), st.integers(0, MASK64))
def test_high_access__touches_the_upper_half_only(field: f.Field, value: int, upper: int) -> None:
    vmcs = Vmcs(FULL)
    assert field.high is not None
    vmcs[field] = value
    assert vmcs.read(field.high) == value >> 32
    assert vmcs.write(field.high, upper)
    assert vmcs[field] == (upper & 0xFFFF_FFFF) << 32 | value & 0xFFFF_FFFF


@pytest.mark.parametrize("encoding", [0x0001, 0x4001, 0x681F, 0x203C, 0x1000, 0x8000, 1 << 15, 1 << 32, MASK64])
def test_unknown_encoding__is_refused(encoding: int) -> None:
    vmcs = Vmcs(FULL)
    vmcs.changed.clear()
    assert vmcs.read(encoding) is None
    assert not vmcs.write(encoding, 1)
    assert not vmcs.changed


def test_absent_field__is_refused_on_a_processor_without_it() -> None:
    vmcs = Vmcs(OLD)
    assert vmcs.read(f.EPT_POINTER.encoding) is None
    assert vmcs.read(f.EPT_POINTER.encoding | 1) is None
    assert not vmcs.write(f.EPT_POINTER.encoding, 5)
    assert vmcs[f.EPT_POINTER] == 0


def test_changed__collects_differing_bits() -> None:
    vmcs = Vmcs(FULL)
    vmcs.changed.clear()
    vmcs[f.GUEST_RIP] = 0
    assert vmcs.changed == {}
    vmcs[f.GUEST_RIP] = 5
    vmcs[f.GUEST_RIP] = 4
    vmcs.write(f.TSC_OFFSET.encoding | 1, 1)
    assert vmcs.changed == {f.GUEST_RIP.encoding: 5, f.TSC_OFFSET.encoding: 1 << 32}


def random_vmcs(seed: int, capabilities: Capabilities) -> Vmcs:
    generator = random.Random(seed)
    vmcs = Vmcs(capabilities)
    for field in FIELDS:
        if capabilities.has(field):
            vmcs[field] = generator.getrandbits(64)
    vmcs.launch_state = LaunchState(generator.randrange(2))
    vmcs.shadow = bool(generator.randrange(2))
    vmcs.abort_indicator = generator.randrange(7)
    return vmcs


@pytest.mark.parametrize("capabilities", [FULL, OLD], ids=["full", "old"])
@given(seed=st.integers(0, 2**32))
def test_image__round_trip_is_exact(capabilities: Capabilities, seed: int) -> None:
    vmcs = random_vmcs(seed, capabilities)
    image = vmcs.to_image()
    assert len(image) == capabilities.region_size
    again = Vmcs.from_image(image, capabilities)
    assert again.values == vmcs.values
    assert again.launch_state is vmcs.launch_state
    assert (again.shadow, again.abort_indicator) == (vmcs.shadow, vmcs.abort_indicator)
    assert again.to_image() == image


def test_image__begins_as_the_manual_says() -> None:
    vmcs = long_mode_guest()
    vmcs.shadow, vmcs.abort_indicator = True, 4
    image = vmcs.to_image()
    assert int.from_bytes(image[:4], "little") == 1 << 31 | REVISION
    assert int.from_bytes(image[4:8], "little") == 4


@pytest.mark.parametrize("capabilities", [FULL, OLD], ids=["full", "old"])
def test_slots__are_aligned_disjoint_and_inside(capabilities: Capabilities) -> None:
    end = 16
    for encoding, offset, size in slots(capabilities):
        assert offset == end
        assert offset % size == 0
        assert size * 8 == f.BY_ENCODING[encoding].bits
        end = offset + size
    assert end == image_size(capabilities) <= capabilities.region_size
    assert {encoding for encoding, _, _ in slots(capabilities)} == {
        field.encoding for field in FIELDS if capabilities.has(field)
    }


def test_image_size__is_largest_with_every_field() -> None:
    assert image_size(OLD) < image_size(FULL) == IMAGE_SIZE


def test_slots__refuse_a_region_too_small() -> None:
    small = Capabilities({**FULL_MSRS, 0x480: REVISION | 1024 << 32})
    with pytest.raises(ValueError, match="IA32_VMX_BASIC reports 1024"):
        slots(small)


@given(st.binary(max_size=5000))
def test_from_image__any_bytes_give_a_harmless_vmcs(image: bytes) -> None:
    vmcs = Vmcs.from_image(image, FULL)
    assert set(vmcs.values) == {field.encoding for field in FIELDS}
    for field in FIELDS:
        assert 0 <= vmcs[field] <= field.mask
    assert vmcs.launch_state in (LaunchState.CLEAR, LaunchState.LAUNCHED)
    # And every rule can look at it.
    for violation in rules.explain(EntryContext(vmcs, FULL)):
        assert violation.render()


@pytest.mark.parametrize("state", [2, 0x1_0001, 0xFFFF_FFFF])
def test_from_image__unknown_launch_state_counts_as_clear(state: int) -> None:
    image = bytearray(long_mode_guest().to_image())
    image[8:12] = (state & 0xFFFF_FFFF).to_bytes(4, "little")
    assert Vmcs.from_image(bytes(image), FULL).launch_state is LaunchState.CLEAR


def test_copy__is_independent() -> None:
    vmcs = long_mode_guest()
    other = vmcs.copy()
    assert other.values == vmcs.values
    other[f.GUEST_RIP] = 1
    assert vmcs[f.GUEST_RIP] == 0x10_0000
