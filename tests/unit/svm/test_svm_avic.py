"""AVIC: accelerated accesses, those that exit, interrupts and their priorities, in guests of machine code."""

from __future__ import annotations

import pytest
from svm_avic import (
    APIC,
    APR,
    AVIC,
    CONTROL,
    CURRENT_COUNT,
    EOI,
    ESR,
    HLT,
    ICR_HIGH,
    ID,
    IRR,
    ISR,
    LDR,
    LVT_TIMER,
    NOP,
    PPR,
    STI,
    SVR,
    TMR,
    TPR,
    VERSION,
    VMMCALL,
    Guest,
    load,
    rdmsr,
    store,
    wrmsr,
)

from vmcs.vmcb.intercepts import Exit
from vtx.x86.outcome import NotModelled
from vtx.x86.state import Activity

NOACCEL, NPF, GP, VINTR = 0x402, 0x400, 0x4D, 0x64
WRITE = 1 << 32
CODE = 0x4000


def run(*code: bytes, registers: dict[int, int] | None = None, **options: object) -> Guest:
    """A guest of ``code``, run to its #VMEXIT."""
    guest = Guest(b"".join(code), **options)  # type: ignore[arg-type]
    for offset, value in (registers or {}).items():
        guest.set_register(offset, value)
    guest.enter()
    guest.run()
    return guest


