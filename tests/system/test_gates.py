"""Gates of an ECP5 that Yosys makes of the RTL, beside the RTL: the model of the block RAM, then blocks of the card."""

import re

import pytest
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ringwall.rtl.config import EndpointConfig
from ringwall.rtl.endpoint import descriptions_of
from ringwall.rtl.function.config_space import ConfigSpace
from ringwall.rtl.stream.queue import Queue
from ringwall.rtl.tlp.receiver import Receiver
from ringwall.rtl.verilog import portable, to_rtlil
from ringwall.rtl.virtio.store import Store
from ringwall.sim.gates import lockstep, netlist


class Rows(wiring.Component):
    """A memory with a port that writes parts of a row and one that reads, both at once or not; ``single``: the same row if both at once."""

    def __init__(self, width, depth, part, *, transparent=False, single=False, init=()):
        self.width, self.depth, self.part, self.transparent, self.single, self.rows = width, depth, part, transparent, single, tuple(init)
        super().__init__({"to": In(range(depth)), "data": In(width), "write": In(width // part), "at": In(range(depth)), "read": In(1),
                          "o": Out(width)})  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = memory = Memory(shape=self.width, depth=self.depth, init=self.rows)
        write = memory.write_port(granularity=self.part)
        read = memory.read_port(transparent_for=(write,) if self.transparent else ())
        m.d.comb += [
            write.addr.eq(self.to), write.data.eq(self.data), write.en.eq(self.write),
            read.addr.eq(self.to if self.single else self.at), read.en.eq(self.read), self.o.eq(read.data),
        ]  # fmt: skip
        return m


RAMS = {
    "36 bits": lambda: Rows(36, 64, 9),
    "18 bits": lambda: Rows(18, 1024, 9, transparent=True),
    "18 bits, one port": lambda: Rows(18, 1024, 9, single=True),
    "9 bits, one port": lambda: Rows(9, 2048, 9, single=True, transparent=True),
    "9 bits": lambda: Rows(9, 2048, 9),
    "1 bit": lambda: Rows(1, 16384, 1),
    "18 bits, with content": lambda: Rows(40, 600, 8, init=[n * 0x1_2345_6789 & 0xFF_FFFF_FFFF for n in range(600)]),
}


def gates_of(component):
    return netlist(portable(to_rtlil(component, "gates")), "gates")


@pytest.mark.parametrize("name", RAMS)
def test_block_ram(name, tmp_path):
    """GATES-1: the model of DP16KD beside Amaranth's memory, 1 to 36 bits wide: parts of rows, reads of what is written, first content."""
    gates = gates_of(RAMS[name]())
    assert f".DATA_WIDTH_{'A' if 'one port' in name else 'B'}(32'd{name.split()[0]})" in gates
    lockstep(RAMS[name](), gates, tmp_path, cycles=4000, seed=1)


BLOCKS = {
    "queue": lambda: Queue(72, 512, direct=True),
    "store": lambda: Store(width=64, depth=256),
    "receiver": lambda: Receiver(width=64),
    "configuration space": lambda: ConfigSpace(functions=descriptions_of(EndpointConfig(width=64))),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, tmp_path):
    """GATES-2: blocks with registers, LUTs, carry chains, RAM of both kinds and ROM: gates and RTL do the same in every cycle."""
    lockstep(BLOCKS[name](), gates_of(BLOCKS[name]()), tmp_path, cycles=1000, seed=2)


FAULTS = {  # what is changed in the first of its kind
    "LUT": (r"LUT4 #\(\s+\.INIT\(16'h(\w+)\)", lambda text: f"{int(text, 16) ^ 0xFFFF:04x}"),
    "register's first value": (r'\.REGSET\("(RESET)"\)', lambda text: "SET"),
    "register's enable": (r'\.CEMUX\("(CE)"\)', lambda text: "INV"),
    "carry chain": (r"\.INJECT1_1\(\"(NO)\"\)", lambda text: "YES"),
    "row of a RAM": (r"\.INITVAL_00\(320'h(\w+)\)", lambda text: f"{int(text, 16) ^ 1 << 20:080x}"),
    "RAM's write": (r"\.CEA\(1'h(1)\)", lambda text: "0"),
}  # fmt: skip


def test_faults_are_seen(tmp_path):
    """GATES-3: one gate made wrong is seen: a LUT, a register's first value and enable, a carry chain, a bit of a RAM, its write."""
    gates = gates_of(Queue(36, 512))
    for pattern, change in FAULTS.values():
        found = re.search(pattern, gates)
        wrong = gates[: found.start(1)] + change(found[1]) + gates[found.end(1) :]
        with pytest.raises(AssertionError, match=r"^cycle \d+: the RTL gives"):
            lockstep(Queue(36, 512), wrong, tmp_path, cycles=2000, seed=2)


def test_unknown_block_ram():
    """GATES-4: a block RAM that the model does not cover is refused: two clocks, a reset of its output."""
    verilog = """
module gates(input clk, input other, input [8:0] to, input [8:0] at, input [35:0] d, input r, output reg [35:0] q);
  reg [35:0] rows [0:511];
  always @(posedge clk) rows[to] <= d;
  always @(posedge CLOCK) if (RESET) q <= 0; else q <= rows[at];
endmodule
"""
    for clock, reset in (("other", "1'b0"), ("clk", "r")):
        with pytest.raises(RuntimeError, match="A block RAM must be one that there is a model for"):
            netlist(verilog.replace("CLOCK", clock).replace("RESET", reset), "gates")
