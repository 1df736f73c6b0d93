"""The memory of a virtio-blk function: the port towards it, and a large block RAM behind one."""

from functools import cache

from amaranth import ClockSignal, Instance, Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["VERILOG", "MemoryPort", "RowData", "RowWrite", "Store"]

# Amaranth writes each row of a Memory out as an initial value; at 8 MiB that takes minutes, so the array is Verilog.
VERILOG = """\
module ringwall_store #(parameter WIDTH = 64, DEPTH = 1024, ADDRESS = 10) (
  input clk,
  input read_enable, input [ADDRESS-1:0] read_row, output reg [WIDTH-1:0] read_data,
  input write_enable, input [ADDRESS-1:0] write_row, input [WIDTH-1:0] write_data
);
  reg [WIDTH-1:0] rows [0:DEPTH-1] /* verilator public_flat_rd */;
`ifndef SYNTHESIS // block RAM is zero at power-on by itself, and a synthesizer would take minutes for the loop
  integer row;
  initial begin
    read_data = 0;
    for (row = 0; row < DEPTH; row = row + 1) rows[row] = 0;
  end
`endif
  always @(posedge clk) begin
    if (write_enable) rows[write_row] <= write_data;
    if (read_enable) read_data <= rows[read_row];
  end
endmodule
"""


@cache
def RowData(width):
    """A row that was read; ``ok`` 0: the memory could not read it."""
    return data.StructLayout({"data": width, "ok": 1})


@cache
def RowWrite(width, depth):
    """A row to write."""
    return data.StructLayout({"row": range(depth), "data": width})


class MemoryPort(wiring.Signature):
    """Rows of ``width`` bits, read and written, each answered once and in order, after any time; seen from who asks.

    ``reads`` are answered by ``rows``, ``writes`` by ``written`` (1: stored for good, 0: it could not be). A read that is asked for when
    a write was answered sees it. Between a read and a write that is not answered there is no order.
    """

    def __init__(self, width, depth):
        self.width, self.depth = width, depth
        super().__init__({
            "reads": Out(stream.Signature(range(depth))),
            "rows": In(stream.Signature(RowData(width))),
            "writes": Out(stream.Signature(RowWrite(width, depth))),
            "written": In(stream.Signature(1)),
        })

    def __repr__(self):
        return f"MemoryPort({self.width}, {self.depth})"


class Store(wiring.Component):
    """Rows of block RAM; they are zero at power-on.

    Latency: 1 cycle. Throughput: 1 read and 1 write per cycle.

    Parameters
    ----------
    width : :class:`int`
        Row width in bits.
    depth : :class:`int`
        Rows: at least 2.

    Members
    -------
    port : ``In(MemoryPort(width, depth))``
        The rows.

    Raises
    ------
    :exc:`ValueError`
        If ``depth`` is not such a number.
    """

    def __init__(self, *, width, depth):
        if not isinstance(depth, int) or depth < 2:
            raise ValueError(f"Depth must be at least 2, not {depth!r}")
        self.width, self.depth = width, depth
        super().__init__({"port": In(MemoryPort(width, depth))})

    def elaborate(self, platform):
        m = Module()
        port = self.port
        for asked, answer in ((port.reads, port.rows), (port.writes, port.written)):
            m.d.comb += asked.ready.eq(~answer.valid | answer.ready)
            with m.If(asked.ready):
                m.d.sync += answer.valid.eq(asked.valid)
        m.d.comb += [port.rows.payload.ok.eq(1), port.written.payload.eq(1)]
        m.submodules.array = Instance(
            "ringwall_store",
            p_WIDTH=self.width, p_DEPTH=self.depth, p_ADDRESS=len(port.reads.payload),
            i_clk=ClockSignal(),
            i_read_enable=port.reads.valid & port.reads.ready, i_read_row=port.reads.payload, o_read_data=port.rows.payload.data,
            i_write_enable=port.writes.valid & port.writes.ready,
            i_write_row=port.writes.payload.row, i_write_data=port.writes.payload.data,
        )
        return m
