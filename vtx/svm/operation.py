"""The SVM state of one logical processor: whether a guest runs, its control block, and what that asks for.

Spec: APM Vol. 2, "Secure Virtual Machine".
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from attrs import define, field, frozen

from vmcs.vmcb import layouts
from vmcs.vmcb.fields import Vmcb
from vmcs.vmcb.intercepts import INTERCEPT_WORDS
from vmcs.vmcb.model import Violation
from vtx.svm import places as at
from vtx.svm.control_block import Contents
from vtx.svm.nested_paging import NestedPaging
from vtx.svm.observer import Observer
from vtx.x86.msr_table import TSC_RATIO, TSC_RATIO_RESET
from vtx.x86.profile import Profile
from vtx.x86.virtualization import Processor

if TYPE_CHECKING:
    from vtx.svm.avic import Avic


@frozen
class Features:
    """The optional parts of SVM that the processor has (CPUID functions 8000_000AH and 8000_0001H)."""

    nested_paging: bool
    lbr_virtualization: bool
    next_rip: bool
    tsc_ratio: bool
    flush_by_asid: bool
    decode_assists: bool
    pause_filter: bool
    pause_threshold: bool
    vmsave_virtualization: bool
    virtual_gif: bool
    gmet: bool
    virtual_nmi: bool
    skinit: bool
    avic: bool
    x2avic: bool
    idle_hlt: bool
    tlbi_control: bool
    late_address_check: bool

    @classmethod
    def of(cls, profile: Profile) -> Features:
        """Those of ``profile``."""
        return cls(
            nested_paging=profile.has("NP"),
            lbr_virtualization=profile.has("LbrVirt"),
            next_rip=profile.has("NRIPS"),
            tsc_ratio=profile.has("TscRateMsr"),
            flush_by_asid=profile.has("FlushByAsid"),
            decode_assists=profile.has("DecodeAssists"),
            pause_filter=profile.has("PauseFilter"),
            pause_threshold=profile.has("PauseFilterThreshold"),
            vmsave_virtualization=profile.has("VmsaveVirt"),
            virtual_gif=profile.has("VGIF"),
            gmet=profile.has("GMET"),
            virtual_nmi=profile.has("VNMI"),
            skinit=profile.has("SKINIT"),
            avic=profile.has("AVIC"),
            x2avic=profile.has("x2AVIC"),
            idle_hlt=profile.has("IdleHltIntercept"),
            tlbi_control=profile.has("TlbiCtl"),
            late_address_check=profile.has("NestedVirtVmcbAddrChk"),
        )


@frozen
class VmrunFailure:
    """Why VMRUN ended in VMEXIT_INVALID: the first rule that does not hold, or what no rule stands for."""

    address: int
    violation: Violation | None
    detail: str = ""

    def __str__(self) -> str:
        return self.violation.render() if self.violation is not None else self.detail


_TSC_FRACTION_BITS: Final = 32


@lru_cache(maxsize=1 << 8)
def _joined(*words: int) -> int:
    """The 32-bit intercept ``words`` as one number."""
    return sum(word << 32 * place for place, word in enumerate(words))


@define(slots=True, eq=False)
class SvmOperation:
    """The SVM state of one logical processor, outside guest mode to begin with.

    In guest mode, ``vmcb`` holds the fields of the control block at ``address`` as VMRUN read them, kept up to date in
    what the guest changes; ``intercepts`` has bit n set for the intercept of that number. ``host_if`` is RFLAGS.IF,
    ``host_nmi_blocked`` the blocking by NMI and ``host_pat`` the PAT as they were at VMRUN; ``host_branches`` is the
    host's DebugCtl and last-branch record, None if the guest shares it. ``transitions`` counts VMRUNs and #VMEXITs.
    ``pauses`` is what is left of the PAUSE filter count, ``last_pause`` the time of the last PAUSE. ``nested`` is the
    nested paging last used, ``checked`` what the rules of VMRUN looked at when they last held. ``cached`` is the
    address of the control block that clean bits are about: the one run last, None after a VMRUN that failed.
    ``avic`` is the running guest's virtual APIC, if it has one. ``block`` and ``host`` are what memory held, at VMRUN,
    of the control block and of the host save area, as far as that is known.
    """

    processor: Processor
    features: Features
    guest_mode: bool = False
    address: int = 0
    vmcb: Vmcb = field(factory=Vmcb)
    intercepts: int = 0
    host_if: bool = False
    host_nmi_blocked: bool = False
    host_pat: int = 0
    host_branches: tuple[int, ...] | None = None
    tsc_ratio: int = TSC_RATIO_RESET
    pauses: int = 0
    last_pause: int | None = None
    smi_pending: bool = False
    nested: NestedPaging | None = None
    block: Contents | None = None
    host: Contents | None = None
    checked: tuple[int, ...] | None = None
    cached: int | None = None
    transitions: int = 0
    last_failure: VmrunFailure | None = None
    avic: Avic | None = None
    observer: Observer | None = None

    @property
    def virtual(self) -> int:
        """The virtual interrupt control of the running guest."""
        return self.vmcb.values[at.VIRTUAL]

    def intercepted(self, number: int) -> bool:
        """Whether the running guest's intercept ``number`` is on."""
        return bool(self.intercepts >> number & 1)

    def read_intercepts(self) -> None:
        """Take the intercepts from the VMCB."""
        self.intercepts = _joined(*self.vmcb.values[at.CR_INTERCEPTS : at.CR_INTERCEPTS + INTERCEPT_WORDS])

    @property
    def masks_interrupts(self) -> bool:
        """V_INTR_MASKING: RFLAGS.IF and CR8 of the guest are about virtual interrupts alone."""
        return bool(self.virtual & layouts.V_INTR_MASKING)

    @property
    def virtualizes_task_priority(self) -> bool:
        """CR8 of the guest is V_TPR."""
        return self.masks_interrupts or self.avic is not None

    @property
    def uses_virtual_gif(self) -> bool:
        """STGI and CLGI of the guest change its virtual GIF."""
        return self.features.virtual_gif and bool(self.virtual & layouts.V_GIF_ENABLE)

    @property
    def uses_virtual_nmi(self) -> bool:
        """NMIs of the guest are virtual ones."""
        return self.features.virtual_nmi and bool(self.virtual & layouts.V_NMI_ENABLE)

    @property
    def uses_avic(self) -> bool:
        """The guest's local APIC is a virtual one."""
        return self.features.avic and bool(self.virtual & layouts.AVIC_ENABLE)

    @property
    def uses_x2avic(self) -> bool:
        """It is in x2APIC mode."""
        return self.uses_avic and self.features.x2avic and bool(self.virtual & layouts.X2AVIC_ENABLE)

    @property
    def virtual_event_pending(self) -> bool:
        """A virtual interrupt or virtual NMI waits for the running guest, whatever keeps it from being taken."""
        virtual = self.virtual
        if virtual & layouts.V_NMI and self.uses_virtual_nmi:
            return True
        return self.avic.pending if self.avic is not None else bool(virtual & layouts.V_IRQ)

    @property
    def nested_paging(self) -> bool:
        """The guest runs with nested paging."""
        return self.features.nested_paging and bool(self.vmcb.values[at.NESTED_CONTROL] & layouts.NP_ENABLE)

    @property
    def forbids_broadcasts(self) -> bool:
        """INVLPGB and TLBSYNC are invalid opcodes in the guest."""
        return self.features.tlbi_control and not self.vmcb.values[at.NESTED_CONTROL] & layouts.INVLPGB_ENABLE

    def read_tsc_ratio(self) -> None:
        """Take the TSC ratio of guests from its MSR."""
        if self.features.tsc_ratio:
            self.tsc_ratio = self.processor.msrs.values[TSC_RATIO]

    def guest_tsc(self, tsc: int) -> int:
        """What the guest's time-stamp counter is when the host's is ``tsc``, not yet cut to 64 bits."""
        if self.tsc_ratio != TSC_RATIO_RESET:
            tsc = tsc * self.tsc_ratio >> _TSC_FRACTION_BITS
        return tsc + self.vmcb.values[at.TSC_OFFSET]
