"""Every rule accepts what it should, rejects what it should and nothing else, and its repair repairs."""

import pytest
from vmcs_baseline import OLD, context_of, long_mode_guest
from vmcs_rule_cases import CONTROL_CASES, HOST_32, Case, Changes, build
from vmcs_state_cases import STATE_CASES

from vmcs import controls as c
from vmcs import fields as f
from vmcs import rules
from vmcs.checks import violation_of
from vmcs.exits import InstructionError
from vmcs.fields import FIELDS
from vmcs.rules import BY_ID, CONSISTENCY, RULES, EntryFails, FailValid, Stage
from vmcs.rules.advice import explain_violation

BY_NAME = {field.name: field for field in FIELDS}
CASES = (*CONTROL_CASES, *STATE_CASES)

# Rules whose demand cannot be broken without breaking another rule of the stage, and so need a test of their own.
INSEPARABLE = {"host.legacy-host-has-legacy-guest", "host.32-bit-host-has-legacy-guest"}

ACCEPTS = [pytest.param(case, id=case.id) for case in CASES]
REJECTS = [
    pytest.param(case, changes, id=f"{case.id}-{number}") for case in CASES for number, changes in enumerate(case.bad)
]


def ids(stage: Stage, context: rules.EntryContext) -> list[str]:
    return [violation.rule.id for violation in RULES[stage].explain(context)]


def test_baseline__passes_and_needs_no_special_case() -> None:
    assert rules.explain(context_of(long_mode_guest())) == []


def test_cases__cover_every_rule_once() -> None:
    covered = [case.id for case in CASES]
    assert len(set(covered)) == len(covered)
    assert set(covered) | INSEPARABLE == {rule.id for rule in CONSISTENCY}


@pytest.mark.parametrize("case", ACCEPTS)
def test_rule__accepts(case: Case) -> None:
    context = build(case.setup, case.ok, capabilities=case.capabilities)
    assert BY_ID[case.id].holds(context)
    assert [v.rule.id for v in CONSISTENCY.explain(context)] == []


@pytest.mark.parametrize(("case", "changes"), REJECTS)
def test_rule__rejects_alone(case: Case, changes: Changes) -> None:
    context = build(case.setup, changes, capabilities=case.capabilities)
    rule = BY_ID[case.id]
    assert rule.applies(context)
    assert ids(rule.stage, context) == [case.id]
    violation = rules.check(rule.stage, context)
    assert violation is not None
    assert violation.rule is rule
    # Switched off, the same VMCS passes: no other rule does this rule's work.
    assert RULES[rule.stage].without(case.id).check(context) is None


@pytest.mark.parametrize(("case", "changes"), REJECTS)
def test_repair__makes_the_rule_hold(case: Case, changes: Changes) -> None:
    context = build(case.setup, changes, capabilities=case.capabilities)
    rule = BY_ID[case.id]
    rule.repair(context)
    assert rule.holds(context)


@pytest.mark.parametrize(("case", "changes"), REJECTS)
def test_explanation__gives_an_example_that_is_legal(case: Case, changes: Changes) -> None:
    context = build(case.setup, changes, capabilities=case.capabilities)
    rule = BY_ID[case.id]
    explanation = explain_violation(violation_of(rule, context), context)
    assert explanation.example
    for name, value in explanation.example:
        context.vmcs[BY_NAME[name]] = value
    assert rule.holds(context)
    assert explanation.citation == str(rule.ref)


@pytest.mark.parametrize(("case", "changes"), REJECTS)
def test_faulty_bits__name_fields_the_rule_reads(case: Case, changes: Changes) -> None:
    context = build(case.setup, changes, capabilities=case.capabilities)
    rule = BY_ID[case.id]
    read = {field for field, _ in rule.reads}
    for field, bits in rule.demand.faulty(context):
        assert field in read
        assert not bits & ~field.mask


