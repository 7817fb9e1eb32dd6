"""INIT, reset and booting again: what asks for them, what they keep, and where processors go on."""

import pytest
from flat_guest import COUNTER, EXIT_0, ICR, START, machine_with, store, wait_for

from vtx.boot import firmware
from vtx.machine import Machine, RunResult, StopReason
from vtx.x86.state import Activity

MIB = 1 << 20
VISITS = 0x7A00
ICR_INIT_SELF = 0x0004_4500

OUT = {
    "port 92H": "b0 00 e6 92 b0 01 e6 92",  # mov al, 0; out 92h, al; mov al, 1; out 92h, al
    "keyboard pulse": "b0 fe e6 64",
    "keyboard output port": "b0 d1 e6 64 b0 02 e6 60",
    "0CF9H soft": "ba f9 0c b0 00 ee b0 04 ee",
    "0CF9H hard": "ba f9 0c b0 02 ee b0 06 ee",
}
SHUTDOWN_CODE_0AH = "b0 0f e6 70 b0 0a e6 71"
SHUTDOWN_CODE_05H = "b0 0f e6 70 b0 05 e6 71"
RESUME_AT_7C00_80 = "c7 06 67 04 80 7c c7 06 69 04 00 00"  # mov word [467h], 7c80h; mov word [469h], 0
COUNT = "31 c0 8e d8 fe 06 00 7a"  # xor ax, ax; mov ds, ax; inc byte [VISITS]
EXIT = "ba f4 00 66 31 c0 66 ef eb fe"  # leave the machine with 0
END_AFTER_2 = "80 3e 00 7a 02 75 0a" + EXIT  # unless this is the second visit, go on
HALT = "fa f4 eb fc"


def sector(code: str, resume: str = "") -> bytes:
    at_7c00 = bytes.fromhex(code)
    assert len(at_7c00) <= 0x80
    return (at_7c00.ljust(0x80, b"\x90") + bytes.fromhex(resume)).ljust(510, b"\x90") + b"\x55\xaa"


def boot(image: bytes, cpus: int = 1) -> tuple[Machine, RunResult]:
    machine = Machine(memory=2 * MIB, cpus=cpus)
    machine.load(image)
    return machine, machine.run(max_instructions=100_000)


@pytest.mark.parametrize("way", OUT)
@pytest.mark.parametrize("cpus", [1, 2])
def test_restart__boots_the_image_again_with_memory_kept(way: str, cpus: int) -> None:
    machine, result = boot(sector(COUNT + END_AFTER_2 + OUT[way] + HALT), cpus)
    assert result.exit_value == 0, result
    assert machine.memory.read_u8(VISITS) == 2


@pytest.mark.parametrize("way", [way for way in OUT if "hard" not in way])
def test_init__keeps_devices_and_msrs_resets_registers(way: str) -> None:
    machine, result = boot(sector(COUNT + END_AFTER_2 + "b0 5a e6 80" + OUT[way] + HALT))
    assert result.exit_value == 0
    assert machine.board.port_read(0x80, 1) == 0x5A
    assert machine.cpu.state.gpr[3] == 0


def test_hard_reset__puts_devices_and_msrs_into_their_power_up_state() -> None:
    # mov al, 5ah; out 80h, al; mov ecx, 277h (IA32_PAT); xor eax, eax; xor edx, edx; wrmsr
    code = COUNT + END_AFTER_2 + "b0 5a e6 80 66 b9 77 02 00 00 66 31 c0 66 31 d2 0f 30" + OUT["0CF9H hard"] + HALT
    machine, result = boot(sector(code))
    assert result.exit_value == 0
    assert machine.board.port_read(0x80, 1) == 0
    assert machine.cpu.msrs.read(0x277) == 0x0007_0406_0007_0406


@pytest.mark.parametrize(("code", "in_service"), [(SHUTDOWN_CODE_0AH, 1), (SHUTDOWN_CODE_05H, 0)])
@pytest.mark.parametrize("way", OUT)
def test_shutdown_code__resumes_through_the_pointer(way: str, code: str, in_service: int) -> None:
    """Code 05H ends the interrupt in service first; a hard reset leaves none."""
    resume = COUNT + EXIT
    machine = Machine(memory=2 * MIB)
    machine.load(sector(COUNT + code + RESUME_AT_7C00_80 + OUT[way] + HALT, resume))
    machine.board.pic.master.state.isr = 1
    result = machine.run(max_instructions=100_000)
    assert result.exit_value == 0
    assert machine.memory.read_u8(VISITS) == 2
    assert machine.board.rtc.state.cmos[0x0F] == 0
    assert machine.board.pic.master.state.isr == (0 if "hard" in way else in_service)


