"""IA32_BNDCFGS across VM entry and VM exit: the field, its controls, and guests that use Intel MPX.

Spec: SDM Vol. 1, "Support of Intel MPX in VMCS"; Vol. 3, "Checks on Guest Control Registers, Debug Registers, and
MSRs", "Saving Control Registers, Debug Registers, and MSRs", "Loading Host Control Registers, Debug Registers, MSRs".
"""

from __future__ import annotations

import pytest
from vmx_machine import FakeProcessor, make_vmx, prepare

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.region import Vmcs
from vtx.bench.hypervisor import GUEST_CODE, install
from vtx.machine import Machine
from vtx.vmx import Vmx
from vtx.vmx.outcome import VmEntered
from vtx.vmx.record import VmExit
from vtx.x86.msrs import bind_control_flow
from vtx.x86.profile import build_profile, load_profile, profile_document

CPUID = 10
OWN, GUEST, CHANGED = 0x5003, 0x7FFF_FFFF_F001, 0xFFFF_8000_0000_0002
BNDCFGS = 0xD90
OSXSAVE = 1 << 18
ENTRY_FAILURE = 1 << 31
LOAD, CLEAR = c.ENTRY_LOAD_IA32_BNDCFGS, c.EXIT_CLEAR_IA32_BNDCFGS


def make(profile: str = "skylake-server", *, without: tuple[str, ...] = ()) -> tuple[FakeProcessor, Vmx]:
    """A processor of ``profile``, but ``without`` some controls."""
    document = profile_document(profile)
    for word in ("entry", "exit"):
        document["vmx"][word] = [name for name in document["vmx"][word] if name not in without]
    processor, vmx = make_vmx(build_profile("test", document))
    bind_control_flow(processor.msrs, lambda: processor.state, lambda: None)
    processor.state.bndcfgs = OWN
    return processor, vmx


@pytest.mark.parametrize("profile", ["skylake-server", "everything"])
@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("clears", [False, True])
def test_entry_loads_and_exit_saves_and_clears(profile: str, loads: bool, clears: bool) -> None:
    processor, vmx = make(profile)
    controls = (*((LOAD,) if loads else ()), *((CLEAR,) if clears else ()))
    vmcs = prepare(vmx, *controls, fields={f.GUEST_IA32_BNDCFGS: GUEST})
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    assert processor.state.bndcfgs == (GUEST if loads else OWN)
    processor.state.bndcfgs = CHANGED
    vmx.exit(VmExit(CPUID))
    assert vmcs[f.GUEST_IA32_BNDCFGS] == CHANGED
    assert processor.state.bndcfgs == (0 if clears else CHANGED)


@pytest.mark.parametrize(
    ("without", "saved"),
    [
        (("load IA32_BNDCFGS",), True),
        (("clear IA32_BNDCFGS",), True),
        (("load IA32_BNDCFGS", "clear IA32_BNDCFGS"), False),
    ],
)
def test_exit_saves_if_either_control_can_be_1(without: tuple[str, ...], saved: bool) -> None:
    processor, vmx = make(without=without)
    vmcs = prepare(vmx)
    assert vmx.vmlaunch() == VmEntered(), vmx.last_failure
    vmx.exit(VmExit(CPUID))
    assert (vmcs.values.get(f.GUEST_IA32_BNDCFGS.encoding, 0) == OWN) is saved
    assert processor.state.bndcfgs == OWN


@pytest.mark.parametrize("value", [4, 0x800, 0xFFC, 1 << 47, 0xFFFF_7FFF_FFFF_F001])
@pytest.mark.parametrize("loads", [True, False])
def test_values_that_wrmsr_would_not_take(value: int, loads: bool) -> None:
    """The field is looked at only where it is loaded; the failure is one that loads host state."""
    processor, vmx = make()
    vmcs = prepare(vmx, CLEAR, *((LOAD,) if loads else ()), fields={f.GUEST_IA32_BNDCFGS: value})
    outcome = vmx.vmlaunch()
    if loads:
        assert vmcs[f.EXIT_REASON] == ENTRY_FAILURE | Reason.ENTRY_FAILURE_GUEST_STATE
        assert (vmcs[f.GUEST_IA32_BNDCFGS], processor.state.bndcfgs) == (value, 0)
    else:
        assert outcome == VmEntered(), vmx.last_failure
        assert processor.state.bndcfgs == OWN


def test_the_controls_need_the_feature() -> None:
    """A processor without Intel MPX allows neither control."""
    for name in ("nehalem-server", "bochs-skylake-x"):
        capabilities = make_vmx(load_profile(name))[1].operation.capabilities
        assert not capabilities.allows(LOAD) and not capabilities.allows(CLEAR)


def guest_machine(guest: str, *controls: c.Control, fields: dict[f.Field, int]) -> tuple[Machine, Vmcs]:
    """A guest with ``guest`` as its code, with Intel MPX enabled by XCR0; exceptions exit."""
    machine = Machine(profile="skylake-server", memory=16 << 20)
    values = {f.EXCEPTION_BITMAP: (1 << 32) - 1} | fields
    vmcs = install(machine, guest=bytes.fromhex(guest), controls=(c.HLT_EXITING, *controls), fields=values)
    vmcs[f.GUEST_CR4] |= OSXSAVE
    machine.cpu.state.xcr0 = 0x1B
    return machine, vmcs


@pytest.mark.parametrize("enable", [0, 1])
def test_a_guest_that_is_out_of_bounds(enable: int) -> None:
    """XOR EDI, EDI; BNDMK BND0, [RDI + 8]; BNDCU BND0, [RDI + 9]; HLT."""
    machine, vmcs = guest_machine("31ff f30f1b4708 f20f1a4709 f4", LOAD, CLEAR, fields={f.GUEST_IA32_BNDCFGS: enable})
    assert machine.run(max_instructions=1000).exit_value == 0
    if enable:
        assert vmcs[f.EXIT_REASON] == Reason.EXCEPTION_OR_NMI
        assert vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] == 0x8000_0305
        assert (vmcs[f.GUEST_RIP], machine.cpu.state.bndstatus) == (GUEST_CODE + 7, 1)
        assert machine.cpu.state.upper_bounds[0] == (1 << 64) - 1 ^ 8
    else:
        assert vmcs[f.EXIT_REASON] == Reason.HLT
        assert (machine.cpu.state.upper_bounds[0], machine.cpu.state.bndstatus) == (0, 0)
    assert machine.cpu.state.bndcfgs == 0


def test_a_guest_that_writes_the_msr() -> None:
    """WRMSR is seen by the very next instruction, BNDMK BND0, [RBX], and by the VM exit."""
    write = "b9900d0000 b801500000 31d2 0f30"  # ECX := D90H; EDX:EAX := 5001H
    machine, vmcs = guest_machine(
        "bb00300000" + write + "f30f1b03 f4",
        c.USE_MSR_BITMAPS,
        fields={f.MSR_BITMAP_ADDRESS: 0x8000},
    )
    machine.memory.write(0x8000, bytes(0x1000))
    assert machine.run(max_instructions=1000).exit_value == 0
    assert vmcs[f.EXIT_REASON] == Reason.HLT
    assert vmcs[f.GUEST_IA32_BNDCFGS] == 0x5001
    assert machine.cpu.state.lower_bounds[0] == 0x3000
    assert machine.cpu.msrs.read(BNDCFGS) == 0x5001
