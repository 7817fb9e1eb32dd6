"""User interrupts: MSRs, notifications and what they do to the descriptor, delivery and what holds it back.

Spec: SDM Vol. 3, "User Interrupts".
"""

from __future__ import annotations

import pytest
from processor_bench import ABSENT, CODE, PRESENT, STACK, USER, WRITABLE, ProcessorBench, long_mode
from user_interrupt_bench import (
    ENTRY,
    HANDLER,
    IF,
    MISC,
    NOP,
    PD,
    RR,
    RSP,
    STACKADJUST,
    TT,
    UINTR,
    UINV,
    UPID,
    UserInterruptBench,
    state_with,
)

from vtx.x86.cpuid import Dynamic, cpuid
from vtx.x86.event import EventKind
from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile
from vtx.x86.state import Activity, Shadow

CET = 1 << 23
SH_STK_EN, ENDBR_EN, WAITING = 1, 4, 1 << 11
TF, RF = 1 << 8, 1 << 16
NON_CANONICAL = 1 << 50
SHADOW = 0xD000
UD2 = "0f0b"
DIRTY = 1 << 6


class TestRegisters:
    def test_features(self) -> None:
        profile = load_profile("everything")
        assert cpuid(profile, 7, 0, Dynamic())[3] >> 5 & 1
        assert cpuid(profile, 7, 1, Dynamic())[3] >> 17 & 1
        assert not cpuid(load_profile(), 7, 0, Dynamic())[3] >> 5 & 1

    @pytest.mark.parametrize(
        ("index", "value", "taken"),
        [
            (RR, (1 << 64) - 1, True),
            (HANDLER, 0x7FFF_FFFF_FFFF, True),
            (HANDLER, 0xFFFF_8000_0000_0000, True),
            (HANDLER, NON_CANONICAL, False),
            (STACKADJUST, 0xFFFF_8000_0000_0001, True),
            (STACKADJUST, NON_CANONICAL, False),
            (MISC, (1 << 40) - 1, True),
            (MISC, 1 << 40, False),
            (MISC, 1 << 62, False),
            (MISC, 1 << 63, False),
            (PD, 0x1040, True),
            (PD, 0x1020, False),
            (PD, 0x1001, False),
            (PD, NON_CANONICAL, False),
            (TT, 0x1011, True),
            (TT, 0x1012, False),
            (TT, 0x1014, False),
            (TT, 0x1018, False),
            (TT, NON_CANONICAL | 1, False),
        ],
    )
    def test_what_they_take(self, index: int, value: int, taken: bool) -> None:
        msrs = UserInterruptBench().processor.msrs
        before = msrs.read(index)
        assert msrs.write(index, value) is taken
        assert msrs.read(index) == (value if taken else before)

    def test_they_do_not_depend_on_cr4(self) -> None:
        bench = UserInterruptBench()
        bench.state.cr4 &= ~UINTR
        assert bench.processor.msrs.write(RR, 5)
        assert bench.msr(RR) == 5

    def test_processors_without_user_interrupts_have_none(self) -> None:
        bench = UserInterruptBench()
        msrs = type(bench.processor.msrs)(load_profile())
        assert all(msrs.read(index) is None and not msrs.write(index, 0) for index in range(RR, TT + 1))

    @pytest.mark.parametrize(("profile", "faults"), [("everything", False), ("skylake-server", True)])
    def test_cr4(self, profile: str, faults: bool) -> None:
        """MOV to CR4 of bit 25."""
        state = long_mode()
        state.gpr[0] = state.cr4 | UINTR
        bench = ProcessorBench("0f22e0" + "f4", state, profile=load_profile(profile))
        if faults:
            assert bench.event().vector == Vector.GP
        else:
            assert bench.run().cr4 & UINTR


