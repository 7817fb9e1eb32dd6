/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L2's VMCS: a page of L2's memory in a format of L1's choice, like the region of any processor.
 *
 * The page is 16 groups, one for each width and type of field, of 32 slots of 8 bytes. No field is
 * 16-bit read-only data: that group is put first and holds the header instead.
 */
#include "console.h"
#include "l1.h"

enum { GROUP_COUNT = 16, SLOT_COUNT = 32 };
enum { WIDTH_16, WIDTH_64, WIDTH_32, WIDTH_NATURAL };
enum { TYPE_READ_ONLY_DATA = 1 };

struct vmcs12_region {
    union {
        struct {
            uint32_t revision_identifier, abort_indicator;
            uint32_t launched;
        };
        uint64_t slots[GROUP_COUNT][SLOT_COUNT];
    };
};

_Static_assert(sizeof(struct vmcs12_region) == PAGE_SIZE, "IA32_VMX_BASIC reports this size");

/* --- the fields that exist ----------------------------------------------------------------- */

static const uint16_t control_fields[] = {
    VIRTUAL_PROCESSOR_ID,
    IO_BITMAP_A, IO_BITMAP_B, MSR_BITMAPS, EXIT_MSR_STORE_ADDRESS, EXIT_MSR_LOAD_ADDRESS, ENTRY_MSR_LOAD_ADDRESS,
    TSC_OFFSET, EPT_POINTER,
    PIN_BASED_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXCEPTION_BITMAP, PAGE_FAULT_ERROR_CODE_MASK,
    PAGE_FAULT_ERROR_CODE_MATCH, CR3_TARGET_COUNT, EXIT_CONTROLS, EXIT_MSR_STORE_COUNT, EXIT_MSR_LOAD_COUNT,
    ENTRY_CONTROLS, ENTRY_MSR_LOAD_COUNT, ENTRY_INTERRUPTION_INFORMATION, ENTRY_EXCEPTION_ERROR_CODE,
    ENTRY_INSTRUCTION_LENGTH,
    CR0_GUEST_HOST_MASK, CR4_GUEST_HOST_MASK, CR0_READ_SHADOW, CR4_READ_SHADOW,
    CR3_TARGET_VALUE0, CR3_TARGET_VALUE1, CR3_TARGET_VALUE2, CR3_TARGET_VALUE3,
};

static const uint16_t guest_state_fields[] = {
    GUEST_ES_SELECTOR, GUEST_CS_SELECTOR, GUEST_SS_SELECTOR, GUEST_DS_SELECTOR, GUEST_FS_SELECTOR, GUEST_GS_SELECTOR,
    GUEST_LDTR_SELECTOR, GUEST_TR_SELECTOR,
    VMCS_LINK_POINTER, GUEST_IA32_DEBUGCTL, GUEST_IA32_EFER, GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3,
    GUEST_ES_LIMIT, GUEST_CS_LIMIT, GUEST_SS_LIMIT, GUEST_DS_LIMIT, GUEST_FS_LIMIT, GUEST_GS_LIMIT,
    GUEST_LDTR_LIMIT, GUEST_TR_LIMIT, GUEST_GDTR_LIMIT, GUEST_IDTR_LIMIT,
    GUEST_ES_ACCESS_RIGHTS, GUEST_CS_ACCESS_RIGHTS, GUEST_SS_ACCESS_RIGHTS, GUEST_DS_ACCESS_RIGHTS,
    GUEST_FS_ACCESS_RIGHTS, GUEST_GS_ACCESS_RIGHTS, GUEST_LDTR_ACCESS_RIGHTS, GUEST_TR_ACCESS_RIGHTS,
    GUEST_INTERRUPTIBILITY_STATE, GUEST_ACTIVITY_STATE, GUEST_IA32_SYSENTER_CS,
    GUEST_CR0, GUEST_CR3, GUEST_CR4,
    GUEST_ES_BASE, GUEST_CS_BASE, GUEST_SS_BASE, GUEST_DS_BASE, GUEST_FS_BASE, GUEST_GS_BASE,
    GUEST_LDTR_BASE, GUEST_TR_BASE, GUEST_GDTR_BASE, GUEST_IDTR_BASE,
    GUEST_DR7, GUEST_RSP, GUEST_RIP, GUEST_RFLAGS, GUEST_PENDING_DEBUG_EXCEPTIONS,
    GUEST_IA32_SYSENTER_ESP, GUEST_IA32_SYSENTER_EIP,
};

