"""VM_CR, which can switch SVM off and be locked, and SVM_KEY, which unlocks it again.

Spec: APM Vol. 2, "VM_CR MSR (C001_0114h)", "SVM_KEY MSR (C001_0118h)".
"""

from __future__ import annotations

from typing import Final

from attrs import evolve

from vtx.x86.msr_table import IA32_EFER, SVM_KEY, VM_CR, VM_CR_LOCK, VM_CR_SVMDIS
from vtx.x86.state import Efer
from vtx.x86.virtualization import Processor

_SVME: Final = int(Efer.SVME)


def bind(processor: Processor) -> None:
    """Let ``processor`` have the two MSRs, if its profile has them."""
    msrs = processor.msrs
    efer = msrs.table[IA32_EFER]

    def write(index: int, value: int) -> bool:
        """SVMDIS forbids setting EFER.SVME; it cannot be set while that is."""
        if value & VM_CR_SVMDIS and processor.state.efer & _SVME:
            return False
        writable = efer.writable & ~_SVME if value & VM_CR_SVMDIS else efer.writable
        msrs.table[IA32_EFER] = evolve(efer, writable=writable)
        msrs.values[VM_CR] = value
        return True

    def write_key(index: int, value: int) -> bool:
        """Set the key; while VM_CR is locked, the same key again unlocks it, unless it is 0."""
        if not msrs.values[VM_CR] & VM_CR_LOCK:
            msrs.values[SVM_KEY] = value
        elif value and value == msrs.values[SVM_KEY]:
            msrs.values[VM_CR] &= ~VM_CR_LOCK
        return True

    msrs.bind(VM_CR, lambda index: msrs.values[VM_CR], write)
    msrs.bind(SVM_KEY, lambda index: None, write_key)
