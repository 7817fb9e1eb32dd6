"""``vtx fuzz entries``: what it lists, prints, and ends with."""

import pytest

from vtx.cli.main import main
from vtx.x86.profile import Profile


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "entries", "--list", "--count", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert lines[0] == "0: 64-bit: as it is"


def test_without_bochs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["fuzz", "entries", "--count", "1"]) == 2
    assert capsys.readouterr().err == "vtx: cannot compare: bochs is not installed\n"


def fake(result: str) -> object:
    def runner(*arguments: Profile | bytes | str) -> str:
        return f"msr 480 2b\n0 {result}\nend\n"

    return runner


@pytest.mark.parametrize(("theirs", "status"), [("exit 0 0 80000603 0", 0), ("valid 7", 1)])
def test_result(theirs: str, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtx.fuzz.on_vtx.on_vtx", fake("exit 0 0 80000603 0"))
    monkeypatch.setattr("vtx.fuzz.on_others.on_bochs", fake(theirs))
    assert main(["fuzz", "entries", "--count", "1"]) == status
    out = capsys.readouterr().out
    assert ("VMfailValid(7)" in out) is bool(status)


def test_list_of_vmruns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "vmruns", "--oracle", "bochs", "--list", "--count", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert lines[0] == "0: 64-bit: as it is"


@pytest.mark.parametrize(("oracle", "program"), [("bochs", "bochs"), ("qemu", "qemu-system-x86_64")])
def test_vmruns_without_the_other(
    oracle: str, program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["fuzz", "vmruns", "--oracle", oracle, "--count", "1"]) == 2
    assert capsys.readouterr().err == f"vtx: cannot compare: {program} is not installed\n"
