// Simulation only: K requests in, K responses out, per toggle of `go`. One crossing of the simulator interface per
// batch instead of one per clock edge.

module vmx_mode_fsm_batch
  import vmx_pkg::*;
#(
    parameter int K = 128
) (
    input  logic                          rst_n,
    input  logic                          go,
    input  logic [  K*REQUEST_WIDTH-1:0] stimuli,
    output logic [K*RESPONSE_WIDTH-1:0]  responses,
    output logic                          done
);

  logic clk;
  logic valid;
  request_t req;
  response_t rsp;

  vmx_mode_fsm dut (.*);

  initial begin
    clk   = 1'b0;
    valid = 1'b1;
    req   = '0;
    done  = 1'b0;
    @(posedge rst_n);  // `go` is unknown before the first reset
    forever begin
      @(go);
      for (int i = 0; i < K; i = i + 1) begin
        req = stimuli[i*REQUEST_WIDTH+:REQUEST_WIDTH];
        #1 clk = 1'b1;
        #1 clk = 1'b0;
        responses[i*RESPONSE_WIDTH+:RESPONSE_WIDTH] = rsp;
      end
      done = ~done;
    end
  end

endmodule
