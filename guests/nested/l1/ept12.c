/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L2's EPT, walked by software. EPT 12 gives L2's addresses, which hardware cannot use: each entry
 * that L3 needs is composed with L1's own translation and put into EPT 02.
 *
 * Spec: SDM volume 3, "The Extended Page Table Mechanism (EPT)".
 */
#include "console.h"
#include "l1.h"

enum { TOP_LEVEL = 4, LEVEL_PDPT = 3, LEVEL_PD = 2, LEVEL_PT = 1, INDEX_BITS = 9, PAGE_BITS = 12 };
enum { VIOLATION_ACCESS_MASK = 7, VIOLATION_PERMISSIONS_SHIFT = 3 };

struct walk {
    enum ept12_outcome outcome;
    uint64_t address, permissions;      /* permissions: of every entry used so far */
};

static unsigned level_shift(int level)
{
    return PAGE_BITS + (unsigned)(level - 1) * INDEX_BITS;
}

static bool is_leaf(uint64_t entry, int level)
{
    return level == LEVEL_PT || (level == LEVEL_PD && (entry & EPT_LARGE_PAGE));
}

static bool memory_type_reserved(uint64_t entry)
{
    uint64_t type = entry >> 3 & 7;

    return type == 2 || type == 3 || type == 7;
}

/* Bits that must be 0 besides the permissions. L2's processor has no pages of 1 GiB. */
static uint64_t reserved_bits(uint64_t entry, int level)
{
    unsigned physical_address_width = cpuid(0x80000008, 0).eax & 0xFF;
    uint64_t too_high = EPT_ADDRESS_MASK & ~((1ul << physical_address_width) - 1);

    if (level == LEVEL_PT)
        return too_high;
    if (is_leaf(entry, level))
        return too_high | 0x1FF000;
    return too_high | (level == LEVEL_PD ? 0x78 : 0xF8);
}

static bool is_misconfigured(uint64_t entry, int level)
{
    bool write_or_execute_only = !(entry & EPT_READ);   /* execute-only needs a capability not offered */

    return write_or_execute_only || (entry & reserved_bits(entry, level)) ||
           (is_leaf(entry, level) && memory_type_reserved(entry));
}

static struct walk walk(uint64_t guest_physical)
{
    struct walk result = {.permissions = EPT_ALL};
    uint64_t table = vmcs12_read(EPT_POINTER) & EPT_ADDRESS_MASK;

    for (int level = TOP_LEVEL;; level--) {
        unsigned shift = level_shift(level);
        const uint64_t *entries = l2_memory(table, PAGE_SIZE);
        uint64_t entry = entries ? entries[guest_physical >> shift & 511] : ~0ul;       /* no memory: all ones */

        result.permissions &= entry;
        if (!(entry & EPT_ALL)) {
            result.outcome = EPT12_VIOLATION;
            return result;
        }
        if (is_misconfigured(entry, level)) {
            result.outcome = EPT12_MISCONFIGURATION;
            return result;
        }
        table = entry & EPT_ADDRESS_MASK;
        if (is_leaf(entry, level)) {
            result.outcome = EPT12_MAPPED;
            result.address = table | (guest_physical & ((1ul << shift) - 1));
            return result;
        }
    }
}

enum ept12_outcome ept12_resolve(uint64_t guest_physical, uint64_t *qualification)
{
    struct walk found = walk(guest_physical);
    uint64_t access = *qualification & VIOLATION_ACCESS_MASK;
    void *page;

    if (found.outcome == EPT12_MAPPED && access & ~found.permissions)
        found.outcome = EPT12_VIOLATION;
    switch (found.outcome) {
    case EPT12_VIOLATION:               /* hardware described EPT 02's permissions, L2 wants EPT 12's */
        *qualification &= ~((uint64_t)EPT_ALL << VIOLATION_PERMISSIONS_SHIFT);
        *qualification |= found.permissions << VIOLATION_PERMISSIONS_SHIFT;
        break;
    case EPT12_MISCONFIGURATION:
        *qualification = 0;
        break;
    case EPT12_MAPPED:
        page = l2_memory(found.address & EPT_ADDRESS_MASK, PAGE_SIZE);
        if (!page)
            fail("L2's EPT maps memory that L2 does not have, at 0x%lx\n", found.address);
        ept02_map(guest_physical & EPT_ADDRESS_MASK, (uint64_t)page, found.permissions);
        break;
    }
    return found.outcome;
}
