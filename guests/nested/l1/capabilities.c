/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L2's processor offers the part of the real one's VMX that L1 can emulate. One table for the
 * controls; everything else follows from the real MSRs.
 *
 * Spec: SDM volume 3, "VMX Capability Reporting Facility".
 */
#include "l1.h"

enum { VMCS12_HIGHEST_INDEX = 0x15 };
#define BASIC_REGION_SIZE (PAGE_SIZE << 32)
#define BASIC_WRITE_BACK (6ul << 50)
#define BASIC_INS_OUTS_INFORMATION (1ul << 54)

#define MISC_EXIT_STORES_LMA (1ul << 5)
#define MISC_ACTIVITY_HLT (1ul << 6)
#define MISC_CR3_TARGET_COUNT (0x1FFul << 16)

#define EPT_CAP_WALK_LENGTH_4 (1ul << 6)
#define EPT_CAP_WRITE_BACK (1ul << 14)
#define EPT_CAP_2M_PAGES (1ul << 16)
#define EPT_CAP_INVEPT (1ul << 20 | 3ul << 25)
#define VPID_CAP_INVVPID (1ul << 32)
#define VPID_CAP_SINGLE_AND_ALL_CONTEXTS (3ul << 41)

enum {
    OFFERED_PIN_BASED = PIN_EXTERNAL_INTERRUPT_EXITING | PIN_NMI_EXITING,
    OFFERED_PRIMARY = PRIMARY_TSC_OFFSETTING | PRIMARY_HLT_EXITING | PRIMARY_INVLPG_EXITING | PRIMARY_MWAIT_EXITING |
                      PRIMARY_RDPMC_EXITING | PRIMARY_RDTSC_EXITING | PRIMARY_CR3_LOAD_EXITING |
                      PRIMARY_CR3_STORE_EXITING | PRIMARY_MOV_DR_EXITING | PRIMARY_UNCONDITIONAL_IO_EXITING |
                      PRIMARY_USE_IO_BITMAPS | PRIMARY_USE_MSR_BITMAPS | PRIMARY_MONITOR_EXITING |
                      PRIMARY_PAUSE_EXITING | PRIMARY_ACTIVATE_SECONDARY_CONTROLS,
    OFFERED_EXIT = EXIT_SAVE_DEBUG_CONTROLS | EXIT_HOST_ADDRESS_SPACE_SIZE | EXIT_SAVE_IA32_EFER |
                   EXIT_LOAD_IA32_EFER,
    OFFERED_ENTRY = ENTRY_LOAD_DEBUG_CONTROLS | ENTRY_IA32E_MODE_GUEST | ENTRY_LOAD_IA32_EFER,
};

static const struct {
    uint32_t msr, offered;
} control_capabilities[] = {
    {IA32_VMX_PINBASED_CTLS, OFFERED_PIN_BASED},
    {IA32_VMX_TRUE_PINBASED_CTLS, OFFERED_PIN_BASED},
    {IA32_VMX_PROCBASED_CTLS, OFFERED_PRIMARY},
    {IA32_VMX_TRUE_PROCBASED_CTLS, OFFERED_PRIMARY},
    {IA32_VMX_PROCBASED_CTLS2, SECONDARY_ENABLE_EPT | SECONDARY_ENABLE_VPID | SECONDARY_UNRESTRICTED_GUEST},
    {IA32_VMX_EXIT_CTLS, OFFERED_EXIT},
    {IA32_VMX_TRUE_EXIT_CTLS, OFFERED_EXIT},
    {IA32_VMX_ENTRY_CTLS, OFFERED_ENTRY},
    {IA32_VMX_TRUE_ENTRY_CTLS, OFFERED_ENTRY},
};

bool is_capability_msr(uint32_t msr)
{
    return msr >= IA32_VMX_BASIC && msr <= IA32_VMX_TRUE_ENTRY_CTLS;
}

/* What the processor demands stays demanded; what it allows is allowed only if L1 offers it. */
static uint64_t control_capability(uint32_t msr, uint32_t offered)
{
    uint64_t real = rdmsr(msr);
    uint32_t must_be_1 = (uint32_t)real, may_be_1 = (uint32_t)(real >> 32);

    return (uint64_t)(may_be_1 & (offered | must_be_1)) << 32 | must_be_1;
}

uint64_t virtual_capability(uint32_t msr)
{
    for (unsigned i = 0; i < sizeof control_capabilities / sizeof control_capabilities[0]; i++)
        if (control_capabilities[i].msr == msr)
            return control_capability(msr, control_capabilities[i].offered);

    switch (msr) {
    case IA32_VMX_BASIC:
        return VMCS12_REVISION | BASIC_REGION_SIZE | BASIC_WRITE_BACK |
               (rdmsr(msr) & (BASIC_INS_OUTS_INFORMATION | VMX_BASIC_TRUE_CONTROLS));
    case IA32_VMX_MISC:
        return rdmsr(msr) & (MISC_EXIT_STORES_LMA | MISC_ACTIVITY_HLT | MISC_CR3_TARGET_COUNT);
    case IA32_VMX_VMCS_ENUM:
        return VMCS12_HIGHEST_INDEX << 1;
    case IA32_VMX_EPT_VPID_CAP:
        return EPT_CAP_WALK_LENGTH_4 | EPT_CAP_WRITE_BACK | EPT_CAP_2M_PAGES | EPT_CAP_INVEPT | VPID_CAP_INVVPID |
               VPID_CAP_SINGLE_AND_ALL_CONTEXTS;
    default:
        return rdmsr(msr);              /* the fixed bits of CR0 and CR4 */
    }
}
