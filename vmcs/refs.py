"""Citations of the manuals: volume, chapter title and section title, resolved against one pinned table of contents.

Section *numbers* move with every edition of a manual, titles hardly ever do; so a citation never holds a number. `sdm`
and `apm` refuse a title that their table does not have, so that a misspelt citation cannot be imported, let alone
published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

EDITION: Final = "Intel 64 and IA-32 Architectures Software Developer's Manual, combined volumes, 2024 to 2025"


@frozen
class Reference:
    """One section of a manual; ``str()`` gives it the way messages and docs print it."""

    manual: str
    volume: str
    chapter: str
    section: str

    def __str__(self) -> str:
        return f'{self.manual} Vol. {self.volume}, "{self.chapter}", "{self.section}"'


SDM_CONTENTS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "Basic Execution Environment": ("1", ("EFLAGS Register", "Canonical Addressing")),
    "Control-Flow Enforcement Technology (CET)": ("1", ("Shadow Stacks", "Indirect Branch Tracking")),
    "Paging": ("3", ("Determination of Access Rights",)),
    "Protection": ("3", ("Limit Checking",)),
    "Task Management": ("3", ("Task Switching",)),
    "Memory Cache Control": ("3", ("IA32_PAT MSR",)),
    "System Architecture Overview": ("3", ("Control Registers", "Extended Feature Enable Register")),
    "Debug, Branch Profile, TSC, and Intel Resource Director Technology (Intel RDT) Features": (
        "3",
        ("Debug Status Register (DR6)", "Debug Control Register (DR7)", "IA32_DEBUGCTL MSR"),
    ),
    "Introduction to Virtual Machine Extensions": (
        "3",
        ("Introduction to VMX Operation", "Enabling and Entering VMX Operation", "Restrictions on VMX Operation"),
    ),
    "Virtual Machine Control Structures": (
        "3",
        (
            "Overview",
            "Format of the VMCS Region",
            "Organization of VMCS Data",
            "Guest Register State",
            "Guest Non-Register State",
            "Host-State Area",
            "Pin-Based VM-Execution Controls",
            "Processor-Based VM-Execution Controls",
            "Exception Bitmap",
            "I/O-Bitmap Addresses",
            "Time-Stamp Counter Offset and Multiplier",
            "Guest/Host Masks and Read Shadows for CR0 and CR4",
            "CR3-Target Controls",
            "Controls for APIC Virtualization",
            "MSR-Bitmap Address",
            "Executive-VMCS Pointer",
            "Extended-Page-Table Pointer (EPTP)",
            "Virtual-Processor Identifier (VPID)",
            "Controls for PAUSE-Loop Exiting",
            "VM-Function Controls",
            "VMCS Shadowing Bitmap Addresses",
            "ENCLS-Exiting Bitmap",
            "ENCLV-Exiting Bitmap",
            "PCONFIG-Exiting Bitmap",
            "Control Field for Page-Modification Logging",
            "Controls for Virtualization Exceptions",
            "XSS-Exiting Bitmap",
            "Sub-Page-Permission-Table Pointer (SPPTP)",
            "Fields Related to Hypervisor-Managed Linear-Address Translation",
            "Fields Related to PASID Translation",
            "Instruction-Timeout Control",
            "Fields Controlling Virtualization of the IA32_SPEC_CTRL MSR",
            "VM-Exit Controls",
            "VM-Exit Controls for MSRs",
            "VM-Entry Controls",
            "VM-Entry Controls for MSRs",
            "VM-Entry Controls for Event Injection",
            "Basic VM-Exit Information",
            "Information for VM Exits Due to Vectored Events",
            "Information for VM Exits That Occur During Event Delivery",
            "Information for VM Exits Due to Instruction Execution",
            "VM-Instruction Error Field",
            "VMCS Types: Ordinary and Shadow",
            "Software Use of Virtual-Machine Control Structures",
            "VMREAD, VMWRITE, and Encodings of VMCS Fields",
            "Initializing a VMCS",
            "Software Access to Related Structures",
            "VMXON Region",
        ),
    ),
    "VMX Non-Root Operation": (
        "3",
        (
            "Instructions That Cause VM Exits Unconditionally",
            "Other Causes of VM Exits",
            "VMX-Preemption Timer",
            "VM Functions",
        ),
    ),
    "VM Entries": (
        "3",
        (
            "Basic VM-Entry Checks",
            "VM-Execution Control Fields",
            "VM-Exit Control Fields",
            "VM-Entry Control Fields",
            "Checks on Host Control Registers, MSRs, and SSP",
            "Checks on Host Segment and Descriptor-Table Registers",
            "Checks Related to Address-Space Size",
            "Checks on Guest Control Registers, Debug Registers, and MSRs",
            "Checks on Guest Segment Registers",
            "Checks on Guest Descriptor-Table Registers",
            "Checks on Guest RIP, RFLAGS, and SSP",
            "Checks on Guest Non-Register State",
            "Checks on Guest Page-Directory-Pointer-Table Entries",
            "Loading MSRs",
            "Vectored-Event Injection",
            "Delivery of Pending Debug Exceptions after VM Entry",
            "VM-Entry Failures During or After Loading Guest State",
            "Machine-Check Events During VM Entry",
        ),
    ),
    "VM Exits": (
        "3",
        (
            "Basic VM-Exit Information",
            "Information for VM Exits Due to Vectored Events",
            "Information About NMI Unblocking Due to IRET",
            "Information for VM Exits During Event Delivery",
            "Information for VM Exits Due to Instruction Execution",
            "Saving MSRs",
            "Loading Host State",
            "VMX Aborts",
            "Machine-Check Events During VM Exit",
        ),
    ),
    "VMX Support for Address Translation": (
        "3",
        (
            "Virtual Processor Identifiers (VPIDs)",
            "EPT Translation Mechanism",
            "EPT-Induced VM Exits",
            "Page-Modification Logging",
            "Sub-Page Write Permissions",
        ),
    ),
    "APIC Virtualization and Virtual Interrupts": (
        "3",
        (
            "Virtual APIC State",
            "Virtual-Interrupt Delivery",
            "Posted-Interrupt Processing",
            "VM Exits Due to APIC Accesses",
        ),
    ),
    "VMX Instruction Reference": ("3", ("Conventions", "VMX Instructions", "VM Instruction Error Numbers")),
    "System Management Mode": ("3", ("VM Entries that Return from SMM",)),
    "VMX Capability Reporting Facility": (
        "3",
        (
            "Basic VMX Information",
            "Reserved Controls and Default Settings",
            "Pin-Based VM-Execution Controls",
            "Primary Processor-Based VM-Execution Controls",
            "Secondary Processor-Based VM-Execution Controls",
            "Tertiary Processor-Based VM-Execution Controls",
            "Primary VM-Exit Controls",
            "Secondary VM-Exit Controls",
            "VM-Entry Controls",
            "Miscellaneous Data",
            "VMX-Fixed Bits in CR0",
            "VMX-Fixed Bits in CR4",
            "VMCS Enumeration",
            "VPID and EPT Capabilities",
            "VM Functions",
        ),
    ),
    "Field Encoding in VMCS": ("3", ("16-Bit Fields", "64-Bit Fields", "32-Bit Fields", "Natural-Width Fields")),
    "VMX Basic Exit Reasons": ("3", ("Basic Exit Reasons",)),
}


APM_CONTENTS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "Secure Virtual Machine": (
        "2",
        (
            "VMRUN Instruction",
            "Canonicalization and Consistency Checks",
            "Intercept Operation",
            "Instruction Intercepts",
            "Event Injection",
            "Interrupt and Local APIC Support",
            "NMI Virtualization",
            "Nested Paging",
            "VMCB Changes for AVIC",
            "AVIC Memory Data Structures",
            "Layout of VMCB",
            "Legacy PAE Mode",
            "Control Register Write Traps",
            "#VMEXIT",
            "State Saved on Exit",
            "Exception Intercepts",
            "Injecting Virtual (INTR) Interrupts",
            "VMSAVE and VMLOAD Instructions",
            "Nested versus Guest Page Faults, Fault Ordering",
        ),
    ),
    "General-Purpose Programming": ("1", ("Registers",)),
    "System Resources": ("2", ("CR0 Register", "RFLAGS Register")),
    "Segmented Virtual Memory": (
        "2",
        ("Limit Checks", "Real Mode Segmentation", "Segment-Protection Overview", "Virtual-8086 Mode Segmentation"),
    ),
    "Page Translation and Protection": ("2", ("Page-Protection Checks",)),
    "Exceptions and Interrupts": ("2", ("Vectors", "Priorities")),
    "Software Debug and Performance Resources": ("2", ("Debug Registers",)),
    "System Instruction Reference": ("3", ("LTR", "SKINIT", "SYSCALL", "SYSENTER")),
}


def apm(chapter: str, section: str) -> Reference:
    """A section of AMD's manual by chapter and section title; KeyError for a title the pinned table lacks."""
    volume, sections = APM_CONTENTS[chapter]
    if section not in sections:
        raise KeyError(f"{chapter!r} has no section {section!r}")
    return Reference("APM", volume, chapter, section)


def sdm(chapter: str, section: str) -> Reference:
    """A section of Intel's manual by chapter and section title; KeyError for a title the pinned table lacks."""
    volume, sections = SDM_CONTENTS[chapter]
    if section not in sections:
        raise KeyError(f"{chapter!r} has no section {section!r}")
    return Reference("SDM", volume, chapter, section)
