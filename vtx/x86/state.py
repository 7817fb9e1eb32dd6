"""Architectural state of one logical processor: plain data, no behaviour beyond derived views.

The engine copies this to and from its own representation; VM entry and VM exit load and save it. Access rights are
kept in the VMCS format everywhere, because that is the one format in which an unusable segment can be expressed.

Spec: SDM Vol. 1, "Basic Execution Environment"; SDM Vol. 3, "Guest Register State" (access rights format),
"Guest Non-Register State" (activity and interruptibility state).
"""

from __future__ import annotations

import enum
from typing import Final

from attrs import define, field, frozen

MASK64: Final = (1 << 64) - 1
MASK32: Final = (1 << 32) - 1


class Gpr(enum.IntEnum):
    """General-purpose registers in encoding order; the index of ``CpuState.gpr``."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15


class SegmentRegister(enum.IntEnum):
    """Segment registers in encoding order; the index of ``CpuState.segments``."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5


class AccessRights(enum.IntEnum):
    """Segment access rights, VMCS format (bits 3:0 are the type, bits 6:5 the DPL)."""

    ACCESSED = 1 << 0
    WRITABLE_OR_READABLE = 1 << 1
    EXPAND_DOWN_OR_CONFORMING = 1 << 2
    CODE = 1 << 3
    CODE_OR_DATA = 1 << 4  # S: clear for system descriptors
    PRESENT = 1 << 7
    AVAILABLE = 1 << 12
    LONG = 1 << 13
    DEFAULT_BIG = 1 << 14
    GRANULARITY = 1 << 15
    UNUSABLE = 1 << 16


@define(slots=True)
class Segment:
    """A segment register with its hidden part.

    ``base`` is 64 bits wide, ``limit`` is in bytes (already scaled by the granularity), ``access_rights`` has the
    layout of `AccessRights`.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    access_rights: int = 0x93

    @property
    def dpl(self) -> int:
        """Descriptor privilege level, 0 to 3."""
        return (self.access_rights >> 5) & 3

    @property
    def type(self) -> int:
        """The four type bits."""
        return self.access_rights & 0xF

    @property
    def usable(self) -> bool:
        """Whether the register holds a segment at all."""
        return not self.access_rights & AccessRights.UNUSABLE

    @property
    def long(self) -> bool:
        """The L bit: 64-bit code segment."""
        return bool(self.access_rights & AccessRights.LONG)

    @property
    def big(self) -> bool:
        """The D/B bit: 32-bit default operand size or stack."""
        return bool(self.access_rights & AccessRights.DEFAULT_BIG)

    def copy(self) -> Segment:
        """An independent copy."""
        return Segment(self.selector, self.base, self.limit, self.access_rights)


@define(slots=True)
class DescriptorTable:
    """GDTR or IDTR: 64-bit linear base and 16-bit limit."""

    base: int = 0
    limit: int = 0xFFFF


@frozen
class LastBranch:
    """The last branch taken, and the last one before an exception or interrupt, as recorded: offsets into CS."""

    from_ip: int = 0
    to_ip: int = 0
    exception_from_ip: int = 0
    exception_to_ip: int = 0


class Activity(enum.IntEnum):
    """Activity state, with the VMCS encoding; for the VMCS, a processor that waits in MWAIT is active."""

    ACTIVE = 0
    HLT = 1
    SHUTDOWN = 2
    WAIT_FOR_SIPI = 3
    MWAIT = 0x100


@frozen
class SmmContext:
    """What an SMI interrupted, as far as SMRAM does not show it (see `vtx.x86.smm`).

    ``segments`` are copies of the segment registers, LDTR and TR; ``gdtr`` and ``idtr`` base and limit. ``vmxe`` and
    ``virtual_8086`` are CR4.VMXE and RFLAGS.VM in place, ``ssp`` is the shadow-stack pointer. ``suspended`` is the
    virtualization extension's own, None if there was no VMX operation.
    """

    segments: tuple[Segment, ...]
    gdtr: tuple[int, int]
    idtr: tuple[int, int]
    pdptrs: tuple[int, ...]
    cr3: int
    virtual_8086: int
    activity: Activity
    nmi_blocked: bool
    pending_debug: int
    vmxe: int
    ssp: int
    suspended: tuple[int, ...] | None


class Shadow(enum.IntFlag):
    """Interruptibility caused by the previous instruction, with the VMCS bit positions."""

    NONE = 0
    STI = 1 << 0
    MOV_SS = 1 << 1


class Rflags(enum.IntEnum):
    """RFLAGS bits (SDM Vol. 1, "EFLAGS Register")."""

    CF = 1 << 0
    FIXED_1 = 1 << 1
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    IOPL = 3 << 12
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21


class Cr0(enum.IntEnum):
    """CR0 bits (SDM Vol. 3, "Control Registers")."""

    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class Cr4(enum.IntEnum):
    """CR4 bits (SDM Vol. 3, "Control Registers")."""

    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    VMXE = 1 << 13
    SMXE = 1 << 14
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    KL = 1 << 19
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22
    CET = 1 << 23
    PKS = 1 << 24
    UINTR = 1 << 25
    LAM_SUP = 1 << 28
    FRED = 1 << 32


class Efer(enum.IntEnum):
    """IA32_EFER bits (SDM Vol. 3, "Extended Feature Enable Register"; APM Vol. 2, of the same name)."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11
    SVME = 1 << 12
    FFXSR = 1 << 14
    MCOMMIT = 1 << 17


