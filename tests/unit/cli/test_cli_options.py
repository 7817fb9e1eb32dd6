"""Sizes and times that users write."""

from __future__ import annotations

import click
import pytest

from vtx.cli.options import memory_size, wall_time

CONTEXT = click.Context(click.Command("run"))
OPTION = click.Option(["--memory"])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1 << 20),
        ("64", 64 << 20),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64MB", 64 << 20),
        ("64MiB", 64 << 20),
        (" 64M ", 64 << 20),
        ("2G", 2 << 30),
        ("1028K", 1028 << 10),
        ("1024G", 1 << 40),
    ],
)
def test_memory_size__accepts(text: str, size: int) -> None:
    assert memory_size(CONTEXT, OPTION, text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "1.5G", "-64M", "+64M", "0", "1023K", "1025K", "1025G", "64T", "0x40M", "6 4M", "٦٤M", "9" * 40]
)
def test_memory_size__rejects_naming_the_text(text: str) -> None:
    with pytest.raises(click.BadParameter) as error:
        memory_size(CONTEXT, OPTION, text)
    assert repr(text) in error.value.format_message()
    assert "\n" not in error.value.format_message()


@pytest.mark.parametrize("value", [None, 0.001, 1.0, 1e9])
def test_wall_time__accepts(value: float | None) -> None:
    assert wall_time(CONTEXT, OPTION, value) == value


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_wall_time__rejects(value: float) -> None:
    with pytest.raises(click.BadParameter):
        wall_time(CONTEXT, OPTION, value)
