"""VM exits as data: basic exit reasons, VM-instruction errors and VMX-abort indicators.

Qualifications and instruction information have modules of their own: `vmcs.qualifications` and
`vmcs.instruction_information`.

Spec: SDM Vol. 3, "VMX Basic Exit Reasons", "Basic Exit Reasons"; "VM Exits", "Basic VM-Exit Information".
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from attrs import frozen

from vmcs import controls as c
from vmcs import fields as f
from vmcs import instruction_information as info
from vmcs import qualifications as q
from vmcs.bits import Layout
from vmcs.controls import Control
from vmcs.fields import Field
from vmcs.refs import Reference, sdm

VM_ENTRY_FAILURE: Final = 1 << 31  # of the exit-reason field: the VM entry failed, the guest did not run


class Reason(enum.IntEnum):
    """Basic exit reasons, bits 15:0 of the exit-reason field."""

    EXCEPTION_OR_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT_SIGNAL = 3
    STARTUP_IPI = 4
    IO_SMI = 5
    OTHER_SMI = 6
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    GETSEC = 11
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    RSM = 17
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMXOFF = 26
    VMXON = 27
    CR_ACCESS = 28
    DR_ACCESS = 29
    IO_INSTRUCTION = 30
    RDMSR = 31
    WRMSR = 32
    ENTRY_FAILURE_GUEST_STATE = 33
    ENTRY_FAILURE_MSR_LOADING = 34
    MWAIT = 36
    MONITOR_TRAP_FLAG = 37
    MONITOR = 39
    PAUSE = 40
    ENTRY_FAILURE_MACHINE_CHECK = 41
    TPR_BELOW_THRESHOLD = 43
    APIC_ACCESS = 44
    VIRTUALIZED_EOI = 45
    GDTR_IDTR_ACCESS = 46
    LDTR_TR_ACCESS = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER_EXPIRED = 52
    INVVPID = 53
    WBINVD = 54
    XSETBV = 55
    APIC_WRITE = 56
    RDRAND = 57
    INVPCID = 58
    VMFUNC = 59
    ENCLS = 60
    RDSEED = 61
    PAGE_MODIFICATION_LOG_FULL = 62
    XSAVES = 63
    XRSTORS = 64
    PCONFIG = 65
    SPP_RELATED_EVENT = 66
    UMWAIT = 67
    TPAUSE = 68
    LOADIWKEY = 69
    ENCLV = 70
    ENQCMD_PASID_TRANSLATION_FAILURE = 72
    ENQCMDS_PASID_TRANSLATION_FAILURE = 73
    BUS_LOCK = 74
    INSTRUCTION_TIMEOUT = 75
    SEAMCALL = 76
    TDCALL = 77
    RDMSRLIST = 78
    WRMSRLIST = 79


@frozen
class ExitReason:
    """A basic exit reason and the information that comes with it.

    ``qualification`` is the layout of the exit qualification, ``plain_qualification`` says in words what an
    undivided one holds; with neither, the qualification is cleared. ``instruction_information`` is likewise.
    ``defines`` lists the further VM-exit information fields that have a meaning, at least for some exits of this
    reason. ``gate`` is the control whose 1-setting brings the exit about, where it is a single one.
    """

    number: Reason
    name: str
    qualification: Layout | None = None
    plain_qualification: str = ""
    instruction_information: Layout | None = None
    defines: tuple[Field, ...] = ()
    gate: Control | None = None

    @property
    def entry_failure(self) -> bool:
        """Whether the exit reports a failed VM entry."""
        return self.number in (
            Reason.ENTRY_FAILURE_GUEST_STATE,
            Reason.ENTRY_FAILURE_MSR_LOADING,
            Reason.ENTRY_FAILURE_MACHINE_CHECK,
        )

    @property
    def ref(self) -> Reference:
        """The section that lists the reasons."""
        return sdm("VMX Basic Exit Reasons", "Basic Exit Reasons")

    def describe_qualification(self, value: int) -> str:
        """An exit qualification of this reason in words."""
        if self.qualification:
            return self.qualification.describe(value)
        return f"{self.plain_qualification} {value:#x}" if self.plain_qualification else f"{value:#x}"


_LENGTH = (f.VM_EXIT_INSTRUCTION_LENGTH,)
_EVENT = (f.VM_EXIT_INTERRUPTION_INFORMATION, f.VM_EXIT_INTERRUPTION_ERROR_CODE)
_LINEAR = (f.GUEST_LINEAR_ADDRESS,)
_IO_REGISTERS = (f.IO_RCX, f.IO_RSI, f.IO_RDI, f.IO_RIP)
_LENGTH_AND_INFORMATION = (f.VM_EXIT_INSTRUCTION_LENGTH, f.VM_EXIT_INSTRUCTION_INFORMATION)
_DELIVERY = (f.IDT_VECTORING_INFORMATION, f.IDT_VECTORING_ERROR_CODE)  # defined when the exit interrupts delivery
_DISPLACEMENT = "displacement of the memory operand"


def _instruction(number: Reason, name: str, gate: Control | None = None) -> ExitReason:
    return ExitReason(number, name, defines=_LENGTH, gate=gate)


def _memory_instruction(number: Reason, name: str, layout: Layout, gate: Control | None = None) -> ExitReason:
    return ExitReason(
        number,
        name,
        plain_qualification=_DISPLACEMENT,
        instruction_information=layout,
        defines=_LENGTH_AND_INFORMATION,
        gate=gate,
    )


EXIT_REASONS: Final[tuple[ExitReason, ...]] = (
    ExitReason(
        Reason.EXCEPTION_OR_NMI,
        "exception or non-maskable interrupt",
        qualification=q.DEBUG_EXCEPTION,
        plain_qualification="page-fault linear address",
        defines=_EVENT + _LENGTH + _DELIVERY,
    ),
    ExitReason(
        Reason.EXTERNAL_INTERRUPT,
        "external interrupt",
        defines=(f.VM_EXIT_INTERRUPTION_INFORMATION,),
        gate=c.EXTERNAL_INTERRUPT_EXITING,
    ),
    ExitReason(Reason.TRIPLE_FAULT, "triple fault", defines=_DELIVERY),
    ExitReason(Reason.INIT_SIGNAL, "INIT signal"),
    ExitReason(Reason.STARTUP_IPI, "start-up IPI", qualification=q.STARTUP_IPI),
    ExitReason(
        Reason.IO_SMI, "I/O system-management interrupt", q.IO_INSTRUCTION, defines=_LENGTH + _IO_REGISTERS + _LINEAR
    ),
    ExitReason(Reason.OTHER_SMI, "other system-management interrupt"),
    ExitReason(Reason.INTERRUPT_WINDOW, "interrupt window", gate=c.INTERRUPT_WINDOW_EXITING),
    ExitReason(Reason.NMI_WINDOW, "NMI window", gate=c.NMI_WINDOW_EXITING),
    ExitReason(Reason.TASK_SWITCH, "task switch", qualification=q.TASK_SWITCH, defines=_LENGTH + _DELIVERY),
    _instruction(Reason.CPUID, "CPUID"),
    _instruction(Reason.GETSEC, "GETSEC"),
    _instruction(Reason.HLT, "HLT", c.HLT_EXITING),
    _instruction(Reason.INVD, "INVD"),
    ExitReason(Reason.INVLPG, "INVLPG", plain_qualification="linear address", defines=_LENGTH, gate=c.INVLPG_EXITING),
    _instruction(Reason.RDPMC, "RDPMC", c.RDPMC_EXITING),
    _instruction(Reason.RDTSC, "RDTSC", c.RDTSC_EXITING),
    _instruction(Reason.RSM, "RSM"),
    _instruction(Reason.VMCALL, "VMCALL"),
    _memory_instruction(Reason.VMCLEAR, "VMCLEAR", info.MEMORY),
    _instruction(Reason.VMLAUNCH, "VMLAUNCH"),
    _memory_instruction(Reason.VMPTRLD, "VMPTRLD", info.MEMORY),
    _memory_instruction(Reason.VMPTRST, "VMPTRST", info.MEMORY),
    _memory_instruction(Reason.VMREAD, "VMREAD", info.VMREAD_VMWRITE),
    _instruction(Reason.VMRESUME, "VMRESUME"),
    _memory_instruction(Reason.VMWRITE, "VMWRITE", info.VMREAD_VMWRITE),
    _instruction(Reason.VMXOFF, "VMXOFF"),
    _memory_instruction(Reason.VMXON, "VMXON", info.MEMORY),
    ExitReason(Reason.CR_ACCESS, "control-register access", q.CONTROL_REGISTER_ACCESS, defines=_LENGTH + _LINEAR),
    ExitReason(Reason.DR_ACCESS, "MOV DR", q.MOV_DR, defines=_LENGTH, gate=c.MOV_DR_EXITING),
    ExitReason(
        Reason.IO_INSTRUCTION,
        "I/O instruction",
        q.IO_INSTRUCTION,
        instruction_information=info.INS_OUTS,
        defines=_LENGTH_AND_INFORMATION + _LINEAR,
    ),
    _instruction(Reason.RDMSR, "RDMSR"),
    _instruction(Reason.WRMSR, "WRMSR"),
    ExitReason(Reason.ENTRY_FAILURE_GUEST_STATE, "VM-entry failure due to invalid guest state", q.ENTRY_FAILURE),
    ExitReason(
        Reason.ENTRY_FAILURE_MSR_LOADING,
        "VM-entry failure due to MSR loading",
        plain_qualification="number of the entry",
    ),
    ExitReason(Reason.MWAIT, "MWAIT", q.MWAIT, defines=_LENGTH, gate=c.MWAIT_EXITING),
    ExitReason(Reason.MONITOR_TRAP_FLAG, "monitor trap flag", gate=c.MONITOR_TRAP_FLAG),
    _instruction(Reason.MONITOR, "MONITOR", c.MONITOR_EXITING),
    _instruction(Reason.PAUSE, "PAUSE"),
    ExitReason(Reason.ENTRY_FAILURE_MACHINE_CHECK, "VM-entry failure due to machine-check event"),
    ExitReason(Reason.TPR_BELOW_THRESHOLD, "TPR below threshold", gate=c.USE_TPR_SHADOW),
    ExitReason(
        Reason.APIC_ACCESS,
        "APIC access",
        q.APIC_ACCESS,
        defines=_LENGTH + _LINEAR + _DELIVERY,
        gate=c.VIRTUALIZE_APIC_ACCESSES,
    ),
    ExitReason(Reason.VIRTUALIZED_EOI, "virtualized EOI", q.VIRTUALIZED_EOI, gate=c.VIRTUAL_INTERRUPT_DELIVERY),
    _memory_instruction(
        Reason.GDTR_IDTR_ACCESS, "access to GDTR or IDTR", info.GDTR_IDTR_ACCESS, c.DESCRIPTOR_TABLE_EXITING
    ),
    _memory_instruction(Reason.LDTR_TR_ACCESS, "access to LDTR or TR", info.LDTR_TR_ACCESS, c.DESCRIPTOR_TABLE_EXITING),
    ExitReason(
        Reason.EPT_VIOLATION,
        "EPT violation",
        q.EPT_VIOLATION,
        defines=(f.GUEST_PHYSICAL_ADDRESS, *_LINEAR, *_LENGTH, *_DELIVERY),
        gate=c.ENABLE_EPT,
    ),
    ExitReason(
        Reason.EPT_MISCONFIGURATION,
        "EPT misconfiguration",
        defines=(f.GUEST_PHYSICAL_ADDRESS, *_DELIVERY),
        gate=c.ENABLE_EPT,
    ),
    _memory_instruction(Reason.INVEPT, "INVEPT", info.INVALIDATE),
    _instruction(Reason.RDTSCP, "RDTSCP", c.RDTSC_EXITING),
    ExitReason(Reason.PREEMPTION_TIMER_EXPIRED, "VMX-preemption timer expired", gate=c.ACTIVATE_VMX_PREEMPTION_TIMER),
    _memory_instruction(Reason.INVVPID, "INVVPID", info.INVALIDATE),
    _instruction(Reason.WBINVD, "WBINVD or WBNOINVD", c.WBINVD_EXITING),
    _instruction(Reason.XSETBV, "XSETBV"),
    ExitReason(Reason.APIC_WRITE, "APIC write", q.APIC_WRITE, gate=c.APIC_REGISTER_VIRTUALIZATION),
    ExitReason(
        Reason.RDRAND,
        "RDRAND",
        instruction_information=info.DESTINATION_REGISTER,
        defines=_LENGTH_AND_INFORMATION,
        gate=c.RDRAND_EXITING,
    ),
    _memory_instruction(Reason.INVPCID, "INVPCID", info.INVALIDATE, c.INVLPG_EXITING),
    _instruction(Reason.VMFUNC, "VMFUNC", c.ENABLE_VM_FUNCTIONS),
    _instruction(Reason.ENCLS, "ENCLS", c.ENABLE_ENCLS_EXITING),
    ExitReason(
        Reason.RDSEED,
        "RDSEED",
        instruction_information=info.DESTINATION_REGISTER,
        defines=_LENGTH_AND_INFORMATION,
        gate=c.RDSEED_EXITING,
    ),
    ExitReason(
        Reason.PAGE_MODIFICATION_LOG_FULL,
        "page-modification log full",
        q.PAGE_MODIFICATION_LOG_FULL,
        defines=_DELIVERY,
        gate=c.ENABLE_PML,
    ),
    _memory_instruction(Reason.XSAVES, "XSAVES", info.MEMORY, c.ENABLE_XSAVES_XRSTORS),
    _memory_instruction(Reason.XRSTORS, "XRSTORS", info.MEMORY, c.ENABLE_XSAVES_XRSTORS),
    _instruction(Reason.PCONFIG, "PCONFIG", c.ENABLE_PCONFIG),
    ExitReason(
        Reason.SPP_RELATED_EVENT,
        "SPP-related event",
        q.SPP_RELATED_EVENT,
        defines=(f.GUEST_PHYSICAL_ADDRESS, *_LINEAR, *_DELIVERY),
        gate=c.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,
    ),
    ExitReason(
        Reason.UMWAIT,
        "UMWAIT",
        instruction_information=info.DESTINATION_REGISTER,
        defines=_LENGTH_AND_INFORMATION,
        gate=c.RDTSC_EXITING,
    ),
    ExitReason(
        Reason.TPAUSE,
        "TPAUSE",
        instruction_information=info.DESTINATION_REGISTER,
        defines=_LENGTH_AND_INFORMATION,
        gate=c.RDTSC_EXITING,
    ),
    ExitReason(
        Reason.LOADIWKEY,
        "LOADIWKEY",
        instruction_information=info.LOADIWKEY,
        defines=_LENGTH_AND_INFORMATION,
        gate=c.LOADIWKEY_EXITING,
    ),
    _instruction(Reason.ENCLV, "ENCLV", c.ENABLE_ENCLV_EXITING),
    ExitReason(
        Reason.ENQCMD_PASID_TRANSLATION_FAILURE,
        "ENQCMD PASID translation failure",
        defines=_LENGTH,
        gate=c.PASID_TRANSLATION,
    ),
    ExitReason(
        Reason.ENQCMDS_PASID_TRANSLATION_FAILURE,
        "ENQCMDS PASID translation failure",
        defines=_LENGTH,
        gate=c.PASID_TRANSLATION,
    ),
    ExitReason(Reason.BUS_LOCK, "bus lock", gate=c.VMM_BUS_LOCK_DETECTION),
    ExitReason(
        Reason.INSTRUCTION_TIMEOUT,
        "instruction timeout",
        q.INSTRUCTION_TIMEOUT,
        defines=_DELIVERY,
        gate=c.INSTRUCTION_TIMEOUT,
    ),
    _instruction(Reason.SEAMCALL, "SEAMCALL"),
    _instruction(Reason.TDCALL, "TDCALL"),
    ExitReason(
        Reason.RDMSRLIST,
        "RDMSRLIST",
        plain_qualification="MSR index",
        defines=_LENGTH,
        gate=c.ENABLE_MSR_LIST_INSTRUCTIONS,
    ),
    ExitReason(
        Reason.WRMSRLIST,
        "WRMSRLIST",
        plain_qualification="MSR index",
        defines=(*_LENGTH, f.MSR_DATA),
        gate=c.ENABLE_MSR_LIST_INSTRUCTIONS,
    ),
)

BY_NUMBER: Final[Mapping[int, ExitReason]] = MappingProxyType({int(each.number): each for each in EXIT_REASONS})


def describe_reason(value: int) -> str:
    """An exit-reason field in words; a reserved basic exit reason is called so."""
    known = BY_NUMBER.get(value & 0xFFFF)
    return known.name if known else f"reserved exit reason {value & 0xFFFF}"


class InstructionError(enum.IntEnum):
    """VM-instruction errors: what VMfailValid leaves in the VM-instruction error field.

    Spec: SDM Vol. 3, "VMX Instruction Reference", "VM Instruction Error Numbers".
    """

    VMCALL_IN_VMX_ROOT_OPERATION = 1
    VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS = 2
    VMCLEAR_WITH_VMXON_POINTER = 3
    VMLAUNCH_WITH_NON_CLEAR_VMCS = 4
    VMRESUME_WITH_NON_LAUNCHED_VMCS = 5
    VMRESUME_AFTER_VMXOFF = 6
    VM_ENTRY_WITH_INVALID_CONTROL_FIELDS = 7
    VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS = 8
    VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS = 9
    VMPTRLD_WITH_VMXON_POINTER = 10
    VMPTRLD_WITH_INCORRECT_VMCS_REVISION_IDENTIFIER = 11
    VMREAD_OR_VMWRITE_OF_UNSUPPORTED_COMPONENT = 12
    VMWRITE_TO_READ_ONLY_COMPONENT = 13
    VMXON_IN_VMX_ROOT_OPERATION = 15
    VM_ENTRY_WITH_INVALID_EXECUTIVE_VMCS_POINTER = 16
    VM_ENTRY_WITH_NON_LAUNCHED_EXECUTIVE_VMCS = 17
    VM_ENTRY_WITH_EXECUTIVE_VMCS_POINTER_NOT_VMXON_POINTER = 18
    VMCALL_WITH_NON_CLEAR_VMCS = 19
    VMCALL_WITH_INVALID_VM_EXIT_CONTROL_FIELDS = 20
    VMCALL_WITH_INCORRECT_MSEG_REVISION_IDENTIFIER = 22
    VMXOFF_UNDER_DUAL_MONITOR_TREATMENT = 23
    VMCALL_WITH_INVALID_SMM_MONITOR_FEATURES = 24
    VM_ENTRY_WITH_INVALID_EXECUTION_CONTROLS_IN_EXECUTIVE_VMCS = 25
    VM_ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS = 26
    INVALID_OPERAND_TO_INVEPT_OR_INVVPID = 28


class AbortIndicator(enum.IntEnum):
    """VMX-abort indicators, stored at offset 4 of the VMCS region when a VM exit cannot complete.

    Spec: SDM Vol. 3, "VM Exits", "VMX Aborts".
    """

    SAVING_GUEST_MSRS = 1
    HOST_PDPTES = 2
    CURRENT_VMCS_CORRUPTED = 3
    LOADING_HOST_MSRS = 4
    MACHINE_CHECK = 5
    EXIT_FROM_IA32E_MODE_TO_32_BIT_HOST = 6