@pytest.mark.parametrize(("case", "changes"), REJECTS)
def test_reads__cover_the_change(case: Case, changes: Changes) -> None:
    """The change that breaks a rule must select it: its declared reads are complete."""
    good = build(case.setup, case.ok, capabilities=case.capabilities)
    bad = build(case.setup, changes, capabilities=case.capabilities)
    difference = {
        encoding: value ^ bad.values[encoding]
        for encoding, value in good.values.items()
        if value != bad.values[encoding]
    }
    assert BY_ID[case.id] in CONSISTENCY.affected_by(difference)


@pytest.mark.parametrize(
    ("stage", "outcome"),
    [
        (Stage.CONTROLS, FailValid(InstructionError.VM_ENTRY_WITH_INVALID_CONTROL_FIELDS)),
        (Stage.HOST, FailValid(InstructionError.VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS)),
    ],
)
def test_outcome__of_a_stage_is_one(stage: Stage, outcome: FailValid) -> None:
    assert {rule.outcome for rule in RULES[stage]} == {outcome}
    assert outcome.error == {Stage.CONTROLS: 7, Stage.HOST: 8}[stage]


def test_outcome__guest_state_tells_four_causes_apart() -> None:
    qualifications: dict[int, set[str]] = {}
    for rule in RULES[Stage.GUEST]:
        assert isinstance(rule.outcome, EntryFails)
        assert rule.outcome.reason.value == 33
        qualifications.setdefault(rule.outcome.qualification, set()).add(rule.id)
    assert set(qualifications) == {0, 2, 3, 4}
    assert qualifications[2] == {f"guest.pdpte{n}-field" for n in range(4)} | {"guest.pdptes-in-memory"}
    assert qualifications[3] == {"guest.nmi-injection-sti"}
    assert qualifications[4] == {
        f"guest.link-pointer-{name}"
        for name in ("address", "revision", "shadow-indicator", "not-current", "not-executive")
    }


def test_legacy_host__needs_a_legacy_guest_by_two_rules() -> None:
    context = build(HOST_32, {c.ENTRY_IA32E_MODE_GUEST: True})
    assert ids(Stage.HOST, context) == ["host.legacy-host-has-legacy-guest", "host.32-bit-host-has-legacy-guest"]
    # From a 64-bit host the second one alone objects, next to the host's own size.
    context = build(HOST_32, {c.ENTRY_IA32E_MODE_GUEST: True, "host_long_mode": True})
    assert ids(Stage.HOST, context) == ["host.long-mode-host-stays", "host.32-bit-host-has-legacy-guest"]
    # And the first one alone if the host were to become a 64-bit one.
    context = build(HOST_32, {c.ENTRY_IA32E_MODE_GUEST: True, c.EXIT_HOST_ADDRESS_SPACE_SIZE: True, f.HOST_CR4: 0x2020})
    assert ids(Stage.HOST, context) == ["host.legacy-host-stays", "host.legacy-host-has-legacy-guest"]


def test_addresses__of_structures_are_held_to_32_bits_by_old_processors() -> None:
    vmcs = long_mode_guest(OLD)
    vmcs[f.PRIMARY_PROCESSOR_BASED_CONTROLS] = 0x0601_E172  # with I/O bitmaps
    vmcs[f.IO_BITMAP_A_ADDRESS] = 1 << 32
    context = context_of(vmcs)
    assert not BY_ID["controls.io-bitmap-a-address"].holds(context)
    vmcs[f.IO_BITMAP_A_ADDRESS] = 0xFFFF_F000
    assert BY_ID["controls.io-bitmap-a-address"].holds(context)


def test_ids__are_stage_dot_name() -> None:
    for rule in rules.ALL_RULES:
        stage, _, name = rule.id.partition(".")
        assert stage in ("basic", "controls", "host", "guest")
        assert name == name.lower()
        assert " " not in name
    assert len(BY_ID) == len(rules.ALL_RULES)


def test_sentences__are_sentences_of_our_own_form() -> None:
    for rule in rules.ALL_RULES:
        assert rule.sentence
        assert not rule.sentence.endswith("."), rule.id


def test_without__refuses_an_unknown_rule() -> None:
    with pytest.raises(KeyError):
        CONSISTENCY.without("controls.no-such-rule")
