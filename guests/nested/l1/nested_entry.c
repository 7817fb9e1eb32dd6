/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L2's VM entry: VMCS 12 says what L2 wants of L3, L1 has wishes of its own, and hardware gets
 * their union as VMCS 02.
 *
 * Spec: SDM volume 3, "VM Entries".
 */
#include "console.h"
#include "l1.h"

enum { ERROR_CONTROLS = 7, ERROR_HOST_STATE = 8 };
enum { SELECTOR_RPL_AND_TI = 7, ACTIVITY_HLT = 1 };

static uint8_t io_bitmaps02[2 * PAGE_SIZE] __attribute__((aligned(4096)));
static uint8_t msr_bitmaps02[PAGE_SIZE] __attribute__((aligned(4096)));

/* --- checks -------------------------------------------------------------------------------- */

static bool control_allowed(enum vmcs_field field, uint32_t capability_msr)
{
    uint64_t capability = virtual_capability(capability_msr);
    uint32_t value = (uint32_t)vmcs12_read(field);

    return !((uint32_t)capability & ~value) && !(value & ~(uint32_t)(capability >> 32));
}

static bool bitmap_addresses_good(uint32_t primary)
{
    if (primary & PRIMARY_USE_IO_BITMAPS)
        if (!l2_has_page(vmcs12_read(IO_BITMAP_A)) || !l2_has_page(vmcs12_read(IO_BITMAP_B)))
            return false;
    return !(primary & PRIMARY_USE_MSR_BITMAPS) || l2_has_page(vmcs12_read(MSR_BITMAPS));
}

/* The one form of EPT pointer that IA32_VMX_EPT_VPID_CAP offers: 4 levels, write-back. */
static bool ept_pointer_good(uint64_t pointer)
{
    return (pointer & (PAGE_SIZE - 1)) == 0x1E && l2_has_page(pointer & EPT_ADDRESS_MASK);
}

static bool controls_good(void)
{
    uint32_t primary = (uint32_t)vmcs12_read(PRIMARY_CONTROLS), secondary = vmcs12_secondary_controls();

    if (!control_allowed(PIN_BASED_CONTROLS, IA32_VMX_TRUE_PINBASED_CTLS) ||
        !control_allowed(PRIMARY_CONTROLS, IA32_VMX_TRUE_PROCBASED_CTLS) ||
        !control_allowed(EXIT_CONTROLS, IA32_VMX_TRUE_EXIT_CTLS) ||
        !control_allowed(ENTRY_CONTROLS, IA32_VMX_TRUE_ENTRY_CTLS))
        return false;
    if (secondary && !control_allowed(SECONDARY_CONTROLS, IA32_VMX_PROCBASED_CTLS2))
        return false;
    if ((secondary & SECONDARY_ENABLE_VPID) && vmcs12_read(VIRTUAL_PROCESSOR_ID) == 0)
        return false;
    if ((secondary & SECONDARY_UNRESTRICTED_GUEST) && !(secondary & SECONDARY_ENABLE_EPT))
        return false;
    if ((secondary & SECONDARY_ENABLE_EPT) && !ept_pointer_good(vmcs12_read(EPT_POINTER)))
        return false;
    /* L1 has no MSR-load and MSR-store areas: it refuses them, which a processor may not. */
    return bitmap_addresses_good(primary) && !vmcs12_read(EXIT_MSR_STORE_COUNT) &&
           !vmcs12_read(EXIT_MSR_LOAD_COUNT) && !vmcs12_read(ENTRY_MSR_LOAD_COUNT);
}

static bool fixed_bits_good(uint64_t value, uint32_t fixed0_msr)
{
    uint64_t must_be_1 = rdmsr(fixed0_msr), may_be_1 = rdmsr(fixed0_msr + 1);

    return !(must_be_1 & ~value) && !(value & ~may_be_1);
}

/* L2 is 64-bit code: its host address-space size is 64 bits, and LMA and LME agree with that. */
static bool host_efer_good(void)
{
    const uint64_t long_mode = EFER_LME | EFER_LMA, defined = EFER_SCE | EFER_NXE | long_mode;
    uint64_t efer = vmcs12_read(HOST_IA32_EFER);

    return !(vmcs12_read(EXIT_CONTROLS) & EXIT_LOAD_IA32_EFER) ||
           (!(efer & ~defined) && (efer & long_mode) == long_mode);
}

