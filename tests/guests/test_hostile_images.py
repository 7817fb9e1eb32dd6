"""Boot images with damaged headers: they run, or there is one clear line and status 2. Never a traceback."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_guests import EXIT_EAX, RunVtx, multiboot

from vtx.bench.hypervisor import elf64
from vtx.cli.images import find_image

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
STATUS_OF_A_BAD_IMAGE = 2


def _damaged(source: random.Random, image: bytes, header: int) -> bytes:
    """``image`` with some bytes of its first ``header`` changed, or a field made huge, or cut off."""
    result = bytearray(image)
    for _ in range(source.choice((1, 1, 2, 4, 16))):
        place = source.randrange(min(header, len(result)))
        kind = source.randrange(4)
        if kind == 0:
            result[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            result[place] = source.choice(INTERESTING)
        else:
            size = source.choice((2, 4, 8))
            value = source.choice((0, (1 << 8 * size) - 1, 1 << 8 * size - 1, source.getrandbits(8 * size)))
            result[place : place + size] = value.to_bytes(size, "little")
    if source.random() < 0.2:
        del result[source.randrange(len(result)) :]
    return bytes(result)


def _images() -> dict[str, tuple[bytes, int]]:
    return {
        "multiboot": (multiboot(b"\x31\xc0" + EXIT_EAX), 32),
        "ELF64": (elf64({0x20_0000: EXIT_EAX, 0x30_0000: bytes(64)}), 64 + 2 * 56),
        "multiboot 2": (b"\xd6\x50\x52\xe8" + bytes(4) + (48).to_bytes(4, "little") + bytes(60), 64),
        "flat": (bytes(64) + EXIT_EAX, 64),
    }


@pytest.mark.parametrize("kind", ["multiboot", "ELF64", "multiboot 2", "flat"])
def test_damaged_headers(vtx: RunVtx, image: Path, kind: str) -> None:
    whole, header = _images()[kind]
    _run_damaged(vtx, image, whole, header, f"hostile image {kind}", 40)


def test_damaged_headers_of_bundled_guests(vtx: RunVtx, image: Path, bundled: str) -> None:
    _run_damaged(vtx, image, find_image(bundled).data, 0x120, f"hostile image {bundled}", 40)


def _run_damaged(vtx: RunVtx, image: Path, whole: bytes, header: int, seed: str, count: int) -> None:
    refused = 0
    for i in range(count):
        image.write_bytes(_damaged(random.Random(f"{seed} {i}"), whole, header))
        done = vtx("run", image, "--memory", "16M", "--max-instructions", "3000", "--timeout", "20")
        assert "Traceback" not in done.stderr and "internal error" not in done.stderr, (seed, i, done.stderr)
        if done.status == STATUS_OF_A_BAD_IMAGE:
            refused += 1
            assert done.stderr.count("\n") == 1, (seed, i, done.stderr)
            assert done.stderr.startswith("vtx: "), (seed, i, done.stderr)
    assert refused
