"""RingEngine alone, on every kind of ring: the models' drivers, good and bad ones, judge what comes out."""

import os

import cocotb
import pytest
from cocotb.triggers import ClockCycles

from ringwall.models.virtio.driver import Feature
from ringwall.models.virtio.packed import USED, PackedDescriptor
from ringwall.models.virtio.ring import Answer
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.virtio.engine import PortDescription, RingEngine
from ringwall.sim.ring_bench import RingBench
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, random_ready

PORTS = ((0, (16, 8)), (1, (16,)), (1, (8,)))
PACKED, INDIRECT, EVENT, IN_ORDER = (1 << bit for bit in (Feature.RING_PACKED, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.IN_ORDER))
KINDS = [packed | others for packed in (0, PACKED) for others in (0, INDIRECT, EVENT, IN_ORDER, INDIRECT | EVENT | IN_ORDER)]


def dut(width):
    return RingEngine(width=width, functions=(1, 2), clients=(1, 4),
                      ports=[PortDescription(function, sizes, n == 2) for n, (function, sizes) in enumerate(PORTS)])  # fmt: skip


@pytest.mark.parametrize("width", [64])  # the most beats in a line; tests/virtio/test_engine.py has all widths, tests/bench 256
def test_rings(request, width):
    run(dut(width), module=__name__, node=request.node.nodeid, params={"width": width}, sim=os.environ.get("SIM") or "verilator")


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
            direct = None
            if ring.indirect and rng.randrange(3):
                direct = 0 if bench.features[queue] & PACKED else rng.randrange(len(readable + writable))
            name = ring.add_chain(readable, writable, direct=direct)
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
    """VIRTIO-RING-11: chains of every kind of ring arrive whole, once, in order; doorbells as asked (V024, V046, V049, V055, V057)."""
    bench = await bench_of(dut)
    for features in KINDS:
        is_packed = bool(features & PACKED)
        dut._log.info("features %#x", features)
        for queue, size in enumerate((13, 1, 11, 3) if is_packed else (16, 8, 16, 8)):
            arrangement = "contiguous" if features & IN_ORDER else bench.rng.choice(["contiguous", "scattered", "reversed"])
            await bench.enable(queue, size, features, arrangement=arrangement)
        mosts = [min(4, ring.layout.size) for ring in bench.rings.values()]
        tasks = [cocotb.start_soon(traffic(bench, queue, 3, most=most)) for queue, most in enumerate(mosts)]
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
    """VIRTIO-RING-12: malformed rings end as allowed (V031, V032, V047, V048, V059) in bounded reads (V067); stop mends."""
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
            await ClockCycles(dut.clk, 900)
            if not bench.broken and len(back.chains) == before:
                await ClockCycles(dut.clk, 3000)  # nothing may be tried for ever
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
    """VIRTIO-RING-13: RESET at any moment ends in idle, with no access and no notification behind it (V014-V016)."""
    bench = await bench_of(dut)
    for features in (0, PACKED | INDIRECT | EVENT):
        for turn in range(9):
            queue = (0, 3, 1)[turn % 3]  # with another queue of its port, of a port that waits
            for q in {0, queue}:
                await bench.enable(q, 8, features)
            bench.backs[2].held = queue == 3
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
    """VIRTIO-RING-14: suspend ends in suspended, with nothing on the link until resume (V019, V023); nothing is lost."""
    bench = await bench_of(dut)
    for features in (0, PACKED | EVENT):
        for queue in (2, 3):
            await bench.enable(queue, 16 if queue == 2 else 8, features, arrangement="scattered")
        for _ in range(10):
            tasks = [cocotb.start_soon(traffic(bench, queue, 3, most=most)) for queue, most in ((2, bench.rng.choice((1, 12))), (3, 5))]
            await ClockCycles(dut.clk, bench.rng.randrange(400))
            bench.backs[2].held = True
            dut.suspend.value = 2
            await ClockCycles(dut.clk, 40)
            taken = [len(back.chains) for back in bench.backs]
            await bench.until(lambda: int(dut.suspended.value) == 2)
            assert taken == [len(back.chains) for back in bench.backs], "no chain is begun"
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


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def failed_accesses_need_reset(dut):
    """VIRTIO-RING-16: each read or write of a ring that fails gives needs_reset once; the other function works, stop mends (R03)."""
    bench = await bench_of(dut)
    for features in (INDIRECT | EVENT, PACKED | INDIRECT | EVENT, PACKED):
        await bench.enable(2, 16, features)
        kinds = {"read": lambda burst: not burst.is_write, "write": lambda burst: burst.is_write}
        for name, chosen in kinds.items():
            for number in range(12):
                ring = await bench.enable(0, 8, features)
                for tables in (0, None, 0):
                    ring.add_chain(*bench.spans(2), direct=tables if ring.indirect else None)
                bench.broken.clear()
                seen = []

                def status(burst, seen=seen, chosen=chosen, number=number):
                    if burst.function == 1 and chosen(burst):
                        seen.append(burst)
                    return BurstStatus.UR if len(seen) == number + 1 and seen[-1] is burst else BurstStatus.OK

                bench.status = status
                await bench.publish(0, always=True)
                await ClockCycles(dut.clk, 700)
                bench.status = lambda burst: BurstStatus.OK
                assert bench.broken == [0] * (len(seen) > number), f"{features:#x} {name} {number}: {seen[number:]}"
                await traffic(bench, 2, 1)
                await bench.stop(0)
                if len(seen) <= number:
                    break
            assert number > 2
        await works(bench, 0)
        await bench.stop(0)
        await bench.stop(1)


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def stop_is_quick_and_clean(dut):
    """VIRTIO-RING-17: stop at any moment ends in stopped with nothing under way (V011); the function begins anew, the other goes on."""
    bench = await bench_of(dut)
    for features in (INDIRECT | EVENT, PACKED | INDIRECT | EVENT):
        for _ in range(12):
            for queue, size in enumerate((16, 8)):
                ring = await bench.enable(queue, size, features)
                while ring.free_count > 3:
                    ring.add_chain(*bench.spans(3), direct=bench.rng.choice([0, None]))
                await bench.publish(queue, always=True)
            await bench.enable(2, 16, features)
            other = cocotb.start_soon(traffic(bench, 2, 1))
            await ClockCycles(dut.clk, bench.rng.randrange(300))
            await bench.stop(0)
            assert not bench.servers[0].reads and not bench.servers[0].writes
            count = len(bench.servers[0].log)
            await ClockCycles(dut.clk, 60)
            assert count == len(bench.servers[0].log)
            await other
            await bench.reset(2)
            await works(bench, 0)
            await bench.stop(0)
    assert not bench.broken


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def what_is_not_available_is_not_followed(dut):
    """VIRTIO-RING-18: a packed ring full of another lap's tables, behind no or one good chain: no table is read, nothing breaks (V055)."""
    bench = await bench_of(dut)
    for good in range(2):
        ring = await bench.enable(0, 8, PACKED | INDIRECT)
        for number in range(8):
            bench.memory.write(ring.layout.descriptor(number), PackedDescriptor(0xDEAD0000, 64, number, 4 | USED).pack())
        if good:
            ring.add_chain([(0x5000, 64)])
        await bench.publish(0, always=True)
        await ClockCycles(dut.clk, 400)
        assert len(bench.backs[0].chains) == good and not bench.broken
        assert not any(burst.address >> 16 == 0xDEAD for _, burst, _ in bench.servers[0].log)
        await bench.reset(0)


