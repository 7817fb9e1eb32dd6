"""Images and options that cannot be used: one clear line, status 2, and no traceback."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from tiny_guests import Finished, RunVtx, exit_with, multiboot

from vtx.bench.hypervisor import elf64
from vtx.cli.images import DESCRIPTIONS, bundled_names


def assert_refused(done: Finished, *words: str) -> None:
    assert done.status == 2, done.stderr
    assert done.stdout == b""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("vtx: ")
    assert "internal error" not in done.stderr
    for word in words:
        assert word in done.stderr


FOREIGN = {
    "empty": b"",
    "text": b"#!/bin/sh\necho hello\n",
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(1000),
    "compressed": b"\x1f\x8b\x08" + bytes(1000),
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "Windows program": b"MZ" + bytes(1000),
    "ELF of another machine": b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 183, 1) + bytes(200),
    "big-endian ELF": b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HHI", 2, 62, 1) + bytes(200),
    "ELF magic alone": b"\x7fELF",
    "Linux kernel": bytes(510) + b"\x55\xaa\xeb\x6aHdrS" + bytes(2000),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file__is_refused(vtx: RunVtx, image: Path, data: bytes) -> None:
    image.write_bytes(data)
    assert_refused(vtx("run", image), "cannot boot", str(image))


@pytest.mark.parametrize("kept", [4, 20, 51, 52, 60, 100, 200])
def test_a_truncated_elf_file__is_refused(vtx: RunVtx, image: Path, kept: int) -> None:
    image.write_bytes(elf64({0x20_0000: bytes(4096)})[:kept])
    assert_refused(vtx("run", image), "cannot boot")


def test_a_truncated_bundled_guest__is_refused_or_fails(vtx: RunVtx, image: Path, hello: str) -> None:
    whole = (Path(__file__).parents[2] / "vtx" / "images" / f"{hello}.elf").read_bytes()
    for kept in (1, 52, 1000, 4096, 5000, len(whole) // 2):
        image.write_bytes(whole[:kept])
        assert_refused(vtx("run", image), "cannot boot")


def test_a_multiboot_image_that_ends_in_its_header__is_refused(vtx: RunVtx, image: Path) -> None:
    whole = multiboot(exit_with(0))
    for kept in (12, 16, 28, 31):
        image.write_bytes(whole[:kept])
        assert_refused(vtx("run", image), "cannot boot")


def test_an_image_larger_than_ram__is_refused(vtx: RunVtx, image: Path) -> None:
    image.write_bytes(multiboot(bytes(2 << 20)))
    assert_refused(vtx("run", image, "--memory", "2M"), "cannot boot")
    assert vtx("run", image, "--memory", "64M", "--max-instructions", "10").status == 124


def test_a_segment_beyond_ram__is_refused(vtx: RunVtx, image: Path) -> None:
    for address in (1 << 30, 1 << 45, (1 << 64) - 4096):
        image.write_bytes(elf64({address: b"\xf4"}))
        assert_refused(vtx("run", image), "cannot boot")


def test_a_module_larger_than_ram__is_refused(vtx: RunVtx, image: Path, tmp_path: Path) -> None:
    image.write_bytes(multiboot(exit_with(0)))
    module = tmp_path / "module"
    module.write_bytes(bytes(8 << 20))
    assert_refused(vtx("run", image, "--memory", "4M", "--initrd", module), "cannot boot")
    assert_refused(vtx("run", image, "--initrd", tmp_path / "none"), "cannot read")


def test_a_file_that_cannot_be_read__is_refused(vtx: RunVtx, tmp_path: Path) -> None:
    assert_refused(vtx("run", tmp_path / "none"), "No such file")
    assert_refused(vtx("run", tmp_path), "directory")
    assert_refused(vtx("run", "nothing-like-it"), "cannot read")
    assert_refused(vtx("run", "/dev/zero"), "not a file")


def test_a_file_without_permission__is_refused(vtx: RunVtx, image: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    image.write_bytes(b"")
    image.chmod(0)
    assert_refused(vtx("run", image), "Permission denied")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "{image}", "--no-such-option"),
        ("run", "{image}", "--profile", "no-such-processor"),
        ("run", "{image}", "--profile", "no-such-file.toml"),
        ("run", "{image}", "--memory", "lots"),
        ("run", "{image}", "--memory", "0"),
        ("run", "{image}", "--memory", "-1"),
        ("run", "{image}", "--memory", "999999G"),
        ("run", "{image}", "--memory", "1025K"),
        ("run", "{image}", "--timeout", "0"),
        ("run", "{image}", "--timeout", "soon"),
        ("run", "{image}", "--timeout", "nan"),
        ("run", "{image}", "--max-instructions", "0"),
        ("run", "{image}", "--max-instructions", "1e6"),
        ("run", "{image}", "--exit-convention", "bochs"),
        ("run", "{image}", "--trace", "/nonexistent/trace"),
        ("run", "{image}", "--trace", "/"),
        ("no-such-command",),
        ("--no-such-option",),
        ("guests", "more"),
    ],
    ids=" ".join,
)
def test_a_wrong_option__is_one_line(vtx: RunVtx, image: Path, arguments: tuple[str, ...]) -> None:
    image.write_bytes(multiboot(exit_with(0)))
    assert_refused(vtx(*(argument.replace("{image}", str(image)) for argument in arguments)))


def test_a_broken_profile__is_one_line(vtx: RunVtx, image: Path, tmp_path: Path) -> None:
    image.write_bytes(multiboot(exit_with(0)))
    profile = tmp_path / "p.toml"
    for text in ("", "name = 1", "][", 'name = "x"\n' * 2):
        profile.write_text(text)
        assert_refused(vtx("run", image, "--profile", profile), "p.toml")


def test_a_trace_that_cannot_be_written__nothing_runs(vtx: RunVtx, image: Path) -> None:
    image.write_bytes(multiboot(exit_with(0)))
    assert_refused(vtx("run", image, "--trace", image.parent / "none" / "t"), "cannot write the trace", "No such file")


def test_a_bundled_guest_that_is_not_built__says_how_to_build_it(
    vtx: RunVtx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vtx.cli.images._folder", lambda: tmp_path / "none")
    assert bundled_names() == []
    assert_refused(vtx("run", "hello"), "make guests")
    listing = vtx("guests")
    assert listing.status == 0
    assert listing.stdout.count(b"not built: make guests") == len(DESCRIPTIONS)


def test_more_memory_than_there_is__is_one_line(vtx: RunVtx, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    image.write_bytes(multiboot(exit_with(0)))
    monkeypatch.setattr("vtx.x86.memory.mmap.mmap", no_memory)
    assert_refused(vtx("run", image, "--memory", "3G"), "3072 MiB", "Cannot allocate memory")
