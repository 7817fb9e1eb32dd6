"""VMRUN and #VMEXIT: what is loaded, saved, checked and reported."""

from __future__ import annotations

import random

import pytest
from svm_machine import (
    CLGI,
    GUEST_RIP,
    HOST_RIP,
    HOST_SAVE,
    INVLPGA,
    STGI,
    VMCB,
    VMLOAD,
    VMMCALL,
    VMRUN,
    VMSAVE,
    Machine,
)

from vmcs.vmcb.fields import IMAGE
from vmcs.vmcb.intercepts import Exit
from vtx.svm.outcome import ShutDown
from vtx.svm.record import Vmexit
from vtx.x86.event import Event, EventKind
from vtx.x86.outcome import Fault, Vector
from vtx.x86.state import Segment, Shadow

INVALID = 0xFFFF_FFFF_FFFF_FFFF
PRIVILEGED = (VMRUN, VMLOAD, VMSAVE, STGI, CLGI, INVLPGA)


@pytest.mark.parametrize("code", PRIVILEGED)
def test_faults_of_svm_instructions(code: bytes) -> None:
    machine = Machine()
    if code != STGI:  # which SKINIT makes available, too
        machine.state.efer &= ~0x1000
        assert machine.fault_of(code) == Fault(Vector.UD)
        machine.state.efer |= 0x1000
    machine.state.segments[2].access_rights |= 3 << 5
    assert machine.fault_of(code) == Fault(Vector.GP, 0)
    machine.state.cr0 &= ~1
    assert machine.fault_of(code) == Fault(Vector.UD)


@pytest.mark.parametrize("code", [VMRUN, VMLOAD, VMSAVE])
@pytest.mark.parametrize("address", [VMCB + 8, 1 << 48])
def test_address_of_the_control_block(code: bytes, address: int) -> None:
    machine = Machine()
    machine.store()
    machine.state.gpr[0] = address
    assert machine.fault_of(code) == Fault(Vector.GP, 0)


def test_vmmcall_is_invalid_without_its_intercept() -> None:
    machine = Machine()
    assert machine.fault_of(VMMCALL) == Fault(Vector.UD)
    machine.run()
    assert machine.fault_of(VMMCALL) == Fault(Vector.UD)


def test_vmrun_loads_the_guest() -> None:
    machine = Machine()
    machine.fields |= {"CR2": 0xDEAD_0000, "DR7": 0x455, "DR6": 0xFFFF_0FF1, "CPL": 3, "interrupt state": 1}
    machine.fields |= {"DS base": 0x1_0000, "DS limit": 0xFFF, "ES attributes": 0}
    machine.state.rflags |= 0x200
    machine.run()
    state = machine.state
    assert machine.svm.non_root and state.gif
    assert (state.rip, state.gpr[0], state.gpr[4], state.cr2) == (GUEST_RIP, 0x1234, 0x7000, 0xDEAD_0000)
    assert (state.dr7, state.dr6, state.cpl, state.shadow) == (0x455, 0xFFFF_0FF1, 3, Shadow.STI)
    assert state.segments[3] == Segment(0x10, 0x1_0000, 0xFFF, 0xC093)
    assert not state.segments[0].usable
    assert (state.efer, state.rflags, state.cr3) == (0x1D01, 2, 0x10000)


@pytest.mark.parametrize(
    ("name", "base", "loaded"),
    [("CS", 0x0000_8000_0000_0000, 0xFFFF_8000_0000_0000), ("DS", 0x1234_0000_0000_1000, 0x1000)],
)
def test_vmrun_canonicalizes_bases(name: str, base: int, loaded: int) -> None:
    machine = Machine()
    machine.fields[f"{name} base"] = base
    machine.run()
    assert machine.state.segments[{"CS": 1, "DS": 3}[name]].base == loaded


def test_cpl_of_real_and_virtual_8086_mode() -> None:
    machine = Machine()
    machine.fields |= {"EFER": 0x1000, "CR0": 0x10, "CPL": 3}
    machine.run()
    assert machine.state.cpl == 0
    machine = Machine()
    machine.fields |= {"EFER": 0x1000, "CR0": 0x11, "RFLAGS": 0x2_0002, "CPL": 0}
    machine.run()
    assert machine.state.cpl == 3


