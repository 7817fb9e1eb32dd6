"""What VM entry derives from a VMCS, derived again for a guest that runs without a VM entry before."""

from __future__ import annotations

from vmcs import controls as c
from vtx.vmx.operation import VmxOperation
from vtx.vmx.translation import second_level_of
from vtx.vmx.view import ControlView, build_view
from vtx.vmx.virtual_apic import VirtualApic


def derive_running_guest(operation: VmxOperation, *, virtual_interrupt: bool) -> ControlView:
    """Give ``operation``, whose current VMCS is that of the running guest, its view, second level and virtual APIC.

    ``virtual_interrupt`` is whether a virtual interrupt was recognized. The second level is the MMU's from now on.
    """
    active = operation.current
    assert active is not None
    active.context = operation.new_context(active)
    active.view = operation.view = view = build_view(active.vmcs.values)
    active.second_level = second_level_of(operation, active.vmcs, view)
    operation.processor.mmu.second_level = active.second_level
    operation.processor.mmu.hlat = view.hlat
    if view.primary & c.USE_TPR_SHADOW.mask:
        active.virtual_apic = operation.virtual_apic = VirtualApic(operation.processor.memory, active.vmcs, view)
        active.virtual_apic.pending = virtual_interrupt
    return view
