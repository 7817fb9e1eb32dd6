"""What firmware leaves behind: tables by their layout, stubs by running them on a machine."""

import struct

from vtx.boot import firmware
from vtx.machine import Machine, StopReason
from vtx.x86.memory import PhysicalMemory

MIB = 1 << 20


def installed(size: int = 2 * MIB) -> tuple[PhysicalMemory, list[tuple[int, int, int]]]:
    memory, writes = PhysicalMemory(size), []
    firmware.install(memory, lambda *write: writes.append(write))
    return memory, writes


def boot_sector(code: bytes) -> bytes:
    return code.ljust(510, b"\x90") + b"\x55\xaa"


def run(code: str) -> Machine:
    """Run a boot sector of these bytes until it halts with interrupts off."""
    machine = Machine(memory=2 * MIB)
    machine.load(boot_sector(bytes.fromhex(code)))
    result = machine.run(max_instructions=100_000)
    assert result.reason is StopReason.HALTED, result
    return machine


def test_every_vector_leads_to_code() -> None:
    memory, _ = installed()
    for vector in range(256):
        offset, segment = struct.unpack("<HH", memory.read(4 * vector, 4))
        assert segment == 0xF000
        assert memory.read((segment << 4) + offset, 1) in (b"\xcf", b"\x50", b"\x1e")


def test_data_area() -> None:
    memory, _ = installed()
    assert memory.read_u16(0x400) == 0x3F8
    assert memory.read_u16(0x402) == 0
    assert memory.read_u16(0x40E) == 0x9FC0
    assert memory.read_u8(0x9FC00) == 1
    assert memory.read_u16(0x410) == 0x0202  # x87, one serial port
    assert memory.read_u16(0x413) == 639
    assert (memory.read_u16(0x480), memory.read_u16(0x482)) == (0x1E, 0x3E)
    assert memory.read_u16(0x41A) == memory.read_u16(0x41C) == 0x1E
    assert memory.read_u8(0xFFFFE) == 0xFC


def test_small_memory_is_left_alone() -> None:
    memory, writes = installed(256 << 10)
    assert memory.read(0, 0x500) == bytes(0x500)
    assert {(port, size) for port, size, _ in writes} >= {(0x21, 1), (0x43, 1), (0x71, 1)}


def test_initialization_words_and_clock() -> None:
    """As data sheets have them: the slave on input 2, 8086 mode, normal end of interrupt; 32768 Hz, 24 hours, BCD."""
    _, writes = installed()
    by_port = {port: [value for at, _, value in writes if at == port] for port, _, _ in writes}
    assert by_port[0x20] == by_port[0xA0] == [0x11]
    assert by_port[0x21] == [0x08, 0x04, 0x01, 0xFA]
    assert by_port[0xA1] == [0x70, 0x02, 0x01, 0xFF]
    assert by_port[0x4D0] == by_port[0x4D1] == [0]
    assert (by_port[0x43], by_port[0x40]) == ([0x36], [0, 0])
    assert dict(zip(by_port[0x70], by_port[0x71], strict=True)) == {0x0A: 0x26, 0x0B: 0x02}
    assert all(size == 1 for _, size, _ in writes)


def test_controllers_and_timer() -> None:
    machine = Machine(memory=2 * MIB)
    firmware.install(machine.memory, machine.board.port_write)
    pic = machine.board.pic
    assert (pic.master.state.vector_base, pic.slave.state.vector_base) == (0x08, 0x70)
    assert (pic.master.state.imr, pic.slave.state.imr) == (0xFA, 0xFF)
    assert pic.master.state.level_triggered == pic.slave.state.level_triggered == 0
    assert not pic.pending()
    period = 65536 * machine.profile.tsc_frequency // 1_193_182
    assert abs(machine.board.next_deadline() - period // 2) < 5000


def test_software_interrupts_return_with_all_registers() -> None:
    # mov ax, 1234h; mov bx, 5678h; then int 10h, 13h, 15h, 16h, 1Ah; cli; hlt
    machine = run("b8 34 12 bb 78 56 cd 10 cd 13 cd 15 cd 16 cd 1a fa f4")
    assert machine.cpu.state.gpr[0] & 0xFFFF == 0x1234
    assert machine.cpu.state.gpr[3] & 0xFFFF == 0x5678


def test_timer_interrupt_counts_ticks() -> None:
    # xor ax, ax; mov ds, ax; mov cx, 3; sti; hlt; loop back to hlt; cli; hlt
    machine = run("31 c0 8e d8 b9 03 00 fb f4 e2 fd fa f4")
    assert machine.memory.read_u32(0x46C) == 3
    assert machine.board.pic.master.state.isr == 0
    tick = machine.profile.tsc_frequency * 65536 // 1_193_182
    # The machine stands still for good only after the next tick, which nobody takes.
    assert 4 * tick < machine.cpu.now() < 4 * tick + 20_000
    assert machine.cpu.state.gpr[4] & 0xFFFF == 0x7C00


def test_other_interrupts_are_ended_at_both_controllers() -> None:
    # mov al, 0; out A1h, al; mov al, 1; out 21h, al (all but the timer open)
    # mov dx, 200Bh; out dx, al; mov dx, 2004h; out dx, al; sti; nop; nop; nop; cli; hlt
    machine = run("b0 00 e6 a1 b0 01 e6 21 ba 0b 20 ee ba 04 20 ee fb 90 90 90 fa f4")
    pic = machine.board.pic
    assert (pic.master.state.irr, pic.slave.state.irr) == (0, 0)
    assert (pic.master.state.isr, pic.slave.state.isr) == (0, 0)


def test_jump_to_the_reset_vector_boots_again() -> None:
    # inc byte [7a00h]; cmp byte [7a00h], 3; je to the cli; jmp f000:fff0; cli; hlt
    machine = run("fe 06 00 7a 80 3e 00 7a 03 74 05 ea f0 ff 00 f0 fa f4")
    assert machine.memory.read_u8(0x7A00) == 3
    assert machine.cpu.state.segments[1].selector == 0


def test_rom_is_the_copy_below_1_mib() -> None:
    memory, _ = installed()
    page = memory.read(0xFF000, 0x1000)
    assert page == firmware.rom()
    assert page[0xFF0:0xFF5] == bytes.fromhex("ea 00 f0 00 f0")  # jmp f000:f000
    machine = Machine(memory=2 * MIB)
    assert machine.memory.read(0xFFFF_F000, 0x1000) == page


def test_rom_is_below_1_mib_itself_where_ram_does_not_reach() -> None:
    machine = Machine(memory=256 << 10)
    assert machine.memory.read(0xFFFF0, 5) == machine.memory.read(0xFFFF_FFF0, 5) == bytes.fromhex("ea 00 f0 00 f0")
    assert machine.memory.read(0xFE000, 4) == b"\xff" * 4


def test_halt_with_interrupts_off_ends_the_run_though_the_timer_runs() -> None:
    machine = run("fa f4")
    assert machine.cpu.now() < machine.profile.tsc_frequency // 10


def test_halt_of_all_processors_ends_the_run() -> None:
    machine = Machine(memory=2 * MIB, cpus=2)
    machine.load(boot_sector(bytes.fromhex("fa f4")))
    assert machine.run().reason is StopReason.HALTED