def test_long_mode_has_no_virtual_8086_mode() -> None:
    machine = Machine()
    machine.fields |= {"RFLAGS": 0x2_0002, "CPL": 0}
    machine.run()
    assert machine.state.rflags == 2
    assert machine.state.cpl == 0


def test_exit_saves_the_guest_and_loads_the_host() -> None:
    machine = Machine()
    machine.state.rflags |= 0x241
    machine.run()
    state = machine.state
    state.rip, state.gpr[0], state.gpr[4], state.rflags = 0x4444, 0x55, 0x6FF8, 0x203
    state.cr2, state.dr6, state.segments[3] = 0x777, 0xFFFF_0FF4, Segment(0x33, 0x10, 0xFFFFF, 0x40F3)
    state.shadow = Shadow.MOV_SS
    machine.svm.exit(Vmexit(0x72, 1, 2, next_rip=0x4446))
    assert machine.stored("EXITCODE") == 0x72
    assert (machine.stored("EXITINFO1"), machine.stored("EXITINFO2"), machine.stored("nRIP")) == (1, 2, 0x4446)
    assert (machine.stored("RIP"), machine.stored("RAX"), machine.stored("RSP")) == (0x4444, 0x55, 0x6FF8)
    assert (machine.stored("CR2"), machine.stored("DR6"), machine.stored("RFLAGS")) == (0x777, 0xFFFF_0FF4, 0x203)
    assert (machine.stored("DS selector"), machine.stored("DS attributes")) == (0x33, 0x4F3)
    assert (machine.stored("DS base"), machine.stored("interrupt state")) == (0x10, 1)
    state = machine.state
    assert not machine.svm.non_root and not state.gif
    assert (state.rip, state.gpr[0], state.gpr[4], state.rflags) == (HOST_RIP + 3, VMCB, 0x9000, 0x243)
    assert (state.segments[3], state.dr7, state.cpl) == (Segment(0x10, 0, 0xFFFF_FFFF, 0xC093), 0x400, 0)
    assert machine.svm.transitions == 2


def test_host_state_is_what_the_save_area_has() -> None:
    machine = Machine()
    machine.run()
    machine.memory.write_u64(HOST_SAVE + 0x578, 0x1_2345)  # RIP
    machine.svm.exit(Vmexit(0x72))
    assert machine.state.rip == 0x1_2345


def test_exit_to_a_host_that_single_steps_traps() -> None:
    machine = Machine()
    machine.state.rflags |= 0x100
    machine.run()
    assert not machine.state.pending_debug
    machine.svm.exit(Vmexit(0x72))
    assert machine.state.pending_debug == 1 << 14


def test_exit_leaves_reserved_bytes_alone() -> None:
    machine = Machine()
    machine.store()
    for offset in (0x01C, 0x0A0, 0x440, 0x498, 0x4E0, 0x580, 0x600, 0x700):
        machine.memory.write_u64(VMCB + offset, 0x1122_3344_5566_7788)
    machine.state.gpr[0] = VMCB
    machine.execute(VMRUN)
    machine.svm.exit(Vmexit(0x72))
    for offset in (0x01C, 0x0A0, 0x440, 0x498, 0x4E0, 0x580, 0x600, 0x700):
        assert machine.memory.read_u64(VMCB + offset) == 0x1122_3344_5566_7788


def test_invalid_control_block() -> None:
    machine = Machine()
    machine.fields |= {"guest ASID": 0, "RIP": 0x9999}
    machine.run()
    assert (machine.stored("EXITCODE"), machine.stored("RIP")) == (INVALID, 0x9999)
    assert (machine.state.rip, machine.state.gif, machine.svm.non_root) == (HOST_RIP + 3, False, False)
    failure = machine.svm.last_failure
    assert failure is not None
    assert str(failure).startswith("vmrun.asid-not-zero: the guest's ASID is not that of the host, 0")
    assert [each.rule.id for each in machine.svm.explain()] == ["vmrun.asid-not-zero"]


def test_pdptes_are_checked_without_nested_paging_alone() -> None:
    machine = Machine()
    machine.fields |= {"EFER": 0x1000, "CS attributes": 0xC9B, "CR3": 0x30000}
    machine.memory.write_u64(0x30000, 0x31000 | 1)
    machine.memory.write_u64(0x30018, 0x31000 | 1 | 1 << 52)
    machine.run()
    assert machine.stored("EXITCODE") == INVALID
    assert "a PDPTE in memory at 0x30000" in str(machine.svm.last_failure)
    machine.state.gif = True
    machine.use_nested_paging()
    machine.run()
    assert machine.svm.non_root


