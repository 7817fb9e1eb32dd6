"""The summary of a run, as text and as JSON."""

from __future__ import annotations

import json

from vtx.cli.summary import Summary

SUMMARY = Summary(
    reason="debug exit",
    message="the guest ended the run with 0x1",
    status=1,
    exit_value=1,
    instructions=1_234_567,
    ticks=2_000_000,
    virtual_time=0.002,
    wall_time=1.5,
    vm_exits={"CPUID": 1000, "HLT": 1},
    entry_failure="guest.rflags-fixed: bit 1 of RFLAGS is 1\n  outcome: VM exit",
)


def test_text__is_aligned_and_ends_with_the_reason() -> None:
    assert SUMMARY.to_text() == (
        "  instructions                                         1,234,567\n"
        "  virtual time                                          2.000 ms\n"
        "  wall time                                              1.500 s\n"
        "  VM exits                                                 1,001\n"
        "    CPUID                                                  1,000\n"
        "    HLT                                                        1\n"
        "last failing VM entry:\n"
        "  guest.rflags-fixed: bit 1 of RFLAGS is 1\n"
        "    outcome: VM exit\n"
        "vtx: the guest ended the run with 0x1"
    )


def test_text__fits_a_screen_however_many_reasons_there_are() -> None:
    counts = {f"reason {number}": 100 - number for number in range(70)}
    text = Summary("halted", "halted", 125, None, 0, 0, 0.0, 0.0, counts).to_text().splitlines()
    assert len(text) < 24
    assert max(map(len, text)) < 80
    assert sum(counts.values()) == 100 * 70 - sum(range(70))
    assert text[3].split()[-1] == f"{sum(counts.values()):,}"
    shown = [int(line.split()[-1].replace(",", "")) for line in text[4:-1]]
    assert sum(shown) == sum(counts.values())
    assert "more reasons" in text[-2]


def test_json__holds_everything_on_one_line() -> None:
    line = SUMMARY.to_json()
    assert "\n" not in line
    assert json.loads(line) == {
        "reason": "debug exit",
        "message": "the guest ended the run with 0x1",
        "status": 1,
        "exit_value": 1,
        "instructions": 1_234_567,
        "ticks": 2_000_000,
        "virtual_time": 0.002,
        "wall_time": 1.5,
        "vm_exits": {"CPUID": 1000, "HLT": 1},
        "entry_failure": "guest.rflags-fixed: bit 1 of RFLAGS is 1\n  outcome: VM exit",
        "failures": [],
    }
