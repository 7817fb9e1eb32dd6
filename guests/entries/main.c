/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * entries: VM entries through a list of VMCSs, and how each one ended.
 *
 * The list is a Multiboot module (README.md has its format). Nothing in it is taken to be valid: a VM
 * entry that fails is as good a result as one that succeeds.
 */
#include "console.h"
#include "cpu.h"
#include "descriptors.h"
#include "state_list.h"
#include "vmx.h"

const char console_tag[] = "[entries] ";

enum { MAGIC = 0x5345545453434D56 };                    /* "VMCSTTES" in memory */
enum { VM_FUNCTIONS = 1u << 13, TERTIARY_CONTROLS = 1u << 17, EPT_OR_VPID = 1u << 1 | 1u << 5 };

/* enter.S */
enum vmx_status enter_once(void);
extern const uint8_t after_vm_exit[];
extern uint64_t host_rsp;

static struct vmx_region region;

/* What VM exits load from a VMCS that may hold anything. */
static struct {
    uint64_t cr0, cr4, efer;
    struct table_register idtr;
} own;

static void print_msr(uint32_t index)
{
    print("msr %x %lx\n", index, rdmsr(index));
}

/* All capability MSRs that exist, so that whoever compares two processors knows whether they are the same. */
static void print_processor(void)
{
    uint32_t leaf = 0x80000008;
    uint32_t primary = (uint32_t)(rdmsr(IA32_VMX_PROCBASED_CTLS) >> 32), secondary = 0;

    print("widths %x\n", cpuid(leaf, 0).eax & 0xFFFF);
    for (uint32_t index = IA32_VMX_BASIC; index < IA32_VMX_PROCBASED_CTLS2; index++)
        print_msr(index);
    if (primary & PRIMARY_ACTIVATE_SECONDARY_CONTROLS) {
        secondary = (uint32_t)(rdmsr(IA32_VMX_PROCBASED_CTLS2) >> 32);
        print_msr(IA32_VMX_PROCBASED_CTLS2);
    }
    if (secondary & EPT_OR_VPID)
        print_msr(IA32_VMX_EPT_VPID_CAP);
    if (rdmsr(IA32_VMX_BASIC) & VMX_BASIC_TRUE_CONTROLS)
        for (uint32_t index = IA32_VMX_TRUE_PINBASED_CTLS; index <= IA32_VMX_TRUE_ENTRY_CTLS; index++)
            print_msr(index);
    if (secondary & VM_FUNCTIONS)
        print_msr(IA32_VMX_VMFUNC);
    if (primary & TERTIARY_CONTROLS)
        print_msr(IA32_VMX_PROCBASED_CTLS3);
}

static void restore_processor(void)
{
    write_cr4(own.cr4);
    write_cr0(own.cr0);
    wrmsr(IA32_EFER, own.efer);
    __asm__ volatile("lidt %0" ::"m"(own.idtr));
}

/* Copies pieces of memory to where the list says; returns what follows. */
static const uint64_t *place_memory(const uint64_t *list)
{
    for (uint64_t count = *list++; count; count--) {
        uint64_t *to = (uint64_t *)list[0], words = list[1] / sizeof *list;

        list += 2;
        __asm__ volatile("rep movsq" : "+D"(to), "+S"(list), "+c"(words)::"memory");
    }
    return list;
}

/* VMWRITEs what the list says; returns what follows. */
static const uint64_t *write_fields(const uint64_t *list)
{
    for (uint64_t count = *list++; count; count--, list += 2)
        vmwrite((enum vmcs_field)list[0], list[1]);
    return list;
}

/* Translations of the guest before may be cached for as long as nobody says otherwise. */
static void forget_translations(void)
{
    vmx_require("INVEPT", invept(INVALIDATE_ALL_CONTEXTS, 0));
    vmx_require("INVVPID", invvpid(INVALIDATE_ALL_CONTEXTS, 0));
}

/* The deltas come last, so that they can also break what only this program knows about the host. */
static const uint64_t *build_vmcs(const uint64_t *base, const uint64_t *deltas)
{
    uint64_t address = (uint64_t)&region;

    vmx_require("VMCLEAR", vmclear(&address));
    vmx_require("VMPTRLD", vmptrld(&address));
    write_fields(base);
    vmwrite(HOST_CR3, read_cr3());
    vmwrite(HOST_RSP, host_rsp);
    vmwrite(HOST_RIP, (uint64_t)after_vm_exit);
    return write_fields(deltas);
}

static void print_result(uint64_t number, enum vmx_status status)
{
    switch (status) {
    case VM_FAIL_INVALID:
        print("%lu invalid\n", number);
        return;
    case VM_FAIL_VALID:
        print("%lu valid %lx\n", number, vmread(VM_INSTRUCTION_ERROR));
        return;
    case VM_SUCCEED:
        print("%lu exit %lx %lx %lx %lx\n", number, vmread(EXIT_REASON), vmread(EXIT_QUALIFICATION),
              vmread(EXIT_INTERRUPTION_INFORMATION), vmread(IDT_VECTORING_INFORMATION));
        return;
    }
}

static const uint64_t *run_state(uint64_t number, const uint64_t *memory, const uint64_t *base, const uint64_t *changes)
{
    (void)memory;
    forget_translations();
    changes = build_vmcs(base, changes);
    enum vmx_status status = enter_once();
    if (status == VM_SUCCEED)
        restore_processor();
    print_result(number, status);
    return changes;
}

int main(const struct multiboot_info *info)
{
    const uint64_t *list = state_list_open(info, MAGIC);

    vmx_enable();
    region.revision_identifier = (uint32_t)rdmsr(IA32_VMX_BASIC) & 0x7FFFFFFF;
    own.cr0 = read_cr0();
    own.cr4 = read_cr4();
    own.efer = rdmsr(IA32_EFER);
    own.idtr = sidt();
    print_processor();
    state_list_run(list, place_memory, run_state);
    return STATUS_PASS;
}
