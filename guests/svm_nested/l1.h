/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * svm_nested: L1 is this hypervisor, L2 the hypervisor that runs on it, L3 the guest of that one.
 */
#ifndef L1_H
#define L1_H

#include "svm.h"

/* L2's physical memory: so much of it, at this place in L1's. */
#define L2_MEMORY_BASE (64ul << 20)
#define L2_MEMORY_SIZE (16ul << 20)
#define LARGE_PAGE (2ul << 20)

enum { PAGE_PRESENT = 1, PAGE_WRITABLE = 2, PAGE_USER = 4, PAGE_LARGE = 128 };
#define PAGE_NO_EXECUTE (1ul << 63)
#define PAGE_ADDRESS_MASK 0x000FFFFFFFFFF000ul
#define EFER_LMA_MASK 0x400ul

/* What L1 pretends to L2 beyond the control block. */
struct l2 {
    struct vmcb *vmcb;
    uint64_t gpr[GPR_COUNT];                /* L2's and L3's alike: VMRUN does not switch them */
    bool svm_enabled, global_interrupts;
    uint64_t host_save_area;
    unsigned vmruns, exits_to_l2, faults_for_l1;
};

/* Where L1 has ``size`` bytes at L2's physical ``address``; ends the run if L2 has no such memory. */
void *l2_memory(uint64_t address, uint64_t size);

/* Puts the image into L2's memory and L2 at its Multiboot entry. */
void l2_boot(struct l2 *l2);

/* FS, GS, TR, LDTR and the MSRs that VMLOAD loads: L1 has its own, L2 and L3 share theirs. */
void run_with_guest_state(struct vmcb *vmcb, uint64_t gpr[GPR_COUNT]);

/* L2 executed VMRUN: runs L3 until it exits to L2. */
void l2_vmrun(struct l2 *l2);

/* The I/O permissions map that lets all through but the port that ends the run. */
extern uint8_t io_permissions[];

#endif