class TestNotifications:
    def bench(self, code: str = NOP, vector: int = UINV, **state: object) -> UserInterruptBench:
        bench = UserInterruptBench(code, state_with(uif=False, **state))  # type: ignore[arg-type]
        bench.descriptor(0x1234_5678 << 32 | 0xEC << 16 | 3, 1 << 63 | 1 << 4)
        bench.platform.vector = vector
        return bench

    @pytest.mark.parametrize("cpl", [0, 3])
    @pytest.mark.parametrize("compatibility", [False, True])
    def test_requests_move_from_the_descriptor_to_the_register(self, cpl: int, compatibility: bool) -> None:
        bench = self.bench(cpl=cpl, compatibility=compatibility)
        assert bench.processor.msrs.write(RR, 1 << 7)
        bench.steps()
        assert bench.posted() == (0x1234_5678 << 32 | 0xEC << 16 | 2, 0)  # ON is clear, SN as it was
        assert bench.msr(RR) == 1 << 63 | 1 << 7 | 1 << 4
        assert (bench.platform.dismissed, bench.platform.vector, bench.events) == (1, None, [])
        assert (bench.state.rip, bench.state.gpr[RSP]) == (CODE, STACK)

    @pytest.mark.parametrize("reason", ["vector", "control register", "mode"])
    def test_other_interrupts_go_through_the_idt(self, reason: str) -> None:
        vector = UINV - 1 if reason == "vector" else UINV
        bench = self.bench(vector=vector)
        if reason == "control register":
            bench.state.cr4 &= ~UINTR
        elif reason == "mode":
            bench.state.efer &= ~0x500
            bench.state.cr0 &= ~(1 << 31)
            bench.state.segments[1].access_rights = 0xC0FB
            bench.processor.load_control_state()
        event = bench.event()
        assert (event.vector, event.kind) == (vector, EventKind.EXTERNAL_INTERRUPT)
        assert (bench.msr(RR), bench.platform.dismissed) == (0, 0)
        assert bench.posted()[1] == 1 << 63 | 1 << 4

    @pytest.mark.parametrize("hold", ["interrupt flag", "shadow of STI", "shadow of MOV SS"])
    def test_it_waits_as_interrupts_do(self, hold: str) -> None:
        bench = self.bench(cpl=0)
        if hold == "interrupt flag":
            bench.state.rflags &= ~IF
            bench.steps(3)
            assert bench.platform.vector == UINV
        else:
            bench.state.shadow = Shadow.STI if "STI" in hold else Shadow.MOV_SS
            bench.steps()
            assert (bench.platform.vector, bench.msr(RR), bench.state.rip) == (UINV, 0, CODE + 1)
            bench.steps()
            assert bench.platform.vector is None

    def test_accesses_are_the_supervisors(self) -> None:
        bench = self.bench()
        bench.page(UPID, PRESENT | WRITABLE)
        bench.steps(2)
        assert bench.msr(RR) == 1 << 63 | 1 << 4

    def test_smap_holds_for_them_whatever_the_alignment_check_flag(self) -> None:
        bench = self.bench(cpl=0)
        bench.state.cr4 |= 1 << 21
        bench.state.rflags |= 1 << 18
        bench.page(CODE, PRESENT | WRITABLE)
        bench.processor.load_control_state()
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 0b11, UPID)

    @pytest.mark.parametrize(("flags", "error"), [(0, 0b10), (PRESENT, 0b11)])
    def test_page_fault(self, flags: int, error: int) -> None:
        """The interrupt stays dismissed; nothing of the descriptor has changed."""
        bench = self.bench()
        bench.page(UPID, flags)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, error, UPID)
        assert (bench.platform.dismissed, bench.platform.vector, bench.msr(RR)) == (1, None, 0)
        assert bench.posted()[1] == 1 << 63 | 1 << 4
        assert bench.state.rip == CODE

    def test_address_that_is_not_canonical_in_this_paging_mode(self) -> None:
        """The MSR takes what is canonical in 57 bits, if there are so many; EXT is set."""
        bench = self.bench()
        bench.processor.msrs.values[PD] = NON_CANONICAL
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.GP, 1)

    def test_a_halted_processor_stays_halted(self) -> None:
        bench = self.bench(cpl=0)
        bench.state.activity = Activity.HLT
        bench.steps()
        assert (bench.msr(RR), bench.state.activity) == (1 << 63 | 1 << 4, Activity.HLT)

    def test_waiting_ends(self) -> None:
        bench = self.bench(cpl=0)
        bench.state.activity = Activity.MWAIT
        bench.steps()
        assert (bench.msr(RR), bench.state.activity) == (1 << 63 | 1 << 4, Activity.ACTIVE)

    def test_it_leads_to_delivery_at_once(self) -> None:
        bench = self.bench(NOP)
        bench.state.user_interrupt_flag = True
        bench.steps(2)
        assert (bench.state.rip, bench.msr(RR)) == (ENTRY, 1 << 4)


