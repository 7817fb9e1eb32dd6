/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * L1 as the ordinary hypervisor of L2: CPUID, MSRs, ports, and the bits of CR0 and CR4 that VMX
 * operation fixes.
 */
#include "../ports.h"
#include "console.h"
#include "l1.h"
#include "memory.h"

enum { BITS_PER_BYTE = 8, MSR_BITMAP_SIZE = 1024 };
#define MSR_HIGH_RANGE 0xC0000000u

static const char signature[12] = "I am level 1";

/* --- events -------------------------------------------------------------------------------- */

void inject_exception(enum vector vector)
{
    vmwrite(ENTRY_INTERRUPTION_INFORMATION, EVENT_VALID | EVENT_TYPE_HARDWARE_EXCEPTION | vector);
}

void inject_exception_with_code(enum vector vector, uint32_t error_code)
{
    vmwrite(ENTRY_INTERRUPTION_INFORMATION,
            EVENT_VALID | EVENT_ERROR_CODE_VALID | EVENT_TYPE_HARDWARE_EXCEPTION | vector);
    vmwrite(ENTRY_EXCEPTION_ERROR_CODE, error_code);
}

/* --- CPUID --------------------------------------------------------------------------------- */

/* Features that need an emulation or a control that L1 does not have. */
enum {
    CPUID_1_ECX_HIDDEN = 1u << 3 | 1u << 26 | 1u << 27 | 1u << 28,      /* MONITOR, XSAVE, OSXSAVE, AVX */
    CPUID_7_EBX_HIDDEN = 1u << 10,                                      /* INVPCID */
    CPUID_80000001_EDX_HIDDEN = 1u << 27,                               /* RDTSCP */
    CPUID_1_ECX_HYPERVISOR = 1u << 31,
};

static void handle_cpuid(void)
{
    uint32_t leaf = (uint32_t)gpr[RAX];
    struct cpuid_result r = cpuid(leaf, (uint32_t)gpr[RCX]);

    switch (leaf) {
    case 1:
        r.ecx = (r.ecx & ~CPUID_1_ECX_HIDDEN) | CPUID_1_ECX_HYPERVISOR;
        break;
    case 7:
        r.ebx &= ~CPUID_7_EBX_HIDDEN;
        break;
    case 0x80000001:
        r.edx &= ~CPUID_80000001_EDX_HIDDEN;
        break;
    case CPUID_HYPERVISOR_LEAF:
        r.eax = CPUID_HYPERVISOR_LEAF;
        memcpy(&r.ebx, signature, 4);
        memcpy(&r.ecx, signature + 4, 4);
        memcpy(&r.edx, signature + 8, 4);
        break;
    }
    gpr[RAX] = r.eax;
    gpr[RBX] = r.ebx;
    gpr[RCX] = r.ecx;
    gpr[RDX] = r.edx;
    vmcs_skip_instruction();
}

/* --- MSRs and ports ------------------------------------------------------------------------ */

uint8_t io_bitmaps01[2 * PAGE_SIZE] __attribute__((aligned(4096)));
uint8_t msr_bitmaps01[PAGE_SIZE] __attribute__((aligned(4096)));        /* read low, high; write low, high */

static void let_msr_pass(uint32_t msr)
{
    unsigned bit = msr & 0x1FFF;
    uint8_t *read = msr_bitmaps01 + (msr >= MSR_HIGH_RANGE ? MSR_BITMAP_SIZE : 0);

    read[bit / BITS_PER_BYTE] &= (uint8_t)~(1u << bit % BITS_PER_BYTE);
    read[2 * MSR_BITMAP_SIZE + bit / BITS_PER_BYTE] &= (uint8_t)~(1u << bit % BITS_PER_BYTE);
}

/* What is not let pass exits. The MSRs let pass are those that each VM entry and exit switches. */
void build_bitmaps01(void)
{
    static const uint32_t passing[] = {IA32_EFER, IA32_FS_BASE, IA32_GS_BASE, IA32_SYSENTER_CS, IA32_SYSENTER_ESP,
                                       IA32_SYSENTER_EIP};

    memset(io_bitmaps01, 0xFF, sizeof io_bitmaps01);
    memset(msr_bitmaps01, 0xFF, sizeof msr_bitmaps01);
    for (unsigned port = PORT_COM1; port < PORT_COM1 + 8; port++)
        io_bitmaps01[port / BITS_PER_BYTE] &= (uint8_t)~(1u << port % BITS_PER_BYTE);
    for (unsigned i = 0; i < sizeof passing / sizeof passing[0]; i++)
        let_msr_pass(passing[i]);
}

