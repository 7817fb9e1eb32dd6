/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A VM exit of L3: L2 gets it if L2's controls ask for it, as a VM exit that hardware would have
 * made with VMCS 12. L1 keeps the rest.
 *
 * Spec: SDM volume 3, "VM Exits".
 */
#include "../ports.h"
#include "console.h"
#include "l1.h"

enum { MSR_BITMAP_SIZE = 1024, BITS_PER_BYTE = 8 };
#define MSR_HIGH_RANGE 0xC0000000u
#define MSR_RANGE_SIZE 0x2000u

/* --- whose exit? --------------------------------------------------------------------------- */

static bool bit_is_set(uint64_t bitmap12, unsigned bit)
{
    const uint8_t *bits = l2_memory(bitmap12, PAGE_SIZE);

    return bits[bit / BITS_PER_BYTE] >> bit % BITS_PER_BYTE & 1;
}

static bool l2_wants_io(uint64_t qualification)
{
    uint64_t primary = vmcs12_read(PRIMARY_CONTROLS);
    unsigned first = IO_PORT(qualification), last = first + IO_SIZE(qualification) - 1;

    if (!(primary & PRIMARY_USE_IO_BITMAPS))
        return primary & PRIMARY_UNCONDITIONAL_IO_EXITING;
    if (last > 0xFFFF)                  /* an access that wraps around exits whatever the bitmaps say */
        return true;
    for (unsigned port = first; port <= last; port++)
        if (bit_is_set(vmcs12_read(port < 0x8000 ? IO_BITMAP_A : IO_BITMAP_B), port & 0x7FFF))
            return true;
    return false;
}

static bool l2_wants_msr(bool write)
{
    uint32_t msr = (uint32_t)gpr[RCX], index = msr & (MSR_RANGE_SIZE - 1);
    unsigned part = (msr >= MSR_HIGH_RANGE ? 1 : 0) + (write ? 2 : 0);

    if (!(vmcs12_read(PRIMARY_CONTROLS) & PRIMARY_USE_MSR_BITMAPS))
        return true;
    if (msr - index != 0 && msr - index != MSR_HIGH_RANGE)
        return true;
    return bit_is_set(vmcs12_read(MSR_BITMAPS), part * MSR_BITMAP_SIZE * BITS_PER_BYTE + index);
}

/* Only what L1 intercepts for itself can be an exit that L2 does not want. */
static bool l2_wants(uint32_t reason)
{
    switch (reason) {
    case EXIT_REASON_IO_INSTRUCTION:
        return l2_wants_io(vmread(EXIT_QUALIFICATION));
    case EXIT_REASON_RDMSR:
    case EXIT_REASON_WRMSR:
        return l2_wants_msr(reason == EXIT_REASON_WRMSR);
    case EXIT_REASON_EPT_VIOLATION:
    case EXIT_REASON_EPT_MISCONFIGURATION:
        return false;
    default:
        return true;
    }
}

/* --- giving it to L2 ----------------------------------------------------------------------- */

static void save_guest_state12(void)
{
    const struct field_span *guest_state = &vmcs12_fields[FIELDS_GUEST_STATE];
    uint64_t exit = vmcs12_read(EXIT_CONTROLS);

    for (unsigned i = 0; i < guest_state->count; i++) {
        uint16_t field = guest_state->fields[i];
        if (field == VMCS_LINK_POINTER || (field == GUEST_IA32_EFER && !(exit & EXIT_SAVE_IA32_EFER)))
            continue;
        if ((field == GUEST_DR7 || field == GUEST_IA32_DEBUGCTL) && !(exit & EXIT_SAVE_DEBUG_CONTROLS))
            continue;
        vmcs12_write(field, vmread(field));
    }
    /* A guest that may turn paging on and off may also have entered or left IA-32e mode. */
    if (vmcs12_secondary_controls() & SECONDARY_UNRESTRICTED_GUEST) {
        uint64_t mode = vmread(GUEST_IA32_EFER) & EFER_LMA ? ENTRY_IA32E_MODE_GUEST : 0;
        vmcs12_write(ENTRY_CONTROLS, (vmcs12_read(ENTRY_CONTROLS) & ~(uint64_t)ENTRY_IA32E_MODE_GUEST) | mode);
    }
}

