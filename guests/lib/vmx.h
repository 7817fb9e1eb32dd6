/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The VMX instructions, controls, capability MSRs and exit reasons, in the manual's words, and the
 * steps every VT-x hypervisor takes. Whatever fails prints the instruction and the error number
 * and ends the run.
 */
#ifndef VMX_H
#define VMX_H

#include <stdbool.h>
#include <stdint.h>

#include "cpu.h"
#include "vmcs_fields.h"

/* Capability MSRs. Spec: SDM volume 3, "VMX Capability Reporting Facility". */
enum {
    IA32_VMX_BASIC = 0x480,
    IA32_VMX_PINBASED_CTLS = 0x481,
    IA32_VMX_PROCBASED_CTLS = 0x482,
    IA32_VMX_EXIT_CTLS = 0x483,
    IA32_VMX_ENTRY_CTLS = 0x484,
    IA32_VMX_MISC = 0x485,
    IA32_VMX_CR0_FIXED0 = 0x486,
    IA32_VMX_CR0_FIXED1 = 0x487,
    IA32_VMX_CR4_FIXED0 = 0x488,
    IA32_VMX_CR4_FIXED1 = 0x489,
    IA32_VMX_VMCS_ENUM = 0x48A,
    IA32_VMX_PROCBASED_CTLS2 = 0x48B,
    IA32_VMX_EPT_VPID_CAP = 0x48C,
    IA32_VMX_TRUE_PINBASED_CTLS = 0x48D,
    IA32_VMX_TRUE_PROCBASED_CTLS = 0x48E,
    IA32_VMX_TRUE_EXIT_CTLS = 0x48F,
    IA32_VMX_TRUE_ENTRY_CTLS = 0x490,
    IA32_VMX_VMFUNC = 0x491,
    IA32_VMX_PROCBASED_CTLS3 = 0x492,
};

enum { FEATURE_CONTROL_LOCK = 1u << 0, FEATURE_CONTROL_VMX_OUTSIDE_SMX = 1u << 2 };
#define VMX_BASIC_TRUE_CONTROLS (1ul << 55)
#define VMX_MISC_VMWRITE_ANY_FIELD (1ul << 29)
#define CPUID_1_ECX_VMX (1u << 5)

/* Controls. Spec: SDM volume 3, "VM-Execution Control Fields" and the exit and entry ones. */
enum {
    PIN_EXTERNAL_INTERRUPT_EXITING = 1u << 0,
    PIN_NMI_EXITING = 1u << 3,

    PRIMARY_TSC_OFFSETTING = 1u << 3,
    PRIMARY_HLT_EXITING = 1u << 7,
    PRIMARY_INVLPG_EXITING = 1u << 9,
    PRIMARY_MWAIT_EXITING = 1u << 10,
    PRIMARY_RDPMC_EXITING = 1u << 11,
    PRIMARY_RDTSC_EXITING = 1u << 12,
    PRIMARY_CR3_LOAD_EXITING = 1u << 15,
    PRIMARY_CR3_STORE_EXITING = 1u << 16,
    PRIMARY_MOV_DR_EXITING = 1u << 23,
    PRIMARY_UNCONDITIONAL_IO_EXITING = 1u << 24,
    PRIMARY_USE_IO_BITMAPS = 1u << 25,
    PRIMARY_USE_MSR_BITMAPS = 1u << 28,
    PRIMARY_MONITOR_EXITING = 1u << 29,
    PRIMARY_PAUSE_EXITING = 1u << 30,
    PRIMARY_ACTIVATE_SECONDARY_CONTROLS = 1u << 31,

    SECONDARY_ENABLE_EPT = 1u << 1,
    SECONDARY_ENABLE_VPID = 1u << 5,
    SECONDARY_UNRESTRICTED_GUEST = 1u << 7,

    EXIT_SAVE_DEBUG_CONTROLS = 1u << 2,
    EXIT_HOST_ADDRESS_SPACE_SIZE = 1u << 9,
    EXIT_SAVE_IA32_EFER = 1u << 20,
    EXIT_LOAD_IA32_EFER = 1u << 21,

    ENTRY_LOAD_DEBUG_CONTROLS = 1u << 2,
    ENTRY_IA32E_MODE_GUEST = 1u << 9,
    ENTRY_LOAD_IA32_EFER = 1u << 15,
};

