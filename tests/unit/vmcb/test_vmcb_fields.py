"""The VMCB's layout and exit codes against numbers typed from the manual's appendix."""

from __future__ import annotations

import itertools

import pytest

from vmcs.vmcb.fields import BY_NAME, FIELDS, IMAGE, Vmcb, packing
from vmcs.vmcb.intercepts import BY_NUMBER, EXIT_CODES, Exit, name_of
from vmcs.vmcb.layouts import CLEAN_BITS, EVENT, VIRTUAL_INTERRUPTS


@pytest.mark.parametrize(
    ("name", "offset", "size"),
    [
        ("PAUSE filter count", 0x3E, 2),
        ("IOPM_BASE_PA", 0x40, 8),
        ("MSRPM_BASE_PA", 0x48, 8),
        ("TSC_OFFSET", 0x50, 8),
        ("guest ASID", 0x58, 4),
        ("TLB_CONTROL", 0x5C, 1),
        ("EXITCODE", 0x70, 8),
        ("EXITINTINFO", 0x88, 8),
        ("EVENTINJ", 0xA8, 8),
        ("N_CR3", 0xB0, 8),
        ("VMCB clean bits", 0xC0, 4),
        ("nRIP", 0xC8, 8),
        ("CS selector", 0x410, 2),
        ("CS attributes", 0x412, 2),
        ("CS limit", 0x414, 4),
        ("CS base", 0x418, 8),
        ("TR base", 0x498, 8),
        ("CPL", 0x4CB, 1),
        ("EFER", 0x4D0, 8),
        ("CR0", 0x558, 8),
        ("RFLAGS", 0x570, 8),
        ("RIP", 0x578, 8),
        ("RSP", 0x5D8, 8),
        ("RAX", 0x5F8, 8),
        ("KernelGsBase", 0x620, 8),
        ("CR2", 0x640, 8),
        ("G_PAT", 0x668, 8),
        ("LASTEXCPTO", 0x690, 8),
    ],
)
def test_place_of_a_field(name: str, offset: int, size: int) -> None:
    assert (BY_NAME[name].offset, BY_NAME[name].size) == (offset, size)


def test_fields_do_not_overlap_and_ascend() -> None:
    for first, second in itertools.pairwise(FIELDS):
        assert first.offset + first.size <= second.offset
    assert [field.encoding for field in FIELDS] == list(range(len(FIELDS)))


def test_every_clean_bit_named_is_one() -> None:
    assert {field.clean for field in FIELDS} - {""} <= set(CLEAN_BITS.by_name)


def test_image_round_trip() -> None:
    vmcb = Vmcb([field.mask - field.encoding for field in FIELDS])
    image = vmcb.to_image()
    assert len(image) == IMAGE.size == 0x698
    assert Vmcb.from_image(image).values == vmcb.values
    rip = BY_NAME["RIP"]
    assert int.from_bytes(image[rip.offset : rip.offset + 8], "little") == vmcb[rip]


def test_packing_of_a_part_starts_at_its_first_field() -> None:
    part = [BY_NAME["CR0"], BY_NAME["RFLAGS"]]
    assert packing(part).pack(1, 2) == bytes([1] + [0] * 23 + [2] + [0] * 7)


def test_assignment_keeps_to_the_width() -> None:
    vmcb = Vmcb()
    vmcb[BY_NAME["CPL"]] = 0x1FF
    assert vmcb[BY_NAME["CPL"]] == 0xFF


@pytest.mark.parametrize(
    ("number", "name", "next_rip"),
    [
        (0x000, "CR0 read", True),
        (0x018, "CR8 write", True),
        (0x037, "DR7 write", True),
        (0x043, "exception #BP", True),
        (0x04E, "exception #PF", False),
        (0x060, "physical interrupt", False),
        (0x072, "CPUID", True),
        (0x07B, "I/O instruction", True),
        (0x07F, "shutdown", False),
        (0x080, "VMRUN", True),
        (0x08C, "MWAIT (armed)", True),
        (0x0A2, "INVPCID", True),
        (0x400, "nested page fault", False),
        (0xFFFF_FFFF_FFFF_FFFF, "VMEXIT_INVALID", False),
    ],
)
def test_exit_code(number: int, name: str, next_rip: bool) -> None:
    assert (BY_NUMBER[number].name, BY_NUMBER[number].saves_next_rip) == (name, next_rip)
    assert name_of(number) == name


def test_exit_codes_are_distinct_and_complete() -> None:
    numbers = [each.number for each in EXIT_CODES]
    assert len(set(numbers)) == len(numbers)
    assert set(Exit) <= set(numbers)
    assert name_of(0xA9) == "0xa9"


def test_layouts_describe() -> None:
    assert VIRTUAL_INTERRUPTS.describe(0xF1_010F_0105) == (
        "V_TPR=0x5, V_IRQ, V_INTR_PRIO=0xf, V_INTR_MASKING, V_INTR_VECTOR=0xf1"
    )
    assert EVENT.describe(0x8000_030D) == "VECTOR=0xd, TYPE=exception, V"
