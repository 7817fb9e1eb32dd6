/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * ELF32 files, as far as loading one needs them.
 * Spec: System V ABI, "Object Files", "Program Loading and Dynamic Linking".
 */
#ifndef ELF32_H
#define ELF32_H

#include <stdint.h>

enum { ELF_PT_LOAD = 1 };

struct elf32_header {
    uint8_t identification[16];
    uint16_t type, machine;
    uint32_t version, entry, program_header_offset, section_header_offset, flags;
    uint16_t header_size, program_header_size, program_header_count;
    uint16_t section_header_size, section_header_count, section_name_index;
};

struct elf32_program_header {
    uint32_t type, offset, virtual_address, physical_address, file_size, memory_size, flags, alignment;
};

#endif
