"""``vtx explain`` for AMD processors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmcs.document import DocumentError
from vmcs.vmcb.document import from_image, parse, template
from vmcs.vmcb.fields import BY_NAME, Vmcb
from vtx.cli.main import main

ZEN = ("--profile", "zen-server")


def explain(*arguments: str) -> int:
    return main(["explain", *ZEN, *arguments])


def test_the_template_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("--template") == 0
    file = tmp_path / "vmcb.json"
    file.write_text(capsys.readouterr().out)
    assert explain(str(file)) == 0
    assert capsys.readouterr().out == "VMRUN succeeds on zen-server.\n"


def test_every_broken_rule_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(template())
    document["fields"] |= {"guest ASID": 0, "EFER": "0xd01"}
    file = tmp_path / "vmcb.json"
    file.write_text(json.dumps(document))
    assert explain(str(file)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "VMRUN fails on zen-server: #VMEXIT(VMEXIT_INVALID). 2 rules are broken."
    assert lines[2:6] == [
        "  vmrun.efer-svme: EFER.SVME is 1",
        "    outcome: #VMEXIT(VMEXIT_INVALID)",
        "    EFER = 0xd01 <- bit 12",
        '    see APM Vol. 2, "Secure Virtual Machine", "Canonicalization and Consistency Checks"',
    ]
    assert explain("--json", str(file)) == 1
    result = json.loads(capsys.readouterr().out)
    assert [each["id"] for each in result["violations"]] == ["vmrun.efer-svme", "vmrun.asid-not-zero"]
    assert result["violations"][0]["values"] == [{"field": "EFER", "value": "0xd01", "at_fault": "0x1000"}]


def test_a_page_of_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vmcb = parse(template()).vmcb
    vmcb[BY_NAME["CR4"]] = 0x2020
    file = tmp_path / "vmcb.bin"
    file.write_bytes(vmcb.to_image().ljust(0x1000, b"\0"))
    assert explain(str(file)) == 1
    assert "vmrun.cr4-reserved" in capsys.readouterr().out
    assert from_image(Vmcb().to_image()).vmcb.values == Vmcb().values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"field": {}}', "unknown member 'field'"),
        ('{"fields": []}', "fields: not a JSON object"),
        ('{"host paging": 1}', "host paging: neither true nor false"),
        ('{"fields": {"CR": 1}}', "unknown field 'CR'; did you mean 'CR"),
        ('{"fields": {"CPL": 256}}', "CPL: not a number of 8 bits: 256"),
        ('{"fields": {"CPL": true}}', "CPL: not a number of 8 bits: True"),
        ('{"fields": {"CPL": "three"}}', "CPL: not a number of 8 bits: 'three'"),
    ],
)
def test_documents_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        parse(text)


def test_too_short_for_a_vmcb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vmcb.bin"
    file.write_bytes(bytes(100))
    assert explain(str(file)) == 2
    assert "100 bytes are no VMCB" in capsys.readouterr().err
