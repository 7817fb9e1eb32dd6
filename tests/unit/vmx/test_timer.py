"""The VMX-preemption timer counts when bit X of the TSC changes, whatever the bits below it are.

Spec: SDM Vol. 3, "VMX-Preemption Timer".
"""

from __future__ import annotations

import pytest

from vtx.vmx.timer import deadline, remaining


@pytest.mark.parametrize(
    ("tsc", "value", "shift", "expiry"),
    [
        (0x27, 2, 0, 0x29),
        (0x27, 2, 5, 0x60),  # bit 5 changes at 40H and at 60H
        (0x20, 2, 5, 0x60),
        (0x3F, 1, 5, 0x40),
        (0x27, 0, 5, 0x20),  # expired at once
    ],
)
def test_deadline(tsc: int, value: int, shift: int, expiry: int) -> None:
    assert deadline(tsc, value, shift) == expiry


@pytest.mark.parametrize(("tsc", "value"), [(0x27, 2), (0x3F, 2), (0x40, 1), (0x5F, 1), (0x60, 0), (0x1000, 0)])
def test_remaining(tsc: int, value: int) -> None:
    assert remaining(tsc, 0x60, 5) == value
