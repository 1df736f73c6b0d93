"""The harness itself: a run that should fail must fail, and the drivers and monitors see what happens."""

import random

import cocotb
import pytest
from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles

from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, random_ready, start, unpack

LAYOUT = data.StructLayout({"low": 12, "high": data.ArrayLayout(20, 2)})


class Register(wiring.Component):
    """One register between two streams: takes a new item when it is empty or is being emptied."""

    i: In(stream.Signature(LAYOUT))
    o: Out(stream.Signature(LAYOUT))

    def elaborate(self, platform):
        m = Module()
        full, held = Signal(), Signal(LAYOUT)
        m.d.comb += [self.i.ready.eq(~full | self.o.ready), self.o.valid.eq(full), self.o.payload.eq(held)]
        with m.If(self.i.ready):
            m.d.sync += [full.eq(self.i.valid), held.eq(self.i.payload)]
        return m


@pytest.mark.parametrize("sim", ["icarus", "verilator"])
def test_harness(request, sim):
    """SIM-RUN-1: a passing module passes."""
    run(Register(), module=__name__, node=request.node.nodeid, params={"answer": 42}, sim=sim, testcase="streams_carry_everything")

@cocotb.test()
async def streams_carry_everything(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    assert params() == {"answer": 42}
    i, o = await start(dut, "i", "o")
    got, when = [], []
    cocotb.start_soon(o.watch(got, when))
    cocotb.start_soon(random_ready(o, rng))
    sent = [rng.getrandbits(52) for _ in range(500)]
    await i.put_many(sent, gaps=lambda: rng.randrange(3))
    await ClockCycles(dut.clk, 40)
    assert got == sent
