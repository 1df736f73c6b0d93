// A design with a card in it: see README.md. The console's bytes go back where they came from; the two streams of
// TLPs are those of a PCI Express core, which knows when the link is down.
module top (
  input clk,
  input rst,
  input link_down,
  input rx_valid, output rx_ready, input [63:0] rx_data, input [1:0] rx_keep, input rx_first, input rx_last,
  output tx_valid, input tx_ready, output [63:0] tx_data, output [1:0] tx_keep, output tx_first, output tx_last
);
  wire echo_valid, echo_ready;
  wire [7:0] echo;

  example_card card (
    .clk(clk),
    .rst(rst),
    .link_reset(link_down),
    .i__valid(rx_valid),
    .i__ready(rx_ready),
    .i__payload({rx_last, rx_first, rx_keep, rx_data}),
    .o__valid(tx_valid),
    .o__ready(tx_ready),
    .o__payload({tx_last, tx_first, tx_keep, tx_data}),
    .from_driver_2__valid(echo_valid),
    .from_driver_2__ready(echo_ready),
    .from_driver_2__payload(echo),
    .to_driver_2__valid(echo_valid),
    .to_driver_2__ready(echo_ready),
    .to_driver_2__payload(echo),
    .activity(),
    .malformed()
  );
endmodule
