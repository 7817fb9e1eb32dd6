"""Testbench of the block "VMX operation mode and launch state": RTL against the model, response by response.

Plusargs: ``operations`` random operations per run, ``seed`` of the random stimuli, ``report`` the JSON file to write.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from random import Random

import cocotb
from attrs import asdict

from hdl_tests.gen.layout import unpack
from hdl_tests.gen.vmx_mode import Operation, Outcome, Request, Response, State
from hdl_tests.ref.vmx_mode import Reference
from hdl_tests.sim.batch import REQUEST_BYTES, RESPONSE_BYTES, reset, responses, stimuli
from hdl_tests.sim.vmx_mode_coverage import declare, sample
from hdl_tests.sim.vmx_mode_scenarios import SCENARIOS
from hdl_tests.sim.vmx_mode_stimulus import Stimulus

# A loop in the RTL that takes no simulated time would hang the simulator; nothing but a signal ends that.
signal.alarm(120 + int(cocotb.plusargs["operations"]) // 100)


class Mismatch(AssertionError):  # noqa: N818 - the finding of a check, not an error of the program
    """RTL and model disagree."""


async def run_batch(dut, requests: list[Request]) -> bytes:
    """The packed responses of the batch harness to ``requests`` (at most K), one after the other."""
    size = int(dut.K.value)
    dut.stimuli.value = int.from_bytes(stimuli(requests).ljust(size * REQUEST_BYTES, b"\0"), "little")
    dut.go.value = not dut.go.value
    await dut.done.value_change
    # Requests of zeros pad a short batch; their responses are cut off and the block is reset before the next one.
    whole = int(dut.responses.value).to_bytes(size * RESPONSE_BYTES, "little")
    return whole[: len(requests) * RESPONSE_BYTES]


def report(**found: object) -> None:
    """Merge ``found`` into the report of this simulation."""
    path = Path(cocotb.plusargs["report"])
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | found, indent=1))


def explain(request: Request, expected: Response, actual: Response) -> str:
    """One line per difference, in names."""
    want, got = asdict(expected), asdict(actual)
    want |= want.pop("state")
    got |= got.pop("state")
    lines = [f"{Operation(request.operation).name}: {request}"]
    for name in want:
        if want[name] != got[name]:
            shown = [Outcome(side[name]).name if name == "outcome" else side[name] for side in (want, got)]
            lines.append(f"  {name}: model {shown[0]}, RTL {shown[1]}")
    return "\n".join(lines)


def compare(requests: list[Request], wanted: list[Response], actual: bytes, done: int) -> None:
    """Raise `Mismatch` at the first response that differs; ``done`` operations agreed before this batch."""
    if responses(wanted) == actual:
        return
    for index, (request, want) in enumerate(zip(requests, wanted, strict=True)):
        packed = int.from_bytes(actual[index * RESPONSE_BYTES : (index + 1) * RESPONSE_BYTES], "little")
        got = unpack(Response, packed)
        if got != want:
            text = explain(request, want, got)
            report(mismatch={"operation": done + index + 1, "text": text})
            raise Mismatch(f"operation {done + index + 1}: {text}")


@cocotb.test()
async def directed(dut):
    """The scenarios, against the RTL, the model, and the results typed from the manual."""
    model = Reference(vmwrite_any=0)
    done = 0
    for name, steps in SCENARIOS.items():
        await reset(dut)
        model.reset()
        requests = [request for request, _, _ in steps]
        expected = [model.step(request) for request in requests]
        compare(requests, expected, await run_batch(dut, requests), done)
        for position, (response, (request, outcome, number)) in enumerate(zip(expected, steps, strict=True)):
            if (response.outcome, response.number) != (outcome, number):
                found = f"{Outcome(response.outcome).name} {response.number}"
                text = f"{name}[{position}] {Operation(request.operation).name}: {found}, not {outcome.name} {number}"
                report(mismatch={"operation": done + position + 1, "text": text})
                raise Mismatch(text)
        done += len(steps)
    report(directed=done)


@cocotb.test()
@cocotb.parametrize(vmwrite_any=(0, 1))
async def random_operations(dut, vmwrite_any):
    """Random operations through RTL and model; every response and the whole state after each are equal."""
    await reset(dut)
    model = Reference(vmwrite_any)
    total = int(cocotb.plusargs["operations"])
    stimulus = Stimulus(Random(int(cocotb.plusargs["seed"]) + vmwrite_any), vmwrite_any)
    coverage = declare(vmwrite_any)
    state: State = model.state
    previous, done, size = Outcome.RETIRED.value, 0, int(dut.K.value)
    while done < total:
        requests: list[Request] = []
        expected: list[Response] = []
        for _ in range(size):
            requests.append(stimulus.draw(model.state))
            expected.append(model.step(requests[-1]))
        compare(requests, expected, await run_batch(dut, requests), done)
        for request, response in zip(requests, expected, strict=True):
            sample(coverage, state, previous, request, response)
            state, previous = response.state, response.outcome
        done += size
    found = {"operations": done, "covered": coverage.covered, "goal": coverage.goal, "missing": coverage.missing()}
    report(**{f"vmwrite_any_{vmwrite_any}": found})
