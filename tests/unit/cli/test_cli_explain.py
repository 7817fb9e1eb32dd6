"""``vtx explain``: the right rule for each broken VMCS, its statuses, its two forms of output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmcs import fields as f
from vmcs.capabilities import Capabilities
from vmcs.template import template
from vtx.cli.main import main
from vtx.x86.profile import load_profile, profile_names

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples" / "vmcs"
INTEL = [name for name in profile_names() if load_profile(name).vmx_capabilities]

# What each example breaks first, typed from the story it tells.
REPORTED = {
    "01-vpid-zero": "controls.vpid-not-zero",
    "02-misaligned-io-bitmap": "controls.io-bitmap-a-address",
    "03-ept-walk-length": "controls.eptp-walk-length",
    "04-host-cr4-without-vmxe": "host.cr4-fixed",
    "05-host-tr-null": "host.tr-not-null",
    "06-host-rip-non-canonical": "host.64-bit-host-rip",
    "07-guest-efer-lma": "guest.efer-lma",
    "08-guest-rflags": "guest.rflags-fixed",
    "09-guest-tr-available": "guest.tr-type",
    "10-link-pointer-zero": "guest.link-pointer-revision",
    "11-msr-load-fs-base": "msr-load.segment-base",
    "12-vmresume-too-early": "basic.resume-needs-launched",
}


def explain(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main(["explain", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    return json.loads(explain(capsys, "--json", *arguments)[1])


def test_examples__are_those_tested() -> None:
    assert {path.stem for path in EXAMPLES.iterdir()} == set(REPORTED)


@pytest.mark.parametrize("name", REPORTED)
def test_example__names_the_right_rule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / f"{name}.json"
    status, out, err = explain(capsys, path)
    assert (status, err) == (1, "")
    assert f"\n* {REPORTED[name]}: " in out
    assert as_json(capsys, path)["reported"] == REPORTED[name]


@pytest.mark.parametrize("name", [name for name in REPORTED if not name.startswith(("10", "11", "12"))])
def test_example__enters_once_the_advice_is_taken(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is called legal is legal: taking the advice on what is reported, again and again, ends in success."""
    document = json.loads((EXAMPLES / f"{name}.json").read_text())
    corrected = tmp_path / "corrected.json"
    for _ in range(3):
        corrected.write_text(json.dumps(document))
        result = as_json(capsys, corrected)
        if result["succeeds"]:
            return
        assert result["violations"][0]["legal"]
        document["fields"] |= result["violations"][0]["example"]
    pytest.fail(f"the advice leads nowhere: {result['violations']}")


def test_text__is_an_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = explain(capsys, EXAMPLES / "02-misaligned-io-bitmap.json")
    assert out == (
        "VMLAUNCH fails on skylake-server: VMfailValid(7). 1 rule is broken.\n"
        "\n"
        "checks on VMX controls:\n"
        "\n"
        '* controls.io-bitmap-a-address: If "use I/O bitmaps" is 1: the address of I/O bitmap A is 4096-byte aligned '
        "and within the physical-address width\n"
        "    outcome: VMfailValid(7)\n"
        "    Primary processor-based VM-execution controls = 0x860061f2\n"
        "    Address of I/O bitmap A = 0x5010 <- bit 4\n"
        "    legal: bits 63:46 and 11:0 of Address of I/O bitmap A are 0\n"
        "    for example: Address of I/O bitmap A = 0x5000\n"
        '    see SDM Vol. 3, "VM Entries", "VM-Execution Control Fields"\n'
    )


@pytest.mark.parametrize("profile", INTEL)
def test_template__enters_on_its_profile(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = explain(capsys, "--profile", profile, "--template")
    assert status == 0
    file = tmp_path / "template.json"
    file.write_text(text)
    result = as_json(capsys, "--profile", profile, file)
    assert result == {
        "instruction": "VMLAUNCH",
        "succeeds": True,
        "reported": None,
        "violations": [],
        "not_judged": [],
    }


def test_profile__decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same VMCS of real-address mode enters where there are unrestricted guests, and nowhere else."""
    fields = json.loads(explain(capsys, "--profile", "nehalem-server", "--template")[1])["fields"]
    fields["Guest CR0"] = "0x30"
    file = tmp_path / "vmcs.json"
    file.write_text(json.dumps({"fields": fields}))
    result = as_json(capsys, "--profile", "nehalem-server", file)
    cr0 = next(violation for violation in result["violations"] if violation["id"] == "guest.cr0-fixed")
    assert cr0["fields"][0] == {
        "name": "Guest CR0",
        "value": 0x30,
        "text": "0x30 (ET, NE)",
        "at_fault": 0x8000_0001,
    }


def test_region__is_read_like_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vmcs = template(Capabilities(load_profile("skylake-server").vmx_capabilities))
    good, bad = tmp_path / "good.bin", tmp_path / "bad.bin"
    good.write_bytes(vmcs.to_image())
    vmcs[f.GUEST_RFLAGS] = 0x4002
    vmcs[f.HOST_CR0] = 0
    bad.write_bytes(vmcs.to_image())
    assert explain(capsys, good)[0] == 0
    result = as_json(capsys, bad)
    assert [violation["id"] for violation in result["violations"]] == ["host.cr0-fixed"]
    assert result["violations"][0]["stage"] == "checks on the host-state area"
    vmcs[f.VMCS_LINK_POINTER] = 0x1000
    bad.write_bytes(vmcs.to_image())
    result = as_json(capsys, bad)
    assert {"id": "guest.link-pointer-revision", "why": "memory at 0x1000 is not known"} in result["not_judged"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "vtx: name a FILE, or use --template (try 'vtx explain --help')\n"),
        (("/nonexistent",), "vtx: cannot read '/nonexistent': No such file or directory\n"),
        (("--profile", "z80", "--template"), "vtx: profile z80: expected a profile name"),
        (("--template", "--nonsense"), "vtx: No such option"),
    ],
)
def test_usage__is_refused_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = explain(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("data", [b"", b"{", b'{"fields": 1}', b"\x7fELF", bytes(4096), b"{" * 5000, b"\xff{"])
def test_input__is_refused_in_one_line(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "input"
    file.write_bytes(data)
    status, out, err = explain(capsys, file)
    assert (status, out) == (2, "")
    assert err.startswith(f"vtx: {file}: ")
    assert err.count("\n") == 1
