"""An unknown Unicorn is refused at once, with one line that says what differs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vtx.engine import layout, native, selfcheck
from vtx.engine.unicorn_engine import UnicornEngine


@pytest.fixture(autouse=True)
def fresh_check() -> Iterator[None]:
    selfcheck.require_known_library.cache_clear()
    yield
    selfcheck.require_known_library.cache_clear()


def refusal() -> str:
    with pytest.raises(native.EngineUnusable) as caught:
        selfcheck.require_known_library()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_installed_library_is_known() -> None:
    selfcheck.require_known_library()


def test_other_version__is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "version", lambda: (2, 0, 1))
    assert refusal() == "Unicorn 2.0.1 is not supported; this engine knows 2.1.4"


def test_other_context_size__is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CONTEXT_SIZE", 5600)
    assert refusal() == "Unicorn's context has 5608 bytes where 5600 were expected"


@pytest.mark.parametrize(
    ("name", "what"),
    [("GPR", "RAX"), ("RIP", "RIP"), ("XMM0", "XMM0"), ("DR0", "DR0"), ("CR0", "CR2")],
)
def test_register_elsewhere__is_refused_by_name(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, name, getattr(layout, name) + 8)
    assert refusal().startswith(f"Unicorn keeps {what} elsewhere: ")


@pytest.mark.parametrize("name", ["CC_SRC", "CC_OP"])
def test_flags_elsewhere__are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, name, getattr(layout, name) + 24)
    assert refusal() == "Unicorn keeps the arithmetic flags elsewhere"


def test_segments_elsewhere__are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_BASES", {"FS_BASE": selfcheck._BASES["FS_BASE"] + 24})
    assert refusal().startswith("Unicorn keeps FS_BASE elsewhere: ")


def test_the_engine_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "version", lambda: (3, 0, 0))
    with pytest.raises(native.EngineUnusable):
        UnicornEngine(None, None)  # type: ignore[arg-type]
