"""The ACPI tables, found and parsed as an operating system does it; layouts are typed from the specification."""

import struct
from collections.abc import Iterator

import pytest

from vtx.boot import acpi
from vtx.x86.memory import PhysicalMemory

MIB = 1 << 20


class Tables:
    """What a scan of the BIOS area finds."""

    def __init__(self, cpus: int = 1) -> None:
        self.memory = PhysicalMemory(2 * MIB)
        installed = acpi.install(self.memory, cpus)
        (self.rsdp,) = (
            address for address in range(0xE0000, 0x100000, 16) if self.memory.read(address, 8) == b"RSD PTR "
        )
        assert installed == self.rsdp

    def at(self, address: int, signature: bytes) -> bytes:
        """The whole table at ``address``, its checksum verified."""
        length = self.memory.read_u32(address + 4)
        table = self.memory.read(address, length)
        assert table[:4] == signature
        assert sum(table) & 0xFF == 0
        assert address + length <= 0xF0000
        return table

    @property
    def xsdt(self) -> bytes:
        return self.at(self.memory.read_u64(self.rsdp + 24), b"XSDT")

    def find(self, signature: bytes) -> bytes:
        entries = self.xsdt[36:]
        for (address,) in struct.iter_unpack("<Q", entries):
            if self.memory.read(address, 4) == signature:
                return self.at(address, signature)
        raise AssertionError(f"no table {signature!r}")


def test_rsdp() -> None:
    tables = Tables()
    rsdp = tables.memory.read(tables.rsdp, 36)
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0
    assert rsdp[15] == 2
    assert struct.unpack_from("<I", rsdp, 20) == (36,)


def test_rsdt_and_xsdt_list_the_same_tables() -> None:
    tables = Tables()
    rsdt = tables.at(tables.memory.read_u32(tables.rsdp + 16), b"RSDT")
    narrow = [address for (address,) in struct.iter_unpack("<I", rsdt[36:])]
    assert narrow == [address for (address,) in struct.iter_unpack("<Q", tables.xsdt[36:])]
    assert [tables.memory.read(address, 4) for address in narrow] == [b"FACP", b"APIC", b"HPET"]


def test_headers() -> None:
    tables = Tables()
    for signature, revision in ((b"FACP", 5), (b"APIC", 4), (b"HPET", 1)):
        table = tables.find(signature)
        assert table[8] == revision
        assert table[10:16] == b"VTX   "
        assert table[28:32] == b"VTX "


def entries(madt: bytes) -> Iterator[tuple[int, bytes]]:
    position = 44
    while position < len(madt):
        kind, length = madt[position], madt[position + 1]
        assert length >= 2
        yield kind, madt[position + 2 : position + length]
        position += length
    assert position == len(madt)


@pytest.mark.parametrize("cpus", [1, 2, 8, 254])
def test_madt(cpus: int) -> None:
    madt = Tables(cpus).find(b"APIC")
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    found = list(entries(madt))
    local = [struct.unpack("<BBI", body) for kind, body in found if kind == 0]
    assert local == [(cpu, cpu, 1) for cpu in range(cpus)]
    assert [struct.unpack("<BBII", body) for kind, body in found if kind == 1] == [(15, 0, 0xFEC00000, 0)]
    overrides = [struct.unpack("<BBIH", body) for kind, body in found if kind == 2]
    assert overrides == [(0, 0, 2, 0), (0, 9, 9, 0x0D)]
    assert [struct.unpack("<BHB", body) for kind, body in found if kind == 4] == [(0xFF, 0, 1)]


def test_madt_of_many_processors_uses_x2apic_entries() -> None:
    found = list(entries(Tables(300).find(b"APIC")))
    assert [struct.unpack("<HIII", body) for kind, body in found if kind == 9] == [
        (0, cpu, 1, cpu) for cpu in range(255, 300)
    ]


def generic_address(data: bytes, offset: int) -> tuple[int, int, int]:
    """Space, width and address."""
    space, width, _, _, address = struct.unpack_from("<BBBBQ", data, offset)
    return space, width, address


def test_fadt() -> None:
    tables = Tables()
    fadt = tables.find(b"FACP")
    assert len(fadt) == 268
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert struct.unpack_from("<QQ", fadt, 132) == (facs, dsdt)
    assert struct.unpack_from("<H", fadt, 46) == (9,)  # SCI
    assert struct.unpack_from("<I", fadt, 48) == (0,)  # no SMI command port
    assert struct.unpack_from("<8I", fadt, 56) == (0x600, 0, 0x604, 0, 0, 0x608, 0, 0)
    assert tuple(fadt[88:92]) == (4, 2, 0, 4)
    assert fadt[108] == 0x32  # century
    assert struct.unpack_from("<H", fadt, 109) == (0x0005,)  # legacy devices, no display adapter
    (flags,) = struct.unpack_from("<I", fadt, 112)
    # WBINVD and C1 work, the power button is a fixed one, there is no sleep button, the clock has no fixed event,
    # the timer has 32 bits, there is a reset register; hardware not reduced.
    assert flags == 0x0000_0565
    assert generic_address(fadt, 116) == (1, 8, 0xCF9)
    assert fadt[128] == 0x06  # a hard reset
    assert fadt[131] == 1  # minor revision
    assert [generic_address(fadt, offset) for offset in (148, 172, 208)] == [
        (1, 32, 0x600),
        (1, 16, 0x604),
        (1, 32, 0x608),
    ]
    assert facs % 64 == 0
    assert tables.memory.read(facs, 8) == b"FACS" + struct.pack("<I", 64)


