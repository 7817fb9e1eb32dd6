"""Sorting the emulator options of a test."""

import pytest

from vtx.conformance.options import machine_options

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("-m 2560", 2560 * MIB),
        ("-m 4g", 4 * GIB),
        ("-m 4G", 4 * GIB),
        ("-m size=1G,slots=2", GIB),
        ("-m 512k", MIB // 2),
    ],
)
def test_memory(words: str, size: int) -> None:
    options = machine_options(words.split())
    assert options.memory == size
    assert not options.unsupported


def test_everything_at_once() -> None:
    options = machine_options(["-cpu", "qemu64,+x", "-cpu", "max", "-smp", "4,sockets=1", "-append", "a b"])
    assert (options.processor, options.processors, options.append) == ("max", 4, "a b")
    assert not options.unsupported


@pytest.mark.parametrize(
    "words",
    [
        "-machine pit=off",
        "-overcommit cpu-pm=on",
        "-M q35,kernel-irqchip=split",
        "-device isa-debug-exit,iobase=0xf4",
        "-device pci-testdev",
        "-accel tcg",
        "-enable-kvm",
        "-accel kvm,x=y -no-reboot",
        "-global kvm-pit.lost_tick_policy=discard -no-reboot",
    ],
)
def test_harmless(words: str) -> None:
    assert not machine_options(words.split()).unsupported


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("-device intel-iommu,intremap=on", ["device intel-iommu"]),
        ("-machine vmport=on", ["machine property vmport=on"]),
        ("-m lots", ["memory size 'lots'"]),
        ("-smp none", ["-smp none"]),
        ("-drive file=x -m 64", ["emulator option -drive"]),
    ],
)
def test_unsupported(words: str, what: list[str]) -> None:
    assert machine_options(words.split()).unsupported == what


def test_what_follows_an_unknown_option_still_counts() -> None:
    assert machine_options(["-drive", "file=x", "-m", "64"]).memory == 64 * MIB


def test_option_without_its_value() -> None:
    assert machine_options(["-m"]).unsupported == ["memory size ''"]
