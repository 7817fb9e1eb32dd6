"""Snapshots: what they hold, how often they can be restored, and machines of several processors."""

import pytest
from attrs import evolve, fields
from flat_guest import COUNTER, EXIT_0, ICR, SOFTWARE_ENABLE, START, machine_with, store
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcs.vmcb.fields import BY_NAME, Vmcb
from vtx.events import TraceEvent
from vtx.machine import Machine, StopReason
from vtx.snapshot import SnapshotError
from vtx.svm.operation import SvmOperation
from vtx.svm.saved import SavedSvm
from vtx.vmx.operation import ActiveVmcs, VmxOperation
from vtx.x86.profile import load_profile
from vtx.x86.state import Segment

MIB = 1 << 20
# 16-bit: XOR AX, AX; MOV DS, AX; again: LOCK INC WORD [COUNTER]; PAUSE; CMP WORD [COUNTER], 600; JB again; HLT
COUNT_TOGETHER = bytes.fromhex("31c0 8ed8 f0ff060090 f390 813e00905802 72f1 f4 ebfd")
WAIT_TOGETHER = bytes.fromhex("f390 66813d") + COUNTER.to_bytes(4, "little") + bytes.fromhex("5802 72f3")
COUNTING = START + WAIT_TOGETHER + EXIT_0


class Trace(list[TraceEvent]):
    """A tracer that keeps the events."""

    def emit(self, event: TraceEvent) -> None:
        self.append(event)


def test_a_snapshot_can_be_restored_again_and_again() -> None:
    machine = machine_with(1, store(COUNTER, 1) + store(COUNTER, 2) + EXIT_0)
    machine.run(max_instructions=1)
    snapshot = machine.snapshot()
    for _ in range(3):
        assert machine.memory.read_u32(COUNTER) == 1
        assert machine.run().exit_value == 0
        assert machine.memory.read_u32(COUNTER) == 2
        machine.restore(snapshot)
    assert machine.exit_value is None


def test_going_back_and_forth_between_snapshots() -> None:
    machine = Machine(memory=4 * MIB)
    machine.memory.write(0x5000, b"first")
    first = machine.snapshot()
    machine.memory.write(0x5000, b"second")
    machine.memory.write(0x7000, b"new")
    second = machine.snapshot()
    for snapshot, at_5000, at_7000 in ((first, b"first\0", bytes(3)), (second, b"second", b"new")) * 2:
        machine.memory.write(0x9000, b"rubbish")
        machine.restore(snapshot)
        assert machine.memory.read(0x5000, 6) == at_5000
        assert machine.memory.read(0x7000, 3) == at_7000
        assert machine.memory.read(0x9000, 7) == bytes(7)


def test_unchanged_pages_are_shared_between_snapshots() -> None:
    machine = Machine(memory=4 * MIB)
    machine.memory.write(0x5000, b"kept")
    machine.memory.write(0x6000, b"changed")
    first = machine.snapshot()
    machine.memory.write(0x6000, b"CHANGED")
    second = machine.snapshot()
    assert second.ram.pages[5] is first.ram.pages[5]
    assert second.ram.pages[6] is not first.ram.pages[6]


def test_code_of_the_snapshot_is_executed_though_other_code_was_in_its_place() -> None:
    machine = machine_with(1, b"\xb8\x07\x00\x00\x00" + EXIT_0[2:])  # MOV EAX, 7; exit with EAX
    snapshot = machine.snapshot()
    machine.memory.write(0x1001, b"\x09")
    assert machine.run().exit_value == 9
    machine.restore(snapshot)
    assert machine.run().exit_value == 7


def test_code_that_modified_itself_is_as_it_was() -> None:
    # MOV BYTE [1001H], 9 changes the first instruction's operand; the second pass exits with it.
    change = b"\xc6\x05\x01\x10\x00\x00\x09"
    code = b"\xb8\x07\x00\x00\x00" + b"\x3c\x09\x74\x09" + change + b"\xeb\xee" + EXIT_0[2:]
    machine = machine_with(1, code)
    snapshot = machine.snapshot()
    ends = []
    for _ in range(3):
        result = machine.run(max_instructions=100)
        ends.append((result.exit_value, result.instructions, result.ticks))
        machine.restore(snapshot)
    assert ends == [ends[0]] * 3
    assert ends[0][0] == 9