def test_hpet() -> None:
    hpet = Tables().find(b"HPET")
    assert len(hpet) == 56
    assert struct.unpack_from("<I", hpet, 36) == (0x8086A201,)
    assert generic_address(hpet, 40) == (0, 64, 0xFED00000)


# A reader of the AML subset in use: names, integers, strings, packages, buffers, scopes and devices.


def package_end(code: bytes, at: int) -> tuple[int, int]:
    """Where the body begins and where it ends, of what has its package length at ``at``."""
    more = code[at] >> 6
    length = code[at] & 0x3F if not more else code[at] & 0xF
    for index in range(more):
        length |= code[at + 1 + index] << 4 + 8 * index
    return at + 1 + more, at + length


def value(code: bytes, at: int) -> tuple[object, int]:
    match code[at]:
        case 0x00 | 0x01:
            return code[at], at + 1
        case 0x0A:
            return code[at + 1], at + 2
        case 0x0C:
            return struct.unpack_from("<I", code, at + 1)[0], at + 5
        case 0x0D:
            end = code.index(0, at + 1)
            return code[at + 1 : end].decode("ascii"), end + 1
        case 0x11:
            body, end = package_end(code, at + 1)
            size, body = value(code, body)
            assert size == end - body
            return code[body:end], end
        case 0x12:
            body, end = package_end(code, at + 1)
            elements, position = [], body + 1
            for _ in range(code[body]):
                element, position = value(code, position)
                elements.append(element)
            assert position == end
            return elements, end
    raise AssertionError(f"unknown AML {code[at]:#x}")


def terms(code: bytes, at: int, end: int) -> dict[str, object]:
    found: dict[str, object] = {}
    while at < end:
        if code[at] == 0x08:
            name = code[at + 1 : at + 5].decode("ascii")
            found[name], at = value(code, at + 5)
        elif code[at] == 0x10:
            body, at = package_end(code, at + 1)
            assert code[body : body + 1] == b"\\"
            found[code[body + 1 : body + 5].decode("ascii")] = terms(code, body + 5, at)
        else:
            assert code[at : at + 2] == b"\x5b\x82"
            body, at = package_end(code, at + 2)
            found[code[body : body + 4].decode("ascii")] = terms(code, body + 4, at)
    assert at == end
    return found


@pytest.mark.parametrize("cpus", [1, 2, 300])
def test_dsdt(cpus: int) -> None:
    tables = Tables(cpus)
    (address,) = struct.unpack_from("<I", tables.find(b"FACP"), 40)
    dsdt = tables.at(address, b"DSDT")
    found = terms(dsdt, 36, len(dsdt))
    assert found["_S5_"] == [5, 5, 0, 0]
    devices = found["_SB_"]
    assert isinstance(devices, dict)
    com1 = devices.pop("COM1")
    assert (com1["_HID"], com1["_UID"]) == ("PNP0501", 1)
    assert com1["_CRS"] == bytes.fromhex("47 01 f803 f803 01 08  22 1000  79 00")
    assert [device["_HID"] for device in devices.values()] == ["ACPI0007"] * cpus
    assert [device["_UID"] for device in devices.values()] == list(range(cpus))


@pytest.mark.parametrize("body", [0, 1, 61, 62, 63, 64, 4092, 4093, 4094, 4095, 70_000])
def test_package_length(body: int) -> None:
    """One byte for a length to 63, which counts itself; else four bits and one to three bytes."""
    encoded = acpi._package_length(body)
    begin, end = package_end(encoded, 0)
    assert (begin, end) == (len(encoded), body + len(encoded))
    assert len(encoded) == next(size for size, limit in ((1, 0x3F), (2, 0xFFF), (3, 0xFFFFF)) if body + size <= limit)


def test_too_many_processors_are_refused() -> None:
    with pytest.raises(ValueError, match="ACPI tables need"):
        acpi.install(PhysicalMemory(2 * MIB), 10_000)


def test_little_memory_gets_no_tables() -> None:
    memory = PhysicalMemory(512 << 10)
    assert acpi.install(memory, 1) is None
