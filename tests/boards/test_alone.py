"""Figures of a block: alone between registers, placed; and the LUTs in a row of a netlist."""

import json

import pytest
from amaranth import Array, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ringwall.boards import alone
from ringwall.boards.place import read_report
from ringwall.boards.sizes import blocks_of, longest, size
from ringwall.rtl.verilog import to_rtlil


class Sums(wiring.Component):
    """Adds up ``steps`` numbers within a cycle, each chosen by the sum before it."""

    i: In(64)
    o: Out(8)

    def __init__(self, steps):
        self.steps = steps
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        numbers, total = Array(self.i.word_select(n, 8) for n in range(8)), Signal(8)
        for _ in range(self.steps):
            total = (total + numbers[total[:3]])[:8]
        m.d.sync += self.o.eq(total)
        return m


class Pair(wiring.Component):
    """Two blocks beside each other."""

    i: In(64)
    o: Out(8)
    p: Out(8)

    def elaborate(self, platform):
        m = Module()
        m.submodules.quick, m.submodules.slow = quick, slow = Sums(2), Sums(6)
        m.d.comb += [quick.i.eq(self.i), slow.i.eq(self.i), self.o.eq(quick.o), self.p.eq(slow.o)]
        return m


def test_alone():
    """BOARD-ALONE-1: a block is placed without its neighbour, however slow that is, with seeds until it is fast enough; a block that
    is not there is an error."""
    rtlil = to_rtlil(Pair(), alone.CARD)
    module = alone.module_of(rtlil, "quick")
    assert alone.ports_of(rtlil, module) == {"clk": ("input", 1), "rst": ("input", 1), "i": ("input", 64), "o": ("output", 8)}
    (slow, for_slow), (quick, for_quick) = (alone.alone(rtlil, alone.module_of(rtlil, block), goal=goal, seeds=3)
                                            for block, goal in (("slow", 1000), ("quick", 10)))  # fmt: skip
    assert quick.frequency > 1.5 * slow.frequency
    assert (for_slow, for_quick) == (3, 1)
    with pytest.raises(TimeoutError, match="routed with none of them"):
        alone.alone(rtlil, module, seeds=2, seconds=0.01)
    with pytest.raises(ValueError, match="The card has no block 'quic'"):
        alone.module_of(rtlil, "quic")


def test_longest():
    """BOARD-SIZES-1: LUTs in a row are counted through carries and addresses of RAM, not through registers nor its data, and are named."""

    def cell(kind, out, **inputs):
        ways = dict.fromkeys(inputs, "input") | {"Z": "output"}
        return {"type": kind, "port_directions": ways, "connections": {name: [bit] for name, bit in inputs.items()} | {"Z": [out]}}

    cells = {
        "a.start_FF": cell("TRELLIS_FF", 1, DI=9),
        "a.one_LUT4": cell("LUT4", 2, A=1, B="0"),
        "a.b.sum": cell("CCU2C", 3, A0=2, CIN="0"),
        "a.b.more": cell("CCU2C", 4, A0=1, CIN=3),  # the carry goes on, and is no LUT more
        "c.row": cell("TRELLIS_DPR16X4", 5, RAD=4, DI=8, WCK=0),
        "c.wide": cell("PFUMX", 6, ALUT=5, C0=1),
        "d.end_LUT4": cell("LUT4", 7, A=6),
        "d.end_FF": cell("TRELLIS_FF", 9, DI=7),
    }
    assert longest(cells) == ["a.one_LUT4", "a.b.sum", "c.row", "d.end_LUT4"]
    assert blocks_of(longest(cells)) == ["a", "a.b", "c", "d"]
    assert blocks_of(["one_LUT4", "$abc$7"]) == ["top"]
    assert size(cells)[3] == 4
    cells["d.more_LUT4"] = cell("LUT4", 8, A=7)  # in front of the RAM's data, where a register is: no loop, one LUT more
    assert longest(cells)[-2:] == ["d.end_LUT4", "d.more_LUT4"]


def test_read_report(tmp_path):
    """BOARD-PLACE-1: frequency, delay, wires and blocks of the slowest path are what nextpnr's report says of the one clock."""
    steps = ("clk-to-q", 0.5, "in.a.x_FF"), ("routing", 2.25, "in.a.y_LUT4"), ("logic", 0.25, "in.a.y_LUT4"), ("setup", 0, "in.z_FF")
    path = [{"type": kind, "delay": delay, "to": {"cell": name}} for kind, delay, name in steps]
    others = {"from": "<async>", "to": "clk", "path": []}
    critical = [others, {"from": "clk", "to": "clk", "path": path}]
    fmax = {"clk": {"achieved": 200.5, "constraint": 125.0}}
    (tmp_path / "r.json").write_text(json.dumps({"fmax": fmax, "critical_paths": critical}))
    found = read_report(tmp_path / "r.json")
    assert (found.frequency, found.path, found.delay, found.routing, found.goal) == (200.5, ("a", "top"), 3, 2.25, 125)
