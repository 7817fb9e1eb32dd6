"""Reading a TOML file key by key, so that every mistake in it is one line naming file, key and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


class ProfileError(ValueError):
    """A CPU profile that cannot be used; the message is one line for the person who wrote it."""


class Section:
    """One table of a TOML file; each key is taken once, and `finish` rejects the keys nobody took.

    ``file`` and ``path`` (dotted keys that lead here, empty at the top) only serve messages.
    """

    def __init__(self, file: str, path: str, values: Mapping[str, Any]) -> None:
        self.file = file
        self.path = path
        self._values = dict(values)

    def fail(self, key: str, expected: str) -> ProfileError:
        """The error of ``key`` not being what was ``expected``."""
        return ProfileError(f"{self.file}: {self._name(key)}: expected {expected}")

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path and key else self.path or key

    def _take(self, key: str, expected: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self._values.pop(key, default)
        if value is None:
            raise self.fail(key, f"{expected}, but the key is missing")
        # bool is an int to Python, not to TOML
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.fail(key, f"{expected}, not {value!r}")
        return value

    def text(self, key: str, longest: int, default: str | None = None) -> str:
        """An ASCII string of at most ``longest`` characters."""
        expected = f"an ASCII string of at most {longest} characters"
        value = str(self._take(key, expected, (str,), default))
        if len(value) > longest or not value.isascii():
            raise self.fail(key, f"{expected}, not {value!r}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from ``low`` to ``high``, both included."""
        expected = f"an integer from {low:#x} to {high:#x}"
        value = int(self._take(key, expected, (int,), default))
        if not low <= value <= high:
            raise self.fail(key, f"{expected}, not {value:#x}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        return bool(self._take(key, "true or false", (bool,), default))

    def choice(self, key: str, allowed: Collection[str]) -> str:
        """One of the strings ``allowed``."""
        expected = "one of " + ", ".join(allowed)
        value = str(self._take(key, expected, (str,), None))
        if value not in allowed:
            raise self.fail(key, f"{expected}, not {value!r}")
        return value

    def names(self, key: str, allowed: Collection[str], what: str, default: tuple[str, ...] | None = None) -> list[str]:
        """A list of distinct strings, each in ``allowed``; ``what`` says in a message what they name."""
        values = self._take(key, f"a list of {what} names", (list, tuple), default)
        for position, value in enumerate(values):
            if value not in allowed:
                raise self.fail(f"{key}[{position}]", f"the name of a {what}, not {value!r}")
            if value in values[:position]:
                raise self.fail(f"{key}[{position}]", f"each {what} once, not {value!r} again")
        return list(values)

    def integers(self, key: str, high: int, longest: int) -> tuple[int, ...]:
        """A list of at most ``longest`` integers from 0 to ``high``."""
        expected = f"a list of at most {longest} integers from 0 to {high:#x}"
        values = self._take(key, expected, (list,), None)
        if len(values) > longest or not all(type(value) is int and 0 <= value <= high for value in values):
            raise self.fail(key, f"{expected}, not {values!r}")
        return tuple(values)

    def section(self, key: str) -> Section:
        """The table ``key``."""
        return Section(self.file, self._name(key), self._take(key, "a table", (dict,), None))

    def optional_section(self, key: str) -> Section | None:
        """The table ``key``, or None without one."""
        return self.section(key) if key in self._values else None

    def sections(self, key: str) -> list[Section]:
        """The array of tables ``key``, possibly absent."""
        values = self._take(key, "an array of tables", (list,), [])
        if not all(isinstance(value, dict) for value in values):
            raise self.fail(key, "an array of tables")
        return [Section(self.file, f"{self._name(key)}[{position}]", value) for position, value in enumerate(values)]

    def keyed_sections(self) -> list[tuple[str, Section]]:
        """All remaining keys, each holding a table."""
        return [(key, self.section(key)) for key in list(self._values)]

    def finish(self) -> None:
        """Reject keys that nobody asked for."""
        for key in self._values:
            raise self.fail(key, "no such key")
