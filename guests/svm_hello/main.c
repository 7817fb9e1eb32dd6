/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * svm_hello: the smallest AMD-V hypervisor with nested paging. It switches SVM on, describes one
 * guest in a control block, runs it, and answers its exits until the guest halts.
 *
 * Read main() first, then guest.S, then run_guest() and the handlers.
 */
#include "console.h"
#include "cpu.h"
#include "descriptors.h"
#include "memory.h"
#include "svm.h"

enum { CPUID_HYPERVISOR_LEAF = 0x40000000, PORT_REPORT = 0x80 };
enum { PAGE_PRESENT = 1, PAGE_WRITABLE = 2, PAGE_USER = 4, PAGE_LARGE = 128 };
#define LARGE_PAGE (2ul << 20)
#define HOLE 0x3FE00000ul               /* the last 2 MBytes of the first GiB */

const char console_tag[] = "[svm_hello] ";
static const char signature[12] = "hello, guest";       /* returned in EBX, ECX, EDX */
static const uint32_t surprise = 0x70727573;            /* what the guest finds in the hole */

extern const uint8_t svm_hello_guest[];                 /* guest.S */

static struct vmcb vmcb;
static uint64_t gpr[GPR_COUNT];                         /* the guest's, except RAX and RSP */
static uint64_t nested_pml4[512] __attribute__((aligned(4096)));
static uint64_t nested_pdpt[512] __attribute__((aligned(4096)));
static uint64_t nested_pd[512] __attribute__((aligned(4096)));
static uint32_t page_behind_the_hole[LARGE_PAGE / 4] __attribute__((aligned(2 << 20)));
static uint8_t guest_stack[PAGE_SIZE] __attribute__((aligned(16)));
static unsigned exits, faults;
static bool report_is_right, memory_is_right;

/* Guest-physical addresses are physical ones, but for a hole. Nested walks count as user accesses. */
static void build_nested_tables(void)
{
    const uint64_t flags = PAGE_PRESENT | PAGE_WRITABLE | PAGE_USER;

    nested_pml4[0] = (uint64_t)nested_pdpt | flags;
    nested_pdpt[0] = (uint64_t)nested_pd | flags;
    for (uint64_t i = 0; i < 512; i++)
        nested_pd[i] = i * LARGE_PAGE | flags | PAGE_LARGE;
    nested_pd[HOLE / LARGE_PAGE] = 0;
}

static void build_vmcb(void)
{
    vmcb_create(&vmcb, (uint64_t)svm_hello_guest, (uint64_t)(guest_stack + sizeof guest_stack));
    vmcb_intercept(&vmcb, SVM_EXIT_CR3_READ);
    vmcb_intercept(&vmcb, SVM_EXIT_CR3_WRITE);
    vmcb_intercept(&vmcb, SVM_EXIT_CPUID);
    vmcb_intercept(&vmcb, SVM_EXIT_IOIO);
    vmcb_intercept(&vmcb, SVM_EXIT_VMMCALL);
    vmcb_intercept(&vmcb, SVM_EXIT_HLT);

    static uint8_t io_permissions[3 * PAGE_SIZE] __attribute__((aligned(4096)));
    memset(io_permissions, 0xFF, sizeof io_permissions);
    vmcb.iopm_base = (uint64_t)io_permissions;

    build_nested_tables();
    vmcb.nested_control = SVM_NESTED_PAGING;
    vmcb.n_cr3 = (uint64_t)nested_pml4;
}

static uint64_t *guest_register(enum gpr number)
{
    return number == RAX ? &vmcb.rax : number == RSP ? &vmcb.rsp : &gpr[number];
}

