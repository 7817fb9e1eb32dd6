"""Guests written as bytes, instruction by instruction, for machines of several processors."""

from vtx.events import Tracer
from vtx.machine import Machine
from vtx.x86.profile import DEFAULT_PROFILE
from vtx.x86.state import Segment

ICR = 0xFEE0_0300
INIT_OTHERS, START_OTHERS_AT_8000 = 0x000C_4500, 0x000C_4608
COUNTER = 0x9000


def store(address: int, value: int) -> bytes:
    """MOV DWORD [address], value in 32-bit code."""
    return b"\xc7\x05" + address.to_bytes(4, "little") + value.to_bytes(4, "little")


SOFTWARE_ENABLE = store(0xFEE0_00F0, 0x1FF)
EXIT_0 = bytes.fromhex("31c0 baf4000000 ef f4")  # XOR EAX, EAX; MOV EDX, 0F4H; OUT DX, EAX; HLT


def wait_for(count: int) -> bytes:
    """PAUSE; CMP WORD [COUNTER], count; JNE to the PAUSE."""
    return bytes.fromhex("f390 66813d") + COUNTER.to_bytes(4, "little") + count.to_bytes(2, "little") + b"\x75\xf3"


COUNT_AND_HALT = bytes.fromhex("31c0 8ed8 f0ff060090 f4 ebfd")  # 16-bit: XOR AX, AX; MOV DS, AX; LOCK INC [9000H]; HLT


def machine_with(
    cpus: int,
    code: bytes,
    start_up_code: bytes = COUNT_AND_HALT,
    tracer: Tracer | None = None,
    *,
    profile: str = DEFAULT_PROFILE,
) -> Machine:
    """Processor 0 is about to execute ``code`` in flat 32-bit protected mode; the others find theirs at 8000H."""
    machine = Machine(profile=profile, cpus=cpus, memory=1 << 20, tracer=tracer)
    machine.memory.write(0x1000, code)
    machine.memory.write(0x8000, start_up_code)
    state = machine.cpu.state
    state.cr0 = 0x11
    state.segments = [Segment(0x10, 0, 0xFFFF_FFFF, 0xC093) for _ in range(6)]
    state.segments[1] = Segment(8, 0, 0xFFFF_FFFF, 0xC09B)
    state.rip = 0x1000
    state.gpr[4] = 0x7000
    machine.cpu.load_control_state()
    return machine


START = SOFTWARE_ENABLE + store(ICR, INIT_OTHERS) + store(ICR, START_OTHERS_AT_8000)
