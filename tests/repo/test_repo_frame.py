"""Files around the code: what they promise exists, and what must not be in them is not."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from repository import ROOT, text_of, tracked_files

TEXT = [path for path in tracked_files() if path.suffix not in {".elf", ".png", ".bin"} and path.name != "LICENSE"]
PERSONAL_PATH = re.compile(r"(?<![\w.])/(?:work|tmp|root|home)/\w")
BUILD_FILES = ["Makefile", ".ci/run", "pyproject.toml", "setup.py", ".pre-commit-config.yaml", "guests/Makefile"]
FRAGMENT = re.compile(r"(\d+|\+[a-z0-9-]+)(\.\d+)?\.(feature|bugfix|doc|removal)\.md")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("path", TEXT, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_no_path_of_somebodys_machine(path: Path) -> None:
    assert not PERSONAL_PATH.findall(path.read_text(errors="replace"))


@pytest.mark.parametrize("name", BUILD_FILES)
def test_build_files_name_no_hosts(name: str) -> None:
    assert not re.search(r"https?://|index-url|--index", text_of(name))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/getting-started.md", "docs/testing.md"])
def test_documented_make_targets_exist(name: str) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(name), re.MULTILINE))
    assert named, f"{name} names no make target"
    assert named <= targets()


def test_every_make_target_is_phony_and_explained() -> None:
    makefile = text_of("Makefile")
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    assert targets() == phony
    explained = set(re.findall(r"^# make ([a-z-]+)", makefile, re.MULTILINE))
    assert {"run", "test", "unit", "hdl", "bench", "golden", "wheel"} <= explained <= targets()


def test_make_accepts_every_target() -> None:
    """A dry run: rules and prerequisites resolve."""
    for target in sorted(targets()):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_continuous_integration_is_make_test() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o100
    assert script.read_text().rstrip().endswith("exec make --keep-going test")


def test_licence_is_the_whole_gpl() -> None:
    licence = text_of("LICENSE")
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 2, June 1991" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert tomllib.loads(text_of("pyproject.toml"))["project"]["license"] == "GPL-2.0-or-later"


def test_changelog_fragments_are_well_formed() -> None:
    for path in (ROOT / "changelog.d").iterdir():
        if path.name != "README.md":
            assert FRAGMENT.fullmatch(path.name), path.name
            text = path.read_text().strip()
            assert text.endswith("."), f"{path.name}: a sentence ends with a full stop"
            assert not text.startswith(("-", "#")), f"{path.name}: towncrier adds the markup"


def test_changelog_can_be_built() -> None:
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "## 0" in done.stdout


def test_import_layers_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_every_run_time_dependency_is_explained() -> None:
    explained = text_of("docs/dependencies.md")
    for requirement in tomllib.loads(text_of("pyproject.toml"))["project"]["dependencies"]:
        name = re.split(r"[<>=]", requirement)[0]
        assert re.search(rf"^\| {re.escape(name)} \|", explained, re.MULTILINE), name
