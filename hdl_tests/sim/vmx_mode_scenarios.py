"""Directed sequences whose results are typed from the manual, not computed: (request, outcome, number).

Each starts from reset. They hold for the RTL and for the model alike, so an error that both share still shows.

Spec: SDM Vol. 3, "VMX Instruction Reference"; "VM Instruction Error Numbers"; "VMX Basic Exit Reasons".
"""

from __future__ import annotations

from typing import Final

from hdl_tests.gen.vmx_mode import Address, Component, CpuMode, Operation, Outcome, Request

Step = tuple[Request, Outcome, int]

RETIRED, UD, GP = Outcome.RETIRED, Outcome.INVALID_OPCODE, Outcome.GENERAL_PROTECTION
FAIL_INVALID, FAIL_VALID = Outcome.FAIL_INVALID, Outcome.FAIL_VALID
ENTERED, EXITED, ENTRY_FAILED = Outcome.ENTERED, Outcome.EXITED, Outcome.ENTRY_FAILED


def do(name: str, address: int = 0, **more: int) -> Request:
    """A request in 64-bit mode at CPL 0 with everything in order but ``more``."""
    usual = {
        "cpu_mode": CpuMode.LONG,
        "cr4_vmxe": 1,
        "cr0_supported": 1,
        "cr4_supported": 1,
        "feature_lock": 1,
        "feature_vmxon": 1,
        "eptp_valid": 1,
        "invalidation": 1,
        "flags": 0b101010,
    }
    return Request(operation=Operation[name], address=address, **(usual | more))


def write(component: Component, value: int) -> Request:
    """VMWRITE of ``value``."""
    return do("VMWRITE", component=component, value=value)


VMXON_0: Final[Step] = (do("VMXON", 0), RETIRED, 0)
LOAD_1: Final[tuple[Step, ...]] = (VMXON_0, (do("VMCLEAR", 1), RETIRED, 0), (do("VMPTRLD", 1), RETIRED, 0))
LAUNCH_1: Final[tuple[Step, ...]] = (*LOAD_1, (do("VMLAUNCH"), ENTERED, 0))

