"""The bundled hypervisors from the first instruction to the exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from tiny_guests import RunVtx

from vmcs.rules import ALL_RULES
from vtx import events as e
from vtx.trace import read_trace
from vtx.trace.codec import BY_NAME

SCHEMA = Path(__file__).parents[2] / "vtx" / "trace" / "schema.json"

# Numbers that depend on where the compiler put things.
ADDRESS = re.compile(r"(RIP|guest-physical|physical|CR3 =) 0x[0-9a-f]+")

HELLO = """\
[hello] entering VMX operation
[hello] launching a guest at RIP *
[hello] VM exit 1: reason 28 (control-register access), qualification 0x13, guest RIP *
[hello] VM exit 2: reason 28 (control-register access), qualification 0x3, guest RIP *
[hello] VM exit 3: reason 10 (CPUID), qualification 0x0, guest RIP *
[hello] VM exit 4: reason 30 (I/O instruction), qualification 0x800043, guest RIP *
[hello]     the guest wrote 0x6c6c6568 to port 0x80
[hello] VM exit 5: reason 12 (HLT), qualification 0x0, guest RIP *
[hello] exit reason                  count
[hello] CPUID                            1
[hello] HLT                              1
[hello] control-register access          2
[hello] I/O instruction                  1
[hello] the guest halted: done
"""


def test_hello__prints_each_vm_exit_and_passes(vtx: RunVtx, hello: str) -> None:
    done = vtx("run", hello)
    assert done.status == 0
    assert ADDRESS.sub(r"\1 *", done.stdout.decode()).replace("\r\n", "\n") == HELLO


def test_hello__summary_counts_what_the_guest_saw(vtx: RunVtx, hello: str) -> None:
    summary = json.loads(vtx("run", "--json", hello).stderr)
    assert summary["vm_exits"] == {"control-register access": 2, "CPUID": 1, "HLT": 1, "I/O instruction": 1}
    assert (summary["reason"], summary["status"], summary["exit_value"]) == ("debug exit", 0, 0)
    assert summary["instructions"] > 10_000
    assert summary["entry_failure"] is None


def test_hello__on_every_profile(vtx: RunVtx, hello: str) -> None:
    for profile in ("nehalem-server", "skylake-server"):
        assert vtx("run", hello, "--profile", profile).status == 0, profile


def test_nested__three_levels_speak_and_all_is_well(vtx: RunVtx, nested: str) -> None:
    done = vtx("run", nested)
    assert done.status == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert {line[:4] for line in lines} == {"[L1]", "[L2]", "[L3]"}
    for line in (
        "[L1] L2 enters VMX operation",
        "[L2] launching L3 without EPT",
        "[L2] launching L3 with EPT",
        '[L3] CPUID says "I am level 2"',
        "[L2] L3 exits: EPT violation, qualification 0x18a",
        "[L3] woken from HLT; all is as it should be",
        "[L2] left VMX operation: done",
    ):
        assert line in lines
    assert lines[-1] == "[L1] L2 ended well: done"
    table = [line.split() for line in lines if re.match(r"\[L1\]   CPUID ", line)]
    assert table == [["[L1]", "CPUID", "3", "2", "2"]]


def test_nested__refuses_a_processor_without_unrestricted_guest(vtx: RunVtx, nested: str) -> None:
    done = vtx("run", nested, "--profile", "nehalem-server")
    assert done.status == 1
    assert b"FAIL" in done.stdout


def test_two_runs__give_the_same_output_and_the_same_trace(vtx: RunVtx, bundled: str, tmp_path: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    runs = [vtx("run", bundled, "--trace", path) for path in (first, second)]
    assert runs[0].stdout == runs[1].stdout
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 100_000


def test_tracing__changes_nothing(vtx: RunVtx, hello: str, tmp_path: Path) -> None:
    def figures(*options: object) -> tuple[object, ...]:
        summary = json.loads(vtx("run", "--json", hello, *options).stderr)
        return tuple(summary[key] for key in ("instructions", "ticks", "vm_exits", "status"))

    assert figures() == figures("--trace", tmp_path / "t.jsonl")


def test_trace__every_line_conforms_to_the_schema(vtx: RunVtx, hello: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    vtx("run", hello, "--trace", path)
    schema = json.loads(SCHEMA.read_text())
    # The schema of one kind at a time: trying all of them for each of thousands of lines takes seconds.
    validators = {kind: Draft202012Validator(schema | {"oneOf": [{"$ref": f"#/$defs/{kind}"}]}) for kind in BY_NAME}
    seen = set()
    for line in path.read_text().splitlines():
        event = json.loads(line)
        validators[event["event"]].validate(event)
        seen.add(event["event"])
    assert seen >= {"instruction_intercepted", "vm_instruction", "vm_entry", "vm_exit", "device_access"}


def test_trace__tells_the_story_of_hello(vtx: RunVtx, hello: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    vtx("run", hello, "--trace", path)
    events = list(read_trace(path))
    exits = [event for event in events if isinstance(event, e.VmExit)]
    assert [event.reason_name for event in exits] == [
        "control-register access",
        "control-register access",
        "CPUID",
        "I/O instruction",
        "HLT",
    ]
    assert exits[1].decoded["access type"] == "mov to cr"
    assert exits[1].decoded["control register"] == 3
    assert exits[3].decoded == {
        "size": "4 bytes",
        "direction": "OUT",
        "operand encoding": "immediate",
        "port": 0x80,
    }
    entries = [event for event in events if isinstance(event, e.VmEntry)]
    assert [event.launch for event in entries] == [True, False, False, False, False]
    # All rules but those on loading MSRs, then those that a changed field or the processor's state may break.
    assert entries[0].rules_evaluated == len(ALL_RULES)
    assert all(0 < event.rules_evaluated < 50 for event in entries[1:])
    times = [event.time for event in events]
    assert times == sorted(times)
    assert isinstance(events[-1], e.MachineStopped)
    assert events[-1].exit_value == 0


@pytest.mark.parametrize("unit", ["32M", "32", "32768K", "1G"])
def test_memory__in_any_unit(vtx: RunVtx, hello: str, unit: str) -> None:
    assert vtx("run", hello, "--memory", unit).status == 0
