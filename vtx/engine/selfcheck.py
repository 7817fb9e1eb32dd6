"""Refuse a Unicorn this engine was not measured with, before it can go wrong in the middle of a guest.

Each offset of `layout` is verified by writing a pattern through the public register API and finding it where it should
be in a saved context; the behaviours relied on are verified by the engine's tests. One check per process.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

from unicorn import x86_const

from vtx.engine import layout, native

_GPRS: Final = (
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15",
)  # fmt: skip
_BASES: Final = {"FS_BASE": layout.SEGMENTS + 4 * 24 + 8, "GS_BASE": layout.SEGMENTS + 5 * 24 + 8}


def _expected() -> dict[str, int]:
    """Register name of the public API -> offset in the context, for all that can be checked with 64-bit patterns."""
    places = {name: layout.GPR + 8 * i for i, name in enumerate(_GPRS)}
    places["RIP"] = layout.RIP
    places |= _BASES
    places["XMM0"] = layout.XMM0
    places |= {f"DR{i}": layout.DR0 + 8 * i for i in range(4)}
    places["CR2"] = layout.CR0 + 16
    return places


@functools.cache
def require_known_library() -> None:
    """Raise `EngineUnusable` with one clear line unless the loaded library is one this engine knows."""
    version = native.version()
    if version not in native.SUPPORTED_VERSIONS:
        known = ", ".join(".".join(map(str, v)) for v in native.SUPPORTED_VERSIONS)
        raise native.EngineUnusable(
            f"Unicorn {'.'.join(map(str, version))} is not supported; this engine knows {known}"
        )
    handle = ctypes.c_void_p()
    native.check(native.library.uc_open(native.ARCH_X86, native.MODE_64, ctypes.byref(handle)), "opening a processor")
    try:
        _check_layout(handle)
    finally:
        native.library.uc_close(handle)


def _check_layout(handle: ctypes.c_void_p) -> None:
    library = native.library
    size = library.uc_context_size(handle)
    if size != layout.CONTEXT_SIZE:
        raise native.EngineUnusable(f"Unicorn's context has {size} bytes where {layout.CONTEXT_SIZE} were expected")
    patterns = {}
    for i, (name, offset) in enumerate(_expected().items()):
        pattern = 0x0000_1357_0000_9BDF + (i << 32) + (i << 8)
        value = (ctypes.c_uint64 * 2)(pattern, 0)
        native.check(library.uc_reg_write(handle, getattr(x86_const, f"UC_X86_REG_{name}"), value), f"writing {name}")
        patterns[name] = (offset, pattern)
    flags = ctypes.c_uint64(0x0000_0000_0024_0CD7)  # ID, AC, OF, DF and the arithmetic flags
    library.uc_reg_write(handle, native.REG_EFLAGS, ctypes.byref(flags))
    context = ctypes.c_void_p()
    native.check(library.uc_context_alloc(handle, ctypes.byref(context)), "a context")
    try:
        native.check(library.uc_context_save(handle, context), "saving a context")
        image = ctypes.string_at(context.value or 0, size)
    finally:
        library.uc_context_free(context)
    for name, (offset, pattern) in patterns.items():
        found = int.from_bytes(image[offset : offset + 8], "little")
        if found != pattern:
            raise native.EngineUnusable(
                f"Unicorn keeps {name} elsewhere: {found:#x} at offset {offset}, not {pattern:#x}"
            )
    source = int.from_bytes(image[layout.CC_SRC : layout.CC_SRC + 8], "little")
    operation = int.from_bytes(image[layout.CC_OP : layout.CC_OP + 4], "little")
    direction = int.from_bytes(image[layout.CC_OP + 4 : layout.CC_OP + 8], "little", signed=True)
    if (source, operation, direction) != (flags.value & layout.ARITHMETIC_FLAGS, layout.CC_OP_EFLAGS, -1):
        raise native.EngineUnusable("Unicorn keeps the arithmetic flags elsewhere")
