"""Classes that an experiment decides: what each takes a VMCB for, and that nothing else passes for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmcs.vmcb.fields import BY_NAME
from vtx.fuzz import readings
from vtx.fuzz.compare import disagreement
from vtx.fuzz.drawing import State
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.case import Case, case_of
from vtx.fuzz.vmruns.experiment import ORACLES, experiment
from vtx.fuzz.vmruns.known import KNOWN
from vtx.fuzz.vmruns.programs import PROGRAMS, SLOT
from vtx.fuzz.vmruns.results import Result

IRQ, NESTED = "virtual interrupt control", "nested paging and encryption control"
NAMES = [base.name for base in scene.BASES]
FIELDS = {each.name: each for each in scene.BY_ENCODING.values()}
HALTED, GP, UD, CPUID = (Result("exit", code) for code in (0x78, 0x4D, 0x46, 0x72))
Behaviour = Callable[[dict[str, int]], Result]


def at(program: str, origin: int = scene.CODE) -> dict[str, int]:
    number = next(number for number, each in enumerate(PROGRAMS) if each.name == program)
    return {"RIP": origin + number * SLOT}


def state_of(fields: dict[str, int], base: str = "64-bit") -> State:
    number = NAMES.index(base)
    values = scene.fields_of(scene.BASES[number])
    changed = {FIELDS[name]: value for name, value in fields.items() if values[FIELDS[name]] != value}
    return State(number, tuple((each.encoding, changed[each]) for each in values if each in changed))


def classes(
    monkeypatch: pytest.MonkeyPatch, oracle: str, state: State, ours: Behaviour, theirs: Behaviour
) -> list[str] | None:
    """The classes that explain ``state``, None if they do not, for two processors that behave as said."""
    generator = ORACLES[oracle].generator(0)
    what = experiment(generator)

    def result(runner: Any, each: State) -> Result:
        named = {field.name: value for field, value in generator.fields(each).items()}
        return runner(named)  # type: ignore[no-any-return]

    def run(_: object, states: list[State], runner: Any) -> tuple[dict[int, Result], None]:
        return {number: result(runner, each) for number, each in enumerate(states)}, None

    monkeypatch.setattr(readings, "run", run)
    one, other = result(ours, state), result(theirs, state)
    differing = what.differences(state, one, other)
    assert differing
    found = [disagreement(generator, state, one, other, differing)]
    outcome = readings.explain(what, KNOWN[oracle], case_of(generator), found, ours, theirs)  # type: ignore[arg-type]
    assert len(outcome.unexplained) + bool(outcome.explained) == 1
    return None if outcome.unexplained else [each.id for each in outcome.explained]


def by_level(name: str) -> Behaviour:
    """CPUID at privilege level 0 by the field ``name``, else #GP; the register that it leaves tells the level."""
    shift = 5 if name == "SS attributes" else 0
    return lambda fields: GP if fields[name] >> shift & 3 else CPUID


def changed(result: Result, **words: int) -> Result:
    pairs = tuple((FIELDS[name].offset, value) for name, value in words.items())
    return Result(result.kind, result.code, changed=pairs)


LEVEL_1 = state_of({"CPL": 1})


def test_the_other_takes_a_state_for_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classes(monkeypatch, "qemu", LEVEL_1, by_level("CPL"), by_level("SS attributes")) == ["privilege-level"]


def test_what_the_reading_does_not_lead_to_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(fields: dict[str, int]) -> Result:
        return changed(CPUID, RBX=5)

    assert classes(monkeypatch, "qemu", LEVEL_1, by_level("CPL"), theirs) is None


def test_what_another_class_knows_of_may_differ_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of({"CPL": 1, "SFMASK": 1 << 40})

    def ours(fields: dict[str, int]) -> Result:
        return changed(GP if fields["CPL"] else CPUID, SFMASK=0)

    found = classes(monkeypatch, "qemu", state, ours, by_level("SS attributes"))
    assert found == ["privilege-level", "msr-widths"]