def test_x87_and_sse_state_is_restored() -> None:
    load_xmm0 = bytes.fromhex("0f20e0 0d00020000 0f22e0 b878563412 660f6ec0")  # CR4.OSFXSR; MOVD XMM0, 12345678H
    store_xmm0 = bytes.fromhex("660f7ec0 baf4000000 ef f4")  # MOVD EAX, XMM0; OUT 0F4H, EAX
    machine = machine_with(1, load_xmm0 + b"\x90" * 4 + store_xmm0)
    machine.run(max_instructions=7)
    snapshot = machine.snapshot()
    other = machine_with(1, b"")
    for each in (machine, other):
        each.restore(snapshot)
        assert each.run().exit_value == 0x1234_5678


def test_bounds_and_what_configures_them_are_restored() -> None:
    machine = machine_with(1, bytes.fromhex("660f1b0500900000") + EXIT_0)  # BNDMOV [9000H], BND0
    state = machine.cpu.state
    state.cr4, state.xcr0, state.bndcfgs, state.bndcfgu, state.bndstatus = 1 << 18, 0x1B, 0x5001, 0x6003, 0x7002
    state.lower_bounds[0], state.upper_bounds[0] = 0x1234, 0x5678
    machine.cpu.load_control_state()
    snapshot = machine.snapshot()
    other = machine_with(1, b"")
    for each in (machine, other, machine):
        each.restore(snapshot)
        restored = each.cpu.state
        assert (restored.bndcfgs, restored.bndcfgu, restored.bndstatus) == (0x5001, 0x6003, 0x7002)
        assert each.run().exit_value == 0
        assert each.memory.read_u64(COUNTER) == 0x5678_0000_1234
        restored.lower_bounds[0], restored.upper_bounds[0] = 1, 2  # of the machine, not of the snapshot


def test_translations_that_are_stale_stay_stale() -> None:
    directory, table, page = 0x4000, 0x5000, COUNTER
    load = b"\xa1" + page.to_bytes(4, "little")  # MOV EAX, [page]
    code = load + store(table + 4 * (page >> 12), 0xA003) + load + EXIT_0[2:]
    machine = machine_with(1, code)
    machine.memory.write_u32(directory, table | 3)
    for number in range(256):
        machine.memory.write_u32(table + 4 * number, number << 12 | 3)
    machine.memory.write_u32(page, 1)
    machine.memory.write_u32(0xA000, 2)
    machine.cpu.state.cr0, machine.cpu.state.cr3 = 0x8000_0011, directory
    machine.cpu.load_control_state()
    machine.run(max_instructions=2)
    snapshot = machine.snapshot()
    other = machine_with(1, b"")
    for each in (machine, other):
        each.restore(snapshot)
        assert each.run(max_instructions=100).exit_value == 1
    each.restore(snapshot)
    each.cpu.mmu.invlpg(page)
    assert each.run(max_instructions=100).exit_value == 2


@settings(max_examples=10, deadline=None)
@given(instructions=st.integers(1, 2000))
def test_four_processors_continue_alike(instructions: int) -> None:
    """Compared with a machine that is stopped at the same point, for stopping moves the order of turns."""
    traces, results, snapshot = [], [], None
    for way in ("continue", "continue after a snapshot", "restore"):
        machine = machine_with(4, COUNTING, COUNT_TOGETHER, trace := Trace())
        if way == "restore":
            assert snapshot is not None
            machine.restore(snapshot)
        else:
            machine.run(max_instructions=instructions)
            snapshot = machine.snapshot() if way != "continue" else None
        trace.clear()
        results.append((machine.run(), machine.memory.read_u16(COUNTER), [cpu.now() for cpu in machine.cpus]))
        traces.append(trace)
    assert results == [results[0]] * 3
    assert traces == [traces[0]] * 3
    assert results[0][0].reason is StopReason.DEBUG_EXIT


def test_interprocessor_interrupts_in_flight_are_kept() -> None:
    nmi_to_others = store(ICR, 0x000C_4400)
    machine = machine_with(2, SOFTWARE_ENABLE + nmi_to_others + EXIT_0)
    machine.run(max_instructions=2)
    snapshot = machine.snapshot()
    other = machine_with(2, b"")
    other.restore(snapshot)
    assert [cpu.nmi_pending() for cpu in other.cpus] == [cpu.nmi_pending() for cpu in machine.cpus] == [False, True]


