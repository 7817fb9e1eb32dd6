"""ACPI tables: what firmware tells an operating system about processors, interrupts and fixed hardware.

`install` writes them into the BIOS area: the RSDP at its start, where software that scans 16-byte boundaries from
E0000H finds it, the tables behind it.

The AML in the DSDT declares the soft-off sleep type, the processors, and COM1; there are no methods.

Spec: ACPI Specification, "ACPI Software Programming Model", "ACPI Machine Language (AML) Specification"; IA-PC HPET
Specification, "The ACPI 2.0 HPET Description Table (HPET)".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vtx.pc_map import (
    ACPI_PM_PORT,
    COM1_IRQ,
    COM1_PORT,
    HPET_ADDRESS,
    IO_APIC_ADDRESS,
    IO_APIC_ID,
    LOCAL_APIC_ADDRESS,
    RESET_CONTROL_PORT,
    SCI_IRQ,
    TIMER_IRQ,
    TIMER_PIN,
)
from vtx.x86.memory import PhysicalMemory

RSDP_ADDRESS = 0xE_0000
RSDP_SIGNATURE = b"RSD PTR "
TABLES_ADDRESS = RSDP_ADDRESS + 0x40
TABLES_END = 0xF_0000
OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"VTX   ", b"VTXPC   ", b"VTX "
HEADER = struct.Struct("<4sIBB6s8sI4sI")
CHECKSUM_OFFSET = 9

HPET_ID = 0x8086_A201
PM1_EVENT_PORT, PM1_CONTROL_PORT, PM_TIMER_PORT = ACPI_PM_PORT, ACPI_PM_PORT + 4, ACPI_PM_PORT + 8
CENTURY_BYTE = 0x32

ENABLED = 1 << 0
MADT_PC_AT = 1 << 0
ACTIVE_HIGH_LEVEL = 0x000D
FADT_FLAGS = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10
"""WBINVD, C1, no sleep button, no RTC event, a timer of 32 bits, a reset register."""

RESET_VALUE = 0x06  # a hard reset
FADT_BOOT_FLAGS = 1 << 0 | 1 << 2  # legacy devices, no VGA
SYSTEM_MEMORY, SYSTEM_IO = 0, 1


def install(memory: PhysicalMemory, cpus: int) -> int | None:
    """Write the tables for ``cpus`` processors with APIC IDs 0, 1, 2 ...; the physical address of the RSDP.

    None, with nothing written, if RAM does not reach the BIOS area.
    """
    if not memory.is_backed(RSDP_ADDRESS, TABLES_END - RSDP_ADDRESS):
        return None
    writer = _Writer(memory)
    dsdt = writer.place(b"DSDT", 2, _definition_block(cpus))
    facs = writer.place_raw(struct.pack("<4sI32xB31x", b"FACS", 64, 2), alignment=64)
    tables = [
        writer.place(b"FACP", 5, _fadt(facs, dsdt)),
        writer.place(b"APIC", 4, _madt(cpus)),
        writer.place(b"HPET", 1, _hpet()),
    ]
    rsdt = writer.place(b"RSDT", 1, struct.pack(f"<{len(tables)}I", *tables))
    xsdt = writer.place(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables))
    memory.write(RSDP_ADDRESS, _rsdp(rsdt, xsdt))
    return RSDP_ADDRESS


def rsdp_address(memory: PhysicalMemory) -> int | None:
    """Physical address of the RSDP that `install` wrote; None if there is none."""
    return RSDP_ADDRESS if memory.read(RSDP_ADDRESS, len(RSDP_SIGNATURE)) == RSDP_SIGNATURE else None


class _Writer:
    """Places tables one after the other."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._next = TABLES_ADDRESS

    def place(self, signature: bytes, revision: int, body: bytes) -> int:
        """Put a table with its header; its address."""
        length = HEADER.size + len(body)
        header = HEADER.pack(signature, length, revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1)
        return self.place_raw(_with_checksum(header + body, CHECKSUM_OFFSET), alignment=16)

    def place_raw(self, table: bytes, *, alignment: int) -> int:
        """Put a table as it is; its address."""
        address = -(-self._next // alignment) * alignment
        self._next = address + len(table)
        if self._next > TABLES_END:
            raise ValueError(f"ACPI tables need {self._next - RSDP_ADDRESS} bytes, more than the BIOS area has")
        self._memory.write(address, table)
        return address


def _with_checksum(table: bytes, offset: int) -> bytes:
    """``table`` with the byte at ``offset`` set so that all bytes add up to zero."""
    return table[:offset] + bytes((-sum(table) & 0xFF,)) + table[offset + 1 :]


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    first = _with_checksum(struct.pack("<8sB6sBI", RSDP_SIGNATURE, 0, OEM_ID, 2, rsdt), 8)
    return _with_checksum(first + struct.pack("<IQB3x", 36, xsdt, 0), 32)


def _madt(cpus: int) -> bytes:
    local_apics = [
        # An APIC ID that does not fit in a byte needs the entry for x2APICs.
        struct.pack("<BBBBI", 0, 8, cpu, cpu, ENABLED)
        if cpu < 0xFF
        else struct.pack("<BBHIII", 9, 16, 0, cpu, ENABLED, cpu)
        for cpu in range(cpus)
    ]
    return b"".join(
        [
            struct.pack("<II", LOCAL_APIC_ADDRESS, MADT_PC_AT),
            *local_apics,
            struct.pack("<BBBBII", 1, 12, IO_APIC_ID, 0, IO_APIC_ADDRESS, 0),
            struct.pack("<BBBBIH", 2, 10, 0, TIMER_IRQ, TIMER_PIN, 0),
            struct.pack("<BBBBIH", 2, 10, 0, SCI_IRQ, SCI_IRQ, ACTIVE_HIGH_LEVEL),
            struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
        ]
    )


def _hpet() -> bytes:
    return struct.pack("<I", HPET_ID) + _address(SYSTEM_MEMORY, 64, 0, HPET_ADDRESS) + struct.pack("<BHB", 0, 0, 0)


def _address(space: int, width: int, access: int, address: int) -> bytes:
    """A generic address structure."""
    return struct.pack("<BBBBQ", space, width, 0, access, address)


def _fadt(facs: int, dsdt: int) -> bytes:
    """The fixed description table of revision 5, field by field in its order."""
    none = _address(0, 0, 0, 0)
    return b"".join(
        [
            struct.pack("<IIBB", facs, dsdt, 0, 0),
            struct.pack("<HIBBBB", SCI_IRQ, 0, 0, 0, 0, 0),  # no SMI command: always in ACPI mode
            struct.pack("<8I", PM1_EVENT_PORT, 0, PM1_CONTROL_PORT, 0, 0, PM_TIMER_PORT, 0, 0),
            struct.pack("<8B", 4, 2, 0, 4, 0, 0, 0, 0),
            struct.pack("<HHHHBB", 0xFFFF, 0xFFFF, 0, 0, 0, 0),  # no C2, no C3, no duty cycle
            struct.pack("<BBBHB", 0, 0, CENTURY_BYTE, FADT_BOOT_FLAGS, 0),
            struct.pack("<I", FADT_FLAGS),
            _address(SYSTEM_IO, 8, 0, RESET_CONTROL_PORT) + struct.pack("<BHB", RESET_VALUE, 0, 1),  # minor revision
            struct.pack("<QQ", facs, dsdt),
            _address(SYSTEM_IO, 32, 0, PM1_EVENT_PORT),
            none,
            _address(SYSTEM_IO, 16, 0, PM1_CONTROL_PORT),
            none,
            none,
            _address(SYSTEM_IO, 32, 0, PM_TIMER_PORT),
            none * 4,
        ]
    )


# AML. Names are four characters, encodings as the specification numbers them.

_ZERO_OP, _NAME_OP, _SCOPE_OP, _BUFFER_OP, _PACKAGE_OP = b"\x00", b"\x08", b"\x10", b"\x11", b"\x12"
_BYTE_PREFIX, _DWORD_PREFIX, _STRING_PREFIX, _DEVICE_OP = b"\x0a", b"\x0c", b"\x0d", b"\x5b\x82"
_END_TAG = b"\x79\x00"


def _definition_block(cpus: int) -> bytes:
    devices = [
        _device(b"COM1", b"PNP0501", 1, _name(b"_CRS", _buffer(_io_ports(COM1_PORT, 8) + _irq(COM1_IRQ) + _END_TAG)))
    ]
    devices += [_device(b"C%03X" % cpu, b"ACPI0007", cpu) for cpu in range(cpus)]
    return _name(b"_S5_", _package([_integer(5), _integer(5), _ZERO_OP, _ZERO_OP])) + _sized(
        _SCOPE_OP, b"\\_SB_" + b"".join(devices)
    )


def _sized(operation: bytes, body: bytes) -> bytes:
    """An operation whose length, the length field included, precedes its body."""
    return operation + _package_length(len(body)) + body


def _package_length(body: int) -> bytes:
    if body + 1 < 1 << 6:
        return bytes((body + 1,))
    size = next(size for size in (2, 3, 4) if body + size < 1 << 4 + 8 * (size - 1))
    length = body + size
    return bytes((size - 1 << 6 | length & 0xF, *_bytes_of(length >> 4, size - 1)))


def _bytes_of(value: int, count: int) -> Iterator[int]:
    return iter(value.to_bytes(count, "little"))


def _name(name: bytes, value: bytes) -> bytes:
    return _NAME_OP + name + value


def _integer(value: int) -> bytes:
    return _BYTE_PREFIX + bytes((value,)) if value < 0x100 else _DWORD_PREFIX + struct.pack("<I", value)


def _package(elements: list[bytes]) -> bytes:
    return _sized(_PACKAGE_OP, bytes((len(elements),)) + b"".join(elements))


def _buffer(data: bytes) -> bytes:
    return _sized(_BUFFER_OP, _integer(len(data)) + data)


def _device(name: bytes, hardware_id: bytes, unique_id: int, more: bytes = b"") -> bytes:
    identity = _name(b"_HID", _STRING_PREFIX + hardware_id + b"\0") + _name(b"_UID", _integer(unique_id))
    return _sized(_DEVICE_OP, name + identity + more)


def _io_ports(first: int, count: int) -> bytes:
    """A resource: ``count`` ports at a fixed place, 16 address bits decoded."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def _irq(number: int) -> bytes:
    """A resource: an edge-triggered ISA interrupt."""
    return struct.pack("<BH", 0x22, 1 << number)
