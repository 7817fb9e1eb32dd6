"""Positions of the VMCB's fields among a `vmcs.vmcb.fields.Vmcb`'s values, as constants for the code that uses them."""

from __future__ import annotations

from typing import Final

from vmcs.vmcb.fields import BY_NAME

CR_INTERCEPTS: Final = BY_NAME["CR intercepts"].encoding
PAUSE_THRESHOLD: Final = BY_NAME["PAUSE filter threshold"].encoding
PAUSE_COUNT: Final = BY_NAME["PAUSE filter count"].encoding
IOPM: Final = BY_NAME["IOPM_BASE_PA"].encoding
MSRPM: Final = BY_NAME["MSRPM_BASE_PA"].encoding
TSC_OFFSET: Final = BY_NAME["TSC_OFFSET"].encoding
ASID: Final = BY_NAME["guest ASID"].encoding
TLB_CONTROL: Final = BY_NAME["TLB_CONTROL"].encoding
VIRTUAL: Final = BY_NAME["virtual interrupt control"].encoding
INTERRUPT_STATE: Final = BY_NAME["interrupt state"].encoding
EXITCODE: Final = BY_NAME["EXITCODE"].encoding
EXITINFO1: Final = BY_NAME["EXITINFO1"].encoding
EXITINFO2: Final = BY_NAME["EXITINFO2"].encoding
EXITINTINFO: Final = BY_NAME["EXITINTINFO"].encoding
NESTED_CONTROL: Final = BY_NAME["nested paging and encryption control"].encoding
AVIC_APIC_BAR: Final = BY_NAME["AVIC APIC_BAR"].encoding
AVIC_BACKING_PAGE: Final = BY_NAME["AVIC APIC_BACKING_PAGE pointer"].encoding
AVIC_LOGICAL_TABLE: Final = BY_NAME["AVIC LOGICAL_TABLE pointer"].encoding
AVIC_PHYSICAL_TABLE: Final = BY_NAME["AVIC PHYSICAL_TABLE pointer"].encoding
EVENTINJ: Final = BY_NAME["EVENTINJ"].encoding
N_CR3: Final = BY_NAME["N_CR3"].encoding
EXTENSIONS: Final = BY_NAME["virtualization of LBR, VMLOAD and VMSAVE"].encoding
NRIP: Final = BY_NAME["nRIP"].encoding

BYTES_FETCHED: Final = BY_NAME["number of bytes fetched"].encoding

ES: Final = BY_NAME["ES selector"].encoding
FS: Final = BY_NAME["FS selector"].encoding
GS: Final = BY_NAME["GS selector"].encoding
GDTR: Final = BY_NAME["GDTR selector"].encoding
LDTR: Final = BY_NAME["LDTR selector"].encoding
IDTR: Final = BY_NAME["IDTR selector"].encoding
TR: Final = BY_NAME["TR selector"].encoding
SEGMENT_FIELDS: Final = 4
"""A segment register is four fields: selector, attributes, limit and base."""

CPL: Final = BY_NAME["CPL"].encoding
EFER: Final = BY_NAME["EFER"].encoding
CR4: Final = BY_NAME["CR4"].encoding
CR3: Final = BY_NAME["CR3"].encoding
CR0: Final = BY_NAME["CR0"].encoding
DR7: Final = BY_NAME["DR7"].encoding
DR6: Final = BY_NAME["DR6"].encoding
RFLAGS: Final = BY_NAME["RFLAGS"].encoding
RIP: Final = BY_NAME["RIP"].encoding
RSP: Final = BY_NAME["RSP"].encoding
RAX: Final = BY_NAME["RAX"].encoding
STAR: Final = BY_NAME["STAR"].encoding
CR2: Final = BY_NAME["CR2"].encoding
G_PAT: Final = BY_NAME["G_PAT"].encoding
DBGCTL: Final = BY_NAME["DBGCTL"].encoding
LAST_BRANCH_FIELDS: Final = 5
"""DebugCtl and the last-branch record are five fields, from DBGCTL on."""
