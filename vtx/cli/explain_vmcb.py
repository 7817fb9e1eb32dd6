"""``vtx explain`` for AMD processors: why VMRUN of a given VMCB would end in VMEXIT_INVALID."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vmcs.document import DocumentError
from vmcs.vmcb.document import VmcbDocument, from_image, parse, template
from vmcs.vmcb.rules import RULES
from vtx.cli.images import Unusable, read_file
from vtx.svm.vmrun import context_of
from vtx.x86.msr_table import IA32_EFER
from vtx.x86.msrs import MsrFile

if TYPE_CHECKING:
    from vmcs.vmcb.model import Violation
    from vtx.x86.profile import Profile


def explain_vmcb(file: str | None, profile: Profile, *, as_json: bool) -> int:
    """Print which rules of VMRUN the VMCB in ``file`` breaks, or a template without a file; the exit status."""
    if file is None:
        print(template())  # noqa: T201
        return 0
    document = _document(file)
    efer = MsrFile(profile).table[IA32_EFER]
    violations = RULES.explain(context_of(profile, efer, document.vmcb, host_paging=document.host_paging))
    print(_json(violations) if as_json else _text(violations, profile))  # noqa: T201
    return int(bool(violations))


def _document(file: str) -> VmcbDocument:
    data = read_file(file)
    try:
        return parse(data) if data.lstrip()[:1] == b"{" else from_image(data)
    except DocumentError as error:
        raise Unusable(f"{file}: {error}") from None


def _text(violations: list[Violation], profile: Profile) -> str:
    if not violations:
        return f"VMRUN succeeds on {profile.name}."
    count = len(violations)
    broken = "1 rule is broken" if count == 1 else f"{count} rules are broken"
    lines = [f"VMRUN fails on {profile.name}: {violations[0].outcome}. {broken}."]
    for violation in violations:
        lines += ["", *(f"  {line}" for line in violation.render().splitlines())]
    return "\n".join(lines)


def _json(violations: list[Violation]) -> str:
    def described(violation: Violation) -> dict[str, object]:
        values = [
            {"field": field.name, "value": f"{value:#x}", "at_fault": f"{bits:#x}"}
            for field, value, bits in violation.values
        ]
        rule = violation.rule
        return {"id": rule.id, "statement": rule.statement(), "citation": str(rule.ref), "values": values}

    document = {
        "instruction": "VMRUN",
        "succeeds": not violations,
        "violations": [described(violation) for violation in violations],
    }
    return json.dumps(document, indent=2)
