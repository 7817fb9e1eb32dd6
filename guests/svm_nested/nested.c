/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * VMRUN for L2: L3 runs from a control block of L1's own, merged from what L2 and L1 want, behind
 * page tables that are L2's nested tables and L1's in one.
 */
#include "console.h"
#include "l1.h"
#include "memory.h"

enum { ASID_OF_L3 = 2, FLUSH_ALL = 1 };
enum { ENTRIES = 512, LEVEL_PD = 1, LEVEL_PML4 = 3, PAGE_BITS = 12, INDEX_BITS = 9 };

static struct vmcb vmcb02;                              /* L3's, for the processor */
static uint64_t shadow_pml4[ENTRIES] __attribute__((aligned(4096)));
static uint64_t shadow_pdpt[ENTRIES] __attribute__((aligned(4096)));
static uint64_t shadow_pd[ENTRIES] __attribute__((aligned(4096)));
static uint8_t msr_permissions[2 * PAGE_SIZE] __attribute__((aligned(4096)));

static void empty_shadow(void)
{
    const uint64_t flags = PAGE_PRESENT | PAGE_WRITABLE | PAGE_USER;

    memset(shadow_pd, 0, sizeof shadow_pd);
    shadow_pml4[0] = (uint64_t)shadow_pdpt | flags;
    shadow_pdpt[0] = (uint64_t)shadow_pd | flags;
}

/* The entry of L2's nested tables that maps the 2-MByte page of an address of L3; 0 if there is none. */
static uint64_t entry_of_l2(const struct vmcb *vmcb12, uint64_t address)
{
    uint64_t table = vmcb12->n_cr3 & PAGE_ADDRESS_MASK, all = ~0ul;

    for (int level = LEVEL_PML4; level >= LEVEL_PD; level--) {
        const uint64_t *entries = l2_memory(table, PAGE_SIZE);
        uint64_t entry = entries[address >> (PAGE_BITS + level * INDEX_BITS) & (ENTRIES - 1)];

        if (!(entry & PAGE_PRESENT))
            return 0;
        all &= entry | PAGE_ADDRESS_MASK | PAGE_NO_EXECUTE;
        if (entry & PAGE_LARGE) {
            if (level != LEVEL_PD)
                fail("L2 maps L3's memory in pages of a size that L1 does not know\n");
            return (entry & PAGE_ADDRESS_MASK & ~(LARGE_PAGE - 1)) | (all & (PAGE_WRITABLE | PAGE_USER)) |
                   (entry & PAGE_NO_EXECUTE) | PAGE_PRESENT | PAGE_LARGE;
        }
        table = entry & PAGE_ADDRESS_MASK;
    }
    fail("L2 maps L3's memory in 4-KByte pages, which L1 does not know\n");
}

/* L3 touched what the shadow lacks: true if L1 has filled it in, false if it is L2's to handle. */
static bool fill_shadow(const struct vmcb *vmcb12, uint64_t address)
{
    uint64_t entry = entry_of_l2(vmcb12, address);
    uint64_t *shadow = &shadow_pd[address / LARGE_PAGE % ENTRIES];

    if (!entry || *shadow)
        return false;                                   /* absent, or forbidden by L2 */
    l2_memory(entry & PAGE_ADDRESS_MASK, LARGE_PAGE);
    *shadow = entry + L2_MEMORY_BASE;
    return true;
}

static void merge(const struct vmcb *vmcb12)
{
    memcpy(&vmcb02, vmcb12, sizeof vmcb02);
    vmcb_intercept(&vmcb02, SVM_EXIT_VMRUN);
    vmcb_intercept(&vmcb02, SVM_EXIT_SHUTDOWN);
    vmcb_intercept(&vmcb02, SVM_EXIT_MSR);
    memset(msr_permissions, 0xFF, sizeof msr_permissions);
    vmcb02.msrpm_base = (uint64_t)msr_permissions;
    if (vmcb12->intercepts[SVM_EXIT_IOIO / 32] & 1u << SVM_EXIT_IOIO % 32)
        vmcb02.iopm_base = (uint64_t)l2_memory(vmcb12->iopm_base, 3 * PAGE_SIZE);
    else
        vmcb02.iopm_base = (uint64_t)io_permissions;
    vmcb_intercept(&vmcb02, SVM_EXIT_IOIO);
    vmcb02.asid = ASID_OF_L3;
    vmcb02.tlb_control = FLUSH_ALL;
    vmcb02.nested_control = SVM_NESTED_PAGING;
    vmcb02.n_cr3 = (uint64_t)shadow_pml4;
}

/* What #VMEXIT stores: the guest's state and why it exited. */
static void exit_to_l2(struct vmcb *vmcb12)
{
    vmcb12->virtual_interrupts = vmcb02.virtual_interrupts;
    vmcb12->interrupt_state = vmcb02.interrupt_state;
    vmcb12->exit_code = vmcb02.exit_code;
    vmcb12->exit_info1 = vmcb02.exit_info1;
    vmcb12->exit_info2 = vmcb02.exit_info2;
    vmcb12->exit_int_info = vmcb02.exit_int_info;
    vmcb12->event_injection = vmcb02.event_injection;
    vmcb12->next_rip = vmcb02.next_rip;
    memcpy(&vmcb12->es, &vmcb02.es, sizeof vmcb02 - offsetof(struct vmcb, es));
}

void l2_vmrun(struct l2 *l2)
{
    struct vmcb *vmcb12 = l2_memory(l2->vmcb->rax, sizeof *vmcb12);

    if (!(vmcb12->nested_control & SVM_NESTED_PAGING))
        fail("L2 runs L3 without nested paging, which L1 does not know\n");
    if (vmcb12->asid == 0) {
        vmcb12->exit_code = SVM_EXIT_INVALID;           /* what the merged block would hide */
        return;
    }
    l2->vmruns++;
    empty_shadow();
    merge(vmcb12);
    l2->global_interrupts = true;
    do {
        run_with_guest_state(&vmcb02, l2->gpr);
        if (vmcb02.exit_code != SVM_EXIT_NPF || !fill_shadow(vmcb12, vmcb02.exit_info2))
            break;
        l2->faults_for_l1++;
    } while (true);
    if (vmcb02.exit_code == SVM_EXIT_MSR)
        fail("L3 accessed MSR 0x%x, which L1 does not know\n", (uint32_t)l2->gpr[RCX]);
    l2->exits_to_l2++;
    exit_to_l2(vmcb12);
    l2->global_interrupts = false;
}
