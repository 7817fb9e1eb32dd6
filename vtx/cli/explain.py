"""``vtx explain``: why a VM entry through a given VMCS would fail."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from vtx.cli.images import Unusable, read_file

if TYPE_CHECKING:
    from vmcs.capabilities import Capabilities
    from vmcs.document import VmcsDocument
    from vtx.vmx.diagnosis import Broken, Diagnosis
    from vtx.x86.profile import Profile

_DEFAULT_PROFILE = "skylake-server"


@click.command()
@click.argument("file", metavar="[FILE]", required=False)
@click.option("--profile", "name", default=_DEFAULT_PROFILE, show_default=True, metavar="NAME", help="Processor.")
@click.option("--template", is_flag=True, help="Print a VMCS that enters, as JSON, to start from.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def explain(file: str | None, name: str, template: bool, as_json: bool) -> int:
    """Say which rules of VM entry the VMCS in FILE breaks, and what would have been legal.

    FILE is JSON as `vtx explain --template` prints it, or the bytes of a VMCS region as VMCLEAR leaves them. Rules are
    listed stage by stage; the first broken one is what the processor reports. For a processor with SVM, FILE is a VMCB,
    as JSON or as the bytes of its page, and the rules are those of VMRUN.

    \b
    Exit status:
      0    the VM entry would succeed
      1    the VM entry would fail
      2    FILE or the profile cannot be used
    """
    profile = _profile(name)
    if profile.has("SVM"):
        from vtx.cli.explain_vmcb import explain_vmcb  # noqa: PLC0415 - of use here alone

        if file is None and not template:
            raise click.UsageError("name a FILE, or use --template", click.get_current_context())
        return explain_vmcb(None if template else file, profile, as_json=as_json)
    capabilities = _capabilities(profile)
    if template:
        from vmcs.document import to_json  # noqa: PLC0415 - of use here alone
        from vmcs.template import template as valid_vmcs  # noqa: PLC0415

        print(to_json(valid_vmcs(capabilities)))  # noqa: T201
        return 0
    if file is None:
        raise click.UsageError("name a FILE, or use --template", click.get_current_context())
    from vtx.vmx.diagnosis import diagnose  # noqa: PLC0415 - not before the options are known to be good

    diagnosis = diagnose(_document(file, capabilities), profile)
    print(_json(diagnosis) if as_json else _text(diagnosis, profile))  # noqa: T201
    return int(bool(diagnosis.broken))


def _profile(name: str) -> Profile:
    from vtx.x86.profile import load_profile  # noqa: PLC0415
    from vtx.x86.toml_section import ProfileError  # noqa: PLC0415

    try:
        return load_profile(name)
    except ProfileError as error:
        raise Unusable(f"profile {error}") from None


def _capabilities(profile: Profile) -> Capabilities:
    from vmcs.capabilities import Capabilities  # noqa: PLC0415

    if not profile.vmx_capabilities:
        raise Unusable(f"profile {profile.name}: this processor has neither VMX nor SVM")
    return Capabilities(profile.vmx_capabilities)


def _document(file: str, capabilities: Capabilities) -> VmcsDocument:
    from vmcs.document import DocumentError, from_region, parse  # noqa: PLC0415

    data = read_file(file)
    try:
        return parse(data, capabilities) if data.lstrip()[:1] == b"{" else from_region(data, capabilities)
    except DocumentError as error:
        raise Unusable(f"{file}: {error}") from None


def _text(diagnosis: Diagnosis, profile: Profile) -> str:
    reported = diagnosis.reported
    lines: list[str] = []
    if reported is None:
        lines.append(f"{diagnosis.instruction} succeeds on {profile.name}.")
    else:
        count = len(diagnosis.broken)
        rules = "1 rule is broken" if count == 1 else f"{count} rules are broken; the processor reports the first"
        lines.append(f"{diagnosis.instruction} fails on {profile.name}: {reported.explanation.outcome}. {rules}.")
    stage = None
    for broken in diagnosis.broken:
        if broken.stage is not stage:
            stage = broken.stage
            lines += ["", f"{stage.value}:"]
        mark = "* " if broken is reported else "  "
        first, *rest = broken.explanation.render().splitlines()
        lines += ["", mark + first, *(f"  {line}" for line in rest)]
    if diagnosis.unjudged:
        lines += ["", "not judged:", *(f"  {rule}: {why}" for rule, why in diagnosis.unjudged)]
    return "\n".join(lines)


def _json(diagnosis: Diagnosis) -> str:
    def violation(broken: Broken) -> dict[str, object]:
        return {"stage": broken.stage.value, **broken.explanation.to_json()}

    reported = diagnosis.reported
    return json.dumps(
        {
            "instruction": diagnosis.instruction,
            "succeeds": reported is None,
            "reported": reported.explanation.id if reported else None,
            "violations": [violation(broken) for broken in diagnosis.broken],
            "not_judged": [{"id": rule, "why": why} for rule, why in diagnosis.unjudged],
        },
        indent=2,
    )
