"""INVLPGB and TLBSYNC: operands, faults and intercepts, and what they make which processor forget."""

from __future__ import annotations

from typing import Any

import pytest
from svm_guest import MEMORY, VMMCALL, guest_machine, stored, until_exit
from svm_machine import GUEST_RIP, HOST_RIP, PAGE_TABLES
from svm_machine import Machine as Bench

from vtx.machine import Machine
from vtx.x86.event import Event
from vtx.x86.outcome import Vector
from vtx.x86.paging import Translation
from vtx.x86.profile import Profile, build_profile, load_profile, profile_document
from vtx.x86.tlb import TlbTag

INVLPGB, TLBSYNC = b"\x0f\x01\xfe", b"\x0f\x01\xff"
ENABLE = {"nested paging and encryption control": 1 << 7}
UD, GP = 0x46, 0x4D
PCIDE = 1 << 17

# rAX
VA, PCID, ASID, GLOBAL, FINAL, NESTED = (1 << bit for bit in range(6))


def without(*features: str) -> Profile:
    document: dict[str, Any] = profile_document("everything-amd")
    document["cpuid"]["features"] = [name for name in document["cpuid"]["features"] if name not in features]
    return build_profile("changed.toml", document)


def host(code: bytes, rax: int = 0, ecx: int = 0, edx: int = 0, *, cpus: int = 1) -> Machine:
    """A host in 64-bit mode, about to execute ``code``. The other processors are halted."""
    bench = Bench()
    machine = Machine(memory=MEMORY, profile="everything-amd", cpus=cpus)
    machine.memory.write(0, bench.memory.read(0, MEMORY))
    machine.memory.write(HOST_RIP, code)
    state = machine.cpu.state = bench.state
    state.gpr[0], state.gpr[1], state.gpr[2] = rax, ecx, edx
    machine.cpu.load_control_state()
    return machine


def step(machine: Machine) -> Event | None:
    """Execute one instruction; the exception that it raised."""
    cpu, events = machine.cpu, list[Event]()
    cpu.deliver = events.append  # type: ignore[method-assign]
    machine.run(max_instructions=cpu.instructions + 1)
    assert len(events) < 2
    return events[0] if events else None


LEGAL = [
    (0, 0, 0),
    (0x3F, 0, 0),
    (0xFFFF_8000_1234_5000 | VA, 0, 0),
    (0x8000_0000_0000 | VA, 0, 0),
    (VA, 7, 0),
    (VA, 0x8000_0007, 0),
    (ASID, 0, 0x7FFF),
    (0, 0, 0x0FFF_FFFF),
]
ILLEGAL = [
    *((1 << bit, 0, 0) for bit in range(6, 12)),
    (VA, 8, 0),
    (0, 0xFFFF, 0),
    (0, 1 << 16, 0),
    (0, 1 << 30, 0),
    (0, 0, 1 << 28),
    (0, 0, 1 << 31),
    (ASID, 0, 0x8000),
    (PCID, 0, 5 << 16),
]


@pytest.mark.parametrize(("rax", "ecx", "edx"), LEGAL)
def test_legal_operands(rax: int, ecx: int, edx: int) -> None:
    machine = host(INVLPGB, rax, ecx, edx)
    assert step(machine) is None
    assert machine.cpu.state.rip == HOST_RIP + 3


@pytest.mark.parametrize(("rax", "ecx", "edx"), ILLEGAL)
def test_illegal_operands(rax: int, ecx: int, edx: int) -> None:
    event = step(host(INVLPGB, rax, ecx, edx))
    assert event is not None
    assert (event.vector, event.error_code) == (Vector.GP, 0)


def test_pcid_needs_process_context_identifiers() -> None:
    machine = host(INVLPGB, PCID, 0, 5 << 16)
    machine.cpu.state.cr4 |= PCIDE
    machine.cpu.load_control_state()
    assert step(machine) is None


@pytest.mark.parametrize(("asid", "legal"), [(0, True), (1, False)])
def test_asid_of_a_guest_needs_svm(asid: int, legal: bool) -> None:
    machine = host(INVLPGB, ASID, 0, asid)
    machine.cpu.state.efer = 0xD01
    machine.cpu.load_control_state()
    assert (step(machine) is None) == legal