SCENARIOS: Final[dict[str, tuple[Step, ...]]] = {
    "vmx-instructions-need-vmx-operation": (
        *((do(name, 1), UD, 0) for name in ("VMXOFF", "VMCLEAR", "VMPTRLD", "VMPTRST", "VMREAD", "VMWRITE")),
        *((do(name, 1), UD, 0) for name in ("VMLAUNCH", "VMRESUME", "VMCALL", "INVEPT", "INVVPID")),
        (do("CPUID"), RETIRED, 0),
    ),
    "vmxon-conditions": (
        (do("VMXON", cr4_vmxe=0, cpl=3), UD, 0),
        (do("VMXON", cpu_mode=CpuMode.REAL), UD, 0),
        (do("VMXON", cpu_mode=CpuMode.VIRTUAL_8086, cpl=3), UD, 0),
        (do("VMXON", cpu_mode=CpuMode.COMPATIBILITY), UD, 0),
        (do("VMXON", cpl=1), GP, 0),
        (do("VMXON", cr0_supported=0), GP, 0),
        (do("VMXON", cr4_supported=0), GP, 0),
        (do("VMXON", feature_lock=0), GP, 0),
        (do("VMXON", feature_vmxon=0), GP, 0),
        (do("VMXON", Address.MISALIGNED), FAIL_INVALID, 0),
        (do("VMXON", Address.BEYOND_WIDTH), FAIL_INVALID, 0),
        (do("STORE_REVISION", 2, value=0), RETIRED, 0),
        (do("VMXON", 2), FAIL_INVALID, 0),
        (do("VMXON", 2, feature_lock=0), GP, 0),
        (do("STORE_REVISION", 2, value=1), RETIRED, 0),
        (do("VMXON", 2, cpu_mode=CpuMode.PROTECTED), RETIRED, 0),
        (do("VMXON", 2), FAIL_INVALID, 0),
        (do("VMXON", 2, cpl=3), GP, 0),
        (do("VMPTRLD", 1), RETIRED, 0),
        (do("VMXON", 2), FAIL_VALID, 15),
        (do("VMXOFF"), RETIRED, 0),
        (do("VMXOFF"), UD, 0),
    ),
    "pointers": (
        VMXON_0,
        (do("VMCLEAR", Address.MISALIGNED), FAIL_INVALID, 0),
        (do("VMPTRLD", 0), FAIL_INVALID, 0),
        *LOAD_1[1:],
        (do("VMCLEAR", Address.MISALIGNED), FAIL_VALID, 2),
        (do("VMCLEAR", Address.BEYOND_WIDTH), FAIL_VALID, 2),
        (do("VMCLEAR", 0), FAIL_VALID, 3),
        (do("VMPTRLD", Address.MISALIGNED), FAIL_VALID, 9),
        (do("VMPTRLD", Address.BEYOND_WIDTH), FAIL_VALID, 9),
        (do("VMPTRLD", 0), FAIL_VALID, 10),
        (do("STORE_REVISION", 3, value=0), RETIRED, 0),
        (do("VMPTRLD", 3), FAIL_VALID, 11),
        (do("VMCLEAR", 3), RETIRED, 0),
        (do("VMREAD", component=Component.PLAIN), RETIRED, 0),
        (do("VMCLEAR", 1), RETIRED, 0),
        (do("VMREAD", component=Component.PLAIN), FAIL_INVALID, 0),
        (do("VMWRITE", component=Component.PLAIN), FAIL_INVALID, 0),
        (do("VMLAUNCH"), FAIL_INVALID, 0),
        (do("VMRESUME", mov_ss_blocking=1), FAIL_INVALID, 0),
        (do("VMCALL"), FAIL_INVALID, 0),
    ),
    "components": (
        *LOAD_1,
        (do("VMREAD", component=Component.UNSUPPORTED), FAIL_VALID, 12),
        (do("VMWRITE", component=Component.UNSUPPORTED), FAIL_VALID, 12),
        (do("VMREAD", component=Component.INSTRUCTION_ERROR), RETIRED, 0),
        (do("VMCALL"), FAIL_VALID, 1),
        (do("INVEPT", invalidation=0), FAIL_VALID, 28),
        (do("INVEPT", eptp_valid=0), FAIL_VALID, 28),
        (do("INVEPT", invalidation=2, eptp_valid=0), RETIRED, 0),
        (do("INVVPID", invalidation=0, not_canonical=1), FAIL_VALID, 28),
        (do("INVVPID", vpid_zero=1), FAIL_VALID, 28),
        (do("INVVPID", invalidation=2, vpid_zero=1, not_canonical=1), RETIRED, 0),
        (do("INVVPID", invalidation=2, reserved_set=1), FAIL_VALID, 28),
        (do("INVVPID", invalidation=4), FAIL_VALID, 28),
    ),
    "launch-state": (
        *LOAD_1,
        (do("VMRESUME"), FAIL_VALID, 5),
        (do("VMRESUME", mov_ss_blocking=1), FAIL_VALID, 26),
        (do("VMLAUNCH", mov_ss_blocking=1), FAIL_VALID, 26),
        (do("VMLAUNCH", cpl=3), GP, 0),
        (do("VMLAUNCH"), ENTERED, 0),
        (do("CPUID", cpl=3), EXITED, 10),
        (do("VMLAUNCH"), FAIL_VALID, 4),
        (do("VMLAUNCH", mov_ss_blocking=1), FAIL_VALID, 26),
        (do("VMRESUME"), ENTERED, 0),
        (do("VMRESUME"), EXITED, 24),
        (do("VMPTRLD", 2), RETIRED, 0),
        (do("VMRESUME"), FAIL_VALID, 5),
        (do("VMLAUNCH"), ENTERED, 0),
        (do("VMCALL", cpl=3, cpu_mode=CpuMode.COMPATIBILITY), EXITED, 18),
        (do("VMPTRLD", 1), RETIRED, 0),
        (do("VMRESUME"), ENTERED, 0),
        (do("VMXOFF"), EXITED, 26),
        (do("VMCLEAR", 1), RETIRED, 0),
        (do("VMPTRLD", 1), RETIRED, 0),
        (do("VMRESUME"), FAIL_VALID, 5),
        (do("VMLAUNCH"), ENTERED, 0),
    ),
    "entry-checks-in-order": (
        *LOAD_1,
        *((write(component, 1), RETIRED, 0) for component in (Component.MSR_LIST, Component.GUEST_STATE)),
        (write(Component.CONTROLS, 1), RETIRED, 0),
        (do("VMRESUME"), FAIL_VALID, 5),
        (do("VMLAUNCH"), FAIL_VALID, 7),
        (write(Component.CONTROLS, 0), RETIRED, 0),
        (write(Component.HOST_STATE, 1), RETIRED, 0),
        (do("VMLAUNCH"), FAIL_VALID, 8),
        (write(Component.HOST_STATE, 0), RETIRED, 0),
        (do("VMLAUNCH"), ENTRY_FAILED, 0x80 | 33),
        (write(Component.GUEST_STATE, 0), RETIRED, 0),
        (do("VMLAUNCH"), ENTRY_FAILED, 0x80 | 34),
        (do("VMRESUME"), FAIL_VALID, 5),
        (write(Component.MSR_LIST, 0), RETIRED, 0),
        (do("VMLAUNCH"), ENTERED, 0),
        (do("VMXON", 0), EXITED, 27),
    ),
    "non-root": (
        *LAUNCH_1,
        (do("VMREAD", cpu_mode=CpuMode.COMPATIBILITY), UD, 0),
        (do("VMWRITE", cpu_mode=CpuMode.VIRTUAL_8086, cpl=3), UD, 0),
        (do("VMREAD", cpl=3), EXITED, 23),
        *(
            step
            for name, reason in (
                *(("VMCALL", 18), ("VMCLEAR", 19), ("VMLAUNCH", 20), ("VMPTRLD", 21), ("VMPTRST", 22), ("VMREAD", 23)),
                *(("VMRESUME", 24), ("VMWRITE", 25), ("VMXOFF", 26), ("VMXON", 27), ("INVEPT", 50), ("INVVPID", 53)),
            )
            for step in ((do("VMRESUME"), ENTERED, 0), (do(name, 1), EXITED, reason))
        ),
    ),
}
