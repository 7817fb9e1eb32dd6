"""XSAVES and XRSTORS as code of a guest: area, header, supervisor state, faults, VM exits."""

from __future__ import annotations

import struct

import pytest

from vmcs import controls as c
from vmcs import fields as f
from vmcs.exits import Reason
from vmcs.region import Vmcs
from vtx.bench.hypervisor import GUEST_CODE, install
from vtx.bench.listing import code
from vtx.machine import Machine
from vtx.x86.cpuid import Dynamic, cpuid
from vtx.x86.profile import load_profile

AREA = 0x40_0000
XSS, PM_CTL1 = 0xDA0, 0xDB1
HDC = 1 << 13
CET_STATES = 3 << 11
UINTR_STATE = 1 << 14
SUPERVISOR_STATES = HDC | CET_STATES | UINTR_STATE
EVERYTHING = load_profile("everything")

ENABLE = code("""\
0f 20 e0                        ; mov rax,cr4
0d 00 06 04 00                  ; or eax,40600h
0f 22 e0                        ; mov cr4,rax
31 c9                           ; xor ecx,ecx
31 d2                           ; xor edx,edx
b8 03 00 00 00                  ; mov eax,3
""")
FILL = code("""\
db e3                           ; fninit
d9 e8                           ; fld1
d9 eb                           ; fldpi
66 0f 76 c9                     ; pcmpeqd xmm1,xmm1
""")
STORE = bytes.fromhex("480fae0425") + (AREA + 0x1000).to_bytes(4, "little")  # fxsave64
HLT = b"\xf4"
ALL = 3 | HDC


def requested(components: int) -> bytes:
    """mov eax,...; xor edx,edx."""
    return b"\xb8" + struct.pack("<I", components) + b"\x31\xd2"


def instruction(digit: int, *, wide: bool = True, address: int = AREA) -> bytes:
    modrm = 4 | digit << 3
    return (b"\x48" if wide else b"") + b"\x0f\xc7" + bytes((modrm, 0x25)) + struct.pack("<I", address)


def xsaves(components: int, **more: int) -> bytes:
    return requested(components) + instruction(5, **more)  # type: ignore[arg-type]


def xrstors(components: int, **more: int) -> bytes:
    return requested(components) + instruction(3, **more)  # type: ignore[arg-type]


class Guest:
    def __init__(self, program: bytes, *, xss: int = HDC, bitmap: int = 0, enable: bool = True, cr0: int = 0) -> None:
        self.machine = Machine(profile="everything", memory=16 << 20)
        # XSETBV exits in every guest: the host enables SSE state beforehand.
        self.vmcs: Vmcs = install(
            self.machine,
            guest=program + HLT,
            controls=(c.HLT_EXITING, *((c.ENABLE_XSAVES_XRSTORS,) if enable else ())),
            fields={f.EXCEPTION_BITMAP: 0x6080 | 1 << 6, f.XSS_EXITING_BITMAP: bitmap},
        )
        self.vmcs[f.GUEST_CR0] |= cr0
        self.machine.cpu.state.xcr0 = 3
        assert self.machine.cpu.msrs.write(XSS, xss)
        self.machine.cpu.msrs.write(PM_CTL1, 0)

    def run(self) -> Guest:
        result = self.machine.run(max_instructions=1000)
        assert result.exit_value == 0, result.message
        return self

    def put(self, data: bytes, offset: int = 0) -> None:
        self.machine.memory.write(AREA + offset, data)

    def area(self, offset: int, size: int) -> bytes:
        return self.machine.memory.read(AREA + offset, size)

    @property
    def reason(self) -> Reason:
        return Reason(self.vmcs[f.EXIT_REASON])

    @property
    def exception(self) -> int:
        assert self.reason is Reason.EXCEPTION_OR_NMI
        return self.vmcs[f.VM_EXIT_INTERRUPTION_INFORMATION] & 0xFF


def header(present: int, format_: int, rest: bytes = bytes(48)) -> bytes:
    return struct.pack("<QQ", present, format_) + rest


def test_xsaves__stores_what_fxsave_stores_and_a_header() -> None:
    guest = Guest(ENABLE + FILL + STORE + xsaves(ALL)).run()
    assert guest.reason is Reason.HLT
    stored = guest.machine.memory.read(AREA + 0x1000, 416)
    assert guest.area(0, 416) == stored
    assert guest.area(512, 64) == header(ALL, ALL | 1 << 63)
    assert guest.area(576, 8) == bytes(8)