class Pieces:
    """Memory as a driver's processor writes it: each byte, and each half-word of flags, by itself."""

    def __init__(self, memory):
        self.memory, self.read, self.pieces = memory, memory.read, []

    def write(self, address, data):
        pieces = [(address + n, data[n : n + 1]) for n in range(len(data))]
        self.pieces += pieces[:14] + ([(address + 14, data[14:])] if len(data) == 16 else pieces[14:])


@cocotb.test(timeout_time=40, timeout_unit="ms")
async def half_lists_are_not_taken(dut):
    """VIRTIO-RING-20: packed lists come byte by byte, first flags last, while reads overtake each other: no half is taken (V055, R20)."""
    bench = await bench_of(dut)
    bench.latency = lambda: bench.rng.choice((5, 20, 150))
    ring = await bench.enable(2, 13, PACKED)
    memory, back, rng = bench.memory, bench.backs[1], bench.rng

    async def ask():
        while True:
            await ClockCycles(dut.clk, rng.randrange(1, 60))
            await bench.kicks.put(2)

    asking = cocotb.start_soon(ask())
    for _ in range(250):
        readable, writable = bench.spans(rng.choice((4, 4, 9)))
        ring.memory = slow = Pieces(memory)
        ring.add_chain(readable, writable)
        rng.shuffle(slow.pieces)
        for address, piece in slow.pieces:
            memory.write(address, piece)
            await ClockCycles(dut.clk, rng.choice((1, 1, 5)))
        ring.memory = memory
        ring.publish()
        await bench.until(lambda: ring.has_used)
        ring.poll_used()
        assert back.chains.pop() == (0, readable, writable) and not bench.broken
    asking.cancel()


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def chains_wait_for_room(dut):
    """VIRTIO-RING-21: a port that waits takes segments now and then: its queue is asked anew again and again, its chains come in order."""
    bench = await bench_of(dut)
    bench.latency = lambda: bench.rng.choice((5, 20, 150))
    cocotb.start_soon(random_ready(Stream(dut, "writable__2"), bench.rng, 0.05))
    for features in (INDIRECT, INDIRECT | PACKED):
        ring = await bench.enable(3, 8, features, arrangement="scattered")
        for _ in range(12):
            made = [[(bench.rng.randrange(1 << 40), 64) for _ in range(4)] for _ in range(8)]
            for spans in made:
                ring.add_chain([], spans, direct=0)
                await bench.publish(3, always=True)
                await ClockCycles(dut.clk, bench.rng.choice((1, 20, 100)))
            found = 0
            while found < 8:
                await bench.until(lambda ring=ring: ring.has_used)
                found += len(ring.poll_used())
            assert [writable for _, _, writable in bench.backs[2].chains] == made
            bench.backs[2].chains.clear()
        await bench.reset(3)
    assert not bench.broken


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def one_lap_is_asked_for(dut):
    """VIRTIO-RING-22: of a small packed ring in which nothing is available each descriptor is read once at most after a doorbell (V066)."""
    bench = await bench_of(dut)
    for size in (1, 2, 3, 5):
        await bench.enable(0, size, PACKED)
        first = len(bench.servers[0].log)
        await bench.publish(0, always=True)
        await ClockCycles(dut.clk, 300)
        assert 0 < sum(burst.length_bytes for _, burst, _ in bench.servers[0].log[first:]) <= 16 * size
        await bench.reset(0)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def suspended_in_each_cycle(dut):
    """VIRTIO-RING-23: suspended in any cycle while long lists or many chains are asked for, a ring goes on where it was (V019, V023)."""
    bench = await bench_of(dut)
    bench.latency = lambda: 12
    back, rng = bench.backs[1], bench.rng
    for features, lists, buffers in ((0, 14, 1), (0, 1, 12), (PACKED, 1, 12)):
        ring = await bench.enable(2, 16, features, arrangement="scattered")
        for wait in range(20, 120):
            made = [[(rng.randrange(1 << 40), 64) for _ in range(buffers)] for _ in range(lists)]
            for spans in made:
                ring.add_chain(spans)
            await bench.publish(2)
            await ClockCycles(dut.clk, wait)
            dut.suspend.value = 2
            await bench.until(lambda: int(dut.suspended.value) == 2, 600)
            dut.suspend.value = 0
            found = 0
            while found < lists:
                await bench.until(lambda ring=ring: ring.has_used)
                found += len(ring.poll_used())
            assert [readable for _, readable, _ in back.chains] == made and not bench.broken
            back.chains.clear()
        await bench.reset(2)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def packets_are_shown_at_once(dut):
    """VIRTIO-RING-24: whatever write the driver looks after, it sees all chains of a packet or none, on both kinds of rings (V155)."""
    bench = await bench_of(dut)
    memory, rng, kept = bench.memory, bench.rng, 0
    write, ends, found = memory.write, [], []

    def goes_on():
        ends.append(len(ends) % 6 != 5 and rng.random() < 0.7)
        return ends[-1]

    def seen(address, data, **options):
        nonlocal kept
        write(address, data, **options)
        found.extend(bench.rings[3].poll_used())
        kept += len(found) < len(ends)
        assert not found or not ends[len(found) - 1], f"{len(found)} chains are shown of {ends}"

    bench.backs[2].goes_on = goes_on
    for features in (0, IN_ORDER, PACKED, PACKED | IN_ORDER):
        ring = await bench.enable(3, 8, features)
        ends.clear()
        found.clear()
        for n in range(1, 21):
            for _ in range(6):
                ring.add_chain([], [(0x5000, 64)])
            await bench.publish(3, always=True)
            memory.write = seen
            await bench.until(lambda n=n: len(found) == 6 * n)
            memory.write = write
        await bench.reset(3)
    assert kept and not bench.broken
