"""The images that come with the package, and how the command line finds an image."""

from __future__ import annotations

import os
import stat
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

import click
from attrs import frozen

from vtx.cli.status import CANNOT_START

DESCRIPTIONS: Final = {
    "hello": "the smallest VT-x hypervisor: one guest at ring 0, each VM exit printed",
    "svm_hello": "the smallest AMD-V hypervisor: one guest behind nested paging (--profile zen-server)",
    "entries": "enters the VMCSs of a list, one after the other (for `vtx fuzz entries`)",
    "vmruns": "runs the VMCBs of a list, one after the other (for `vtx fuzz vmruns`)",
    "svm_nested": "a hypervisor that gives AMD-V to its guest, which is svm_hello (--profile zen-server)",
    "nested": "a hypervisor that emulates VMX for its guest, a hypervisor with a guest of its own",
}
_SUFFIX: Final = ".elf"
_LARGEST: Final = 1 << 30


class Unusable(click.ClickException):
    """Something that the user named cannot be used; nothing has run."""

    exit_code = CANNOT_START


@frozen
class Image:
    """A boot image: ``name`` is what the guest sees as the first word of its command line."""

    name: str
    data: bytes


def _folder() -> Traversable:
    return resources.files("vtx") / "images"


def bundled_names() -> list[str]:
    """Names of the images that come with this installation, sorted; none if they have not been built."""
    folder = _folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(_SUFFIX) for entry in folder.iterdir() if entry.name.endswith(_SUFFIX))


def find_image(name: str) -> Image:
    """The bundled image of that name, else the file (``./name`` is always a file); `Unusable` if there is neither."""
    if name in bundled_names():
        return Image(name, (_folder() / f"{name}{_SUFFIX}").read_bytes())
    if name in DESCRIPTIONS and not Path(name).is_file():
        raise Unusable(f"the bundled guest {name!r} has not been built; `make guests` builds it")
    known = ", ".join(bundled_names())
    return Image(name, read_file(name, hint=f" (bundled guests: {known})" if known and "/" not in name else ""))


def read_file(name: str, *, hint: str = "") -> bytes:
    """The contents of a file, or of a pipe, that the user named; ``hint`` says what else could have been named."""
    try:
        with Path(name).open("rb") as file:
            kind = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
                raise Unusable(f"cannot read {name!r}: it is not a file")
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unusable(f"cannot read {name!r}: {why}{hint}") from None
    if len(data) > _LARGEST:
        raise Unusable(f"cannot read {name!r}: it is larger than {_LARGEST >> 30} GiB")
    return data
