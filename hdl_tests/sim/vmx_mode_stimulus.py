"""Random requests for the block "VMX operation mode and launch state".

Uniform requests would hardly ever enter a guest; so the draw looks at the present state and leans towards what is
interesting there, while every architecturally possible request keeps a chance. Requests that cannot arise (CR4.VMXE
clear in VMX operation, real-address mode in a CPU that fixes CR0.PE) are never drawn, nor what software must not do
(ordinary stores to the region of an active VMCS).
"""

from __future__ import annotations

from random import Random

from hdl_tests.gen.vmx_mode import NO_REGION, REGIONS, Address, Component, CpuMode, Operation, Request, State, VmxMode

OUTSIDE = {Operation.VMXON: 40, Operation.STORE_REVISION: 6}
ROOT = {
    Operation.VMXON: 4,
    Operation.VMXOFF: 3,
    Operation.VMCLEAR: 5,
    Operation.VMPTRLD: 16,
    Operation.VMPTRST: 3,
    Operation.VMREAD: 10,
    Operation.VMWRITE: 14,
    Operation.VMLAUNCH: 24,
    Operation.VMRESUME: 24,
    Operation.VMCALL: 4,
    Operation.INVEPT: 4,
    Operation.INVVPID: 9,
    Operation.CPUID: 2,
    Operation.STORE_REVISION: 3,
}
WEIGHTS = {VmxMode.OUTSIDE: OUTSIDE, VmxMode.ROOT: ROOT, VmxMode.NON_ROOT: {}}
"""Relative frequency of each operation by mode; the operations left out have weight 1."""

INVALIDATIONS = (0, 1, 2, 3) * 3 + (4, 5, 6, 7)
"""Types of INVEPT and INVVPID, the defined ones more often."""

POSSIBLE_CPU_MODES = {
    VmxMode.OUTSIDE: tuple(CpuMode),
    VmxMode.ROOT: tuple(mode for mode in CpuMode if mode is not CpuMode.REAL),
    VmxMode.NON_ROOT: tuple(mode for mode in CpuMode if mode is not CpuMode.REAL),
}


class Stimulus:
    """An endless source of requests drawn from ``random``; ``vmwrite_any`` is the capability of the processor."""

    def __init__(self, random: Random, vmwrite_any: int) -> None:
        self.random = random
        self.vmwrite_any = vmwrite_any
        self._tables = {
            mode: (tuple(Operation), tuple(WEIGHTS[mode].get(operation, 1) for operation in Operation))
            for mode in VmxMode
        }

    def _chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def draw(self, state: State) -> Request:
        """A request that can arise in ``state``."""
        random = self.random
        mode = VmxMode(state.mode)
        operations, weights = self._tables[mode]
        operation = random.choices(operations, weights)[0]
        entry = mode is VmxMode.ROOT and operation in (Operation.VMLAUNCH, Operation.VMRESUME)
        if entry and state.current != NO_REGION and self._chance(80):
            operation = Operation.VMRESUME if state.launched[state.current] else Operation.VMLAUNCH
        address = self._address(operation)
        if operation is Operation.STORE_REVISION and state.active[address]:
            operation = Operation.CPUID
        cpu_mode, cpl = self._privilege(mode)
        outside = mode is VmxMode.OUTSIDE
        component = random.choice(tuple(Component))
        # Each invalid value would stay and fail all later entries, so VMWRITE repairs more often than it breaks.
        checked = Component.CONTROLS <= component <= Component.MSR_LIST
        value = int(self._chance(15)) if checked else random.randrange(256)
        if operation is Operation.STORE_REVISION:
            value = int(self._chance(80))
        return Request(
            operation=operation,
            address=address,
            cpu_mode=cpu_mode,
            cpl=cpl,
            cr4_vmxe=int(not outside or self._chance(93)),
            cr0_supported=int(not outside or self._chance(93)),
            cr4_supported=int(not outside or self._chance(93)),
            feature_lock=int(not outside or self._chance(93)),
            feature_vmxon=int(not outside or self._chance(93)),
            mov_ss_blocking=int(self._chance(8)),
            vmwrite_any=self.vmwrite_any,
            flags=random.randrange(64),
            component=component,
            value=value,
            invalidation=random.choice(INVALIDATIONS),
            eptp_valid=int(self._chance(70)),
            vpid_zero=int(self._chance(20)),
            reserved_set=int(self._chance(15)),
            not_canonical=int(self._chance(20)),
        )

    def _privilege(self, mode: VmxMode) -> tuple[CpuMode, int]:
        """Operating mode and CPL: mostly what instructions accept, else one thing wrong, or anything possible."""
        random = self.random
        usual = random.choice((CpuMode.LONG, CpuMode.PROTECTED))
        if self._chance(45 if mode is VmxMode.NON_ROOT else 82):
            return usual, 0
        if self._chance(30):
            return usual, random.randrange(4)
        cpu_mode = random.choice(POSSIBLE_CPU_MODES[mode])
        if cpu_mode is CpuMode.REAL:
            return cpu_mode, 0
        if cpu_mode is CpuMode.VIRTUAL_8086:
            return cpu_mode, 3
        return cpu_mode, 0 if self._chance(50) else random.randrange(4)

    def _address(self, operation: Operation) -> int:
        if operation is not Operation.STORE_REVISION and self._chance(8):
            return self.random.choice((Address.MISALIGNED, Address.BEYOND_WIDTH))
        return self.random.randrange(REGIONS)
