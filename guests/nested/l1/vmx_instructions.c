/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The VMX instructions, executed for L2. Each handler follows the operation section of its
 * instruction: faults first, then VMfail, then the effect.
 *
 * Spec: SDM volume 3, "VMX Instruction Reference" and "Basic VM-Exit Information".
 */
#include "console.h"
#include "l1.h"

/* VM-instruction errors. Spec: SDM volume 3, "VM Instruction Error Numbers". */
enum {
    ERROR_VMCLEAR_ADDRESS = 2,
    ERROR_VMCLEAR_VMXON_POINTER = 3,
    ERROR_VMLAUNCH_NOT_CLEAR = 4,
    ERROR_VMRESUME_NOT_LAUNCHED = 5,
    ERROR_VMPTRLD_ADDRESS = 9,
    ERROR_VMPTRLD_VMXON_POINTER = 10,
    ERROR_VMPTRLD_REVISION = 11,
    ERROR_UNSUPPORTED_FIELD = 12,
    ERROR_VMWRITE_READ_ONLY = 13,
    ERROR_VMXON_IN_VMX_ROOT = 15,
    ERROR_EVENTS_BLOCKED_BY_MOV_SS = 26,
    ERROR_INVALIDATION_OPERAND = 28,
};

enum { BLOCKING_BY_MOV_SS = 1u << 1, RIGHTS_CODE64_BIT = 1u << 13 };
enum { FIELD_TYPE_READ_ONLY = 1 };

/* How a handler ends. A positive value is VMfail with that error number. */
enum { SUCCEED = 0, FAIL_INVALID = -1, FAULTED = -2, ENTERED = -3 };

/* --- ends ---------------------------------------------------------------------------------- */

static int fault(enum vector vector)
{
    if (vector == VECTOR_UD)
        inject_exception(vector);
    else
        inject_exception_with_code(vector, 0);
    return FAULTED;
}

static void set_flags_and_skip(uint64_t flag)
{
    const uint64_t arithmetic = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF;

    vmwrite(GUEST_RFLAGS, (vmread(GUEST_RFLAGS) & ~arithmetic) | flag);
    vmcs_skip_instruction();
}

static void complete(int result)
{
    if (result == FAULTED || result == ENTERED)
        return;
    if (result == SUCCEED) {
        set_flags_and_skip(0);
    } else if (result == FAIL_INVALID || virtual_vmx.current_vmcs == NO_VMCS) {
        set_flags_and_skip(RFLAGS_CF);
    } else {
        vmcs12_write(VM_INSTRUCTION_ERROR, (uint32_t)result);
        set_flags_and_skip(RFLAGS_ZF);
    }
}

void vm_entry_refused(uint32_t error)
{
    complete((int)error);
}

/* --- operands ------------------------------------------------------------------------------ */

/* VM-exit instruction information of the VMX instructions that have operands. */
struct operands {
    bool is_register;
    enum gpr register1, register2;
    uint64_t linear;
};

static struct operands decode_operands(void)
{
    uint32_t information = (uint32_t)vmread(EXIT_INSTRUCTION_INFORMATION);
    unsigned scaling = information & 3, address_size = information >> 7 & 7, segment = information >> 15 & 7;
    bool has_index = !(information >> 22 & 1), has_base = !(information >> 27 & 1);
    uint64_t offset = vmread(EXIT_QUALIFICATION);       /* the displacement */

    if (has_base)
        offset += guest_register(gpr, information >> 23 & 15);
    if (has_index)
        offset += guest_register(gpr, information >> 18 & 15) << scaling;
    if (address_size == 1)
        offset &= 0xFFFFFFFF;
    if (segment == SEGMENT_FS || segment == SEGMENT_GS)
        offset += vmread(GUEST_BASE(segment));
    return (struct operands){
        .is_register = information >> 10 & 1,
        .register1 = information >> 3 & 15,
        .register2 = information >> 28 & 15,
        .linear = offset,
    };
}

static bool read_memory_operand(const struct operands *operands, void *value, uint64_t size)
{
    if (!is_canonical(operands->linear))
        return fault(VECTOR_GP), false;
    return l2_read_linear(operands->linear, value, size);
}

static bool write_memory_operand(const struct operands *operands, uint64_t value)
{
    if (!is_canonical(operands->linear))
        return fault(VECTOR_GP), false;
    return l2_write_linear(operands->linear, &value, sizeof value);
}

