"""Cycles per 64-byte buffer of the ring engine: 256 bits, a memory 250 cycles away, a back end that needs 300 for a buffer."""

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.virtio.driver import Feature
from ringwall.rtl.virtio.engine import PortDescription, RingEngine
from ringwall.sim.ring_bench import RingBench
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle

WIDTH, SIZE, LATENCY, BUFFERS = 256, 256, 250, 500
PACKED, INDIRECT, EVENT, IN_ORDER = (1 << bit for bit in (Feature.RING_PACKED, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER))
CASES = {  # features, arrangement, whether a buffer is a table; target, PCIe bound
    "packed": (PACKED | EVENT, "contiguous", 0, 8, 4.3),
    "packed, tables": (PACKED | EVENT | INDIRECT, "contiguous", 1, 12, 4.3),
    "split": (EVENT, "contiguous", 0, 10, 4.9),
    "split, scattered": (EVENT, "scattered", 0, 10, 4.9),
    "split, tables": (EVENT | INDIRECT, "contiguous", 1, 12, 4.9),
}


def test_rings(request):
    run(RingEngine(width=WIDTH, functions=(1,), clients=(1,), ports=[PortDescription(0, (SIZE,))]), module=__name__,
        node=request.node.nodeid, params={"width": WIDTH})  # fmt: skip


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(case=list(CASES))
async def cycles_per_buffer(dut, case):
    """BENCH-RING-1: 64-byte buffers in a steady stream: packed at most 8 cycles each, split 10, tables 12."""
    features, arrangement, tables, target, bound = CASES[case]
    bench = RingBench(dut, params()["width"], [(0, (SIZE,))], latency=lambda: LATENCY, back_latency=lambda: 300)
    await bench.begin()
    ring = await bench.enable(0, SIZE, features, arrangement=arrangement)
    used = made = 0
    times = {}
    while used < BUFFERS:
        while ring.free_count and made - used < SIZE:
            ring.add_chain([], [(0x8_0000 + 64 * made, 64)], direct=0 if tables else None)
            made += 1
        await bench.publish(0)
        await bench.until(lambda: ring.has_used)
        used += len(ring.poll_used())
        times[used] = cycle()
    first = min(n for n in times if n > 200)
    figure = (times[used] - times[first]) / (used - first)
    dut._log.info("BENCH %s: %.1f cycles per buffer (target %s, PCIe bound %s)", case, figure, target, bound)
    assert figure <= target


@cocotb.test(timeout_time=1, timeout_unit="ms")
@cocotb.parametrize(packed=(0, 1))
async def cycles_to_first_read(dut, packed):
    """BENCH-RING-2: an engine at rest reads a ring at most 11 cycles after a kick."""
    bench = await RingBench(dut, params()["width"], [(0, (SIZE,))]).begin()
    ring = await bench.enable(0, SIZE, PACKED if packed else 0)
    await ClockCycles(dut.clk, 500)
    ring.add_chain([], [(0x8_0000, 64)])
    await bench.publish(0, always=True)
    times = []
    while len(times) < 2:
        await RisingEdge(dut.clk)
        port = dut.bursts__0__valid if times else dut.kicks__valid
        if port.value:
            times.append(cycle())
    figure = times[1] - times[0]
    dut._log.info("BENCH kick to first ring read, %s: %d cycles", "packed" if packed else "split", figure)
    assert figure <= 11
