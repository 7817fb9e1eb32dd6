/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L2: an ordinary hypervisor that does not know whether its processor is real. It runs the guest
 * L3 twice: without EPT (L3's page tables translate to L2's physical memory) and, if its
 * processor has EPT, with its own.
 */
#include "../ports.h"
#include "console.h"
#include "cpu.h"
#include "descriptors.h"
#include "l2.h"
#include "memory.h"
#include "vmx.h"

enum { VPID_L3 = 7, BITS_PER_BYTE = 8, RUNNING = -1 };
enum {
    ERROR_VMRESUME_NOT_LAUNCHED = 5,
    ERROR_CONTROLS = 7,
    ERROR_HOST_STATE = 8,
    ERROR_VMPTRLD_ADDRESS = 9,
    ERROR_UNSUPPORTED_FIELD = 12,
    ERROR_VMWRITE_READ_ONLY = 13,
};

const char console_tag[] = "[L2] ";
static const char signature[12] = "I am level 2";

static struct vmcs vmcs_plain, vmcs_with_ept;
static uint64_t gpr[GPR_COUNT];
static uint32_t exit_count[EXIT_REASON_COUNT];
static uint8_t l3_stack[4 * PAGE_SIZE] __attribute__((aligned(4096)));
static uint8_t io_bitmaps[2 * PAGE_SIZE] __attribute__((aligned(4096)));        /* A: ports below 0x8000, B: above */
static uint8_t msr_bitmaps[PAGE_SIZE] __attribute__((aligned(4096)));

/* --- set-up -------------------------------------------------------------------------------- */

static void let_port_pass(uint16_t port)
{
    io_bitmaps[port / BITS_PER_BYTE] &= (uint8_t)~(1u << port % BITS_PER_BYTE);
}

static void build_bitmaps(void)
{
    memset(io_bitmaps, 0xFF, sizeof io_bitmaps);
    memset(msr_bitmaps, 0xFF, sizeof msr_bitmaps);
    for (uint16_t port = PORT_COM1; port < PORT_COM1 + 8; port++)
        let_port_pass(port);
    let_port_pass(PORT_ASK_L1);
}

static bool processor_has_ept(void)
{
    bool has_secondary = rdmsr(IA32_VMX_PROCBASED_CTLS) >> 32 & PRIMARY_ACTIVATE_SECONDARY_CONTROLS;

    return has_secondary && rdmsr(IA32_VMX_PROCBASED_CTLS2) >> 32 & SECONDARY_ENABLE_EPT;
}

static void build_vmcs(struct vmcs *vmcs, bool with_ept)
{
    struct vmx_controls wanted = {
        .primary = PRIMARY_HLT_EXITING | PRIMARY_CR3_LOAD_EXITING | PRIMARY_USE_IO_BITMAPS | PRIMARY_USE_MSR_BITMAPS |
                   PRIMARY_ACTIVATE_SECONDARY_CONTROLS,
        .secondary = SECONDARY_ENABLE_VPID | (with_ept ? SECONDARY_ENABLE_EPT : 0),
        .exit = EXIT_HOST_ADDRESS_SPACE_SIZE | (with_ept ? EXIT_SAVE_IA32_EFER | EXIT_LOAD_IA32_EFER : 0),
        .entry = ENTRY_IA32E_MODE_GUEST | (with_ept ? ENTRY_LOAD_IA32_EFER : 0),
    };
    uint64_t current;

    vmcs_create(vmcs);
    vmx_require("VMPTRST", vmptrst(&current));
    if (current != (uint64_t)&vmcs->region)
        fail("VMPTRST stored 0x%lx instead of the current VMCS\n", current);

    vmcs_write_controls(vmx_adjust_controls(wanted));
    vmwrite(VIRTUAL_PROCESSOR_ID, VPID_L3);
    vmwrite(IO_BITMAP_A, (uint64_t)io_bitmaps);
    vmwrite(IO_BITMAP_B, (uint64_t)io_bitmaps + PAGE_SIZE);
    vmwrite(MSR_BITMAPS, (uint64_t)msr_bitmaps);
    if (with_ept)
        vmwrite(EPT_POINTER, ept_build());
    vmcs_write_host_state();

    /* A call pushes a return address: functions expect RSP 8 bytes short of a multiple of 16. */
    vmcs_write_guest_state_64((uint64_t)l3_main, (uint64_t)(l3_stack + sizeof l3_stack) - 8);
    memset(gpr, 0, sizeof gpr);
    gpr[RDI] = with_ept;
}

/* --- refusals ------------------------------------------------------------------------------ */

static void expect_error(const char *what, enum vmx_status status, uint64_t error)
{
    if (status != VM_FAIL_VALID || vmread(VM_INSTRUCTION_ERROR) != error)
        fail("%s: expected VM-instruction error %lu\n", what, error);
}

/* Tries a VM entry with one field spoilt. */
static enum vmx_status enter_with(enum vmcs_field field, uint64_t value, bool resume)
{
    uint64_t saved = vmread(field), ignored_gpr[GPR_COUNT] = {0};
    enum vmx_status status;

    vmwrite(field, value);
    status = vm_enter(ignored_gpr, resume);
    vmwrite(field, saved);
    return status;
}

