/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "descriptors.h"

#include "console.h"
#include "cpu.h"

enum { EXCEPTION_COUNT = 32, STUB_SIZE = 16 };
enum { TYPE_TSS64_AVAILABLE = 0x9, TYPE_INTERRUPT_GATE64 = 0xE, DESCRIPTOR_PRESENT = 0x80 };

struct gate {
    uint16_t offset_low;
    uint16_t selector;
    uint8_t ist;
    uint8_t type;
    uint16_t offset_middle;
    uint32_t offset_high;
    uint32_t reserved;
};

struct exception_frame {
    uint64_t vector, error_code, rip, cs, rflags, rsp, ss;
};

struct tss tss;
static struct gate idt[EXCEPTION_COUNT];

void unexpected_exception(const struct exception_frame *frame) __attribute__((noreturn));

extern uint64_t gdt[];
extern const uint8_t exception_stubs[];

static void tss_load(void)
{
    uint64_t base = (uint64_t)&tss;
    uint64_t type = DESCRIPTOR_PRESENT | TYPE_TSS64_AVAILABLE;

    tss.io_map_base = sizeof tss;
    gdt[SELECTOR_TSS / 8] = (sizeof tss - 1) | (base & 0xFFFFFF) << 16 | type << 40 | (base >> 24 & 0xFF) << 56;
    gdt[SELECTOR_TSS / 8 + 1] = base >> 32;
    __asm__ volatile("ltr %w0" ::"r"(SELECTOR_TSS) : "memory");
}

void exception_handler(int vector, const uint8_t *handler)
{
    uint64_t address = (uint64_t)handler;

    idt[vector] = (struct gate){
        .offset_low = (uint16_t)address,
        .offset_middle = (uint16_t)(address >> 16),
        .offset_high = (uint32_t)(address >> 32),
        .selector = SELECTOR_CODE64,
        .type = DESCRIPTOR_PRESENT | TYPE_INTERRUPT_GATE64,
    };
}

static void idt_load(void)
{
    for (int vector = 0; vector < EXCEPTION_COUNT; vector++)
        exception_handler(vector, exception_stubs + vector * STUB_SIZE);
    struct table_register idtr = {.limit = sizeof idt - 1, .base = (uint64_t)idt};
    __asm__ volatile("lidt %0" ::"m"(idtr));
}

void descriptors_init(void)
{
    tss_load();
    idt_load();
}

/* The stubs call it. No exception is expected here: each one is the end. */
void unexpected_exception(const struct exception_frame *frame)
{
    fail("unexpected exception %lu, error code 0x%lx, at RIP 0x%lx\n", frame->vector, frame->error_code,
         frame->rip);
}