@pytest.mark.parametrize(
    ("components", "written"),
    [
        (1, [(0, 24), (32, 160)]),
        (2, [(24, 32), (160, 416)]),
        (HDC, [(576, 584)]),
        (0, []),
        (4 | 1 << 8, []),
    ],
)
def test_xsaves__writes_what_is_requested_and_enabled(components: int, written: list[tuple[int, int]]) -> None:
    guest = Guest(ENABLE + FILL + xsaves(components))
    guest.put(b"\xcc" * 640)
    guest.run()
    for position in range(640):
        inside = any(start <= position < end for start, end in written) or 512 <= position < 528
        if not inside:
            assert guest.area(position, 1) == b"\xcc", position
    enabled = components & ALL
    assert guest.area(512, 16) == struct.pack("<QQ", enabled, enabled | 1 << 63)


def test_xsaves__narrow_form_cuts_pointers() -> None:
    guest = Guest(ENABLE + FILL + STORE + xsaves(3, wide=False)).run()
    wide = guest.machine.memory.read(AREA + 0x1000, 24)
    pointer, operand = struct.unpack_from("<QQ", wide, 8)
    assert struct.unpack("<QQ", guest.area(8, 16)) == (pointer & 0xFFFF_FFFF, operand & 0xFFFF_FFFF)


def test_round_trip() -> None:
    clobber = code("""\
db e3                           ; fninit
66 0f ef c9                     ; pxor xmm1,xmm1
""")
    guest = Guest(
        ENABLE + FILL + STORE + xsaves(ALL) + clobber + xrstors(ALL) + xsaves(ALL, address=AREA + 0x2000)
    ).run()
    assert guest.reason is Reason.HLT
    assert guest.machine.memory.read(AREA + 0x2000, 416) == guest.machine.memory.read(AREA + 0x1000, 416)


def test_xrstors__initializes_what_is_not_present() -> None:
    guest = Guest(ENABLE + FILL + xrstors(ALL) + STORE)
    guest.put(header(0, ALL | 1 << 63), 512)
    guest.run()
    assert guest.reason is Reason.HLT
    stored = guest.machine.memory.read(AREA + 0x1000, 416)
    assert stored[:28] == bytes.fromhex("7f03000000000000" + 32 * "0" + "801f0000")
    assert stored[32:] == bytes(384)
    assert guest.machine.cpu.msrs.read(PM_CTL1) == 1


def test_xrstors__leaves_alone_what_is_not_requested() -> None:
    guest = Guest(ENABLE + FILL + STORE + xrstors(0) + xsaves(3, address=AREA + 0x2000))
    guest.put(header(0, ALL | 1 << 63), 512)
    guest.run()
    assert guest.machine.memory.read(AREA + 0x2000, 416) == guest.machine.memory.read(AREA + 0x1000, 416)
    assert guest.machine.cpu.msrs.read(PM_CTL1) == 0


def test_xrstors__loads_supervisor_state() -> None:
    guest = Guest(ENABLE + xrstors(HDC))
    guest.put(header(HDC, HDC | 1 << 63), 512)
    guest.put(b"\x01", 576)
    guest.run()
    assert guest.reason is Reason.HLT
    assert guest.machine.cpu.msrs.read(PM_CTL1) == 1


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (header(3, 3), 512),  # not compacted
        (header(3, 1 << 63 | 7), 512),  # a component that is not enabled
        (header(3, 1 << 63 | 1), 512),  # present and not in the format
        (header(0, 1 << 63, bytes(47) + b"\x01"), 512),
        (struct.pack("<I", 1 << 16).ljust(488, b"\0") + header(2, 1 << 63 | 3), 24),  # MXCSR
        (header(HDC, 1 << 63 | HDC) + b"\x02", 512),  # IA32_PM_CTL1
    ],
)
def test_xrstors__refuses_a_bad_area(data: bytes, offset: int) -> None:
    guest = Guest(ENABLE + xrstors(ALL))
    guest.put(data, offset)
    assert guest.run().exception == 13


