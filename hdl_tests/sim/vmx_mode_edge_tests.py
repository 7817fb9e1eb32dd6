"""Cycle-level behaviour that batches hide: reset, idle cycles, one response per edge."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, FallingEdge, Timer

from hdl_tests.gen.layout import pack, unpack
from hdl_tests.gen.vmx_mode import NO_REGION, Outcome, Request, Response, State, VmxMode
from hdl_tests.ref.vmx_mode import Reference
from hdl_tests.sim.vmx_mode_scenarios import LAUNCH_1, do
from hdl_tests.sim.vmx_mode_stimulus import Stimulus

RESET_STATE = State(vmxon_pointer=NO_REGION, current=NO_REGION, revision_ok=(1, 1, 1, 1))


class Mismatch(AssertionError):  # noqa: N818 - the finding of a check, not an error of the program
    """The block shows something else than it must."""


def expect(actual: Response, wanted: Response, when: str) -> None:
    """Raise `Mismatch`, and note it in the report of this simulation, unless ``actual`` is ``wanted``."""
    if actual != wanted:
        text = f"{when}: {actual}, not {wanted}"
        Path(cocotb.plusargs["report"]).write_text(json.dumps({"mismatch": {"text": text}}))
        raise Mismatch(text)


class Edge:
    """Driver of the bare block; inputs change while the clock is low."""

    def __init__(self, dut: object) -> None:
        self.dut = dut
        dut.rst_n.value = 0
        dut.valid.value = 0
        dut.req.value = 0
        cocotb.start_soon(Clock(dut.clk, 10, "ns").start(start_high=False))

    async def reset(self) -> None:
        """Reset, ending between edges."""
        self.dut.rst_n.value = 0
        self.dut.valid.value = 0
        await ClockCycles(self.dut.clk, 2, FallingEdge)
        self.dut.rst_n.value = 1

    async def cycle(self, request: Request, valid: int = 1) -> Response:
        """One clock cycle with ``request`` on the input; what the output shows after the edge."""
        self.dut.req.value = pack(request)
        self.dut.valid.value = valid
        await FallingEdge(self.dut.clk)
        return self.response()

    def response(self) -> Response:
        """What the output shows now; ValueError if any bit is unknown."""
        return unpack(Response, int(self.dut.rsp.value))


@cocotb.test()
async def reset_state(dut):
    """Reset leaves VMX operation from anywhere, without waiting for a clock edge."""
    edge = Edge(dut)
    await edge.reset()
    expect(edge.response(), Response(state=RESET_STATE), "after reset")
    for request, outcome, _ in LAUNCH_1:
        response = await edge.cycle(request)
        assert response.outcome == outcome
    assert response.state.mode == VmxMode.NON_ROOT
    dut.rst_n.value = 0
    await Timer(1, "ns")
    expect(edge.response(), Response(state=RESET_STATE), "in reset, before any edge")


@cocotb.test()
async def idle_holds(dut):
    """Without ``valid`` nothing changes, whatever the request lines say."""
    edge = Edge(dut)
    await edge.reset()
    for request, _, _ in LAUNCH_1:
        shown = await edge.cycle(request)
        for name in ("VMXON", "VMXOFF", "VMCLEAR", "VMLAUNCH", "CPUID"):
            expect(await edge.cycle(do(name, 1), valid=0), shown, f"idle cycle with {name}")
    assert shown.outcome == Outcome.ENTERED


@cocotb.test()
async def random_cycles(dut):
    """Random requests with random idle cycles and resets in between, edge by edge against the model."""
    edge = Edge(dut)
    random = Random(int(cocotb.plusargs["seed"]))
    model = Reference(vmwrite_any=0)
    stimulus = Stimulus(random, vmwrite_any=0)
    await edge.reset()
    shown = edge.response()
    for _ in range(1000):
        choice = random.randrange(100)
        request = stimulus.draw(model.state)
        if choice == 0:
            await edge.reset()
            model.reset()
            shown = Response(state=model.state)
            expect(edge.response(), shown, "after reset")
        elif choice < 20:
            expect(await edge.cycle(request, valid=0), shown, "idle cycle")
        else:
            shown = model.step(request)
            expect(await edge.cycle(request), shown, str(request))