class TestAccesses:
    """APM Vol. 2, "Virtual APIC Register Accesses"."""

    @pytest.mark.parametrize("offset", [ID, VERSION, TPR, LDR, SVR, ISR + 0x70, TMR, IRR, ESR, ICR_HIGH, LVT_TIMER])
    def test_read__gives_the_backing_page(self, offset: int) -> None:
        guest = run(load(offset), VMMCALL, registers={offset: 0x1234_5678} if offset != TPR else {TPR: 0x20})
        assert guest.stored("EXITCODE") == Exit.VMMCALL
        assert guest.stored("RAX") == (0x1234_5678 if offset != TPR else 0x20)

    @pytest.mark.parametrize("offset", [0x10, 0x290, 0x3F0, 0x440])
    def test_what_is_no_register__is_memory(self, offset: int) -> None:
        guest = run(store(offset, 0x77), load(offset), VMMCALL)
        assert (guest.stored("EXITCODE"), guest.stored("RAX"), guest.register(offset)) == (Exit.VMMCALL, 0x77, 0x77)

    @pytest.mark.parametrize("offset", [APR, CURRENT_COUNT, 0x400, 0x480, 0x530, 0x540, 0xFF0])
    def test_read__exits_before_it(self, offset: int) -> None:
        guest = run(NOP, load(offset))
        assert (guest.stored("EXITCODE"), guest.stored("EXITINFO1")) == (NOACCEL, offset)
        assert (guest.stored("RIP"), guest.stored("nRIP")) == (CODE + 1, 0)

    @pytest.mark.parametrize("offset", [VERSION, APR, PPR, ISR, TMR + 0x10, IRR + 0x70, CURRENT_COUNT, 0x420, 0x7F0])
    def test_write__exits_before_it(self, offset: int) -> None:
        guest = run(NOP, store(offset, 0x55), registers={offset: 3})
        assert (guest.stored("EXITCODE"), guest.stored("EXITINFO1")) == (NOACCEL, offset | WRITE)
        assert (guest.stored("RIP"), guest.register(offset)) == (CODE + 1, 0 if offset == PPR else 3)

    @pytest.mark.parametrize("offset", [ID, 0xC0, LDR, 0xE0, SVR, ESR, LVT_TIMER, 0x370, 0x380, 0x3E0])
    def test_write__exits_after_it(self, offset: int) -> None:
        guest = run(store(offset, 0x55), VMMCALL)
        assert (guest.stored("EXITCODE"), guest.stored("EXITINFO1")) == (NOACCEL, offset | WRITE)
        assert (guest.stored("RIP"), guest.stored("nRIP"), guest.register(offset)) == (CODE + 11, 0, 0x55)

    def test_read_modify_write__is_both(self) -> None:
        or_register = b"\x81\x0c\x25" + (APIC + SVR).to_bytes(4, "little") + b"\x00\x01\x00\x00"
        guest = run(or_register, registers={SVR: 0xFF})
        assert (guest.stored("EXITINFO1"), guest.register(SVR)) == (SVR | WRITE, 0x1FF)
        or_version = b"\x81\x0c\x25" + (APIC + VERSION).to_bytes(4, "little") + b"\x00\x01\x00\x00"
        guest = run(or_version, registers={VERSION: 0x10})
        assert (guest.stored("EXITINFO1"), guest.register(VERSION)) == (VERSION | WRITE, 0x10)
        or_count = b"\x81\x0c\x25" + (APIC + CURRENT_COUNT).to_bytes(4, "little") + b"\x00\x01\x00\x00"
        assert run(or_count).stored("EXITINFO1") == CURRENT_COUNT

    def test_parts_of_a_register(self) -> None:
        guest = run(load(ID + 3, 1), VMMCALL, registers={ID: 0x0900_0000})
        assert (guest.stored("EXITCODE"), guest.stored("RAX") & 0xFF) == (Exit.VMMCALL, 9)

    @pytest.mark.parametrize(("offset", "size"), [(ID + 4, 4), (ID + 2, 4), (ID, 8), (ID + 15, 1)])
    def test_beyond_a_register__exits(self, offset: int, size: int) -> None:
        guest = run(load(offset, size))
        assert (guest.stored("EXITCODE"), guest.stored("EXITINFO1"), guest.stored("RIP")) == (NOACCEL, ID, CODE)

    def test_nested_page_tables__say_whether_it_may_be_accessed(self) -> None:
        guest = Guest(store(TPR, 0x10))
        table = 0x2_2000 + 8 * (APIC >> 21)
        guest.memory.write_u64(table, guest.memory.read_u64(table) & ~2)  # read-only
        guest.enter()
        assert guest.run() == NPF
        assert (guest.stored("EXITINFO1"), guest.stored("EXITINFO2")) == (0x1_0000_0007, APIC + TPR)

    def test_nested_page_tables__do_not_say_where_it_is(self) -> None:
        guest = Guest(store(ICR_HIGH, 0x1200_0000) + VMMCALL)
        guest.memory.write_u32(APIC + ICR_HIGH, 7)
        guest.enter()
        guest.run()
        assert (guest.memory.read_u32(APIC + ICR_HIGH), guest.register(ICR_HIGH)) == (7, 0x1200_0000)

    def test_without_avic__it_is_memory(self) -> None:
        guest = Guest(store(TPR, 0x33) + VMMCALL, fields={CONTROL: 0})
        guest.enter()
        assert guest.run() == Exit.VMMCALL
        assert (guest.memory.read_u32(APIC + TPR), guest.register(TPR)) == (0x33, 0)

    def test_translations_of_a_run_without_it__are_not_used(self) -> None:
        """And the other way round: nothing is flushed between the runs."""
        guest = Guest(load(ICR_HIGH) + VMMCALL)
        guest.set_register(ICR_HIGH, 5)
        guest.memory.write_u32(APIC + ICR_HIGH, 6)
        for control, expected in ((AVIC, 5), (0, 6), (AVIC, 5)):
            guest.memory.write_u64(0x3A_0000 + 0x60, control)
            guest.memory.write_u64(0x3A_0000 + 0x578, CODE)
            guest.enter()
            assert guest.run() == Exit.VMMCALL
            assert guest.stored("RAX") == expected

    def test_fetch__exits(self) -> None:
        guest = Guest(b"\xff\x24\x25" + (CODE + 0x100).to_bytes(4, "little"))  # JMP [CODE + 100H]
        guest.memory.write_u64(CODE + 0x100, APIC + ID)
        guest.enter()
        assert guest.run() == NOACCEL
        assert (guest.stored("EXITINFO1"), guest.stored("RIP")) == (ID, APIC + ID)

    def test_stack_of_an_event_there__exits_with_the_event(self) -> None:
        guest = Guest(b"\xcd\x80", fields={"RSP": APIC + 0x100})
        guest.enter()
        assert guest.run() == NOACCEL
        assert guest.stored("EXITINTINFO") == 0x8000_0480

    def test_needs_nested_paging(self) -> None:
        guest = Guest(VMMCALL, nested=False)
        with pytest.raises(NotModelled, match="AVIC without nested paging"):
            guest.enter()


