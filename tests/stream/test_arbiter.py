"""Arbiter and Demux: items of several streams into one and back; what they do cycle by cycle is proved in tests/formal."""

import random

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles

from ringwall.rtl.stream.arbiter import Arbiter
from ringwall.rtl.stream.demux import Demux
from ringwall.sim.run import run
from ringwall.sim.stream import pack, random_ready, start, unpack

ITEM = data.StructLayout({"source": 3, "number": 16, "last": 1})
COUNT = 5


class ThereAndBack(wiring.Component):
    """Five streams through one: an Arbiter, then a Demux by ``source``."""

    def __init__(self):
        item = stream.Signature(ITEM)
        super().__init__({"i": In(item).array(COUNT), "o": Out(item).array(COUNT)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.arbiter = arbiter = Arbiter(ITEM, COUNT, packets=True)
        m.submodules.demux = demux = Demux(ITEM, COUNT, packets=True)
        for n in range(COUNT):
            wiring.connect(m, wiring.flipped(self.i[n]), arbiter.i[n])
            wiring.connect(m, demux.o[n], wiring.flipped(self.o[n]))
        wiring.connect(m, arbiter.o, demux.i)
        m.d.comb += demux.select.eq(arbiter.o.payload.source)
        return m


def test_arbiter(request):
    run(ThereAndBack(), module=__name__, node=request.node.nodeid)


def test_parameters_are_checked():
    """STREAM-ARBITER-3: counts that cannot be are refused with a sentence."""
    with pytest.raises(ValueError, match="Inputs must be at least 1, not 0"):
        Arbiter(ITEM, 0)
    with pytest.raises(ValueError, match="Outputs must be at least 1, not '2'"):
        Demux(ITEM, "2")


def packets(rng, source, count):
    found, number = [], 0
    for _ in range(count):
        length = rng.choice([1, 1, 2, 3, 9])
        for n in range(length):
            # Inside a packet the source that Demux sees is another's: only that of the first item counts.
            found.append(pack(ITEM, source=source if n == 0 else rng.randrange(COUNT), number=number, last=n == length - 1))
            number += 1
    return found


@cocotb.test(timeout_time=200, timeout_unit="us")
async def packets_come_back_whole(dut):
    """STREAM-ARBITER-1: random packets of five streams, gaps, back-pressure: each stream comes back as it was, no packet is mixed."""
    rng = random.Random(cocotb.RANDOM_SEED)
    streams = await start(dut, *(f"i__{n}" for n in range(COUNT)), *(f"o__{n}" for n in range(COUNT)))
    seen, sent, tasks = [[] for _ in range(COUNT)], [], []
    for n in range(COUNT):
        cocotb.start_soon(streams[COUNT + n].watch(seen[n]))
        cocotb.start_soon(random_ready(streams[COUNT + n], rng, 0.8))
        sent.append(packets(rng, n, 120))
        tasks.append(cocotb.start_soon(streams[n].put_many(sent[n], lambda: rng.choice([0, 0, 0, 1, 4]))))
    for task in tasks:
        await task
    await ClockCycles(dut.clk, 40)
    assert seen == sent


@cocotb.test(timeout_time=50, timeout_unit="us")
async def the_line_is_full_and_fair(dut):
    """STREAM-ARBITER-2: five streams that always offer: an item leaves every cycle, packets in strict turn."""
    streams = await start(dut, *(f"i__{n}" for n in range(COUNT)), *(f"o__{n}" for n in range(COUNT)))
    order, cycles = [], []
    for n in range(COUNT):
        cocotb.start_soon(streams[COUNT + n].watch(_Turn(order, n), cycles))
        streams[COUNT + n].set_ready(1)
        items = [pack(ITEM, source=n, number=k, last=k % (n + 1) == n) for k in range(40 * (n + 1))]
        cocotb.start_soon(streams[n].put_many(items))
    await ClockCycles(dut.clk, 700)
    assert len(order) == 40 * (1 + 2 + 3 + 4 + 5)
    assert sorted(cycles) == list(range(min(cycles), min(cycles) + len(order)))
    turns = [source for source, last in order if last]
    assert turns == [turns[n % COUNT] for n in range(len(turns))] and sorted(turns[:COUNT]) == list(range(COUNT))


class _Turn:
    def __init__(self, order, source):
        self.order, self.source = order, source

    def append(self, payload):
        self.order.append((self.source, unpack(ITEM, payload).last))