@pytest.mark.parametrize(
    ("word", "event"),
    [
        (0x8000_0021, Event(0x21, EventKind.EXTERNAL_INTERRUPT, injected=True)),
        (0x8000_0202, Event(2, EventKind.NMI, injected=True)),
        (0x8000_02FF, Event(2, EventKind.NMI, injected=True)),  # VECTOR means nothing
        (0x0001_0007_8000_0B0D, Event(13, EventKind.HARDWARE_EXCEPTION, 0x1_0007, injected=True)),
        (0x8000_0480, Event(0x80, EventKind.SOFTWARE_INTERRUPT, None, 2, injected=True)),
        (0x8000_0303, Event(3, EventKind.SOFTWARE_EXCEPTION, None, 2, injected=True)),
    ],
)
def test_event_injection(word: int, event: Event) -> None:
    machine = Machine()
    machine.fields |= {"EVENTINJ": word, "nRIP": GUEST_RIP + 2}
    machine.run()
    (delivered,) = machine.processor.delivered
    assert delivered.saved_rip(machine.state) == event.saved_rip(machine.state)
    assert (delivered.vector, delivered.kind, delivered.error_code, delivered.injected) == (
        *(event.vector, event.kind, event.error_code),
        True,
    )
    machine.svm.exit(Vmexit(0x72))
    assert machine.stored("EVENTINJ") == word & ~(1 << 31)


@pytest.mark.parametrize(
    ("control", "kept"),
    [(0, {(0, 1), (1, 1), (2, 1)}), (1, set()), (3, {(0, 1), (2, 1)}), (7, {(0, 1), (2, 1)})],
)
def test_tlb_control(control: int, kept: set[tuple[int, int]]) -> None:
    machine = Machine()
    mmu = machine.processor.mmu
    for asid in (1, 2, 0):
        mmu.vm_transition(machine.state, mmu.second_level, asid, flush=False)
        mmu.translate(0x1000, 1)  # type: ignore[arg-type]
    machine.fields["TLB_CONTROL"] = control
    machine.run()
    found = set()
    for asid in (0, 1, 2):
        mmu.vm_transition(machine.state, mmu.second_level, asid, flush=False)
        if mmu.tlb.find(1) is not None:
            found.add((asid, 1))
    assert found == kept


def test_vmload_and_vmsave() -> None:
    machine = Machine()
    machine.fields |= {
        "FS selector": 0x53,
        "FS attributes": 0xCF3,
        "FS limit": 0xFFFF,
        "FS base": 0x0000_8000_0000_0000,
    }
    machine.fields |= {"TR selector": 0x40, "TR attributes": 0x8B, "TR base": 0x7000, "KernelGsBase": 0x1234}
    machine.fields |= {"STAR": 0x11, "LSTAR": 0x22, "CSTAR": 0x33, "SFMASK": 0x44, "SYSENTER_EIP": 0x55}
    machine.store()
    machine.execute(VMLOAD)
    state, msrs = machine.state, machine.processor.msrs
    assert state.segments[4] == Segment(0x53, 0xFFFF_8000_0000_0000, 0xFFFF, 0xC0F3)
    assert (state.tr, state.kernel_gs_base) == (Segment(0x40, 0x7000, 0, 0x8B), 0x1234)
    assert [msrs.read(index) for index in (0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0x176)] == [
        *(0x11, 0x22, 0x33, 0x44, 0x55)
    ]
    assert state.rip == HOST_RIP + 3
    state.kernel_gs_base = 0x9876
    before = machine.memory.read(VMCB, 0x440)
    machine.execute(VMSAVE)
    assert (machine.stored("KernelGsBase"), machine.stored("FS base")) == (0x9876, 0xFFFF_8000_0000_0000)
    assert machine.memory.read(VMCB, 0x440) == before


