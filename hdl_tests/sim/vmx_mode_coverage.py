"""What can happen in the block "VMX operation mode and launch state", typed from the manual.

Numbers are literals here on purpose: this table is a second entry next to the tables of ``vmcs``.

Spec: SDM Vol. 3, "VMX Instruction Reference"; "VM Instruction Error Numbers"; "VMX Basic Exit Reasons".
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from hdl_tests.gen.vmx_mode import ENTRY_FAILURE, NO_REGION, Operation, Outcome, Request, Response, State, VmxMode
from hdl_tests.lib.coverage import Coverage

VMX_INSTRUCTIONS = tuple(op for op in Operation if op not in (Operation.CPUID, Operation.STORE_REVISION))

FAIL_NUMBERS = {
    "VMXON": (15,),
    "VMCLEAR": (2, 3),
    "VMPTRLD": (9, 10, 11),
    "VMREAD": (12,),
    "VMWRITE": (12, 13),
    "VMLAUNCH": (4, 7, 8, 26),
    "VMRESUME": (5, 7, 8, 26),
    "VMCALL": (1,),
    "INVEPT": (28,),
    "INVVPID": (28,),
}
EXIT_REASONS = {
    "CPUID": 10,
    "VMCALL": 18,
    "VMCLEAR": 19,
    "VMLAUNCH": 20,
    "VMPTRLD": 21,
    "VMPTRST": 22,
    "VMREAD": 23,
    "VMRESUME": 24,
    "VMWRITE": 25,
    "VMXOFF": 26,
    "VMXON": 27,
    "INVEPT": 50,
    "INVVPID": 53,
}
ENTRY_FAILURES = (33, 34)
SUCCEED_IN_ROOT = (
    *("VMXOFF", "VMCLEAR", "VMPTRLD", "VMPTRST", "VMREAD", "VMWRITE", "INVEPT", "INVVPID"),
    *("CPUID", "STORE_REVISION"),
)

NOT_AFTER = {
    Outcome.RETIRED: (),
    Outcome.INVALID_OPCODE: (),
    Outcome.GENERAL_PROTECTION: (Outcome.EXITED,),
    Outcome.FAIL_INVALID: (Outcome.EXITED, Outcome.ENTERED, Outcome.ENTRY_FAILED, Outcome.FAIL_VALID),
    Outcome.FAIL_VALID: (Outcome.EXITED, Outcome.FAIL_INVALID),
    Outcome.ENTERED: (
        *(Outcome.GENERAL_PROTECTION, Outcome.FAIL_INVALID, Outcome.FAIL_VALID),
        *(Outcome.ENTERED, Outcome.ENTRY_FAILED),
    ),
    Outcome.EXITED: (Outcome.EXITED, Outcome.FAIL_INVALID, Outcome.ENTRY_FAILED),
    Outcome.ENTRY_FAILED: (Outcome.EXITED, Outcome.FAIL_INVALID, Outcome.ENTERED),
}
"""Outcomes that cannot follow directly: no exit without a guest, no VMfailInvalid with a current VMCS, no other
verdict on guest state that nothing has changed."""


def _steps(vmwrite_any: int) -> Iterator[tuple[str, str, str, int]]:
    for operation in VMX_INSTRUCTIONS:
        name = operation.name
        yield (name, "OUTSIDE", "INVALID_OPCODE", 0)
        yield (name, "ROOT", "INVALID_OPCODE", 0)
        yield (name, "ROOT", "GENERAL_PROTECTION", 0)
        if name != "VMCALL":
            yield (name, "NON_ROOT", "INVALID_OPCODE", 0)
    for outcome in ("RETIRED", "GENERAL_PROTECTION", "FAIL_INVALID"):
        yield ("VMXON", "OUTSIDE", outcome, 0)
    for name, numbers in FAIL_NUMBERS.items():
        yield (name, "ROOT", "FAIL_INVALID", 0)
        for number in numbers:
            if number != 13 or not vmwrite_any:
                yield (name, "ROOT", "FAIL_VALID", number)
    for name in ("VMLAUNCH", "VMRESUME"):
        yield (name, "ROOT", "ENTERED", 0)
        for reason in ENTRY_FAILURES:
            yield (name, "ROOT", "ENTRY_FAILED", ENTRY_FAILURE | reason)
    for name in SUCCEED_IN_ROOT:
        yield (name, "ROOT", "RETIRED", 0)
    for name, reason in EXIT_REASONS.items():
        yield (name, "NON_ROOT", "EXITED", reason)
    yield ("CPUID", "OUTSIDE", "RETIRED", 0)
    yield ("STORE_REVISION", "OUTSIDE", "RETIRED", 0)
    yield ("STORE_REVISION", "NON_ROOT", "RETIRED", 0)


def _faults() -> Iterator[tuple[str, str, str]]:
    """Each condition that faults, where it alone does."""
    for operation in VMX_INSTRUCTIONS:
        name = operation.name
        for mode in ("ROOT", "NON_ROOT"):
            if (name, mode) != ("VMCALL", "NON_ROOT"):
                yield (name, mode, "VIRTUAL_8086")
                yield (name, mode, "COMPATIBILITY")
        yield from ((name, "ROOT", f"CPL {cpl}") for cpl in (1, 2, 3))
    causes = ("REAL", "VIRTUAL_8086", "COMPATIBILITY", "CR4.VMXE", "CR0", "CR4", "lock", "enable")
    yield from (("VMXON", "OUTSIDE", cause) for cause in (*causes, "CPL 1", "CPL 2", "CPL 3"))


def _fault_causes(request: Request) -> list[str]:
    causes = [
        name
        for name, holds in (
            ("CR4.VMXE", request.cr4_vmxe),
            ("CR0", request.cr0_supported),
            ("CR4", request.cr4_supported),
            ("lock", request.feature_lock),
            ("enable", request.feature_vmxon),
        )
        if not holds and request.operation == Operation.VMXON
    ]
    named = {0: "REAL", 1: "VIRTUAL_8086", 3: "COMPATIBILITY"}.get(request.cpu_mode)
    if named:
        causes.append(named)
    if request.cpl and named != "VIRTUAL_8086":
        causes.append(f"CPL {request.cpl}")
    return causes


def _launch_states() -> Iterator[tuple[str, int, int]]:
    """(operation, launch state of the VMCS it is about, launch state after): 1 is launched."""
    yield from (("VMCLEAR", 0, 0), ("VMCLEAR", 1, 0), ("VMPTRLD", 0, 0), ("VMPTRLD", 1, 1))
    yield from (("VMLAUNCH", 0, 1), ("VMLAUNCH", 0, 0), ("VMLAUNCH", 1, 1), ("VMRESUME", 0, 0), ("VMRESUME", 1, 1))


def _operands() -> Iterator[tuple[str, int, str]]:
    for kind in range(8):
        yield ("INVEPT", kind, "RETIRED" if kind in (1, 2) else "FAIL_VALID")
        yield ("INVVPID", kind, "RETIRED" if kind < 4 else "FAIL_VALID")
    yield ("INVEPT", 1, "FAIL_VALID")
    yield from (("INVVPID", kind, "reserved bits") for kind in range(4))
    yield from (("INVVPID", kind, "VPID 0") for kind in (0, 1, 3))
    yield ("INVVPID", 0, "not canonical")


def declare(vmwrite_any: int) -> Coverage:
    """The bins, for a processor that can (1) or cannot (0) VMWRITE read-only data fields."""
    groups: dict[str, frozenset[Hashable]] = {
        "step": frozenset(_steps(vmwrite_any)),
        "fault": frozenset(_faults()),
        "launch state": frozenset(_launch_states()),
        "operand": frozenset(_operands()),
        "exit at CPL": frozenset((name, cpl) for name in EXIT_REASONS for cpl in range(4)),
        "launched at entry": frozenset(range(1, 5)),
        "pointer": frozenset((name, same) for name in ("VMCLEAR", "VMPTRLD") for same in (False, True)),
        "sequence": frozenset(
            (before.name, after.name) for before in Outcome for after in Outcome if after not in NOT_AFTER[before]
        ),
    }
    return Coverage(groups)


def sample(coverage: Coverage, before: State, previous: int, request: Request, response: Response) -> None:
    """Count one step from state ``before``, whose predecessor had outcome ``previous``."""
    operation, outcome = Operation(request.operation), Outcome(response.outcome)
    mode = VmxMode(before.mode)
    coverage.sample("step", (operation.name, mode.name, outcome.name, response.number))
    coverage.sample("sequence", (Outcome(previous).name, outcome.name))
    if outcome in (Outcome.INVALID_OPCODE, Outcome.GENERAL_PROTECTION):
        causes = _fault_causes(request)
        if len(causes) == 1 and (mode is not VmxMode.OUTSIDE or operation is Operation.VMXON):
            coverage.sample("fault", (operation.name, mode.name, causes[0]))
    elif outcome is Outcome.EXITED:
        coverage.sample("exit at CPL", (operation.name, request.cpl))
    elif mode is VmxMode.ROOT:
        _sample_root(coverage, before, request, response)


def _sample_root(coverage: Coverage, before: State, request: Request, response: Response) -> None:
    operation, outcome = Operation(request.operation), Outcome(response.outcome)
    if outcome is Outcome.ENTERED:
        coverage.sample("launched at entry", sum(response.state.launched))
    region = request.address if operation in (Operation.VMCLEAR, Operation.VMPTRLD) else before.current
    if operation in (Operation.VMLAUNCH, Operation.VMRESUME) and region != NO_REGION:
        bin_ = (operation.name, before.launched[region], response.state.launched[region])
        coverage.sample("launch state", bin_)
    if operation in (Operation.VMCLEAR, Operation.VMPTRLD) and outcome is Outcome.RETIRED:
        bin_ = (operation.name, before.launched[region], response.state.launched[region])
        coverage.sample("launch state", bin_)
        coverage.sample("pointer", (operation.name, region == before.current))
    if operation in (Operation.INVEPT, Operation.INVVPID) and outcome is not Outcome.FAIL_INVALID:
        _sample_operand(coverage, request, outcome)


def _sample_operand(coverage: Coverage, request: Request, outcome: Outcome) -> None:
    name = Operation(request.operation).name
    if outcome is Outcome.RETIRED or name == "INVEPT" or request.invalidation > 3:
        coverage.sample("operand", (name, request.invalidation, outcome.name))
        return
    causes = [
        cause
        for cause, holds in (
            ("reserved bits", request.reserved_set),
            ("VPID 0", request.vpid_zero and request.invalidation != 2),
            ("not canonical", request.not_canonical and request.invalidation == 0),
        )
        if holds
    ]
    if len(causes) == 1:
        coverage.sample("operand", (name, request.invalidation, causes[0]))
