"""HeaderSplitter and HeaderJoiner: packets of all lengths, at any pace, taken apart and put together."""

import random

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from ringwall.rtl.dma.layouts import ChainBeat
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.virtio.header import Front, HeaderJoiner, HeaderSplitter
from ringwall.sim.back_end import beats_of, taken_packets
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, random_ready, start, unpack

SHAPES = [(64, 16), (128, 16), (256, 16), (64, 12), (128, 12), (512, 12)]  # width, bytes of a header


@pytest.mark.parametrize("width, size", SHAPES)
def test_header(request, width, size):
    for made, testcase in ((HeaderSplitter, "packets_are_split"), (HeaderJoiner, "packets_are_joined")):
        if made is HeaderSplitter or size == 12:
            run(made(width=width, header_bytes=size), module=__name__, node=f"{request.node.nodeid}-{testcase}",
                params={"width": width, "size": size}, testcase=testcase)  # fmt: skip


def contents(rng, size, lanes):
    """Return packets of the lengths that matter, and others."""
    lengths = {n for at in (size, lanes, size + lanes, 2 * lanes) for n in (at - 1, at, at + 1)} | {1, 5 * lanes + size, 5 * lanes}
    return [rng.randbytes(n) for n in (*lengths, *(rng.randrange(1, 200) for _ in range(30)))]


@cocotb.test(timeout_time=20, timeout_unit="us")
async def packets_are_split(dut):
    """VIRTIO-HEAD-1: header and rest of each packet; the rest has an empty beat only if it is empty, ``complete`` is 0 of a packet that is
    too short or could not be fetched, and what could not is told; a beat per cycle, 2 cycles more per packet."""
    rng, lanes, size = random.Random(cocotb.RANDOM_SEED), params()["width"] // 8, params()["size"]
    layout, fronts, rests = ChainBeat(8 * lanes), [], []
    i, header, o = await start(dut, "i", "header", "o")
    cocotb.start_soon(header.watch(fronts))
    cocotb.start_soon(o.watch(rests))
    for pace in (1, 0.6):
        packets = [(content, rng.choice([BurstStatus.OK] * 3 + [BurstStatus.CA])) for content in contents(rng, size, lanes)]
        rng.shuffle(packets)

        async def give(packets=packets):
            for content, status in packets:
                await i.put_many(beats_of(layout, content, status=status))

        taking, begun, beats = [cocotb.start_soon(random_ready(one, rng, pace)) for one in (header, o)], cycle(), 0
        giving = cocotb.start_soon(give())
        for content, status in packets:
            while not (found := taken_packets(layout, rests)):
                await RisingEdge(dut.clk)
            ((rest, last),), front = found, unpack(Front(size), fronts.pop(0))
            is_told = status == BurstStatus.OK or -(-size // lanes) < -(-len(content) // lanes)
            assert front.complete == (len(content) >= size and is_told), (len(content), status)
            if len(content) >= size:
                assert front.data == int.from_bytes(content[:size], "little")
            assert last.byte_count or not rest
            assert last.status == status
            if status == BurstStatus.OK:
                assert rest == content[size:]
            else:  # the last beat does not count
                good = max(len(rest) - 1, 0) // lanes * lanes
                assert rest[:good] == content[size : size + good]
            beats += -(-len(content) // lanes)
        await giving
        for one in taking:
            one.cancel()
        assert pace < 1 or cycle() - begun <= beats + 2 * len(packets) + 3


@cocotb.test(timeout_time=20, timeout_unit="us")
async def packets_are_joined(dut):
    """VIRTIO-HEAD-2: each packet comes with its header in front, no beat of it empty; a beat per cycle, and 2 for the header."""
    rng, lanes, size = random.Random(cocotb.RANDOM_SEED), params()["width"] // 8, params()["size"]
    layout, made = ChainBeat(8 * lanes), []
    i, header, o = await start(dut, "i", "header", "o")
    cocotb.start_soon(o.watch(made))
    for pace in (1, 0.6):
        packets = [(rng.randbytes(size), content) for content in contents(rng, size, lanes)]
        taking, begun = cocotb.start_soon(random_ready(o, rng, pace)), cycle()
        cocotb.start_soon(header.put_many(int.from_bytes(front, "little") for front, _ in packets))
        cocotb.start_soon(i.put_many(beat for _, content in packets for beat in beats_of(layout, content)))
        for front, content in packets:
            while not (found := taken_packets(layout, made)):
                await RisingEdge(dut.clk)
            ((whole, last),) = found
            assert whole == front + content and last.byte_count
        taking.cancel()
        beats = sum(-(-len(content) // lanes) for _, content in packets)
        assert pace < 1 or cycle() - begun <= beats + 2 * len(packets) + 4
