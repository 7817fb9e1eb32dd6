"""The machine of ``vtx run``: about to boot an image, or as a snapshot left it; what cannot be is `Unusable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from attrs import frozen

from vtx.boot.image import BootError, Module
from vtx.cli.images import Image, Unusable
from vtx.machine import Machine
from vtx.x86.toml_section import ProfileError

if TYPE_CHECKING:
    from vtx.events import Tracer
    from vtx.vmx.explanations import Explain


@frozen
class Surroundings:
    """What a machine is connected to, however it came about."""

    serial: Callable[[bytes], None]
    tracer: Tracer | None
    explain: Explain

    def build(self, profile: str, memory: int, cpus: int, seed: int = 0) -> Machine:
        """A machine of that profile, bytes of RAM, number of processors and seed of random numbers."""
        try:
            return Machine(
                profile=profile,
                memory=memory,
                cpus=cpus,
                seed=seed,
                serial=self.serial,
                tracer=self.tracer,
                explain=self.explain,
            )
        except ProfileError as error:
            raise Unusable(f"profile {error}") from None
        except OSError as error:
            raise Unusable(f"cannot have {memory >> 20} MiB of RAM: {error.strerror}") from None


def boot(machine: Machine, image: Image, command_line: str, modules: Sequence[tuple[str, bytes]]) -> Machine:
    """Have ``machine`` boot ``image`` next; modules come with their names."""
    try:
        machine.load(
            image.data,
            name=image.name,
            command_line=command_line,
            modules=[Module(data, name) for name, data in modules],
        )
    except BootError as error:
        raise Unusable(f"cannot boot {image.name!r}: {error}") from None
    return machine


def resume(path: str, profile: str | None, surroundings: Surroundings) -> Machine:
    """A machine that continues the snapshot in a file; without ``profile``, the one of the name in the snapshot."""
    from vtx.snapshot import load_snapshot  # noqa: PLC0415 - few runs need it, and all would wait for it

    with _usable():
        snapshot = load_snapshot(path)
        built = snapshot.configuration
        machine = surroundings.build(profile or built.profile, built.memory, built.cpus)
        machine.restore(snapshot)
    return machine


def save(machine: Machine, path: str) -> None:
    """Write a snapshot of ``machine`` to a file."""
    from vtx.snapshot import save_snapshot  # noqa: PLC0415

    with _usable():
        save_snapshot(machine.snapshot(), path)


@contextmanager
def _usable() -> Iterator[None]:
    from vtx.snapshot import SnapshotError  # noqa: PLC0415

    try:
        yield
    except SnapshotError as error:
        raise Unusable(str(error)) from None
