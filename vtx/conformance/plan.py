"""From a test of the suite to a job for a machine, or to the reason why there is none."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import field, frozen

from vtx.conformance.options import MachineOptions, machine_options
from vtx.conformance.processor import UnsupportedError, adapt, features_of, parse_wish, unknown_flags
from vtx.conformance.suite import MANUAL, Suite, SuiteError, SuiteTest
from vtx.x86.profile import DEFAULT_PROFILE, profile_document, profile_names

_DEFAULT_MEMORY: Final = 128 << 20
_DEFAULT_GROUP: Final = "default"

# Tests of an interface between one hypervisor and its guests, or of firmware: there is no processor manual to be
# right about. By image, or image and arguments, with what they test.
_NOT_ARCHITECTURE: Final = {
    "asyncpf.flat": "KVM's asynchronous page faults",
    "hypercall.flat": "KVM's hypercalls",
    "kvmclock_test.flat": "KVM's clock",
    "hyperv_clock.flat": "the interface of Hyper-V to its guests",
    "hyperv_connections.flat": "the interface of Hyper-V to its guests",
    "hyperv_stimer.flat": "the interface of Hyper-V to its guests",
    "hyperv_synic.flat": "the interface of Hyper-V to its guests",
    "s3.flat": "ACPI firmware that wakes the machine up",
    "vmexit.flat vmcall": "KVM's hypercalls",
    "vmware_backdoors.flat": "VMware's backdoor ports",
}

# Settings that the suite has for machines without a hypervisor, passed to an image as its boot module. By image: in
# these, what the suite calls its test device is not a device but KVM's hypercalls.
_ENVIRONMENT: Final = {"apic.flat": "TEST_DEVICE=0"}

# Settings of a host that the suite wants because KVM depends on them, and this machine does not.
_CHECKS_THAT_HOLD: Final = {"/sys/module/kvm_intel/parameters/allow_smaller_maxphyaddr=Y"}


@frozen
class Job:
    """What one process has to run.

    ``memory`` is in bytes, ``timeout`` in seconds of wall time (None for no limit). ``profile`` are the tables of the
    processor's profile, ``processor`` is what to call it. ``environment`` is a setting for the image's boot module.
    """

    image: Path
    command_line: str
    memory: int
    processors: int
    timeout: float | None
    processor: str
    profile: Mapping[str, Any] = field(repr=False)
    environment: str = ""


@frozen
class Plan:
    """A test with its job, or with the reason to skip it."""

    test: SuiteTest
    job: Job | None
    skip: str = ""

    @property
    def group(self) -> str:
        """The group that a report files the test under: the first one it is in."""
        return next((group for group in self.test.groups if group != MANUAL), _DEFAULT_GROUP)


@frozen
class Selection:
    """Which tests are asked for: patterns of names, and groups; no patterns or no groups means all."""

    tests: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    def select(self, suite: Suite) -> tuple[SuiteTest, ...]:
        """The tests asked for, in the order of the suite; `SuiteError` for a pattern or a group without any."""
        names = [test.name for test in suite.tests]
        for pattern in self.tests:
            if not fnmatch.filter(names, pattern):
                raise SuiteError(f"{suite.directory}: no test is called {pattern!r}")
        for group in self.groups:
            if group not in (*suite.groups(), _DEFAULT_GROUP):
                raise SuiteError(f"{suite.directory}: no group {group!r} (groups: {', '.join(suite.groups())})")
        chosen = tuple(test for test in suite.tests if self._wants(test))
        if not chosen:
            raise SuiteError(f"{suite.directory}: no test is left to run")
        return chosen

    def _wants(self, test: SuiteTest) -> bool:
        groups = test.groups or (_DEFAULT_GROUP,)
        return (
            (not self.tests or _matches(test.name, self.tests))
            and (not self.groups or any(group in self.groups for group in groups))
            and not _matches(test.name, self.excluded)
        )

    def asks_for(self, test: SuiteTest) -> bool:
        """Whether ``test`` was asked for, as opposed to being one of all."""
        return bool(self.tests or self.groups)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_like(name: str, model: str | None) -> bool:
    """Whether the profile ``name`` is the one most like a model of QEMU's, or that one's like of another vendor."""
    return model is not None and (name == model or name.startswith(f"{model}-"))


_ANY_MODEL: Final = "any"


class Planner:
    """Plans the tests of ``suite`` for processors of ``profiles``.

    A test gets the first profile that can be what it asks for; without ``profiles``, the one that is most like the
    processor it names, the default one, or any other.
    ``flags`` are changes to the processor of every test, as QEMU's ``-cpu`` has them behind the model's name; a test of
    the name of a flag is about that flag, and keeps it as it is.
    A test for more than ``most_processors`` is left out. `ProfileError` for a profile that cannot be used,
    `UnsupportedError` for flags that mean nothing here.
    """

    def __init__(
        self, suite: Suite, profiles: Sequence[str] = (), *, flags: str = "", most_processors: int = 64
    ) -> None:
        if unknown := unknown_flags(flags):
            raise UnsupportedError(f"unknown flag {unknown[0]!r}")
        self._suite = suite
        self._flags = flags
        self._most_processors = most_processors
        known = [profile_document(name) for name in profile_names()]
        self._free_choice = not profiles
        names = profiles or sorted(profile_names(), key=lambda name: name != DEFAULT_PROFILE)
        self._candidates = [profile_document(name) for name in names]
        self._possible = features_of([*known, *self._candidates])

    def plan(self, test: SuiteTest, *, asked_for: bool) -> Plan:
        """The plan for ``test``; one that the suite leaves to be run by hand has to be ``asked_for``."""
        options = machine_options(test.options)
        if reason := self._obstacle(test, options, asked_for=asked_for):
            return Plan(test, None, reason)
        try:
            processor, profile = self._processor(test, options)
        except UnsupportedError as why:
            return Plan(test, None, f"unsupported: {why}")
        command_line = " ".join(filter(None, (test.arguments, options.append)))
        job = Job(
            self._suite.image(test),
            command_line,
            options.memory or _DEFAULT_MEMORY,
            options.processors or test.processors,
            test.timeout,
            processor,
            profile,
            _ENVIRONMENT.get(test.file, ""),
        )
        return Plan(test, job)

    def _obstacle(self, test: SuiteTest, options: MachineOptions, *, asked_for: bool) -> str:
        """What keeps ``test`` from running besides the processor; empty if nothing does."""
        built_for = self._suite.architecture
        processors = options.processors or test.processors
        if MANUAL in test.groups and not asked_for:
            return "runs only when asked for"
        if test.architecture and built_for and test.architecture != built_for:
            return f"for {test.architecture}, and this build is for {built_for}"
        if outside := _NOT_ARCHITECTURE.get(test.file) or _NOT_ARCHITECTURE.get(f"{test.file} {test.arguments}"):
            return f"needs {outside}"
        if test.accelerator and "tcg" not in test.accelerator:
            return f"needs {test.accelerator.upper()} as the accelerator"
        if unmet := [each for each in test.check if each not in _CHECKS_THAT_HOLD]:
            return f"needs a host with {unmet[0]}"
        if not self._suite.image(test).is_file():
            return f"x86/{test.file} has not been built"
        if test.arguments is None:
            return "its arguments are made by a shell"
        if options.unsupported:
            return f"needs {options.unsupported[0]}"
        return f"needs {processors} processors" if processors > self._most_processors else ""

    def _processor(self, test: SuiteTest, options: MachineOptions) -> tuple[str, Mapping[str, Any]]:
        flags = [flag for flag in self._flags.split(",") if flag and flag[1:] != test.name]
        wish = parse_wish(",".join((options.processor or _ANY_MODEL, *flags)))
        reason: UnsupportedError | None = None
        candidates = self._candidates
        if self._free_choice:
            candidates = sorted(candidates, key=lambda document: not _is_like(document["name"], wish.profile))
        for document in candidates:
            try:
                profile = adapt(document, wish, self._possible)
            except UnsupportedError as why:
                reason = reason or why
                continue
            return f"{document['name']} {wish.beyond(document)}".rstrip(), profile
        raise UnsupportedError(str(reason))
