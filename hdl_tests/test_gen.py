"""The generated package is the one in the repository, and the packing of records is faithful."""

from __future__ import annotations

from random import Random

import pytest

from hdl_tests.gen.gen_pkg import PACKAGE, package_text
from hdl_tests.gen.layout import lanes, pack, unpack, width
from hdl_tests.gen.vmx_mode import REGIONS, Request, Response, State


def test_package__matches_the_declarations():
    assert PACKAGE.read_text() == package_text(), "run: python -m hdl_tests.gen.gen_pkg"


@pytest.mark.parametrize("record", [Request, State, Response])
def test_pack__is_the_inverse_of_unpack(record):
    random = Random(1)
    for _ in range(200):
        packed = random.getrandbits(width(record))
        assert pack(unpack(record, packed)) == packed


def test_pack__puts_the_first_member_on_top_and_lane_0_at_the_bottom():
    assert pack(Request(operation=15)) == 0xF << (width(Request) - 4)
    assert pack(State(exit_reason=(0x12, 0, 0, 0x34))) == 0x3400_0012


@pytest.mark.parametrize("record", [Request(cpl=4), State(launched=(2, 0, 0, 0))])
def test_pack__rejects_what_does_not_fit(record):
    with pytest.raises(ValueError, match="does not fit"):
        pack(record)


def test_records__fill_whole_bytes():
    assert width(Request) % 8 == width(Response) % 8 == 0


def test_lanes__default_to_zero():
    assert lanes(REGIONS, 8, "")._default == (0,) * REGIONS
