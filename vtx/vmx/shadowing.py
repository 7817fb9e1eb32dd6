"""VMCS shadowing: VMREAD and VMWRITE of a guest on the VMCS that the VMCS link pointer names.

Spec: SDM Vol. 3, "VMX Non-Root Operation", "Instructions That Cause VM Exits Conditionally" (VMREAD, VMWRITE); "Virtual
Machine Control Structures", "VMCS Types: Ordinary and Shadow", "VMCS Shadowing Bitmap Addresses".
"""

from __future__ import annotations

from typing import Final

from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.region import Vmcs
from vtx.vmx.operation import NO_VMCS, VmxOperation

_LINK: Final = f.VMCS_LINK_POINTER.encoding
_BITMAP_BITS: Final = 15  # a bitmap has one bit for each encoding of so many bits; others always exit


def is_shadowed(operation: VmxOperation, reason: Reason, encoding: int) -> bool:
    """Whether a guest's VMREAD or VMWRITE (``reason``) of ``encoding`` acts on the shadow VMCS instead of exiting."""
    view = operation.view
    if view is None or view.shadowing_bitmaps is None or encoding >> _BITMAP_BITS:
        return False
    bitmap = view.shadowing_bitmaps[reason == Reason.VMWRITE]
    return not operation.processor.memory.read_u8(bitmap + (encoding >> 3)) >> (encoding & 7) & 1


def accessed_vmcs(operation: VmxOperation) -> Vmcs | None:
    """The VMCS that VMREAD and VMWRITE access: the current one, in a guest the one it is linked to; None without."""
    if not operation.non_root:
        return operation.current.vmcs if operation.current else None
    pointer = operation.current_vmcs.values[_LINK]
    return None if pointer == NO_VMCS else operation.activate(pointer).vmcs
