"""System-management mode in whole machines: SMIs by port and by IPI, the save-state map, RSM, relocation, blocking."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from flat_guest import COUNTER, EXIT_0, ICR, SOFTWARE_ENABLE, START, machine_with, store, wait_for

from vtx.events import SmmEntered, SmmLeft, TraceEvent
from vtx.machine import Machine, StopReason
from vtx.x86.state import Activity, Segment

SMBASE = 0x3_0000
HANDLER = SMBASE + 0x8000
SELF_SMI, OTHERS_SMI = 0x0004_0200, 0x000C_0200
OUT_B2 = b"\xe6\xb2"
RSM = b"\x0f\xaa"
# 16-bit code of a handler: MOV [SI], imm etc. go through DS, which is flat from 0.
INC_COUNTER = bytes.fromhex("66 67 ff 05") + COUNTER.to_bytes(4, "little")  # INC DWORD [9000H]
PROBE = COUNTER + 0x10

# Offsets from SMBASE + 8000H, typed from the manual's table.
INTEL = {
    "CR0": (0x7FF8, 8),
    "CR3": (0x7FF0, 8),
    "RFLAGS": (0x7FE8, 8),
    "EFER": (0x7FE0, 8),
    "RIP": (0x7FD8, 8),
    "DR6": (0x7FD0, 8),
    "DR7": (0x7FC8, 8),
    "TR": (0x7FC4, 4),
    "LDTR": (0x7FC0, 4),
    "GS": (0x7FBC, 4),
    "FS": (0x7FB8, 4),
    "DS": (0x7FB4, 4),
    "SS": (0x7FB0, 4),
    "CS": (0x7FAC, 4),
    "ES": (0x7FA8, 4),
    "RDI": (0x7F94, 8),
    "RSI": (0x7F8C, 8),
    "RBP": (0x7F84, 8),
    "RSP": (0x7F7C, 8),
    "RBX": (0x7F74, 8),
    "RDX": (0x7F6C, 8),
    "RCX": (0x7F64, 8),
    "RAX": (0x7F5C, 8),
    "R8": (0x7F54, 8),
    "R15": (0x7F1C, 8),
    "auto HALT": (0x7F02, 2),
    "I/O restart": (0x7F00, 2),
    "revision": (0x7EFC, 4),
    "SMBASE": (0x7EF8, 4),
    "enable EPT": (0x7EE0, 4),
    "LDT base low": (0x7E9C, 4),
    "IDT base low": (0x7E94, 4),
    "GDT base low": (0x7E8C, 4),
    "BNDCFGS": (0x7ED0, 8),
    "CR4": (0x7E40, 4),
    "IDT base high": (0x7DD8, 4),
    "LDT base high": (0x7DD4, 4),
    "GDT base high": (0x7DD0, 4),
}


def saved(machine: Machine, name: str, smbase: int = SMBASE) -> int:
    offset, size = INTEL[name]
    return int.from_bytes(machine.memory.read(smbase + 0x8000 + offset, size), "little")


def store_in_map(name: str, value: int) -> bytes:
    """16-bit code: MOV DWORD [the low half of that row of the map], value."""
    address = HANDLER + INTEL[name][0]
    return bytes.fromhex("66 67 c7 05") + struct.pack("<II", address, value & 0xFFFF_FFFF)


def smm_machine(code: bytes, handler: bytes = INC_COUNTER + RSM, cpus: int = 1) -> Machine:
    machine = machine_with(cpus, code)
    machine.memory.write(HANDLER, handler)
    return machine


def run(machine: Machine) -> Machine:
    result = machine.run(max_instructions=200_000)
    assert (result.reason, result.exit_value) == (StopReason.DEBUG_EXIT, 0), result.message
    return machine


TRIGGERS = {"port": OUT_B2, "IPI": SOFTWARE_ENABLE + store(ICR, SELF_SMI) + b"\xeb\x00"}


@pytest.fixture(params=TRIGGERS)
def trigger(request: pytest.FixtureRequest) -> Iterator[bytes]:
    yield TRIGGERS[request.param]


def test_smi__runs_the_handler_once_and_goes_on(trigger: bytes) -> None:
    machine = run(smm_machine(trigger + EXIT_0))
    assert machine.memory.read_u32(COUNTER) == 1
    assert machine.cpu.state.smm is None


def test_without_a_handler_of_ones_own__that_of_firmware_resumes() -> None:
    machine = Machine(memory=2 << 20)
    machine.load(b"\xfa" + OUT_B2 + b"\x90\x31\xc0\xe7\xf4" + bytes(502) + b"\x55\xaa")
    assert machine.run(max_instructions=10_000).exit_value is not None
    assert saved(machine, "SMBASE") == SMBASE


def test_map__shows_what_was_interrupted() -> None:
    machine = smm_machine(OUT_B2 + EXIT_0)
    state = machine.cpu.state
    state.gpr[:] = [0x1000 + number for number in range(16)]
    state.gdtr.base, state.idtr.base, state.ldtr.base = 0x1_2345_6789, 0x2_AAAA_0000, 0x3_BBBB_0000
    state.ldtr.selector, state.tr.selector = 0x58, 0x60
    state.segments[4].selector, state.segments[5].selector = 0x23, 0x2B
    state.dr6, state.dr7, state.cr3, state.cr4 = 0xFFFF_4FF1, 0x700, 0x7000, 0x600
    machine.cpu.load_control_state()
    run(machine)
    expected = {
        "CR0": 0x11,
        "CR3": 0x7000,
        "CR4": 0x600,
        "EFER": 0,
        "DR6": 0xFFFF_4FF1,
        "DR7": 0x700,
        "RFLAGS": 2,
        "RAX": 0x1000,
        "RCX": 0x1001,
        "RDX": 0x1002,
        "RBX": 0x1003,
        "RSP": 0x1004,
        "RBP": 0x1005,
        "RSI": 0x1006,
        "RDI": 0x1007,
        "R8": 0x1008,
        "R15": 0x100F,
        "CS": 8,
        "DS": 0x10,
        "ES": 0x10,
        "SS": 0x10,
        "FS": 0x23,
        "GS": 0x2B,
        "LDTR": 0x58,
        "TR": 0x60,
        "GDT base low": 0x2345_6789,
        "GDT base high": 1,
        "IDT base low": 0xAAAA_0000,
        "IDT base high": 2,
        "LDT base low": 0xBBBB_0000,
        "LDT base high": 3,
        "auto HALT": 0,
        "I/O restart": 0,
        "SMBASE": SMBASE,
        "revision": 0x2_0100,
        "enable EPT": 0,
    }
    assert {name: saved(machine, name) for name in expected} == expected
    assert saved(machine, "RIP") == 0x1002


@pytest.mark.parametrize(
    ("left", "back"),
    [
        (None, 0x0000_7FFF_0000_5003),
        (0, 0),
        (0x7001, 0x7001),
        # bits 11:2 are cleared, the highest bit of a linear address is extended
        (0x8765_0000_0000_0FFF, 3),
        (0x8000_0000_1000, 0xFFFF_8000_0000_1000),
    ],
)
def test_bounds_configuration__is_saved_cleared_and_restored(left: int | None, back: int) -> None:
    """``left``: what the handler, which begins with HLT, finds replaced in the map."""
    machine = smm_machine(OUT_B2 + b"\xf4", RSM)
    state = machine.cpu.state
    state.bndcfgs, state.bndcfgu, state.bndstatus = 0x0000_7FFF_0000_5003, 0x9003, 0x8001
    state.lower_bounds[1], state.upper_bounds[2] = 5, 6
    while state.smm is None:
        machine.cpu.run_once()
    assert saved(machine, "BNDCFGS") == 0x0000_7FFF_0000_5003
    assert (state.bndcfgs, machine.cpu.msrs.read(0xD90)) == (0, 0)
    if left is not None:
        machine.memory.write_u64(HANDLER + INTEL["BNDCFGS"][0], left)
    while state.smm is not None:
        machine.cpu.run_once()
    assert state.bndcfgs == back
    assert (state.bndcfgu, state.bndstatus) == (0x9003, 0x8001)
    assert (state.lower_bounds, state.upper_bounds) == ([0, 5, 0, 0], [0, 0, 6, 0])


def test_bounds_configuration__is_nothing_to_a_processor_without_it() -> None:
    machine = Machine(memory=2 << 20, profile="nehalem-server")
    machine.load(b"\xfa" + OUT_B2 + b"\xf4" + bytes(506) + b"\x55\xaa")
    machine.memory.write(HANDLER, RSM)
    state = machine.cpu.state
    while state.smm is None:
        machine.cpu.run_once()
    machine.memory.write_u64(HANDLER + INTEL["BNDCFGS"][0], 0x7001)
    while state.smm is not None:
        machine.cpu.run_once()
    assert state.bndcfgs == 0


def test_handler__finds_the_initial_environment() -> None:
    machine = smm_machine(OUT_B2 + EXIT_0, b"\xf4")
    state = machine.cpu.state
    state.cr0 |= 0x8_002E & 0x2C  # EM, TS
    state.cr4, state.dr7, state.rflags = 0x600, 0x4AA, 0x203
    machine.cpu.load_control_state()
    while state.smm is None:
        machine.cpu.run_once()
    assert (state.rip, state.rflags, state.cr4, state.efer, state.dr7) == (0x8000, 2, 0, 0, 0x400)
    assert state.cr0 & 0x8000_000D == 0
    assert (state.cs.selector, state.cs.base, state.cs.limit) == (0x3000, SMBASE, 0xFFFF_FFFF)
    others = [state.segments[n] for n in (0, 2, 3, 4, 5)]
    assert {(segment.selector, segment.base, segment.limit) for segment in others} == {(0, 0, 0xFFFF_FFFF)}
    assert (state.nmi_blocked, state.code_bits) == (True, 16)


def test_registers__come_back_as_the_handler_left_them_in_smram() -> None:
    new_rip = 0x1100
    handler = store_in_map("RBX", 0xCAFE) + store_in_map("RIP", new_rip) + store_in_map("RFLAGS", 0xD7) + RSM
    machine = smm_machine(OUT_B2 + b"\xeb\xfe", handler)
    machine.memory.write(
        new_rip, b"\x89\x1d" + struct.pack("<I", PROBE) + b"\x9c\x8f\x05" + struct.pack("<I", PROBE + 4) + EXIT_0
    )
    run(machine)
    assert machine.memory.read_u32(PROBE) == 0xCAFE
    assert machine.memory.read_u32(PROBE + 4) == 0xD7


def test_hidden_parts_of_segments__survive() -> None:
    machine = smm_machine(OUT_B2 + b"\x64\xa1\x00\x00\x00\x00\xa3" + struct.pack("<I", PROBE) + EXIT_0)
    machine.cpu.state.segments[4] = Segment(0x77, 0x9100, 0xFFFF, 0x40F3)  # FS, whose base is in no table
    machine.memory.write_u32(0x9100, 0x1234_5678)
    machine.cpu.load_control_state()
    assert run(machine).memory.read_u32(PROBE) == 0x1234_5678


def test_relocated_smbase__counts_from_the_next_smi() -> None:
    machine = smm_machine(OUT_B2 + OUT_B2 + EXIT_0, store_in_map("SMBASE", 0x5_0000) + RSM)
    machine.memory.write(0x5_8000, INC_COUNTER + RSM)
    run(machine)
    assert machine.memory.read_u32(COUNTER) == 1
    assert saved(machine, "SMBASE", 0x5_0000) == 0x5_0000
    assert machine.cpu.state.smbase == 0x5_0000


def test_trace__tells_when_smm_is_entered_and_left() -> None:
    seen: list[tuple[str, int]] = []

    class Recorder:
        def emit(self, event: TraceEvent) -> None:
            if isinstance(event, SmmEntered | SmmLeft):
                seen.append((event.name, event.rip))

    machine = machine_with(1, OUT_B2 + EXIT_0, tracer=Recorder())
    machine.memory.write(HANDLER, INC_COUNTER + RSM)
    run(machine)
    assert seen == [("smm_entered", 0x1002), ("smm_left", 0x1002)]


class TestHalted:
    """Auto HALT restart."""

    @staticmethod
    def machine(handler: bytes) -> Machine:
        # Processor 1 halts; processor 0 sends it an SMI, then waits for the counter and for a mark behind the HLT.
        others = bytes.fromhex("31c0 8ed8 f4 ff061090 f4")  # XOR AX, AX; MOV DS, AX; HLT; INC WORD [9010H]; HLT
        delay = b"\xb9\x00\x10\x00\x00\xf3\x90\xe2\xfc"  # MOV ECX, 1000H; PAUSE; LOOP
        machine = machine_with(2, START + delay + store(ICR, OTHERS_SMI) + wait_for(1) + delay + EXIT_0, others)
        machine.memory.write(HANDLER, handler)
        return run(machine)

    def test_goes_back_to_sleep(self) -> None:
        machine = self.machine(INC_COUNTER + RSM)
        assert saved(machine, "auto HALT") == 1
        assert (machine.memory.read_u16(PROBE), machine.cpus[1].state.activity) == (0, Activity.HLT)

    def test_goes_on_behind_the_hlt_if_the_handler_says_so(self) -> None:
        clear = bytes.fromhex("67 c7 05") + struct.pack("<IH", HANDLER + INTEL["auto HALT"][0], 0)
        assert self.machine(clear + INC_COUNTER + RSM).memory.read_u16(PROBE) == 1


class TestBlocking:
    def test_smi_in_the_handler__comes_after_rsm(self) -> None:
        # The first time, the handler causes another SMI before it counts.
        handler = bytes.fromhex("66 67 83 3d") + struct.pack("<I", COUNTER) + b"\x00\x75\x02" + OUT_B2
        machine = run(smm_machine(OUT_B2 + EXIT_0, handler + INC_COUNTER + RSM))
        assert machine.memory.read_u32(COUNTER) == 2

    def test_nmi_in_the_handler__comes_after_rsm(self) -> None:
        machine = smm_machine(OUT_B2 + b"\xeb\x00\xeb\xfe", INC_COUNTER + b"\xeb\xfe")
        cpu = machine.cpu
        cpu.state.idtr.limit = 0
        machine.run(max_instructions=50)
        assert cpu.state.smm is not None
        cpu.nmi()
        machine.run(max_instructions=100)
        assert (cpu.state.smm is not None, cpu.nmi_pending()) == (True, True)
        machine.memory.write(HANDLER + len(INC_COUNTER), RSM)
        assert machine.run(max_instructions=200).reason is StopReason.SHUTDOWN  # taken, without an IDT
        assert cpu.state.smm is None

    def test_init_in_the_handler__waits_for_rsm(self) -> None:
        machine = smm_machine(OUT_B2 + b"\xeb\xfe", b"\xeb\xfe")
        machine.run(max_instructions=20)
        machine.cpu.init()
        machine.run(max_instructions=40)
        assert machine.cpu.init_pending and machine.cpu.state.smm is not None

    def test_smi_after_mov_ss__waits_for_the_next_instruction(self) -> None:
        machine = smm_machine(b"\x90" * 8, b"\xf4")
        cpu = machine.cpu
        cpu.state.shadow = type(cpu.state.shadow)(2)
        cpu.smi()
        cpu.step_next = True
        for _ in range(4):
            cpu.run_once()
            cpu.step_next = True
        assert cpu.state.smm is not None
        assert saved(machine, "RIP") == 0x1001

    def test_waiting_for_a_start_up_ipi__no_smi_is_taken(self) -> None:
        delay = b"\xb9\x00\x10\x00\x00\xf3\x90\xe2\xfc"
        machine = run(smm_machine(SOFTWARE_ENABLE + store(ICR, OTHERS_SMI) + delay + EXIT_0, cpus=2))
        assert machine.memory.read_u32(COUNTER) == 0
        assert machine.cpus[1].state.activity is Activity.WAIT_FOR_SIPI


def test_rsm_outside_smm__is_invalid() -> None:
    machine = smm_machine(RSM + EXIT_0)
    machine.cpu.state.idtr.limit = 0
    assert machine.run(max_instructions=100).reason is StopReason.SHUTDOWN


BAD = {
    "CR0.PG is set without CR0.PE": ("CR0", 0x8000_0010),
    "CR0.NW is set without CR0.CD": ("CR0", 0x2000_0011),
    "CR4 has reserved bits set": ("CR4", 1 << 19),
    "CR4.VMXE is set": ("CR4", 1 << 13),
    "CR4.PCIDE is set outside IA-32e mode": ("CR4", 1 << 17),
    "CR4.PAE is clear in IA-32e mode": ("EFER", 0x500),
    "IA32_EFER has reserved bits set": ("EFER", 1 << 13),
}


@pytest.mark.parametrize("problem", BAD)
def test_rsm__with_an_illegal_state_is_shutdown(problem: str) -> None:
    row, value = BAD[problem]
    handler = store_in_map(row, value)
    if row == "EFER" and value & 0x100:
        handler += store_in_map("CR0", 0x8000_0011)
    machine = smm_machine(OUT_B2 + EXIT_0, handler + RSM)
    result = machine.run(max_instructions=1000)
    assert (result.reason, result.message) == (StopReason.SHUTDOWN, f"RSM from system-management mode: {problem}")


def test_cr4_vmxe_in_smm__faults() -> None:
    set_vmxe = bytes.fromhex("66b800200000 0f22e0")  # MOV EAX, 2000H; MOV CR4, EAX
    machine = smm_machine(OUT_B2 + EXIT_0, set_vmxe + RSM)
    machine.cpu.state.idtr.limit = 0
    assert "triple fault" in machine.run(max_instructions=1000).message


def test_snapshot_in_the_handler__resumes_alike() -> None:
    machine = smm_machine(OUT_B2 + EXIT_0, b"\x90" * 20 + INC_COUNTER + RSM)
    machine.run(max_instructions=12)
    assert machine.cpu.state.smm is not None
    snapshot = machine.snapshot()
    first = run(machine).cpu.now()
    machine.restore(snapshot)
    assert machine.cpu.state.smm is not None
    assert run(machine).cpu.now() == first
    assert machine.memory.read_u32(COUNTER) == 1


class TestAmd:
    """The other map, and the global interrupt flag."""

    RIP, RFLAGS, RAX, CS_BASE, REVISION = 0xFF78, 0xFF70, 0xFFF8, 0xFE18, 0xFEFC

    @staticmethod
    def machine(code: bytes) -> Machine:
        machine = machine_with(1, code, profile="zen-server")
        machine.memory.write(HANDLER, INC_COUNTER + RSM)
        return machine

    def test_map(self) -> None:
        machine = self.machine(OUT_B2 + EXIT_0)
        machine.cpu.state.gpr[0] = 0xABCD
        memory = run(machine).memory
        assert memory.read_u32(COUNTER) == 1
        rows = (self.RIP, self.RFLAGS, self.RAX, self.CS_BASE)
        assert [memory.read_u64(SMBASE + offset) for offset in rows] == [0x1002, 2, 0xABCD, 0]
        assert memory.read_u32(SMBASE + self.REVISION) == 0x2_0064
        assert memory.read_u16(SMBASE + 0xFE10) == 8

    def test_smi_waits_while_the_global_interrupt_flag_is_clear(self) -> None:
        machine = self.machine(OUT_B2 + b"\x90\xeb\xfe")
        machine.cpu.state.gif = False
        machine.run(max_instructions=10)
        assert (machine.cpu.smi_pending, machine.memory.read_u32(COUNTER)) == (True, 0)
        machine.cpu.state.gif = True
        machine.run(max_instructions=20)
        assert (machine.cpu.smi_pending, machine.memory.read_u32(COUNTER)) == (False, 1)

    def test_smi_wakes_a_halted_processor_which_sleeps_on(self) -> None:
        machine = self.machine(b"\xf4")
        machine.run(max_instructions=10)
        cpu = machine.cpu
        assert cpu.state.activity is Activity.HLT
        cpu.halt = None
        cpu.smi()
        machine.run(max_instructions=20)
        assert (machine.memory.read_u32(COUNTER), cpu.state.activity) == (1, Activity.HLT)
