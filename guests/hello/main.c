/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * hello: the smallest VT-x hypervisor. It enters VMX operation, describes one guest in a VMCS,
 * runs it, and answers its VM exits until the guest halts.
 *
 * Read main() first, then guest.S, then run_guest() and the handlers.
 */
#include "console.h"
#include "cpu.h"
#include "descriptors.h"
#include "memory.h"
#include "vmx.h"

enum { CPUID_HYPERVISOR_LEAF = 0x40000000, PORT_REPORT = 0x80 };

const char console_tag[] = "[hello] ";
static const char signature[12] = "hello, guest";       /* returned in EBX, ECX, EDX */

extern const uint8_t hello_guest[];                     /* guest.S */

static struct vmcs vmcs;
static uint64_t gpr[GPR_COUNT];                         /* the guest's, except RSP: that is in the VMCS */
static uint32_t exit_count[EXIT_REASON_COUNT];
static uint8_t guest_stack[PAGE_SIZE] __attribute__((aligned(16)));
static bool report_is_right;

static void build_vmcs(void)
{
    struct vmx_controls wanted = {
        .primary = PRIMARY_HLT_EXITING | PRIMARY_CR3_LOAD_EXITING | PRIMARY_CR3_STORE_EXITING |
                   PRIMARY_UNCONDITIONAL_IO_EXITING,
        .exit = EXIT_HOST_ADDRESS_SPACE_SIZE,           /* the host runs in 64-bit mode ... */
        .entry = ENTRY_IA32E_MODE_GUEST,                /* ... and so does the guest */
    };

    vmcs_create(&vmcs);
    vmcs_write_controls(vmx_adjust_controls(wanted));
    vmcs_write_host_state();
    vmcs_write_guest_state_64((uint64_t)hello_guest, (uint64_t)(guest_stack + sizeof guest_stack));
}

static void print_exit(uint32_t reason)
{
    static uint32_t number;

    say("VM exit %u: reason %u (%s), qualification 0x%lx, guest RIP 0x%lx\n", ++number, reason,
        exit_reason_name(reason), vmread(EXIT_QUALIFICATION), vmread(GUEST_RIP));
}

static void handle_cpuid(void)
{
    uint32_t leaf = (uint32_t)gpr[RAX];
    struct cpuid_result r = cpuid(leaf, (uint32_t)gpr[RCX]);

    if (leaf == CPUID_HYPERVISOR_LEAF) {
        r.eax = CPUID_HYPERVISOR_LEAF;
        memcpy(&r.ebx, signature, 4);
        memcpy(&r.ecx, signature + 4, 4);
        memcpy(&r.edx, signature + 8, 4);
    }
    gpr[RAX] = r.eax;
    gpr[RBX] = r.ebx;
    gpr[RCX] = r.ecx;
    gpr[RDX] = r.edx;
}

static void handle_control_register_access(void)
{
    uint64_t qualification = vmread(EXIT_QUALIFICATION);
    enum gpr number = CR_REGISTER(qualification);

    if (CR_NUMBER(qualification) != 3)
        fail("the guest accessed CR%u\n", CR_NUMBER(qualification));
    if (CR_ACCESS_TYPE(qualification) == CR_ACCESS_MOV_TO)
        vmwrite(GUEST_CR3, guest_register(gpr, number));
    else
        set_guest_register(gpr, number, vmread(GUEST_CR3));
}

static void handle_io(void)
{
    uint64_t qualification = vmread(EXIT_QUALIFICATION);
    uint32_t value = (uint32_t)gpr[RAX];

    if (IO_PORT(qualification) != PORT_REPORT || IO_IS_IN(qualification) || IO_SIZE(qualification) != 4)
        fail("unexpected I/O, qualification 0x%lx\n", qualification);
    say("    the guest wrote 0x%x to port 0x%x\n", value, IO_PORT(qualification));
    report_is_right = memcmp(&value, signature, sizeof value) == 0;
}

static void run_guest(void)
{
    for (;;) {
        vmx_require(vmcs.launched ? "VMRESUME" : "VMLAUNCH", vmcs_enter(&vmcs, gpr));

        uint32_t reason = (uint32_t)vmread(EXIT_REASON);
        if (reason & EXIT_REASON_ENTRY_FAILURE)
            fail("VM entry failed: reason %u, qualification 0x%lx\n", reason & EXIT_REASON_BASIC_MASK,
                 vmread(EXIT_QUALIFICATION));
        print_exit(reason);
        if (reason < EXIT_REASON_COUNT)
            exit_count[reason]++;

        switch (reason) {
        case EXIT_REASON_CPUID:
            handle_cpuid();
            break;
        case EXIT_REASON_CONTROL_REGISTER_ACCESS:
            handle_control_register_access();
            break;
        case EXIT_REASON_IO_INSTRUCTION:
            handle_io();
            break;
        case EXIT_REASON_HLT:
            return;
        default:
            fail("no handler for this VM exit\n");
        }
        vmcs_skip_instruction();
    }
}

static void print_table(void)
{
    say("%-28s %s\n", "exit reason", "count");
    for (uint32_t reason = 0; reason < EXIT_REASON_COUNT; reason++)
        if (exit_count[reason])
            say("%-28s %5u\n", exit_reason_name(reason), exit_count[reason]);
}

int main(void)
{
    console_init();
    descriptors_init();
    say("entering VMX operation\n");
    vmx_enable();
    build_vmcs();
    say("launching a guest at RIP 0x%lx\n", vmread(GUEST_RIP));
    run_guest();
    vmx_require("VMXOFF", vmxoff());
    print_table();
    if (!report_is_right || exit_count[EXIT_REASON_CONTROL_REGISTER_ACCESS] != 2 || exit_count[EXIT_REASON_CPUID] != 1)
        fail("the guest did not see what it should have seen\n");
    say("the guest halted: done\n");
    return STATUS_PASS;
}
