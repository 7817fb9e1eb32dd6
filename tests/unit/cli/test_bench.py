"""The programs that are measured, and what a measurement says."""

from __future__ import annotations

import re

import pytest
from iced_x86 import Decoder, Formatter, FormatterSyntax

from vmcs.rules import CONSISTENCY
from vtx.bench import hypervisor, processors, programs, rules
from vtx.bench.emulators import VTX, Unavailable
from vtx.bench.hypervisor import install
from vtx.bench.listing import code
from vtx.bench.measure import Measurement, Target
from vtx.machine import Machine

LISTINGS = {
    "ENTRY_16": (programs.ENTRY_16, 16),
    "ENTRY_32": (programs.ENTRY_32, 32),
    "EXIT": (programs.EXIT, 32),
    "COMPUTE": (programs.COMPUTE.listing, 32),
    "TRAP": (programs.TRAP.listing, 32),
    "LOOP": (programs.LOOP.listing, 32),
    "TOUCH": (programs.TOUCH.listing, 32),
    "ARRIVE": (processors.ARRIVE, 32),
    "HOST": (hypervisor.HOST, 64),
    "GUEST": (hypervisor.GUEST, 64),
}


def _target(text: str, address: int) -> str:
    """``$+15h`` as the address it is."""
    match = re.search(r"\$([+-])([0-9A-F]+)h?$", text)
    if match is None:
        return text
    offset = int(match[2], 16) * (1 if match[1] == "+" else -1)
    return text[: match.start()] + f"{address + offset:X}"


@pytest.mark.parametrize(("listing", "bits"), LISTINGS.values(), ids=LISTINGS)
def test_a_listing__says_what_its_bytes_are(listing: str, bits: int) -> None:
    formatter = Formatter(FormatterSyntax.NASM)
    address = 0x1000
    for line in listing.splitlines():
        data, _, text = line.partition(";")
        decoded = list(Decoder(bits, bytes.fromhex(data), ip=address))
        assert len(decoded) == 1, line
        shown = formatter.format(decoded[0])
        if "$" in text:
            shown = re.sub(r"0*([0-9A-F]+)h$", r"\1", shown)
        assert shown == _target(text.strip(), address), line
        address += decoded[0].len


@pytest.mark.parametrize("body", [programs.COMPUTE, programs.TRAP, programs.LOOP, programs.TOUCH])
def test_a_body__has_as_many_instructions_per_pass_as_it_says(body: programs.Body) -> None:
    def instructions(count: int) -> int:
        machine = Machine()
        machine.load(programs.boot_sector(body, count))
        result = machine.run(max_instructions=10_000)
        assert result.exit_value == 0
        return result.instructions

    assert instructions(30) - instructions(10) == 20 * body.per_pass


def test_a_boot_sector__marks_start_and_end() -> None:
    marks: list[bytes] = []
    machine = Machine(serial=marks.append)
    machine.load(programs.boot_sector(programs.LOOP, 3))
    machine.run()
    assert marks == [programs.START, programs.END]


def test_the_hypervisor__takes_as_many_exits_as_asked() -> None:
    machine = Machine()
    install(machine, exits=7)
    assert machine.run(max_instructions=10_000).exit_value == 0
    assert machine.exit_counts == {"CPUID": 7}


@pytest.mark.parametrize("count", [1, 3])
def test_several_processors__each_executes_the_body(count: int) -> None:
    machine = processors.machine_of(count, programs.COMPUTE, 10)
    assert machine.run(max_instructions=10_000).exit_value == 0
    assert [cpu.state.gpr[1] for cpu in machine.cpus] == [0] * count
    assert processors.compute_time(count, 10) > 0


def test_measuring__gives_up_on_a_program_that_does_not_end() -> None:
    sector = bytearray(programs.boot_sector(programs.LOOP, 1))
    sector[0x20:0x22] = b"\xeb\xfe"
    with pytest.raises(Unavailable, match="interrupted"):
        VTX.measure(bytes(sector), 0.2)


def test_listing__ignores_what_is_behind_the_semicolon() -> None:
    assert code("90 ; nop\n\nf4          ; hlt 90\n") == b"\x90\xf4"


def test_target__at_most_and_at_least() -> None:
    assert Target(5.0).met(5.0)
    assert not Target(5.0).met(5.1)
    assert Target(3.0, at_least=True).met(3.0)
    assert not Target(3.0, at_least=True).met(2.9)


def test_measurement__compares_with_the_emulator_it_names() -> None:
    others: dict[str, float | str] = {"Bochs": 100.0, "QEMU": "not installed"}
    measurement = Measurement("x", "MIPS", 350.0, Target(3.0, at_least=True), "Bochs", others)
    assert measurement.ratio("Bochs") == 3.5
    assert measurement.met is True
    assert measurement.ratio("QEMU") is None
    assert Measurement("x", "MIPS", 350.0, Target(3.0, at_least=True), "QEMU", others).met is None
    assert Measurement("x", "MIPS", 350.0).met is None


def test_near_valid_states__are_judged_as_from_scratch() -> None:
    """The fast way of judging them finds what evaluating every rule finds, and leaves the VMCS as it was."""
    context = rules.valid_context()
    assert CONSISTENCY.check(context) is None
    values = dict(context.vmcs.values)
    states = list(rules.near_valid(context, 500))
    assert 100 < rules.rejected(context, states) < 400
    assert context.vmcs.values == values
    for changes in states:
        context.vmcs.changed = {}
        for field, value in changes:
            context.vmcs[field] = value
        fast, slow = CONSISTENCY.check(context, context.vmcs.changed), CONSISTENCY.check(context)
        assert (fast and fast.rule.id) == (slow and slow.rule.id)
        context.vmcs.values.update(values)
