// Safety properties of the block "VMX operation mode and launch state", written from the manual, not from the RTL.
//
// `was` is what the block showed before the last edge, `now` what it shows after it, `did` the request it took at
// that edge. Requests are free but for the operation code. One property per label; per-region ones are generated.
//
// Spec: SDM Vol. 3, "Introduction to VMX Operation"; "Virtual Machine Control Structures", "Overview"; "VMX Instruction
// Reference", "VMX Instructions"; "VM Entries", "Basic VM-Entry Checks".

module vmx_mode_fsm_fv
  import vmx_pkg::*;
(
    input logic     clk,
    input logic     valid,
    input request_t req
);

  // Reset in the first cycle, never after.
  logic rst_n = 1'b0;
  logic live  = 1'b0;  // an edge out of reset has been seen
  always_ff @(posedge clk) begin
    rst_n <= 1'b1;
    live  <= rst_n;
  end

  response_t now, was;
  request_t did;
  logic did_valid;
  vmx_mode_fsm dut (
      .clk,
      .rst_n,
      .valid,
      .req,
      .rsp(now)
  );
  always_ff @(posedge clk) begin
    was    <= now;
    did       <= req;
    did_valid <= valid;
  end

  assume_operation :
  assume property (@(posedge clk) req.operation <= OP_STORE_REVISION);

  logic stepped;
  assign stepped = live && did_valid;

  // Vocabulary
  logic is_vmx, is_entry, was_outside, was_root, was_non_root, had_current, faulted, vmfail, no_mode, retired;
  logic [1:0] cur;
  assign is_vmx       = did.operation <= OP_INVVPID;
  assign is_entry     = (did.operation == OP_VMLAUNCH) || (did.operation == OP_VMRESUME);
  assign was_outside  = was.state.mode == MODE_OUTSIDE;
  assign was_root     = was.state.mode == MODE_ROOT;
  assign was_non_root = was.state.mode == MODE_NON_ROOT;
  assign had_current  = was.state.current != NO_REGION;
  assign faulted      = (now.outcome == OUTCOME_INVALID_OPCODE) || (now.outcome == OUTCOME_GENERAL_PROTECTION);
  assign vmfail       = (now.outcome == OUTCOME_FAIL_INVALID) || (now.outcome == OUTCOME_FAIL_VALID);
  assign retired      = now.outcome == OUTCOME_RETIRED;
  assign no_mode      = (did.cpu_mode == CPU_REAL) || (did.cpu_mode == CPU_VIRTUAL_8086) ||
      (did.cpu_mode == CPU_COMPATIBILITY);
  assign cur          = was.state.current[1:0];

  // State that is always true

  mode_is_defined : assert property (@(posedge clk) !rst_n || now.state.mode != 2'd3);
  vmxon_pointer_iff_in_vmx_operation :
  assert property (@(posedge clk) !rst_n || ((now.state.mode == MODE_OUTSIDE) == (now.state.vmxon_pointer == NO_REGION)));
  pointers_name_regions :
  assert property (@(posedge clk) !rst_n || ((now.state.vmxon_pointer < 3'd4 || now.state.vmxon_pointer == NO_REGION) &&
                                             (now.state.current < 3'd4 || now.state.current == NO_REGION)));
  current_only_in_vmx_operation :
  assert property (@(posedge clk) !rst_n || now.state.mode != MODE_OUTSIDE || now.state.current == NO_REGION);
  current_is_active :
  assert property (@(posedge clk) !rst_n || now.state.current == NO_REGION ||
                   now.state.active[now.state.current[1:0]]);
  current_is_not_the_vmxon_region :
  assert property (@(posedge clk) !rst_n || now.state.current == NO_REGION ||
                   now.state.current != now.state.vmxon_pointer);
  vmxon_region_is_not_active :
  assert property (@(posedge clk) !rst_n || now.state.mode == MODE_OUTSIDE ||
                   !now.state.active[now.state.vmxon_pointer[1:0]]);
  nothing_active_outside :
  assert property (@(posedge clk) !rst_n || now.state.mode != MODE_OUTSIDE || now.state.active == 4'd0);
  guest_runs_a_launched_current_vmcs :
  assert property (@(posedge clk) !rst_n || now.state.mode != MODE_NON_ROOT ||
                   (now.state.current != NO_REGION && now.state.launched[now.state.current[1:0]]));

  // Transitions of the mode

  non_root_only_by_successful_entry :
  assert property (@(posedge clk) !stepped || now.state.mode != MODE_NON_ROOT || was_non_root ||
                   (was_root && is_entry && now.outcome == OUTCOME_ENTERED));
  entry_means_non_root :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_ENTERED || now.state.mode == MODE_NON_ROOT);
  entry_passed_every_check :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_ENTERED ||
                   (was_root && is_entry && had_current && !no_mode && did.cpl == 2'd0 && !did.mov_ss_blocking &&
                    !was.state.bad_controls[cur] && !was.state.bad_host[cur] &&
                    !was.state.bad_guest[cur] && !was.state.bad_msr_list[cur]));
  launch_needs_clear :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_ENTERED || did.operation != OP_VMLAUNCH ||
                   !was.state.launched[cur]);
  resume_needs_launched :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_ENTERED || did.operation != OP_VMRESUME ||
                   was.state.launched[cur]);
  non_root_left_only_by_exit :
  assert property (@(posedge clk) !stepped || !was_non_root || now.state.mode == MODE_NON_ROOT ||
                   (now.state.mode == MODE_ROOT && now.outcome == OUTCOME_EXITED));
  exit_only_from_non_root :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_EXITED ||
                   (was_non_root && now.state.mode == MODE_ROOT));
  vmx_operation_begins_only_by_vmxon :
  assert property (@(posedge clk) !stepped || !was_outside || now.state.mode == MODE_OUTSIDE ||
                   (now.state.mode == MODE_ROOT && did.operation == OP_VMXON && retired && !no_mode &&
                    did.cpl == 2'd0 && did.cr4_vmxe && did.cr0_supported && did.cr4_supported && did.feature_lock &&
                    did.feature_vmxon && did.address < 3'd4 && was.state.revision_ok[did.address[1:0]]));
  vmx_operation_ends_only_by_vmxoff :
  assert property (@(posedge clk) !stepped || was_outside || now.state.mode != MODE_OUTSIDE ||
                   (was_root && did.operation == OP_VMXOFF && retired && did.cpl == 2'd0 && !no_mode));
  vmxon_starts_without_current :
  assert property (@(posedge clk) !stepped || !was_outside || now.state.mode != MODE_ROOT ||
                   (now.state.current == NO_REGION && now.state.vmxon_pointer == did.address));

  // Instructions that do not complete change nothing

  fault_changes_nothing :
  assert property (@(posedge clk) !stepped || !faulted || (now.state == was.state && now.flags == did.flags));
  fail_invalid_changes_only_flags :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_FAIL_INVALID ||
                   (now.state == was.state && now.flags == 6'b000001));
  fail_valid_sets_zf :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_FAIL_VALID || now.flags == 6'b001000);
  succeed_clears_flags :
  assert property (@(posedge clk) !stepped || !retired || now.flags == (is_vmx ? 6'd0 : did.flags));
  idle_changes_nothing : assert property (@(posedge clk) !live || did_valid || now == was);

  // The state with the one member replaced that VMfailValid, or a VM exit, may write.
  state_t with_error, with_reason;
  always_comb begin
    with_error                              = was.state;
    with_error.instruction_error[cur*8+:8]  = now.number;
    with_reason                             = was.state;
    with_reason.exit_reason[cur*8+:8]       = now.number;
    if (now.outcome == OUTCOME_EXITED) with_reason.mode = MODE_ROOT;
  end
  fail_valid_changes_only_the_error :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_FAIL_VALID || now.state == with_error);
  exit_changes_only_mode_and_reason :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_EXITED || now.state == with_reason);
  entry_failure_stays_in_root :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_ENTRY_FAILED ||
                   (was_root && is_entry && now.state == with_reason));

  // Which failure, with which number

  fail_invalid_iff_no_current :
  assert property (@(posedge clk) !stepped || !vmfail || (now.outcome == OUTCOME_FAIL_VALID) == had_current);
  vmfail_only_in_root_or_vmxon :
  assert property (@(posedge clk) !stepped || !vmfail || was_root || (was_outside && did.operation == OP_VMXON));
  outside_every_vmx_instruction_is_undefined :
  assert property (@(posedge clk) !stepped || !was_outside || !is_vmx || did.operation == OP_VMXON ||
                   now.outcome == OUTCOME_INVALID_OPCODE);
  guest_vmx_instructions_exit_or_are_undefined :
  assert property (@(posedge clk) !stepped || !was_non_root || did.operation == OP_STORE_REVISION ||
                   now.outcome == OUTCOME_EXITED ||
                   (now.outcome == OUTCOME_INVALID_OPCODE && is_vmx && did.operation != OP_VMCALL));
  guest_exits_before_privilege_check :
  assert property (@(posedge clk) !stepped || !was_non_root || now.outcome != OUTCOME_GENERAL_PROTECTION);
  no_vmx_instruction_in_unsuitable_mode :
  assert property (@(posedge clk) !stepped || !is_vmx || did.operation == OP_VMCALL || !no_mode ||
                   now.outcome == OUTCOME_INVALID_OPCODE);
  privilege :
  assert property (@(posedge clk) !stepped || !is_vmx || was_non_root || did.cpl == 2'd0 || faulted);
  mov_ss_blocks_entry_first :
  assert property (@(posedge clk) !stepped || !was_root || !is_entry || faulted || !had_current ||
                   (now.outcome == OUTCOME_FAIL_VALID && now.number == 8'd26) == did.mov_ss_blocking);
  launch_state_before_other_checks :
  assert property (@(posedge clk) !stepped || !was_root || !is_entry || faulted || !had_current ||
                   did.mov_ss_blocking || (did.operation == OP_VMLAUNCH) == !was.state.launched[cur] ||
                   (now.outcome == OUTCOME_FAIL_VALID &&
                    now.number == ((did.operation == OP_VMLAUNCH) ? 8'd4 : 8'd5)));

  // Error numbers an instruction can leave, as typed from the manual.
  logic number_belongs;
  always_comb begin
    case (did.operation)
      OP_VMXON: number_belongs = now.number == 8'd15;
      OP_VMCLEAR: number_belongs = (now.number == 8'd2) || (now.number == 8'd3);
      OP_VMPTRLD: number_belongs = (now.number == 8'd9) || (now.number == 8'd10) || (now.number == 8'd11);
      OP_VMREAD: number_belongs = now.number == 8'd12;
      OP_VMWRITE: number_belongs = (now.number == 8'd12) || (now.number == 8'd13);
      OP_VMLAUNCH:
      number_belongs = (now.number == 8'd4) || (now.number == 8'd7) || (now.number == 8'd8) || (now.number == 8'd26);
      OP_VMRESUME:
      number_belongs = (now.number == 8'd5) || (now.number == 8'd7) || (now.number == 8'd8) || (now.number == 8'd26);
      OP_VMCALL: number_belongs = now.number == 8'd1;
      OP_INVEPT, OP_INVVPID: number_belongs = now.number == 8'd28;
      default: number_belongs = 1'b0;
    endcase
  end
  error_number_belongs_to_instruction :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_FAIL_VALID || number_belongs);
  entry_failure_reasons :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_ENTRY_FAILED ||
                   now.number == (was.state.bad_guest[cur] ? 8'd161 : 8'd162));

  // Exit reasons, as typed from the manual.
  logic [7:0] reason_of;
  always_comb begin
    case (did.operation)
      OP_VMCALL: reason_of = 8'd18;
      OP_VMCLEAR: reason_of = 8'd19;
      OP_VMLAUNCH: reason_of = 8'd20;
      OP_VMPTRLD: reason_of = 8'd21;
      OP_VMPTRST: reason_of = 8'd22;
      OP_VMREAD: reason_of = 8'd23;
      OP_VMRESUME: reason_of = 8'd24;
      OP_VMWRITE: reason_of = 8'd25;
      OP_VMXOFF: reason_of = 8'd26;
      OP_VMXON: reason_of = 8'd27;
      OP_INVEPT: reason_of = 8'd50;
      OP_INVVPID: reason_of = 8'd53;
      default: reason_of = 8'd10;
    endcase
  end
  exit_reason_belongs_to_instruction :
  assert property (@(posedge clk) !stepped || now.outcome != OUTCOME_EXITED || now.number == reason_of);

  root_protection_fault_is_privilege :
  assert property (@(posedge clk) !stepped || !was_root || now.outcome != OUTCOME_GENERAL_PROTECTION ||
                   did.cpl != 2'd0);
  vmxon_protection_fault_has_a_cause :
  assert property (@(posedge clk) !stepped || !was_outside || now.outcome != OUTCOME_GENERAL_PROTECTION ||
                   (did.operation == OP_VMXON &&
                    (did.cpl != 2'd0 || !did.cr0_supported || !did.cr4_supported || !did.feature_lock ||
                     !did.feature_vmxon)));
  root_undefined_only_by_mode :
  assert property (@(posedge clk) !stepped || !was_root || now.outcome != OUTCOME_INVALID_OPCODE || no_mode ||
                   (did.operation == OP_VMXON && !did.cr4_vmxe));
  no_current_no_access :
  assert property (@(posedge clk) !stepped || !was_root || had_current || faulted ||
                   !(is_entry || did.operation == OP_VMREAD || did.operation == OP_VMWRITE) ||
                   now.outcome == OUTCOME_FAIL_INVALID);
  unsupported_component_fails :
  assert property (@(posedge clk) !stepped || !retired || did.component != COMPONENT_UNSUPPORTED ||
                   !(did.operation == OP_VMREAD || did.operation == OP_VMWRITE));
  read_only_component_needs_the_capability :
  assert property (@(posedge clk) !stepped || !retired || did.operation != OP_VMWRITE || did.vmwrite_any ||
                   (did.component != COMPONENT_INSTRUCTION_ERROR && did.component != COMPONENT_EXIT_REASON));
  invept_succeeds_iff_operand_good :
  assert property (@(posedge clk) !stepped || !was_root || did.operation != OP_INVEPT || faulted ||
                   retired == (did.invalidation == 3'd2 || (did.invalidation == 3'd1 && did.eptp_valid)));
  logic good_invvpid;
  always_comb begin
    case (did.invalidation)
      3'd0: good_invvpid = !did.reserved_set && !did.vpid_zero && !did.not_canonical;
      3'd1, 3'd3: good_invvpid = !did.reserved_set && !did.vpid_zero;
      3'd2: good_invvpid = !did.reserved_set;
      default: good_invvpid = 1'b0;
    endcase
  end
  invvpid_succeeds_iff_operand_good :
  assert property (@(posedge clk) !stepped || !was_root || did.operation != OP_INVVPID || faulted ||
                   retired == good_invvpid);

  // Who may change what

  vmxon_pointer_changes :
  assert property (@(posedge clk) !stepped || now.state.vmxon_pointer == was.state.vmxon_pointer ||
                   (retired && (did.operation == OP_VMXON || did.operation == OP_VMXOFF)));
  current_changes :
  assert property (@(posedge clk) !stepped || now.state.current == was.state.current ||
                   (retired && (did.operation == OP_VMPTRLD || did.operation == OP_VMXON ||
                                did.operation == OP_VMXOFF ||
                                (did.operation == OP_VMCLEAR && did.address == was.state.current))));
  vmptrld_makes_current :
  assert property (@(posedge clk) !stepped || !retired || did.operation != OP_VMPTRLD ||
                   (now.state.current == did.address && was.state.revision_ok[did.address[1:0]] &&
                    did.address != was.state.vmxon_pointer));
  vmclear_invalidates_current :
  assert property (@(posedge clk) !stepped || !retired || did.operation != OP_VMCLEAR ||
                   (now.state.current != did.address && did.address != was.state.vmxon_pointer &&
                    did.address < 3'd4 && !now.state.launched[did.address[1:0]] &&
                    !now.state.active[did.address[1:0]]));
  vmptrst_returns_current :
  assert property (@(posedge clk) !stepped || !retired || did.operation != OP_VMPTRST ||
                   (now.value == (had_current ? {5'd0, was.state.current} : 8'hFF) && now.state == was.state));
  vmread_changes_nothing :
  assert property (@(posedge clk) !stepped || !retired || did.operation != OP_VMREAD || now.state == was.state);

  generate
    for (genvar r = 0; r < REGIONS; r = r + 1) begin : region
      logic here, wrote;
      assign here  = was.state.current == r;
      assign wrote = retired && (did.operation == OP_VMWRITE) && here;

      launched_only_by_successful_vmlaunch :
      assert property (@(posedge clk) !stepped || was.state.launched[r] || !now.state.launched[r] ||
                       (here && did.operation == OP_VMLAUNCH && now.outcome == OUTCOME_ENTERED));
      clear_only_by_vmclear :
      assert property (@(posedge clk) !stepped || !was.state.launched[r] || now.state.launched[r] ||
                       (retired && did.operation == OP_VMCLEAR && did.address == r));
      active_only_by_vmptrld :
      assert property (@(posedge clk) !stepped || was.state.active[r] || !now.state.active[r] ||
                       (retired && did.operation == OP_VMPTRLD && did.address == r));
      inactive_only_by_vmclear_or_vmxoff :
      assert property (@(posedge clk) !stepped || !was.state.active[r] || now.state.active[r] ||
                       (retired && ((did.operation == OP_VMCLEAR && did.address == r) ||
                                    did.operation == OP_VMXOFF)));
      plain_only_by_vmwrite :
      assert property (@(posedge clk) !stepped || now.state.plain[r*8+:8] ==
                       ((wrote && did.component == COMPONENT_PLAIN) ? did.value : was.state.plain[r*8+:8]));
      checked_fields_only_by_vmwrite :
      assert property (@(posedge clk) !stepped ||
                       {now.state.bad_controls[r], now.state.bad_host[r], now.state.bad_guest[r],
                        now.state.bad_msr_list[r]} ==
                       {(wrote && did.component == COMPONENT_CONTROLS) ? did.value[0] : was.state.bad_controls[r],
                        (wrote && did.component == COMPONENT_HOST_STATE) ? did.value[0] : was.state.bad_host[r],
                        (wrote && did.component == COMPONENT_GUEST_STATE) ? did.value[0] : was.state.bad_guest[r],
                        (wrote && did.component == COMPONENT_MSR_LIST) ? did.value[0] : was.state.bad_msr_list[r]});
      vmread_delivers :
      assert property (@(posedge clk) !stepped || !retired || did.operation != OP_VMREAD || !here ||
                       now.value == ((did.component == COMPONENT_PLAIN) ? was.state.plain[r*8+:8] :
                                     (did.component == COMPONENT_CONTROLS) ? {7'd0, was.state.bad_controls[r]} :
                                     (did.component == COMPONENT_HOST_STATE) ? {7'd0, was.state.bad_host[r]} :
                                     (did.component == COMPONENT_GUEST_STATE) ? {7'd0, was.state.bad_guest[r]} :
                                     (did.component == COMPONENT_MSR_LIST) ? {7'd0, was.state.bad_msr_list[r]} :
                                     (did.component == COMPONENT_INSTRUCTION_ERROR) ?
                                     was.state.instruction_error[r*8+:8] : was.state.exit_reason[r*8+:8]));
      error_only_by_fail_valid :
      assert property (@(posedge clk) !stepped ||
                       now.state.instruction_error[r*8+:8] == was.state.instruction_error[r*8+:8] ||
                       (here && now.outcome == OUTCOME_FAIL_VALID) || (wrote && did.vmwrite_any));
      reason_only_by_exit :
      assert property (@(posedge clk) !stepped ||
                       now.state.exit_reason[r*8+:8] == was.state.exit_reason[r*8+:8] ||
                       (here && (now.outcome == OUTCOME_EXITED || now.outcome == OUTCOME_ENTRY_FAILED)) ||
                       (wrote && did.vmwrite_any));
      revision_only_by_store :
      assert property (@(posedge clk) !stepped || now.state.revision_ok[r] == was.state.revision_ok[r] ||
                       (did.operation == OP_STORE_REVISION && did.address == r));
    end
  endgenerate

  // What must be reachable, so that the proof is not about a block that never does anything.

  cover_entered_again : cover property (@(posedge clk) stepped && now.outcome == OUTCOME_ENTERED &&
                                        did.operation == OP_VMRESUME);
  cover_three_launched : cover property (@(posedge clk) live && now.state.launched == 4'b1110 &&
                                         now.state.mode == MODE_NON_ROOT);
  cover_guest_state_failure : cover property (@(posedge clk) stepped && now.number == 8'd161);
  cover_msr_failure : cover property (@(posedge clk) stepped && now.number == 8'd162);
  cover_second_vmxon : cover property (@(posedge clk) stepped && was_outside && was.state.launched == 4'b0001 &&
                                       now.state.mode == MODE_ROOT && now.state.vmxon_pointer == 3'd2);
  cover_vmclear_launched_not_current : cover property (@(posedge clk) stepped && retired && did.operation == OP_VMCLEAR &&
                                                       was.state.launched[did.address[1:0]] && had_current &&
                                                       was.state.current != did.address);
  generate
    for (genvar n = 1; n <= 28; n = n + 1) begin : error
      // Numbers of the dual-monitor treatment, of reserved and of legacy errors cannot arise here.
      if (n != 6 && n != 14 && (n < 16 || n == 26 || n == 28)) begin : reachable
        cover_error : cover property (@(posedge clk) stepped && now.outcome == OUTCOME_FAIL_VALID && now.number == n);
      end
    end
  endgenerate

endmodule
