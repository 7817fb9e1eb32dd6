"""The emulator options of a test, sorted into what the machine can do, what does not matter and what it cannot be.

The suite's configuration speaks QEMU's command line. What the machine has no part for makes the test one that cannot
run here; an option nobody knows does so too, for it was written for a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from attrs import define, field

_SIZE_SHIFTS: Final = {"": 20, "k": 10, "m": 20, "g": 30, "t": 40}

# Options that change nothing a test can see here, with the number of words that follow each. What QEMU accelerates the
# processor with says nothing of what the processor is.
_WITHOUT_EFFECT: Final = {
    "-accel": 1,
    "-enable-kvm": 0,
    "-nodefaults": 0,
    "-no-reboot": 0,
    "-no-user-config": 0,
    "-nographic": 0,
    "-display": 1,
    "-global": 1,
    "-overcommit": 1,
    "-rtc": 1,
    "-serial": 1,
    "-vnc": 1,
}

# Machine properties: the chipset is not modelled beyond what the devices are, so which one it is does not matter.
_MACHINE_WITHOUT_EFFECT: Final = {
    "pc",
    "q35",
    "accel=tcg",
    "kernel-irqchip=on",
    "kernel-irqchip=split",
    "pit=off",
    "pit=on",
    "type=pc",
    "type=q35",
    "vmport=off",
}

_DEVICES_PRESENT: Final = {"isa-debug-exit", "pc-testdev"}
_DEVICES_OPTIONAL: Final = {"pci-testdev", "isa-debugcon"}


@define(slots=True)
class MachineOptions:
    """What a test asks of the machine around its processor.

    ``memory`` is in bytes, ``processor`` the text of the last ``-cpu``, ``append`` further words of the command line;
    each None if not asked for. ``unsupported`` says in a few words each what cannot be had.
    """

    memory: int | None = None
    processor: str | None = None
    processors: int | None = None
    append: str | None = None
    unsupported: list[str] = field(factory=list)


def machine_options(words: Sequence[str]) -> MachineOptions:
    """What the option words of a test ask for."""
    options = MachineOptions()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name = "-" + word.lstrip("-")
        take = _HANDLERS.get(name)
        if take is not None:
            take(options, rest.pop(0) if rest else "")
        elif name in _WITHOUT_EFFECT:
            del rest[: _WITHOUT_EFFECT[name]]
        else:
            options.unsupported.append(f"emulator option {word}")
            while rest and not rest[0].startswith("-"):
                rest.pop(0)
    return options


def _memory(options: MachineOptions, value: str) -> None:
    match = re.fullmatch(r"(?:size=)?([0-9]{1,12})([kmgt]?)b?(?:,.*)?", value.lower())
    if match is None:
        options.unsupported.append(f"memory size {value!r}")
        return
    options.memory = int(match[1]) << _SIZE_SHIFTS[match[2]]


def _processor(options: MachineOptions, value: str) -> None:
    options.processor = value


def _append(options: MachineOptions, value: str) -> None:
    options.append = value


def _count(options: MachineOptions, value: str) -> None:
    match = re.match(r"(?:cpus=)?([1-9][0-9]{0,3})(?:,|$)", value)
    if match is None:
        options.unsupported.append(f"-smp {value}")
        return
    options.processors = int(match[1])


def _machine(options: MachineOptions, value: str) -> None:
    options.unsupported += [
        f"machine property {each}" for each in value.split(",") if each not in _MACHINE_WITHOUT_EFFECT
    ]


def _device(options: MachineOptions, value: str) -> None:
    device, _, _ = value.partition(",")
    if device not in _DEVICES_PRESENT | _DEVICES_OPTIONAL:
        options.unsupported.append(f"device {device}")


_HANDLERS: Final[dict[str, Callable[[MachineOptions, str], None]]] = {
    "-m": _memory,
    "-cpu": _processor,
    "-smp": _count,
    "-append": _append,
    "-machine": _machine,
    "-M": _machine,
    "-device": _device,
}
