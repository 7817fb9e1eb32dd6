"""Collects what the tests have shown and prints it at the end of the session."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hdl_tests.lib.blocks import Block, load_blocks

Show = Callable[[str], None]

_SHOWN = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SHOWN] = []


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Show:
    """Add one line to the summary of the session; to be called after the line has been shown true."""
    return request.config.stash[_SHOWN].append


@pytest.fixture(params=load_blocks(), ids=lambda block: block.name)
def block(request: pytest.FixtureRequest) -> Block:
    """Each RTL block."""
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_SHOWN]:
        terminalreporter.section("hardware view of the model")
        for line in config.stash[_SHOWN]:
            terminalreporter.write_line(line)
