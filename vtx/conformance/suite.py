"""A build of kvm-unit-tests in a directory: which tests its configuration lists, and what it was built for.

The suite itself is never part of this project. What is read: ``x86/unittests.cfg`` (the tests), ``config.mak`` (the
target of the build), ``build-head`` or git (the revision), and the names of the images ``x86/*.flat``.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attrs import evolve, field, frozen

UNLISTED: Final = "unlisted"
"""Group of the images that the configuration does not mention."""

MANUAL: Final = "nodefault"
"""Group of the tests that run only when asked for."""

DEFAULT_TIMEOUT: Final = 90.0

_IMAGES: Final = "x86"
_CONFIGURATION: Final = "x86/unittests.cfg"
_ARCHITECTURES: Final = ("x86_64", "i386")
_QUOTES: Final = '"""'
_DURATION_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class SuiteError(Exception):
    """The directory cannot be used as a build of the suite; the message is one line."""


@frozen
class SuiteTest:
    """One section of the configuration.

    ``arguments`` is the command line of the image as the suite's shell would pass it, None if it takes a shell to know;
    ``options`` are the words of the emulator options. ``check`` is a list of ``path=value`` that the host has to
    satisfy. ``timeout`` is in seconds of wall time on hardware, None for no limit. Texts are empty when not given.
    """

    name: str
    file: str
    arguments: str | None = ""
    options: tuple[str, ...] = ()
    processors: int = 1
    groups: tuple[str, ...] = ()
    architecture: str = ""
    accelerator: str = ""
    check: tuple[str, ...] = ()
    timeout: float | None = DEFAULT_TIMEOUT


@frozen
class Suite:
    """A build: ``architecture`` is what it was configured for, ``revision`` what it was built from, None if unknown."""

    directory: Path
    tests: tuple[SuiteTest, ...] = field(repr=False)
    architecture: str | None
    revision: str | None

    def image(self, test: SuiteTest) -> Path:
        """Where the image of ``test`` is, or would be if it had been built."""
        return self.directory / _IMAGES / test.file

    def groups(self) -> tuple[str, ...]:
        """All groups, in the order of their first test."""
        return tuple(dict.fromkeys(group for test in self.tests for group in test.groups))


def load_suite(directory: Path) -> Suite:
    """The build in ``directory``; `SuiteError` if there is none, or none for x86 without firmware."""
    try:
        text = (directory / _CONFIGURATION).read_text(encoding="utf-8")
    except OSError as error:
        why = error.strerror or str(error)
        raise SuiteError(f"{directory}: not a kvm-unit-tests build: {_CONFIGURATION}: {why}") from None
    except UnicodeDecodeError:
        raise SuiteError(f"{directory}: not a kvm-unit-tests build: {_CONFIGURATION} is not text") from None
    settings = _settings(directory / "config.mak")
    architecture = settings.get("ARCH")
    if architecture is not None and architecture not in _ARCHITECTURES:
        raise SuiteError(f"{directory}: a build for {architecture}, not for {' or '.join(_ARCHITECTURES)}")
    built = sorted(path.name for path in (directory / _IMAGES).glob("*.flat"))
    if not built:
        efi = settings.get("CONFIG_EFI") == "y" or any((directory / _IMAGES).glob("*.efi"))
        why = "it was built for UEFI firmware (x86/*.efi)" if efi else "it has no images x86/*.flat; run make in it"
        raise SuiteError(f"{directory}: not a kvm-unit-tests build that boots here: {why}")
    tests = parse_configuration(text, str(directory / _CONFIGURATION))
    mentioned = {test.file for test in tests}
    unlisted = [SuiteTest(Path(file).stem, file, groups=(UNLISTED, MANUAL)) for file in built if file not in mentioned]
    return Suite(directory, (*tests, *unlisted), architecture, _revision(directory))


def parse_configuration(text: str, name: str) -> tuple[SuiteTest, ...]:
    """The tests that the text of a configuration lists, in its order and numbered where a name comes again.

    ``name`` is for the message of a `SuiteError`.
    """
    tests: list[SuiteTest] = []
    seen: Counter[str] = Counter()
    for title, settings in _sections(text):
        seen[title] += 1
        number = f" ({seen[title]})" if seen[title] > 1 else ""
        try:
            tests.append(_test(title + number, settings))
        except ValueError as error:
            raise SuiteError(f"{name}: test {title!r}: {error}") from None
    return tuple(tests)


def _sections(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    title, settings = None, dict[str, str]()
    lines = iter(text.splitlines())
    for line in lines:
        if header := re.fullmatch(r"\[(.*)\]", line):
            if title is not None:
                yield title, settings
            title, settings = header[1], {}
        elif setting := re.match(r"([a-z_]+) *= *(.*)", line):
            value = setting[2]
            if value.startswith(_QUOTES):
                value = _until_quotes(value.removeprefix(_QUOTES), lines)
            settings[setting[1]] = value
    if title is not None:
        yield title, settings


def _until_quotes(first: str, lines: Iterator[str]) -> str:
    """A value over several lines, up to three quotation marks at the end of one."""
    value = [first]
    for line in lines:
        if (stripped := line.rstrip()).endswith(_QUOTES):
            value.append(stripped.removesuffix(_QUOTES))
            break
        value.append(line)
    return "\n".join(value).replace("\\\n", " ")


def _test(name: str, settings: dict[str, str]) -> SuiteTest:
    if not settings.get("file"):
        raise ValueError("no file")
    test = SuiteTest(
        name,
        settings["file"],
        arguments=_expand(settings.get("test_args", "")),
        options=tuple(_words(settings.get("qemu_params", settings.get("extra_params", "")))),
        groups=tuple(settings.get("groups", "").split()),
        architecture=settings.get("arch", "").strip(),
        accelerator=settings.get("accel", "").strip(),
        check=tuple(settings.get("check", "").split()),
    )
    if "smp" in settings:
        test = evolve(test, processors=_processors(settings["smp"]))
    if "timeout" in settings:
        test = evolve(test, timeout=_duration(settings["timeout"]))
    return test


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text!r}: {str(error).lower()}") from None


def _expand(text: str) -> str | None:
    if "`" in text or "$" in text:
        return None
    return " ".join(_words(text))


def _processors(text: str) -> int:
    count = re.match(r"[0-9]{1,4}", text)
    if count is None or not int(count[0]):
        raise ValueError(f"smp {text!r} is not a number of processors")
    return int(count[0])


def _duration(text: str) -> float | None:
    """Seconds of a duration as timeout(1) takes it; 0 is no limit."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text.strip())
    if match is None:
        raise ValueError(f"timeout {text!r} is not a duration")
    return float(match[1]) * _DURATION_UNITS[match[2]] or None


def _settings(path: Path) -> dict[str, str]:
    """Assignments in a file of them; empty if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE))


def _revision(directory: Path) -> str | None:
    """What the images were built from; failing that, what is checked out."""
    try:
        built = (directory / "build-head").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        built = ""
    if re.fullmatch(r"\S{4,64}", built):
        return built
    if not (directory / ".git").exists():
        return None
    command = ["git", "-c", "safe.directory=*", "-C", str(directory), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
