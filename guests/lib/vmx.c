/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "vmx.h"

#include "console.h"
#include "descriptors.h"

extern const uint8_t vm_exit_point[];

static struct vmx_region vmxon_region;

void vmx_require(const char *instruction, enum vmx_status status)
{
    uint64_t error;

    if (status == VM_SUCCEED)
        return;
    if (status == VM_FAIL_VALID && try_vmread(VM_INSTRUCTION_ERROR, &error) == VM_SUCCEED)
        fail("%s failed: VMfailValid, VM-instruction error %lu\n", instruction, error);
    fail("%s failed: VMfailInvalid\n", instruction);
}

uint64_t vmread(enum vmcs_field field)
{
    uint64_t value = 0;

    if (try_vmread(field, &value) != VM_SUCCEED)
        fail("VMREAD of field 0x%x failed\n", field);
    return value;
}

void vmwrite(enum vmcs_field field, uint64_t value)
{
    if (try_vmwrite(field, value) != VM_SUCCEED)
        fail("VMWRITE of field 0x%x failed\n", field);
}

static void check_support(void)
{
    const uint64_t needed = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX_OUTSIDE_SMX;

    if (!(cpuid(1, 0).ecx & CPUID_1_ECX_VMX))
        fail("this processor has no VMX (CPUID.1:ECX.VMX = 0)\n");
    if (rdmsr(IA32_FEATURE_CONTROL) == 0)
        wrmsr(IA32_FEATURE_CONTROL, needed);    /* firmware left it open: VMXON needs it locked */
    if ((rdmsr(IA32_FEATURE_CONTROL) & needed) != needed)
        fail("IA32_FEATURE_CONTROL = 0x%lx forbids VMXON\n", rdmsr(IA32_FEATURE_CONTROL));
}

static uint32_t revision_identifier(void)
{
    return (uint32_t)rdmsr(IA32_VMX_BASIC) & 0x7FFFFFFF;
}

void vmx_enable(void)
{
    uint64_t address = (uint64_t)&vmxon_region;

    check_support();
    write_cr0((read_cr0() | rdmsr(IA32_VMX_CR0_FIXED0)) & rdmsr(IA32_VMX_CR0_FIXED1));
    write_cr4((read_cr4() | rdmsr(IA32_VMX_CR4_FIXED0)) & rdmsr(IA32_VMX_CR4_FIXED1));
    vmxon_region.revision_identifier = revision_identifier();
    vmx_require("VMXON", vmxon(&address));
}

void vmcs_create(struct vmcs *vmcs)
{
    uint64_t address = (uint64_t)&vmcs->region;

    vmcs->region.revision_identifier = revision_identifier();
    vmcs->launched = false;
    vmx_require("VMCLEAR", vmclear(&address));
    vmcs_make_current(vmcs);
}

void vmcs_make_current(struct vmcs *vmcs)
{
    uint64_t address = (uint64_t)&vmcs->region;

    vmx_require("VMPTRLD", vmptrld(&address));
}

enum vmx_status vmcs_enter(struct vmcs *vmcs, uint64_t gpr[GPR_COUNT])
{
    enum vmx_status status = vm_enter(gpr, vmcs->launched);

    /* An entry that fails on guest state also ends in a VM exit, but does not launch the VMCS. */
    if (status == VM_SUCCEED && !vmcs->launched)
        vmcs->launched = !(vmread(EXIT_REASON) & EXIT_REASON_ENTRY_FAILURE);
    return status;
}

/* A capability MSR: bits set in its low half must be 1, bits clear in its high half must be 0. */
static uint32_t adjust(const char *name, uint32_t wanted, uint32_t capability_msr)
{
    uint64_t capability = rdmsr(capability_msr);
    uint32_t must_be_1 = (uint32_t)capability, may_be_1 = (uint32_t)(capability >> 32);

    if (wanted & ~may_be_1)
        fail("this processor lacks %s controls 0x%x\n", name, wanted & ~may_be_1);
    return wanted | must_be_1;
}

struct vmx_controls vmx_adjust_controls(struct vmx_controls wanted)
{
    /* The TRUE MSRs also tell which default1 controls may be 0. */
    bool flexible = rdmsr(IA32_VMX_BASIC) & VMX_BASIC_TRUE_CONTROLS;

    return (struct vmx_controls){
        .pin_based = adjust("pin-based", wanted.pin_based,
                            flexible ? IA32_VMX_TRUE_PINBASED_CTLS : IA32_VMX_PINBASED_CTLS),
        .primary = adjust("primary processor-based", wanted.primary,
                          flexible ? IA32_VMX_TRUE_PROCBASED_CTLS : IA32_VMX_PROCBASED_CTLS),
        .secondary = wanted.primary & PRIMARY_ACTIVATE_SECONDARY_CONTROLS
                         ? adjust("secondary processor-based", wanted.secondary, IA32_VMX_PROCBASED_CTLS2)
                         : 0,
        .exit = adjust("VM-exit", wanted.exit, flexible ? IA32_VMX_TRUE_EXIT_CTLS : IA32_VMX_EXIT_CTLS),
        .entry = adjust("VM-entry", wanted.entry, flexible ? IA32_VMX_TRUE_ENTRY_CTLS : IA32_VMX_ENTRY_CTLS),
    };
}