def test_nested_translations_need_a_feature() -> None:
    machine = host(INVLPGB, NESTED)
    machine.cpu.profile = without("INVLPGBnestedPages")
    event = step(machine)
    assert event is not None
    assert event.vector == Vector.GP


@pytest.mark.parametrize("code", [INVLPGB, TLBSYNC])
def test_above_privilege_level_0(code: bytes) -> None:
    machine = guest_machine(code, 0xA0, 0xA1, 0xA4, GP, profile="everything-amd", fields={**ENABLE, "CPL": 3})
    for table in range(PAGE_TABLES, PAGE_TABLES + 0x3000, 0x1000):
        machine.memory.write_u64(table, machine.memory.read_u64(table) | 4)  # user pages
    until_exit(machine)
    assert (stored(machine, "EXITCODE"), stored(machine, "EXITINFO1")) == (GP, 0)


@pytest.mark.parametrize("code", [INVLPGB, TLBSYNC])
@pytest.mark.parametrize("profile", ["zen-server", "bochs-ryzen"])
def test_without_the_feature__are_invalid(code: bytes, profile: str) -> None:
    machine = guest_machine(code, 0xA0, 0xA4, UD, profile=profile, fields=ENABLE)
    until_exit(machine)
    assert stored(machine, "EXITCODE") == UD


# Intercepts that are on, whether the operands are legal, and what comes of INVLPGB.
INTERCEPTS = [
    ((), True, 0x81),
    ((), False, GP),
    ((0xA0,), True, 0xA0),
    ((0xA0,), False, 0xA0),
    ((0xA1,), True, 0x81),
    ((0xA1,), False, 0xA1),
    ((0xA0, 0xA1), False, 0xA0),
    ((0xA4,), True, 0x81),
]


@pytest.mark.parametrize(("intercepts", "legal", "code"), INTERCEPTS)
def test_intercepts_of_invlpgb(intercepts: tuple[int, ...], legal: bool, code: int) -> None:
    mov = b"\xb8" + (0 if legal else 0x40).to_bytes(4, "little") + b"\x31\xc9\x31\xd2"  # MOV EAX; XOR ECX; XOR EDX
    machine = guest_machine(mov + INVLPGB + VMMCALL, *intercepts, GP, profile="everything-amd", fields=ENABLE)
    until_exit(machine)
    assert stored(machine, "EXITCODE") == code
    if code >= 0xA0:
        assert (stored(machine, "RIP"), stored(machine, "nRIP")) == (GUEST_RIP + 9, GUEST_RIP + 12)


@pytest.mark.parametrize(("intercepts", "code"), [((), 0x81), ((0xA4,), 0xA4), ((0xA0, 0xA1), 0x81)])
def test_intercept_of_tlbsync(intercepts: tuple[int, ...], code: int) -> None:
    machine = guest_machine(TLBSYNC + VMMCALL, *intercepts, profile="everything-amd", fields=ENABLE)
    until_exit(machine)
    assert stored(machine, "EXITCODE") == code


@pytest.mark.parametrize("code", [INVLPGB, TLBSYNC])
def test_not_enabled_in_a_guest__are_invalid_whatever_is_intercepted(code: bytes) -> None:
    machine = guest_machine(code, 0xA0, 0xA1, 0xA4, UD, profile="everything-amd")
    until_exit(machine)
    assert stored(machine, "EXITCODE") == UD


