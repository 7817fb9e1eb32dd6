"""The ``vtx`` command: finds the subcommand, and turns everything that can go wrong into one line and a status.

Subcommands are imported when they are used, and they import the machine when they run: starting quickly is a feature.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

import click

from vtx.cli.status import CANNOT_START, INTERNAL_ERROR, INTERRUPTED, OUTPUT_CLOSED, TERMINATED

_COMMANDS: Final = {
    "run": "vtx.cli.run",
    "guests": "vtx.cli.listings",
    "profiles": "vtx.cli.listings",
    "explain": "vtx.cli.explain",
    "bench": "vtx.cli.bench",
    "conformance": "vtx.cli.conformance",
    "fuzz": "vtx.cli.fuzz",
}


class _Commands(click.Group):
    """The subcommands, each imported on demand from the module that `_COMMANDS` names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for an unknown name."""
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(module), cmd_name)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vtx", message="%(prog)s %(version)s")
def cli() -> None:
    """Run hypervisors on a model of a processor with Intel VT-x."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command with ``arguments`` (those of the process by default); its exit status."""
    with _termination() as signals:
        status = _main(arguments)
    return TERMINATED if signals and status == INTERRUPTED else status


@contextmanager
def _termination() -> Iterator[list[int]]:
    """SIGTERM is an interrupt: what a command has started does not outlive it. The list has the signals that came."""
    signals: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    old = signal.signal(signal.SIGTERM, handle)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, old)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        status = cli.main(args=None if arguments is None else list(arguments), prog_name="vtx", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)  # noqa: T201
        return CANNOT_START
    except click.ClickException as error:
        return _complain(_one_line(error), CANNOT_START)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return close_output()
    except Exception as error:
        if os.environ.get("VTX_TRACEBACK"):
            raise
        what = f"{type(error).__name__}: {error}".replace("\n", " ")
        return _complain(f"internal error: {what} (VTX_TRACEBACK=1 shows where; please report it)", INTERNAL_ERROR)
    return status if isinstance(status, int) else 0


def close_output() -> int:
    """Whoever read standard output is gone: leave without another word about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OUTPUT_CLOSED


def _one_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message.rstrip('.')} (try '{error.ctx.command_path} --help')"
    return message


def _complain(message: str, status: int) -> int:
    print(f"vtx: {message}", file=sys.stderr)  # noqa: T201
    return status