def test_a_field_that_neither_touches_does_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classes(
        monkeypatch, "qemu", LEVEL_1, lambda fields: changed(GP if fields["CPL"] else CPUID), lambda _: CPUID
    )


def limit_of(mask: int) -> Behaviour:
    """#GP if the IDT is too short, by the bits of its limit in ``mask``."""
    return lambda fields: GP if fields["IDTR limit"] & mask < 0xFF else HALTED


SHORT = state_of({"IDTR limit": 0x1_0010})


def test_we_take_a_state_for_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classes(monkeypatch, "qemu", SHORT, limit_of(0xFFFF), limit_of(0xFFFF_FFFF)) == ["table-limits"]


def test_if_we_do_not_it_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(fields: dict[str, int]) -> Result:
        return UD if fields["IDTR limit"] > 0xFFFF else limit_of(0xFFFF)(fields)

    assert classes(monkeypatch, "qemu", SHORT, ours, limit_of(0xFFFF_FFFF)) is None


def test_nor_if_the_other_disagrees_on_that_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classes(monkeypatch, "qemu", SHORT, limit_of(0xFFFF), lambda _: HALTED) is None


def test_two_readings_together(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of({"CPL": 1, "IDTR limit": 0x1_0010})

    def model(level: str, limit: int) -> Behaviour:
        return lambda fields: changed(limit_of(limit)(fields), RAX=by_level(level)(fields).code)

    found = classes(monkeypatch, "qemu", state, model("CPL", 0xFFFF), model("SS attributes", 0xFFFF_FFFF))
    assert found == ["table-limits", "privilege-level"]


def test_none_for_a_state_that_no_reading_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classes(monkeypatch, "bochs", state_of({}), lambda _: GP, lambda _: UD) is None


INTERCEPTS_4 = scene.fields_of(scene.BASES[0])[BY_NAME["intercept vector 4"]]
INTERCEPTS_3 = scene.fields_of(scene.BASES[0])[BY_NAME["intercept vector 3"]]

RSM = {"intercept vector 3": INTERCEPTS_3 | 1 << 19}


@pytest.mark.parametrize(
    ("oracle", "name", "base", "fields", "expected"),
    [
        ("qemu", "interrupt-shadow", "64-bit", {"interrupt state": 3}, {"interrupt state": 2}),
        ("qemu", "double-fault", "64-bit", {"exception intercepts": 0x101}, {"exception intercepts": 1}),
        (
            "qemu",
            "missing-intercepts",
            "64-bit",
            at("INVD") | {"intercept vector 3": INTERCEPTS_3 | 1 << 22},
            {"intercept vector 3": INTERCEPTS_3},
        ),
        ("qemu", "missing-intercepts", "64-bit", at("WBINVD") | {"intercept vector 3": INTERCEPTS_3 | 1 << 22}, {}),
        ("qemu", "vmload-always-exits", "64-bit", at("VMSAVE"), {"intercept vector 4": INTERCEPTS_4 | 8}),
        ("qemu", "event-error-code", "64-bit", {"EVENTINJ": 0x8000_030D}, {"EVENTINJ": 0x8000_0B0D}),
        ("qemu", "event-error-code", "64-bit", {"EVENTINJ": 0x8000_0B06}, {"EVENTINJ": 0x8000_0306}),
        ("qemu", "event-error-code", "64-bit", {"EVENTINJ": 0x8000_0B0E}, {}),
        ("qemu", "task-priority", "64-bit", {IRQ: 0x5_0105}, {IRQ: 0x15_0105}),
        ("qemu", "task-priority", "64-bit", {IRQ: 0x6_0105}, {}),
        ("qemu", "task-priority", "64-bit", {IRQ: 0x5_0005}, {}),
        ("qemu", "monitor-access", "64-bit", at("MONITOR") | {"DS base": 5}, {"DS base": 0, "RAX": scene.DATA}),
        ("qemu", "monitor-access", "64-bit", at("MWAIT"), {}),
        ("qemu", "privilege-level", "64-bit", {"CPL": 2}, {"CPL": 0}),
        ("qemu", "privilege-level", "virtual-8086 mode", {"SS attributes": 0x93}, {"SS attributes": 0xF3}),
        ("qemu", "general-detect", "64-bit", {"DR7": 0x2400}, {"DR7": 0x400}),
        ("qemu", "real-mode-stack", "real mode", {"SS attributes": 0x493}, {"SS attributes": 0x93}),
        ("qemu", "real-mode-stack", "no paging", {"SS attributes": 0x493}, {}),
        ("qemu", "segment-checks", "64-bit", {"DS limit": 1, "SS attributes": 0}, {}),
        ("qemu", "segment-checks", "no paging", {"DS limit": 1}, {"DS limit": 0xFFFF_FFFF}),
        ("qemu", "efer-lma", "64-bit", {"EFER": 0x1901}, {"EFER": 0x1D01}),
        ("qemu", "map-low-bits", "64-bit", {"IOPM_BASE_PA": scene.IOPM | 5}, {"IOPM_BASE_PA": scene.IOPM}),
        ("qemu", "msr-index", "64-bit", at("RDMSR 174H") | {"RCX": 1 << 40 | 0x174}, {"RCX": 0x174}),
        ("qemu", "virtual-vector", "64-bit", {IRQ: 0x1FF << 32}, {IRQ: 0xFF << 32}),
        ("qemu", "legacy-linear-addresses", "no paging", {"IDTR base": 1 << 40 | 5}, {"IDTR base": 5}),
        ("qemu", "legacy-linear-addresses", "64-bit", {"IDTR base": 1 << 40 | 5}, {}),
        ("qemu", "vm-in-long-mode", "64-bit", {"RFLAGS": 0x2_0002}, {"RFLAGS": 2}),
        ("qemu", "vm-in-long-mode", "no paging", {"RFLAGS": 0x2_0002}, {}),
        ("bochs", "cpl-bits", "64-bit", {"CPL": 0x87}, {"CPL": 3}),
        ("bochs", "rsm-intercept", "64-bit", at("RSM") | RSM, {"intercept vector 3": INTERCEPTS_3}),
        ("bochs", "virtual-interrupt", "64-bit", {IRQ: 0x105}, {IRQ: 5}),
        ("bochs", "nested-paging-byte", "64-bit", {NESTED: 4}, {NESTED: 5}),
        ("bochs", "nested-paging-byte", "64-bit", {NESTED: 0x100}, {}),
        ("bochs", "absent-tss", "64-bit", {"TR attributes": 9}, {"TR attributes": 0x89}),
        ("bochs", "another-kind-of-segment", "64-bit", {"DS attributes": 0x83}, {"DS attributes": 0x93}),
        ("bochs", "stack-segment", "no paging", {"SS attributes": 0xC9B}, {"SS attributes": 0xC93, "SS limit": 0}),
        ("bochs", "stack-segment", "no paging", {}, {}),
        ("bochs", "implicit-access", "64-bit", {"CR4": 0x20_0020, "RFLAGS": 0x4_0002}, {"CR4": 0x20}),
        ("bochs", "implicit-access", "64-bit", {"CR4": 0x20_0020}, {}),
        ("bochs", "l-and-d", "no paging", {"CS attributes": 0xE9B}, {"CS attributes": 0xC9B}),
        ("bochs", "msr-widths", "64-bit", {"LSTAR": 1 << 47}, {"LSTAR": (1 << 64) - (1 << 47)}),
    ],
)  # fmt: skip
def test_what_a_state_is_taken_for(
    oracle: str, name: str, base: str, fields: dict[str, int], expected: dict[str, int]
) -> None:
    generator = ORACLES[oracle].generator(0)
    found = disagreement(generator, state_of(fields, base), HALTED, GP, frozenset(("EXITCODE",)))
    case: Case = case_of(generator)(found)
    changes = [each.changes(case) for each in KNOWN[oracle].readings if each.id == name]
    assert [{each.name: value for each, value in one.items()} for one in changes if one] == (
        [expected] if expected else []
    )