void vmcs_write_controls(struct vmx_controls controls)
{
    vmwrite(PIN_BASED_CONTROLS, controls.pin_based);
    vmwrite(PRIMARY_CONTROLS, controls.primary);
    if (controls.primary & PRIMARY_ACTIVATE_SECONDARY_CONTROLS)
        vmwrite(SECONDARY_CONTROLS, controls.secondary);
    vmwrite(EXIT_CONTROLS, controls.exit);
    vmwrite(ENTRY_CONTROLS, controls.entry);

    vmwrite(EXCEPTION_BITMAP, 0);
    vmwrite(PAGE_FAULT_ERROR_CODE_MASK, 0);
    vmwrite(PAGE_FAULT_ERROR_CODE_MATCH, 0);
    vmwrite(CR3_TARGET_COUNT, 0);
    vmwrite(EXIT_MSR_STORE_COUNT, 0);
    vmwrite(EXIT_MSR_LOAD_COUNT, 0);
    vmwrite(ENTRY_MSR_LOAD_COUNT, 0);
    vmwrite(ENTRY_INTERRUPTION_INFORMATION, 0);
    vmwrite(CR0_GUEST_HOST_MASK, 0);
    vmwrite(CR4_GUEST_HOST_MASK, 0);
    vmwrite(CR0_READ_SHADOW, 0);
    vmwrite(CR4_READ_SHADOW, 0);
}

void vmcs_write_host_state(void)
{
    vmwrite(HOST_CR0, read_cr0());
    vmwrite(HOST_CR3, read_cr3());
    vmwrite(HOST_CR4, read_cr4());
    vmwrite(HOST_RIP, (uint64_t)vm_exit_point); /* HOST_RSP: vm_enter() writes it */

    vmwrite(HOST_CS_SELECTOR, SELECTOR_CODE64);
    vmwrite(HOST_SS_SELECTOR, SELECTOR_DATA);
    vmwrite(HOST_DS_SELECTOR, SELECTOR_DATA);
    vmwrite(HOST_ES_SELECTOR, SELECTOR_DATA);
    vmwrite(HOST_FS_SELECTOR, 0);
    vmwrite(HOST_GS_SELECTOR, 0);
    vmwrite(HOST_TR_SELECTOR, SELECTOR_TSS);

    vmwrite(HOST_FS_BASE, rdmsr(IA32_FS_BASE));
    vmwrite(HOST_GS_BASE, rdmsr(IA32_GS_BASE));
    vmwrite(HOST_TR_BASE, (uint64_t)&tss);
    vmwrite(HOST_GDTR_BASE, sgdt().base);
    vmwrite(HOST_IDTR_BASE, sidt().base);

    vmwrite(HOST_IA32_SYSENTER_CS, 0);
    vmwrite(HOST_IA32_SYSENTER_ESP, 0);
    vmwrite(HOST_IA32_SYSENTER_EIP, 0);
    if (vmread(EXIT_CONTROLS) & EXIT_LOAD_IA32_EFER)
        vmwrite(HOST_IA32_EFER, rdmsr(IA32_EFER));
}

void vmcs_write_segment(enum vmcs_segment segment, uint16_t selector, uint64_t base, uint32_t limit, uint32_t rights)
{
    vmwrite(GUEST_SELECTOR(segment), selector);
    vmwrite(GUEST_BASE(segment), base);
    vmwrite(GUEST_LIMIT(segment), limit);
    vmwrite(GUEST_ACCESS_RIGHTS(segment), rights);
}

