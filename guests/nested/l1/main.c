/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L1: the hypervisor on the real processor. Its guest L2 is a Multiboot image, booted as a boot
 * loader would, and may itself use VMX: L1 emulates it.
 *
 * Read main(), run(), then the files in the order in which l1.h lists them.
 */
#include "../ports.h"
#include "console.h"
#include "cpu.h"
#include "descriptors.h"
#include "l1.h"
#include "memory.h"
#include "multiboot.h"

enum { MULTIBOOT_INFO_ADDRESS = 0x1000 };
#define MIB 0x100000ul
#define MAPPED_MEMORY (1024 * MIB)      /* what boot.S maps */

const char console_tag[] = "[L1] ";

struct virtual_vmx virtual_vmx = {.current_vmcs = NO_VMCS};
struct vmcs vmcs01, vmcs02;
uint64_t gpr[GPR_COUNT];

static struct {
    uint32_t from_l2, from_l3, given_to_l2;
} exit_count[EXIT_REASON_COUNT];

extern const uint8_t l2_image[], l2_image_end[];        /* l2_image.S */

int main(const struct multiboot_info *info);

/* --- set-up -------------------------------------------------------------------------------- */

static const struct vmx_controls wanted01 = {
    .primary = PRIMARY_HLT_EXITING | PRIMARY_USE_IO_BITMAPS | PRIMARY_USE_MSR_BITMAPS |
               PRIMARY_ACTIVATE_SECONDARY_CONTROLS,
    .secondary = SECONDARY_ENABLE_EPT | SECONDARY_ENABLE_VPID | SECONDARY_UNRESTRICTED_GUEST,
    .exit = EXIT_SAVE_DEBUG_CONTROLS | EXIT_HOST_ADDRESS_SPACE_SIZE | EXIT_SAVE_IA32_EFER | EXIT_LOAD_IA32_EFER,
    .entry = ENTRY_LOAD_DEBUG_CONTROLS | ENTRY_LOAD_IA32_EFER,
};

static void build_vmcs01(void)
{
    vmcs_create(&vmcs01);
    vmcs_write_controls(vmx_adjust_controls(wanted01));
    vmwrite(EPT_POINTER, ept01_build());
    vmwrite(VIRTUAL_PROCESSOR_ID, VPID_L2);
    vmwrite(IO_BITMAP_A, (uint64_t)io_bitmaps01);
    vmwrite(IO_BITMAP_B, (uint64_t)io_bitmaps01 + PAGE_SIZE);
    vmwrite(MSR_BITMAPS, (uint64_t)msr_bitmaps01);
    vmwrite(CR0_GUEST_HOST_MASK, CR0_NE);
    vmwrite(CR4_GUEST_HOST_MASK, CR4_VMXE);
    vmcs_write_host_state();
}

/* Only what stays the same at every entry to L3: nested_entry() writes the rest. */
static void build_vmcs02(void)
{
    vmcs_create(&vmcs02);
    vmwrite(EXIT_CONTROLS, vmx_adjust_controls(wanted01).exit);
    vmcs_write_host_state();
    vmwrite(VMCS_LINK_POINTER, ~0ul);
}

/* The machine state that the Multiboot specification promises: 32-bit protected mode, flat
 * segments, no paging. "Unrestricted guest" is what lets a guest run without paging. */
static void boot_l2(uint32_t entry_point)
{
    struct multiboot_info *info = l2_memory(MULTIBOOT_INFO_ADDRESS, sizeof *info);

    *info = (struct multiboot_info){
        .flags = MULTIBOOT_INFO_MEMORY,
        .memory_lower_kib = 640,
        .memory_upper_kib = (uint32_t)((l2_memory_size - MIB) >> 10),
    };
    gpr[RAX] = MULTIBOOT_LOADER_MAGIC;
    gpr[RBX] = MULTIBOOT_INFO_ADDRESS;

    vmcs_write_guest_state_64(entry_point, 0);          /* and now all that is not 64-bit */
    vmwrite(GUEST_CR0, CR0_PE | CR0_ET | CR0_NE);
    vmwrite(GUEST_CR3, 0);
    vmwrite(GUEST_CR4, CR4_VMXE);
    vmwrite(GUEST_IA32_EFER, 0);
    vmcs_write_segment(SEGMENT_CS, SELECTOR_CODE64, 0, 0xFFFFFFFF, RIGHTS_CODE32);
    vmcs_write_segment(SEGMENT_TR, 0, 0, 0xFFFF, RIGHTS_TSS_BUSY);
    vmwrite(GUEST_GDTR_LIMIT, 0);
    vmwrite(GUEST_GDTR_BASE, 0);
    vmwrite(GUEST_IDTR_LIMIT, 0);
    vmwrite(GUEST_IDTR_BASE, 0);
}

