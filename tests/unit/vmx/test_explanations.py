"""Explanations of failures as they happen: every rule of the VMX instructions, VM entries, EPT misconfigurations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from vmx_machine import REGION_B, VMXON_REGION, FakeProcessor, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs import instruction_rules
from vmcs.explanation import Explanation
from vmcs.fields import Field
from vtx.addresses import GuestPhysicalAddress, LinearAddress
from vtx.cli.failures import Failures
from vtx.vmx import Vmx
from vtx.vmx.ept import EptConfig, EptMisconfiguration, ExtendedPageTables
from vtx.vmx.explanations import explain_misconfiguration
from vtx.vmx.tracing import VmxTracing
from vtx.x86.memory import PhysicalMemory
from vtx.x86.profile import build_profile, profile_document
from vtx.x86.second_level import AccessKind


class Watched:
    """A processor in VMX root operation without a current VMCS, whose failures are explained."""

    def __init__(self, profile: str = "skylake-server", without: dict[str, list[str]] | None = None) -> None:
        document = profile_document(profile)
        for key, names in (without or {}).items():
            document["vmx"][key] = [name for name in document["vmx"][key] if name not in names]
        self.processor, self.vmx = make_vmx(build_profile("test", document))
        self.explanations: list[Explanation] = []
        self.processor.vmx = self.vmx  # type: ignore[attr-defined]
        self.vmx.operation.observer = VmxTracing(self.processor, Counter(), None, self.take)  # type: ignore[arg-type]

    def take(self, rule: str, explain: Callable[[], Explanation]) -> None:
        explanation = explain()
        assert explanation.id.startswith(rule)
        self.explanations.append(explanation)

    @property
    def only(self) -> Explanation:
        (explanation,) = self.explanations
        return explanation

    def start(self) -> None:
        prepare(self.vmx)


Step = Callable[[FakeProcessor, Vmx], object]

# Rule, whether there is a current VMCS, what to do, and what the explanation says: value, bits at fault, legal.
INSTRUCTIONS: list[tuple[str, bool, Step, int | None, int, str]] = [
    ("vm-instruction.current-vmcs", False, lambda p, v: v.vmread(f.GUEST_RIP), None, 0, ""),
    ("vmxon.address", False, lambda p, v: v.vmxon(0x1_0000_0000_1008), 0x1_0000_0000_1008, 1 << 48 | 8, "11:0 are 0"),
    ("vmxon.outside-vmx-operation", True, lambda p, v: v.vmxon(VMXON_REGION), None, 0, ""),
    ("vmcall.dual-monitor", True, lambda p, v: v.vmcall(), None, 0, ""),
    ("vmclear.address", True, lambda p, v: v.vmclear(0x3800), 0x3800, 0x800, "bits 63:46 and 11:0 are 0"),
    ("vmclear.not-vmxon-pointer", True, lambda p, v: v.vmclear(VMXON_REGION), VMXON_REGION, 0, ""),
    ("vmptrld.address", True, lambda p, v: v.vmptrld(1 << 46), 1 << 46, 1 << 46, "bits 63:46 and 11:0 are 0"),
    ("vmptrld.not-vmxon-pointer", True, lambda p, v: v.vmptrld(VMXON_REGION), VMXON_REGION, 0, ""),
    ("vmread-vmwrite.field-exists", True, lambda p, v: v.vmread(0x0FFE), 0x0FFE, 0, "the manual's appendix lists"),
    ("vmread-vmwrite.field-exists", True, lambda p, v: v.vmread(0x681D), 0x681D, 0, "only 64-bit fields"),
    ("vmread-vmwrite.field-exists", True, lambda p, v: v.vmwrite(1 << 15, 0), 1 << 15, 0, "with bits 31:15 and bit 12"),
    ("vmread-vmwrite.field-exists", True, lambda p, v: v.vmread(0x2030), 0x2030, 0, '"sub-page write permissions'),
    ("invept.type", True, lambda p, v: v.invept(3), 3, 0, "1 (single-context INVEPT), 2 (all-context INVEPT)"),
    ("invept.eptp", True, lambda p, v: v.invept(1, 0x1016), 0x1016, 0, "bits 5:3 of EPT pointer are 0x3"),
    ("invvpid.type", True, lambda p, v: v.invvpid(4), 4, 0, "0 (individual-address INVVPID), 1 (single"),
    ("invvpid.descriptor-reserved", True, lambda p, v: v.invvpid(1, 0x1_0001), 0x1_0001, 0x1_0000, ""),
    ("invvpid.vpid-not-zero", True, lambda p, v: v.invvpid(1, 0), 0, 0, ""),
    (
        "invvpid.linear-address",
        True,
        lambda p, v: v.invvpid(0, 1, 1 << 47),
        1 << 47,
        0,
        "a canonical address of 48 bits",
    ),
]


@pytest.mark.parametrize(("rule", "current", "step", "value", "at_fault", "legal"), INSTRUCTIONS)
def test_instruction__explains(
    rule: str, current: bool, step: Step, value: int | None, at_fault: int, legal: str
) -> None:
    watched = Watched()
    if current:
        watched.start()
    elif rule != "vmxon.address":
        watched.vmx.vmxon(VMXON_REGION)
    step(watched.processor, watched.vmx)
    explanation = watched.only
    assert explanation.id == rule
    findings = [(each.value, each.at_fault) for each in explanation.findings]
    assert findings == ([] if value is None else [(value, at_fault)])
    assert legal in explanation.legal
    assert bool(legal) == bool(explanation.legal)


@pytest.mark.parametrize(("word", "at_fault"), [(0, 0x5654_5801), (0x5654_5800, 1)])
def test_vmptrld__explains_the_revision(word: int, at_fault: int) -> None:
    watched = Watched()
    watched.start()
    watched.processor.memory.write_u32(REGION_B, word)
    watched.vmx.vmptrld(REGION_B)
    assert watched.only.id == "vmptrld.revision"
    assert [(each.value, each.at_fault) for each in watched.only.findings] == [(word, at_fault)]
    assert watched.only.legal == "0x56545801"
    assert watched.only.outcome == "VMfailValid(11)"


def test_vmxon__explains_the_revision() -> None:
    watched = Watched()
    watched.processor.memory.write_u32(VMXON_REGION, 0x5654_5803)
    watched.vmx.vmxon(VMXON_REGION)
    assert watched.only.id == "vmxon.revision"
    assert watched.only.findings[0].at_fault == 2
    assert watched.only.outcome == "VMfailInvalid"


def test_vmwrite__explains_a_read_only_field() -> None:
    watched = Watched("nehalem-server")
    watched.start()
    watched.vmx.vmwrite(f.EXIT_REASON, 0)
    assert watched.only.id == "vmwrite.field-writable"
    assert watched.only.findings[0].text == "0x4402 (Exit reason)"


def test_shadowed_vmread__explains_that_there_is_no_linked_vmcs() -> None:
    watched = Watched()
    prepare(
        watched.vmx,
        c.VMCS_SHADOWING,
        fields={f.VMREAD_BITMAP_ADDRESS: 0x1_4000, f.VMWRITE_BITMAP_ADDRESS: 0x1_5000},
    )
    watched.vmx.vmlaunch()
    watched.processor.state.segments[2].selector = 0
    watched.vmx.vmread(f.GUEST_RIP)
    assert watched.only.id == "vm-instruction.linked-vmcs"


def test_instruction_rules__are_all_explained_here() -> None:
    tested = {row[0] for row in INSTRUCTIONS} | {
        "vmptrld.revision",
        "vmxon.revision",
        "vmwrite.field-writable",
        "vm-instruction.linked-vmcs",
    }
    assert tested == {rule.id for rule in instruction_rules.RULES}


@pytest.mark.parametrize(
    ("fields", "rule", "outcome"),
    [
        ({f.CR3_TARGET_COUNT: 5}, "controls.cr3-target-count", "VMfailValid(7)"),
        ({f.HOST_TR_SELECTOR: 0}, "host.tr-not-null", "VMfailValid(8)"),
        (
            {f.GUEST_RFLAGS: 0},
            "guest.rflags-fixed",
            "VM-entry failure due to invalid guest state, exit qualification 0",
        ),
        (
            {f.VM_ENTRY_MSR_LOAD_COUNT: 1, f.VM_ENTRY_MSR_LOAD_ADDRESS: 0x1_6000},
            "msr-load.wrmsr",
            "VM-entry failure due to MSR loading, exit qualification 1",
        ),
    ],
)
def test_entry__explains(fields: dict[Field, int], rule: str, outcome: str) -> None:
    watched = Watched()
    prepare(watched.vmx, fields=fields)
    watched.vmx.vmlaunch()
    assert (watched.only.id, watched.only.outcome) == (rule, outcome)
    if not rule.startswith("msr"):
        assert watched.only.legal
        assert dict(watched.only.example)


def test_entry__without_a_current_vmcs() -> None:
    watched = Watched()
    watched.vmx.vmxon(VMXON_REGION)
    watched.vmx.vmlaunch()
    assert (watched.only.id, watched.only.outcome) == ("basic.current-vmcs", "VMfailInvalid")


def test_entry__in_the_wrong_launch_state() -> None:
    watched = Watched()
    prepare(watched.vmx)
    watched.vmx.vmresume()
    assert (watched.only.id, watched.only.outcome) == ("basic.resume-needs-launched", "VMfailValid(5)")


EPT = 0x10000


@pytest.mark.parametrize(
    ("level", "entry", "more", "rule", "at_fault", "legal"),
    [
        (3, 0x9002, {}, "permissions", 2, "bits 2:0: all 0, or bit 0 is 1, or only bits of bit 2 are 1"),
        (3, 0x9004, {"execute_only": False}, "permissions", 4, "bits 2:0: all 0, or bit 0 is 1"),
        (
            3,
            0x9406,
            {"mode_based_execute": True},
            "permissions",
            0x406,
            "bits 10 and 2:0: all 0, or bit 0 is 1, or only",
        ),
        (3, 1 << 46 | 0x9007, {}, "reserved-bits", 1 << 46, "bits 51:46 of this EPT PTE are 0"),
        (2, 0x1_3087, {"page_2mb": False}, "reserved-bits", 0x80, "bits 51:46 and 7:3 of this EPT PDE are 0"),
        (2, 0x20_1087, {}, "reserved-bits", 0x1000, "bits 51:46 and 20:12 of this EPT PDE are 0"),
        (1, 0x1_200F, {}, "reserved-bits", 8, "bits 51:46 and 6:3 of this EPT PDPTE are 0"),
        (3, 0x9017, {}, "memory-type", 0x38, "bits 5:3: 0, 1, 4, 5, 6"),
    ],
)
def test_misconfiguration__explains(
    level: int, entry: int, more: dict[str, bool], rule: str, at_fault: int, legal: str
) -> None:
    memory = PhysicalMemory(1 << 20)
    for number in range(3):
        memory.write_u64(EPT + 0x1000 * number, EPT + 0x1000 * (number + 1) | 7)
    memory.write_u64(EPT + 0x1000 * level, entry)
    config = EptConfig(EPT | 0x1E, 46, **more)
    fault = ExtendedPageTables(config, memory).translate(
        GuestPhysicalAddress(0), AccessKind.READ, LinearAddress(0x123), 0
    )
    assert isinstance(fault, EptMisconfiguration)
    explanation = explain_misconfiguration(config, fault)
    assert explanation.id == f"ept-misconfiguration.{rule}"
    assert [(each.value, each.at_fault) for each in explanation.findings] == [(0, 0), (entry, at_fault)]
    assert explanation.findings[1].text == f"{entry:#x} at {EPT + 0x1000 * level:#x}"
    assert explanation.legal.startswith(legal)


def test_misconfiguration__is_explained_before_its_exit() -> None:
    watched = Watched()
    prepare(watched.vmx, c.ENABLE_EPT, fields={f.EPT_POINTER: EPT | 0x1E})
    watched.vmx.vmlaunch()
    watched.processor.memory.write_u64(EPT, 2)
    second_level = watched.vmx.operation.current.second_level  # type: ignore[union-attr]
    assert isinstance(second_level, ExtendedPageTables)
    fault = second_level.translate(GuestPhysicalAddress(0), AccessKind.READ, LinearAddress(0), 0)
    assert isinstance(fault, EptMisconfiguration)
    assert watched.vmx.second_level_fault(fault, None)
    assert watched.only.id == "ept-misconfiguration.permissions"


# ---- how many explanations a run gives


def failing(text: str) -> Callable[[], Explanation]:
    return lambda: Explanation("a.rule", text, "VMfailValid(7)", "SDM")


def test_failures__repeat_nothing_and_count_everything() -> None:
    shown: list[str] = []
    failures = Failures(shown.append)
    for text in ("one", "one", "two", "one", "three", "four"):
        failures.take("a.rule", failing(text))
    assert [text.partition("\n")[0] for text in shown] == ["a.rule: one", "a.rule: two", "a.rule: three"]
    (report,) = failures.to_json()
    assert (report["id"], report["count"]) == ("a.rule", 6)
    assert len(report["explanations"]) == 3  # type: ignore[arg-type]


def test_failures__are_no_longer_explained_when_a_guest_fails_for_ever() -> None:
    failures = Failures()
    calls = 0

    def explain() -> Explanation:
        nonlocal calls
        calls += 1
        return failing("the same")()

    for _ in range(10_000):
        failures.take("a.rule", explain)
    assert failures.counts["a.rule"] == 10_000
    assert calls < 100