void vmcs_write_guest_state_64(uint64_t rip, uint64_t rsp)
{
    vmwrite(GUEST_CR0, read_cr0());
    vmwrite(GUEST_CR3, read_cr3());
    vmwrite(GUEST_CR4, read_cr4());
    vmwrite(GUEST_DR7, 0x400);
    vmwrite(GUEST_RIP, rip);
    vmwrite(GUEST_RSP, rsp);
    vmwrite(GUEST_RFLAGS, RFLAGS_FIXED);

    vmcs_write_segment(SEGMENT_CS, SELECTOR_CODE64, 0, 0xFFFFFFFF, RIGHTS_CODE64);
    vmcs_write_segment(SEGMENT_SS, SELECTOR_DATA, 0, 0xFFFFFFFF, RIGHTS_DATA);
    vmcs_write_segment(SEGMENT_DS, SELECTOR_DATA, 0, 0xFFFFFFFF, RIGHTS_DATA);
    vmcs_write_segment(SEGMENT_ES, SELECTOR_DATA, 0, 0xFFFFFFFF, RIGHTS_DATA);
    vmcs_write_segment(SEGMENT_FS, 0, 0, 0, RIGHTS_UNUSABLE);
    vmcs_write_segment(SEGMENT_GS, 0, 0, 0, RIGHTS_UNUSABLE);
    vmcs_write_segment(SEGMENT_LDTR, 0, 0, 0, RIGHTS_UNUSABLE);
    vmcs_write_segment(SEGMENT_TR, SELECTOR_TSS, (uint64_t)&tss, sizeof tss - 1, RIGHTS_TSS_BUSY);
    vmwrite(GUEST_GDTR_BASE, sgdt().base);
    vmwrite(GUEST_GDTR_LIMIT, sgdt().limit);
    vmwrite(GUEST_IDTR_BASE, sidt().base);
    vmwrite(GUEST_IDTR_LIMIT, sidt().limit);

    vmwrite(GUEST_IA32_SYSENTER_CS, 0);
    vmwrite(GUEST_IA32_SYSENTER_ESP, 0);
    vmwrite(GUEST_IA32_SYSENTER_EIP, 0);
    vmwrite(GUEST_IA32_DEBUGCTL, 0);
    vmwrite(GUEST_INTERRUPTIBILITY_STATE, 0);
    vmwrite(GUEST_ACTIVITY_STATE, 0);
    vmwrite(GUEST_PENDING_DEBUG_EXCEPTIONS, 0);
    vmwrite(VMCS_LINK_POINTER, ~0ul);
    if (vmread(ENTRY_CONTROLS) & ENTRY_LOAD_IA32_EFER)
        vmwrite(GUEST_IA32_EFER, rdmsr(IA32_EFER));
}

void vmcs_skip_instruction(void)
{
    const uint64_t blocking_by_sti_or_mov_ss = 3;

    vmwrite(GUEST_RIP, vmread(GUEST_RIP) + vmread(EXIT_INSTRUCTION_LENGTH));
    vmwrite(GUEST_INTERRUPTIBILITY_STATE, vmread(GUEST_INTERRUPTIBILITY_STATE) & ~blocking_by_sti_or_mov_ss);
}

uint64_t guest_register(const uint64_t gpr[GPR_COUNT], enum gpr number)
{
    return number == RSP ? vmread(GUEST_RSP) : gpr[number];
}

void set_guest_register(uint64_t gpr[GPR_COUNT], enum gpr number, uint64_t value)
{
    if (number == RSP)
        vmwrite(GUEST_RSP, value);
    else
        gpr[number] = value;
}

const char *exit_reason_name(uint32_t basic_reason)
{
    static const char *const names[EXIT_REASON_COUNT] = {
        [EXIT_REASON_EXCEPTION_OR_NMI] = "exception or NMI",
        [EXIT_REASON_EXTERNAL_INTERRUPT] = "external interrupt",
        [EXIT_REASON_TRIPLE_FAULT] = "triple fault",
        [EXIT_REASON_CPUID] = "CPUID",
        [EXIT_REASON_HLT] = "HLT",
        [EXIT_REASON_INVLPG] = "INVLPG",
        [EXIT_REASON_RDPMC] = "RDPMC",
        [EXIT_REASON_RDTSC] = "RDTSC",
        [EXIT_REASON_VMCALL] = "VMCALL",
        [EXIT_REASON_VMCLEAR] = "VMCLEAR",
        [EXIT_REASON_VMLAUNCH] = "VMLAUNCH",
        [EXIT_REASON_VMPTRLD] = "VMPTRLD",
        [EXIT_REASON_VMPTRST] = "VMPTRST",
        [EXIT_REASON_VMREAD] = "VMREAD",
        [EXIT_REASON_VMRESUME] = "VMRESUME",
        [EXIT_REASON_VMWRITE] = "VMWRITE",
        [EXIT_REASON_VMXOFF] = "VMXOFF",
        [EXIT_REASON_VMXON] = "VMXON",
        [EXIT_REASON_CONTROL_REGISTER_ACCESS] = "control-register access",
        [EXIT_REASON_MOV_DR] = "MOV DR",
        [EXIT_REASON_IO_INSTRUCTION] = "I/O instruction",
        [EXIT_REASON_RDMSR] = "RDMSR",
        [EXIT_REASON_WRMSR] = "WRMSR",
        [EXIT_REASON_INVALID_GUEST_STATE] = "invalid guest state",
        [EXIT_REASON_MWAIT] = "MWAIT",
        [EXIT_REASON_MONITOR] = "MONITOR",
        [EXIT_REASON_PAUSE] = "PAUSE",
        [EXIT_REASON_EPT_VIOLATION] = "EPT violation",
        [EXIT_REASON_EPT_MISCONFIGURATION] = "EPT misconfiguration",
        [EXIT_REASON_INVEPT] = "INVEPT",
        [EXIT_REASON_INVVPID] = "INVVPID",
    };

    return basic_reason < EXIT_REASON_COUNT && names[basic_reason] ? names[basic_reason] : "another reason";
}
