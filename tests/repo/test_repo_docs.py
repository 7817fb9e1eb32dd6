"""The documentation agrees with the code: examples run, limits are complete, the reading guide misses nothing."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT, modules, text_of

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
EXAMPLE = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"^```text\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODULES = re.compile(r"```\{modules\} (\S+)\n(.*?)```", re.DOTALL)
READ_FROM = ("vmcs", "vtx")
UNGUIDED = {"vtx.cli.__main__"}


def examples(page: Path) -> str:
    """All examples of a page, in order, as one program."""
    return "\n".join(textwrap.dedent(body) for _, body in EXAMPLE.findall(page.read_text()))


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They run, and what the page shows of their output is in their output."""
    code = examples(page)
    exec(compile(code, str(page), "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    for shown in OUTPUT.findall(page.read_text()):
        assert shown in printed


def not_modelled() -> Iterator[tuple[str, str]]:
    """(module, literal beginning of the name) for every ``raise NotModelled(...)``."""
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "NotModelled":
                match node.args:
                    case [ast.Constant(value=str(name))]:
                        yield module.name, name
                    case [ast.JoinedStr(values=[ast.Constant(value=str(name)), *_])]:
                        yield module.name, name.rstrip(" '\"(")
                    case _:
                        pytest.fail(f"{module.name}: NotModelled without a name that can be read off")


def test_limits_list_everything_not_modelled() -> None:
    limits = text_of("docs/limits.md")
    found = list(not_modelled())
    assert found, "the search for NotModelled finds nothing any more"
    assert not [(module, name) for module, name in found if f"\n`{name}`" not in limits]


def test_limits_list_nothing_else() -> None:
    section = re.search(r"^## Not modelled$(.*?)^## ", text_of("docs/limits.md"), re.DOTALL | re.MULTILINE)
    assert section
    listed = set(re.findall(r"^`(.+)`$", section[1], re.MULTILINE))
    assert listed == {name for _, name in not_modelled()}


def guided() -> list[str]:
    guide = text_of("docs/reading-guide.md")
    return [f"{package}.{name}" for package, names in MODULES.findall(guide) for name in names.split()]


def test_reading_guide_names_every_module_once() -> None:
    names = guided()
    assert len(names) == len(set(names))
    existing = {
        module.name
        for module in modules()
        if module.name.startswith(READ_FROM) and module.path.name != "__init__.py" and module.name not in UNGUIDED
    }
    assert existing - set(names) == set(), "modules that the reading guide leaves out"
    assert set(names) - existing == set(), "modules that do not exist"


def test_reading_guide_is_in_dependency_order() -> None:
    """A module comes after the modules of its own package that it imports at run time."""
    position = {name: index for index, name in enumerate(guided())}
    trees = {module.name: module.tree for module in modules()}
    for name, index in position.items():
        for imported in run_time_imports(trees[name]):
            if imported.rpartition(".")[0] == name.rpartition(".")[0]:
                assert position.get(imported, -1) < index, f"{name} is read before {imported}, which it imports"


def run_time_imports(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_mentioned_exist(page: Path) -> None:
    mentioned = re.findall(r"`((?:vmcs|vtx|tests|docs|guests|hdl_tests)/[\w./-]*)`", page.read_text())
    built = {"vtx/images/"}
    assert not [path for path in mentioned if path not in built and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_mentioned_exist(page: Path) -> None:
    """Dotted names in backquotes are modules, or names defined in one."""
    known = {module.name: module.tree for module in modules()}
    for name in re.findall(r"`((?:vmcs|vtx)(?:\.\w+)+)`", page.read_text()):
        module, _, member = name.rpartition(".")
        if name not in known:
            assert module in known, name
            assert member in _definitions(known[module]), name


def _definitions(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
