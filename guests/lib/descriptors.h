/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * GDT selectors (the table itself is in boot.S), the TSS and the IDT.
 */
#ifndef DESCRIPTORS_H
#define DESCRIPTORS_H

#include <stdint.h>

enum selector { SELECTOR_CODE64 = 0x08, SELECTOR_DATA = 0x10, SELECTOR_TSS = 0x18 };

/* Task state of 64-bit mode: never used by these guests, but the host TR of a VMCS must be real. */
struct tss {
    uint32_t reserved0;
    uint64_t rsp[3];
    uint64_t reserved1;
    uint64_t ist[7];
    uint64_t reserved2;
    uint16_t reserved3;
    uint16_t io_map_base;
} __attribute__((packed));

_Static_assert(sizeof(struct tss) == 104, "the architecture fixes the size of a 64-bit TSS");

extern struct tss tss;

/* Loads TR, and an IDT whose every entry ends the run with a message. */
void descriptors_init(void);

/* Has an exception go to ``handler`` instead, which gets what the processor pushes. */
void exception_handler(int vector, const uint8_t *handler);

#endif
