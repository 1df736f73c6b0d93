"""Counters beside a card."""

import random

import cocotb
import pytest
from amaranth.hdl import Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import RisingEdge

from ringwall.sim.counted import Counted, read_counts
from ringwall.sim.run import run
from ringwall.sim.stream import start


class Card(wiring.Component):
    """Passes a stream on, and shows what it is told to show."""

    i: In(stream.Signature(8))
    o: Out(stream.Signature(8))
    show: In(7)
    activity: Out(data.StructLayout({"hit": 1, "level": 5, "miss": 1}))

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.activity.as_value().eq(self.show)
        wiring.connect(m, wiring.flipped(self.i), wiring.flipped(self.o))
        return m


def test_counted(request):
    """SIM-COUNTED-1: cycles of each bit and the highest level are counted; the card's own ports work as before."""
    run(Counted(Card()), module=__name__, node=request.node.nodeid)
    with pytest.raises(ValueError, match="must have a port 'activity'"):
        Counted(Counted(Card()))


@cocotb.test(timeout_time=100, timeout_unit="us")
async def what_is_shown_is_counted(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    i, o = await start(dut, "i", "o")
    shown = []
    for _ in range(300):
        shown.append(rng.getrandbits(7) & 0x5F)  # level up to 15
        dut.show.value = shown[-1]
        await RisingEdge(dut.clk)
    dut.show.value = 0
    for _ in range(3):
        await RisingEdge(dut.clk)
    assert read_counts(dut, Counted(Card())) == {
        "hit": sum(value & 1 for value in shown), "level": max(value >> 1 & 31 for value in shown),
        "miss": sum(value >> 6 for value in shown)}  # fmt: skip
    cocotb.start_soon(i.put(77))
    assert await o.get() == 77
