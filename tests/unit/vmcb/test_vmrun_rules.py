"""Each consistency check of VMRUN: what it accepts and rejects, its message, its repair."""

from __future__ import annotations

import pytest

from vmcs.vmcb.fields import BY_NAME, Vmcb
from vmcs.vmcb.model import VmrunContext
from vmcs.vmcb.rules import BY_ID, RULES

check, explain = RULES.check, RULES.explain

VALID = {
    "EFER": 0x1D01,
    "CR0": 0x8005_0033,
    "CR3": 0x1000,
    "CR4": 0x20,
    "DR6": 0xFFFF_0FF0,
    "DR7": 0x400,
    "CS attributes": 0x29B,
    "guest ASID": 1,
    "intercept vector 4": 1,
    "G_PAT": 0x0007_0406_0007_0406,
}
NESTED = {"nested paging and encryption control": 1, "N_CR3": 0x2000}
CONTROL = "virtual interrupt control"
AVIC, X2AVIC = {CONTROL: 1 << 31}, {CONTROL: 3 << 30}
BACKING, LOGICAL = "AVIC APIC_BACKING_PAGE pointer", "AVIC LOGICAL_TABLE pointer"
PHYSICAL = "AVIC PHYSICAL_TABLE pointer"
MSR, IOIO = {"intercept vector 3": 1 << 28}, {"intercept vector 3": 1 << 27}


def context(**more: object) -> VmrunContext:
    return VmrunContext(Vmcb(), cr4_reserved=0xFFFF_FFFF_FE08_E000, efer_reserved=0xFFFF_FFFF_FFFF_82FE, **more)  # type: ignore[arg-type]


def with_fields(fields: dict[str, int], **more: object) -> VmrunContext:
    found = context(**more)
    for name, value in (VALID | fields).items():
        found.vmcb[BY_NAME[name]] = value
    return found


# Rule, fields that it accepts, fields that it rejects.
CASES = [
    ("vmrun.efer-svme", {}, {"EFER": 0xD01}),
    ("vmrun.cr0-nw-without-cd", {"CR0": 0xE005_0033}, {"CR0": 0xA005_0033}),
    ("vmrun.cr0-upper", {"CR0": 0xFFFF_FFFF}, {"CR0": 0x1_8005_0033}),
    ("vmrun.cr3-reserved", {"CR3": 0xFFFF_FFFF_FFFF}, {"CR3": 1 << 48}),
    ("vmrun.cr4-reserved", {"CR4": 0x30_0020}, {"CR4": 0x2020}),
    ("vmrun.dr6-upper", {"DR6": 0xFFFF_FFFF}, {"DR6": 1 << 32}),
    ("vmrun.dr7-upper", {"DR7": 0xFFFF_FFFF}, {"DR7": 1 << 63}),
    ("vmrun.efer-reserved", {"EFER": 0x1D01}, {"EFER": 0x1F01}),
    ("vmrun.long-mode-pae", {"EFER": 0x1901, "CR4": 0, "CR0": 0x11}, {"CR4": 0}),
    ("vmrun.long-mode-pe", {"EFER": 0x1000, "CR0": 0x8000_0010}, {"CR0": 0x8005_0032}),
    ("vmrun.cs-l-and-d", {"CS attributes": 0x49B}, {"CS attributes": 0x69B}),
    ("vmrun.vmrun-intercept", {}, {"intercept vector 4": 0xFFFF_FFFE}),
    ("vmrun.msrpm-address", MSR | {"MSRPM_BASE_PA": (1 << 48) - 0x2001}, MSR | {"MSRPM_BASE_PA": (1 << 48) - 0x1FFF}),
    ("vmrun.msrpm-address", {"MSRPM_BASE_PA": 1 << 63}, MSR | {"MSRPM_BASE_PA": 1 << 63}),
    ("vmrun.iopm-address", IOIO | {"IOPM_BASE_PA": (1 << 48) - 0x3000}, IOIO | {"IOPM_BASE_PA": (1 << 48) - 0x2000}),
    ("vmrun.event-type", {"EVENTINJ": 0x8000_0480}, {"EVENTINJ": 0x8000_0500}),
    ("vmrun.event-type", {"EVENTINJ": 0x0000_0700}, {"EVENTINJ": 0x8000_0180}),
    ("vmrun.event-vector", {"EVENTINJ": 0x8000_0300}, {"EVENTINJ": 0x8000_0302}),
    ("vmrun.event-vector", {"EVENTINJ": 0x8000_0020}, {"EVENTINJ": 0x8000_0320}),
    ("vmrun.asid-not-zero", {}, {"guest ASID": 0}),
    (
        "vmrun.virtual-nmi-intercept",
        {"virtual interrupt control": 1 << 26, "intercept vector 3": 2},
        {"virtual interrupt control": 1 << 26},
    ),
    ("vmrun.n-cr3-reserved", NESTED | {"N_CR3": (1 << 48) - 1}, NESTED | {"N_CR3": 1 << 48}),
    ("vmrun.n-cr3-reserved", {"N_CR3": 1 << 48}, NESTED | {"N_CR3": 1 << 63}),
    ("vmrun.g-pat", NESTED, NESTED | {"G_PAT": 0x0007_0406_0007_0306}),
    ("vmrun.g-pat", {"G_PAT": 2}, NESTED | {"G_PAT": 2}),
    ("vmrun.x2avic-without-avic", X2AVIC, {CONTROL: 1 << 30}),
    ("vmrun.avic-last-index", AVIC | {PHYSICAL: 0xFF}, AVIC | {PHYSICAL: 0x100}),
    ("vmrun.avic-last-index", {PHYSICAL: 0x100}, AVIC | {PHYSICAL: 0xFFF}),
    ("vmrun.x2avic-last-index", X2AVIC | {PHYSICAL: 0x1FF}, X2AVIC | {PHYSICAL: 0x200}),
    ("vmrun.avic-backing-page", AVIC | {BACKING: 0xFFFF_FFFF_FFFF}, AVIC | {BACKING: 1 << 48}),
    ("vmrun.avic-backing-page", {BACKING: 1 << 48}, X2AVIC | {BACKING: 1 << 51}),
    ("vmrun.avic-physical-table", X2AVIC | {PHYSICAL: 0xFFFF_FFFF_F000}, AVIC | {PHYSICAL: 1 << 48}),
    ("vmrun.avic-logical-table", X2AVIC | {LOGICAL: 1 << 48}, AVIC | {LOGICAL: 1 << 48}),
]