static void handle_cpuid(void)
{
    uint32_t leaf = (uint32_t)vmcb.rax;
    struct cpuid_result r = cpuid(leaf, (uint32_t)gpr[RCX]);

    if (leaf == CPUID_HYPERVISOR_LEAF) {
        r.eax = CPUID_HYPERVISOR_LEAF;
        memcpy(&r.ebx, signature, 4);
        memcpy(&r.ecx, signature + 4, 4);
        memcpy(&r.edx, signature + 8, 4);
    }
    vmcb.rax = r.eax;
    gpr[RBX] = r.ebx;
    gpr[RCX] = r.ecx;
    gpr[RDX] = r.edx;
}

static void handle_cr3(void)
{
    uint64_t *value = guest_register(SVM_CR_REGISTER(vmcb.exit_info1));

    if (!SVM_CR_IS_MOV(vmcb.exit_info1))
        fail("not a MOV, EXITINFO1 0x%lx\n", vmcb.exit_info1);
    if (vmcb.exit_code == SVM_EXIT_CR3_READ)
        *value = vmcb.cr3;
    else
        vmcb.cr3 = *value;
}

static void handle_io(void)
{
    uint64_t information = vmcb.exit_info1;
    uint32_t value = (uint32_t)vmcb.rax;

    if (SVM_IO_PORT(information) != PORT_REPORT || SVM_IO_IS_IN(information) || !SVM_IO_IS_32_BITS(information))
        fail("unexpected I/O, EXITINFO1 0x%lx\n", information);
    say("    the guest wrote 0x%x to port 0x%x\n", value, SVM_IO_PORT(information));
    report_is_right = memcmp(&value, signature, sizeof value) == 0;
}

/* Fills the hole; the guest then repeats the instruction that fell into it. */
static void handle_nested_page_fault(void)
{
    if (vmcb.exit_info2 != HOLE || vmcb.exit_info1 != (SVM_NPF_FINAL | SVM_NPF_USER))
        fail("unexpected nested page fault at 0x%lx, EXITINFO1 0x%lx\n", vmcb.exit_info2, vmcb.exit_info1);
    page_behind_the_hole[0] = surprise;
    nested_pd[HOLE / LARGE_PAGE] =
        (uint64_t)page_behind_the_hole | PAGE_PRESENT | PAGE_WRITABLE | PAGE_USER | PAGE_LARGE;
    faults++;
}

static void print_exit(void)
{
    say("#VMEXIT %u: code 0x%lx (%s), EXITINFO1 0x%lx, EXITINFO2 0x%lx, guest RIP 0x%lx\n", ++exits, vmcb.exit_code,
        svm_exit_name(vmcb.exit_code), vmcb.exit_info1, vmcb.exit_info2, vmcb.rip);
}

static void run_guest(void)
{
    for (;;) {
        svm_run((uint64_t)&vmcb, gpr);
        print_exit();
        switch (vmcb.exit_code) {
        case SVM_EXIT_CPUID:
            handle_cpuid();
            break;
        case SVM_EXIT_CR3_READ:
        case SVM_EXIT_CR3_WRITE:
            handle_cr3();
            break;
        case SVM_EXIT_IOIO:
            handle_io();
            break;
        case SVM_EXIT_NPF:
            handle_nested_page_fault();
            continue;                                   /* to the same instruction */
        case SVM_EXIT_VMMCALL:
            say("    the guest read 0x%x\n", (uint32_t)vmcb.rax);
            memory_is_right = (uint32_t)vmcb.rax == surprise;
            break;
        case SVM_EXIT_HLT:
            return;
        default:
            fail("no handler for this exit\n");
        }
        vmcb.rip = vmcb.next_rip;
    }
}

int main(void)
{
    console_init();
    descriptors_init();
    say("switching SVM on\n");
    svm_enable(CPUID_SVM_NESTED_PAGING | CPUID_SVM_NEXT_RIP);
    build_vmcb();
    say("running a guest at RIP 0x%lx\n", vmcb.rip);
    run_guest();
    if (!report_is_right || !memory_is_right || faults != 1)
        fail("the guest did not see what it should have seen\n");
    say("the guest halted after %u exits: done\n", exits);
    return STATUS_PASS;
}
