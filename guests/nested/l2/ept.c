/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "console.h"
#include "cpu.h"
#include "l2.h"
#include "memory.h"
#include "vmx.h"

enum {
    EPT_READ = 1u << 0,
    EPT_WRITE = 1u << 1,
    EPT_EXECUTE = 1u << 2,
    EPT_ALL = EPT_READ | EPT_WRITE | EPT_EXECUTE,
    EPT_WRITE_BACK = 6u << 3,
    EPT_LARGE_PAGE = 1u << 7,
    EPTP_WRITE_BACK = 6,
    EPTP_WALK_LENGTH_4 = 3u << 3,
    VIOLATION_WRITE = 1u << 1,
};
#define LARGE_PAGE_SIZE 0x200000ul
#define LARGE_PAGE_COUNT 4ul           /* the memory L1 gives L2: 8 MiB */

typedef uint64_t ept_table[512] __attribute__((aligned(4096)));

static ept_table level4, level3, level2, window_table;
char window_page[4096] __attribute__((aligned(4096)));

static uint64_t ept_pointer(void)
{
    return (uint64_t)level4 | EPTP_WALK_LENGTH_4 | EPTP_WRITE_BACK;
}

uint64_t ept_build(void)
{
    level4[0] = (uint64_t)level3 | EPT_ALL;
    level3[0] = (uint64_t)level2 | EPT_ALL;
    for (uint64_t i = 0; i < LARGE_PAGE_COUNT; i++)
        level2[i] = i * LARGE_PAGE_SIZE | EPT_LARGE_PAGE | EPT_WRITE_BACK | EPT_ALL;
    level2[WINDOW_ADDRESS / LARGE_PAGE_SIZE] = (uint64_t)window_table | EPT_ALL;
    memcpy(window_page, WINDOW_GREETING, sizeof WINDOW_GREETING);
    return ept_pointer();
}

void ept_handle_violation(uint64_t guest_physical, uint64_t qualification)
{
    if (guest_physical / PAGE_SIZE != WINDOW_ADDRESS / PAGE_SIZE)
        fail("L3 has no guest-physical address 0x%lx\n", guest_physical);

    window_table[0] = (uint64_t)window_page | EPT_WRITE_BACK | EPT_READ;
    if (qualification & VIOLATION_WRITE) {
        window_table[0] |= EPT_WRITE;
        vmx_require("INVEPT", invept(INVALIDATE_SINGLE_CONTEXT, ept_pointer()));
    }
}
