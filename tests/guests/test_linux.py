"""A distribution's Linux boots to user space. Run with ``VTX_LINUX=/path/to/bzImage``; each boot takes minutes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vtx.boot import linux
from vtx.boot.image import Module
from vtx.machine import Machine, RunResult
from vtx.snapshot import load_snapshot, save_snapshot

KERNEL = os.environ.get("VTX_LINUX")
COMMAND_LINE = "console=ttyS0 panic=-1"
MEMORY = 256 << 20
MOST_INSTRUCTIONS = 5_000_000_000

pytestmark = pytest.mark.skipif(KERNEL is None, reason="VTX_LINUX names no kernel")


def archive(*files: tuple[str, int, bytes, tuple[int, int]]) -> bytes:
    """A cpio archive as Linux unpacks them; a file is (name, mode, contents, device number)."""
    data = b""
    for number, (name, mode, contents, device) in enumerate((*files, ("TRAILER!!!", 0, b"", (0, 0))), 1):
        fields = (number, mode, 0, 0, 1, 0, len(contents), 0, 0, *device, len(name) + 1, 0)
        entry = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        data += entry + bytes(-len(entry) % 4) + contents + bytes(-len(contents) % 4)
    return data


@pytest.fixture(scope="module")
def ramdisk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    program = tmp_path_factory.mktemp("linux") / "init"
    source = Path(__file__).with_name("linux_init.c")
    flags = ("-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-no-pie")
    subprocess.run(["gcc", *flags, "-o", str(program), str(source)], check=True)
    return archive(
        ("dev", 0o40755, b"", (0, 0)),
        ("dev/console", 0o20600, b"", (5, 1)),
        ("init", 0o100755, program.read_bytes(), (0, 0)),
    )


def kernel(*, with_64_bit_entry: bool = True) -> bytes:
    assert KERNEL is not None
    image = bytearray(Path(KERNEL).read_bytes())
    if not with_64_bit_entry:
        image[linux.EXTENDED_LOAD_FLAGS] &= ~linux.KERNEL_64
    return bytes(image)


def boot(image: bytes, ramdisk: bytes, profile: str, printed: bytearray, cpus: int = 1) -> Machine:
    machine = Machine(memory=MEMORY, profile=profile, cpus=cpus, serial=printed.extend)
    machine.load(image, name="linux", command_line=COMMAND_LINE, modules=[Module(ramdisk)])
    return machine


def assert_arrived(result: RunResult, printed: bytes) -> None:
    assert result.exit_value == 0, result.message
    assert b"init: user space of Linux " in printed.splitlines()[-1]


@pytest.mark.parametrize("with_64_bit_entry", [True, False])
@pytest.mark.parametrize("profile", ["skylake-server", "zen-server"])
def test_boots_to_user_space(ramdisk: bytes, profile: str, with_64_bit_entry: bool) -> None:
    printed = bytearray()
    machine = boot(kernel(with_64_bit_entry=with_64_bit_entry), ramdisk, profile, printed)
    assert_arrived(machine.run(max_instructions=MOST_INSTRUCTIONS), printed)


@pytest.mark.parametrize("cpus", [2, 4, 8])
def test_boots_on_several_processors(ramdisk: bytes, cpus: int) -> None:
    printed = bytearray()
    machine = boot(kernel(), ramdisk, "skylake-server", printed, cpus)
    assert_arrived(machine.run(max_instructions=MOST_INSTRUCTIONS), printed)
    assert f"smp: Brought up 1 node, {cpus} CPUs".encode() in printed


def test_continues_from_a_snapshot(ramdisk: bytes, tmp_path: Path) -> None:
    printed = bytearray()
    machine = boot(kernel(), ramdisk, "skylake-server", printed)
    machine.run(max_instructions=500_000_000)
    save_snapshot(machine.snapshot(), tmp_path / "snapshot")
    seen = len(printed)
    result = machine.run(max_instructions=MOST_INSTRUCTIONS)
    assert_arrived(result, printed)
    again = bytearray()
    other = Machine(memory=MEMORY, serial=again.extend)
    other.restore(load_snapshot(tmp_path / "snapshot"))
    assert other.run(max_instructions=MOST_INSTRUCTIONS) == result
    assert again == printed[seen:]
