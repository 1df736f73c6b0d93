"""Splitter: every cutting is judged by models.dma.BurstRules."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.dma import BurstRules, Span
from ringwall.rtl.dma.layouts import Segment
from ringwall.rtl.dma.splitter import DirectSplitter, Piece, Splitter
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, random_ready, start, unpack


@pytest.mark.parametrize("splitter", [Splitter, DirectSplitter])
@pytest.mark.parametrize("max_burst", [64, 512, 4096])
def test_splitter(request, max_burst, splitter):
    run(splitter(max_burst=max_burst), module=__name__, node=request.node.nodeid, params={"max_burst": max_burst})


def test_parameters_are_checked():
    """DMA-SPLIT-2: a burst limit that is no power of two is refused with a sentence."""
    for bad in (0, 63, 100, 8192, "256"):
        with pytest.raises(ValueError, match="power of two between 64 and 4096, not"):
            Splitter(max_burst=bad)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def pieces_are_legal(dut):
    """DMA-SPLIT-1: random segments, random back-pressure; each is judged by the model; 1 piece per cycle."""
    rng = random.Random(cocotb.RANDOM_SEED)
    i, o = await start(dut, "i", "o")
    seen, cycles = [], []
    cocotb.start_soon(o.watch(seen, cycles))
    rules = BurstRules(max_burst=params()["max_burst"])
    o.set_ready(1)
    ready = None
    for n in range(80):
        if n == 40:
            ready = cocotb.start_soon(random_ready(o, rng))
        length = rng.choice([0, 1, 3, 4095, 4096, 4097, rng.randrange(1, 20000)])
        address = max((rng.getrandbits(40) << 12) - rng.randrange(600), 0)
        last = rng.random() < 0.5
        seen.clear()
        cycles.clear()
        await i.put(pack(Segment, address=address, length_bytes=length, last=last))
        await ClockCycles(dut.clk, 2)  # the segment is in: ready has fallen
        while dut.i__ready.value != 1:
            await RisingEdge(dut.clk)
        await ClockCycles(dut.clk, 3)  # a piece too many would show here
        pieces = [unpack(Piece, payload) for payload in seen]
        if length == 0:
            assert [(p.length_bytes, p.last) for p in pieces] == ([(0, 1)] if last else [])
            continue
        found = rules.faults(Span(address, length), [Span(p.address, p.length_bytes) for p in pieces])
        assert not found, f"segment {n} {address:#x}+{length:#x}: " + "; ".join(found)
        assert [p.last for p in pieces] == [0] * (len(pieces) - 1) + [int(last)]
        if ready is None:
            assert cycles[-1] - cycles[0] == len(cycles) - 1, "one piece per cycle"