@pytest.mark.parametrize(("rule", "accepted", "rejected"), CASES)
def test_rule(rule: str, accepted: dict[str, int], rejected: dict[str, int]) -> None:
    assert check(with_fields(accepted)) is None
    bad = with_fields(rejected)
    violation = check(bad)
    assert violation is not None
    assert violation.rule.id == rule
    assert rule in [each.rule.id for each in explain(bad)]
    BY_ID[rule].repair(bad)
    assert BY_ID[rule].holds(bad)


def test_every_rule_has_a_case() -> None:
    elsewhere = {"vmrun.efer-long-mode-unsupported", "vmrun.nested-paging-host"}
    assert {case[0] for case in CASES} | elsewhere == {rule.id for rule in RULES}


def test_nested_paging_needs_paging_of_the_host() -> None:
    bad = with_fields(NESTED, host_paging=False)
    assert [each.rule.id for each in explain(bad)] == ["vmrun.nested-paging-host"]
    BY_ID["vmrun.nested-paging-host"].repair(bad)
    assert explain(bad) == []


def test_processor_without_avic__ignores_its_bits() -> None:
    fields = {CONTROL: 3 << 30, BACKING: 1 << 48, PHYSICAL: 0xFFF, LOGICAL: 1 << 48}
    assert explain(with_fields(fields, avic_supported=False, x2avic_supported=False)) == []
    without_x2 = explain(with_fields({CONTROL: 1 << 30, PHYSICAL: 0x100}, x2avic_supported=False))
    assert without_x2 == []
    both = explain(with_fields({CONTROL: 3 << 30, PHYSICAL: 0x100}, x2avic_supported=False))
    assert [each.rule.id for each in both] == ["vmrun.avic-last-index"]


def test_processor_without_nested_paging_or_virtual_nmis__ignores_their_bits() -> None:
    fields = NESTED | {"N_CR3": 1 << 63, "G_PAT": 2, CONTROL: 1 << 26}
    assert explain(with_fields(fields, nested_paging_supported=False, virtual_nmi_supported=False)) == []
    assert len(explain(with_fields(fields))) == 3


def test_processor_without_long_mode() -> None:
    bad = with_fields({}, long_mode_supported=False)
    assert [each.rule.id for each in explain(bad)] == ["vmrun.efer-long-mode-unsupported"]


def test_message() -> None:
    violation = check(with_fields(NESTED | {"G_PAT": 0x0007_0406_0007_0306}))
    assert str(violation).splitlines() == [
        "vmrun.g-pat: If NP_ENABLE is 1: each byte of G_PAT is a memory type",
        "  outcome: #VMEXIT(VMEXIT_INVALID)",
        "  nested paging and encryption control = 0x1 (NP_ENABLE)",
        "  G_PAT = 0x7040600070306 <- bits 15:8",
        '  see APM Vol. 2, "Secure Virtual Machine", "Nested Paging"',
    ]
