"""What the harness prints, comparing, reducing, and the classes of known differences."""

from pathlib import Path

import pytest

from vmcs import fields as f
from vmcs.fields import Field
from vtx.cli.images import find_image
from vtx.fuzz import compare
from vtx.fuzz.classes import explanation, sort
from vtx.fuzz.drawing import State
from vtx.fuzz.entries import scene
from vtx.fuzz.entries.experiment import experiment
from vtx.fuzz.entries.known import KNOWN, case_of
from vtx.fuzz.entries.results import NO_ANSWER, Result
from vtx.fuzz.entries.states import EntryGenerator
from vtx.fuzz.on_vtx import MEMORY, booted, on_vtx
from vtx.fuzz.rom import rom_of
from vtx.x86.profile import load_profile

PROFILE = load_profile("bochs-skylake-x")
GENERATOR = EntryGenerator.of(PROFILE, 1)
ENTRIES = experiment(GENERATOR)
RESULT = frozenset(("result",))
NAMES = [base.name for base in scene.BASES]
INT3 = Result("exit", 0, 0, 0x8000_0603)
GP = Result("exit", 0, 0, 0x8000_0B0D)
INVALID_GUEST = Result("exit", 33 | 1 << 31)
DOCUMENT = Path(__file__).parents[3] / "docs" / "interpretations.md"


def state(base: str = "64-bit", changes: dict[Field, int] | None = None) -> State:
    return State(NAMES.index(base), tuple((field.encoding, value) for field, value in (changes or {}).items()))


def run(*states: State) -> list[Result]:
    image = find_image("entries").data
    results, _ = compare.run(ENTRIES, states, lambda blob: on_vtx(PROFILE, image, blob))
    return [results[number] for number in range(len(states))]


def test_parse() -> None:
    report = ENTRIES.parse(
        "widths 3028\r\nmsr 480 2b\r\n0 invalid\r\n1 valid 7\r\n2 exit 0 0 80000603 3\r\n"
        "3 exit 80000021 4 80000603 80000603\r\n4 exit 34 0 603 0\r\nend\r\n"
    )
    assert report.complete
    assert report.processor == {"address widths": 0x3028, "MSR 480": 0x2B}
    assert report.results == {
        0: Result("invalid"),
        1: Result("valid", 7),
        2: INT3,
        3: Result("exit", 0x8000_0021, 4),  # a failed entry leaves the event information as it was
        4: Result("exit", 52),
    }


def test_parse__a_run_that_broke_off() -> None:
    report = ENTRIES.parse("0 invalid\n[entries] FAIL: no\n1 val")
    assert not report.complete
    assert report.complaint == "[entries] FAIL: no"
    assert report.results == {0: Result("invalid")}


def test_states_on_the_model__every_base_enters_and_comes_back() -> None:
    results = run(*(State(number, ()) for number in range(len(NAMES))))
    for name, result in zip(NAMES, results, strict=True):
        assert result.kind == "exit" and not result.entry_failure, name
    assert results[0] == INT3
    assert results[NAMES.index("64-bit, timer")].number == 52


def test_states_on_the_model() -> None:
    wrapping = {f.GUEST_CS_BASE: 0xFFFF_0000, f.GUEST_RIP: scene.CODE + 0x1_0000}  # their sum wraps at 4 GiB
    assert run(
        state(changes={f.HOST_CS_SELECTOR: 3}),
        state(changes={f.VPID: 0}),
        state(changes={f.GUEST_RFLAGS: 0}),
        state(changes={f.VMCS_LINK_POINTER: 0}),
        state(changes={f.VM_ENTRY_MSR_LOAD_COUNT: 6}),
        state("no paging", wrapping),
        state("compatibility mode", wrapping),
        state("PAE paging", {f.GUEST_CS_BASE: 0xF3DF_9203, f.GUEST_RIP: 0xBA10_790A}),
        state(),
    ) == [
        Result("valid", 8),
        Result("valid", 7),
        INVALID_GUEST,
        Result("exit", 33 | 1 << 31, 4),
        Result("exit", 34 | 1 << 31, 6),
        INT3,
        INT3,
        Result("exit", 0, 0xADF0_0B0D, 0x8000_0B0E),
        INT3,
    ]


