"""System-management mode: what an SMI does to the processor, and how RSM undoes it.

What SMRAM shows of the interrupted state is in `vtx.x86.smm_map`. What it does not show (hidden parts of segment
registers, limits of descriptor tables, the activity state, blocking by NMI, VMX operation) is kept inside the
processor, `vtx.x86.state.SmmContext`; so are registers whose copies in SMRAM software must not change, but for the
control and debug registers, whose copies RSM checks and loads.

Interpretations. SMIs wait for the end of blocking by STI and MOV SS. There is no I/O instruction restart: bit 16 of the
SMM revision identifier is clear. LDTR, TR, GDTR and IDTR keep their contents on entry.

Spec: SDM Vol. 3, "Entering SMM", "Exiting From SMM", "SMI Handler Execution Environment", "Auto HALT Restart", "SMBASE
Relocation"; Vol. 1, "Intel MPX and System Manage Mode"; APM Vol. 2, "SMM Resources", "Leaving SMM".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from vtx.x86.bounds import legal_configuration
from vtx.x86.cpuid import reserved_cr4_bits
from vtx.x86.linear_masking import CR3_LAM
from vtx.x86.msr_table import IA32_EFER
from vtx.x86.msrs import MsrFile
from vtx.x86.outcome import InstructionAborted
from vtx.x86.second_level import IdentitySecondLevel
from vtx.x86.smm_map import AMD64, AREA, INTEL_64, SaveMap
from vtx.x86.state import (
    MASK32,
    MASK64,
    AccessRights,
    Activity,
    CpuState,
    Cr0,
    Cr4,
    Efer,
    Rflags,
    Segment,
    SegmentRegister,
    Shadow,
    SmmContext,
)

if TYPE_CHECKING:
    from vtx.x86.core import ProcessorCore

_CR0_CLEARED: Final = int(Cr0.PE | Cr0.EM | Cr0.TS | Cr0.PG)
_CR0_WRITABLE: Final = int(
    Cr0.PE | Cr0.MP | Cr0.EM | Cr0.TS | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.NW | Cr0.CD | Cr0.PG
)  # fmt: skip
_VMXE: Final = int(Cr4.VMXE)
_VM: Final = int(Rflags.VM)
_RFLAGS: Final = sum(int(flag) for flag in Rflags) & ~_VM
_LMA, _LME = int(Efer.LMA), int(Efer.LME)
_DR7_RESET: Final = 0x400
_DR6_FIXED, _DR6_WRITABLE = 0xFFFF_0FF0, 0xE00F
_DR7_WRITABLE: Final = 0xFFFF_27FF
_FLAT: Final = int(AccessRights.PRESENT | AccessRights.GRANULARITY | AccessRights.CODE_OR_DATA)
_DATA, _CODE = _FLAT | 3, _FLAT | 0xB
_RESTART: Final = 1 << 0  # of the auto HALT restart field
_NO_SECOND_LEVEL: Final = IdentitySecondLevel()
_NAMES: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")


def save_map(cpu: ProcessorCore) -> SaveMap:
    """The save-state map of this processor."""
    return AMD64 if cpu.profile.is_amd else INTEL_64


def enter(cpu: ProcessorCore) -> None:
    """Deliver an SMI: save the state in SMRAM and start the handler at SMBASE + 8000H in SMM."""
    state, extension = cpu.state, cpu.virtualization
    suspension = extension.enter_smm() if extension is not None else None
    vmxe = state.cr4 & _VMXE
    state.cr4 &= ~_VMXE
    values = _values(state, save_map(cpu).revision)
    if suspension is not None:
        values |= suspension.shown
    save_map(cpu).write(cpu.memory, state.smbase, values)
    state.smm = SmmContext(
        segments=tuple(segment.copy() for segment in _registers(state)),
        gdtr=(state.gdtr.base, state.gdtr.limit),
        idtr=(state.idtr.base, state.idtr.limit),
        pdptrs=tuple(state.pdptrs),
        cr3=state.cr3,
        virtual_8086=state.rflags & _VM,
        activity=Activity.ACTIVE if state.activity is Activity.MWAIT else state.activity,  # SMIs end the waiting
        nmi_blocked=state.nmi_blocked,
        pending_debug=state.pending_debug,
        vmxe=vmxe,
        ssp=state.ssp,
        suspended=suspension.state if suspension is not None else None,
    )
    rip = state.rip
    _start_handler(state)
    cpu.mmu.vm_transition(state, _NO_SECOND_LEVEL, 0, flush=True)
    cpu.load_control_state()
    if cpu.tracing is not None:
        cpu.tracing.smm_entered(rip)


def _start_handler(state: CpuState) -> None:
    """Spec: SDM Vol. 3, "Initial SMM Execution Environment"."""
    smbase = state.smbase
    state.rflags, state.rip = int(Rflags.FIXED_1), AREA
    state.cr0 &= ~_CR0_CLEARED
    state.cr4 = state.efer = state.bndcfgs = 0
    state.dr7 = _DR7_RESET
    for register in SegmentRegister:
        state.segments[register] = Segment(0, 0, MASK32, _DATA)
    state.segments[SegmentRegister.CS] = Segment(smbase >> 4 & 0xFFFF, smbase, MASK32, _CODE)
    state.activity, state.shadow = Activity.ACTIVE, Shadow.NONE
    state.nmi_blocked, state.pending_debug = True, 0


def leave(cpu: ProcessorCore) -> None:
    """RSM in SMM: go back to what the SMI interrupted, as SMRAM has it now; shutdown if that is illegal.

    Spec: SDM Vol. 2, "RSM—Resume From System Management Mode".
    """
    state, extension = cpu.state, cpu.virtualization
    context = state.smm
    assert context is not None
    values = save_map(cpu).read(cpu.memory, state.smbase)
    problem = _problem(cpu.msrs, values, context)
    if problem is not None:
        cpu.shut_down(f"RSM from system-management mode: {problem}")
        return
    _restore(state, values, context)
    if cpu.profile.has("MPX"):
        state.bndcfgs = legal_configuration(values["BNDCFGS"], cpu.profile.linear_address_width)
    state.smm = None
    cpu.mmu.tlb.clear()
    cpu.mmu.vm_transition(state, _NO_SECOND_LEVEL, 0, flush=True)
    if extension is not None and context.suspended is not None:
        extension.leave_smm(context.suspended)
    if _pae_paging(state.cr0, state.cr4, state.efer) and state.cr3 != context.cr3:
        try:
            state.pdptrs = list(cpu.mmu.load_pdptrs(state.cr3))
        except InstructionAborted:
            cpu.shut_down("RSM from system-management mode: a PDPTE has reserved bits set")
    cpu.load_control_state()
    if cpu.tracing is not None:
        cpu.tracing.smm_left()


def _registers(state: CpuState) -> tuple[Segment, ...]:
    return (*state.segments, state.ldtr, state.tr)


def _values(state: CpuState, revision: int) -> dict[str, int]:
    """Everything that a map can show, by the names of its rows."""
    values = {
        "CR0": state.cr0,
        "CR3": state.cr3,
        "CR4": state.cr4,
        "EFER": state.efer,
        "RFLAGS": state.rflags,
        "RIP": state.rip,
        "DR6": state.dr6,
        "DR7": state.dr7,
        "GDTR base": state.gdtr.base,
        "GDTR limit": state.gdtr.limit,
        "IDTR base": state.idtr.base,
        "IDTR limit": state.idtr.limit,
        "revision": revision,
        "SMBASE": state.smbase,
        "BNDCFGS": state.bndcfgs,
        "auto HALT restart": _RESTART if state.activity is Activity.HLT else 0,
    }
    values |= {f"GPR {number}": value for number, value in enumerate(state.gpr)}
    for name, segment in zip(_NAMES, _registers(state), strict=True):
        rights = segment.access_rights
        values |= {
            f"{name} selector": segment.selector,
            f"{name} base": segment.base,
            f"{name} limit": segment.limit,
            f"{name} attributes": rights & 0xFF | rights >> 4 & 0xF00,
        }
    return values


def _restore(state: CpuState, values: Mapping[str, int], context: SmmContext) -> None:
    state.gpr[:] = [values[f"GPR {number}"] for number in range(16)]
    state.rflags = values["RFLAGS"] & _RFLAGS | Rflags.FIXED_1 | context.virtual_8086
    state.cr0 = values["CR0"] & _CR0_WRITABLE | Cr0.ET
    state.cr3 = values["CR3"]
    state.cr4 = values["CR4"] | context.vmxe
    state.efer = values["EFER"] & ~_LMA | (_LMA if _long_mode(values) else 0)
    state.dr6 = values["DR6"] & _DR6_WRITABLE | _DR6_FIXED
    state.dr7 = values["DR7"] & _DR7_WRITABLE | _DR7_RESET
    state.smbase = values["SMBASE"]
    state.pdptrs, state.ssp = list(context.pdptrs), context.ssp
    *segments, ldtr, tr = (segment.copy() for segment in context.segments)
    state.segments, state.ldtr, state.tr = segments, ldtr, tr
    state.gdtr.base, state.gdtr.limit = context.gdtr
    state.idtr.base, state.idtr.limit = context.idtr
    state.rip = values["RIP"] & (MASK64 if state.in_64_bit_mode else MASK32)
    halted = context.activity is Activity.HLT
    state.activity = Activity.ACTIVE if halted and not values["auto HALT restart"] & _RESTART else context.activity
    state.shadow = Shadow.NONE
    state.nmi_blocked, state.pending_debug = context.nmi_blocked, context.pending_debug


def _long_mode(values: Mapping[str, int]) -> bool:
    return bool(values["EFER"] & _LME and values["CR0"] & Cr0.PG)


def _pae_paging(cr0: int, cr4: int, efer: int) -> bool:
    return bool(cr0 & Cr0.PG and cr4 & Cr4.PAE and not efer & _LMA)


_Check = Callable[[MsrFile, Mapping[str, int], SmmContext], bool]

# What RSM must not find in SMRAM.
_CHECKS: Final[tuple[tuple[str, _Check], ...]] = (
    ("CR0.PG is set without CR0.PE", lambda msrs, v, context: bool(v["CR0"] & Cr0.PG and not v["CR0"] & Cr0.PE)),
    ("CR0.NW is set without CR0.CD", lambda msrs, v, context: bool(v["CR0"] & Cr0.NW and not v["CR0"] & Cr0.CD)),
    ("CR0 has reserved bits set", lambda msrs, v, context: bool(v["CR0"] >> 32)),
    ("CR4.VMXE is set", lambda msrs, v, context: bool(v["CR4"] & _VMXE)),
    ("CR4 has reserved bits set", lambda msrs, v, context: bool(v["CR4"] & reserved_cr4_bits(msrs.profile))),
    ("CR4.PCIDE is set outside IA-32e mode", lambda msrs, v, context: bool(v["CR4"] & Cr4.PCIDE) and not _long_mode(v)),
    ("CR4.FRED is set outside IA-32e mode", lambda msrs, v, context: bool(v["CR4"] & Cr4.FRED) and not _long_mode(v)),
    ("CR4.CET is set without CR0.WP", lambda msrs, v, context: bool(v["CR4"] & Cr4.CET) and not v["CR0"] & Cr0.WP),
    ("CR4.PAE is clear in IA-32e mode", lambda msrs, v, context: _long_mode(v) and not v["CR4"] & Cr4.PAE),
    ("virtual-8086 mode in IA-32e mode", lambda msrs, v, context: _long_mode(v) and bool(context.virtual_8086)),
    ("CR3 has reserved bits set", lambda msrs, v, context: bool(_cr3_address(msrs, v) >> _physical_width(msrs))),
    ("IA32_EFER has reserved bits set", lambda msrs, v, context: bool(v["EFER"] & ~_efer_bits(msrs))),
)


def _cr3_address(msrs: MsrFile, values: Mapping[str, int]) -> int:
    return values["CR3"] & ~CR3_LAM if msrs.profile.has("LAM") and _long_mode(values) else values["CR3"]


def _physical_width(msrs: MsrFile) -> int:
    return msrs.profile.physical_address_width


def _efer_bits(msrs: MsrFile) -> int:
    msr = msrs.table.get(IA32_EFER)
    return 0 if msr is None else msr.writable | _LMA


def _problem(msrs: MsrFile, values: Mapping[str, int], context: SmmContext) -> str | None:
    """What is illegal about the state in SMRAM, None if nothing is."""
    return next((problem for problem, found in _CHECKS if found(msrs, values, context)), None)
