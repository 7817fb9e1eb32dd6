"""Evaluating rules: order, messages, the basic stage, incremental checks, MSR areas."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmcs_baseline import FULL, OLD, Memory, context_of, long_mode_guest
from vmcs_rule_cases import CONTROL_CASES, build
from vmcs_state_cases import STATE_CASES

from vmcs import controls as c
from vmcs import fields as f
from vmcs import rules
from vmcs.capabilities import Capabilities
from vmcs.exits import AbortIndicator, InstructionError, Reason
from vmcs.fields import FIELDS
from vmcs.region import LaunchState, Vmcs
from vmcs.rules import CONSISTENCY, RULES, EntryContext, EntryFails, FailInvalid, FailValid, Stage, msr_load
from vmcs.rules.msr_load import Area

BASIC = RULES[Stage.BASIC]


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, None),
        ({"vmcs_current": False, "blocked_by_mov_ss": True}, FailInvalid()),
        ({"blocked_by_mov_ss": True}, FailValid(InstructionError(26))),
        ({"launching": False}, FailValid(InstructionError(5))),
        ({"launching": False, "blocked_by_mov_ss": True}, FailValid(InstructionError(26))),
    ],
)
def test_basic__outcomes_of_a_clear_vmcs(changes: dict[str, bool], outcome: rules.Outcome | None) -> None:
    violation = rules.check(Stage.BASIC, build(changes))
    assert (violation and violation.outcome) == outcome


def test_basic__launched_and_shadow_vmcs() -> None:
    context = build({})
    context.vmcs.launch_state = LaunchState.LAUNCHED
    violation = BASIC.check(context)
    assert violation is not None
    assert violation.outcome == FailValid(InstructionError(4))
    context.launching = False
    assert BASIC.check(context) is None
    context.vmcs.shadow = True
    violation = BASIC.check(context)
    assert violation is not None
    assert violation.outcome == FailInvalid()


@pytest.mark.parametrize("launching", [False, True])
def test_basic__repair_makes_each_rule_hold(launching: bool) -> None:
    context = build({"vmcs_current": False, "blocked_by_mov_ss": True, "launching": launching})
    context.vmcs.shadow = True
    context.vmcs.launch_state = LaunchState.LAUNCHED if launching else LaunchState.CLEAR
    assert len(BASIC.explain(context)) == 4
    for rule in BASIC:
        rule.repair(context)
    assert BASIC.explain(context) == []


def test_basic__is_evaluated_in_full_whatever_changed() -> None:
    assert BASIC.affected_by({}) == BASIC.rules


def test_order__controls_before_host_before_guest() -> None:
    context = build({f.GUEST_RFLAGS: 0, f.HOST_CR0: 0, f.VPID: 0})
    stages = [violation.rule.stage for violation in CONSISTENCY.explain(context)]
    assert stages == [Stage.CONTROLS, Stage.HOST, Stage.GUEST]
    first = rules.check_consistency(context)
    assert first is not None
    assert first.rule.id == "controls.vpid-not-zero"


def test_message__of_an_address() -> None:
    context = build({c.USE_IO_BITMAPS: True, f.IO_BITMAP_A_ADDRESS: 0x4000_0000_1800})
    violation = rules.check(Stage.CONTROLS, context)
    assert str(violation) == "\n".join(
        (
            'controls.io-bitmap-a-address: If "use I/O bitmaps" is 1: the address of I/O bitmap A is 4096-byte aligned'
            " and within the physical-address width",
            "  outcome: VMfailValid(7)",
            "  Primary processor-based VM-execution controls = 0x86006172",
            "  Address of I/O bitmap A = 0x400000001800 <- bits 46 and 11",
            '  see SDM Vol. 3, "VM Entries", "VM-Execution Control Fields"',
        )
    )


def test_message__of_a_missing_control() -> None:
    context = build({c.VIRTUAL_NMIS: True})
    violation = rules.check(Stage.CONTROLS, context)
    assert str(violation) == "\n".join(
        (
            'controls.virtual-nmis-need-nmi-exiting: If "virtual NMIs" is 1: "NMI exiting" is 1 too',
            "  outcome: VMfailValid(7)",
            "  Pin-based VM-execution controls = 0x36 <- bit 3",
            '  see SDM Vol. 3, "VM Entries", "VM-Execution Control Fields"',
        )
    )


def test_message__of_guest_state() -> None:
    context = build({f.GUEST_INTERRUPTIBILITY_STATE: 3})
    violation = rules.check(Stage.GUEST, context)
    assert str(violation) == "\n".join(
        (
            "guest.sti-excludes-mov-ss: events are not blocked by both STI and MOV SS",
            "  outcome: VM-entry failure due to invalid guest state, exit qualification 0",
            "  Guest interruptibility state = 0x3 (blocking by STI, blocking by MOV SS) <- bits 1:0",
            '  see SDM Vol. 3, "VM Entries", "Checks on Guest Non-Register State"',
        )
    )


# ---- incremental checks

CASES = (*CONTROL_CASES, *STATE_CASES)
REJECTIONS = [
    (case.setup, changes)
    for case in CASES
    if case.capabilities is FULL
    for changes in case.bad
    if "memory" not in changes
]


def affected(context: EntryContext, changed: dict[int, int]) -> list[str]:
    return [rule.id for rule in CONSISTENCY.affected_by(changed) if not rule.holds(context)]


@settings(max_examples=300)
@given(st.sampled_from(REJECTIONS), st.integers(0, 2**32))
def test_incremental__finds_what_the_full_check_finds(rejection: tuple[object, object], seed: int) -> None:
    setup, changes = rejection
    context = build(setup)  # type: ignore[arg-type]
    if CONSISTENCY.check(context) is not None:
        return  # some setups pass only together with the accepted change
    vmcs = context.vmcs
    vmcs.changed.clear()
    target = build(setup, changes).vmcs  # type: ignore[arg-type]
    fields = [field for field in FIELDS if target[field] != vmcs[field]]
    random.Random(seed).shuffle(fields)
    for field in fields:
        vmcs[field] = target[field]
        full = [violation.rule.id for violation in CONSISTENCY.explain(context)]
        assert affected(context, vmcs.changed) == full
        violation = CONSISTENCY.check(context, vmcs.changed)
        assert (violation.rule.id if violation else None) == (full[0] if full else None)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), st.integers(0, 2**64 - 1)), min_size=1, max_size=4))
def test_incremental__equals_full_for_arbitrary_writes(writes: list[tuple[f.Field, int]]) -> None:
    context = context_of(long_mode_guest(), read_physical=Memory().read)
    context.vmcs.changed.clear()
    for field, value in writes:
        context.vmcs[field] = value
    full = [violation.rule.id for violation in CONSISTENCY.explain(context)]
    assert affected(context, context.vmcs.changed) == full


@settings(max_examples=300)
@given(st.sampled_from(FIELDS), st.integers(0, 63), st.sampled_from(CASES))
def test_incremental__equals_full_for_single_bit_flips(field: f.Field, bit: int, case: object) -> None:
    context = build(case.setup, case.ok, capabilities=case.capabilities)  # type: ignore[attr-defined]
    context.vmcs.changed.clear()
    context.vmcs[field] ^= 1 << bit
    full = [violation.rule.id for violation in CONSISTENCY.explain(context)]
    assert affected(context, context.vmcs.changed) == full


@pytest.mark.parametrize(
    ("attribute", "value", "rule_id"),
    [
        ("host_long_mode", False, "host.legacy-host-stays"),
        ("tracing", True, "controls.tracing-excludes-load"),
        ("vmcs_address", 0x9000, "guest.link-pointer-not-current"),
    ],
)
def test_volatile__rules_see_the_processor_change(attribute: str, value: object, rule_id: str) -> None:
    context = build(
        {c.ENTRY_LOAD_IA32_RTIT_CTL: True, f.VMCS_LINK_POINTER: 0x9000, "memory": {0x9000: 0x1234}},
    )
    assert CONSISTENCY.check(context) is None
    setattr(context, attribute, value)
    violation = CONSISTENCY.check(context, {})
    assert violation is not None
    assert violation.rule.id == rule_id


def test_volatile__rules_see_memory_change() -> None:
    memory = Memory()
    memory.put(0x9000, 0x1234, 8)
    vmcs = long_mode_guest()
    vmcs[f.VMCS_LINK_POINTER] = 0x9000
    context = context_of(vmcs, read_physical=memory.read)
    assert CONSISTENCY.check(context) is None
    memory.put(0x9000, 0x4321, 8)
    violation = CONSISTENCY.check(context, {})
    assert violation is not None
    assert violation.outcome == EntryFails(Reason.ENTRY_FAILURE_GUEST_STATE, 4)


def test_incremental__a_typical_entry_evaluates_few_rules() -> None:
    typical = {
        f.GUEST_RIP.encoding: 0xF,
        f.GUEST_RSP.encoding: 0xFF,
        f.GUEST_RFLAGS.encoding: 0x8D5,
        f.VM_ENTRY_INTERRUPTION_INFORMATION.encoding: 0xFFFF_FFFF,
    }
    assert len(CONSISTENCY.affected_by(typical)) < 40 < len(CONSISTENCY) // 4


def test_read__answers_ones_where_there_can_be_no_memory() -> None:
    def forbidden(address: int, size: int) -> int:
        raise AssertionError("nothing may be read beyond the physical-address width")

    context = context_of(long_mode_guest(), read_physical=forbidden)
    assert context.read(1 << 46, 4) == 0xFFFF_FFFF
    assert context.read((1 << 46) - 4, 8) == 0xFFFF_FFFF_FFFF_FFFF
    assert context.read(0xFFFF_FFFF_FFFF_FFFF, 8) == 0xFFFF_FFFF_FFFF_FFFF


# ---- repair


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), capabilities=st.sampled_from((FULL, OLD)), host_long_mode=st.booleans())
def test_repair__any_vmcs_becomes_valid(seed: int, capabilities: Capabilities, host_long_mode: bool) -> None:
    generator = random.Random(seed)
    vmcs = long_mode_guest(capabilities)
    for field in FIELDS:
        if generator.random() < 0.5:
            vmcs[field] = generator.getrandbits(64)
    context = context_of(vmcs, read_physical=Memory().read, host_long_mode=host_long_mode)
    broken = {violation.rule.id for violation in CONSISTENCY.explain(context)}
    repaired = rules.repair(context)
    assert CONSISTENCY.check(context) is None
    assert broken <= {rule.id for rule in repaired}


def test_repair__leaves_a_valid_vmcs_alone() -> None:
    context = context_of(long_mode_guest())
    values = dict(context.vmcs.values)
    assert rules.repair(context) == []
    assert context.vmcs.values == values


def test_repair__gives_up_after_the_rounds_it_was_given() -> None:
    with pytest.raises(ValueError, match=r"still violated: controls\.pin-based-reserved"):
        rules.repair(context_of(Vmcs(FULL)), rounds=0)


# ---- MSR areas


def msr_context(*entries: tuple[int, int], count: int | None = None, **more: object) -> EntryContext:
    memory = Memory()
    for number, (first, value) in enumerate(entries):
        memory.put(0x7000 + 16 * number, first, 8)
        memory.put(0x7008 + 16 * number, value, 8)
    vmcs = long_mode_guest()
    for area in Area:
        vmcs[area.address] = 0x7000
        vmcs[area.count] = len(entries) if count is None else count
    return context_of(vmcs, read_physical=memory.read, **more)


def test_entries__are_read_in_order() -> None:
    context = msr_context((0x10, 7), (0x5_0000_0174, 8))
    assert [
        (entry.number, entry.address, entry.index, entry.reserved, entry.value)
        for entry in msr_load.entries(context, Area.ENTRY_LOAD)
    ] == [(1, 0x7000, 0x10, 0, 7), (2, 0x7010, 0x174, 5, 8)]


@pytest.mark.parametrize(
    ("area", "first", "rule_id"),
    [
        (Area.ENTRY_LOAD, 0x10, None),
        (Area.ENTRY_LOAD, 1 << 32 | 0x10, "msr-load.reserved"),
        (Area.ENTRY_LOAD, 0xC000_0100, "msr-load.segment-base"),
        (Area.ENTRY_LOAD, 0xC000_0101, "msr-load.segment-base"),
        (Area.ENTRY_LOAD, 0xC000_0102, None),
        (Area.ENTRY_LOAD, 0x7FF, None),
        (Area.ENTRY_LOAD, 0x800, "msr-load.x2apic"),
        (Area.ENTRY_LOAD, 0x8FF, "msr-load.x2apic"),
        (Area.ENTRY_LOAD, 0x900, None),
        (Area.ENTRY_LOAD, 0x9B, "msr-load.smm-only"),
        (Area.ENTRY_LOAD, 0x79, "msr-load.microcode"),
        (Area.ENTRY_LOAD, 0x8B, "msr-load.microcode"),
        (Area.EXIT_LOAD, 0xC000_0100, "msr-load.segment-base"),
        (Area.EXIT_LOAD, 1 << 63, "msr-load.reserved"),
        (Area.EXIT_STORE, 0xC000_0100, None),
        (Area.EXIT_STORE, 0x10, None),
        (Area.EXIT_STORE, 0x9E, "msr-store.smm-only"),
        (Area.EXIT_STORE, 0x808, "msr-load.x2apic"),
        (Area.EXIT_STORE, 1 << 32, "msr-load.reserved"),
    ],
)
def test_msr_entry__is_judged_by_area(area: Area, first: int, rule_id: str | None) -> None:
    context = msr_context((first, 0))
    (entry,) = msr_load.entries(context, area)
    violation = msr_load.violation(context, entry, area)
    assert (violation and violation.rule.id) == rule_id


def test_msr_entry__fails_where_wrmsr_would() -> None:
    context = msr_context((0x10, 0), (0x277, 2), wrmsr_faults=lambda index, value: (index, value) == (0x277, 2))
    results = [
        msr_load.violation(context, entry, Area.ENTRY_LOAD) for entry in msr_load.entries(context, Area.ENTRY_LOAD)
    ]
    assert results[0] is None
    assert results[1] is not None
    assert results[1].rule.id == "msr-load.wrmsr"
    assert results[1].outcome == EntryFails(Reason.ENTRY_FAILURE_MSR_LOADING, 2)


def test_msr_violation__outcome_and_message() -> None:
    context = msr_context((0xC000_0100, 5))
    (entry,) = msr_load.entries(context, Area.EXIT_LOAD)
    violation = msr_load.violation(context, entry, Area.EXIT_LOAD)
    assert violation is not None
    assert violation.outcome is AbortIndicator.LOADING_HOST_MSRS
    assert str(violation) == "\n".join(
        (
            "msr-load.segment-base: the MSR is neither IA32_FS_BASE nor IA32_GS_BASE",
            "  VM-exit MSR-load address: entry 1 at 0x7000",
            "  MSR 0xc0000100, value 0x5, bits 63:32 0x0",
            '  see SDM Vol. 3, "VM Entries", "Loading MSRs"',
        )
    )
    bad = msr_load.MsrEntry(1, 0, 0x800, 0, 0)
    stored = msr_load.violation(context, bad, Area.EXIT_STORE)
    assert stored is not None
    assert stored.outcome is AbortIndicator.SAVING_GUEST_MSRS


def test_msr_list__longer_than_recommended_fails_at_the_first_entry_too_many() -> None:
    context = msr_context(count=0xFFFF_FFFF)
    memory = Memory()
    context.read_physical = lambda address, size: 0x10 if address % 16 == 0 else memory.read(0x10_0000, 0)
    for entry in msr_load.entries(context, Area.ENTRY_LOAD):
        violation = msr_load.violation(context, entry, Area.ENTRY_LOAD)
        if violation is not None:
            break
    assert violation is not None
    assert violation.rule.id == "msr-load.recommended-maximum"
    assert violation.outcome == EntryFails(Reason.ENTRY_FAILURE_MSR_LOADING, 513)