def test_xrstors__that_is_refused_has_changed_nothing() -> None:
    """PKRU comes before HDC state, at 576 and 584; IA32_PM_CTL1 does not take the value of the latter."""
    pkru = 1 << 9
    guest = Guest(ENABLE + FILL + xrstors(ALL | pkru))
    guest.machine.cpu.state.xcr0 |= pkru
    guest.machine.cpu.state.pkru = 0x30
    guest.put(header(ALL | pkru, ALL | pkru | 1 << 63) + struct.pack("<QQ", 0x1C, 2), 512)
    guest.put(struct.pack("<I", 0x1F80), 24)
    assert guest.run().exception == 13
    assert (guest.machine.cpu.state.pkru, guest.machine.cpu.msrs.read(PM_CTL1)) == (0x30, 0)
    assert guest.machine.cpu.engine.legacy_area()[176:192] == b"\xff" * 16


@pytest.mark.parametrize("make", [xsaves, xrstors])
def test_alignment(make) -> None:  # type: ignore[no-untyped-def]
    assert Guest(ENABLE + make(3, address=AREA + 16)).run().exception == 13


@pytest.mark.parametrize("make", [xsaves, xrstors])
def test_are_invalid__without_control_or_osxsave(make) -> None:  # type: ignore[no-untyped-def]
    assert Guest(ENABLE + make(3), enable=False).run().exception == 6
    assert Guest(make(3)).run().exception == 6


@pytest.mark.parametrize("make", [xsaves, xrstors])
def test_device_not_available(make) -> None:  # type: ignore[no-untyped-def]
    guest = Guest(make(3), cr0=1 << 3)
    guest.vmcs[f.GUEST_CR4] |= 0x40600
    assert guest.run().exception == 7


@pytest.mark.parametrize(("make", "reason"), [(xsaves, Reason.XSAVES), (xrstors, Reason.XRSTORS)])
@pytest.mark.parametrize(
    ("components", "xss", "bitmap", "exits"),
    [
        (HDC, HDC, HDC, True),
        (ALL, HDC, 1 << 63 | HDC, True),
        (3, HDC, HDC, False),
        (ALL, 0, HDC, False),
        (ALL, HDC, 3, False),
    ],
)
def test_exit__if_the_bitmap_has_a_requested_supervisor_component(  # type: ignore[no-untyped-def]
    make, reason: Reason, components: int, xss: int, bitmap: int, exits: bool
) -> None:
    guest = Guest(ENABLE + make(components), xss=xss, bitmap=bitmap)
    guest.put(header(0, 3 | 1 << 63), 512)
    guest.run()
    assert guest.reason is (reason if exits else Reason.HLT)
    if exits:
        assert guest.vmcs[f.VM_EXIT_INSTRUCTION_LENGTH] == 9
        assert guest.vmcs[f.EXIT_QUALIFICATION] == AREA
        # 64-bit address, segment DS, neither base nor index
        assert guest.vmcs[f.VM_EXIT_INSTRUCTION_INFORMATION] == 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27
        assert guest.vmcs[f.GUEST_RIP] == GUEST_CODE + len(ENABLE) + 7 + 9  # the host skips it
        assert guest.area(0, 416) == bytes(416)


def test_cpuid__sizes_and_components() -> None:
    def leaf(subleaf: int, xss: int = 0) -> tuple[int, int, int, int]:
        return cpuid(EVERYTHING, 0xD, subleaf, Dynamic(xcr0=3, xss=xss))

    assert leaf(1) == (15, 576, SUPERVISOR_STATES, 0)
    assert leaf(1, xss=HDC) == (15, 584, SUPERVISOR_STATES, 0)
    assert leaf(13) == (8, 0, 1, 0)
    assert leaf(2) == (0, 0, 0, 0)
    assert cpuid(load_profile("skylake-server"), 0xD, 1, Dynamic(xcr0=3)) == (0, 0, 0, 0)


def test_xss__has_the_bits_of_the_components() -> None:
    msrs = Machine(profile="everything", memory=2 << 20).cpu.msrs
    assert msrs.write(XSS, HDC)
    assert not msrs.write(XSS, 1)
    assert msrs.read(PM_CTL1) == 1
    assert not Machine(memory=2 << 20).cpu.msrs.exists(XSS)