def test_virtual_vmsave_takes_a_guest_physical_address() -> None:
    machine = Machine()
    machine.use_nested_paging()
    machine.fields["virtualization of LBR, VMLOAD and VMSAVE"] = 2
    machine.memory.write_u64(0x22000, 0x20_0000 | 0x87)  # guest-physical 0 is at 2 MBytes
    machine.run()
    machine.state.gpr[0] = 0x9000
    machine.state.kernel_gs_base = 0x4321
    machine.execute(VMSAVE)
    assert machine.memory.read_u64(0x20_9620) == 0x4321
    assert machine.memory.read_u64(0x9620) == 0


def test_last_branch_virtualization() -> None:
    machine = Machine()
    machine.fields |= {"virtualization of LBR, VMLOAD and VMSAVE": 1, "DBGCTL": 1, "BR_FROM": 0x10, "LASTEXCPTO": 0x40}
    machine.state.debugctl = 0
    machine.run()
    state = machine.state
    assert (state.debugctl, state.last_branch.from_ip, state.last_branch.exception_to_ip) == (1, 0x10, 0x40)
    state.debugctl = 2
    machine.svm.exit(Vmexit(0x72))
    assert (machine.stored("DBGCTL"), machine.stored("BR_FROM")) == (2, 0x10)
    assert (machine.state.debugctl, machine.state.last_branch.from_ip) == (0, 0)


def test_tsc_of_a_guest() -> None:
    machine = Machine()
    machine.fields["TSC_OFFSET"] = (1 << 64) - 50
    machine.processor.msrs.write(0xC000_0104, 3 << 31)  # 1.5
    machine.run()
    assert machine.svm.guest_tsc(1000) == 1450
    assert machine.svm.guest_tsc(0) == (1 << 64) - 50


def test_gif_and_virtual_gif() -> None:
    machine = Machine()
    machine.execute(CLGI)
    assert not machine.state.gif and machine.svm.holds_interrupts and machine.svm.holds_nmis
    assert machine.svm.init_is_blocked
    machine.execute(STGI)
    assert machine.state.gif and not machine.svm.holds_interrupts
    machine.fields["virtual interrupt control"] = 1 << 25
    machine.run()
    machine.execute(STGI)
    assert machine.svm.operation.virtual == 1 << 25 | 1 << 9
    machine.execute(CLGI)
    assert (machine.svm.operation.virtual, machine.state.gif) == (1 << 25, True)


def test_svmdis_keeps_svm_disabled() -> None:
    machine = Machine()
    msrs = machine.processor.msrs
    assert not msrs.write(0xC001_0114, 0x10)  # EFER.SVME is set
    msrs.write(0xC000_0080, 0xD01)
    assert msrs.write(0xC001_0114, 0x10)
    assert not msrs.write(0xC000_0080, 0x1D01)
    assert msrs.write(0xC001_0114, 0)
    assert msrs.write(0xC000_0080, 0x1D01)


@pytest.mark.parametrize("seed", range(40))
def test_any_control_block_gives_an_architectural_result(seed: int) -> None:
    """Random bytes over a valid block: VMRUN enters or says VMEXIT_INVALID, and the exit finds its way back."""
    machine = Machine()
    random_bytes = random.Random(seed)
    machine.use_nested_paging()
    machine.store()
    for _ in range(random_bytes.choice((1, 3, 30))):
        machine.memory.write_u8(VMCB + random_bytes.randrange(IMAGE.size), random_bytes.randrange(256))
    machine.state.gpr[0] = VMCB
    machine.execute(VMRUN)
    if machine.svm.non_root:
        machine.svm.boundary()
    if machine.svm.non_root:
        machine.svm.exit(Vmexit(Exit.SHUTDOWN))
    assert machine.state.rip == HOST_RIP + 3


@pytest.mark.parametrize(("offset", "value"), [(0x558, 1 << 32), (0x548, 0x2020), (0x550, 1 << 48), (0x4D0, 0x3D01)])
def test_exit_to_an_invalid_host_shuts_down(offset: int, value: int) -> None:
    machine = Machine()
    machine.run()
    machine.memory.write_u64(HOST_SAVE + offset, value)
    assert machine.svm.exit(Vmexit(0x72)) == ShutDown()
    assert machine.processor.shutdown == "#VMEXIT to a host with invalid control registers"


@pytest.mark.parametrize("address", [0, 0x3F_F000, 0x8000_0000, (1 << 48) - 0x1000])
def test_control_block_anywhere(address: int) -> None:
    machine = Machine()
    machine.processor.msrs.write(0xC001_0117, address)  # the host's state is lost where there is no RAM
    machine.state.gpr[0] = address
    machine.execute(VMRUN)
    assert not machine.svm.non_root


