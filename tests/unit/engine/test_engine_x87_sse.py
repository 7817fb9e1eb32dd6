"""The x87/SSE registers that the model reads and writes are those that FXSAVE64 stores and FXRSTOR64 loads."""

from __future__ import annotations

from vtx.bench.hypervisor import HOST_CODE, elf64
from vtx.bench.listing import code
from vtx.machine import Machine

AREA = 0x40_0000
ENABLE = code("""\
0f 20 e0                        ; mov rax,cr4
0d 00 06 00 00                  ; or eax,600h
0f 22 e0                        ; mov cr4,rax
""")
STORE = bytes.fromhex("480fae0425") + AREA.to_bytes(4, "little")  # fxsave64 [AREA]
STOP = bytes.fromhex("31c0baf4000000ef")  # xor eax,eax; mov edx,0F4h; out dx,eax
FILL = code("""\
48 0f ae 0c 25 00 10 40 00      ; fxrstor64 [401000h]
d9 e8                           ; fld1
""")


def run(program: bytes, area: bytes = b"") -> Machine:
    machine = Machine(memory=16 << 20)
    machine.load(elf64({HOST_CODE: program + STOP}))
    machine.memory.write(AREA + 0x1000, area)
    assert machine.run(max_instructions=1000).exit_value == 0
    return machine


def pattern() -> bytearray:
    """An area with values of its own everywhere: TOP 5, one register full, rounding up, denormals flushed."""
    area = bytearray(range(256)) * 2
    area[0:8] = bytes.fromhex("7f0b002801000000")  # FCW, FSW, FTW, FOP
    area[8:24] = bytes(16)
    area[24:32] = bytes.fromhex("c0df0000ffff0000")
    for number in range(8):
        area[42 + 16 * number : 48 + 16 * number] = bytes(6)
    return area


def test_power_up__is_that_of_the_architecture() -> None:
    machine = run(ENABLE + STORE)
    stored = machine.memory.read(AREA, 416)
    assert stored[:28] == bytes.fromhex("40000000ff000000" + 32 * "0" + "801f0000")
    assert stored[32:] == bytes(384)
    assert machine.cpu.engine.legacy_area() == stored


def test_reading__gives_what_code_stores() -> None:
    machine = run(ENABLE + FILL + STORE, bytes(pattern()))
    assert machine.cpu.engine.legacy_area() == machine.memory.read(AREA, 416)
    assert machine.memory.read(AREA + 32, 10) == bytes.fromhex("0000000000000080ff3f")


def test_writing__is_what_code_stores() -> None:
    area = bytes(pattern()[:416])
    machine = Machine(memory=16 << 20)
    machine.load(elf64({HOST_CODE: ENABLE + STORE + STOP}))
    machine.cpu.engine.set_legacy_area(area)
    assert machine.run(max_instructions=1000).exit_value == 0
    assert machine.memory.read(AREA, 416) == area
    assert machine.cpu.engine.legacy_area() == area


def test_writing__sets_rounding() -> None:
    """1/3 rounded up (MXCSR.RC = 2) and down (1) differ in the last bit."""
    divide = code("""\
b8 01 00 00 00                  ; mov eax,1
f2 0f 2a c0                     ; cvtsi2sd xmm0,eax
b8 03 00 00 00                  ; mov eax,3
f2 0f 2a c8                     ; cvtsi2sd xmm1,eax
f2 0f 5e c1                     ; divsd xmm0,xmm1
f2 0f 11 04 25 00 00 40 00      ; movsd [400000h],xmm0
""")
    results = []
    for rounding in (1, 2):
        area = bytearray(416)
        area[0:8] = bytes.fromhex("7f03000000000000")
        area[24:28] = (0x1F80 | rounding << 13).to_bytes(4, "little")
        machine = Machine(memory=16 << 20)
        machine.load(elf64({HOST_CODE: ENABLE + divide + STOP}))
        machine.cpu.engine.set_legacy_area(bytes(area))
        assert machine.run(max_instructions=1000).exit_value == 0
        results.append(machine.memory.read_u64(AREA))
    assert results == [0x3FD5_5555_5555_5555, 0x3FD5_5555_5555_5556]
