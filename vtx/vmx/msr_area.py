"""MSR areas: lists in memory of MSRs to load at VM entry, to store and to load at VM exit.

Spec: SDM Vol. 3, "VM Entries", "Loading MSRs"; "VM Exits", "Saving MSRs" and "Loading MSRs".
"""

from __future__ import annotations

from typing import Final

from vmcs.capabilities import Capabilities
from vtx.x86.virtualization import Processor

_ENTRY_SIZE: Final = 16
_X2APIC_PAGE: Final = 0x8  # bits 31:8 of the indexes that are APIC registers in x2APIC mode
_BASES: Final = (0xC000_0100, 0xC000_0101)  # IA32_FS_BASE and IA32_GS_BASE come from the VMCS alone
_MICROCODE_UPDATE: Final = 0x79
_SMM_MONITOR: Final = 0x9B  # written in SMM only
_SMBASE: Final = 0x9E  # read in SMM only
_NOT_LOADABLE: Final = frozenset((*_BASES, _MICROCODE_UPDATE, _SMM_MONITOR))


def load_msrs(processor: Processor, capabilities: Capabilities, address: int, count: int) -> int:
    """Load the area of ``count`` entries at physical ``address``; 0, or the number (from 1) of the failing entry.

    Entries before the failing one have been loaded. The manual leaves a list longer than the recommended maximum
    undefined; here the first entry beyond it fails, so that no list keeps the processor busy for ever.
    """
    memory = processor.memory
    for number in range(1, count + 1):
        if number > capabilities.msr_list_maximum:
            return number
        entry = address + (number - 1) * _ENTRY_SIZE
        word = memory.read_u64(entry)
        # Bits 63:32 are reserved, so that a valid word is an index.
        if word >> 8 == _X2APIC_PAGE or word in _NOT_LOADABLE or word >> 32:
            return number
        if not processor.msrs.write(word, memory.read_u64(entry + 8)):
            return number
    return 0


def store_msrs(processor: Processor, capabilities: Capabilities, address: int, count: int) -> int:
    """Store into the area of ``count`` entries at physical ``address``; 0, or the number of the failing entry."""
    memory = processor.memory
    for number in range(1, count + 1):
        if number > capabilities.msr_list_maximum:
            return number
        entry = address + (number - 1) * _ENTRY_SIZE
        word = memory.read_u64(entry)
        if word >> 8 == _X2APIC_PAGE or word == _SMBASE or word >> 32:
            return number
        value = processor.msrs.read(word)
        if value is None:
            return number
        memory.write_u64(entry + 8, value)
    return 0