def text(results: dict[int, str]) -> str:
    return "msr 480 2b\n" + "".join(f"{number} {result}\n" for number, result in results.items())


def test_no_answer__the_rest_is_run_without_the_state_that_gave_none() -> None:
    starts = []

    def runner(blob: bytes) -> str:
        starts.append(len(blob))
        return text({0: "invalid"}) if len(starts) == 1 else text({2: "valid 7"}) + "end\n"

    results, _ = compare.run(ENTRIES, [state(), state(), state()], runner)
    assert results == {0: Result("invalid"), 1: NO_ANSWER, 2: Result("valid", 7)}
    assert len(starts) == 2


def test_a_harness_that_does_not_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not start: no boot"):
        compare.run(ENTRIES, [state()], lambda blob: "no boot\n")


def test_reduce__keeps_the_change_that_matters() -> None:
    matters = f.GUEST_DR7.encoding.to_bytes(8, "little") + (0x123).to_bytes(8, "little")

    def ours(blob: bytes) -> str:
        return _answers(blob, lambda one: "exit 0 0 80000603 0")

    def theirs(blob: bytes) -> str:
        return _answers(blob, lambda one: "valid 7" if matters in one else "exit 0 0 80000603 0")

    large = state(changes={f.GUEST_DR7: 0x123, f.GUEST_RSP: 8, f.TSC_OFFSET: 9, f.HOST_FS_BASE: 7})
    found = compare.compare(ENTRIES, [state(), large], ours, theirs)
    assert [each.state for each in found] == [large]
    reduced = compare.reduce(ENTRIES, found, ours, theirs)
    assert [each.state for each in reduced] == [state(changes={f.GUEST_DR7: 0x123})]
    assert [(each.ours.name, each.theirs.name) for each in reduced] == [(INT3.name, "VMfailValid(7)")]


def _answers(blob: bytes, answer) -> str:  # type: ignore[no-untyped-def]
    """What a processor prints whose ``answer`` follows from the bytes of a state."""
    empty = ENTRIES.module([])
    rest = blob[len(empty) :]
    count = int.from_bytes(blob[len(empty) - 8 : len(empty)], "little")
    results = {}
    for number in range(count):
        size = 16 + 16 * int.from_bytes(rest[8:16], "little")
        results[number] = answer(rest[:size])
        rest = rest[size:]
    return text(results) + "end\n"


def disagreement(changed: State, ours: Result, theirs: Result) -> compare.Disagreement[Result]:
    rules = tuple(violation.rule.id for violation in GENERATOR.violations(changed))
    return compare.Disagreement(changed, "", ours, theirs, rules, RESULT)


def known(changed: State, ours: Result, theirs: Result) -> str | None:
    found = explanation(KNOWN, case_of(GENERATOR, MEMORY)(disagreement(changed, ours, theirs)), RESULT)
    return found[0].id if found else None


def gp_during(vectoring: int) -> Result:
    """The VM exit of a #GP, with this IDT-vectoring information."""
    return Result("exit", 0, 0, 0x8000_0B0D, vectoring)


INTERRUPT_STATUS = state("virtual APIC", {f.GUEST_INTERRUPT_STATUS: 0x40})
# "Enable EPT" is set, but the secondary controls are not activated.
BEYOND_MEMORY = state(
    "32-bit paging",
    {
        f.GUEST_CR3: 0xB6_A6F8_89CB,
        f.PRIMARY_PROCESSOR_BASED_CONTROLS: 0x6580_7F76,
        f.SECONDARY_PROCESSOR_BASED_CONTROLS: 2,
    },
)
RIP = 1 << 62 | scene.CODE
MSR_AREA = {f.VM_EXIT_MSR_STORE_ADDRESS: (1 << 40) - 0x1000}


