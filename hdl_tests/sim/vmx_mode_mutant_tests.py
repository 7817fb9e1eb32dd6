"""Seeded bugs of the block "VMX operation mode and launch state", found by the same comparison as in `vmx_mode_tests`.

Plusargs: ``operations`` per processor model, ``seed``, ``report``. The report tells for each instance of the bench, and
for each bug seeded into the model, after how many operations it gave itself away.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import cocotb

from hdl_tests.gen.vmx_mode import Request, Response
from hdl_tests.mutants.model import MUTANTS, seeded
from hdl_tests.ref.vmx_mode import Reference
from hdl_tests.sim.batch import REQUEST_BYTES, RESPONSE_BYTES, reset, responses, stimuli
from hdl_tests.sim.vmx_mode_scenarios import SCENARIOS
from hdl_tests.sim.vmx_mode_stimulus import Stimulus

signal.alarm(300)

Run = tuple[bool, list[Request], list[Response]]


def runs(size: int) -> Iterator[Run]:
    """What to feed: (reset before, requests, the model's responses), the scenarios first."""
    for steps in SCENARIOS.values():
        model = Reference(vmwrite_any=0)
        requests = [request for request, _, _ in steps]
        yield True, requests, [model.step(request) for request in requests]
    for vmwrite_any in (0, 1):
        model = Reference(vmwrite_any)
        stimulus = Stimulus(Random(int(cocotb.plusargs["seed"]) + vmwrite_any), vmwrite_any)
        for start in range(0, int(cocotb.plusargs["operations"]), size):
            pairs: list[tuple[Request, Response]] = []
            for _ in range(size):
                request = stimulus.draw(model.state)
                pairs.append((request, model.step(request)))
            yield start == 0, [request for request, _ in pairs], [response for _, response in pairs]


async def feed(dut, requests: list[Request], wanted: list[Response]) -> int:
    """Run one batch; which instances have differed since `forget`, as a mask."""
    size = int(dut.K.value)
    assert len(requests) <= size
    dut.count.value = len(requests)
    dut.stimuli.value = int.from_bytes(stimuli(requests).ljust(size * REQUEST_BYTES, b"\0"), "little")
    dut.expected.value = int.from_bytes(responses(wanted).ljust(size * RESPONSE_BYTES, b"\0"), "little")
    dut.go.value = not dut.go.value
    await dut.done.value_change
    return int(dut.differs.value)


async def start(dut, instances: int) -> None:
    """Let the mask ``instances`` run, from reset, and forget which have differed."""
    dut.enable.value = instances
    dut.forget.value = 0
    await reset(dut)
    dut.forget.value = 1
    await reset(dut)


def report(**found: object) -> None:
    """Merge ``found`` into the report of this simulation."""
    path = Path(cocotb.plusargs["report"])
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | found, indent=1))


@cocotb.test()
async def rtl_mutants(dut):
    """Feed all instances until every mutant has differed from the model."""
    block_itself = 1
    everyone = (1 << len(dut.differs)) - 1
    await start(dut, everyone)
    found: dict[int, int] = {}
    done = 0
    for fresh, requests, wanted in runs(int(dut.K.value)):
        if fresh:
            await reset(dut)
        differs = await feed(dut, requests, wanted)
        done += len(requests)
        assert not differs & block_itself, "the block itself differs from the model"
        for instance in range(1, len(dut.differs)):
            if differs >> instance & 1:
                found.setdefault(instance, done)
        if differs == everyone & ~block_itself:
            break
    report(rtl=found)


@cocotb.test()
async def model_mutants(dut):
    """For each bug seeded into the model, feed the block until it differs from the model."""
    found: dict[str, int | None] = {}
    for name in MUTANTS:
        with seeded(name):
            found[name] = await first_difference(dut)
    report(model=found)


async def first_difference(dut) -> int | None:
    """After how many operations, counted by the batch, the block differs from the model; None if it does not."""
    await start(dut, 1)
    done = 0
    for fresh, requests, wanted in runs(int(dut.K.value)):
        if fresh:
            await reset(dut)
        differs = await feed(dut, requests, wanted)
        done += len(requests)
        if differs & 1:
            return done
    return None