static void choose_l2_memory(const struct multiboot_info *info)
{
    uint64_t end = 0;

    if (info->flags & MULTIBOOT_INFO_MEMORY)
        end = MIB + ((uint64_t)info->memory_upper_kib << 10);
    if (end > MAPPED_MEMORY)
        end = MAPPED_MEMORY;
    if (end < L2_MEMORY_BASE + L2_MEMORY_MINIMUM)
        fail("this needs %lu MiB of memory\n", (L2_MEMORY_BASE + L2_MEMORY_MINIMUM) / MIB);
    l2_memory_size = (end - L2_MEMORY_BASE) & ~(2 * MIB - 1);
}

/* Boots the first Multiboot module, if there is one, and otherwise the built-in image. */
static uint32_t load_l2(const struct multiboot_info *info)
{
    const struct multiboot_module *module = (const void *)(uint64_t)info->modules;

    if (!(info->flags & MULTIBOOT_INFO_MODULES) || info->module_count == 0)
        return l2_load_image(l2_image, (uint64_t)(l2_image_end - l2_image));
    if (module->end > L2_MEMORY_BASE)
        fail("the module is where L2's memory should be\n");
    say("L2 is the Multiboot module\n");
    return l2_load_image((const uint8_t *)(uint64_t)module->start, module->end - module->start);
}

/* --- run ----------------------------------------------------------------------------------- */

/* L2 ends its run as on a bare machine, through the debug-exit port. */
static bool l2_ended(uint32_t reason, uint32_t *status)
{
    uint64_t qualification;

    if (virtual_vmx.in_l3 || reason != EXIT_REASON_IO_INSTRUCTION)
        return false;
    qualification = vmread(EXIT_QUALIFICATION);
    *status = (uint32_t)gpr[RAX];
    return IO_PORT(qualification) == PORT_DEBUG_EXIT && !IO_IS_IN(qualification);
}

static void handle_exit(uint32_t reason)
{
    uint32_t basic = reason & EXIT_REASON_BASIC_MASK;

    if (basic >= EXIT_REASON_COUNT)
        fail("VM exit with an unknown reason 0x%x\n", reason);
    if (virtual_vmx.in_l3) {
        exit_count[basic].from_l3++;
        exit_count[basic].given_to_l2 += handle_l3_exit(reason);
        return;
    }
    exit_count[basic].from_l2++;
    if (reason & EXIT_REASON_ENTRY_FAILURE)
        fail("entry to L2 failed: reason %u, qualification 0x%lx\n", basic, vmread(EXIT_QUALIFICATION));
    handle_l2_exit(basic);
}

/* Returns the status that L2 ended with. */
static uint32_t run(void)
{
    uint32_t status, reason;

    for (;;) {
        struct vmcs *vmcs = virtual_vmx.in_l3 ? &vmcs02 : &vmcs01;
        bool resume = vmcs->launched;
        enum vmx_status entry = vmcs_enter(vmcs, gpr);

        if (entry == VM_FAIL_VALID && virtual_vmx.in_l3) {
            uint32_t error = (uint32_t)vmread(VM_INSTRUCTION_ERROR);
            virtual_vmx.in_l3 = false;
            vmcs_make_current(&vmcs01);
            vm_entry_refused(error);
            continue;
        }
        vmx_require(resume ? "VMRESUME" : "VMLAUNCH", entry);

        reason = (uint32_t)vmread(EXIT_REASON);
        if (l2_ended(reason, &status))
            return status;
        handle_exit(reason);
    }
}

static void print_table(void)
{
    say("VM exits                     from L2   from L3   of those, given to L2\n");
    for (uint32_t reason = 0; reason < EXIT_REASON_COUNT; reason++)
        if (exit_count[reason].from_l2 || exit_count[reason].from_l3)
            say("  %-24s %9u %9u %9u\n", exit_reason_name(reason), exit_count[reason].from_l2,
                exit_count[reason].from_l3, exit_count[reason].given_to_l2);
}

int main(const struct multiboot_info *info)
{
    uint32_t status;

    console_init();
    descriptors_init();
    choose_l2_memory(info);
    say("entering VMX operation\n");
    vmx_enable();
    build_bitmaps01();
    build_vmcs02();
    build_vmcs01();
    boot_l2(load_l2(info));
    say("booting L2 at guest-physical 0x%lx; its memory is at physical 0x%lx\n", vmread(GUEST_RIP), L2_MEMORY_BASE);
    status = run();
    vmx_require("VMXOFF", vmxoff());
    print_table();
    if (status != STATUS_PASS)
        fail("L2 ended with status %u\n", status);
    say("L2 ended well: done\n");
    return STATUS_PASS;
}