static void save_exit_information12(void)
{
    const struct field_span *information = &vmcs12_fields[FIELDS_READ_ONLY];

    for (unsigned i = 0; i < information->count; i++)
        if (information->fields[i] != VM_INSTRUCTION_ERROR)
            vmcs12_write(information->fields[i], vmread(information->fields[i]));
}

static void load_host_segments(void)
{
    for (unsigned segment = SEGMENT_ES; segment <= SEGMENT_GS; segment++) {
        uint16_t selector = (uint16_t)vmcs12_read(HOST_ES_SELECTOR + 2 * segment);
        uint64_t base = segment == SEGMENT_FS   ? vmcs12_read(HOST_FS_BASE)
                        : segment == SEGMENT_GS ? vmcs12_read(HOST_GS_BASE)
                                                : 0;
        uint32_t rights = segment == SEGMENT_CS ? RIGHTS_CODE64 : selector ? RIGHTS_DATA : RIGHTS_UNUSABLE;
        vmcs_write_segment(segment, selector, base, 0xFFFFFFFF, rights);
    }
    vmcs_write_segment(SEGMENT_LDTR, 0, 0, 0, RIGHTS_UNUSABLE);
    vmcs_write_segment(SEGMENT_TR, (uint16_t)vmcs12_read(HOST_TR_SELECTOR), vmcs12_read(HOST_TR_BASE), 0x67,
                       RIGHTS_TSS_BUSY);
    vmwrite(GUEST_GDTR_BASE, vmcs12_read(HOST_GDTR_BASE));
    vmwrite(GUEST_GDTR_LIMIT, 0xFFFF);
    vmwrite(GUEST_IDTR_BASE, vmcs12_read(HOST_IDTR_BASE));
    vmwrite(GUEST_IDTR_LIMIT, 0xFFFF);
}

/* VMCS 01's guest is L2: the host of VMCS 12. */
static void load_host_state12(uint64_t l3_efer)
{
    const uint64_t long_mode = EFER_LME | EFER_LMA;
    bool load_efer = vmcs12_read(EXIT_CONTROLS) & EXIT_LOAD_IA32_EFER;

    vmwrite(GUEST_CR0, vmcs12_read(HOST_CR0));
    vmwrite(GUEST_CR3, vmcs12_read(HOST_CR3));
    vmwrite(GUEST_CR4, vmcs12_read(HOST_CR4));
    vmwrite(GUEST_IA32_EFER, load_efer ? vmcs12_read(HOST_IA32_EFER) : l3_efer | long_mode);
    vmwrite(ENTRY_CONTROLS, vmread(ENTRY_CONTROLS) | ENTRY_IA32E_MODE_GUEST);
    load_host_segments();
    vmwrite(GUEST_RIP, vmcs12_read(HOST_RIP));
    vmwrite(GUEST_RSP, vmcs12_read(HOST_RSP));
    vmwrite(GUEST_RFLAGS, RFLAGS_FIXED);
    vmwrite(GUEST_DR7, 0x400);
    vmwrite(GUEST_IA32_DEBUGCTL, 0);
    vmwrite(GUEST_IA32_SYSENTER_CS, vmcs12_read(HOST_IA32_SYSENTER_CS));
    vmwrite(GUEST_IA32_SYSENTER_ESP, vmcs12_read(HOST_IA32_SYSENTER_ESP));
    vmwrite(GUEST_IA32_SYSENTER_EIP, vmcs12_read(HOST_IA32_SYSENTER_EIP));
    vmwrite(GUEST_INTERRUPTIBILITY_STATE, 0);
    vmwrite(GUEST_ACTIVITY_STATE, 0);
    vmwrite(GUEST_PENDING_DEBUG_EXCEPTIONS, 0);
    /* Without a VPID, L2's processor would have emptied its TLB. */
    if (virtual_vmx.last_vpid12 == 0)
        vmx_require("INVVPID", invvpid(INVALIDATE_SINGLE_CONTEXT, VPID_L2));
}