def test_serial_input_and_random_numbers_are_part_of_it() -> None:
    machine = Machine(memory=4 * MIB)
    machine.cpu.random_state = 1234
    machine.feed(b"abc")
    snapshot = machine.snapshot()
    machine.cpu.random_state = 0
    machine.uart.state.received.clear()
    machine.restore(snapshot)
    assert machine.cpu.random_state == 1234
    assert bytes(machine.uart.state.received + machine.uart.state.waiting) == b"abc"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Machine(memory=8 * MIB),
            "the snapshot needs a machine with 4096 KiB for RAM, not 8192 KiB",
        ),
        (Machine(memory=4 * MIB, cpus=2), "the snapshot needs a machine with 1 for processors, not 2"),
        (
            Machine(memory=4 * MIB, profile="everything"),
            "the snapshot needs a machine with skylake-server for the profile, not everything",
        ),
    ],
)
def test_a_machine_of_another_configuration__is_refused(other: Machine, message: str) -> None:
    snapshot = Machine(memory=4 * MIB).snapshot()
    with pytest.raises(SnapshotError) as caught:
        other.restore(snapshot)
    assert str(caught.value) == message


def test_profiles_of_one_name_are_told_apart() -> None:
    profile = load_profile("skylake-server")
    same, different = evolve(profile), evolve(profile, physical_address_width=40)
    snapshot = Machine(memory=4 * MIB, profile=profile).snapshot()
    Machine(memory=4 * MIB, profile=same).restore(snapshot)
    with pytest.raises(SnapshotError, match="not what it was"):
        Machine(memory=4 * MIB, profile=different).restore(snapshot)


# --- Nothing is forgotten ---

SAVED = {
    "Cpu": "state msrs mmu engine random_state halt stop_requested spin monitor wait retired halted _nmi _extra_ticks"
    " transitions_seen init_pending smi_pending vmx virtualization",
    "Mmu": "asid pkru pkrs reserved_page tlb second_level",
    "Tlb": "tag _spaces",
    "Vmx": "operation iret_unblocked_nmi",
    "Machine": "exit_value exit_counts _latest running scheduler cpus cpu board memory image",
    "Scheduler": "turns",
    "MsrFile": "values",
}
BUILT_IN = {
    "Cpu": "index count memory profile platform tracing machine socket",
    "Mmu": "memory physical_address_width page1gb flush_engine amd",
    "Tlb": "_capacity _tags",
    "Vmx": "",
    "Machine": "profile uart tracer _explain _compiled _seed _coherence history power",
    "Scheduler": "_processors _switch",
    "MsrFile": "profile table _bootstrap _bindings",
}
# What is void between two runs, follows from the rest, or is a parameter of the next run.
DERIVED = {
    "Cpu": "reload step_next _approached _planned _until _planned_waiting _gives_way implicit_pages instruction_limit"
    " plan spins contended _fruitless _noted_at",
    "Mmu": "hlat context _registers _seen_second_level _walks _permissions _linear_mask _masking _large_granted"
    " _redirected _number _numbers _next_number",
    "Tlb": "_local _global _find_local _find_global",
    "Vmx": "",
    "Machine": "_interrupted",
    "Scheduler": "_until",
    "MsrFile": "",
}


def test_every_attribute_is_accounted_for() -> None:
    machine = Machine(memory=4 * MIB)
    cpu = machine.cpu
    for each in (cpu, cpu.mmu, cpu.mmu.tlb, cpu.vmx, machine, machine.scheduler, cpu.msrs):
        name = type(each).__name__
        known = " ".join((SAVED[name], BUILT_IN[name], DERIVED[name])).split()
        assert set(vars(each)) - set(known) == set(), f"new attributes of {name}: are they part of a snapshot?"