/* Spec: SDM volume 3, appendix "VMX Basic Exit Reasons". */
enum exit_reason {
    EXIT_REASON_EXCEPTION_OR_NMI = 0,
    EXIT_REASON_EXTERNAL_INTERRUPT = 1,
    EXIT_REASON_TRIPLE_FAULT = 2,
    EXIT_REASON_CPUID = 10,
    EXIT_REASON_HLT = 12,
    EXIT_REASON_INVLPG = 14,
    EXIT_REASON_RDPMC = 15,
    EXIT_REASON_RDTSC = 16,
    EXIT_REASON_VMCALL = 18,
    EXIT_REASON_VMCLEAR = 19,
    EXIT_REASON_VMLAUNCH = 20,
    EXIT_REASON_VMPTRLD = 21,
    EXIT_REASON_VMPTRST = 22,
    EXIT_REASON_VMREAD = 23,
    EXIT_REASON_VMRESUME = 24,
    EXIT_REASON_VMWRITE = 25,
    EXIT_REASON_VMXOFF = 26,
    EXIT_REASON_VMXON = 27,
    EXIT_REASON_CONTROL_REGISTER_ACCESS = 28,
    EXIT_REASON_MOV_DR = 29,
    EXIT_REASON_IO_INSTRUCTION = 30,
    EXIT_REASON_RDMSR = 31,
    EXIT_REASON_WRMSR = 32,
    EXIT_REASON_INVALID_GUEST_STATE = 33,
    EXIT_REASON_MWAIT = 36,
    EXIT_REASON_MONITOR = 39,
    EXIT_REASON_PAUSE = 40,
    EXIT_REASON_EPT_VIOLATION = 48,
    EXIT_REASON_EPT_MISCONFIGURATION = 49,
    EXIT_REASON_INVEPT = 50,
    EXIT_REASON_INVVPID = 53,
    EXIT_REASON_COUNT = 64,
};

#define EXIT_REASON_ENTRY_FAILURE (1u << 31)
#define EXIT_REASON_BASIC_MASK 0xFFFFu

/* The qualification of an exit due to an I/O instruction. */
#define IO_PORT(qualification) ((uint16_t)((qualification) >> 16))
#define IO_SIZE(qualification) ((unsigned)((qualification)&7) + 1)
#define IO_IS_IN(qualification) ((bool)((qualification) >> 3 & 1))
#define IO_IS_STRING(qualification) ((bool)((qualification) >> 4 & 1))

/* The qualification of an exit due to a control-register access. */
enum { CR_ACCESS_MOV_TO = 0, CR_ACCESS_MOV_FROM = 1 };
#define CR_NUMBER(qualification) ((unsigned)((qualification)&15))
#define CR_ACCESS_TYPE(qualification) ((unsigned)((qualification) >> 4 & 3))
#define CR_REGISTER(qualification) ((enum gpr)((qualification) >> 8 & 15))

/* Segment access rights as the VMCS holds them. */
enum {
    RIGHTS_CODE64 = 0xA09B,
    RIGHTS_CODE32 = 0xC09B,
    RIGHTS_DATA = 0xC093,
    RIGHTS_TSS_BUSY = 0x008B,
    RIGHTS_UNUSABLE = 1u << 16,
};

/* Interruption information, the same layout at entry, at exit and for IDT vectoring. */
enum {
    EVENT_VALID = 1u << 31,
    EVENT_ERROR_CODE_VALID = 1u << 11,
    EVENT_TYPE_NMI = 2u << 8,
    EVENT_TYPE_HARDWARE_EXCEPTION = 3u << 8,
    EVENT_TYPE_MASK = 7u << 8,
    EVENT_VECTOR_MASK = 0xFF,
};

/* How a VMX instruction ended. Spec: SDM volume 3, "Conventions" of the VMX instruction reference. */
enum vmx_status { VM_SUCCEED = 0, VM_FAIL_INVALID = 1, VM_FAIL_VALID = 2 };

/* A VMXON or VMCS region. Hardware owns everything after the second word. */
struct vmx_region {
    uint32_t revision_identifier;
    uint32_t abort_indicator;
    uint8_t data[4088];
} __attribute__((aligned(4096)));

/* A VMCS with what software must remember about it. */
struct vmcs {
    struct vmx_region region;
    bool launched;
};

struct vmx_controls {
    uint32_t pin_based, primary, secondary, exit, entry;
};

/* --- instructions -------------------------------------------------------------------------- */

#define VMX_STATUS(invalid, valid) ((invalid) ? VM_FAIL_INVALID : (valid) ? VM_FAIL_VALID : VM_SUCCEED)

#define DEFINE_VMX_POINTER_INSTRUCTION(name)                                                  \
    static inline enum vmx_status name(const uint64_t *physical_address)                      \
    {                                                                                         \
        bool invalid, valid;                                                                  \
        __asm__ volatile(#name " %2"                                                          \
                         : "=@ccc"(invalid), "=@ccz"(valid)                                   \
                         : "m"(*physical_address)                                             \
                         : "memory");                                                         \
        return VMX_STATUS(invalid, valid);                                                    \
    }

