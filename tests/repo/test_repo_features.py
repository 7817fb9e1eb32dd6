"""The page of features tells of each control what the profiles say of it."""

from __future__ import annotations

import re

import pytest
from repository import text_of

from vmcs.capabilities import Capabilities
from vmcs.controls import BY_WORD, ControlWord
from vtx.vmx.view import UNMODELLED
from vtx.x86.profile import load_profile, profile_names

PAGE = text_of("docs/features.md")
CONTROLS = PAGE.partition("\n## Controls\n")[2]
PROCESSORS = {
    name.partition("-")[0]: Capabilities(profile.vmx_capabilities)
    for name, profile in ((name, load_profile(name)) for name in profile_names())
    if profile.vmx_capabilities and not name.startswith("bochs-")  # another model's VM entries, to compare with
}


def rows(word: ControlWord) -> dict[str, tuple[set[str], str]]:
    """Control: the profiles it is said to be in, and the remark."""
    section = re.search(rf"^### {re.escape(word.value)}$(.*?)(?=^### |\Z)", CONTROLS, re.M | re.S | re.I)
    assert section, word
    cells = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", section[1], re.MULTILINE)
    return {name: (set(who.split(", ")), remark) for name, who, remark in cells if name != "Control"}


@pytest.mark.parametrize("word", ControlWord)
def test_every_control_is_where_the_page_says(word: ControlWord) -> None:
    expected = {
        control.name: {name for name, processor in PROCESSORS.items() if processor.allows(control)} or {"none"}
        for control in BY_WORD[word]
    }
    assert {name: who for name, (who, _) in rows(word).items()} == expected


@pytest.mark.parametrize("word", ControlWord)
def test_what_no_profile_has_is_explained(word: ControlWord) -> None:
    assert not [name for name, (who, remark) in rows(word).items() if who == {"none"} and not remark]


def test_no_profile_allows_what_is_not_modelled() -> None:
    assert not [
        (control.name, name)
        for control in UNMODELLED
        for name, processor in PROCESSORS.items()
        if processor.allows(control)
    ]


def test_answers_are_yes_part_or_no() -> None:
    before = PAGE.partition("\n## Controls\n")[0]
    answers = re.findall(r"^\| [^|]+ \| ([^|]+) \| [^|]*\|$", before, re.MULTILINE)
    assert len(answers) > 40
    assert set(answers) == {"Modelled", "yes", "part", "no"}
