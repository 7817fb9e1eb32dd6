"""Seeded bugs in the model: each wraps the door of `vtx.vmx.Vmx` that a real bug would hide behind.

They apply to the class while a context lasts, and must be found by comparison with the RTL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vmcs.exits import InstructionError, Reason
from vmcs.instruction_rules import VMCLEAR_VMXON_POINTER
from vmcs.region import LaunchState
from vtx.vmx import Vmx
from vtx.vmx import outcome as o
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import Rflags

Method = Callable[..., Any]


def _launch_leaves_clear(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    outcome = original(vmx, *arguments)
    if isinstance(outcome, o.VmEntered):
        vmx.current_vmcs.launch_state = LaunchState.CLEAR
    return outcome


def _failed_entry_launches(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    outcome = original(vmx, *arguments)
    if isinstance(outcome, o.EntryFailed):
        vmx.current_vmcs.launch_state = LaunchState.LAUNCHED
    return outcome


def _failed_entry_enters(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    outcome = original(vmx, *arguments)
    return o.ENTERED if isinstance(outcome, o.EntryFailed) else outcome


def _clear_keeps_current(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    current = vmx.operation.current
    outcome = original(vmx, *arguments)
    if isinstance(outcome, o.VmSucceed):
        vmx.operation.current = current
    return outcome


def _clear_keeps_launch_state(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    active = vmx.operation.active.get(arguments[0])
    launched = active is not None and active.vmcs.launch_state is LaunchState.LAUNCHED
    outcome = original(vmx, *arguments)
    if isinstance(outcome, o.VmSucceed) and launched:
        vmx.operation.processor.memory.write_u32(arguments[0] + 8, LaunchState.LAUNCHED)
    return outcome


def _vmxon_in_root_succeeds(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    outcome = original(vmx, *arguments)
    return o.SUCCEED if isinstance(outcome, o.VmFailValid) else outcome


def _fail_sets_cf_too(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    outcome = original(vmx, *arguments)
    if isinstance(outcome, o.VmFailValid):
        vmx.operation.processor.state.rflags |= Rflags.CF
    return outcome


def _error_is_not_stored(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    vmcs = vmx.current_vmcs
    before = dict(vmcs.values) if vmcs else {}
    outcome = original(vmx, *arguments)
    if vmcs and isinstance(outcome, o.VmFailValid):
        vmcs.values.update(before)
    return outcome


def _wrong_error(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    outcome = original(vmx, *arguments)
    if outcome == o.VmFailValid(InstructionError.VMPTRLD_WITH_VMXON_POINTER):
        return vmx.operation.fail(VMCLEAR_VMXON_POINTER)
    return outcome


def _privilege_before_exit(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    if vmx.non_root and vmx.operation.processor.state.cpl:
        return Fault(Vector.GP, 0)
    return original(vmx, *arguments)


def _exit_reason_of_vmlaunch(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    outcome = original(vmx, *arguments)
    return o.VmExited(Reason.VMLAUNCH, 0) if isinstance(outcome, o.VmExited) else outcome


def _cpuid_does_not_exit(original: Method, vmx: Vmx, arguments: tuple[Any, ...]) -> Any:
    return False


MUTANTS: dict[str, tuple[str, Callable[[Method, Vmx, tuple[Any, ...]], Any]]] = {
    "vmlaunch-leaves-the-vmcs-clear": ("vmlaunch", _launch_leaves_clear),
    "failed-vmlaunch-launches": ("vmlaunch", _failed_entry_launches),
    "failed-vmresume-reports-success": ("vmresume", _failed_entry_enters),
    "vmclear-keeps-the-current-pointer": ("vmclear", _clear_keeps_current),
    "vmclear-keeps-the-launch-state": ("vmclear", _clear_keeps_launch_state),
    "vmxon-in-root-succeeds": ("vmxon", _vmxon_in_root_succeeds),
    "vmfail-valid-sets-cf": ("vmwrite", _fail_sets_cf_too),
    "vmfail-valid-stores-no-error": ("vmresume", _error_is_not_stored),
    "vmptrld-reports-the-error-of-vmclear": ("vmptrld", _wrong_error),
    "vmread-checks-privilege-before-exiting": ("vmread", _privilege_before_exit),
    "vmresume-exits-as-vmlaunch": ("vmresume", _exit_reason_of_vmlaunch),
    "cpuid-does-not-exit": ("intercept", _cpuid_does_not_exit),
}
"""Name of the bug: the method of `Vmx` it is in, and what it does there."""


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """`Vmx` with the bug called ``name`` for the time of the context; KeyError if there is none."""
    method, replacement = MUTANTS[name]
    original = getattr(Vmx, method)

    @wraps(original)
    def wrapper(self: Vmx, *arguments: Any) -> Any:
        return replacement(original, self, arguments)

    setattr(Vmx, method, wrapper)
    try:
        yield
    finally:
        setattr(Vmx, method, original)
