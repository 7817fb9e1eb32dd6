"""The classes of known differences of VMRUNs: narrow, and documented."""

from pathlib import Path

import pytest

from vmcs.vmcb.fields import BY_NAME
from vtx.fuzz.classes import explanation
from vtx.fuzz.compare import Disagreement
from vtx.fuzz.drawing import State
from vtx.fuzz.vmruns import scene
from vtx.fuzz.vmruns.case import case_of
from vtx.fuzz.vmruns.experiment import ORACLES, experiment
from vtx.fuzz.vmruns.known import KNOWN
from vtx.fuzz.vmruns.programs import PROGRAMS, SLOT
from vtx.fuzz.vmruns.results import NO_ANSWER, Result

DOCUMENT = Path(__file__).parents[3] / "docs" / "interpretations.md"
NAMES = [base.name for base in scene.BASES]
INVALID = Result("exit", (1 << 64) - 1)
HALTED, DB, UD, SS, GP = (Result("exit", code) for code in (0x78, 0x41, 0x46, 0x4C, 0x4D))
FLAGS_PUSHED = scene.STACK + 0x7E8


def classes(oracle: str, fields: dict[str, int], ours: Result, theirs: Result, base: str = "64-bit") -> list[str]:
    generator = ORACLES[oracle].generator(0)
    names = {each.name: each for each in scene.BY_ENCODING.values()}
    state = State(NAMES.index(base), tuple((names[name].encoding, value) for name, value in fields.items()))
    differing = experiment(generator).differences(state, ours, theirs)
    assert differing
    rules = tuple(violation.rule.id for violation in generator.violations(state))
    found = Disagreement(state, "", ours, theirs, rules, differing)
    return [each.id for each in explanation(KNOWN[oracle].known, case_of(generator)(found), differing)]


def at(program: str) -> dict[str, int]:
    number = next(number for number, each in enumerate(PROGRAMS) if each.name == program)
    return {"RIP": scene.CODE + number * SLOT}


def halted(**words: int) -> Result:
    return Result("exit", 0x78, changed=tuple((BY_NAME[name].offset, value) for name, value in words.items()))


def pushed(flags: int) -> Result:
    return Result("exit", 0x78, changed=((FLAGS_PUSHED, flags),))


def code_pushed(code: int) -> Result:
    return Result("exit", 0x78, changed=((scene.STACK + 0x7D0, code),))


def during(event: int) -> Result:
    return Result("exit", 0x4E, interrupted=event)


NEGATIVE, EXTENDED = {"EVENTINJ": 0x8001_FFF8_8000_0B0D}, 0xFFFF_FFFF_8001_FFF8
AND = at("MOV EAX, CR0")["RIP"] + 1  # AND AL, AL, which leaves AF undefined


@pytest.mark.parametrize("oracle", KNOWN)
def test_every_class_is_documented(oracle: str) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    classes = (*KNOWN[oracle].known, *KNOWN[oracle].readings)
    assert [each.id for each in classes if f"\n`{each.id}`\n: " not in document] == []
    assert {each.verdict for each in classes} <= {"vtx", "both", "Bochs", "QEMU"}


