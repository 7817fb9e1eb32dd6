"""CLUI, STUI, TESTUI, UIRET and SENDUIPI, one by one.

Spec: SDM Vol. 2, "CLUI—Clear User Interrupt Flag", "STUI—Set User Interrupt Flag", "TESTUI—Determine User Interrupt
Flag", "UIRET—User-Interrupt Return", "SENDUIPI—Send User Interprocessor Interrupt".
"""

from __future__ import annotations

import pytest
from attrs import evolve
from processor_bench import CODE, PRESENT, STACK, USER, WRITABLE, ProcessorBench, long_mode, protected_mode
from user_interrupt_bench import (
    ENTRY,
    HLT,
    MISC,
    NOP,
    RR,
    RSP,
    TT,
    UINTR,
    UITT,
    UPID,
    UserInterruptBench,
    state_with,
)

from vtx.x86.outcome import Vector
from vtx.x86.profile import load_profile
from vtx.x86.state import CpuState

UIRET, TESTUI, CLUI, STUI = "f30f01ec", "f30f01ed", "f30f01ee", "f30f01ef"
SENDUIPI = "f30fc7f0"  # of RAX
UD2 = "0f0b"
SENDUIPI_R9 = "f3410fc7f1"
NON_CANONICAL = 1 << 50
TF, RF, AC = 1 << 8, 1 << 16, 1 << 18
CET, SH_STK_EN = 1 << 23, 1
SHADOW, DIRTY = 0xD000, 1 << 6
IA32_APIC_BASE = 0x1B
ARITHMETIC = 0x8D5
APIC_ID = 0x12_0034_56  # its bits 15:8 are what xAPIC mode knows


class TestUndefined:
    @pytest.mark.parametrize("code", [UIRET, TESTUI, CLUI, STUI, SENDUIPI])
    @pytest.mark.parametrize("reason", ["control register", "compatibility", "protected", "profile", "lock"])
    def test_undefined(self, code: str, reason: str) -> None:
        if reason == "protected":
            state = protected_mode()
            state.cr4 |= UINTR
            bench: ProcessorBench = ProcessorBench(code, state, profile=load_profile("everything"))
        elif reason == "profile":
            bench = ProcessorBench(code, long_mode())
        else:
            state = state_with(cpl=3, compatibility=reason == "compatibility", rax=0)
            bench = UserInterruptBench(("f0" if reason == "lock" else "") + code, state)
            if reason == "control register":
                state.cr4 &= ~UINTR
            bench.processor.load_control_state()
        event = bench.event()
        assert (event.vector, event.error_code, bench.state.rip) == (Vector.UD, None, CODE)

    @pytest.mark.parametrize("code", ["0f01ec", "0f01ed", "660f01ec", "660f01ed", "f20f01ec", "f20f01ee", "f20f01ef"])
    def test_other_prefixes_are_other_instructions(self, code: str) -> None:
        assert UserInterruptBench(code).event().vector == Vector.UD

    def test_protection_keys_keep_their_encodings(self) -> None:
        """0F 01 EE and 0F 01 EF without the prefix: RDPKRU and WRPKRU."""
        state = state_with(uif=False, rax=0x55, rcx=0, rdx=0)
        state.cr4 |= 1 << 22
        bench = UserInterruptBench("0f01ef" + "0f01ee", state)
        bench.run_to(CODE + 6)
        assert (state.pkru, state.gpr[0], state.user_interrupt_flag) == (0x55, 0x55, False)

    def test_sending_is_enabled_by_the_table(self) -> None:
        """Bit 0 of IA32_UINTR_TT; the operand is not looked at."""
        bench = UserInterruptBench(SENDUIPI, state_with(rax=5), tt=UITT)
        assert bench.event().vector == Vector.UD


