"""Clean bits that are not true: reported, group by group, and without effect."""

from __future__ import annotations

from collections import Counter

import pytest
from svm_machine import Machine

from vmcs.vmcb.fields import FIELDS
from vmcs.vmcb.layouts import CLEAN_BITS
from vtx import events as e
from vtx.svm.clean_bits import changed_though_clean
from vtx.svm.record import Vmexit
from vtx.svm.tracing import SvmTracing

CLEAN = "VMCB clean bits"


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        ("CR intercepts", 0),
        ("TSC_OFFSET", 0),
        ("MSRPM_BASE_PA", 1),
        ("guest ASID", 2),
        ("virtual interrupt control", 3),
        ("N_CR3", 4),
        ("G_PAT", 4),
        ("CR3", 5),
        ("EFER", 5),
        ("DR7", 6),
        ("GDTR base", 7),
        ("CS attributes", 8),
        ("CPL", 8),
        ("CR2", 9),
        ("BR_FROM", 10),
        ("AVIC APIC_BAR", 11),
        ("RIP", None),
        ("EVENTINJ", None),
        ("FS base", None),
    ],
)
def test_groups(name: str, bit: int | None) -> None:
    (field,) = (each for each in FIELDS if each.name == name)
    before = [0] * len(FIELDS)
    for clean in range(12):
        now = list(before)
        now[field.encoding] = 1
        now[next(each.encoding for each in FIELDS if each.name == CLEAN)] = 1 << clean
        assert changed_though_clean(before, now) == ((field,) if clean == bit else ())


def test_every_group_has_fields() -> None:
    groups = {field.clean for field in FIELDS} - {""}
    assert groups == set(CLEAN_BITS.by_name) - {"CET"}


class TracedProcessor:
    index = 0

    def __init__(self, machine: Machine) -> None:
        self.svm, self.state = machine.svm, machine.state

    def now(self) -> int:
        return 5


class Collector:
    def __init__(self) -> None:
        self.events: list[e.TraceEvent] = []

    def emit(self, event: e.TraceEvent) -> None:
        self.events.append(event)


def run_twice(clean: int, **changes: int) -> tuple[Machine, list[e.TraceEvent]]:
    machine, collector = Machine(), Collector()
    machine.svm.operation.observer = SvmTracing(TracedProcessor(machine), Counter(), collector)
    machine.run()
    machine.svm.exit(Vmexit(0x72))
    machine.state.gif = True
    machine.fields |= changes | {CLEAN: clean}
    machine.run()
    return machine, [event for event in collector.events if isinstance(event, e.VmcbChangedThoughClean)]


def test_the_new_value_counts_and_is_reported() -> None:
    machine, events = run_twice(1 << 5, CR3=0x20000)
    assert machine.state.cr3 == 0x20000
    assert events == [e.VmcbChangedThoughClean(0, 5, 0x2000, (e.FieldValue("CR3", 0x20000, 0x30000),))]


@pytest.mark.parametrize(("clean", "changes"), [(0, {"CR3": 0x20000}), (0xFFF, {"RIP": 0x4010}), (0xFFF, {})])
def test_nothing_to_report(clean: int, changes: dict[str, int]) -> None:
    assert run_twice(clean, **changes)[1] == []


def test_another_control_block_has_no_past() -> None:
    machine, collector = Machine(), Collector()
    machine.svm.operation.observer = SvmTracing(TracedProcessor(machine), Counter(), collector)
    machine.fields["guest ASID"] = 0
    machine.run()  # fails: nothing is cached
    machine.fields |= {"guest ASID": 1, CLEAN: 0xFFF}
    machine.run()
    assert not any(isinstance(event, e.VmcbChangedThoughClean) for event in collector.events)