@pytest.mark.parametrize(
    ("oracle", "fields", "ours", "theirs", "expected"),
    [
        ("qemu", {"nested paging and encryption control": 1, "G_PAT": 2}, INVALID, HALTED, ["nested-paging-fields"]),
        ("bochs", {"nested paging and encryption control": 1, "G_PAT": 2}, INVALID, HALTED, []),
        ("bochs", {"CR3": 1 << 45}, INVALID, HALTED, ["cr3-reserved"]),
        # Something else is broken that nobody overlooks.
        ("bochs", {"CR3": 1 << 45, "guest ASID": 0}, INVALID, HALTED, []),
        ("bochs", {}, INVALID, HALTED, []),
        ("bochs", {"CR2": 5}, HALTED, halted(CR2=7), ["cr2"]),
        ("qemu", {"CR2": 5}, HALTED, halted(CR2=7), []),
        ("qemu", {}, pushed(0x1_0002), pushed(2), ["resume-flag"]),
        ("qemu", {}, pushed(0x1_0002), pushed(6), []),
        ("qemu", {}, pushed(2), NO_ANSWER, []),
        ("qemu", {"SFMASK": 1 << 40}, halted(SFMASK=0), HALTED, ["msr-widths"]),
        ("qemu", {"SFMASK": 1 << 40}, halted(SFMASK=1), HALTED, []),
        # Each class explains its part; what is left over makes the whole unexplained.
        ("qemu", {"SFMASK": 1 << 40}, halted(SFMASK=0, RFLAGS=2), halted(RFLAGS=0x82), []),
        (
            "qemu",
            {"SFMASK": 1 << 40, "RFLAGS": 0x8002},
            halted(SFMASK=0, RFLAGS=2),
            HALTED,
            ["msr-widths", "reserved-flags"],
        ),
        ("qemu", at("LTR"), GP, HALTED, ["null-tss"]),
        ("qemu", at("LTR"), HALTED, GP, []),
        ("qemu", at("LLDT"), GP, HALTED, []),
        ("qemu", at("INT1"), HALTED, UD, ["int1"]),
        ("qemu", at("INT1"), HALTED, GP, []),
        ("qemu", at("INT1"), HALTED, Result("exit", 0x7F, interrupted=0x8000_0306), ["int1"]),
        ("qemu", at("INT3"), HALTED, UD, []),
        ("qemu", {"RSP": 1 << 47 | 0x18}, SS, GP, ["canonical"]),
        ("qemu", {"RSP": 1 << 46}, SS, GP, []),
        ("qemu", {"RSP": 1 << 47 | 0x18}, GP, SS, []),
        ("qemu", at("WRMSR C0000082H") | {"RCX": 0xC000_0082, "RDX": 1 << 20}, GP, HALTED, ["canonical"]),
        ("qemu", at("WRMSR C0000082H") | {"RCX": 0xC000_0082}, GP, HALTED, []),
        ("bochs", {"CR2": 5, **at("MOV EAX, CR2")}, halted(RAX=5), halted(RAX=7), ["cr2"]),
        ("bochs", {"CR2": 5, **at("SMSW")}, halted(RAX=5), halted(RAX=7), []),
        ("bochs", at("SYSCALL") | {"RFLAGS": 0x102, "SFMASK": 0x100}, HALTED, DB, ["syscall-trap"]),
        ("bochs", at("SYSCALL") | {"RFLAGS": 0x102}, HALTED, DB, []),
        ("bochs", {"EVENTINJ": 0x8000_0303}, code_pushed(0x1A), code_pushed(0x1B), ["injected-int3"]),
        ("bochs", {"EVENTINJ": 0x8000_0306}, code_pushed(0x32), code_pushed(0x33), []),
        ("qemu", NEGATIVE, code_pushed(0x8001_FFF8), code_pushed(EXTENDED), ["error-code-width"]),
        ("qemu", NEGATIVE, code_pushed(0x8001_FFF0), code_pushed(EXTENDED), []),
        ("qemu", {"EVENTINJ": 0x8000_0433}, during(0x8000_0B0D), during(0x8000_0433), ["interrupted-event"]),
        ("qemu", {"EVENTINJ": 0x8000_0433}, during(0x8000_0433), during(0x8000_0B0D), []),
        ("qemu", {"EVENTINJ": 0x8000_0433}, during(0x8000_0B0D), during(0x8000_0434), []),
        ("bochs", {"DR6": 0xFFFF_8FF0}, halted(DR6=0xFFFF_CFF0), halted(DR6=0xFFFF_4FF0), ["debug-status"]),
        ("bochs", {"DR6": 0xFFFF_8FF0}, halted(DR6=0xFFFF_CFF0), halted(DR6=0xFFFF_8FF0), []),
        ("bochs", {"RIP": AND}, halted(RFLAGS=2), halted(RFLAGS=0x12), ["undefined-flags"]),
        ("bochs", {"RIP": AND}, halted(RFLAGS=2), halted(RFLAGS=0x42), []),
        ("bochs", at("SMSW"), halted(RFLAGS=2), halted(RFLAGS=0x12), []),
    ],
)
def test_known_classes_are_narrow(
    oracle: str, fields: dict[str, int], ours: Result, theirs: Result, expected: list[str]
) -> None:
    assert classes(oracle, fields, ours, theirs) == expected