def test_every_field_of_vmx_is_accounted_for() -> None:
    saved = "vmxon_pointer active current non_root below_threshold pause_loop host_nmi_blocked timer_deadline trap_flag"
    saved += " pending_trap transitions virtual_apic"
    built_in = "processor capabilities observer always_saved_msrs stores_ia32e_mode_guest saves_cet saves_bounds"
    built_in += " saves_uinv"
    derived = "view last_failure"
    assert {each.name for each in fields(VmxOperation)} == set(f"{saved} {built_in} {derived}".split())
    derived = "view second_level virtual_apic context checked"
    assert {each.name for each in fields(ActiveVmcs)} == set(f"pointer vmcs {derived}".split())


# --- A guest of SVM with nested paging ---

VMCB, HOST_SAVE, GUEST_CODE, NESTED_TABLE = 0x5000, 0x6000, 0x3000, 0x4000
RUN_GUEST = bytes.fromhex(
    "b9800000c0 b800100000 31d2 0f30"  # EFER.SVME
    "b9170101c0 b800600000 0f30"  # VM_HSAVE_PA = HOST_SAVE
    "b800500000 0f01d8"  # VMRUN of VMCB
    "a170500000 baf4000000 ef f4"  # OUT 0F4H, EXITCODE
)
COUNT_AND_CALL = bytes.fromhex("b964000000 ff0500900000 49 75f7 0f01d9")  # 100 times INC DWORD [COUNTER]; VMMCALL


def svm_machine() -> Machine:
    machine = Machine(memory=1 << 20, profile="zen-server")
    vmcb = Vmcb()
    for name in ("ES", "CS", "SS", "DS"):
        vmcb[BY_NAME[f"{name} attributes"]] = 0xC9B if name == "CS" else 0xC93
        vmcb[BY_NAME[f"{name} limit"]] = 0xFFFF_FFFF
    intercepts = {"intercept vector 3": 1 << 24, "intercept vector 4": 0b11}  # HLT; VMRUN and VMMCALL
    state = {
        "EFER": 0x1000,
        "CR0": 0x11,
        "RFLAGS": 2,
        "RIP": GUEST_CODE,
        "RSP": 0x8000,
        "DR6": 0xFFFF0FF0,
        "DR7": 0x400,
    }
    nested = {
        "guest ASID": 1,
        "nested paging and encryption control": 1,
        "N_CR3": NESTED_TABLE,
        "G_PAT": 0x7040600070406,
    }
    for name, value in (intercepts | state | nested).items():
        vmcb[BY_NAME[name]] = value
    for address, data in (
        (VMCB, vmcb.to_image()),
        (NESTED_TABLE, (0x87).to_bytes(4, "little")),
        (GUEST_CODE, COUNT_AND_CALL),
        (0x1000, RUN_GUEST),
    ):
        machine.memory.write(address, data)
    cpu = machine.cpu.state
    cpu.cr0, cpu.cr3, cpu.cr4, cpu.rip = 0x8000_0011, NESTED_TABLE, 0x10, 0x1000
    cpu.segments[:] = [Segment(0x10, 0, 0xFFFF_FFFF, 0xC093) for _ in range(6)]
    cpu.segments[1] = Segment(8, 0, 0xFFFF_FFFF, 0xC09B)
    machine.cpu.load_control_state()
    return machine


@pytest.mark.parametrize("instructions", [5, 9, 10, 11, 150, 308, 311])
def test_svm_guest_continues_alike(instructions: int) -> None:
    machine, whole = svm_machine(), svm_machine()
    result = whole.run(max_instructions=1000)
    assert result.exit_value == 0x81
    assert whole.memory.read_u32(COUNTER) == 100
    machine.run(max_instructions=instructions)
    assert machine.cpu.svm.non_root == (9 <= instructions <= 310)
    snapshot = machine.snapshot()
    other = Machine(memory=1 << 20, profile="zen-server")
    for each in (machine, other):
        for _ in range(2):
            each.restore(snapshot)
            assert each.run(max_instructions=1000) == result
            assert each.memory.read_u32(COUNTER) == 100


def test_every_field_of_svm_is_accounted_for() -> None:
    built_in, derived = (
        {"processor", "features", "observer"},
        {"last_failure", "nested", "checked", "avic", "block", "host"},
    )
    beside = {"host_cr4", "host_efer", "structures", "virtual_interrupt"}
    saved = {each.name for each in fields(SavedSvm)} - beside
    assert {each.name for each in fields(SvmOperation)} == saved | built_in | derived