class TestFlag:
    @pytest.mark.parametrize("cpl", [0, 3])
    @pytest.mark.parametrize(("code", "before", "after"), [(CLUI, True, False), (STUI, False, True)])
    def test_clear_and_set(self, cpl: int, code: str, before: bool, after: bool) -> None:
        bench = UserInterruptBench(code, state_with(cpl=cpl, uif=before))
        bench.state.rflags |= ARITHMETIC
        flags = bench.state.rflags
        bench.run_to(CODE + 4)
        assert bench.state.user_interrupt_flag is after
        assert bench.state.rflags == flags

    @pytest.mark.parametrize("cpl", [0, 3])
    @pytest.mark.parametrize("flag", [False, True])
    def test_test(self, cpl: int, flag: bool) -> None:
        """CF is UIF; the other arithmetic flags are cleared, and only those."""
        bench = UserInterruptBench(TESTUI, state_with(cpl=cpl, uif=flag))
        bench.state.rflags = 0x202 | 1 << 10 | ARITHMETIC
        bench.run_to(CODE + 4)
        assert bench.state.rflags == 0x202 | 1 << 10 | flag
        assert bench.state.user_interrupt_flag is flag

    def test_setting_it_lets_a_pending_one_in_at_once(self) -> None:
        """There is no shadow as behind STI."""
        bench = UserInterruptBench(STUI + CLUI, state_with(uif=False), rr=1)
        bench.steps(2)
        assert bench.state.rip == ENTRY
        assert bench.quadwords(STACK - 24, 1) == [CODE + 4]

    def test_clearing_it_keeps_a_request_waiting(self) -> None:
        bench = UserInterruptBench(CLUI + NOP + UD2, state_with())
        bench.run_to(CODE + 4)
        assert bench.processor.msrs.write(RR, 1)
        assert bench.event().vector == Vector.UD
        assert (bench.places, bench.msr(RR)) == ([CODE + 5], 1)


class TestReturn:
    def bench(
        self, rip: int = CODE + 0x40, rflags: int = 0x202, rsp: int = STACK + 0x300, **state: int
    ) -> UserInterruptBench:
        bench = UserInterruptBench(UIRET, state_with(uif=False, **state))
        bench.put(CODE + 0x40, NOP * 8)
        for place, value in enumerate((rip, rflags, rsp)):
            bench.memory.write_u64(STACK + 8 * place, value)
        return bench

    @pytest.mark.parametrize("cpl", [0, 3])
    def test_pops_three(self, cpl: int) -> None:
        bench = self.bench(cpl=cpl)
        state = bench.steps()
        assert (state.rip, state.gpr[RSP], state.user_interrupt_flag, state.cpl) == (
            CODE + 0x40,
            STACK + 0x300,
            True,
            cpl,
        )

    def test_flags(self) -> None:
        """CF, PF, AF, ZF, SF, TF, DF, OF, NT, RF, AC and ID are loaded; IF, IOPL, VM, VIF and VIP stay."""
        loaded = 0x254DD5
        for before, popped in ((0x202, (1 << 64) - 1), (0x3202 | loaded & ~TF, 0)):
            bench = self.bench(rflags=popped)
            bench.state.rflags = before
            state = bench.steps()
            assert state.rflags == before & ~loaded | popped & loaded

    @pytest.mark.parametrize(("image", "flag"), [(0x202, True), (0x200, False)])
    def test_user_interrupt_flag_is_bit_1_of_the_image(self, image: int, flag: bool) -> None:
        state = self.bench(rflags=image).steps()
        assert state.user_interrupt_flag is flag
        assert state.rflags & 2

    def test_user_interrupt_flag_of_older_processors_is_set(self) -> None:
        """Without the flexible update (CPUID leaf 7, subleaf 1, EDX bit 17)."""
        bench = self.bench(rflags=0x200)
        profile = bench.processor.profile
        bench.processor.profile = evolve(profile, features=profile.features - {"UIRET_UIF"})
        assert bench.steps().user_interrupt_flag

    def test_address_that_is_not_canonical(self) -> None:
        bench = self.bench(rip=NON_CANONICAL)
        event = bench.event()
        state = bench.state
        assert (event.vector, event.error_code) == (Vector.GP, 0)
        assert (state.rip, state.gpr[RSP], state.user_interrupt_flag) == (CODE, STACK, False)

    def test_stack_that_is_not_canonical(self) -> None:
        bench = self.bench()
        bench.state.gpr[RSP] = NON_CANONICAL
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.SS, 0)

    def test_stack_that_is_not_the_users(self) -> None:
        bench = self.bench()
        bench.page(STACK, PRESENT | WRITABLE)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, 0b101, STACK)
        assert (bench.state.rip, bench.state.gpr[RSP]) == (CODE, STACK)

    def test_alignment_check(self) -> None:
        bench = self.bench()
        bench.state.gpr[RSP] = STACK + 4
        bench.state.cr0 |= 1 << 18
        bench.state.rflags |= AC
        bench.processor.load_control_state()
        event = bench.event()
        assert (event.vector, event.error_code) == (Vector.AC, 0)

    @pytest.mark.parametrize("matches", [True, False])
    def test_shadow_stack(self, matches: bool) -> None:
        bench = self.bench()
        bench.state.cr4 |= CET
        bench.state.u_cet, bench.state.ssp = SH_STK_EN, SHADOW + 0x7F8
        bench.page(SHADOW, PRESENT | DIRTY | USER)
        bench.memory.write_u64(SHADOW + 0x7F8, CODE + 0x40 + (not matches))
        bench.processor.load_control_state()
        if matches:
            state = bench.steps()
            assert (state.rip, state.ssp) == (CODE + 0x40, SHADOW + 0x800)
        else:
            event = bench.event()
            assert (event.vector, event.error_code) == (Vector.CP, 2)  # FAR-RET/IRET
            state = bench.state
            assert (state.rip, state.ssp, state.gpr[RSP]) == (CODE, SHADOW + 0x7F8, STACK)
            assert not state.user_interrupt_flag

    def test_trap_flag_it_restores_traps_after_the_next_instruction(self) -> None:
        bench = self.bench(rflags=0x202 | TF)
        assert bench.event().vector == Vector.DB
        assert bench.places == [CODE + 0x41]

    def test_trap_flag_it_clears_traps_after_it(self) -> None:
        bench = self.bench(rflags=0x202)
        bench.state.rflags |= TF
        assert bench.event().vector == Vector.DB
        assert bench.places == [CODE + 0x40]

    def test_next_one_comes_at_once(self) -> None:
        bench = self.bench()
        assert bench.processor.msrs.write(RR, 1 << 9)
        state = bench.steps(2)
        assert (state.rip, state.user_interrupt_flag) == (ENTRY, False)
        assert bench.quadwords(STACK + 0x300 - 32, 2) == [9, CODE + 0x40]

    def test_branch_record(self) -> None:
        bench = self.bench()
        bench.state.debugctl = 1
        state = bench.steps()
        assert (state.last_branch.from_ip, state.last_branch.to_ip) == (CODE, CODE + 0x40)

    def test_round_trip(self) -> None:
        """Delivery, the vector taken off the stack, and back to where it was."""
        bench = UserInterruptBench(UD2, rr=1 << 3, stackadjust=128, entry="415a" + UIRET)  # pop r10
        bench.state.rflags |= ARITHMETIC
        bench.state.gpr[RSP] = STACK - 4
        flags = bench.state.rflags
        assert (bench.event().vector, bench.places) == (Vector.UD, [CODE])
        state = bench.state
        assert (state.gpr[10], state.gpr[RSP], state.rflags) == (3, STACK - 4, flags)
        assert (bench.msr(RR), state.user_interrupt_flag) == (0, True)


