"""Machine code in guest mode: a machine whose processor has just entered a guest of `svm_machine`."""

from __future__ import annotations

from collections.abc import Mapping

from svm_machine import GUEST_RIP, HOST_SAVE, VMCB, VMRUN, instruction
from svm_machine import Machine as Bench

from vmcs.vmcb.fields import BY_NAME, IMAGE, Vmcb
from vmcs.vmcb.intercepts import Exit
from vtx.machine import Machine

MEMORY = 4 << 20
VMMCALL = b"\x0f\x01\xd9"


def guest_machine(
    code: bytes,
    *intercepts: int,
    nested: bool = False,
    profile: str = "zen-server",
    fields: Mapping[str, int] | None = None,
) -> Machine:
    """A machine in guest mode, about to execute ``code``; VMMCALL is intercepted."""
    bench = Bench(profile)
    for number in (Exit.VMMCALL, *intercepts):
        bench.intercept(number)
    if nested:
        bench.use_nested_paging()
    bench.fields |= fields or {}
    bench.store()
    machine = Machine(memory=MEMORY, profile=profile)
    machine.memory.write(0, bench.memory.read(0, MEMORY))
    cpu = machine.cpu
    cpu.state = bench.state
    cpu.msrs.write(0xC001_0117, HOST_SAVE)
    cpu.load_control_state()
    machine.memory.write(GUEST_RIP, code)
    assert cpu.state.gpr[0] == VMCB
    assert cpu.svm.execute(instruction(VMRUN))
    assert cpu.svm.non_root
    return machine


def until_exit(machine: Machine, most: int = 100) -> None:
    """Run the guest until its #VMEXIT."""
    cpu = machine.cpu
    for _ in range(most):
        machine.run(max_instructions=cpu.instructions + 1)
        if not cpu.svm.non_root:
            return
    raise AssertionError(f"no #VMEXIT after {most} instructions, RIP is {cpu.state.rip:#x}")


def stored(machine: Machine, name: str) -> int:
    """A field of the control block as it is in memory."""
    return Vmcb.from_image(machine.memory.read(VMCB, IMAGE.size))[BY_NAME[name]]
