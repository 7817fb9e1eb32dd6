/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L2's memory, and how L2 gets into it.
 */
#include "console.h"
#include "elf32.h"
#include "l1.h"
#include "memory.h"
#include "multiboot.h"

enum { MULTIBOOT_INFO_ADDRESS = 0x9000 };
enum { ATTRIBUTES_CODE32 = 0xC9B, CR0_AT_ENTRY = CR0_PE | CR0_ET };

extern const uint8_t l2_image[], l2_image_end[];        /* l2_image.S */

static uint64_t nested_pml4[512] __attribute__((aligned(4096)));
static uint64_t nested_pdpt[512] __attribute__((aligned(4096)));
static uint64_t nested_pd[512] __attribute__((aligned(4096)));

void *l2_memory(uint64_t address, uint64_t size)
{
    if (address >= L2_MEMORY_SIZE || size > L2_MEMORY_SIZE - address)
        fail("L2 has no memory at 0x%lx\n", address);
    return (void *)(L2_MEMORY_BASE + address);
}

static void build_nested_tables(void)
{
    const uint64_t flags = PAGE_PRESENT | PAGE_WRITABLE | PAGE_USER;

    nested_pml4[0] = (uint64_t)nested_pdpt | flags;
    nested_pdpt[0] = (uint64_t)nested_pd | flags;
    for (uint64_t i = 0; i < L2_MEMORY_SIZE / LARGE_PAGE; i++)
        nested_pd[i] = (L2_MEMORY_BASE + i * LARGE_PAGE) | flags | PAGE_LARGE;
}

static uint32_t load_image(void)
{
    const struct elf32_header *header = (const void *)l2_image;
    const struct elf32_program_header *segment = (const void *)(l2_image + header->program_header_offset);

    if (memcmp(header->identification, "\177ELF\1", 5))
        fail("the image for L2 is not an ELF32 file\n");
    for (unsigned i = 0; i < header->program_header_count; i++, segment++) {
        if (segment->type != ELF_PT_LOAD)
            continue;
        uint8_t *to = l2_memory(segment->physical_address, segment->memory_size);
        memcpy(to, l2_image + segment->offset, segment->file_size);
        memset(to + segment->file_size, 0, segment->memory_size - segment->file_size);
    }
    return header->entry;
}

/* 32-bit protected mode with flat segments, as Multiboot asks for. */
void l2_boot(struct l2 *l2)
{
    struct vmcb *vmcb = l2->vmcb;
    struct multiboot_info *info = l2_memory(MULTIBOOT_INFO_ADDRESS, sizeof *info);

    build_nested_tables();
    vmcb_create(vmcb, load_image(), 0);
    vmcb->nested_control = SVM_NESTED_PAGING;
    vmcb->n_cr3 = (uint64_t)nested_pml4;
    vmcb->cs.attributes = ATTRIBUTES_CODE32;
    vmcb->gdtr.limit = vmcb->idtr.limit = 0;
    vmcb->efer = EFER_SVME;                             /* VMRUN insists; L2 will not see it */
    vmcb->cr0 = CR0_AT_ENTRY;
    vmcb->cr3 = vmcb->cr4 = 0;
    vmcb->rax = MULTIBOOT_LOADER_MAGIC;
    l2->gpr[RBX] = MULTIBOOT_INFO_ADDRESS;
    info->flags = MULTIBOOT_INFO_MEMORY;
    info->memory_lower_kib = 640;
    info->memory_upper_kib = (uint32_t)(L2_MEMORY_SIZE >> 10) - 1024;
    l2->global_interrupts = true;
}
