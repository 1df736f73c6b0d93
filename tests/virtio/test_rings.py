"""RingEngine alone, on every kind of ring: the models' drivers, good and bad ones, judge what comes out."""

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.virtio.driver import Feature
from ringwall.models.virtio.ring import Answer
from ringwall.rtl.virtio.engine import PortDescription, RingEngine
from ringwall.sim.run import params, run

from ringwall.sim.ring_bench import RingBench

PORTS = ((0, (16, 8)), (1, (16,)), (1, (8,)))
PACKED, INDIRECT, EVENT, IN_ORDER = (1 << bit for bit in (Feature.RING_PACKED, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER))
KINDS = [packed | others for packed in (0, PACKED) for others in (0, INDIRECT, EVENT, IN_ORDER, INDIRECT | EVENT | IN_ORDER)]


def dut(width):
    return RingEngine(width=width, functions=(1, 2), clients=(1, 4),
                      ports=[PortDescription(function, sizes, n == 2) for n, (function, sizes) in enumerate(PORTS)])  # fmt: skip


@pytest.mark.parametrize("width", [64, 256])
def test_rings(request, width):
    run(dut(width), module=__name__, node=request.node.nodeid, params={"width": width})


async def bench_of(dut):
    return await RingBench(dut, params()["width"], PORTS).begin()


async def traffic(bench, queue, rounds, *, most=5):
    """Random chains on one queue; each must arrive as it was made, once and in order."""
    ring, rng, port = bench.rings[queue], bench.rng, sum(queue >= edge for edge in (2, 3))
    back, index = bench.backs[port], queue if port == 0 else port - 1
    for _ in range(rounds):
        made = []
        while ring.free_count >= most and len(made) < rng.randrange(1, 12):
            readable, writable = bench.spans(most)
            name = ring.add_chain(readable, writable, direct=rng.choice([None, 0]) if ring.indirect else None)
            made.append((name, readable, writable))
        seen = len(back.chains)
        await bench.publish(queue)
        found = []
        while len(found) < len(made):
            await bench.until(lambda: ring.has_used)
            found += ring.poll_used()
        mine = [chain[1:] for chain in back.chains[seen:] if chain[0] == index]
        assert mine == [(readable, writable) for _, readable, writable in made]
        assert found == [(name, sum(length for _, length in writable)) for name, _, writable in made]


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def chains_are_served(dut):
    """RINGS-1: chains of every kind of ring arrive whole, once, in order; doorbells only where asked for (V046, V024, V049, V055, V057)."""
    bench = await bench_of(dut)
    for features in KINDS:
        is_packed = bool(features & PACKED)
        dut._log.info("features %#x", features)
        for queue, size in enumerate((13, 7, 11, 5) if is_packed else (16, 8, 16, 8)):
            arrangement = "contiguous" if features & IN_ORDER else bench.rng.choice(["contiguous", "scattered", "reversed"])
            await bench.enable(queue, size, features, arrangement=arrangement)
        tasks = [cocotb.start_soon(traffic(bench, queue, 4, most=4)) for queue in range(4)]
        for task in tasks:
            await task
        assert not bench.broken
        for queue in range(4):
            await bench.reset(queue)


async def works(bench, queue):
    """Make the queue anew and use it."""
    await bench.enable(queue, 8, bench.features[queue])
    await traffic(bench, queue, 2)


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def malformed_rings_are_refused(dut):
    """RINGS-2: each ring that a driver must not make is answered as allowed, in bounded reads; the other function works, stop mends (V031, V032,
    V047, V048, V067, V029, V059)."""
    bench = await bench_of(dut)
    spans = ([(0x5000, 64), (0x6000, 10)], [(0x7000, 100)])
    for features in (0, INDIRECT, PACKED, PACKED | INDIRECT):
        await bench.enable(2, 16, features)
        for kind in (await bench.enable(0, 8, features)).malformed:
            if kind.needs_indirect not in (None, bool(features & INDIRECT)):
                continue
            await bench.enable(0, 8, features)
            ring, back, server, before = bench.rings[0], bench.backs[0], bench.servers[0], len(bench.backs[0].chains)
            bench.broken.clear()
            reads = sum(not burst.is_write for _, burst, _ in server.log)
            ring.add_malformed(kind, *spans)
            await bench.publish(0, always=True)
            await ClockCycles(dut.clk, 1500)
            answer = Answer.REFUSED if bench.broken else Answer.SERVED if len(back.chains) > before else Answer.IDLE
            dut._log.info("%#x %s: %s, %d reads", features, kind.name, answer, sum(not b.is_write for _, b, _ in server.log) - reads)
            assert answer in kind.allowed and len(bench.broken) <= 1
            assert sum(not burst.is_write for _, burst, _ in server.log) - reads <= ring.read_bound()
            await traffic(bench, 2, 1)
            await bench.publish(0, always=True)
            await ClockCycles(dut.clk, 60)
            assert len(bench.broken) <= 1 and not set(bench.broken) - {0}
            await bench.stop(0)
            await works(bench, 0)
            await bench.stop(0)
        await bench.stop(1)


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def queues_are_taken_back(dut):
    """RINGS-3: RESET at any moment ends in idle, with no access and no notification behind it (V014); the queue begins anew (V015, V016)."""
    bench = await bench_of(dut)
    for features in (0, PACKED | INDIRECT | EVENT):
        for turn in range(12):
            queue = (0, 3, 1)[turn % 3]  # with another queue of its port, of a port that waits
            for q in {0, queue}:
                await bench.enable(q, 8, features)
            bench.backs[2].held = queue == 3 and turn % 2 == 0
            ring = bench.rings[queue]
            for _ in range(4):
                ring.add_chain(*bench.spans(2), direct=0 if features and bench.rng.random() < 0.5 else None)
            other = cocotb.start_soon(traffic(bench, 0, 3)) if queue else None
            await bench.publish(queue, always=True)
            await ClockCycles(dut.clk, bench.rng.randrange(250))
            await bench.reset(queue)
            low, high = 0x100000 * (queue + 1), 0x100000 * (queue + 2)
            bench.told(queue)
            logs = [len(server.log) for server in bench.servers]
            await ClockCycles(dut.clk, 150)
            late = [burst for server, at in zip(bench.servers, logs) for _, burst, _ in server.log[at:] if low <= burst.address < high]
            assert not late and not bench.told(queue)
            if other:
                await other
                await bench.reset(0)
            bench.backs[2].held = False
            await works(bench, queue)
            await bench.reset(queue)
    assert not bench.broken


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def functions_are_suspended(dut):
    """RINGS-4: suspend ends in suspended with nothing on the link (V019, V023); what a driver adds meanwhile is served after resume."""
    bench = await bench_of(dut)
    for features in (0, PACKED | EVENT):
        for queue in (2, 3):
            await bench.enable(queue, 16 if queue == 2 else 8, features)
        for _ in range(10):
            tasks = [cocotb.start_soon(traffic(bench, queue, 3)) for queue in (2, 3)]
            await ClockCycles(dut.clk, bench.rng.randrange(400))
            bench.backs[2].held = True
            dut.suspend.value = 2
            await bench.until(lambda: int(dut.suspended.value) == 2)
            count, notes = len(bench.servers[1].log), len(bench.notes)
            await ClockCycles(dut.clk, 200)
            assert int(dut.suspended.value) == 2 and count == len(bench.servers[1].log) and notes == len(bench.notes)
            bench.backs[2].held = False
            bench.backs[2].news.set()
            dut.suspend.value = 0
            for task in tasks:
                await task
        for queue in (2, 3):
            await bench.reset(queue)
    assert not bench.broken