static bool read_pointer_operand(uint64_t *pointer)
{
    struct operands operands = decode_operands();

    return read_memory_operand(&operands, pointer, sizeof *pointer);
}

/* --- VMX operation ------------------------------------------------------------------------- */

static uint64_t privilege_level(void)
{
    return vmread(GUEST_ACCESS_RIGHTS(SEGMENT_SS)) >> 5 & 3;
}

static int emulate_vmxon(void)
{
    const uint64_t needed = FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMX_OUTSIDE_SMX;
    uint64_t pointer;

    if (!(vmread(CR4_READ_SHADOW) & CR4_VMXE))
        return fault(VECTOR_UD);
    if (privilege_level() > 0)
        return fault(VECTOR_GP);
    if (virtual_vmx.on)
        return ERROR_VMXON_IN_VMX_ROOT;
    if (!(vmread(CR0_READ_SHADOW) & CR0_NE) || (virtual_vmx.feature_control & needed) != needed)
        return fault(VECTOR_GP);
    if (!read_pointer_operand(&pointer))
        return FAULTED;
    if (!l2_has_page(pointer) || *(uint32_t *)l2_memory(pointer, 4) != VMCS12_REVISION)
        return FAIL_INVALID;

    virtual_vmx.on = true;
    virtual_vmx.vmxon_pointer = pointer;
    virtual_vmx.current_vmcs = NO_VMCS;
    say("L2 enters VMX operation\n");
    return SUCCEED;
}

static int emulate_vmxoff(void)
{
    virtual_vmx.on = false;
    virtual_vmx.current_vmcs = NO_VMCS;
    say("L2 leaves VMX operation\n");
    return SUCCEED;
}

/* --- the current VMCS ---------------------------------------------------------------------- */

static int emulate_vmclear(void)
{
    uint64_t pointer;

    if (!read_pointer_operand(&pointer))
        return FAULTED;
    if (!l2_has_page(pointer))
        return ERROR_VMCLEAR_ADDRESS;
    if (pointer == virtual_vmx.vmxon_pointer)
        return ERROR_VMCLEAR_VMXON_POINTER;
    vmcs_region_set_launched(pointer, false);
    if (pointer == virtual_vmx.current_vmcs)
        virtual_vmx.current_vmcs = NO_VMCS;
    return SUCCEED;
}

static int emulate_vmptrld(void)
{
    uint64_t pointer;

    if (!read_pointer_operand(&pointer))
        return FAULTED;
    if (!l2_has_page(pointer))
        return ERROR_VMPTRLD_ADDRESS;
    if (pointer == virtual_vmx.vmxon_pointer)
        return ERROR_VMPTRLD_VMXON_POINTER;
    if (*(uint32_t *)l2_memory(pointer, 4) != VMCS12_REVISION)
        return ERROR_VMPTRLD_REVISION;
    virtual_vmx.current_vmcs = pointer;
    return SUCCEED;
}

static int emulate_vmptrst(void)
{
    struct operands operands = decode_operands();

    return write_memory_operand(&operands, virtual_vmx.current_vmcs) ? SUCCEED : FAULTED;
}

static int emulate_vmread(void)
{
    struct operands operands = decode_operands();
    uint64_t field = guest_register(gpr, operands.register2);

    if (virtual_vmx.current_vmcs == NO_VMCS)
        return FAIL_INVALID;
    if (!vmcs12_has_field(field))
        return ERROR_UNSUPPORTED_FIELD;
    if (!operands.is_register)
        return write_memory_operand(&operands, vmcs12_read(field)) ? SUCCEED : FAULTED;
    set_guest_register(gpr, operands.register1, vmcs12_read(field));
    return SUCCEED;
}

static int emulate_vmwrite(void)
{
    struct operands operands = decode_operands();
    uint64_t field = guest_register(gpr, operands.register2);
    uint64_t value = guest_register(gpr, operands.register1);

    if (virtual_vmx.current_vmcs == NO_VMCS)
        return FAIL_INVALID;
    if (!operands.is_register && !read_memory_operand(&operands, &value, sizeof value))
        return FAULTED;
    if (!vmcs12_has_field(field))
        return ERROR_UNSUPPORTED_FIELD;
    if ((field >> 10 & 3) == FIELD_TYPE_READ_ONLY)
        return ERROR_VMWRITE_READ_ONLY;
    vmcs12_write(field, value);
    return SUCCEED;
}