DEFINE_VMX_POINTER_INSTRUCTION(vmxon)
DEFINE_VMX_POINTER_INSTRUCTION(vmclear)
DEFINE_VMX_POINTER_INSTRUCTION(vmptrld)

static inline enum vmx_status vmptrst(uint64_t *physical_address)
{
    bool invalid, valid;
    __asm__ volatile("vmptrst %2" : "=@ccc"(invalid), "=@ccz"(valid), "=m"(*physical_address)::"memory");
    return VMX_STATUS(invalid, valid);
}

static inline enum vmx_status vmxoff(void)
{
    bool invalid, valid;
    __asm__ volatile("vmxoff" : "=@ccc"(invalid), "=@ccz"(valid)::"memory");
    return VMX_STATUS(invalid, valid);
}

static inline enum vmx_status try_vmread(uint64_t field, uint64_t *value)
{
    bool invalid, valid;
    __asm__ volatile("vmread %3, %2" : "=@ccc"(invalid), "=@ccz"(valid), "=r"(*value) : "r"(field));
    return VMX_STATUS(invalid, valid);
}

static inline enum vmx_status try_vmwrite(uint64_t field, uint64_t value)
{
    bool invalid, valid;
    __asm__ volatile("vmwrite %2, %3" : "=@ccc"(invalid), "=@ccz"(valid) : "r"(value), "r"(field) : "memory");
    return VMX_STATUS(invalid, valid);
}

/* The 128-bit memory operand of INVEPT (context = EPT pointer) and INVVPID (context = VPID). */
struct invalidation_descriptor {
    uint64_t context, address;
};
enum { INVALIDATE_SINGLE_CONTEXT = 1, INVALIDATE_ALL_CONTEXTS = 2 };

#define DEFINE_VMX_INVALIDATION(name)                                                         \
    static inline enum vmx_status name(uint64_t type, uint64_t context)                       \
    {                                                                                         \
        struct invalidation_descriptor descriptor = {.context = context};                     \
        bool invalid, valid;                                                                  \
        __asm__ volatile(#name " %2, %3"                                                      \
                         : "=@ccc"(invalid), "=@ccz"(valid)                                   \
                         : "m"(descriptor), "r"(type)                                         \
                         : "memory");                                                         \
        return VMX_STATUS(invalid, valid);                                                    \
    }

DEFINE_VMX_INVALIDATION(invept)
DEFINE_VMX_INVALIDATION(invvpid)

/* VMLAUNCH or VMRESUME with these registers (RSP and RIP are in the VMCS). Returns VM_SUCCEED
 * after the VM exit, with the guest's registers stored back; otherwise how the entry failed. */
enum vmx_status vm_enter(uint64_t gpr[GPR_COUNT], bool resume);

/* --- steps --------------------------------------------------------------------------------- */

/* Ends the run unless `status` is VM_SUCCEED. */
void vmx_require(const char *instruction, enum vmx_status status);

uint64_t vmread(enum vmcs_field field);
void vmwrite(enum vmcs_field field, uint64_t value);

/* Checks CPUID and IA32_FEATURE_CONTROL (locks it if it is open), sets the bits of CR0 and CR4
 * that VMX operation fixes, executes VMXON. */
void vmx_enable(void);

/* VMCLEAR, then VMPTRLD, of a VMCS never used before. */
void vmcs_create(struct vmcs *vmcs);
void vmcs_make_current(struct vmcs *vmcs);

/* VMLAUNCH the first time, VMRESUME from then on. */
enum vmx_status vmcs_enter(struct vmcs *vmcs, uint64_t gpr[GPR_COUNT]);

/* Adds the controls this processor demands; ends the run if it lacks one that is asked for. */
struct vmx_controls vmx_adjust_controls(struct vmx_controls wanted);
void vmcs_write_controls(struct vmx_controls controls);

/* Host state: what the processor has now; a VM exit returns from vm_enter(). */
void vmcs_write_host_state(void);

/* Guest state: 64-bit ring 0 with this processor's control registers, GDT and IDT. */
void vmcs_write_guest_state_64(uint64_t rip, uint64_t rsp);
void vmcs_write_segment(enum vmcs_segment segment, uint16_t selector, uint64_t base, uint32_t limit, uint32_t rights);

/* Moves the guest past the instruction that caused the VM exit. */
void vmcs_skip_instruction(void);

/* The value of a guest register, RSP included. */
uint64_t guest_register(const uint64_t gpr[GPR_COUNT], enum gpr number);
void set_guest_register(uint64_t gpr[GPR_COUNT], enum gpr number, uint64_t value);

const char *exit_reason_name(uint32_t basic_reason);

#endif
