/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the files of L1 share. VMCSs are numbered as in every text on nested virtualization: 01 is
 * L1's for L2, 12 is L2's for L3, 02 is the one hardware runs L3 with, built by L1 from the others.
 */
#ifndef L1_H
#define L1_H

#include <stdbool.h>
#include <stdint.h>

#include "vmx.h"

/* --- state (main.c) ------------------------------------------------------------------------ */

#define NO_VMCS (~0ul)
enum { VPID_L2 = 1, VPID_L3 = 2 };

/* What a processor knows about VMX operation, for the processor that L2 sees. */
struct virtual_vmx {
    uint64_t feature_control;
    uint64_t vmxon_pointer;
    uint64_t current_vmcs;              /* NO_VMCS, or the guest-physical address of VMCS 12 */
    uint64_t last_vpid12;
    bool on;                            /* between VMXON and VMXOFF */
    bool in_l3;                         /* VMX non-root operation, as L2 sees it */
};

extern struct virtual_vmx virtual_vmx;
extern struct vmcs vmcs01, vmcs02;
extern uint64_t gpr[GPR_COUNT];         /* of L2 or L3, whichever ran last; entries and exits keep them */

/* --- l2_memory.c: L2's memory, from guest-physical 0 --------------------------------------- */

#define L2_MEMORY_BASE 0x1000000ul      /* where it is in L1's physical memory */
#define L2_MEMORY_MINIMUM 0x800000ul
extern uint64_t l2_memory_size;         /* all memory from L2_MEMORY_BASE on, in pages of 2 MiB */

/* Null unless all of `size` bytes is memory of L2. */
void *l2_memory(uint64_t guest_physical, uint64_t size);
bool l2_has_page(uint64_t guest_physical);

/* Access by linear address with L2's paging. False: a page fault was injected instead. */
bool l2_read_linear(uint64_t linear, void *to, uint64_t size);
bool l2_write_linear(uint64_t linear, const void *from, uint64_t size);

/* Loads an ELF32 Multiboot image; returns its entry point. */
uint32_t l2_load_image(const uint8_t *image, uint64_t size);

/* --- ept.c: the tables hardware uses -------------------------------------------------------- */

enum { EPT_READ = 1u << 0, EPT_WRITE = 1u << 1, EPT_EXECUTE = 1u << 2, EPT_ALL = 7 };
enum { EPT_LARGE_PAGE = 1u << 7 };
#define EPT_ADDRESS_MASK 0x000FFFFFFFFFF000ul

/* EPT 01: guest-physical 0 to l2_memory_size. Returns its EPT pointer. */
uint64_t ept01_build(void);

/* EPT 02, the shadow of L2's EPT 12: filled on demand, emptied when EPT 12 may have changed. */
uint64_t ept02_pointer(void);
void ept02_map(uint64_t guest_physical, uint64_t physical, uint64_t permissions);
void ept02_empty(void);

/* --- ept12.c: the tables L2 wrote ------------------------------------------------------------ */

enum ept12_outcome { EPT12_MAPPED, EPT12_VIOLATION, EPT12_MISCONFIGURATION };

/* Answers an EPT violation of L3 under EPT 02. EPT12_MAPPED: EPT 02 has the page now, L3 may try
 * again. Otherwise the VM exit is L2's, and the qualification becomes the one L2 shall see. */
enum ept12_outcome ept12_resolve(uint64_t guest_physical, uint64_t *qualification);

/* --- l2_exits.c: L1 as an ordinary hypervisor ----------------------------------------------- */

void handle_l2_exit(uint32_t reason);
void inject_exception(enum vector vector);
void inject_exception_with_code(enum vector vector, uint32_t error_code);

/* The processor that L2 sees; L3 sees the same where L2 does not intercept. False: #GP. */
bool emulate_rdmsr(uint32_t msr, uint64_t *value);
bool emulate_wrmsr(uint32_t msr, uint64_t value);
void handle_msr_exit(bool write);
void handle_io_exit(void);

extern uint8_t io_bitmaps01[2 * PAGE_SIZE], msr_bitmaps01[PAGE_SIZE];
void build_bitmaps01(void);

/* --- capabilities.c: the VMX capability MSRs that L2 sees ------------------------------------ */

#define VMCS12_REVISION 0x4C310001u

bool is_capability_msr(uint32_t msr);
uint64_t virtual_capability(uint32_t msr);

/* --- vmcs12.c: fields in L2's VMCS region ---------------------------------------------------- */

enum field_list { FIELDS_CONTROL, FIELDS_GUEST_STATE, FIELDS_HOST_STATE, FIELDS_READ_ONLY, FIELD_LIST_COUNT };

struct field_span {
    const uint16_t *fields;
    unsigned count;
};
extern const struct field_span vmcs12_fields[FIELD_LIST_COUNT];

bool vmcs12_has_field(uint64_t encoding);
uint64_t vmcs12_read(uint64_t encoding);
void vmcs12_write(uint64_t encoding, uint64_t value);
uint32_t vmcs12_secondary_controls(void);       /* 0 unless activated */
bool vmcs12_is_launched(void);
void vmcs_region_set_launched(uint64_t guest_physical, bool launched);

/* --- vmx_instructions.c: L2's VMX instructions ----------------------------------------------- */

bool is_vmx_instruction(uint32_t reason);
void handle_vmx_instruction(uint32_t reason);

/* Completes L2's VMLAUNCH or VMRESUME after all with VMfailValid. */
void vm_entry_refused(uint32_t error);

/* --- nested_entry.c: VMCS 12 and 01 to 02 ---------------------------------------------------- */

/* 0, or the VM-instruction error of the first check that L2's VMCS does not pass. */
uint32_t nested_entry_check(void);
void nested_entry(void);

/* --- nested_exit.c: back to L2 --------------------------------------------------------------- */

/* Decides whose exit it is; returns whether it was given to L2. */
bool handle_l3_exit(uint32_t reason);

#endif
