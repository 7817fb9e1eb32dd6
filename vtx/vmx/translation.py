"""Second-level translation and TLB tags of a guest, as its VMCS asks for them.

Spec: SDM Vol. 3, "VMX Support for Address Translation".
"""

from __future__ import annotations

from typing import Final

from vmcs import controls as c
from vmcs import fields as f
from vmcs.region import Vmcs
from vtx.addresses import GuestPhysicalAddress
from vtx.vmx.ept import EptConfig, ExtendedPageTables
from vtx.vmx.host_state import NO_SECOND_LEVEL
from vtx.vmx.operation import VmxOperation
from vtx.vmx.sub_page_tables import SubPageTables
from vtx.vmx.view import ControlView
from vtx.x86.second_level import SecondLevel

_PML_INDEX: Final = f.PML_INDEX.encoding
_PML_ADDRESS: Final = f.PML_ADDRESS.encoding
_SPPTP: Final = f.SUB_PAGE_PERMISSION_TABLE_POINTER.encoding
_PML_LAST: Final = 511


def second_level_of(operation: VmxOperation, vmcs: Vmcs, view: ControlView) -> SecondLevel:
    """The EPT translation of the guest, or none."""
    if view.eptp is None:
        return NO_SECOND_LEVEL
    capabilities, processor = operation.capabilities, operation.processor
    config = EptConfig(
        view.eptp,
        processor.profile.physical_address_width,
        execute_only=capabilities.supports("execute-only translations"),
        page_2mb=capabilities.supports("2-MByte pages"),
        page_1gb=capabilities.supports("1-GByte pages"),
        mode_based_execute=bool(view.secondary & c.MODE_BASED_EXECUTE_CONTROL_FOR_EPT.mask),
        advanced_information=capabilities.supports("advanced VM-exit information for EPT violations"),
        hlat=view.hlat is not None,
    )
    sub_pages = None
    if view.secondary & c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT.mask:
        sub_pages = SubPageTables(vmcs.values[_SPPTP], config.physical_address_width, processor.memory)

    def log_dirty(page: GuestPhysicalAddress | None) -> bool:
        """Spec: SDM Vol. 3, "Page-Modification Logging"."""
        index = vmcs.values[_PML_INDEX]
        if index > _PML_LAST:
            return False
        if page is None:
            return True
        processor.memory.write_u64(vmcs.values[_PML_ADDRESS] + 8 * index, page)
        vmcs[f.PML_INDEX] = index - 1
        return True

    return ExtendedPageTables(
        config,
        processor.memory,
        log_dirty if view.secondary & c.ENABLE_PML.mask else None,
        apic_access_page=view.apic_access_page,
        sub_pages=sub_pages,
    )
