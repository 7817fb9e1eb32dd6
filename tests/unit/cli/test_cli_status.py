"""From the value a guest wrote to the status of the process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtx.cli.status import ExitConvention, guest_status

VALUES = st.integers(0, (1 << 32) - 1)


@given(VALUES)
def test_by_value__zero_means_pass_and_nothing_else_does(value: int) -> None:
    status = guest_status(value, ExitConvention.VALUE)
    assert 0 <= status <= 255
    assert (status == 0) == (value == 0)


@pytest.mark.parametrize(("value", "status"), [(1, 1), (255, 255), (0x1FF, 255), (0x100, 255), (0x8000_0000, 255)])
def test_by_value__low_byte(value: int, status: int) -> None:
    assert guest_status(value, ExitConvention.VALUE) == status


@given(VALUES)
def test_qemu__is_never_zero(value: int) -> None:
    status = guest_status(value, ExitConvention.QEMU)
    assert status & 1
    assert status <= 255


def test_qemu__kvm_unit_tests_pass_and_fail() -> None:
    assert [guest_status(value, ExitConvention.QEMU) for value in (0, 1)] == [1, 3]
