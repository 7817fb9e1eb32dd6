"""Where the devices of this PC are: what the board wires and the firmware tables state.

Ports and physical addresses are those of the PC/AT and its successors; the rest is this machine's choice.
"""

from __future__ import annotations

from typing import Final

LOCAL_APIC_ADDRESS: Final = 0xFEE0_0000
IO_APIC_ADDRESS: Final = 0xFEC0_0000
HPET_ADDRESS: Final = 0xFED0_0000
TEST_MEMORY_ADDRESS: Final = 0xFF00_0000
ROM_ADDRESS: Final = 0xFFFF_F000

PIC_MASTER_PORT: Final = 0x20
PIC_SLAVE_PORT: Final = 0xA0
PIC_EDGE_LEVEL_PORT: Final = 0x4D0
PIT_PORT: Final = 0x40
KEYBOARD_DATA_PORT: Final = 0x60
KEYBOARD_COMMAND_PORT: Final = 0x64
SYSTEM_CONTROL_PORT: Final = 0x61
SYSTEM_CONTROL_PORT_A: Final = 0x92
RTC_PORT: Final = 0x70
POST_PORT: Final = 0x80
APM_PORT: Final = 0xB2
DEBUG_EXIT_PORT: Final = 0xF4
COM1_PORT: Final = 0x3F8
FW_CFG_PORT: Final = 0x510
BOOT_PORT: Final = 0x5A0
ACPI_PM_PORT: Final = 0x600
PCI_CONFIG_PORT: Final = 0xCF8
RESET_CONTROL_PORT: Final = 0xCF9
TEST_STORAGE_PORT: Final = 0xE0
TEST_LINES_PORT: Final = 0x2000

BOOT_WORD: Final = 0x746F_6F42
"""What firmware writes to `BOOT_PORT` to have the image booted: "Boot"."""

TIMER_IRQ: Final = 0
KEYBOARD_IRQ: Final = 1
COM1_IRQ: Final = 4
RTC_IRQ: Final = 8
SCI_IRQ: Final = 9
MOUSE_IRQ: Final = 12
TIMER_PIN: Final = 2
"""The I/O APIC input of ISA interrupt 0; all others have the input of their own number."""

IO_APIC_ID: Final = 0xF
