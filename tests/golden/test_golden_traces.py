"""What happens to virtualization in the bundled guests, event by event, as it was when somebody last read it.

A golden file has one line for each VM entry, VM exit, delivered event, and VMX instruction except the VMREADs and
VMWRITEs that succeed, with everything in it that follows from the guest's source. Addresses, registers and times, which
another compiler changes, are left out. A difference is a change of behaviour: read it, and then `make golden`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vtx import events as e
from vtx.trace import read_trace
from vtx.x86.profile import DEFAULT_PROFILE

FOLDER = Path(__file__).parent
VTX = Path(sys.executable).with_name("vtx")


def line(event: e.TraceEvent) -> str | None:
    """The event in one line; None for what says nothing about virtualization."""
    match event:
        case e.VmInstruction(mnemonic="VMREAD" | "VMWRITE", outcome="VMsucceed"):
            return None
        case e.VmInstruction() if event.outcome.startswith(("VM entry", "VM exit", "guest mode", "#VMEXIT")):
            return None  # has a line of its own
        case e.VmInstruction():
            return f"{event.mnemonic}: {event.outcome}"
        case e.VmEntry():
            return f"entry, {'launch' if event.launch else 'resume'}{_interruption(', injecting', event.injected)}"
        case e.VmEntryFailed():
            rules = ", ".join(violation.rule for violation in event.violations)
            return f"entry failed: {event.outcome}: {rules}"
        case e.VmExit():
            decoded = "".join(f", {name} {value}" for name, value in event.decoded.items() if name != "register")
            events = _interruption(", event", event.interruption) + _interruption(", vectoring", event.vectoring)
            return f"exit {event.reason} {event.reason_name}{decoded}{events}"
        case e.Vmrun():
            return f"VMRUN{_interruption(', injecting', event.injected)}"
        case e.VmrunFailed():
            return f"VMRUN failed: {', '.join(violation.rule for violation in event.violations)}"
        case e.Vmexit():
            return f"#VMEXIT {event.code:#x} {event.code_name}{_interruption(', delivering', event.interrupted)}"
        case e.EventDelivered():
            return f"delivered vector {event.vector}, {event.kind}"
        case e.SecondLevelFault():
            return f"second level: {event.kind}"
        case e.MachineStopped():
            return f"stopped: {event.reason}, value {event.exit_value}"
    return None


def _interruption(label: str, event: e.Interruption | None) -> str:
    return f"{label} {event.vector} ({event.kind})" if event else ""


def summarized(trace: Path) -> str:
    lines = (line(event) for event in read_trace(trace))
    return "".join(f"{text}\n" for text in lines if text is not None)


@pytest.mark.parametrize(
    ("guest", "profile"),
    [
        ("hello", DEFAULT_PROFILE),
        ("nested", DEFAULT_PROFILE),
        ("svm_hello", "zen-server"),
        ("svm_nested", "zen-server"),
    ],
)
def test_trace_is_as_recorded(guest: str, profile: str, update: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    command = [str(VTX), "run", guest, "--profile", profile, "--trace", str(trace)]
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr.decode()
    found = summarized(trace)
    golden = FOLDER / f"{guest}.txt"
    if update:
        golden.write_text(found)
    assert found == golden.read_text()
