"""The parts of libunicorn this engine calls, straight through ctypes.

The official Python binding wraps every call and callback in conveniences that cost more than the calls themselves, so
the engine uses the binding only to find and load the library.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, Final

import unicorn
from unicorn import unicorn_const, x86_const

SUPPORTED_VERSIONS: Final = ((2, 1, 4),)

library: Final[Any] = unicorn.unicorn_py3.unicorn.uclib

ERR_OK: Final = unicorn_const.UC_ERR_OK
ERR_EXCEPTION: Final = unicorn_const.UC_ERR_EXCEPTION

HOOK_INTR: Final = unicorn_const.UC_HOOK_INTR
HOOK_INSN: Final = unicorn_const.UC_HOOK_INSN
HOOK_CODE: Final = unicorn_const.UC_HOOK_CODE
HOOK_BLOCK: Final = unicorn_const.UC_HOOK_BLOCK
HOOK_TLB_FILL: Final = unicorn_const.UC_HOOK_TLB_FILL
HOOK_FETCH_PROTECTED: Final = unicorn_const.UC_HOOK_MEM_FETCH_PROT

MEM_READ: Final = unicorn_const.UC_MEM_READ
MEM_WRITE: Final = unicorn_const.UC_MEM_WRITE
MEM_FETCH: Final = unicorn_const.UC_MEM_FETCH
PROT_ALL: Final = unicorn_const.UC_PROT_ALL

INSN_IN: Final = x86_const.UC_X86_INS_IN
INSN_OUT: Final = x86_const.UC_X86_INS_OUT
INSN_SYSCALL: Final = x86_const.UC_X86_INS_SYSCALL
INSN_SYSENTER: Final = x86_const.UC_X86_INS_SYSENTER

REG_EFLAGS: Final = x86_const.UC_X86_REG_EFLAGS
REG_RIP: Final = x86_const.UC_X86_REG_RIP
GPR_COUNT: Final = 16
REG_GUARDED: Final = tuple(
    getattr(x86_const, f"UC_X86_REG_{name}")
    for name in (
        *("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"),
        *("R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15"),
        *("FS_BASE", "GS_BASE"),
    )
)
"""The registers that addresses are made of: GPRs in encoding order, then the bases of FS and GS."""
REG_FPCW: Final = x86_const.UC_X86_REG_FPCW
REG_MXCSR: Final = x86_const.UC_X86_REG_MXCSR

# No model with RDRAND may serve: it would run natively and make runs differ. A model's lack of SVM does not matter,
# because the engine sets the guest-mode flag itself.
CPU_MODEL: Final = x86_const.UC_CPU_X86_SANDYBRIDGE

_WRITE, _READ = unicorn_const.UC_CTL_IO_WRITE, unicorn_const.UC_CTL_IO_READ


def _control(code: int, arguments: int, direction: int) -> int:
    return int(code | arguments << 26 | direction << 30)


CTL_CPU_MODEL: Final = _control(unicorn_const.UC_CTL_CPU_MODEL, 1, _WRITE)
CTL_TLB_TYPE: Final = _control(unicorn_const.UC_CTL_TLB_TYPE, 1, _WRITE)
CTL_TLB_FLUSH: Final = _control(unicorn_const.UC_CTL_TLB_FLUSH, 0, _WRITE)
CTL_USE_EXITS: Final = _control(unicorn_const.UC_CTL_UC_USE_EXITS, 1, _WRITE)
CTL_EXITS: Final = _control(unicorn_const.UC_CTL_UC_EXITS, 2, _WRITE)
CTL_REMOVE_BLOCKS: Final = _control(unicorn_const.UC_CTL_TB_REMOVE_CACHE, 2, _WRITE)
TLB_VIRTUAL: Final = unicorn_const.UC_TLB_VIRTUAL

FIRST_FILLS: Final = 1 << 10
MOST_FILLS: Final = 1 << 16
"""Fills between flushes that nothing asks for, at first and at most: only a flush makes a full TLB larger."""

ARCH_X86: Final = unicorn_const.UC_ARCH_X86
MODE_64: Final = unicorn_const.UC_MODE_64


class TlbEntry(ctypes.Structure):
    """``uc_tlb_entry``: where a page is and what may be done with it."""

    _fields_ = (("paddr", ctypes.c_uint64), ("perms", ctypes.c_uint32))


InterruptCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
BlockCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)
FillCallback = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(TlbEntry), ctypes.c_void_p
)
ProtectionCallback = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
)
PortInCallback = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
PortOutCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p
)
SyscallCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
MmioReadCallback = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p)
MmioWriteCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p
)


class EngineUnusable(RuntimeError):  # noqa: N818 - says what is the case, as the other outcomes do
    """The installed Unicorn is not one this engine was measured with; the message says what differs."""


def version() -> tuple[int, int, int]:
    """Version of the loaded library."""
    combined = library.uc_version(None, None)
    return combined >> 24 & 0xFF, combined >> 16 & 0xFF, combined >> 8 & 0xFF


def check(status: int, doing: str) -> None:
    """Raise `EngineUnusable` unless ``status`` is success."""
    if status != ERR_OK:
        message = library.uc_strerror(status).decode("ascii", "replace")
        raise EngineUnusable(f"Unicorn failed at {doing}: {message}")


def open_processor(owner: object) -> tuple[ctypes.c_void_p, Callable[[], object]]:
    """A processor of the library for ``owner``, and what closes it: called by ``owner``, or when nobody has it."""
    handle = ctypes.c_void_p()
    check(library.uc_open(ARCH_X86, MODE_64, ctypes.byref(handle)), "opening a processor")
    return handle, _when_gone(owner, library.uc_close, handle)


def allocate_context(owner: object, handle: ctypes.c_void_p) -> tuple[ctypes.c_void_p, Callable[[], object]]:
    """Memory for a processor's state, and what releases it, likewise."""
    context = ctypes.c_void_p()
    check(library.uc_context_alloc(handle, ctypes.byref(context)), "a context")
    return context, _when_gone(owner, library.uc_context_free, context)


def _when_gone(
    owner: object, release: Callable[[ctypes.c_void_p], object], what: ctypes.c_void_p
) -> Callable[[], object]:
    finalizer = weakref.finalize(owner, release, what)
    finalizer.atexit = False  # the end of the process releases everything faster
    return finalizer


def control(handle: ctypes.c_void_p, code: int, *arguments: int) -> None:
    """``uc_ctl`` with integer arguments."""
    check(library.uc_ctl(handle, ctypes.c_int(code), *(ctypes.c_int(a) for a in arguments)), f"control {code:#x}")


def add_hook(
    handle: ctypes.c_void_p,
    kind: int,
    callback: Any,
    data: int = 0,
    instruction: int | None = None,
    at: int | None = None,
    size: int = 1,
) -> None:
    """Install ``callback`` (a ctypes function object or an address) for ``size`` addresses from ``at``, or for all."""
    hook = ctypes.c_size_t()
    pointer = ctypes.c_void_p(callback) if isinstance(callback, int) else ctypes.cast(callback, ctypes.c_void_p)
    extra = () if instruction is None else (ctypes.c_int(instruction),)
    where = [ctypes.c_uint64(address) for address in ((1, 0) if at is None else (at, at + size - 1))]
    status = library.uc_hook_add(handle, ctypes.byref(hook), kind, pointer, ctypes.c_void_p(data), *where, *extra)
    check(status, f"installing hook {kind:#x}")
