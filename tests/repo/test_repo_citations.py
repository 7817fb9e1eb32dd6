"""Every citation in a docstring names titles that the manuals have, and never a section number."""

from __future__ import annotations

import re
import tomllib
from itertools import chain

import pytest
from repository import ROOT, Module, modules

from vmcs.refs import SDM_CONTENTS

TITLES = tomllib.loads((ROOT / "tests/repo/manual_titles.toml").read_text())
CITATION = re.compile(r"Spec: (.*?)(?:\n\n|\Z)", re.DOTALL)
QUOTED = re.compile(r'"([^"]+)"')
NUMBERED = re.compile(r"\b(?:[Ss]ection|[Cc]hapter|Table|Figure)s? \d|§")
CITING = [pytest.param(module, id=module.name) for module in modules() if '"""' in module.path.read_text()]


def fold(title: str) -> str:
    """Titles differ in case between the running text and the table of contents."""
    return title.casefold()


KNOWN = {fold(title) for manual in TITLES.values() for title in chain.from_iterable(manual.values())}


@pytest.mark.parametrize("module", CITING)
def test_cited_titles_exist(module: Module) -> None:
    cited = {
        " ".join(title.split())
        for text in module.docstrings()
        for citation in CITATION.findall(text)
        for title in QUOTED.findall(citation)
    }
    assert not {title for title in cited if fold(title) not in KNOWN}


@pytest.mark.parametrize("module", CITING)
def test_citations_hold_no_numbers(module: Module) -> None:
    assert not NUMBERED.search("\n".join(module.docstrings()))


def test_pinned_contents_of_vmcs_agree() -> None:
    """`vmcs.refs` resolves its own citations against a table of its own; typed twice, they must agree."""
    titles = set(SDM_CONTENTS) | {section for _, sections in SDM_CONTENTS.values() for section in sections}
    assert not {title for title in titles if fold(title) not in KNOWN}
