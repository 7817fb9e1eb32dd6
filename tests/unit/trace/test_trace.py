"""Trace lines: what a line looks like, the schema, reading back, files that cannot be used."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import attrs
import pytest
from jsonschema import Draft202012Validator

from vtx import events as e
from vtx.trace import JsonLinesTracer, TraceError, read_trace
from vtx.trace.codec import FIELDS, from_json, to_json

SCHEMA = json.loads((resources.files("vtx.trace") / "schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)

NMI = e.Interruption(2, "non-maskable interrupt")
PAGE_FAULT = e.Interruption(14, "hardware exception", 0x2)
BROKEN_RULE = e.RuleViolation(
    "host.cr0-fixed", "must hold", "SDM Vol. 3", (e.FieldValue("host CR0", 0x31, 1 << 31), e.FieldValue("host CR4", 0))
)

# Every kind of event, with every field and with none of the optional ones.
EVENTS: tuple[e.TraceEvent, ...] = (
    e.InstructionIntercepted(0, 24, 0xFFF0, "CPUID", "intercepted"),
    e.ExceptionRaised(0, 1, 0x1000, 14, 0x2, 0xFFFF_8000_0000_0000),
    e.ExceptionRaised(0, 1, 0x1000, 6),
    e.EventDelivered(0, 1, 14, "hardware exception", 0x8, 0x2000, 0x2),
    e.EventDelivered(0, 1, 32, "external interrupt", 0x8, 0x2000),
    e.InterruptAccepted(1, 1, 0x1000, 0x20),
    e.UserInterruptsRequested(0, 1, 0x1000, 1 << 63 | 1),
    e.UserInterruptDelivered(0, 1, 63, 0x2000),
    e.SmmEntered(0, 1, 0x1000, 0x3_0000),
    e.SmmLeft(0, 1, 0x1000),
    e.VmInstruction(0, 1, "VMCLEAR", "VMfailValid(2)"),
    e.VmEntry(0, 1, 0x5000, True, 0x1000, 0x7000, 230, PAGE_FAULT),
    e.VmEntry(0, 1, 0x5000, False, 0x1000, 0, 12),
    e.VmEntryFailed(0, 1, 0x5000, "VMfailValid(8)", (BROKEN_RULE,)),
    e.VmEntryFailed(0, 1, 0x5000, "VM exit: VM-entry failure due to MSR loading", detail="MSR 0 cannot be loaded"),
    e.VmExit(
        0,
        1,
        0x5000,
        48,
        "EPT violation",
        0x182,
        {"data write": 1, "access type": "MOV to CR"},
        0x1000,
        0x2000,
        NMI,
        PAGE_FAULT,
        3,
        0x40,
        0xFFFF_FFFF_FFFF_FFFF,
        0x1234,
    ),
    e.VmExit(0, 1, 0x5000, 10, "CPUID", 0, {}, 0x1000, 0x2000),
    e.Vmrun(0, 1, 0x5000, 1, 0x1000, 0x7000, True, PAGE_FAULT),
    e.Vmrun(0, 1, 0x5000, 1, 0x1000, 0x7000, False),
    e.VmrunFailed(0, 1, 0x5000, (BROKEN_RULE,)),
    e.VmrunFailed(0, 1, 0x5000, detail="a PDPTE in memory has reserved bits set"),
    e.VmcbChangedThoughClean(0, 1, 0x5000, (e.FieldValue("CR3", 0x2000, 0x3000),)),
    e.Vmexit(0, 1, 0x5000, 0x400, "nested page fault", 0x1_0000_0004, 0x1234, 0x1000, 0x2000, NMI, 0x1002),
    e.Vmexit(0, 1, 0x5000, 0xFFFF_FFFF_FFFF_FFFF, "VMEXIT_INVALID", 0, 0, 0x1000, 0x2000),
    e.PageWalk(
        0, 1, 0x40_0000, e.Access.WRITE, (e.WalkStep("PML4E", 0x3000, 0x4007),), e.WalkResult.PAGE, physical=0x5000
    ),
    e.PageWalk(0, 1, 0x40_0000, e.Access.EXECUTE, (), e.WalkResult.PAGE_FAULT, error_code=0x10),
    e.SecondLevelFault(0, 1, "EPT violation", 0x1234, 0x40_0000),
    e.SecondLevelFault(0, 1, "EPT misconfiguration", 0x1234),
    e.DeviceAccess(0, 1, "COM1", e.AddressSpace.PORT, 0x3F8, 1, e.Access.WRITE, 0x41),
    e.ControlRegisterWrite(0, 1, "CR0", 0x11, 0x8000_0011),
    e.MachineStopped(0, 1, "debug exit", "the guest ended the run with 0x0", 24213, 0),
    e.MachineStopped(0, 1, "shutdown", "triple fault", 24213),
)


def _id(event: e.TraceEvent) -> str:
    return event.name


def test_the_examples__cover_every_kind_of_event() -> None:
    kinds = {type(event) for event in EVENTS}
    assert kinds == set(e.TraceEvent.__args__)  # type: ignore[attr-defined]
    assert kinds == set(FIELDS)


@pytest.mark.parametrize("event", EVENTS, ids=_id)
def test_a_line__conforms_to_the_schema(event: e.TraceEvent) -> None:
    VALIDATOR.validate(to_json(event))


@pytest.mark.parametrize("event", EVENTS, ids=_id)
def test_a_line__reads_back_as_the_same_event(event: e.TraceEvent) -> None:
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.name)
def test_schema__lists_the_fields_of_the_record_and_requires_those_without_default(kind: Any) -> None:
    definition = SCHEMA["$defs"][kind.name]
    fields = {field.name: field for field in attrs.fields(kind)}
    assert set(definition["properties"]) == {"event", *fields}
    # A field is absent when it is None; an empty list of violations is still written.
    optional = {n for n, field in fields.items() if field.default is None}
    assert set(definition["required"]) == {"event", *fields} - optional


def test_schema__rejects_what_no_event_is() -> None:
    line = to_json(EVENTS[0])
    for broken in (
        line | {"event": "vm_exit"},
        line | {"more": 1},
        line | {"rip": 0xFFF0},
        line | {"rip": "0x0FFF0"},
        line | {"time": -1},
        {key: value for key, value in line.items() if key != "why"},
    ):
        assert not VALIDATOR.is_valid(broken), broken


def test_a_vm_exit__as_it_stands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with JsonLinesTracer(path) as tracer:
        tracer.emit(
            e.VmExit(0, 310, 0x5000, 28, "control-register access", 0x3, {"control register": 3}, 0x1020F4, 0x102000)
        )
        tracer.emit(e.MachineStopped(0, 311, "halted", "é", 7))
    assert path.read_bytes() == (
        b'{"event":"vm_exit","vcpu":0,"time":310,"vmcs":"0x5000","reason":28,"reason_name":"control-register access",'
        b'"qualification":"0x3","decoded":{"control register":3},"rip":"0x1020f4","host_rip":"0x102000"}\n'
        b'{"event":"machine_stopped","vcpu":0,"time":311,"reason":"halted","message":"\\u00e9","instructions":7}\n'
    )


def test_reading_a_file__gives_the_events_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with JsonLinesTracer(path) as tracer:
        for event in EVENTS:
            tracer.emit(event)
    assert tuple(read_trace(path)) == EVENTS


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "line 1: not a trace event"),
        ("{", "line 1: not a trace event"),
        ("[]", "expected dict"),
        ('{"event":"nonsense"}', "no known event"),
        ('{"vcpu":0}', "no known event"),
        ('{"event":"interrupt_accepted","vcpu":0,"time":1,"rip":"0x0"}', "vector"),
        ('{"event":"interrupt_accepted","vcpu":0,"time":1,"rip":"0x0","vector":1,"x":1}', "unknown field 'x'"),
        ('{"event":"interrupt_accepted","vcpu":true,"time":1,"rip":"0x0","vector":1}', "expected int"),
        ('{"event":"interrupt_accepted","vcpu":0,"time":1,"rip":"12","vector":1}', "hexadecimal"),
        ('{"event":"interrupt_accepted","vcpu":0,"time":1,"rip":"0xzz","vector":1}', "not a trace event"),
    ],
)
def test_reading__names_the_line_that_is_no_event(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TraceError) as error:
        list(read_trace(path))
    assert complaint in str(error.value)
    assert "line 1" in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_a_missing_file__is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the trace"):
        list(read_trace(tmp_path / "none"))


def test_an_unwritable_file__is_one_line_before_anything_is_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "t", "\0"):
        with pytest.raises(TraceError, match="cannot write the trace") as error:
            JsonLinesTracer(path)
        assert "\n" not in str(error.value)


def test_a_full_disk__is_a_trace_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    tracer = JsonLinesTracer("/dev/full")
    tracer.emit(EVENTS[0])
    with pytest.raises(TraceError, match="No space left"):
        tracer.close()