static const uint16_t host_state_fields[] = {
    HOST_ES_SELECTOR, HOST_CS_SELECTOR, HOST_SS_SELECTOR, HOST_DS_SELECTOR, HOST_FS_SELECTOR, HOST_GS_SELECTOR,
    HOST_TR_SELECTOR,
    HOST_IA32_EFER, HOST_IA32_SYSENTER_CS,
    HOST_CR0, HOST_CR3, HOST_CR4, HOST_FS_BASE, HOST_GS_BASE, HOST_TR_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE,
    HOST_IA32_SYSENTER_ESP, HOST_IA32_SYSENTER_EIP, HOST_RSP, HOST_RIP,
};

static const uint16_t read_only_fields[] = {
    GUEST_PHYSICAL_ADDRESS,
    VM_INSTRUCTION_ERROR, EXIT_REASON, EXIT_INTERRUPTION_INFORMATION, EXIT_INTERRUPTION_ERROR_CODE,
    IDT_VECTORING_INFORMATION, IDT_VECTORING_ERROR_CODE, EXIT_INSTRUCTION_LENGTH, EXIT_INSTRUCTION_INFORMATION,
    EXIT_QUALIFICATION, IO_RCX, IO_RSI, IO_RDI, IO_RIP, GUEST_LINEAR_ADDRESS,
};

#define SPAN(array) {array, sizeof(array) / sizeof((array)[0])}
const struct field_span vmcs12_fields[FIELD_LIST_COUNT] = {
    [FIELDS_CONTROL] = SPAN(control_fields),
    [FIELDS_GUEST_STATE] = SPAN(guest_state_fields),
    [FIELDS_HOST_STATE] = SPAN(host_state_fields),
    [FIELDS_READ_ONLY] = SPAN(read_only_fields),
};

/* --- access -------------------------------------------------------------------------------- */

static bool is_high_access(uint64_t encoding)
{
    return encoding & 1;
}

static unsigned field_type(uint64_t encoding)
{
    return encoding >> 10 & 3;
}

static unsigned field_width(uint64_t encoding)
{
    return encoding >> 13 & 3;
}

bool vmcs12_has_field(uint64_t encoding)
{
    uint64_t full = encoding & ~1ul;
    const struct field_span *span;

    if (is_high_access(encoding) && field_width(encoding) != WIDTH_64)
        return false;
    for (span = vmcs12_fields; span < vmcs12_fields + FIELD_LIST_COUNT; span++)
        for (unsigned i = 0; i < span->count; i++)
            if (span->fields[i] == full)
                return true;
    return false;
}

static struct vmcs12_region *region(uint64_t guest_physical)
{
    struct vmcs12_region *page = l2_memory(guest_physical, PAGE_SIZE);

    if (!page)
        fail("VMCS 12 at 0x%lx is outside L2's memory\n", guest_physical);
    return page;
}

static uint64_t *slot(uint64_t encoding)
{
    unsigned group = field_width(encoding) << 2 | (field_type(encoding) ^ TYPE_READ_ONLY_DATA);

    return &region(virtual_vmx.current_vmcs)->slots[group][encoding >> 1 & (SLOT_COUNT - 1)];
}

uint64_t vmcs12_read(uint64_t encoding)
{
    return is_high_access(encoding) ? *slot(encoding) >> 32 : *slot(encoding);
}

void vmcs12_write(uint64_t encoding, uint64_t value)
{
    static const uint64_t mask[] = {
        [WIDTH_16] = 0xFFFF, [WIDTH_32] = 0xFFFFFFFF, [WIDTH_64] = ~0ul, [WIDTH_NATURAL] = ~0ul};

    if (is_high_access(encoding))
        *slot(encoding) = value << 32 | (*slot(encoding) & 0xFFFFFFFF);
    else
        *slot(encoding) = value & mask[field_width(encoding)];
}

uint32_t vmcs12_secondary_controls(void)
{
    bool active = vmcs12_read(PRIMARY_CONTROLS) & PRIMARY_ACTIVATE_SECONDARY_CONTROLS;

    return active ? (uint32_t)vmcs12_read(SECONDARY_CONTROLS) : 0;
}

bool vmcs12_is_launched(void)
{
    return region(virtual_vmx.current_vmcs)->launched;
}

void vmcs_region_set_launched(uint64_t guest_physical, bool launched)
{
    region(guest_physical)->launched = launched;
}
