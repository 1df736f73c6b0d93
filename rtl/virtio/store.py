"""A large block RAM: the sectors of a virtio-blk function."""

from amaranth import ClockSignal, Instance, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["VERILOG", "Store"]

# Amaranth writes each row of a Memory out as an initial value; at 8 MiB that takes minutes, so the array is Verilog.
VERILOG = """\
module ringwall_store #(parameter WIDTH = 64, DEPTH = 1024, ADDRESS = 10) (
  input clk,
  input read_enable, input [ADDRESS-1:0] read_row, output reg [WIDTH-1:0] read_data,
  input write_enable, input [ADDRESS-1:0] write_row, input [WIDTH-1:0] write_data
);
  reg [WIDTH-1:0] rows [0:DEPTH-1] /* verilator public_flat_rd */;
  integer row;
  initial begin
    read_data = 0;
    for (row = 0; row < DEPTH; row = row + 1) rows[row] = 0;
  end
  always @(posedge clk) begin
    if (write_enable) rows[write_row] <= write_data;
    if (read_enable) read_data <= rows[read_row];
  end
endmodule
"""


class Store(wiring.Component):
    """Rows of ``width`` bits behind one registered read port and one write port.

    Latency: 1 cycle; ``read_data`` holds while ``read_enable`` is 0. A read of the row written in the same cycle gives the
    old row. Throughput: 1 read and 1 write per cycle. Contents are zero at power-on.

    Parameters
    ----------
    width : :class:`int`
        Row width in bits.
    depth : :class:`int`
        Rows: a power of two, at least 2.

    Raises
    ------
    :exc:`ValueError`
        If ``depth`` is not such a number.
    """

    def __init__(self, *, width, depth):
        if not isinstance(depth, int) or depth < 2 or depth & (depth - 1):
            raise ValueError(f"Depth must be a power of two and at least 2, not {depth!r}")
        self.width, self.depth = width, depth
        rows = range(depth)
        super().__init__({
            "read_enable": In(1), "read_row": In(rows), "read_data": Out(width),
            "write_enable": In(1), "write_row": In(rows), "write_data": In(width),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.array = Instance(
            "ringwall_store",
            p_WIDTH=self.width, p_DEPTH=self.depth, p_ADDRESS=len(self.read_row),
            i_clk=ClockSignal(),
            i_read_enable=self.read_enable, i_read_row=self.read_row, o_read_data=self.read_data,
            i_write_enable=self.write_enable, i_write_row=self.write_row, i_write_data=self.write_data,
        )
        return m