class TestSending:
    def bench(
        self, code: str = SENDUIPI, *, control: int = 0xEC << 16 | APIC_ID << 32, **state: int
    ) -> UserInterruptBench:
        bench = UserInterruptBench(code, state_with(**{"rax": 0} | state))
        bench.target(1 | 5 << 8)
        bench.descriptor(control, 1 << 63)
        return bench

    @pytest.mark.parametrize("cpl", [0, 3])
    @pytest.mark.parametrize(
        ("mode", "destination"),
        [("xapic", APIC_ID >> 8 & 0xFF), ("x2apic", APIC_ID), ("disabled", APIC_ID >> 8 & 0xFF)],
    )
    def test_posts_and_notifies(self, cpl: int, mode: str, destination: int) -> None:
        bench = self.bench(cpl=cpl)
        if mode == "x2apic":
            assert bench.processor.msrs.write(IA32_APIC_BASE, 0xFEE0_0D00)
        elif mode == "disabled":
            assert bench.processor.msrs.write(IA32_APIC_BASE, 0xFEE0_0100)
        flags = bench.state.rflags
        bench.run_to(CODE + 4)
        assert bench.posted() == (APIC_ID << 32 | 0xEC << 16 | 1, 1 << 63 | 1 << 5)
        assert bench.sent == [(0xEC, destination)]
        assert bench.state.rflags == flags

    @pytest.mark.parametrize("held", [1, 2, 3])
    def test_outstanding_or_suppressed(self, held: int) -> None:
        bench = self.bench(control=0xEC << 16 | held)
        bench.run_to(CODE + 4)
        assert bench.posted() == (0xEC << 16 | held, 1 << 63 | 1 << 5)
        assert bench.sent == []

    @pytest.mark.parametrize(("size", "index", "taken"), [(0, 0, True), (0, 1, False), (3, 3, True), (3, 4, False)])
    def test_size_of_the_table(self, size: int, index: int, taken: bool) -> None:
        """UITTSZ is the greatest index."""
        bench = self.bench(SENDUIPI_R9)
        assert bench.processor.msrs.write(MISC, 0xEC << 32 | size)
        bench.target(1 | 63 << 8, number=index)
        bench.state.gpr[9] = index
        if taken:
            bench.run_to(CODE + 5)
            assert bench.posted()[1] == 1 << 63
            assert len(bench.sent) == 1
        else:
            assert self.fault(bench) == (Vector.GP, 0)

    @pytest.mark.parametrize("prefix", ["", "66"])
    def test_index_has_64_bits(self, prefix: str) -> None:
        bench = self.bench(prefix + SENDUIPI, rax=1 << 32)
        assert bench.processor.msrs.write(MISC, 0xFFFF_FFFF)
        bench.memory.write_u64(UITT, 1)
        assert self.fault(bench) == (Vector.GP, 0)

    def fault(self, bench: UserInterruptBench) -> tuple[int, int | None]:
        """Of SENDUIPI, which changes nothing then."""
        before = bench.posted()
        event = bench.event()
        assert (bench.posted(), bench.sent, bench.state.rip) == (before, [], CODE)
        return event.vector, event.error_code

    @pytest.mark.parametrize(
        ("low", "address"),
        [
            (0, UPID),  # not valid
            *((1 | 1 << bit, UPID) for bit in (1, 7, 14, 15, 16, 63)),
            *((1, UPID | 1 << bit) for bit in (0, 3, 5)),
            (1, NON_CANONICAL),
        ],
    )
    def test_entries_that_are_refused(self, low: int, address: int) -> None:
        bench = self.bench()
        bench.target(low, address)
        assert self.fault(bench) == (Vector.GP, 0)

    @pytest.mark.parametrize("bit", [2, 7, 8, 15, 24, 31])
    def test_descriptors_that_are_refused(self, bit: int) -> None:
        assert self.fault(self.bench(control=0xEC << 16 | 1 << bit)) == (Vector.GP, 0)

    def test_table_that_is_not_canonical(self) -> None:
        bench = self.bench()
        bench.processor.msrs.values[TT] = NON_CANONICAL | 1
        assert self.fault(bench) == (Vector.GP, 0)

    def test_accesses_are_the_supervisors(self) -> None:
        bench = self.bench(cpl=3)
        for page in (UITT, UPID):
            bench.page(page, PRESENT | WRITABLE)
        bench.run_to(CODE + 4)
        assert len(bench.sent) == 1

    @pytest.mark.parametrize(
        ("page", "flags", "error"),
        [(UITT, 0, 0), (UPID, 0, 0b10), (UPID, PRESENT | USER, 0b11)],
    )
    def test_page_faults(self, page: int, flags: int, error: int) -> None:
        bench = self.bench(cpl=3)
        bench.page(page, flags)
        event = bench.event()
        assert (event.vector, event.error_code, event.address) == (Vector.PF, error, page)
        assert bench.sent == []

    def test_table_may_be_read_only(self) -> None:
        bench = self.bench()
        bench.page(UITT, PRESENT)
        bench.run_to(CODE + 4)
        assert len(bench.sent) == 1


