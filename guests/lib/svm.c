/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What every SVM hypervisor does before its guest runs.
 */
#include "svm.h"

#include "console.h"
#include "memory.h"

enum { CPUID_EXTENDED_FEATURES = 0x80000001, CPUID_ECX_SVM = 1u << 2, CPUID_SVM = 0x8000000A };
enum { IA32_PAT = 0x277 };

/* Where VMRUN puts the host's state; its format is the processor's business. */
static uint8_t host_save_area[PAGE_SIZE] __attribute__((aligned(4096)));

static const struct {
    uint64_t code;
    const char *name;
} exit_names[] = {
    {SVM_EXIT_CR3_READ, "CR3 read"}, {SVM_EXIT_CR3_WRITE, "CR3 write"}, {SVM_EXIT_CPUID, "CPUID"},
    {SVM_EXIT_HLT, "HLT"},           {SVM_EXIT_IOIO, "I/O instruction"}, {SVM_EXIT_SHUTDOWN, "shutdown"},
    {SVM_EXIT_VMMCALL, "VMMCALL"},   {SVM_EXIT_NPF, "nested page fault"}, {SVM_EXIT_INVALID, "VMEXIT_INVALID"},
};

const char *svm_exit_name(uint64_t code)
{
    for (size_t i = 0; i < sizeof exit_names / sizeof exit_names[0]; i++)
        if (exit_names[i].code == code)
            return exit_names[i].name;
    return "not known here";
}

void svm_enable(uint32_t features)
{
    if (!(cpuid(CPUID_EXTENDED_FEATURES, 0).ecx & CPUID_ECX_SVM))
        fail("this processor has no SVM (CPUID 8000_0001H ECX.SVM = 0)\n");
    if ((cpuid(CPUID_SVM, 0).edx & features) != features)
        fail("this processor lacks features of SVM (CPUID 8000_000AH EDX = 0x%x)\n", cpuid(CPUID_SVM, 0).edx);
    if (rdmsr(MSR_VM_CR) & VM_CR_SVMDIS)
        fail("the firmware has disabled SVM (VM_CR.SVMDIS = 1)\n");
    wrmsr(IA32_EFER, rdmsr(IA32_EFER) | EFER_SVME);
    wrmsr(MSR_VM_HSAVE_PA, (uint64_t)host_save_area);
}

void vmcb_intercept(struct vmcb *vmcb, enum svm_exit number)
{
    vmcb->intercepts[number / 32] |= 1u << number % 32;
}

static void flat(struct vmcb_segment *segment, uint16_t selector, uint16_t attributes)
{
    *segment = (struct vmcb_segment){.selector = selector, .attributes = attributes, .limit = ~0u};
}

static void table(struct vmcb_segment *segment, struct table_register value)
{
    segment->limit = value.limit;
    segment->base = value.base;
}

void vmcb_create(struct vmcb *vmcb, uint64_t rip, uint64_t rsp)
{
    memset(vmcb, 0, sizeof *vmcb);
    vmcb_intercept(vmcb, SVM_EXIT_VMRUN);       /* VMRUN insists on it */
    vmcb_intercept(vmcb, SVM_EXIT_SHUTDOWN);    /* a triple fault shall be the guest's alone */
    vmcb->asid = 1;                             /* 0 is the host */

    flat(&vmcb->cs, 0x08, SVM_ATTRIBUTES_CODE64);
    flat(&vmcb->ss, 0x10, SVM_ATTRIBUTES_DATA);
    flat(&vmcb->ds, 0x10, SVM_ATTRIBUTES_DATA);
    flat(&vmcb->es, 0x10, SVM_ATTRIBUTES_DATA);
    table(&vmcb->gdtr, sgdt());
    table(&vmcb->idtr, sidt());
    vmcb->efer = rdmsr(IA32_EFER);              /* with SVME, which VMRUN insists on too */
    vmcb->cr0 = read_cr0();
    vmcb->cr3 = read_cr3();
    vmcb->cr4 = read_cr4();
    vmcb->dr6 = DR6_RESET;
    vmcb->dr7 = read_dr7();
    vmcb->rflags = RFLAGS_FIXED;
    vmcb->rip = rip;
    vmcb->rsp = rsp;
    vmcb->g_pat = rdmsr(IA32_PAT);
}