@pytest.mark.parametrize(
    ("changed", "ours", "theirs", "expected"),
    [
        (state(changes={f.GUEST_RIP: RIP}), INVALID_GUEST, GP, "rip-not-canonical"),
        # The same, and something else is broken that nobody overlooks.
        (state(changes={f.GUEST_RIP: RIP, f.GUEST_RFLAGS: 0}), INVALID_GUEST, GP, None),
        (state(changes={f.GUEST_CS_SELECTOR: 1}), INT3, INVALID_GUEST, "cs-privilege-level"),
        (state(changes={f.GUEST_DS_SELECTOR: 1}), INT3, INVALID_GUEST, None),
        (state("real mode", {f.GUEST_RIP: 0x1_0000}), INT3, GP, None),
        (
            state(changes=MSR_AREA | {f.VM_EXIT_MSR_STORE_COUNT: 1 << 28}),
            Result("valid", 7),
            NO_ANSWER,
            "msr-area-size",
        ),
        (state(changes=MSR_AREA | {f.VM_EXIT_MSR_STORE_COUNT: 1 << 27}), Result("valid", 7), NO_ANSWER, None),
        (state("real mode"), INT3, GP, None),
        (state("64-bit, timer", {f.GUEST_INTERRUPTIBILITY_STATE: 2}), Result("exit", 52), INT3, "timer-in-shadow"),
        (state("64-bit, timer"), Result("exit", 52), INT3, None),
        (
            state(changes={f.GUEST_RFLAGS: 0, f.VPID: 0, f.HOST_RIP: RIP}),
            Result("valid", 7),
            Result("valid", 8),
            "order",
        ),
        (state(changes={f.GUEST_RFLAGS: 0, f.VPID: 0}), Result("valid", 7), Result("valid", 8), None),
        (state(changes={f.GUEST_RFLAGS: 0, f.VPID: 0}), Result("valid", 7), INVALID_GUEST, None),
        (state(), INT3, NO_ANSWER, None),
        (INTERRUPT_STATUS, gp_during(0x8000_0040), gp_during(0x8000_0B0D), "virtual-interrupt-fault"),
        (INTERRUPT_STATUS, gp_during(0x8000_0041), gp_during(0x8000_0B0D), None),
        (INTERRUPT_STATUS, gp_during(0x8000_0040), Result("exit", 0, 0, 0x8000_0B0E, 0x8000_0B0D), None),
        (state(changes={f.GUEST_INTERRUPT_STATUS: 0x40}), gp_during(0x8000_0040), gp_during(0x8000_0B0D), None),
        (BEYOND_MEMORY, gp_during(0x8000_0015), GP, "no-memory-there"),
        (state("32-bit paging"), gp_during(0x8000_0015), GP, None),
    ],
)
def test_known_classes_are_narrow(changed: State, ours: Result, theirs: Result, expected: str | None) -> None:
    assert known(changed, ours, theirs) == expected


def test_sort() -> None:
    explained = disagreement(state(changes={f.GUEST_RIP: RIP}), INVALID_GUEST, GP)
    other = disagreement(state(), INT3, GP)
    outcome = sort(KNOWN, case_of(GENERATOR, MEMORY), [explained, other])
    assert [(each.id, found) for each, found in outcome.explained.items()] == [("rip-not-canonical", [explained])]
    assert outcome.unexplained == [other]


def test_counts__a_state_drawn_twice_is_two() -> None:
    twice = [disagreement(state(changes={f.GUEST_RIP: RIP}), INVALID_GUEST, GP) for _ in range(2)]
    assert twice[0] == twice[1]
    outcome = sort(KNOWN, case_of(GENERATOR, MEMORY), twice)
    assert outcome.counts() == {("rip-not-canonical", "vtx"): 2}


def test_every_class_is_documented() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert [each.id for each in KNOWN if f"\n`{each.id}`\n: " not in document] == []


def test_rom__has_what_the_machine_has_in_memory() -> None:
    machine = booted(PROFILE, find_image("entries").data, ENTRIES.module([state()]), [])
    rom = rom_of(machine)
    assert len(rom) % 0x1_0000 == 0
    assert rom[-16] == 0xE9  # the reset vector is a jump
    for address in (0x10_0000, machine.cpu.state.rip & ~0xFFF):
        assert machine.memory.read(address, 0x1000) in rom
