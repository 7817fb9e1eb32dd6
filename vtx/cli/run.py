"""``vtx run``: boot an image and stay with it until it ends."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from vtx.cli.console import SerialOutput, whole_input
from vtx.cli.failures import Failures
from vtx.cli.images import Unusable, find_image, read_file
from vtx.cli.options import memory_size, wall_time
from vtx.cli.status import GUEST_DIED, LIMIT_REACHED, ExitConvention, guest_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtx.cli.session import Ended
    from vtx.machine import Machine
    from vtx.trace import JsonLinesTracer

_DEFAULT_PROFILE = "skylake-server"


@click.command()
@click.argument("image", metavar="IMAGE|BUNDLED-NAME", required=False)
@click.argument("guest_args", metavar="[GUEST ARGS]...", nargs=-1)
@click.option("--profile", default=_DEFAULT_PROFILE, show_default=True, metavar="NAME", help="Processor to be.")
@click.option("--memory", default="128M", show_default=True, callback=memory_size, help="RAM: 64M (or 64), 2G.")
@click.option("--smp", "cpus", type=click.IntRange(1, 64), default=1, show_default=True, help="Processors.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="What RDRAND and RDSEED follow from.",
)
@click.option(
    "--initrd",
    "initrds",
    multiple=True,
    metavar="FILE",
    help="A Multiboot module or Linux initial RAM disk; may be repeated.",
)
@click.option("--trace", "trace_file", metavar="FILE", help="Write what happens as JSON lines.")
@click.option("--max-instructions", type=click.IntRange(min=1), metavar="N", help="Stop after N guest instructions.")
@click.option("--timeout", type=float, callback=wall_time, metavar="SECONDS", help="Stop after this much wall time.")
@click.option("--save-snapshot", metavar="FILE", help="When the run ends, write the machine as it then is to FILE.")
@click.option("--from-snapshot", metavar="FILE", help="Go on from there instead of booting an image.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option(
    "--exit-convention",
    type=click.Choice([convention.value for convention in ExitConvention]),
    default=ExitConvention.VALUE.value,
    show_default=True,
    help="What a value V written to the debug-exit port becomes: V, or (V << 1) | 1 as with QEMU.",
)
@click.pass_context
def run(
    context: click.Context,
    image: str | None,
    guest_args: tuple[str, ...],
    profile: str,
    memory: int,
    cpus: int,
    seed: int,
    initrds: tuple[str, ...],
    trace_file: str | None,
    max_instructions: int | None,
    timeout: float | None,
    save_snapshot: str | None,
    from_snapshot: str | None,
    as_json: bool,
    exit_convention: str,
) -> int:
    """Boot IMAGE and run it until it writes to the debug-exit port 0xF4.

    IMAGE is a bundled guest (see `vtx guests`) or a file: Multiboot 1 or 2, a Linux bzImage or vmlinux, a kernel with a
    PVH entry point, ELF, or a boot sector. GUEST ARGS are its command line; write -- before arguments that begin with a
    dash. The serial port COM1 is standard input and output, a summary goes to standard error. With --from-snapshot
    there is no IMAGE, and the machine is that of the snapshot.

    \b
    Exit status:
      the value that the guest wrote (0 means pass; its low 8 bits, 255 if only those are 0)
      124  time-out, or the limit of instructions
      125  triple fault, shutdown, VMX abort, halted for ever, or something that is not modelled
      130  interrupted from the keyboard
      2    wrong usage, or an image that cannot be booted
    """
    _check_origin(context, image, from_snapshot)
    from vtx.cli import building  # noqa: PLC0415 - not before the options are known to be good
    from vtx.cli.session import Session  # noqa: PLC0415

    found = find_image(image) if image is not None else None
    modules = [(name, read_file(name)) for name in initrds]
    output = SerialOutput(sys.stdout.buffer)
    failures = Failures(None if as_json else _complain)
    with _trace_to(trace_file) as tracer:
        surroundings = building.Surroundings(output.write, tracer, failures.take)
        if found is not None:
            machine = building.boot(
                surroundings.build(profile, memory, cpus, seed), found, " ".join(guest_args), modules
            )
        else:
            assert from_snapshot is not None
            machine = building.resume(from_snapshot, profile if _given(context, "profile") else None, surroundings)
        session = Session(machine, output)
        given = whole_input()
        if given is None:
            session.connect_input()
        elif given:
            machine.feed(given)
        ended = session.run(max_instructions=max_instructions, timeout=timeout)
    if save_snapshot is not None:
        building.save(machine, save_snapshot)
    return _conclude(machine, ended, failures, ExitConvention(exit_convention), timeout, as_json=as_json)


def _given(context: click.Context, option: str) -> bool:
    return context.get_parameter_source(option) is ParameterSource.COMMANDLINE


def _check_origin(context: click.Context, image: str | None, from_snapshot: str | None) -> None:
    """A run begins with an image, on a machine as the options say, or with a snapshot, which has both."""
    if from_snapshot is None:
        if image is None:
            raise click.UsageError("Missing argument 'IMAGE|BUNDLED-NAME'.", context)
        return
    if image is not None:
        raise click.UsageError("--from-snapshot goes on with the guest of the snapshot: there is no IMAGE.", context)
    for option, flag in (
        ("memory", "--memory"),
        ("cpus", "--smp"),
        ("seed", "--seed"),
        ("initrds", "--initrd"),
    ):
        if _given(context, option):
            raise click.UsageError(f"--from-snapshot has the machine of the snapshot: there is no {flag}.", context)


def _complain(explanation: str) -> None:
    print(f"vtx: {explanation}", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def _trace_to(path: str | None) -> Iterator[JsonLinesTracer | None]:
    """The tracer that writes to ``path``, None without one; a trace that cannot be written is the user's affair."""
    if path is None:
        yield None
        return
    from vtx.trace import JsonLinesTracer, TraceError  # noqa: PLC0415 - only for runs that are traced

    try:
        with JsonLinesTracer(path) as tracer:
            yield tracer
    except TraceError as error:
        raise Unusable(str(error)) from None


def _conclude(
    machine: Machine,
    ended: Ended,
    failures: Failures,
    convention: ExitConvention,
    timeout: float | None,
    *,
    as_json: bool,
) -> int:
    from vtx.cli.session import Cause  # noqa: PLC0415 - see `run`
    from vtx.cli.summary import summarize  # noqa: PLC0415
    from vtx.machine import StopReason  # noqa: PLC0415

    result = ended.result
    message = result.message
    if ended.cause is not None:
        status = ended.cause.value
        reasons = {
            Cause.TIMEOUT: f"stopped after {timeout:g} seconds" if timeout else "",
            Cause.INTERRUPT: "interrupted",
            Cause.TERMINATE: "terminated",
            Cause.OUTPUT_CLOSED: "standard output is closed",
        }
        message = reasons[ended.cause]
    elif result.exit_value is not None:
        status = guest_status(result.exit_value, convention)
    else:
        status = LIMIT_REACHED if result.reason is StopReason.INSTRUCTION_LIMIT else GUEST_DIED
    summary = summarize(machine, ended, failures, message, status, guest_is_well=result.exit_value == 0)
    print(summary.to_json() if as_json else summary.to_text(), file=sys.stderr)  # noqa: T201
    return status
