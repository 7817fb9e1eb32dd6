"""What a snapshot holds, and how it is taken from a machine and put back.

A snapshot is data that nobody changes, so it can be restored any number of times, into any machine of the same
configuration. The run after it is the same each time: whatever influences it is part of the snapshot.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import asdict, frozen

from vtx.board import SavedDevices
from vtx.boot.image import BootOptions
from vtx.scheduler import Turns
from vtx.svm.saved import SavedSvm, restore_svm, save_svm
from vtx.vmx.saved import SavedVmx, restore_vmx, save_vmx
from vtx.x86.memory_image import MemoryImage
from vtx.x86.profile import Profile
from vtx.x86.saved import SavedProcessor, restore_processor, save_processor

if TYPE_CHECKING:
    from vtx.cpu import Cpu
    from vtx.machine import Machine


class SnapshotError(ValueError):
    """The snapshot cannot be used; the message is one line."""


@frozen
class Configuration:
    """What a machine must be built like to continue a snapshot; ``memory`` is in bytes."""

    profile: str
    profile_digest: str
    memory: int
    cpus: int

    @classmethod
    def of(cls, machine: Machine) -> Configuration:
        """The configuration of ``machine``."""
        profile = machine.profile
        return cls(profile.name, _digest(profile), machine.memory.size, len(machine.cpus))

    def require(self, other: Configuration) -> None:
        """Raise `SnapshotError` unless a machine of ``other`` can continue a snapshot of this configuration."""
        for what, mine, others in (
            ("RAM", f"{self.memory >> 10} KiB", f"{other.memory >> 10} KiB"),
            ("processors", self.cpus, other.cpus),
            ("the profile", self.profile, other.profile),
        ):
            if mine != others:
                raise SnapshotError(f"the snapshot needs a machine with {mine} for {what}, not {others}")
        if self.profile_digest != other.profile_digest:
            raise SnapshotError(f"the profile {self.profile} is not what it was when the snapshot was taken")


@frozen
class SavedCpu:
    """One processor with its virtualization extension, of which it has one."""

    processor: SavedProcessor
    vmx: SavedVmx | None
    svm: SavedSvm | None
    init_pending: bool
    smi_pending: bool


@frozen
class SavedRun:
    """How far the run has come: what belongs to no processor and no device.

    ``running`` is the index of a processor; ``image`` is what a restart boots, and how.
    """

    exit_value: int | None
    exit_counts: Mapping[str, int]
    latest: int
    running: int
    turns: Turns
    image: tuple[bytes, BootOptions] | None


@frozen(eq=False)
class Snapshot:
    """The whole machine between two instructions."""

    configuration: Configuration
    run: SavedRun
    cpus: tuple[SavedCpu, ...]
    devices: SavedDevices
    ram: MemoryImage


def capture(machine: Machine) -> Snapshot:
    """Take a snapshot of ``machine``, which must not be running."""
    return Snapshot(
        configuration=Configuration.of(machine),
        run=SavedRun(
            exit_value=machine.exit_value,
            exit_counts=dict(machine.exit_counts),
            latest=machine.now(),
            running=machine.running.index,
            turns=machine.scheduler.turns.copy(),
            image=machine.image,
        ),
        cpus=tuple(_save_cpu(cpu) for cpu in machine.cpus),
        devices=machine.board.save(),
        ram=machine.history.save(),
    )


def restore(machine: Machine, snapshot: Snapshot) -> None:
    """Put ``machine`` back to ``snapshot``; `SnapshotError` if it is built differently."""
    snapshot.configuration.require(Configuration.of(machine))
    run = snapshot.run
    for cpu, saved in zip(machine.cpus, snapshot.cpus, strict=True):
        _restore_cpu(cpu, saved)
    machine.board.restore(snapshot.devices)
    machine.scheduler.turns = run.turns.copy()
    machine.exit_value, machine.image = run.exit_value, run.image
    machine.exit_counts.clear()
    machine.exit_counts.update(run.exit_counts)
    machine.set_time(run.running, run.latest)
    machine.history.restore(snapshot.ram)  # last: it takes the place of all else in the host's caches


def _save_cpu(cpu: Cpu) -> SavedCpu:
    amd = cpu.profile.is_amd
    return SavedCpu(
        processor=save_processor(cpu),
        vmx=None if amd else save_vmx(cpu.vmx),
        svm=save_svm(cpu.svm) if amd else None,
        init_pending=cpu.init_pending,
        smi_pending=cpu.smi_pending,
    )


def _restore_cpu(cpu: Cpu, saved: SavedCpu) -> None:
    if saved.vmx is not None:
        restore_vmx(cpu.vmx, saved.vmx)
    if saved.svm is not None:
        restore_svm(cpu.svm, saved.svm)
    restore_processor(cpu, saved.processor)
    cpu.init_pending, cpu.smi_pending = saved.init_pending, saved.smi_pending


@functools.lru_cache(maxsize=16)
def _digest(profile: Profile) -> str:
    """The same for equal profiles, in every process."""
    parts = asdict(profile, recurse=False)
    parts["features"] = sorted(profile.features)
    parts["vmx_capabilities"] = sorted(profile.vmx_capabilities.items())
    del parts["feature_words"]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
