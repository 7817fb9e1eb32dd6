// What executing one instruction comes to, for one logical processor: a pure function of the request, the VMX
// operation mode and what the current VMCS holds. Each stage below is one row of the manual's pseudocode order:
// invalid opcode, VM exit, privilege, VMfail, operation.
//
// Spec: SDM Vol. 3, "VMX Instruction Reference"; "VM Entries", "Basic VM-Entry Checks"; "Checks on VMX Controls and
// Host-State Area"; "VM-Entry Failures During or After Loading Guest State".

module vmx_decide
  import vmx_pkg::*;
(
    input request_t       req,
    input logic     [1:0] mode,
    input logic     [2:0] vmxon_pointer,
    input logic     [2:0] current,
    input logic           operand_revision_ok,  // of the region the pointer operand names
    input logic           launched,             // this and the following: of the current VMCS
    input logic           bad_controls,
    input logic           bad_host,
    input logic           bad_guest,
    input logic           bad_msr_list,

    output logic [2:0] outcome,
    output logic [7:0] number
);

  logic [3:0] op;
  logic [2:0] address, cpu_mode, component;
  assign op        = req.operation;
  assign address   = req.address;
  assign cpu_mode  = req.cpu_mode;
  assign component = req.component;
  logic cr4_vmxe, mov_ss_blocking;
  assign cr4_vmxe        = req.cr4_vmxe;
  assign mov_ss_blocking = req.mov_ss_blocking;

  logic is_vmx, outside, non_root, no_current, bad_pointer;
  assign is_vmx      = (op != OP_CPUID) && (op != OP_STORE_REVISION);
  assign outside     = mode == MODE_OUTSIDE;
  assign non_root    = mode == MODE_NON_ROOT;
  assign no_current  = current == NO_REGION;
  assign bad_pointer = address >= ADDRESS_MISALIGNED;

  // Stage 1: is the opcode defined here?
  logic no_vmx_instructions;  // virtual-8086 and compatibility mode
  logic undefined_opcode;
  assign no_vmx_instructions = (cpu_mode == CPU_VIRTUAL_8086) || (cpu_mode == CPU_COMPATIBILITY);
  always_comb begin
    case (op)
      OP_CPUID, OP_STORE_REVISION: undefined_opcode = 1'b0;
      OP_VMXON: undefined_opcode = no_vmx_instructions || (cpu_mode == CPU_REAL) || !cr4_vmxe;
      OP_VMCALL: undefined_opcode = outside || (!non_root && no_vmx_instructions);  // exits from any mode
      default: undefined_opcode = outside || no_vmx_instructions || (cpu_mode == CPU_REAL);
    endcase
  end

  // Stage 2: in non-root operation every VMX instruction exits, before its privilege check.
  logic [7:0] exit_reason;
  always_comb begin
    case (op)
      OP_VMXON:    exit_reason = EXIT_VMXON;
      OP_VMXOFF:   exit_reason = EXIT_VMXOFF;
      OP_VMCLEAR:  exit_reason = EXIT_VMCLEAR;
      OP_VMPTRLD:  exit_reason = EXIT_VMPTRLD;
      OP_VMPTRST:  exit_reason = EXIT_VMPTRST;
      OP_VMREAD:   exit_reason = EXIT_VMREAD;
      OP_VMWRITE:  exit_reason = EXIT_VMWRITE;
      OP_VMLAUNCH: exit_reason = EXIT_VMLAUNCH;
      OP_VMRESUME: exit_reason = EXIT_VMRESUME;
      OP_VMCALL:   exit_reason = EXIT_VMCALL;
      OP_INVEPT:   exit_reason = EXIT_INVEPT;
      OP_INVVPID:  exit_reason = EXIT_INVVPID;
      default:     exit_reason = EXIT_CPUID;
    endcase
  end

  // Stage 3: privilege, and for VMXON the conditions under which VMX operation may begin at all.
  logic may_not_begin, protection_fault;
  assign may_not_begin = !req.cr0_supported || !req.cr4_supported || !req.feature_lock || !req.feature_vmxon;
  assign protection_fault = is_vmx &&
      ((req.cpl != 2'd0) || ((op == OP_VMXON) && outside && may_not_begin));

  // Stage 4: VMfail; error 0 means none.
  logic [7:0] error;
  logic read_only, bad_invept, bad_invvpid;
  assign read_only = !req.vmwrite_any &&
      ((component == COMPONENT_INSTRUCTION_ERROR) || (component == COMPONENT_EXIT_REASON));
  assign bad_invept = (req.invalidation == 3'd0) || (req.invalidation > 3'd2) ||
      ((req.invalidation == 3'd1) && !req.eptp_valid);
  assign bad_invvpid = (req.invalidation > 3'd3) || req.reserved_set ||
      ((req.invalidation != 3'd2) && req.vpid_zero) || ((req.invalidation == 3'd0) && req.not_canonical);

  always_comb begin
    error = 8'd0;
    case (op)
      OP_VMXON: error = ERROR_VMXON_IN_VMX_ROOT_OPERATION;
      OP_VMCALL: error = ERROR_VMCALL_IN_VMX_ROOT_OPERATION;
      OP_VMCLEAR:
        if (bad_pointer) error = ERROR_VMCLEAR_WITH_INVALID_PHYSICAL_ADDRESS;
        else if (address == vmxon_pointer) error = ERROR_VMCLEAR_WITH_VMXON_POINTER;
      OP_VMPTRLD:
        if (bad_pointer) error = ERROR_VMPTRLD_WITH_INVALID_PHYSICAL_ADDRESS;
        else if (address == vmxon_pointer) error = ERROR_VMPTRLD_WITH_VMXON_POINTER;
        else if (!operand_revision_ok) error = ERROR_VMPTRLD_WITH_INCORRECT_VMCS_REVISION_IDENTIFIER;
      OP_VMREAD: if (component == COMPONENT_UNSUPPORTED) error = ERROR_VMREAD_OR_VMWRITE_OF_UNSUPPORTED_COMPONENT;
      OP_VMWRITE:
        if (component == COMPONENT_UNSUPPORTED) error = ERROR_VMREAD_OR_VMWRITE_OF_UNSUPPORTED_COMPONENT;
        else if (read_only) error = ERROR_VMWRITE_TO_READ_ONLY_COMPONENT;
      OP_VMLAUNCH, OP_VMRESUME:
        if (mov_ss_blocking) error = ERROR_VM_ENTRY_WITH_EVENTS_BLOCKED_BY_MOV_SS;
        else if ((op == OP_VMLAUNCH) && launched) error = ERROR_VMLAUNCH_WITH_NON_CLEAR_VMCS;
        else if ((op == OP_VMRESUME) && !launched) error = ERROR_VMRESUME_WITH_NON_LAUNCHED_VMCS;
        else if (bad_controls) error = ERROR_VM_ENTRY_WITH_INVALID_CONTROL_FIELDS;
        else if (bad_host) error = ERROR_VM_ENTRY_WITH_INVALID_HOST_STATE_FIELDS;
      OP_INVEPT: if (bad_invept) error = ERROR_INVALID_OPERAND_TO_INVEPT_OR_INVVPID;
      OP_INVVPID: if (bad_invvpid) error = ERROR_INVALID_OPERAND_TO_INVEPT_OR_INVVPID;
      default: ;
    endcase
  end

  logic needs_current, is_entry, begins, fails;
  assign is_entry = (op == OP_VMLAUNCH) || (op == OP_VMRESUME);
  assign needs_current = is_entry || (op == OP_VMREAD) || (op == OP_VMWRITE);
  assign begins = (op == OP_VMXON) && outside;  // VMXON fails without a number: no VMCS to hold one
  assign fails = begins ? (bad_pointer || !operand_revision_ok)
                        : is_vmx && ((error != 8'd0) || (needs_current && no_current));

  always_comb begin
    if (undefined_opcode) outcome = OUTCOME_INVALID_OPCODE;
    else if (non_root && (op != OP_STORE_REVISION)) outcome = OUTCOME_EXITED;
    else if (protection_fault) outcome = OUTCOME_GENERAL_PROTECTION;
    else if (fails && (begins || no_current)) outcome = OUTCOME_FAIL_INVALID;
    else if (fails) outcome = OUTCOME_FAIL_VALID;
    else if (is_entry && (bad_guest || bad_msr_list)) outcome = OUTCOME_ENTRY_FAILED;
    else if (is_entry) outcome = OUTCOME_ENTERED;
    else outcome = OUTCOME_RETIRED;
  end

  always_comb begin
    case (outcome)
      OUTCOME_EXITED: number = exit_reason;
      OUTCOME_FAIL_VALID: number = error;
      OUTCOME_ENTRY_FAILED:
        if (bad_guest) number = ENTRY_FAILURE | EXIT_ENTRY_FAILURE_GUEST_STATE;
        else number = ENTRY_FAILURE | EXIT_ENTRY_FAILURE_MSR_LOADING;
      default: number = 8'd0;
    endcase
  end

endmodule
