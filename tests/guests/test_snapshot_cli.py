"""``vtx run --save-snapshot`` and ``--from-snapshot``."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_guests import RunVtx, exit_with, multiboot


def test_a_run_goes_on_where_it_was_stopped(vtx: RunVtx, hello: str, tmp_path: Path) -> None:
    whole = vtx("run", hello)
    first = vtx("run", hello, "--max-instructions", 15000, "--save-snapshot", tmp_path / "s")
    assert (first.status, first.last_line) == (124, "vtx: instruction limit of 15000 reached")
    for _ in range(2):
        second = vtx("run", "--from-snapshot", tmp_path / "s")
        assert second.status == 0
        assert first.stdout + second.stdout == whole.stdout
        assert second.last_line == whole.last_line


def test_the_machine_is_that_of_the_snapshot(vtx: RunVtx, image: Path, tmp_path: Path) -> None:
    image.write_bytes(multiboot(exit_with(3)))
    options = ("--memory", "32M", "--smp", 3, "--profile", "everything", "--max-instructions", 1)
    assert vtx("run", image, *options, "--save-snapshot", tmp_path / "s").status == 124
    assert vtx("run", "--from-snapshot", tmp_path / "s").status == 3
    refused = vtx("run", "--from-snapshot", tmp_path / "s", "--profile", "skylake-server")
    assert refused.status == 2
    assert "needs a machine with everything for the profile" in refused.stderr


def test_options_of_the_machine_and_the_guest_are_refused(vtx: RunVtx, image: Path, tmp_path: Path) -> None:
    image.write_bytes(multiboot(exit_with(3)))
    vtx("run", image, "--max-instructions", 1, "--save-snapshot", tmp_path / "s")
    for extra in (("--memory", "64M"), ("--smp", 2), ("--initrd", image), (image,)):
        done = vtx("run", "--from-snapshot", tmp_path / "s", *extra)
        assert done.status == 2
        assert done.stderr.startswith("vtx: --from-snapshot ")
        assert done.stderr.count("\n") == 1
    assert vtx("run").status == 2


@pytest.mark.parametrize(("content", "why"), [(b"nothing", "not a snapshot"), (b"vtx snapshot\r\n", "truncated")])
def test_a_file_that_is_no_snapshot__is_one_line(vtx: RunVtx, image: Path, content: bytes, why: str) -> None:
    image.write_bytes(content)
    done = vtx("run", "--from-snapshot", image)
    assert (done.status, done.stdout, done.stderr.count("\n")) == (2, b"", 1)
    assert why in done.stderr