# The derived views below run for every event; arithmetic on flag enumerations is too slow for them.
_LMA: Final = Efer.LMA.value
_VM: Final = Rflags.VM.value
_PG: Final = Cr0.PG.value
_LONG: Final = AccessRights.LONG.value
_DEFAULT_BIG: Final = AccessRights.DEFAULT_BIG.value


def _reset_segments() -> list[Segment]:
    segments = [Segment() for _ in SegmentRegister]
    segments[SegmentRegister.CS] = Segment(selector=0xF000, base=0xFFFF_0000, limit=0xFFFF, access_rights=0x9B)
    return segments


@define(slots=True)
class CpuState:
    """The registers and hidden state of one logical processor; a new one is in its reset state.

    Integers are unsigned and no wider than the register. The x87/SSE registers are opaque bytes of the engine
    (``fpu``), because the model never computes with them.

    Spec: SDM Vol. 3, "Processor State After Reset".
    """

    gpr: list[int] = field(factory=lambda: [0] * 16)
    rip: int = 0xFFF0
    rflags: int = Rflags.FIXED_1.value
    segments: list[Segment] = field(factory=_reset_segments)
    ldtr: Segment = field(factory=lambda: Segment(access_rights=0x82))
    tr: Segment = field(factory=lambda: Segment(access_rights=0x8B))
    gdtr: DescriptorTable = field(factory=DescriptorTable)
    idtr: DescriptorTable = field(factory=DescriptorTable)
    cr0: int = 0x6000_0010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    dr: list[int] = field(factory=lambda: [0, 0, 0, 0])
    dr6: int = 0xFFFF_0FF0
    dr7: int = 0x400
    debugctl: int = 0  # IA32_DEBUGCTL
    last_branch: LastBranch = field(factory=LastBranch)
    xcr0: int = 1
    pkru: int = 0
    u_cet: int = 0  # IA32_U_CET, layout of `vtx.x86.control_flow`
    s_cet: int = 0  # IA32_S_CET
    ssp: int = 0  # the shadow-stack pointer
    pl_ssp: list[int] = field(factory=lambda: [0, 0, 0, 0])  # IA32_PL0_SSP to IA32_PL3_SSP
    interrupt_ssp_table: int = 0  # IA32_INTERRUPT_SSP_TABLE_ADDR
    fred_config: int = 0  # IA32_FRED_CONFIG, layout of `vtx.x86.fred`
    fred_stack_levels: int = 0  # IA32_FRED_STKLVLS
    fred_rsp: list[int] = field(factory=lambda: [0, 0, 0, 0])  # IA32_FRED_RSP0 to IA32_FRED_RSP3
    fred_ssp: list[int] = field(factory=lambda: [0, 0, 0])  # IA32_FRED_SSP1 to IA32_FRED_SSP3
    lower_bounds: list[int] = field(factory=lambda: [0, 0, 0, 0])  # of BND0 to BND3
    upper_bounds: list[int] = field(factory=lambda: [0, 0, 0, 0])  # the same, in 1's complement
    bndcfgu: int = 0  # layout of `vtx.x86.bounds`
    bndcfgs: int = 0  # IA32_BNDCFGS
    bndstatus: int = 0  # error code of the last #BR in bits 1:0, address of a bound-directory entry above them
    pdptrs: list[int] = field(factory=lambda: [0, 0, 0, 0])
    kernel_gs_base: int = 0
    fpu: bytes = b""
    activity: Activity = Activity.ACTIVE
    shadow: Shadow = Shadow.NONE
    nmi_blocked: bool = False
    user_interrupt_flag: bool = False  # UIF
    gif: bool = True  # the global interrupt flag of SVM
    popf_intercepted: bool = False  # an intercept of SVM for an instruction that engines execute by themselves
    smbase: int = 0x3_0000
    smm: SmmContext | None = None  # in system-management mode: what it interrupted
    pending_debug: int = 0  # layout of the VMCS field "pending debug exceptions"

    @property
    def cs(self) -> Segment:
        """The code segment."""
        return self.segments[1]

    @property
    def ss(self) -> Segment:
        """The stack segment."""
        return self.segments[2]

    @property
    def protected(self) -> bool:
        """CR0.PE: protected mode (virtual-8086 mode included)."""
        return bool(self.cr0 & 1)

    @property
    def virtual_8086(self) -> bool:
        """Virtual-8086 mode."""
        return bool(self.cr0 & 1) and bool(self.rflags & _VM)

    @property
    def long_mode(self) -> bool:
        """EFER.LMA: IA-32e mode (64-bit or compatibility mode)."""
        return bool(self.efer & _LMA)

    @property
    def in_64_bit_mode(self) -> bool:
        """64-bit mode: IA-32e mode with a 64-bit code segment."""
        return bool(self.efer & _LMA) and bool(self.segments[1].access_rights & _LONG)

    @property
    def paging(self) -> bool:
        """CR0.PG."""
        return bool(self.cr0 & _PG)

    @property
    def cpl(self) -> int:
        """Current privilege level: DPL of SS; 0 in real-address mode, 3 in virtual-8086 mode."""
        if not self.cr0 & 1:
            return 0
        if self.rflags & _VM:
            return 3
        return (self.segments[2].access_rights >> 5) & 3

    @property
    def code_bits(self) -> int:
        """Default operation size of the code segment: 16, 32 or 64."""
        rights = self.segments[1].access_rights
        if self.efer & _LMA and rights & _LONG:
            return 64
        return 32 if rights & _DEFAULT_BIG else 16

    @property
    def linear_rip(self) -> int:
        """Linear address of the next instruction."""
        if self.in_64_bit_mode:
            return self.rip
        return (self.segments[1].base + self.rip) & MASK32
