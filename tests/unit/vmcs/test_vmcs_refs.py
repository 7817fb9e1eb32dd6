"""Every citation resolves in the pinned table of contents."""

import pytest

from vmcs import rules
from vmcs.controls import CONTROLS
from vmcs.exits import EXIT_REASONS
from vmcs.fields import FIELDS
from vmcs.refs import SDM_CONTENTS, Reference, sdm
from vmcs.rules import msr_load

REFERENCES: list[Reference] = [
    *(field.ref for field in FIELDS),
    *(control.ref for control in CONTROLS),
    *(reason.ref for reason in EXIT_REASONS),
    *(rule.ref for rule in rules.ALL_RULES),
    *(rule.ref for rule in msr_load.RULES),
]


def test_citations__resolve() -> None:
    for reference in REFERENCES:
        volume, sections = SDM_CONTENTS[reference.chapter]
        assert reference.volume == volume
        assert reference.section in sections


def test_citations__hold_no_section_numbers() -> None:
    for chapter, (_, sections) in SDM_CONTENTS.items():
        for title in (chapter, *sections):
            assert not title[0].isdigit() or title.split("-")[0] in ("16", "32", "64"), title


def test_citation__reads_as_volume_and_titles() -> None:
    assert str(sdm("VM Exits", "VMX Aborts")) == 'SDM Vol. 3, "VM Exits", "VMX Aborts"'


@pytest.mark.parametrize(("chapter", "section"), [("VM Exits", "VMX Abort"), ("VM Leaves", "VMX Aborts")])
def test_sdm__refuses_unknown_titles(chapter: str, section: str) -> None:
    with pytest.raises(KeyError):
        sdm(chapter, section)
