"""MSRs and instructions whose effect needs a whole machine: TSC deadlines, MONITOR and MWAIT, random numbers."""

from __future__ import annotations

import pytest
from flat_guest import COUNTER, EXIT_0, SOFTWARE_ENABLE, START, machine_with, store, wait_for

from vtx.machine import Machine, StopReason

TSC, TSC_ADJUST, TSC_DEADLINE, MISC_ENABLE = 0x10, 0x3B, 0x6E0, 0x1A0
LVT_TIMER, TSC_DEADLINE_MODE = 0xFEE0_0320, 2 << 17
MONITOR_ENABLE = 1 << 18
MONITOR, MWAIT = b"\x0f\x01\xc8", b"\x0f\x01\xc9"


@pytest.mark.parametrize(("index", "offset"), [(TSC_ADJUST, 1_000_000), (TSC, 1_000_000), (TSC_ADJUST, -100)])
def test_tsc_deadline__is_reached_by_the_counter_as_software_has_set_it(index: int, offset: int) -> None:
    machine = machine_with(1, SOFTWARE_ENABLE + store(LVT_TIMER, TSC_DEADLINE_MODE | 0x40) + b"\xeb\xfe")
    machine.run(max_instructions=10)
    msrs, apic, now = machine.cpu.msrs, machine.cpu.socket.apic, machine.cpu.now()
    assert msrs.write(index, offset + now if index == TSC else offset % (1 << 64))
    assert msrs.write(TSC_DEADLINE, offset + now + 70)
    assert apic.next_deadline() == now + 70


@pytest.mark.parametrize("shift", [-30, 400])
def test_moving_the_counter__moves_an_armed_deadline(shift: int) -> None:
    machine = machine_with(1, SOFTWARE_ENABLE + store(LVT_TIMER, TSC_DEADLINE_MODE | 0x40) + b"\xeb\xfe")
    machine.run(max_instructions=10)
    cpu = machine.cpu
    now = cpu.now()
    assert cpu.msrs.write(TSC_DEADLINE, now + 1_000)
    assert cpu.msrs.write(TSC_ADJUST, shift % (1 << 64))
    assert cpu.socket.apic.next_deadline() == now + 1_000 - shift


def code_with(instruction: bytes, ecx: int = 0) -> bytes:
    """MOV EAX, 9000H; MOV ECX; XOR EDX, EDX; the instruction."""
    return b"\xb8\x00\x90\x00\x00\xb9" + ecx.to_bytes(4, "little") + b"\x31\xd2" + instruction + EXIT_0


@pytest.mark.parametrize(
    ("instruction", "ecx", "completes"),
    [(MONITOR, 0, True), (MONITOR, 1, False), (MWAIT, 0, True), (MWAIT, 1, True), (MWAIT, 2, False)],
)
def test_monitor_and_mwait(instruction: bytes, ecx: int, completes: bool) -> None:
    machine = machine_with(1, code_with(instruction, ecx))
    machine.cpu.state.idtr.limit = 0
    expected = StopReason.DEBUG_EXIT if completes else StopReason.SHUTDOWN
    assert machine.run(max_instructions=1000).reason is expected


MONITORX, MWAITX = b"\x0f\x01\xfa", b"\x0f\x01\xfb"


@pytest.mark.parametrize(
    ("instruction", "ecx", "completes"),
    [(MONITORX, 0, True), (MONITORX, 1, False), (MWAITX, 0, True), (MWAITX, 3, True), (MWAITX, 4, False)],
)
def test_monitorx_and_mwaitx(instruction: bytes, ecx: int, completes: bool) -> None:
    machine = machine_with(1, code_with(instruction, ecx), profile="zen-server")
    machine.cpu.state.idtr.limit = 0
    expected = StopReason.DEBUG_EXIT if completes else StopReason.SHUTDOWN
    assert machine.run(max_instructions=1000).reason is expected


@pytest.mark.parametrize("profile", ["everything", "skylake-server", "qemu-epyc"])
@pytest.mark.parametrize("instruction", [MONITORX, MWAITX])
def test_monitorx_and_mwaitx__are_of_amd(instruction: bytes, profile: str) -> None:
    machine = machine_with(1, code_with(instruction), profile=profile)
    machine.cpu.state.idtr.limit = 0
    assert machine.run(max_instructions=1000).reason is StopReason.SHUTDOWN


@pytest.mark.parametrize("instruction", [MONITOR, MWAIT])
def test_monitor_and_mwait_switched_off__are_invalid(instruction: bytes) -> None:
    machine = machine_with(1, code_with(instruction))
    machine.cpu.state.idtr.limit = 0
    msrs = machine.cpu.msrs
    assert msrs.write(MISC_ENABLE, (msrs.read(MISC_ENABLE) or 0) & ~MONITOR_ENABLE)
    assert machine.run(max_instructions=1000).reason is StopReason.SHUTDOWN


class TestRandomNumbers:
    READ = b"\x0f\xc7\xf0\xa3\x00\x90\x00\x00"  # RDRAND EAX; MOV [9000H], EAX

    def number(self, **how: int) -> int:
        machine = Machine(memory=1 << 20, **how)  # type: ignore[arg-type]
        machine.memory.write(0x1000, self.READ + EXIT_0)
        template = machine_with(1, b"").cpu.state
        state = machine.cpu.state
        state.cr0, state.segments, state.rip = template.cr0, template.segments, template.rip
        machine.cpu.load_control_state()
        assert machine.run(max_instructions=100).exit_value == 0
        return machine.memory.read_u32(0x9000)

    def test_follow_from_the_seed(self) -> None:
        numbers = [
            self.number(),
            self.number(seed=0),
            self.number(seed=1),
            self.number(seed=1 << 63),
            self.number(seed=1),
        ]
        assert numbers[0] == numbers[1]
        assert numbers[2] == numbers[4]
        assert len(set(numbers)) == 3

    def test_processors_draw_from_different_sequences(self) -> None:
        # 16-bit: XOR AX, AX; MOV DS, AX; RDRAND EAX; MOV [9004H], EAX; INC WORD [9000H]; HLT
        others = bytes.fromhex("31c0 8ed8 660fc7f0 66a30490 ff060090 f4")
        first = b"\x0f\xc7\xf0\xa3\x08\x90\x00\x00"  # RDRAND EAX; MOV [9008H], EAX
        machine = machine_with(2, first + START + wait_for(1) + EXIT_0, others)
        assert machine.run(max_instructions=100_000).exit_value == 0
        assert machine.memory.read_u32(COUNTER + 4) != machine.memory.read_u32(COUNTER + 8)