@pytest.mark.parametrize("code", [INVLPGB, TLBSYNC])
def test_without_the_control__are_enabled_and_tlbsync_has_no_intercept(
    code: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = without("TlbiCtl")
    for module in ("svm_machine", "vtx.machine"):
        monkeypatch.setattr(f"{module}.load_profile", lambda name: old)
    clear = b"\x31\xc0\x31\xc9\x31\xd2"
    machine = guest_machine(clear + code + VMMCALL, 0xA4, UD, profile="everything-amd")
    until_exit(machine)
    assert stored(machine, "EXITCODE") == 0x81


# What is forgotten. Address spaces as (ASID, PCID), the pages 200H and 201H in each.

SPACES = [(0, 0), (0, 5), (1, 0), (1, 5)]
EVERYTHING = {(asid, pcid, page) for asid, pcid in SPACES for page in (0x200, 0x201)}


def fill(machine: Machine) -> None:
    for cpu in machine.cpus:
        tlb = cpu.mmu.tlb
        current = tlb.tag
        for asid, pcid in SPACES:
            tlb.select(TlbTag(asid, None, pcid))
            for page in (0x200, 0x201):
                tlb.insert(page, Translation(0x5000, 0x5000, 0x1000, 6, 7, True, False))
        tlb.select(current)


def forgotten(machine: Machine, processor: int) -> set[tuple[int, int, int]]:
    tlb = machine.cpus[processor].mmu.tlb
    left = set()
    for asid, pcid in SPACES:
        tlb.select(TlbTag(asid, None, pcid))
        left |= {(asid, pcid, page) for page in (0x200, 0x201) if tlb.find(page)}
    return EVERYTHING - left


CASES = [
    ((0, 0, 0), EVERYTHING),
    ((ASID, 0, 1), {(1, 0, 0x200), (1, 0, 0x201), (1, 5, 0x200), (1, 5, 0x201)}),
    ((PCID, 0, 5 << 16), {(0, 5, 0x200), (0, 5, 0x201), (1, 5, 0x200), (1, 5, 0x201)}),
    ((0x20_0000 | VA, 0, 0), {(0, 0, 0x200), (0, 5, 0x200), (1, 0, 0x200), (1, 5, 0x200)}),
    ((0x20_1000 | VA | ASID | PCID | FINAL, 0, 5 << 16), {(0, 5, 0x201)}),
    ((0x20_0000 | VA | ASID | PCID, 1, 5 << 16 | 1), {(1, 5, 0x200), (1, 5, 0x201)}),
    ((0x1F_F000 | VA | ASID | PCID, 7, 0), {(0, 0, 0x200), (0, 0, 0x201)}),
    ((VA | ASID | PCID, 0x8000_0001, 0), {(0, 0, 0x200)}),
    ((VA | ASID | PCID, 7, 0), set()),
]


@pytest.mark.parametrize(("operands", "expected"), CASES)
def test_every_processor_forgets(operands: tuple[int, int, int], expected: set[tuple[int, int, int]]) -> None:
    machine = host(INVLPGB, *operands, cpus=3)
    machine.cpu.state.cr4 |= PCIDE
    machine.cpu.load_control_state()
    fill(machine)
    assert step(machine) is None
    for processor in range(3):
        assert forgotten(machine, processor) == expected


@pytest.mark.parametrize("asid", [None, 0, 1, 7, 0xFFFF])
def test_a_guest_forgets_what_is_its_own(asid: int | None) -> None:
    machine = guest_machine(INVLPGB, profile="everything-amd", fields=ENABLE)
    gpr = machine.cpu.state.gpr
    gpr[0], gpr[1], gpr[2] = (0, 0, 0) if asid is None else (ASID, 0, asid)
    fill(machine)
    assert step(machine) is None
    assert forgotten(machine, 0) == {place for place in EVERYTHING if place[0] == 1}


# Machine code: processor 1 looks at an address until it reads 1; processor 0 changes the page behind it.

LOOKING = bytes.fromhex("803c250090200001 75f6 c604250091000001 f4")  # CMP BYTE [209000H], 1; JNE; MOV BYTE [9100H], 1
PAGE_ENTRY = PAGE_TABLES + 0x2000 + 8


def remapping(broadcast: bytes) -> bytes:
    """LOOP 1000H times; the page is that of address 0; ``broadcast`` of RAX = 200001H; wait for 9100H; leave."""
    return (
        bytes.fromhex("b900100000 e2fe c70425")
        + PAGE_ENTRY.to_bytes(4, "little")
        + bytes.fromhex("83000000 b801002000 31c9 31d2")
        + broadcast
        + bytes.fromhex("f390 803c250091000001 75f4 31c0 baf4000000 ef f4")
    )


@pytest.mark.parametrize("broadcasts", [True, False])
def test_broadcast_reaches_a_processor_that_runs(broadcasts: bool) -> None:
    machine = host(remapping(INVLPGB + TLBSYNC if broadcasts else b"\x90"), cpus=2)
    machine.memory.write_u8(0x9000, 1)
    machine.memory.write(0x8800, LOOKING)
    other, template = machine.cpus[1], Bench().state
    template.rip = 0x8800
    other.state = template
    other.load_control_state()
    result = machine.run(max_instructions=3_000_000)
    assert (result.exit_value == 0) == broadcasts


def test_count_in_cpuid() -> None:
    assert load_profile("everything-amd").invlpgb_count_max == 7