/* A processor that is only emulated must still refuse what a real one refuses. */
static void check_refusals(void)
{
    uint64_t value, misaligned = 1;

    expect_error("VMPTRLD of a misaligned address", vmptrld(&misaligned), ERROR_VMPTRLD_ADDRESS);
    expect_error("VMREAD of a field that does not exist", try_vmread(0x7FFE, &value), ERROR_UNSUPPORTED_FIELD);
    if (!(rdmsr(IA32_VMX_MISC) & VMX_MISC_VMWRITE_ANY_FIELD))
        expect_error("VMWRITE of a read-only field", try_vmwrite(EXIT_REASON, 0), ERROR_VMWRITE_READ_ONLY);
    expect_error("VMRESUME before VMLAUNCH", enter_with(VIRTUAL_PROCESSOR_ID, VPID_L3, true),
                 ERROR_VMRESUME_NOT_LAUNCHED);
    expect_error("VPID 0", enter_with(VIRTUAL_PROCESSOR_ID, 0, false), ERROR_CONTROLS);
    expect_error("host CS 0", enter_with(HOST_CS_SELECTOR, 0, false), ERROR_HOST_STATE);
    if (enter_with(GUEST_RFLAGS, 0, false) != VM_SUCCEED ||
        vmread(EXIT_REASON) != (EXIT_REASON_INVALID_GUEST_STATE | EXIT_REASON_ENTRY_FAILURE))
        fail("VM entry accepted RFLAGS = 0\n");
    say("VMX instructions refuse what they should\n");
}

/* --- VM exits of L3 ------------------------------------------------------------------------ */

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

static void handle_mov_to_cr3(uint64_t qualification)
{
    if (CR_NUMBER(qualification) != 3 || CR_ACCESS_TYPE(qualification) != CR_ACCESS_MOV_TO)
        fail("unexpected control-register access, qualification 0x%lx\n", qualification);
    vmwrite(GUEST_CR3, guest_register(gpr, CR_REGISTER(qualification)));
    vmx_require("INVVPID", invvpid(INVALIDATE_SINGLE_CONTEXT, VPID_L3));
}

/* Returns the status L3 ended with, or RUNNING. */
static int handle_io(uint64_t qualification)
{
    if (IO_PORT(qualification) == PORT_ASK_L2 && IO_IS_IN(qualification))
        gpr[RAX] = (gpr[RAX] & ~0xFFul) | 2;
    else if (IO_PORT(qualification) == PORT_DEBUG_EXIT && !IO_IS_IN(qualification))
        return (int)(gpr[RAX] & 0x7F);
    else
        fail("unexpected I/O, qualification 0x%lx\n", qualification);
    return RUNNING;
}

static int handle_exit(uint32_t reason)
{
    uint64_t qualification = vmread(EXIT_QUALIFICATION);

    switch (reason) {
    case EXIT_REASON_CPUID:
        handle_cpuid();
        break;
    case EXIT_REASON_CONTROL_REGISTER_ACCESS:
        handle_mov_to_cr3(qualification);
        break;
    case EXIT_REASON_IO_INSTRUCTION:
        if (handle_io(qualification) != RUNNING)
            return (int)(gpr[RAX] & 0x7F);
        break;
    case EXIT_REASON_HLT:
        break;                          /* wake it at once */
    case EXIT_REASON_EPT_VIOLATION:
        ept_handle_violation(vmread(GUEST_PHYSICAL_ADDRESS), qualification);
        return RUNNING;                 /* the same instruction again */
    default:
        fail("no handler for VM exit %u (%s), qualification 0x%lx, RIP 0x%lx\n", reason, exit_reason_name(reason),
             qualification, vmread(GUEST_RIP));
    }
    vmcs_skip_instruction();
    return RUNNING;
}

static int run_l3(struct vmcs *vmcs)
{
    int status = RUNNING;

    while (status == RUNNING) {
        vmx_require(vmcs->launched ? "VMRESUME" : "VMLAUNCH", vmcs_enter(vmcs, gpr));

        uint32_t reason = (uint32_t)vmread(EXIT_REASON);
        if (reason & EXIT_REASON_ENTRY_FAILURE)
            fail("VM entry failed: reason %u, qualification 0x%lx\n", reason & EXIT_REASON_BASIC_MASK,
                 vmread(EXIT_QUALIFICATION));
        say("L3 exits: %s, qualification 0x%lx\n", exit_reason_name(reason), vmread(EXIT_QUALIFICATION));
        if (reason < EXIT_REASON_COUNT)
            exit_count[reason]++;
        status = handle_exit(reason);
    }
    return status;
}

/* --- the two rounds ------------------------------------------------------------------------ */

static void run_round(struct vmcs *vmcs, bool with_ept)
{
    uint64_t address = (uint64_t)&vmcs->region;

    build_vmcs(vmcs, with_ept);
    if (!with_ept)
        check_refusals();
    say("launching L3 %s EPT\n", with_ept ? "with" : "without");
    if (run_l3(vmcs) != STATUS_PASS)
        fail("L3 ended with a failure\n");
    if (with_ept && memcmp(window_page + WINDOW_REPLY_OFFSET, WINDOW_REPLY, sizeof WINDOW_REPLY))
        fail("what L3 wrote through the EPT did not arrive\n");
    vmx_require("VMCLEAR", vmclear(&address));
}

int main(void)
{
    console_init();
    descriptors_init();
    say("booted; entering VMX operation\n");
    vmx_enable();
    build_bitmaps();
    run_round(&vmcs_plain, false);
    if (processor_has_ept())
        run_round(&vmcs_with_ept, true);
    vmx_require("VMXOFF", vmxoff());
    for (uint32_t reason = 0; reason < EXIT_REASON_COUNT; reason++)
        if (exit_count[reason])
            say("L3 exits due to %-24s %3u\n", exit_reason_name(reason), exit_count[reason]);
    say("left VMX operation: done\n");
    return STATUS_PASS;
}
