/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What a Multiboot 1 loader tells the kernel; the fields used here.
 */
#ifndef MULTIBOOT_H
#define MULTIBOOT_H

#include <stdint.h>

enum { MULTIBOOT_LOADER_MAGIC = 0x2BADB002 };
enum { MULTIBOOT_INFO_MEMORY = 1u << 0, MULTIBOOT_INFO_MODULES = 1u << 3 };

struct multiboot_info {
    uint32_t flags;
    uint32_t memory_lower_kib, memory_upper_kib;        /* from 0, and from 1 MiB */
    uint32_t boot_device, command_line;
    uint32_t module_count, modules;
};

struct multiboot_module {
    uint32_t start, end;                                /* physical addresses; end is exclusive */
    uint32_t command_line, reserved;
};

#endif
