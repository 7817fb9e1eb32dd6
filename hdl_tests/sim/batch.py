"""Requests and responses as the wide vectors that batch harnesses exchange."""

from __future__ import annotations

from collections.abc import Iterable

from cocotb.triggers import Timer

from hdl_tests.gen.layout import pack, width
from hdl_tests.gen.vmx_mode import Request, Response

REQUEST_BYTES = width(Request) // 8
RESPONSE_BYTES = width(Response) // 8


def stimuli(requests: Iterable[Request]) -> bytes:
    """The packed ``requests``, the first one in the least significant bits."""
    return b"".join(pack(request).to_bytes(REQUEST_BYTES, "little") for request in requests)


def responses(values: Iterable[Response]) -> bytes:
    """The packed responses, the first one in the least significant bits."""
    return b"".join(pack(value).to_bytes(RESPONSE_BYTES, "little") for value in values)


async def reset(dut: object) -> None:
    """Bring the block in a batch harness to its reset state; no batch is running."""
    if not dut.go.value.is_resolvable:
        dut.go.value = 0
    dut.rst_n.value = 0
    await Timer(5, "ns")
    dut.rst_n.value = 1
    await Timer(5, "ns")
