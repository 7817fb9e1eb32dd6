"""Why something failed, complete in one record: what was demanded, what was found, what would have been legal.

VM entries, VMX instructions and EPT misconfigurations are all explained in this form, for people and, as JSON, for
programs.
"""

from __future__ import annotations

from attrs import frozen

from vmcs.bits import describe_bits


@frozen
class Finding:
    """One value that was looked at; ``text`` shows it decoded, ``at_fault`` are the bits that broke the rule."""

    name: str
    value: int
    text: str
    at_fault: int = 0


@frozen
class Explanation:
    """A broken rule.

    ``id`` is stable, ``statement`` what must hold, ``outcome`` what software saw, ``citation`` where the manual says
    so. ``legal`` tells in words what this processor would have accepted; ``example`` are (name, value) that it
    accepts in place of what was found.
    """

    id: str
    statement: str
    outcome: str
    citation: str
    findings: tuple[Finding, ...] = ()
    legal: str = ""
    example: tuple[tuple[str, int], ...] = ()

    def render(self) -> str:
        """The explanation as lines of text."""
        lines = [f"{self.id}: {self.statement}", f"  outcome: {self.outcome}"]
        for each in self.findings:
            at_fault = f" <- {describe_bits(each.at_fault)}" if each.at_fault else ""
            lines.append(f"  {each.name} = {each.text}{at_fault}")
        example = ", ".join(f"{name} = {value:#x}" for name, value in self.example)
        if self.legal:
            lines.append(f"  legal: {self.legal}")
        if example:
            lines.append(f"  for example: {example}")
        lines.append(f"  see {self.citation}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The same as numbers and words, ready for `json.dumps`."""
        return {
            "id": self.id,
            "statement": self.statement,
            "outcome": self.outcome,
            "fields": [
                {"name": each.name, "value": each.value, "text": each.text, "at_fault": each.at_fault}
                for each in self.findings
            ],
            "legal": self.legal,
            "example": dict(self.example),
            "citation": self.citation,
        }

    def __str__(self) -> str:
        return self.render()
