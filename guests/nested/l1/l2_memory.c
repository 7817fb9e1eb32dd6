/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "console.h"
#include "elf32.h"
#include "l1.h"
#include "memory.h"

enum { PAGE_PRESENT = 1u << 0, PAGE_WRITABLE = 1u << 1, PAGE_LARGE = 1u << 7 };
enum { PAGE_FAULT_PRESENT = 1u << 0, PAGE_FAULT_WRITE = 1u << 1 };
enum { TOP_LEVEL = 4, INDEX_BITS = 9, PAGE_BITS = 12 };
#define PAGE_ADDRESS_MASK 0x000FFFFFFFFFF000ul

uint64_t l2_memory_size;

void *l2_memory(uint64_t guest_physical, uint64_t size)
{
    if (guest_physical >= l2_memory_size || size > l2_memory_size - guest_physical)
        return NULL;
    return (void *)(L2_MEMORY_BASE + guest_physical);
}

bool l2_has_page(uint64_t guest_physical)
{
    return guest_physical % PAGE_SIZE == 0 && l2_memory(guest_physical, PAGE_SIZE);
}

/* --- linear addresses ---------------------------------------------------------------------- */

static bool page_fault(uint64_t linear, uint32_t error_code)
{
    write_cr2(linear);                  /* no VMCS holds CR2: L2 has the real one */
    inject_exception_with_code(VECTOR_PF, error_code);
    return false;
}

/* A 4-level walk for a supervisor access, as L2 executes VMX instructions at CPL 0 only. */
static bool translate(uint64_t linear, bool write, void **where)
{
    uint64_t table = vmread(GUEST_CR3) & PAGE_ADDRESS_MASK;

    for (int level = TOP_LEVEL; level > 0; level--) {
        unsigned shift = PAGE_BITS + (level - 1) * INDEX_BITS;
        uint64_t offset_mask = (1ul << shift) - 1;
        uint64_t *entries = l2_memory(table, PAGE_SIZE);
        if (!entries)
            fail("L2's page tables are outside its memory, at 0x%lx\n", table);

        uint64_t entry = entries[linear >> shift & 511];
        if (!(entry & PAGE_PRESENT))
            return page_fault(linear, write ? PAGE_FAULT_WRITE : 0);
        if (write && !(entry & PAGE_WRITABLE))
            return page_fault(linear, PAGE_FAULT_PRESENT | PAGE_FAULT_WRITE);
        if (level == 1 || (entry & PAGE_LARGE)) {
            uint64_t page = entry & PAGE_ADDRESS_MASK & ~offset_mask;
            *where = l2_memory(page | (linear & offset_mask), 1);
            if (!*where)
                fail("L2 uses memory it does not have, at 0x%lx\n", page | (linear & offset_mask));
            return true;
        }
        table = entry & PAGE_ADDRESS_MASK;
    }
    __builtin_unreachable();
}

static uint64_t bytes_left_in_page(uint64_t linear)
{
    return PAGE_SIZE - linear % PAGE_SIZE;
}

/* Both pages of an operand are translated before a byte moves: a fault must leave no trace. */
static bool copy_linear(uint64_t linear, uint8_t *buffer, uint64_t size, bool write)
{
    uint64_t first = size < bytes_left_in_page(linear) ? size : bytes_left_in_page(linear);
    void *low, *high = NULL;

    if (!translate(linear, write, &low) || (first < size && !translate(linear + first, write, &high)))
        return false;
    if (write) {
        memcpy(low, buffer, first);
        memcpy(high, buffer + first, size - first);
    } else {
        memcpy(buffer, low, first);
        memcpy(buffer + first, high, size - first);
    }
    return true;
}

bool l2_read_linear(uint64_t linear, void *to, uint64_t size)
{
    return copy_linear(linear, to, size, false);
}

bool l2_write_linear(uint64_t linear, const void *from, uint64_t size)
{
    return copy_linear(linear, (uint8_t *)from, size, true);
}

/* --- image --------------------------------------------------------------------------------- */

uint32_t l2_load_image(const uint8_t *image, uint64_t size)
{
    const struct elf32_header *header = (const void *)image;
    const struct elf32_program_header *segment;

    if (size < sizeof *header || memcmp(header->identification, "\177ELF\1", 5) ||
        header->program_header_offset + header->program_header_count * (uint64_t)sizeof *segment > size)
        fail("the image for L2 is not an ELF32 file\n");
    segment = (const void *)(image + header->program_header_offset);
    for (unsigned i = 0; i < header->program_header_count; i++, segment++) {
        if (segment->type != ELF_PT_LOAD)
            continue;
        uint8_t *to = l2_memory(segment->physical_address, segment->memory_size);
        if (!to || segment->file_size > segment->memory_size || (uint64_t)segment->offset + segment->file_size > size)
            fail("a segment of the image for L2 does not fit its memory\n");
        memcpy(to, image + segment->offset, segment->file_size);
        memset(to + segment->file_size, 0, segment->memory_size - segment->file_size);
    }
    return header->entry;
}
