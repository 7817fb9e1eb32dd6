"""``vtx guests``, ``vtx profiles``, help and version, in a pipe."""

from __future__ import annotations

import pytest

from vtx.cli.images import DESCRIPTIONS, bundled_names
from vtx.cli.main import main
from vtx.cli.table import print_table
from vtx.x86.profile import profile_names


def test_guests__lists_every_one_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guests"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(set(DESCRIPTIONS) | set(bundled_names()))
    for name, text in DESCRIPTIONS.items():
        assert any(line.startswith(name) and text in line for line in lines)


def test_profiles__lists_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(profile_names())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["bench", "-h"], ["guests", "-h"]])
def test_help__is_on_standard_output_and_a_success(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("Usage: vtx")


def test_help__lists_the_commands_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    assert [word for word in ("run", "guests", "profiles", "bench") if f"\n  {word} " in out] == [
        "run",
        "guests",
        "profiles",
        "bench",
    ]


def test_run_help__names_every_status(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--help"])
    out = capsys.readouterr().out
    for status in ("124", "125", "130", "2"):
        assert f"\n    {status} " in out


def test_no_command__is_help_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: vtx" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vtx ")


def test_a_bug_in_the_model__is_one_line_and_its_own_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[str]:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("vtx.cli.listings.bundled_names", broken)
    monkeypatch.delenv("VTX_TRACEBACK", raising=False)
    assert main(["guests"]) == 70
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("vtx: internal error: ZeroDivisionError: two lines")
    monkeypatch.setenv("VTX_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["guests"])


def test_a_table_on_a_terminal__is_drawn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    print_table(("what", "figure"), [("one", "1"), ("two", "22")], right=frozenset({1}))
    out = capsys.readouterr().out
    assert "│" in out
    assert "│      1 │" in out


def test_a_table_in_a_pipe__is_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("what", "figure"), [("one", "1"), ("two", "22")], right=frozenset({1}))
    assert capsys.readouterr().out == "what  figure\none        1\ntwo       22\n"