class TestTaskPriority:
    """The register, CR8 and V_TPR."""

    def test_register__sets_v_tpr(self) -> None:
        guest = run(store(TPR, 0x5A), load(PPR), VMMCALL)
        assert (guest.stored("RAX"), guest.stored(CONTROL) & 0xFF) == (0x5A, 5)

    def test_cr8__sets_the_register(self) -> None:
        guest = run(b"\xb8\x06\x00\x00\x00\x44\x0f\x22\xc0", load(TPR), VMMCALL, registers={TPR: 0x1F})
        assert (guest.stored("RAX"), guest.stored(CONTROL) & 0xFF) == (0x60, 6)

    @pytest.mark.parametrize("masking", [0, 1 << 24])
    def test_cr8__reads_v_tpr(self, masking: int) -> None:
        guest = run(b"\x44\x0f\x20\xc0", VMMCALL, fields={CONTROL: AVIC | masking | 9}, registers={TPR: 0x10})
        assert guest.stored("RAX") == 9

    def test_cr8__takes_four_bits(self) -> None:
        guest = run(b"\xb8\x10\x00\x00\x00\x44\x0f\x22\xc0", intercepts=(GP,))
        assert guest.stored("EXITCODE") == GP


class TestInterrupts:
    """Requested in the backing page, delivered by priority."""

    def guest(self, code: bytes, *requested: int, **options: object) -> Guest:
        guest = Guest(code, **options)  # type: ignore[arg-type]
        for vector in requested:
            guest.set_bit(IRR, vector)
        return guest

    def test_requested_before_vmrun__is_delivered(self) -> None:
        guest = self.guest(STI + NOP + NOP, 0x45, 0x82)
        guest.enter()
        guest.run()
        assert (guest.handled(0x82), guest.handled(0x45)) == (1, 0)
        assert (guest.bit(IRR, 0x82), guest.bit(ISR, 0x82), guest.bit(IRR, 0x45)) == (False, True, True)
        assert guest.register(PPR) == 0x80

    def test_end_of_interrupt__lets_the_next_one_in(self) -> None:
        guest = self.guest(STI + NOP + store(EOI, 0) + NOP + VMMCALL, 0x45, 0x82)
        guest.enter()
        guest.run()
        guest.enter()  # in the handler of 82H, to its IRET
        assert guest.run() == Exit.VMMCALL

    def test_end_of_interrupt__clears_the_highest_in_service(self) -> None:
        guest = Guest(store(EOI, 0) + VMMCALL)
        guest.set_bit(ISR, 0x31)
        guest.set_bit(ISR, 0x72)
        guest.enter()
        assert guest.run() == Exit.VMMCALL
        assert (guest.bit(ISR, 0x31), guest.bit(ISR, 0x72), guest.register(PPR)) == (True, False, 0x30)

    def test_end_of_a_level_triggered_one__exits(self) -> None:
        guest = Guest(store(EOI, 0) + VMMCALL)
        guest.set_bit(ISR, 0x72)
        guest.set_bit(TMR, 0x72)
        guest.enter()
        assert guest.run() == NOACCEL
        assert (guest.stored("EXITINFO1"), guest.stored("EXITINFO2")) == (EOI | WRITE, 0x72)
        assert (guest.stored("RIP"), guest.bit(ISR, 0x72)) == (CODE + 11, True)

    def test_end_of_nothing(self) -> None:
        guest = run(store(EOI, 0), VMMCALL)
        assert guest.stored("EXITCODE") == Exit.VMMCALL

    @pytest.mark.parametrize(("priority", "delivered"), [(0x40, True), (0x4F, True), (0x50, False), (0xF0, False)])
    def test_priority(self, priority: int, delivered: bool) -> None:
        guest = self.guest(STI + NOP + NOP + HLT, 0x55, intercepts=(Exit.HLT,))
        guest.set_register(TPR, priority)
        guest.enter()
        assert guest.run() == (Exit.VMMCALL if delivered else Exit.HLT)
        assert guest.handled(0x55) == delivered

    def test_lowering_the_priority__lets_it_in(self) -> None:
        guest = self.guest(STI + NOP + store(TPR, 0) + NOP + HLT, 0x55, intercepts=(Exit.HLT,))
        guest.set_register(TPR, 0x60)
        guest.enter()
        assert guest.run() == Exit.VMMCALL
        assert guest.handled(0x55) == 1
        return_address = guest.memory.read_u64(guest.stored("RSP"))
        assert return_address == CODE + 13

    def test_interrupt_flag__holds_it(self) -> None:
        guest = self.guest(NOP + NOP + HLT, 0x55, intercepts=(Exit.HLT,))
        guest.enter()
        assert guest.run() == Exit.HLT

    def test_virtual_gif__holds_it(self) -> None:
        clgi, stgi = b"\x0f\x01\xdd", b"\x0f\x01\xdc"
        control = AVIC | 1 << 25 | 1 << 9 | 1 << 24
        guest = self.guest(clgi + STI + NOP + NOP + stgi + NOP, 0x55, fields={CONTROL: control})
        guest.enter()
        assert guest.run() == Exit.VMMCALL
        assert guest.memory.read_u64(guest.stored("RSP")) == CODE + 9

    def test_v_irq__is_ignored(self) -> None:
        control = AVIC | 1 << 8 | 0xF << 16 | 1 << 20 | 0x66 << 32
        guest = self.guest(STI + NOP + NOP + HLT, intercepts=(Exit.HLT,), fields={CONTROL: control})
        guest.enter()
        assert guest.run() == Exit.HLT
        assert guest.handled(0x66) == 0

    def test_intercept_of_virtual_interrupts(self) -> None:
        guest = self.guest(STI + NOP + NOP, 0x55, intercepts=(VINTR,))
        guest.enter()
        assert guest.run() == VINTR
        assert guest.bit(IRR, 0x55)

    def test_halted_guest__is_woken_by_a_doorbell(self) -> None:
        guest = Guest(STI + HLT + NOP)
        guest.enter()
        for _ in range(4):
            guest.cpu().run_once()
            if guest.cpu().state.activity is Activity.HLT:
                break
        guest.set_bit(IRR, 0x55)
        assert not guest.cpu().awake
        guest.cpu().ring_doorbell(0)
        assert guest.cpu().awake
        assert guest.run() == Exit.VMMCALL
        assert guest.handled(0x55) == 1

    @pytest.mark.parametrize("requested", [False, True])
    def test_idle_hlt__looks_at_the_backing_page(self, requested: bool) -> None:
        guest = self.guest(HLT, *((0x55,) if requested else ()), intercepts=(Exit.IDLE_HLT,))
        guest.enter()
        guest.cpu().run_once()
        assert guest.cpu().svm.non_root is requested

    def test_goes_on_after_a_snapshot(self) -> None:
        guest = self.guest(NOP + STI + NOP + NOP, 0x55)
        guest.enter()
        snapshot = guest.machine.snapshot()
        guest.run()
        other = Guest(NOP)
        other.machine.restore(snapshot)
        assert other.run() == Exit.VMMCALL
        assert other.handled(0x55) == 1


