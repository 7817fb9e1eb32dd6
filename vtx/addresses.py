"""The three address spaces of a virtualized x86 machine, as distinct types.

A *linear* address is what segmentation yields and paging consumes. A *guest-physical* address is what a guest's
paging yields; without second-level translation it equals the physical address. A *physical* address is what
reaches memory and devices. Mixing them is the classic bug of a hypervisor, so the type checker keeps them apart.

Spec: SDM Vol. 3, "Paging"; "The Extended Page Table Mechanism (EPT)", "EPT Overview".
"""

from typing import NewType

LinearAddress = NewType("LinearAddress", int)
GuestPhysicalAddress = NewType("GuestPhysicalAddress", int)
PhysicalAddress = NewType("PhysicalAddress", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_OFFSET_MASK = PAGE_SIZE - 1