static bool give_to_l2(uint32_t reason, uint64_t qualification)
{
    uint64_t l3_efer = vmread(GUEST_IA32_EFER);

    if (!(reason & EXIT_REASON_ENTRY_FAILURE)) {
        save_guest_state12();
        save_exit_information12();
        vmcs12_write(ENTRY_INTERRUPTION_INFORMATION,
                     vmcs12_read(ENTRY_INTERRUPTION_INFORMATION) & ~(uint64_t)EVENT_VALID);
        vmcs_region_set_launched(virtual_vmx.current_vmcs, true);
    }
    vmcs12_write(EXIT_REASON, reason);
    vmcs12_write(EXIT_QUALIFICATION, qualification);
    vmcs_make_current(&vmcs01);
    load_host_state12(l3_efer);
    virtual_vmx.in_l3 = false;
    return true;
}

/* --- keeping it ---------------------------------------------------------------------------- */

/* An event whose delivery the exit interrupted must be delivered again. (After an exit to L2, L2
 * does that.) */
static void reinject_event(void)
{
    uint64_t event = vmread(IDT_VECTORING_INFORMATION);

    if (!(event & EVENT_VALID))
        return;
    vmwrite(ENTRY_INTERRUPTION_INFORMATION, event);
    vmwrite(ENTRY_EXCEPTION_ERROR_CODE, vmread(IDT_VECTORING_ERROR_CODE));
    vmwrite(ENTRY_INSTRUCTION_LENGTH, vmread(EXIT_INSTRUCTION_LENGTH));
}

static void emulate(uint32_t reason)
{
    switch (reason) {
    case EXIT_REASON_IO_INSTRUCTION:
        say("L3 uses port 0x%x, which L2 lets pass: L1 answers\n", IO_PORT(vmread(EXIT_QUALIFICATION)));
        handle_io_exit();
        break;
    case EXIT_REASON_RDMSR:
    case EXIT_REASON_WRMSR:
        handle_msr_exit(reason == EXIT_REASON_WRMSR);
        break;
    default:
        fail("no handler for VM exit %u of L3 (%s), qualification 0x%lx, RIP 0x%lx\n", reason,
             exit_reason_name(reason), vmread(EXIT_QUALIFICATION), vmread(GUEST_RIP));
    }
}

/* EPT 02 is L1's, so its violations come to L1; EPT 12 tells whether L2 has to see them. */
static bool handle_ept_violation(void)
{
    uint64_t qualification = vmread(EXIT_QUALIFICATION);

    switch (ept12_resolve(vmread(GUEST_PHYSICAL_ADDRESS), &qualification)) {
    case EPT12_VIOLATION:
        return give_to_l2(EXIT_REASON_EPT_VIOLATION, qualification);
    case EPT12_MISCONFIGURATION:
        return give_to_l2(EXIT_REASON_EPT_MISCONFIGURATION, qualification);
    case EPT12_MAPPED:
        reinject_event();
    }
    return false;
}

bool handle_l3_exit(uint32_t reason)
{
    bool has_ept12 = vmcs12_secondary_controls() & SECONDARY_ENABLE_EPT;

    if (reason == EXIT_REASON_EPT_VIOLATION && has_ept12)
        return handle_ept_violation();
    if (reason & EXIT_REASON_ENTRY_FAILURE || l2_wants(reason))
        return give_to_l2(reason, vmread(EXIT_QUALIFICATION));
    emulate(reason);
    return false;
}