bool emulate_rdmsr(uint32_t msr, uint64_t *value)
{
    if (msr == IA32_FEATURE_CONTROL)
        *value = virtual_vmx.feature_control;
    else if (is_capability_msr(msr))
        *value = virtual_capability(msr);
    else
        return false;
    return true;
}

bool emulate_wrmsr(uint32_t msr, uint64_t value)
{
    const uint64_t writable = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX_OUTSIDE_SMX;

    if (msr != IA32_FEATURE_CONTROL || virtual_vmx.feature_control & FEATURE_CONTROL_LOCK || value & ~writable)
        return false;
    virtual_vmx.feature_control = value;
    return true;
}

void handle_msr_exit(bool write)
{
    uint32_t msr = (uint32_t)gpr[RCX];
    uint64_t value = gpr[RDX] << 32 | (uint32_t)gpr[RAX];

    if (!(write ? emulate_wrmsr(msr, value) : emulate_rdmsr(msr, &value))) {
        inject_exception_with_code(VECTOR_GP, 0);
        return;
    }
    if (!write) {
        gpr[RAX] = (uint32_t)value;
        gpr[RDX] = value >> 32;
    }
    vmcs_skip_instruction();
}

/* One port exists; reads of the others find nobody, writes are lost. */
void handle_io_exit(void)
{
    uint64_t qualification = vmread(EXIT_QUALIFICATION);
    unsigned bits = IO_SIZE(qualification) * BITS_PER_BYTE;
    uint64_t mask = (1ul << bits) - 1;
    uint64_t value = IO_PORT(qualification) == PORT_ASK_L1 ? 1 : ~0ul;

    if (IO_IS_STRING(qualification))
        fail("string I/O is not emulated, qualification 0x%lx\n", qualification);
    if (IO_IS_IN(qualification)) {
        gpr[RAX] = (gpr[RAX] & ~mask) | (value & mask);
        if (bits == 32)
            gpr[RAX] &= mask;           /* a 32-bit result clears the upper half */
    }
    vmcs_skip_instruction();
}

/* --- control registers --------------------------------------------------------------------- */

/* L1 owns CR0.NE and CR4.VMXE: VMX operation needs them 1, whatever L2 thinks. When L2 moves a
 * value that differs there, the shadow takes it and the instruction runs again: now it agrees with
 * the shadow, does not exit, and hardware checks and performs the rest. */
static void handle_control_register_access(void)
{
    uint64_t qualification = vmread(EXIT_QUALIFICATION);
    uint64_t value = guest_register(gpr, CR_REGISTER(qualification));

    if (CR_ACCESS_TYPE(qualification) != CR_ACCESS_MOV_TO)
        fail("unexpected control-register access, qualification 0x%lx\n", qualification);
    if (virtual_vmx.on)                 /* they are fixed for L2 as well now */
        inject_exception_with_code(VECTOR_GP, 0);
    else if (CR_NUMBER(qualification) == 0)
        vmwrite(CR0_READ_SHADOW, value & CR0_NE);
    else
        vmwrite(CR4_READ_SHADOW, value & CR4_VMXE);
}

/* --- dispatch ------------------------------------------------------------------------------ */

void handle_l2_exit(uint32_t reason)
{
    if (is_vmx_instruction(reason)) {
        handle_vmx_instruction(reason);
        return;
    }
    switch (reason) {
    case EXIT_REASON_CPUID:
        handle_cpuid();
        break;
    case EXIT_REASON_RDMSR:
    case EXIT_REASON_WRMSR:
        handle_msr_exit(reason == EXIT_REASON_WRMSR);
        break;
    case EXIT_REASON_IO_INSTRUCTION:
        handle_io_exit();
        break;
    case EXIT_REASON_CONTROL_REGISTER_ACCESS:
        handle_control_register_access();
        break;
    default:
        fail("no handler for VM exit %u of L2 (%s), qualification 0x%lx, RIP 0x%lx\n", reason,
             exit_reason_name(reason), vmread(EXIT_QUALIFICATION), vmread(GUEST_RIP));
    }
}
