// VMX operation mode and launch state of one logical processor over REGIONS memory regions.
//
// One request per clock while `valid`; the response and the whole state after it appear with the next edge and hold.
// `vmx_decide` judges, this module remembers.
//
// Spec: SDM Vol. 3, "Introduction to VMX Operation"; "Format of the VMCS Region" and the launch state of a VMCS;
// "VMX Instruction Reference".

module vmx_mode_fsm
  import vmx_pkg::*;
(
    input  logic      clk,
    input  logic      rst_n,
    input  logic      valid,
    input  request_t  req,
    output response_t rsp
);

  logic [1:0] mode_q, mode_d;
  logic [2:0] vmxon_pointer_q, vmxon_pointer_d, current_q, current_d;
  logic [REGIONS-1:0] active_q, active_d, launched_q, launched_d, revision_ok_q, revision_ok_d;
  logic [REGIONS-1:0] bad_controls_q, bad_controls_d, bad_host_q, bad_host_d;
  logic [REGIONS-1:0] bad_guest_q, bad_guest_d, bad_msr_list_q, bad_msr_list_d;
  logic [REGIONS-1:0][7:0] plain_q, plain_d, error_q, error_d, reason_q, reason_d;

  // Members of the request under short names.
  logic [3:0] op;
  logic [2:0] address, component;
  logic [7:0] source;
  logic [5:0] flags_before;
  assign op           = req.operation;
  assign address      = req.address;
  assign component    = req.component;
  assign source       = req.value;
  assign flags_before = req.flags;

  logic [2:0] outcome;
  logic [7:0] number;
  logic [1:0] cur, operand;  // region indices, meaningful where the pointers are
  assign cur     = current_q[1:0];
  assign operand = address[1:0];

  vmx_decide decide (
      .req,
      .mode(mode_q),
      .vmxon_pointer(vmxon_pointer_q),
      .current(current_q),
      .operand_revision_ok(revision_ok_q[operand]),
      .launched(launched_q[cur]),
      .bad_controls(bad_controls_q[cur]),
      .bad_host(bad_host_q[cur]),
      .bad_guest(bad_guest_q[cur]),
      .bad_msr_list(bad_msr_list_q[cur]),
      .outcome,
      .number
  );

  // Mode, pointers, active VMCSs and launch state.
  always_comb begin
    mode_d          = mode_q;
    vmxon_pointer_d = vmxon_pointer_q;
    current_d       = current_q;
    active_d        = active_q;
    launched_d      = launched_q;
    case (outcome)
      OUTCOME_ENTERED: begin
        mode_d = MODE_NON_ROOT;
        if (op == OP_VMLAUNCH) launched_d[cur] = 1'b1;
      end
      OUTCOME_EXITED: mode_d = MODE_ROOT;
      OUTCOME_RETIRED:
      case (op)
        OP_VMXON: begin
          mode_d          = MODE_ROOT;
          vmxon_pointer_d = address;
          current_d       = NO_REGION;
        end
        OP_VMXOFF: begin
          mode_d          = MODE_OUTSIDE;
          active_d        = '0;  // with all their data kept, which the manual does not promise
          vmxon_pointer_d = NO_REGION;
          current_d       = NO_REGION;
        end
        OP_VMCLEAR: begin
          active_d[operand]   = 1'b0;
          launched_d[operand] = 1'b0;
          if (current_q == address) current_d = NO_REGION;
        end
        OP_VMPTRLD: begin
          active_d[operand] = 1'b1;
          current_d         = address;
        end
        default: ;
      endcase
      default: ;
    endcase
  end

  // What the regions hold.
  always_comb begin
    revision_ok_d  = revision_ok_q;
    bad_controls_d = bad_controls_q;
    bad_host_d     = bad_host_q;
    bad_guest_d    = bad_guest_q;
    bad_msr_list_d = bad_msr_list_q;
    plain_d        = plain_q;
    error_d        = error_q;
    reason_d       = reason_q;
    case (outcome)
      OUTCOME_FAIL_VALID: error_d[cur] = number;
      OUTCOME_EXITED, OUTCOME_ENTRY_FAILED: reason_d[cur] = number;
      OUTCOME_RETIRED:
      if (op == OP_STORE_REVISION) begin
        if (!address[2]) revision_ok_d[operand] = source[0];
      end else if (op == OP_VMWRITE) begin
        case (component)
          COMPONENT_PLAIN: plain_d[cur] = source;
          COMPONENT_CONTROLS: bad_controls_d[cur] = source[0];
          COMPONENT_HOST_STATE: bad_host_d[cur] = source[0];
          COMPONENT_GUEST_STATE: bad_guest_d[cur] = source[0];
          COMPONENT_MSR_LIST: bad_msr_list_d[cur] = source[0];
          COMPONENT_INSTRUCTION_ERROR: error_d[cur] = source;
          COMPONENT_EXIT_REASON: reason_d[cur] = source;
          default: ;
        endcase
      end
      default: ;
    endcase
  end

  // What reaches the destination operand.
  logic [7:0] value;
  always_comb begin
    value = 8'd0;
    if ((outcome == OUTCOME_RETIRED) && (op == OP_VMPTRST))
      value = (current_q == NO_REGION) ? 8'hFF : {5'd0, current_q};
    else if ((outcome == OUTCOME_RETIRED) && (op == OP_VMREAD)) begin
      case (component)
        COMPONENT_PLAIN: value = plain_q[cur];
        COMPONENT_CONTROLS: value = {7'd0, bad_controls_q[cur]};
        COMPONENT_HOST_STATE: value = {7'd0, bad_host_q[cur]};
        COMPONENT_GUEST_STATE: value = {7'd0, bad_guest_q[cur]};
        COMPONENT_MSR_LIST: value = {7'd0, bad_msr_list_q[cur]};
        COMPONENT_INSTRUCTION_ERROR: value = error_q[cur];
        default: value = reason_q[cur];
      endcase
    end
  end

  // VMsucceed clears all six flags, the VMfails set one; entries and exits load RFLAGS from a VMCS that has them 0.
  logic [5:0] flags;
  always_comb begin
    case (outcome)
      OUTCOME_INVALID_OPCODE, OUTCOME_GENERAL_PROTECTION: flags = flags_before;
      OUTCOME_FAIL_INVALID: flags = FLAG_CF;
      OUTCOME_FAIL_VALID: flags = FLAG_ZF;
      OUTCOME_RETIRED:
      flags = ((op == OP_CPUID) || (op == OP_STORE_REVISION)) ? flags_before : 6'd0;
      default: flags = 6'd0;
    endcase
  end

  always_ff @(posedge clk or negedge rst_n) begin
    if (!rst_n) begin
      mode_q          <= MODE_OUTSIDE;
      vmxon_pointer_q <= NO_REGION;
      current_q       <= NO_REGION;
      active_q        <= '0;
      launched_q      <= '0;
      revision_ok_q   <= '1;
      bad_controls_q  <= '0;
      bad_host_q      <= '0;
      bad_guest_q     <= '0;
      bad_msr_list_q  <= '0;
      plain_q         <= '0;
      error_q         <= '0;
      reason_q        <= '0;
    end else if (valid) begin
      mode_q          <= mode_d;
      vmxon_pointer_q <= vmxon_pointer_d;
      current_q       <= current_d;
      active_q        <= active_d;
      launched_q      <= launched_d;
      revision_ok_q   <= revision_ok_d;
      bad_controls_q  <= bad_controls_d;
      bad_host_q      <= bad_host_d;
      bad_guest_q     <= bad_guest_d;
      bad_msr_list_q  <= bad_msr_list_d;
      plain_q         <= plain_d;
      error_q         <= error_d;
      reason_q        <= reason_d;
    end
  end

  logic [2:0] outcome_q;
  logic [7:0] number_q, value_q;
  logic [5:0] flags_q;
  always_ff @(posedge clk or negedge rst_n) begin
    if (!rst_n) {outcome_q, number_q, value_q, flags_q} <= '0;
    else if (valid) {outcome_q, number_q, value_q, flags_q} <= {outcome, number, value, flags};
  end

  always_comb begin
    rsp.outcome                 = outcome_q;
    rsp.number                  = number_q;
    rsp.flags                   = flags_q;
    rsp.value                   = value_q;
    rsp.pad                     = '0;
    rsp.state.mode              = mode_q;
    rsp.state.vmxon_pointer     = vmxon_pointer_q;
    rsp.state.current           = current_q;
    rsp.state.active            = active_q;
    rsp.state.launched          = launched_q;
    rsp.state.revision_ok       = revision_ok_q;
    rsp.state.bad_controls      = bad_controls_q;
    rsp.state.bad_host          = bad_host_q;
    rsp.state.bad_guest         = bad_guest_q;
    rsp.state.bad_msr_list      = bad_msr_list_q;
    rsp.state.plain             = plain_q;
    rsp.state.instruction_error = error_q;
    rsp.state.exit_reason       = reason_q;
  end

endmodule