def user_at(code: str, state: CpuState) -> UserInterruptBench:
    """A supervisor about to go to 64-bit code of the user at CODE + 80H, where a request waits for it."""
    bench = UserInterruptBench(code, state, rr=1)
    bench.put(CODE + 0x80, NOP * 8 + HLT)
    return bench


class TestWaysToTheUser:
    def test_sysret(self) -> None:
        state = state_with(cpl=0, rcx=CODE + 0x80)
        state.gpr[11] = 0x202
        bench = user_at("480f07", state)
        assert bench.processor.msrs.write(0xC000_0081, 0x0023_0010 << 32)
        bench.steps(2)
        assert (state.rip, state.cpl) == (ENTRY, 3)
        assert bench.quadwords(STACK - 24, 1) == [CODE + 0x80]

    def test_sysexit(self) -> None:
        state = state_with(cpl=0, rcx=STACK, rdx=CODE + 0x80)
        bench = user_at("480f35", state)
        assert bench.processor.msrs.write(0x174, 0x10)
        bench.steps(2)
        assert (state.rip, state.cpl) == (ENTRY, 3)
        assert bench.quadwords(STACK - 24, 1) == [CODE + 0x80]

    @pytest.mark.parametrize("cpl", [0, 3])
    def test_far_return(self, cpl: int) -> None:
        """From the supervisor, or from compatibility mode."""
        state = state_with(cpl=cpl, compatibility=cpl == 3)
        bench = user_at("cb" if cpl else "48cb", state)
        bench.descriptor_at(0x28, 0x00AF_FB00_0000_FFFF)
        size = 4 if cpl else 8
        frame = (CODE + 0x80, 0x2B, STACK + 0x800, 0x23)[: 2 if cpl else 4]
        for place, value in enumerate(frame):
            bench.put(STACK + size * place, value.to_bytes(size, "little"))
        bench.steps(2)
        assert (state.rip, state.cpl) == (ENTRY, 3)
        top = STACK + (2 * size if cpl else 0x800)
        assert bench.quadwords((top & ~0xF) - 24, 1) == [CODE + 0x80]
