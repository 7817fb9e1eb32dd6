"""The wheel works by itself: installed into an empty environment it runs a bundled guest, without a compiler."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = pytest.mark.slow


def run(*command: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=directory, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the tree stays as it is."""
    directory = tmp_path_factory.mktemp("wheel")
    copy = directory / "source"
    done = run("cp", "-r", *(ROOT / name for name in SOURCES), make_directory(copy), directory=directory)
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", directory, copy, directory=directory)
    assert done.returncode == 0, done.stderr
    return next(directory.glob("vtx-*.whl"))


SOURCES = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "vtx", "vmcs"]


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path


def test_holds_data_files_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("vtx/images/hello.elf", "vtx/images/nested.elf", "vtx/profiles/skylake-server.toml", "vtx/py.typed"):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "hdl_tests/", "docs/", "guests/"))]


def test_runs_hello_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "venv", tmp_path / "venv", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(tmp_path / "venv/bin/pip", "install", "-q", wheel, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(tmp_path / "venv/bin/vtx", "run", "hello", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[hello] the guest halted: done" in done.stdout
