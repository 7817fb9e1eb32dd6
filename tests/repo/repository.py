"""The repository as the whole-repository tests see it: its files, and its modules without importing them."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parents[2]
PACKAGES = ("vmcs", "vtx", "hdl_tests")


@frozen
class Module:
    """A module: its dotted name, its file, its syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @property
    def lines(self) -> int:
        return len(self.path.read_text().splitlines())

    def docstrings(self) -> Iterator[str]:
        """The docstrings of the module and of everything in it."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""

    def functions(self) -> Iterator[ast.FunctionDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef))


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tracked_files() -> tuple[Path, ...]:
    """Files of the repository as git knows them; without git (an unpacked sdist), the ones of the packages."""
    if not (ROOT / ".git").exists():
        return tuple(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    command = ["git", "-C", str(ROOT), "-c", "safe.directory=*", "ls-files", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return tuple(ROOT / name for name in names if name and (ROOT / name).is_file())


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module of the packages, tests aside."""
    return tuple(
        Module(_name(path), path, ast.parse(path.read_text()))
        for path in tracked_files()
        if path.suffix == ".py"
        and path.relative_to(ROOT).parts[0] in PACKAGES
        and not path.name.startswith(("test_", "conftest"))
    )


def text_of(name: str) -> str:
    """The text of a file by its path in the repository."""
    return (ROOT / name).read_text()