def test_init__reaches_the_reset_vector_in_rom() -> None:
    machine, _ = boot(sector(HALT))
    machine.cpu.init()
    machine.cpu.run_once()
    state = machine.cpu.state
    assert (state.cs.selector, state.cs.base, state.rip) == (0xF000, 0xFFFF_0000, 0xFFF0)
    assert (state.cr0, state.rflags, state.gpr[2]) == (0x10, 2, machine.profile.signature)  # CD and NW as they were
    machine.cpu.run_once()
    assert machine.cpu.state.cs.base in (0xFFFF_0000, 0xF_0000)


@pytest.mark.parametrize("how", ["init", "reset"])
def test_bounds__are_initial_after_init_and_reset(how: str) -> None:
    """XCR0 is one that INIT keeps."""
    machine, _ = boot(sector(HALT))
    state = machine.cpu.state
    state.lower_bounds[0], state.upper_bounds[3], state.xcr0 = 1, 2, 0x1B
    state.bndcfgs, state.bndcfgu, state.bndstatus = 0x5001, 0x6001, 0x7002
    if how == "init":
        machine.cpu.init()
        machine.cpu.run_once()
    else:
        machine.cpu.reset()
    assert (state.lower_bounds, state.upper_bounds) == ([0] * 4, [0] * 4)
    assert (state.bndcfgs, state.bndcfgu, state.bndstatus) == (0, 0, 0)
    assert state.xcr0 == (0x1B if how == "init" else 1)


def test_init_ipi_to_the_bootstrap_processor() -> None:
    """From protected mode, with a second processor that counts: it waits for a start-up IPI again."""
    machine = machine_with(2, START + wait_for(1) + store(ICR, ICR_INIT_SELF) + b"\xf4\xeb\xfd")
    firmware.install(machine.memory, machine.board.port_write)
    result = machine.run(max_instructions=100_000)
    assert result.reason is StopReason.HALTED
    assert machine.cpu.state.cs.base == 0xF_0000  # no image to boot: firmware's last loop
    assert machine.memory.read_u16(COUNTER) == 1


def test_init_signal__reaches_every_processor() -> None:
    machine = machine_with(3, START + wait_for(2) + bytes.fromhex("b0fee664") + b"\xf4\xeb\xfd")
    machine.run(max_instructions=100_000)
    assert [cpu.state.activity for cpu in machine.cpus[1:]] == [Activity.WAIT_FOR_SIPI] * 2


def test_reset__the_machine_can_be_told_to() -> None:
    machine, result = boot(sector(COUNT + END_AFTER_2 + HALT))
    assert result.reason is StopReason.HALTED
    machine.power.reset()
    assert machine.power.act()
    assert machine.run(max_instructions=100_000).exit_value == 0


def test_reset__leaves_vmx_operation() -> None:
    machine = Machine(memory=2 * MIB)
    machine.load(sector(HALT))
    machine.cpu.vmx.operation.vmxon_pointer = 0x1000
    machine.cpu.state.activity = Activity.HLT
    machine.cpu.init()
    assert not machine.cpu.awake  # INIT is blocked in VMX operation; a reset is not
    machine.cpu.reset()
    assert not machine.cpu.vmx.in_vmx_operation
    assert (machine.cpu.state.rip, machine.cpu.state.cr0) == (0xFFF0, 0x6000_0010)
    assert machine.cpu.awake


def test_triple_fault__is_the_end_all_the_same() -> None:
    # xor ax, ax; mov ds, ax; lidt [7a00h]: with a limit of 0, every interrupt of real-address mode faults; int 10h
    _, result = boot(sector("31 c0 8e d8 0f 01 1e 00 7a cd 10 fa f4"))
    assert result.reason is StopReason.SHUTDOWN


def test_rom__ignores_writes_and_executes() -> None:
    code = store(0xFFFF_F000, 0x1234_5678) + bytes.fromhex("a100f0ffff a300500000") + EXIT_0
    machine = machine_with(1, code)
    before = machine.memory.read_u32(0xFFFF_F000)
    assert machine.run(max_instructions=1000).exit_value == 0
    assert machine.memory.read_u32(0x5000) == before == machine.memory.read_u32(0xFFFF_F000)