class TestDelivery:
    def test_frame_and_registers(self) -> None:
        bench = UserInterruptBench(state=state_with(), rr=1 << 63 | 1 << 5)
        bench.state.rflags |= RF | 0x8D5
        flags, interrupted = bench.state.rflags, STACK - 3
        bench.state.gpr[RSP] = interrupted
        state = bench.steps()
        frame = STACK - 16 - 32
        assert (state.rip, state.gpr[RSP]) == (ENTRY, frame)
        assert bench.quadwords(frame, 4) == [63, CODE, flags, interrupted]
        assert state.rflags == flags & ~RF
        assert (bench.msr(RR), state.user_interrupt_flag) == (1 << 5, False)
        assert state.cpl == 3

    @pytest.mark.parametrize(
        ("adjustment", "top"),
        [
            (0, STACK),
            (128, STACK - 128),
            (0x18, STACK - 0x20),
            (2, STACK - 0x10),
            ((1 << 64) - 0x40, STACK + 0x40),
            (0xE800 | 1, 0xE800),
            (0xE808 | 7, 0xE800),
        ],
    )
    def test_stack_adjustment(self, adjustment: int, top: int) -> None:
        bench = UserInterruptBench(rr=1, stackadjust=adjustment)
        state = bench.steps()
        assert state.gpr[RSP] == top - 32
        assert bench.memory.read_u64(top - 8) == STACK

    def test_trap_flag(self) -> None:
        """It is cleared after it was pushed; the trap of the instruction before has come first."""
        bench = UserInterruptBench(rr=0)
        bench.state.rflags |= TF
        bench.steps()
        assert bench.processor.msrs.write(RR, 1)
        assert bench.event().vector == Vector.DB
        state = bench.steps()
        assert state.rip == ENTRY and not state.rflags & TF
        assert bench.memory.read_u64(STACK - 16) & TF

    @pytest.mark.parametrize("hold", ["flag", "control register", "privilege", "mode", "MOV SS", "request"])
    def test_what_holds_it_back(self, hold: str) -> None:
        cpl, compatibility = 0 if hold == "privilege" else 3, hold == "mode"
        state = state_with(uif=hold != "flag", cpl=cpl, compatibility=compatibility)
        bench = UserInterruptBench(UD2 if hold == "MOV SS" else NOP + UD2, state, rr=int(hold != "request"))
        if hold == "control register":
            state.cr4 &= ~UINTR
        if hold == "MOV SS":
            state.shadow = Shadow.MOV_SS
        bench.processor.load_control_state()
        assert bench.event().vector == Vector.UD
        assert state.rip == CODE + (hold != "MOV SS")
        assert bench.msr(RR) == int(hold != "request")

    def test_it_comes_right_after_the_shadow_of_mov_ss(self) -> None:
        bench = UserInterruptBench(NOP * 8, rr=1)
        bench.state.shadow = Shadow.MOV_SS
        state = bench.steps(2)
        assert state.rip == ENTRY
        assert bench.memory.read_u64(STACK - 24) == CODE + 1

    def test_blocking_by_sti_is_none(self) -> None:
        bench = UserInterruptBench(rr=1)
        bench.state.shadow = Shadow.STI
        assert bench.steps().rip == ENTRY

    def test_the_interrupt_flag_does_not_matter(self) -> None:
        bench = UserInterruptBench(rr=1)
        bench.state.rflags &= ~IF
        assert bench.steps().rip == ENTRY

    def test_ordinary_interrupts_come_first(self) -> None:
        bench = UserInterruptBench(rr=1)
        bench.platform.vector = 0x40
        event = bench.event()
        assert (event.vector, event.kind, bench.places) == (0x40, EventKind.EXTERNAL_INTERRUPT, [CODE])
        assert bench.steps().rip == ENTRY

    def test_it_comes_as_soon_as_iret_goes_to_the_user(self) -> None:
        state = state_with(cpl=0)
        bench = UserInterruptBench("48cf", state, rr=1)
        bench.put(0x4000 + 0x28, (0x00AF_FB00_0000_FFFF).to_bytes(8, "little"))  # 64-bit code, DPL 3
        for place, value in enumerate((CODE + 0x80, 0x2B, 0x202, STACK + 0x800, 0x23)):
            bench.memory.write_u64(STACK + 8 * place, value)
        state.gdtr.limit = 0x7F
        bench.steps(2)
        assert state.rip == ENTRY
        assert bench.quadwords(STACK + 0x800 - 32, 4) == [0, CODE + 0x80, 0x202, STACK + 0x800]

    def test_handler_that_is_not_canonical(self) -> None:
        bench = UserInterruptBench(rr=1)
        bench.processor.msrs.values[HANDLER] = NON_CANONICAL
        event = bench.event()
        assert (event.vector, event.error_code, bench.places) == (Vector.GP, 0, [CODE])
        assert (bench.msr(RR), bench.state.user_interrupt_flag, bench.state.gpr[RSP]) == (1, True, STACK)

    @pytest.mark.parametrize("pointer", [NON_CANONICAL, 0x8000_0000_0000 + 0x10])
    def test_stack_that_is_not_canonical(self, pointer: int) -> None:
        bench = UserInterruptBench(rr=1)
        bench.state.gpr[RSP] = pointer
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.SS, 0)
        assert (bench.msr(RR), bench.state.user_interrupt_flag, bench.state.gpr[RSP]) == (1, True, pointer)

    def test_stack_that_is_absent(self) -> None:
        """An access of the user; it recurs once the fault is handled."""
        bench = UserInterruptBench(rr=1, stackadjust=(ABSENT + 0x800) | 1)
        bench.page(ABSENT, PRESENT | WRITABLE)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 0b111, ABSENT + 0x7F8)
        assert (bench.state.rip, bench.state.gpr[RSP]) == (CODE, STACK)
        assert (bench.msr(RR), bench.state.user_interrupt_flag) == (1, True)
        bench.page(ABSENT, PRESENT | WRITABLE | USER)
        bench.processor.mmu.invlpg(ABSENT)
        assert bench.steps().rip == ENTRY

    def test_pointers_to_the_stack_are_masked(self) -> None:
        """Linear-address masking: RSP with bits of software's own."""
        bench = UserInterruptBench(rr=1)
        bench.state.cr3 |= 1 << 62  # LAM_U48
        bench.processor.load_control_state()
        tag = 0x1234 << 48
        bench.state.gpr[RSP] = tag | STACK
        state = bench.steps()
        assert (state.rip, state.gpr[RSP]) == (ENTRY, tag | STACK - 32)
        assert bench.quadwords(STACK - 8, 1) == [tag | STACK]

    @pytest.mark.parametrize("cet", [0, SH_STK_EN, ENDBR_EN, SH_STK_EN | ENDBR_EN])
    def test_control_flow_enforcement(self, cet: int) -> None:
        bench = UserInterruptBench(rr=1)
        bench.state.cr4 |= CET
        bench.state.u_cet, bench.state.ssp = cet, SHADOW + 0x800
        bench.page(SHADOW, PRESENT | DIRTY | USER)
        bench.processor.load_control_state()
        state = bench.steps()
        assert state.rip == ENTRY
        assert state.ssp == SHADOW + (0x7F8 if cet & SH_STK_EN else 0x800)
        assert bench.memory.read_u64(SHADOW + 0x7F8) == (CODE if cet & SH_STK_EN else 0)
        assert state.u_cet == cet | (WAITING if cet & ENDBR_EN else 0)

    def test_shadow_stack_that_is_none(self) -> None:
        bench = UserInterruptBench(rr=1)
        bench.state.cr4 |= CET
        bench.state.u_cet, bench.state.ssp = SH_STK_EN, SHADOW + 0x800
        bench.processor.load_control_state()
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 0b100_0111, SHADOW + 0x7F8)
        state = bench.state
        assert (state.ssp, state.gpr[RSP], state.user_interrupt_flag, bench.msr(RR)) == (SHADOW + 0x800, STACK, True, 1)

    def test_branch_records(self) -> None:
        """As an interrupt is recorded."""
        bench = UserInterruptBench(rr=1)
        bench.state.debugctl = 1
        state = bench.steps()
        assert (state.last_branch.from_ip, state.last_branch.to_ip) == (CODE, ENTRY)


class TestWithFred:
    """FRED delivers neither notifications nor user interrupts, but what goes wrong with the former."""

    FRED = 1 << 32

    def test_a_notification_takes_no_frame(self) -> None:
        state = state_with(uif=False)
        state.cr4 |= self.FRED
        bench = UserInterruptBench(state=state)
        bench.descriptor(UINV << 16 | 1, 1 << 5)
        bench.platform.vector = UINV
        bench.steps()
        assert (bench.msr(RR), bench.state.cpl, bench.state.gpr[RSP]) == (1 << 5, 3, STACK)

    @pytest.mark.parametrize("fred", [False, True])
    def test_an_error_of_a_notification_is_nested(self, fred: bool) -> None:
        state = state_with(uif=False)
        state.cr4 |= self.FRED if fred else 0
        bench = UserInterruptBench(state=state, pd=ABSENT)
        bench.page(ABSENT, 0)
        bench.platform.vector = UINV
        event = bench.event()
        assert (event.vector, event.nested) == (Vector.PF, fred)