/* --- invalidation -------------------------------------------------------------------------- */

static bool read_invalidation(uint64_t *type, struct invalidation_descriptor *descriptor)
{
    struct operands operands = decode_operands();

    *type = guest_register(gpr, operands.register2);
    return read_memory_operand(&operands, descriptor, sizeof *descriptor);
}

static int emulate_invept(void)
{
    struct invalidation_descriptor descriptor;
    uint64_t type;

    if (!read_invalidation(&type, &descriptor))
        return FAULTED;
    if (type != INVALIDATE_SINGLE_CONTEXT && type != INVALIDATE_ALL_CONTEXTS)
        return ERROR_INVALIDATION_OPERAND;
    ept02_empty();                      /* one shadow for every EPT 12: empty it for any */
    return SUCCEED;
}

static int emulate_invvpid(void)
{
    struct invalidation_descriptor descriptor;
    uint64_t type;

    if (!read_invalidation(&type, &descriptor))
        return FAULTED;
    if (type != INVALIDATE_SINGLE_CONTEXT && type != INVALIDATE_ALL_CONTEXTS)
        return ERROR_INVALIDATION_OPERAND;
    if (descriptor.context >> 16 || (type == INVALIDATE_SINGLE_CONTEXT && descriptor.context == 0))
        return ERROR_INVALIDATION_OPERAND;
    vmx_require("INVVPID", invvpid(INVALIDATE_SINGLE_CONTEXT, VPID_L3));
    return SUCCEED;
}

/* --- VM entry ------------------------------------------------------------------------------ */

static int emulate_vm_entry(bool resume)
{
    uint32_t error;

    if (virtual_vmx.current_vmcs == NO_VMCS)
        return FAIL_INVALID;
    if (vmread(GUEST_INTERRUPTIBILITY_STATE) & BLOCKING_BY_MOV_SS)
        return ERROR_EVENTS_BLOCKED_BY_MOV_SS;
    if (!resume && vmcs12_is_launched())
        return ERROR_VMLAUNCH_NOT_CLEAR;
    if (resume && !vmcs12_is_launched())
        return ERROR_VMRESUME_NOT_LAUNCHED;
    error = nested_entry_check();
    if (error)
        return (int)error;
    nested_entry();                     /* hardware checks the guest state when VMCS 02 is entered */
    return ENTERED;
}

static int emulate_vmlaunch(void)
{
    return emulate_vm_entry(false);
}

static int emulate_vmresume(void)
{
    return emulate_vm_entry(true);
}

/* --- dispatch ------------------------------------------------------------------------------ */

static int (*const handlers[EXIT_REASON_COUNT])(void) = {
    [EXIT_REASON_VMCLEAR] = emulate_vmclear,
    [EXIT_REASON_VMLAUNCH] = emulate_vmlaunch,
    [EXIT_REASON_VMPTRLD] = emulate_vmptrld,
    [EXIT_REASON_VMPTRST] = emulate_vmptrst,
    [EXIT_REASON_VMREAD] = emulate_vmread,
    [EXIT_REASON_VMRESUME] = emulate_vmresume,
    [EXIT_REASON_VMWRITE] = emulate_vmwrite,
    [EXIT_REASON_VMXOFF] = emulate_vmxoff,
    [EXIT_REASON_VMXON] = emulate_vmxon,
    [EXIT_REASON_INVEPT] = emulate_invept,
    [EXIT_REASON_INVVPID] = emulate_invvpid,
};

bool is_vmx_instruction(uint32_t reason)
{
    return reason < EXIT_REASON_COUNT && handlers[reason];
}

void handle_vmx_instruction(uint32_t reason)
{
    if (!(vmread(GUEST_ACCESS_RIGHTS(SEGMENT_CS)) & RIGHTS_CODE64_BIT))
        fail("VMX instructions are emulated in 64-bit mode only\n");
    if (reason != EXIT_REASON_VMXON && !virtual_vmx.on)
        complete(fault(VECTOR_UD));
    else if (reason != EXIT_REASON_VMXON && privilege_level() > 0)
        complete(fault(VECTOR_GP));
    else
        complete(handlers[reason]());
}