def test_what_others_store_in_the_block_is_overwritten_all_the_same() -> None:
    """A #VMEXIT stores what it saves, also where memory was that way at VMRUN and is not any more."""
    machine = Machine()
    machine.run()
    rsp, cs = 0x400 + 0x1D8, 0x410
    for offset in (rsp, cs):
        machine.memory.write_u64(VMCB + offset, 0x1234_5678_9ABC_DEF0)
    machine.memory.write_u64(VMCB + 0x440, 0x77)  # FS, which it does not save
    machine.svm.exit(Vmexit(0x72))
    assert (machine.stored("RSP"), machine.stored("CS selector"), machine.stored("FS selector")) == (0x7000, 8, 0x77)


def test_what_others_store_in_the_host_save_area_is_what_the_host_becomes() -> None:
    machine = Machine()
    for rsp in (0x9000, 0xA000, 0xA000):
        machine.state.gpr[4] = rsp
        machine.run()
        assert machine.memory.read_u64(HOST_SAVE + 0x5D8) == rsp
        machine.svm.exit(Vmexit(0x72))
        assert machine.state.gpr[4] == rsp
        machine.state.rip = HOST_RIP
    machine.run()
    machine.memory.write_u64(HOST_SAVE + 0x5D8, 0xB000)
    machine.svm.exit(Vmexit(0x72))
    assert machine.state.gpr[4] == 0xB000
    machine.state.gpr[4], machine.state.rip = 0xA000, HOST_RIP
    machine.run()
    assert machine.memory.read_u64(HOST_SAVE + 0x5D8) == 0xA000


def test_host_save_area_that_moves() -> None:
    machine = Machine()
    machine.run()
    machine.svm.exit(Vmexit(0x72))
    machine.processor.msrs.write(0xC001_0117, 0x38_0000)
    machine.state.rip = HOST_RIP
    machine.run()
    assert machine.memory.read_u64(0x38_0000 + 0x578) == HOST_RIP + 3


def test_real_mode_guest__that_enters_protected_mode_is_at_level_0() -> None:
    """The privilege level is that of SS, whatever CPL of the control block says of a mode that has none."""
    machine = Machine()
    machine.fields |= {"EFER": 0x1000, "CR0": 0x10, "CPL": 3, "SS attributes": 0x93}
    machine.run()
    assert machine.state.segments[2].access_rights >> 5 & 3 == 0
    machine.state.cr0 |= 1
    assert machine.state.cpl == 0


def test_pat_of_a_guest_with_nested_paging_is_its_own() -> None:
    machine = Machine()
    machine.use_nested_paging()
    msrs = machine.processor.msrs
    msrs.write(0x277, 0x0101_0101_0101_0101)
    machine.run()
    assert msrs.read(0x277) == 0x0007_0406_0007_0406
    msrs.write(0x277, 0x0606_0606_0606_0606)
    machine.svm.exit(Vmexit(Exit.CPUID))
    assert machine.stored("G_PAT") == 0x0606_0606_0606_0606
    assert msrs.read(0x277) == 0x0101_0101_0101_0101


def test_pat_of_a_guest_without_nested_paging_is_the_hosts() -> None:
    machine = Machine()
    msrs = machine.processor.msrs
    machine.run()
    msrs.write(0x277, 0x0606_0606_0606_0606)
    machine.svm.exit(Vmexit(Exit.CPUID))
    assert machine.stored("G_PAT") == 0x0007_0406_0007_0406
    assert msrs.read(0x277) == 0x0606_0606_0606_0606


def test_vmload_of_registers_that_have_32_bits() -> None:
    machine = Machine()
    wide = 0x1111_2222_3333_4444
    machine.fields |= dict.fromkeys(("STAR", "LSTAR", "CSTAR", "SFMASK", "SYSENTER_CS", "SYSENTER_EIP"), wide)
    machine.store()
    machine.execute(VMLOAD)
    found = [machine.processor.msrs.values[index] for index in (0xC000_0081, 0xC000_0082, 0xC000_0084, 0x174, 0x176)]
    assert found == [wide, wide, 0x3333_4444, 0x3333_4444, wide]
