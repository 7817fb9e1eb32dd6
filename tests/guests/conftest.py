from __future__ import annotations

from pathlib import Path

import pytest
from tiny_guests import Finished, RunVtx

from vtx.cli.images import bundled_names
from vtx.cli.main import main


@pytest.fixture
def vtx(capfdbinary: pytest.CaptureFixture[bytes]) -> RunVtx:
    """The command line inside this process."""

    def run(*arguments: object) -> Finished:
        status = main([str(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return Finished(status, out, err.decode())

    return run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file to put an image into."""
    return tmp_path / "image.bin"


@pytest.fixture(params=["hello", "nested"])
def bundled(request: pytest.FixtureRequest) -> str:
    """The name of a bundled guest, each in turn."""
    return need_bundled(request.param)


@pytest.fixture
def hello() -> str:
    """The smallest bundled guest."""
    return need_bundled("hello")


@pytest.fixture
def nested() -> str:
    """Three levels of it."""
    return need_bundled("nested")


@pytest.fixture
def svm_hello() -> str:
    """The smallest bundled guest for AMD-V."""
    return need_bundled("svm_hello")


@pytest.fixture
def svm_nested() -> str:
    """A hypervisor under it."""
    return need_bundled("svm_nested")


def need_bundled(name: str) -> str:
    if name not in bundled_names():
        pytest.skip(f"the bundled guest {name} has not been built (make guests)")
    return name