def test_system_management_mode__has_no_virtual_apic() -> None:
    guest = Guest(load(ID) + NOP * 4 + load(SVR) + VMMCALL)
    guest.set_register(ID, 3 << 24)
    guest.set_register(SVR, 0x1FF)
    guest.enter()
    cpu, memory = guest.cpu(), guest.memory
    memory.write(0x3_8000, b"\x0f\xaa")  # RSM
    guest.machine.run(max_instructions=2)
    assert cpu.state.gpr[0] == 3 << 24
    cpu.smi()
    while cpu.state.smm is None:
        cpu.run_once()
    assert (cpu.svm.operation.avic, cpu.mmu.reserved_page) == (None, None)
    guest.machine.cpu.limit_instructions(None)
    while cpu.state.smm is not None:
        cpu.run_once()
    assert guest.run() == Exit.VMMCALL
    assert guest.stored("RAX") == 0x1FF


class TestX2apic:
    """x2AVIC: registers as MSRs."""

    @pytest.mark.parametrize("offset", [ID, TPR, LDR, SVR, IRR + 0x30, LVT_TIMER])
    def test_read(self, offset: int) -> None:
        guest = run(rdmsr(0x800 + offset // 16), VMMCALL, x2apic=True, registers={offset: 0xAB})
        assert (guest.stored("EXITCODE"), guest.stored("RAX"), guest.cpu().state.gpr[2]) == (Exit.VMMCALL, 0xAB, 0)

    def test_interrupt_command__is_64_bits(self) -> None:
        guest = run(rdmsr(0x830), VMMCALL, x2apic=True, registers={0x300: 0x11, ICR_HIGH: 0x22})
        assert (guest.stored("RAX"), guest.cpu().state.gpr[2]) == (0x11, 0x22)

    @pytest.mark.parametrize(("index", "offset"), [(0x809, APR), (0x839, CURRENT_COUNT), (0x840, 0x400)])
    def test_read__exits_before_it(self, index: int, offset: int) -> None:
        guest = run(rdmsr(index), x2apic=True)
        assert (guest.stored("EXITCODE"), guest.stored("EXITINFO1")) == (NOACCEL, offset)
        assert guest.stored("RIP") == CODE + 5

    @pytest.mark.parametrize(("index", "offset"), [(0x803, VERSION), (0x80A, PPR), (0x827, IRR + 0x70)])
    def test_write__exits_before_it(self, index: int, offset: int) -> None:
        guest = run(wrmsr(index, 5), x2apic=True)
        assert (guest.stored("EXITCODE"), guest.stored("EXITINFO1")) == (NOACCEL, offset | WRITE)
        assert (guest.stored("RIP"), guest.register(offset)) == (CODE + 15, 0)

    @pytest.mark.parametrize(("index", "offset"), [(0x80F, SVR), (0x832, LVT_TIMER), (0x83E, 0x3E0)])
    def test_write__exits_after_it(self, index: int, offset: int) -> None:
        guest = run(wrmsr(index, 5), x2apic=True)
        assert (guest.stored("EXITCODE"), guest.stored("EXITINFO1")) == (NOACCEL, offset | WRITE)
        assert (guest.stored("RIP"), guest.register(offset)) == (CODE + 17, 5)

    @pytest.mark.parametrize(
        "code",
        [
            *(rdmsr(index) for index in (0x800, 0x80C, 0x80E, 0x829, 0x831, 0x83F, 0x854, 0x8FF)),
            *(wrmsr(index, 0) for index in (0x802, 0x804, 0x80E, 0x831, 0x83A)),
            *(wrmsr(index, 1) for index in (0x80B, 0x828)),
            *(wrmsr(index, 0x100) for index in (0x808, 0x83F)),
            *(wrmsr(index, 1 << 32) for index in (0x808, 0x80F, 0x832)),
            *(wrmsr(0x830, 0x30 | 1 << bit) for bit in (12, 13, 16, 17, 20, 31)),
        ],
    )
    def test_general_protection(self, code: bytes) -> None:
        guest = run(code, x2apic=True, intercepts=(GP,))
        assert (guest.stored("EXITCODE"), guest.stored("RIP")) == (GP, CODE + len(code) - 2)

    def test_permissions_map__comes_first(self) -> None:
        guest = Guest(rdmsr(0x808), x2apic=True, intercepts=(0x7C,))
        guest.memory.write_u8(0x3000 + 0x808 // 4, 1)
        guest.enter()
        assert guest.run() == 0x7C

    def test_task_priority_and_end_of_interrupt(self) -> None:
        guest = Guest(wrmsr(0x808, 0x20) + wrmsr(0x80B, 0) + VMMCALL, x2apic=True)
        guest.set_bit(ISR, 0x55)
        guest.enter()
        assert guest.run() == Exit.VMMCALL
        assert (guest.register(PPR), guest.bit(ISR, 0x55), guest.stored(CONTROL) & 0xFF) == (0x20, False, 2)

    def test_memory_at_the_apics_address__is_memory(self) -> None:
        guest = run(store(TPR, 0x33), VMMCALL, x2apic=True)
        assert (guest.memory.read_u32(APIC + TPR), guest.register(TPR)) == (0x33, 0)

    def test_without_x2avic__msrs_are_the_processors(self) -> None:
        guest = run(rdmsr(0x808), intercepts=(GP,))
        assert guest.stored("EXITCODE") == GP  # whose local APIC is not in x2APIC mode


def test_doorbell_msr() -> None:
    msrs = Guest(NOP).cpu().msrs
    assert msrs.read(0xC001_011B) is None
    assert msrs.write(0xC001_011B, 0xFF)
    assert not msrs.write(0xC001_011B, 0x100)


def test_backing_page_is_left_at_the_exit() -> None:
    guest = run(VMMCALL)
    assert guest.cpu().svm.operation.avic is None
    assert guest.cpu().mmu.reserved_page is None
