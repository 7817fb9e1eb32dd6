/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * svm_nested: a hypervisor that gives its guest AMD-V, so that another hypervisor can run there:
 * svm_hello, the very image that also runs on a bare processor.
 *
 * Read main() first, then run_l2() and the handlers, then nested.c.
 */
#include "console.h"
#include "descriptors.h"
#include "l1.h"
#include "memory.h"

enum { MSR_IS_WRITE = 1, IA32_PAT = 0x277, DEBUG_EXIT_PORTS = 4 };

const char console_tag[] = "[L1] ";

uint8_t io_permissions[3 * PAGE_SIZE] __attribute__((aligned(4096)));

static struct vmcb vmcb01;                              /* L2's */
static struct vmcb state_of_l1, state_of_guests;        /* for VMSAVE and VMLOAD alone */
static uint8_t msr_permissions[2 * PAGE_SIZE] __attribute__((aligned(4096)));
static struct l2 l2 = {.vmcb = &vmcb01};
static unsigned exits, msr_accesses;

static inline void vmsave(struct vmcb *vmcb)
{
    __asm__ volatile("vmsave %%rax" ::"a"(vmcb) : "memory");
}

static inline void vmload(struct vmcb *vmcb)
{
    __asm__ volatile("vmload %%rax" ::"a"(vmcb) : "memory");
}

void run_with_guest_state(struct vmcb *vmcb, uint64_t gpr[GPR_COUNT])
{
    vmsave(&state_of_l1);
    vmload(&state_of_guests);
    svm_run((uint64_t)vmcb, gpr);
    vmsave(&state_of_guests);
    vmload(&state_of_l1);
}

static uint64_t read_msr_of_l2(uint32_t msr)
{
    switch (msr) {
    case IA32_EFER:
        return l2.svm_enabled ? vmcb01.efer : vmcb01.efer & ~(uint64_t)EFER_SVME;
    case MSR_VM_CR:
        return 0;
    case MSR_VM_HSAVE_PA:
        return l2.host_save_area;
    case IA32_PAT:
        return rdmsr(IA32_PAT);
    default:
        fail("L2 read MSR 0x%x, which L1 does not know\n", msr);
    }
}

static void write_msr_of_l2(uint32_t msr, uint64_t value)
{
    switch (msr) {
    case IA32_EFER:
        if ((value & EFER_SVME) && !l2.svm_enabled)
            say("L2 switches SVM on\n");
        l2.svm_enabled = value & EFER_SVME;
        vmcb01.efer = (value & ~EFER_LMA_MASK) | (vmcb01.efer & EFER_LMA_MASK) | EFER_SVME;
        break;
    case MSR_VM_HSAVE_PA:
        l2.host_save_area = value;
        break;
    default:
        fail("L2 wrote MSR 0x%x, which L1 does not know\n", msr);
    }
}

static void handle_msr_access(void)
{
    uint32_t msr = (uint32_t)l2.gpr[RCX];

    msr_accesses++;
    if (vmcb01.exit_info1 == MSR_IS_WRITE) {
        write_msr_of_l2(msr, l2.gpr[RDX] << 32 | (uint32_t)vmcb01.rax);
    } else {
        uint64_t value = read_msr_of_l2(msr);
        vmcb01.rax = (uint32_t)value;
        l2.gpr[RDX] = value >> 32;
    }
}

/* Until L2 ends its run, by the port that would end everybody's. */
static uint32_t run_l2(void)
{
    for (;;) {
        run_with_guest_state(&vmcb01, l2.gpr);
        exits++;
        switch (vmcb01.exit_code) {
        case SVM_EXIT_VMRUN:
            if (!l2.svm_enabled)
                fail("L2 executed VMRUN without SVM\n");
            l2_vmrun(&l2);
            break;
        case SVM_EXIT_STGI:
        case SVM_EXIT_CLGI:
            l2.global_interrupts = vmcb01.exit_code == SVM_EXIT_STGI;
            break;
        case SVM_EXIT_MSR:
            handle_msr_access();
            break;
        case SVM_EXIT_IOIO:
            if (SVM_IO_PORT(vmcb01.exit_info1) != PORT_DEBUG_EXIT || SVM_IO_IS_IN(vmcb01.exit_info1))
                fail("unexpected I/O, EXITINFO1 0x%lx\n", vmcb01.exit_info1);
            return (uint32_t)vmcb01.rax;
        default:
            fail("no handler for exit 0x%lx of L2, EXITINFO1 0x%lx, EXITINFO2 0x%lx, RIP 0x%lx\n", vmcb01.exit_code,
                 vmcb01.exit_info1, vmcb01.exit_info2, vmcb01.rip);
        }
        vmcb01.rip = vmcb01.next_rip;
    }
}

static void prepare_l2(void)
{
    static const enum svm_exit wanted[] = {SVM_EXIT_VMLOAD, SVM_EXIT_VMSAVE, SVM_EXIT_STGI, SVM_EXIT_CLGI,
                                           SVM_EXIT_IOIO,   SVM_EXIT_MSR,    SVM_EXIT_HLT};

    l2_boot(&l2);
    for (unsigned i = 0; i < sizeof wanted / sizeof wanted[0]; i++)
        vmcb_intercept(&vmcb01, wanted[i]);
    for (unsigned port = PORT_DEBUG_EXIT; port < PORT_DEBUG_EXIT + DEBUG_EXIT_PORTS; port++)
        io_permissions[port / 8] |= (uint8_t)(1u << port % 8);
    memset(msr_permissions, 0xFF, sizeof msr_permissions);
    vmcb01.iopm_base = (uint64_t)io_permissions;
    vmcb01.msrpm_base = (uint64_t)msr_permissions;
    vmsave(&state_of_guests);                           /* something valid to begin with */
}

int main(void)
{
    console_init();
    descriptors_init();
    say("switching SVM on\n");
    svm_enable(CPUID_SVM_NESTED_PAGING | CPUID_SVM_NEXT_RIP);
    prepare_l2();
    say("running L2 at RIP 0x%lx\n", vmcb01.rip);
    uint32_t status = run_l2();
    say("L2 ended its run with 0x%x\n", status);
    say("exits of L2 %u, of them MSR accesses %u, VMRUN %u\n", exits, msr_accesses, l2.vmruns);
    say("exits of L3 to L2 %u, page faults of L3 that L1 kept from L2 %u\n", l2.exits_to_l2, l2.faults_for_l1);
    if (status != STATUS_PASS || l2.vmruns != l2.exits_to_l2 || l2.vmruns != 7 || l2.global_interrupts != true)
        fail("that is not as it should be\n");
    say("done\n");
    return STATUS_PASS;
}