/* An emulated VM exit must not load a state that no VM exit may load. */
static bool host_state_good(void)
{
    for (unsigned selector = HOST_ES_SELECTOR; selector <= HOST_TR_SELECTOR; selector += 2)
        if (vmcs12_read(selector) & SELECTOR_RPL_AND_TI)
            return false;
    for (unsigned address = HOST_FS_BASE; address <= HOST_IA32_SYSENTER_EIP; address += 2)
        if (!is_canonical(vmcs12_read(address)))
            return false;
    return is_canonical(vmcs12_read(HOST_RIP)) && host_efer_good() && vmcs12_read(HOST_CS_SELECTOR) &&
           vmcs12_read(HOST_TR_SELECTOR) && fixed_bits_good(vmcs12_read(HOST_CR0), IA32_VMX_CR0_FIXED0) &&
           fixed_bits_good(vmcs12_read(HOST_CR4), IA32_VMX_CR4_FIXED0) && (vmcs12_read(HOST_CR4) & CR4_PAE) &&
           (vmcs12_read(EXIT_CONTROLS) & EXIT_HOST_ADDRESS_SPACE_SIZE);
}

uint32_t nested_entry_check(void)
{
    if (!controls_good())
        return ERROR_CONTROLS;
    return host_state_good() ? 0 : ERROR_HOST_STATE;
}

/* --- merging ------------------------------------------------------------------------------- */

static void merge_page(uint8_t *merged, const uint8_t *ours, const uint8_t *theirs)
{
    const uint64_t *a = (const void *)ours, *b = (const void *)theirs;

    for (unsigned i = 0; i < PAGE_SIZE / sizeof(uint64_t); i++)
        ((uint64_t *)merged)[i] = b ? a[i] | b[i] : ~0ul;
}

/* Without bitmaps every MSR access exits to L2; every port does if L2 says so. */
static void merge_bitmaps(uint32_t primary)
{
    bool io = primary & PRIMARY_USE_IO_BITMAPS, msr = primary & PRIMARY_USE_MSR_BITMAPS;
    const uint8_t *if_not = primary & PRIMARY_UNCONDITIONAL_IO_EXITING ? NULL : io_bitmaps01;

    merge_page(io_bitmaps02, io_bitmaps01, io ? l2_memory(vmcs12_read(IO_BITMAP_A), PAGE_SIZE) : if_not);
    merge_page(io_bitmaps02 + PAGE_SIZE, io_bitmaps01 + PAGE_SIZE,
               io ? l2_memory(vmcs12_read(IO_BITMAP_B), PAGE_SIZE) : if_not ? if_not + PAGE_SIZE : NULL);
    merge_page(msr_bitmaps02, msr_bitmaps01, msr ? l2_memory(vmcs12_read(MSR_BITMAPS), PAGE_SIZE) : NULL);
    vmwrite(IO_BITMAP_A, (uint64_t)io_bitmaps02);
    vmwrite(IO_BITMAP_B, (uint64_t)io_bitmaps02 + PAGE_SIZE);
    vmwrite(MSR_BITMAPS, (uint64_t)msr_bitmaps02);
}

/* L3's memory is what L2's EPT makes of L2's memory, or simply L2's memory. */
static void select_ept(uint32_t secondary, uint64_t ept01)
{
    static uint64_t shadowed_ept12;

    if (!(secondary & SECONDARY_ENABLE_EPT)) {
        vmwrite(EPT_POINTER, ept01);
        return;
    }
    vmwrite(EPT_POINTER, ept02_pointer());
    if (shadowed_ept12 != vmcs12_read(EPT_POINTER)) {
        shadowed_ept12 = vmcs12_read(EPT_POINTER);
        ept02_empty();
    }
}

/* L3 always runs with one VPID of L1's. Where L2's processor would have started with an empty TLB
 * or another VPID's, the one VPID is emptied. */
static void invalidate_for_vpid12(uint32_t secondary)
{
    uint64_t vpid12 = secondary & SECONDARY_ENABLE_VPID ? vmcs12_read(VIRTUAL_PROCESSOR_ID) : 0;

    if (vpid12 == 0 || vpid12 != virtual_vmx.last_vpid12)
        vmx_require("INVVPID", invvpid(INVALIDATE_SINGLE_CONTEXT, VPID_L3));
    virtual_vmx.last_vpid12 = vpid12;
}

