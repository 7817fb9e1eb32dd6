"""Directives that print the project's own records, so that the documentation cannot disagree with the code.

A table each: ``rules STAGE``, ``msr-rules``, ``instruction-rules``, ``controls WORD``, ``allowed-controls PROFILE``,
``exit-reasons``, ``instruction-errors``, ``vmcs-fields``, ``trace-events``. A list: ``features PROFILE``,
``controls-of-no-profile``.
``modules PACKAGE``: the modules named in the body, in that order, each with the first sentence of its docstring.
``interpretations``: the paragraphs of all docstrings that begin with "Interpretations.".
"""

from __future__ import annotations

import ast
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from vmcs import controls, exits, fields, instruction_rules
from vmcs.capabilities import Capabilities
from vmcs.rules import RULES, Stage, msr_load
from vtx import events
from vtx.x86.profile import load_profile, profile_names

ROOT = Path(__file__).parents[2]
PACKAGES = ("vmcs", "vtx")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]) -> nodes.table:
    """A table of plain text; cells of the first column are literals."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in widths), cols=len(headings))
    head = nodes.row("", *(nodes.entry("", nodes.paragraph(text=heading)) for heading in headings))
    body = nodes.tbody()
    for first, *rest in rows:
        cells = [nodes.paragraph("", "", nodes.literal(text=first)), *(nodes.paragraph(text=cell) for cell in rest)]
        body += nodes.row("", *(nodes.entry("", cell) for cell in cells))
    group += nodes.thead("", head)
    group += body
    return nodes.table("", group, classes=["records"])


class Rules(Directive):
    """The VM-entry rules of one stage."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        rules = RULES[Stage[self.arguments[0]]]
        rows = ((rule.id, rule.statement(), str(rule.outcome), str(rule.ref)) for rule in rules)
        return [table(("Rule", "Demand", "Otherwise", "Manual"), rows, (24, 40, 16, 20))]


class MsrRules(Directive):
    """The rules for entries of MSR areas."""

    def run(self) -> list[nodes.Node]:
        rows = ((rule.id, rule.sentence, str(rule.ref)) for rule in msr_load.RULES)
        return [table(("Rule", "Demand", "Manual"), rows, (25, 50, 25))]


class InstructionRules(Directive):
    """The demands of VMX instructions other than VM entry."""

    def run(self) -> list[nodes.Node]:
        rows = (
            (
                rule.id,
                rule.sentence,
                f"VMfailValid({int(rule.error)})" if rule.error else "VMfailInvalid",
                str(rule.ref),
            )
            for rule in instruction_rules.RULES
        )
        return [table(("Rule", "Demand", "Otherwise", "Manual"), rows, (24, 40, 16, 20))]


class Controls(Directive):
    """The controls of one control word."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        word = controls.ControlWord[self.arguments[0]]
        rows = (
            (str(each.bit), each.name, "default1" if each.default1 else "default0") for each in controls.BY_WORD[word]
        )
        return [table(("Bit", "Control", "Class"), rows, (10, 70, 20))]


class ExitReasons(Directive):
    """All basic exit reasons."""

    def run(self) -> list[nodes.Node]:
        rows = (
            (
                str(int(each.number)),
                each.name,
                each.gate.name if each.gate else "",
                each.qualification.name if each.qualification else each.plain_qualification or "cleared",
                ", ".join(field.name for field in each.defines),
            )
            for each in exits.EXIT_REASONS
        )
        headings = ("Number", "Basic exit reason", "Only with", "Exit qualification", "Further fields defined")
        return [table(headings, rows, (8, 25, 17, 20, 30))]


class InstructionErrors(Directive):
    """All VM-instruction errors."""

    def run(self) -> list[nodes.Node]:
        rows = ((str(each.value), each.name.lower().replace("_", " ")) for each in exits.InstructionError)
        return [table(("Number", "Meaning"), rows, (10, 90))]


class VmcsFields(Directive):
    """All VMCS fields."""

    def run(self) -> list[nodes.Node]:
        rows = ((f"{each.encoding:04X}", each.name, str(each.bits), str(each.exists)) for each in fields.FIELDS)
        return [table(("Encoding", "Field", "Bits", "Exists on"), rows, (10, 40, 8, 42))]


class TraceEvents(Directive):
    """All events of a trace."""

    def run(self) -> list[nodes.Node]:
        rows = (
            (
                event.name,
                first_sentence(inspect.getdoc(event) or "").replace("`", ""),
                ", ".join(each.name for each in attrs.fields(event)),
            )
            for event in typing.get_args(events.TraceEvent)
        )
        return [table(("Event", "Meaning", "Fields"), rows, (22, 48, 30))]


class AllowedControls(Directive):
    """The VMX controls whose 1-setting one profile allows, by control word."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        capabilities = Capabilities(load_profile(self.arguments[0]).vmx_capabilities)
        rows = (
            (word.value, ", ".join(each.name for each in listed if capabilities.allows(each)) or "none")
            for word, listed in controls.BY_WORD.items()
        )
        return [table(("Control word", "Controls that may be 1"), rows, (30, 70))]


class ControlsOfNoProfile(Directive):
    """The VMX controls that no bundled profile allows."""

    def run(self) -> list[nodes.Node]:
        processors = [Capabilities(load_profile(name).vmx_capabilities) for name in profile_names()]
        missing = (
            each.name for each in controls.CONTROLS if each.name and not any(one.allows(each) for one in processors)
        )
        return [nodes.paragraph(text=", ".join(dict.fromkeys(missing)) + ".")]


class Features(Directive):
    """The CPUID features of one profile."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        profile = load_profile(self.arguments[0])
        return [nodes.paragraph(text=", ".join(sorted(profile.features, key=str.lower)) + ".")]


def docstring(module: str) -> str:
    """The docstring of a module by its dotted name, without importing it."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.get_docstring(ast.parse(file.read_text())) or ""


def first_sentence(text: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(text.split("\n\n", maxsplit=1)[0].split())


def all_modules() -> Iterator[str]:
    """Dotted names of all modules and packages, in alphabetical order."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class _Markup(Directive):
    """A directive whose result is text in the markup of docstrings."""

    has_content = True

    def parse(self, lines: Sequence[str]) -> list[nodes.Node]:
        """Nodes of ``lines``."""
        container = nodes.container()
        self.state.nested_parse(StringList(list(lines), source="docstrings"), self.content_offset, container)
        return container.children


class Modules(_Markup):
    """Modules of a package in the order of the body."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name in (line.strip() for line in self.content if line.strip()):
            module = f"{self.arguments[0]}.{name}"
            lines += [f"`{module}`", f": {first_sentence(docstring(module))}", ""]
        return self.parse(lines)


class Interpretations(_Markup):
    """Every paragraph of a docstring that begins with "Interpretations."."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for module in all_modules():
            for paragraph in docstring(module).split("\n\n"):
                words = re.fullmatch(r"Interpretations?[.:]\s+(.*)", paragraph.strip(), re.DOTALL)
                if words:
                    lines += [f"`{module}`", ": " + " ".join(words.group(1).split()), ""]
        return self.parse(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    for name, directive in {
        "rules": Rules,
        "msr-rules": MsrRules,
        "instruction-rules": InstructionRules,
        "controls": Controls,
        "exit-reasons": ExitReasons,
        "instruction-errors": InstructionErrors,
        "vmcs-fields": VmcsFields,
        "trace-events": TraceEvents,
        "allowed-controls": AllowedControls,
        "controls-of-no-profile": ControlsOfNoProfile,
        "features": Features,
        "modules": Modules,
        "interpretations": Interpretations,
    }.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True}
