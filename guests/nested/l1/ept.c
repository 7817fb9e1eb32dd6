/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "console.h"
#include "l1.h"
#include "memory.h"

enum {
    EPT_WRITE_BACK = 6u << 3,
    EPTP_WRITE_BACK = 6,
    EPTP_WALK_LENGTH_4 = 3u << 3,
    LEVEL_4K = 1,
    LEVEL_2M = 2,
    TOP_LEVEL = 4,
    TABLE_COUNT = 16,
};
#define LARGE_PAGE_SIZE 0x200000ul

typedef uint64_t ept_table[512] __attribute__((aligned(4096)));

/* One address space. The first table is the root; the others are taken in order. */
struct ept {
    ept_table tables[TABLE_COUNT];
    unsigned used;
};

static struct ept ept01, ept02;

static uint64_t pointer(const struct ept *ept)
{
    return (uint64_t)ept->tables[0] | EPTP_WALK_LENGTH_4 | EPTP_WRITE_BACK;
}

static void empty(struct ept *ept)
{
    memset(ept->tables, 0, ept->used * sizeof(ept_table));
    ept->used = 1;
}

/* Permissions are those of the leaf: entries above it allow everything. */
static void map(struct ept *ept, uint64_t guest_physical, uint64_t physical, int leaf_level, uint64_t permissions)
{
    uint64_t *table = ept->tables[0], *entry;

    for (int level = TOP_LEVEL;; level--) {
        entry = &table[guest_physical >> (12 + (level - 1) * 9) & 511];
        if (level == leaf_level)
            break;
        if (!*entry)
            *entry = (uint64_t)ept->tables[ept->used++] | EPT_ALL;
        table = (uint64_t *)(*entry & EPT_ADDRESS_MASK);
    }
    *entry = physical | EPT_WRITE_BACK | permissions | (leaf_level == LEVEL_2M ? EPT_LARGE_PAGE : 0);
}

uint64_t ept01_build(void)
{
    empty(&ept01);
    /* Pages of 4 KiB below 2 MiB and of 2 MiB above: both kinds get their use. */
    for (uint64_t address = 0; address < LARGE_PAGE_SIZE; address += PAGE_SIZE)
        map(&ept01, address, L2_MEMORY_BASE + address, LEVEL_4K, EPT_ALL);
    for (uint64_t address = LARGE_PAGE_SIZE; address < l2_memory_size; address += LARGE_PAGE_SIZE)
        map(&ept01, address, L2_MEMORY_BASE + address, LEVEL_2M, EPT_ALL);
    return pointer(&ept01);
}

uint64_t ept02_pointer(void)
{
    if (!ept02.used)
        empty(&ept02);
    return pointer(&ept02);
}

void ept02_empty(void)
{
    empty(&ept02);
    vmx_require("INVEPT", invept(INVALIDATE_SINGLE_CONTEXT, pointer(&ept02)));
}

void ept02_map(uint64_t guest_physical, uint64_t physical, uint64_t permissions)
{
    /* Three tables at most are missing for one page. Without them, start over: it is a cache. */
    if (ept02.used + 3 > TABLE_COUNT)
        ept02_empty();
    map(&ept02, guest_physical, physical, LEVEL_4K, permissions);
}