static void write_controls02(uint32_t secondary)
{
    /* 12's, with what every VMCS of L1 has: bitmaps instead of unconditional exits, EPT and VPID. */
    struct vmx_controls wanted = {
        .pin_based = (uint32_t)vmcs12_read(PIN_BASED_CONTROLS),
        .primary = ((uint32_t)vmcs12_read(PRIMARY_CONTROLS) & ~PRIMARY_UNCONDITIONAL_IO_EXITING) |
                   PRIMARY_USE_IO_BITMAPS | PRIMARY_USE_MSR_BITMAPS | PRIMARY_ACTIVATE_SECONDARY_CONTROLS,
        .secondary = secondary | SECONDARY_ENABLE_EPT | SECONDARY_ENABLE_VPID,
        .exit = EXIT_SAVE_DEBUG_CONTROLS | EXIT_HOST_ADDRESS_SPACE_SIZE | EXIT_SAVE_IA32_EFER | EXIT_LOAD_IA32_EFER,
        .entry = (uint32_t)vmcs12_read(ENTRY_CONTROLS) | ENTRY_LOAD_DEBUG_CONTROLS | ENTRY_LOAD_IA32_EFER,
    };
    static const enum vmcs_field copied[] = {
        EXCEPTION_BITMAP, PAGE_FAULT_ERROR_CODE_MASK, PAGE_FAULT_ERROR_CODE_MATCH, CR3_TARGET_COUNT,
        CR3_TARGET_VALUE0, CR3_TARGET_VALUE1, CR3_TARGET_VALUE2, CR3_TARGET_VALUE3,
        ENTRY_INTERRUPTION_INFORMATION, ENTRY_EXCEPTION_ERROR_CODE, ENTRY_INSTRUCTION_LENGTH,
        CR0_GUEST_HOST_MASK, CR4_GUEST_HOST_MASK, CR0_READ_SHADOW, CR4_READ_SHADOW, TSC_OFFSET,
    };

    vmcs_write_controls(vmx_adjust_controls(wanted));
    for (unsigned i = 0; i < sizeof copied / sizeof copied[0]; i++)
        vmwrite(copied[i], vmcs12_read(copied[i]));
    vmwrite(VIRTUAL_PROCESSOR_ID, VPID_L3);
}

/* What a processor takes from the VMCS only under a control comes from L2 otherwise. */
struct inherited {
    uint64_t efer, dr7, debugctl;
};

static struct inherited read_inherited(void)
{
    return (struct inherited){
        .efer = vmread(GUEST_IA32_EFER),
        .dr7 = vmread(GUEST_DR7),
        .debugctl = vmread(GUEST_IA32_DEBUGCTL),
    };
}

/* Two fields of L2's cannot be passed on. Where L2's processor would refuse the value, hardware
 * gets one that it refuses for the same reason. */
static uint64_t guest_state02(enum vmcs_field field)
{
    const uint64_t misaligned = 1, reserved_state = 4;
    uint64_t value = vmcs12_read(field);

    if (field == VMCS_LINK_POINTER && value != ~0ul)            /* never let L2 name a physical address */
        return misaligned;
    if (field == GUEST_ACTIVITY_STATE && value > ACTIVITY_HLT)  /* IA32_VMX_MISC offers no other */
        return reserved_state;
    return value;
}

static void write_guest_state02(struct inherited l2)
{
    const struct field_span *guest_state = &vmcs12_fields[FIELDS_GUEST_STATE];
    uint32_t entry = (uint32_t)vmcs12_read(ENTRY_CONTROLS);
    const uint64_t long_mode = EFER_LME | EFER_LMA;

    for (unsigned i = 0; i < guest_state->count; i++)
        vmwrite(guest_state->fields[i], guest_state02(guest_state->fields[i]));
    if (!(entry & ENTRY_LOAD_IA32_EFER))
        vmwrite(GUEST_IA32_EFER, (l2.efer & ~long_mode) | (entry & ENTRY_IA32E_MODE_GUEST ? long_mode : 0));
    if (!(entry & ENTRY_LOAD_DEBUG_CONTROLS)) {
        vmwrite(GUEST_DR7, l2.dr7);
        vmwrite(GUEST_IA32_DEBUGCTL, l2.debugctl);
    }
}

static void refuse_pae_without_ept(uint32_t secondary)
{
    bool paging = vmcs12_read(GUEST_CR0) & CR0_PG, pae = vmcs12_read(GUEST_CR4) & CR4_PAE;

    /* Hardware would take the PDPTEs from VMCS 02, and nobody has read them from L3's memory. */
    if (paging && pae && !(vmcs12_read(ENTRY_CONTROLS) & ENTRY_IA32E_MODE_GUEST) &&
        !(secondary & SECONDARY_ENABLE_EPT))
        fail("PAE paging in L3 needs EPT in L2\n");
}

void nested_entry(void)
{
    uint32_t secondary = vmcs12_secondary_controls();
    uint64_t ept01 = vmread(EPT_POINTER);
    struct inherited inherited = read_inherited();

    refuse_pae_without_ept(secondary);
    vmcs_make_current(&vmcs02);
    write_controls02(secondary);
    merge_bitmaps((uint32_t)vmcs12_read(PRIMARY_CONTROLS));
    select_ept(secondary, ept01);
    invalidate_for_vpid12(secondary);
    write_guest_state02(inherited);
    virtual_vmx.in_l3 = true;
}
