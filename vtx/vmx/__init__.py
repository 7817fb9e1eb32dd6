"""Intel VT-x: VMX instructions, VM entry, VM exit, and what makes a guest exit.

Reading order: `outcome`, `operation`, `shadowing`, `instructions`, `execution`, `view`, `entry`, `guest_state`,
`host_state`, `exit`, `intercepts`, `events`, `virtual_apic`, `apic_instructions`, `apic_access`, `posted_interrupts`,
`boundary`, `vmx`.
"""

from vtx.vmx.vmx import Vmx

__all__ = ["Vmx"]
