"""Reader: the packed packets are the bytes of the lists, whatever the alignment, latency and back-pressure."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.memory import GuestMemory
from ringwall.rtl.dma.layouts import ChainBeat, Segment
from ringwall.rtl.dma.reader import Reader
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.burst_bus import BurstMemory
from ringwall.sim.run import params, run
from ringwall.sim.stream import pack, random_ready, start, unpack


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_reader(request, width):
    run(Reader(width=width, function=1, client=2), module=__name__, node=request.node.nodeid, params={"width": width})


def test_parameters_are_checked():
    """DMA-READ-5: widths, functions and clients outside their ranges are refused with a sentence."""
    for bad in ({"width": 32}, {"function": 256}, {"client": 64}, {"max_burst": 100}):
        with pytest.raises(ValueError, match=r"must be .*, not"):
            Reader(**{"width": 64, "function": 0, "client": 0} | bad)


def random_list(rng):
    segments = []
    for _ in range(rng.choice([1, 1, 2, 3, 7])):
        length = rng.choice([0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 512, rng.randrange(1, 9000)])
        segments.append((rng.getrandbits(30) << 12 | rng.randrange(4096), length))
    return segments


class Bench:
    def __init__(self, dut, **options):
        self.dut, self.options = dut, options

    async def begin(self):
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.width = params()["width"]
        self.memory = GuestMemory()
        self.segments, bursts, data, self.o = await start(self.dut, "segments", "bursts", "read_data", "o")
        self.server = BurstMemory(self.memory, width=self.width, bursts=bursts, read_data=data, **self.options).start()
        self.beats, self.cycles = [], []
        cocotb.start_soon(self.o.watch(self.beats, self.cycles))

    def fill(self, segments):
        for address, length in segments:
            self.memory.write(address, self.rng.randbytes(length))

    def expected(self, segments):
        return b"".join(self.memory.read(address, length) for address, length in segments)

    async def give(self, segments):
        await self.segments.put_many(
            pack(Segment, address=a, length_bytes=n, last=k == len(segments) - 1) for k, (a, n) in enumerate(segments))

    async def packets(self, count):
        """Return the next ``count`` packets as (bytes, status), having checked their form."""
        lanes, layout, found, content = self.width // 8, ChainBeat(self.width), [], b""
        at_start = True
        while True:
            for payload in self.beats:
                beat = unpack(layout, payload)
                assert beat.first == at_start
                assert beat.last or beat.byte_count == lanes, "only the last beat may be partial"
                content += beat.data.to_bytes(lanes, "little")[: beat.byte_count]
                at_start = bool(beat.last)
                if beat.last:
                    found.append((content, beat.status))
                    content = b""
            self.beats.clear()
            if len(found) >= count:
                return found
            await RisingEdge(self.dut.clk)


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def packets_are_the_lists(dut):
    """DMA-READ-1: random lists (R12, R14) with latency, gaps and back-pressure come out byte for byte, packed, in order."""
    bench = Bench(dut, latency=lambda: rng.randrange(1, 60), gaps=lambda: rng.choice([0, 0, 0, 1]))
    rng = random.Random(cocotb.RANDOM_SEED)
    await bench.begin()
    cocotb.start_soon(random_ready(bench.o, rng, 0.8))
    lists = [random_list(rng) for _ in range(40)]
    for segments in lists:
        bench.fill(segments)
    expected = [bench.expected(segments) for segments in lists]

    async def feed():
        for segments in lists:
            await bench.give(segments)

    cocotb.start_soon(feed())
    for n, (content, status) in enumerate(await bench.packets(len(lists))):
        assert status == BurstStatus.OK
        assert content == expected[n], f"list {n}: {lists[n]}"


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def errors_end_one_packet(dut):
    """DMA-READ-2: each error status ends its packet once, drops the list's rest, and the next list is whole."""
    bad = {}
    bench = Bench(dut, status=lambda burst: bad.get(burst.address, BurstStatus.OK))
    await bench.begin()
    bench.o.set_ready(1)
    lists, wrong = [], []
    for n, status in enumerate(s for s in BurstStatus if s != BurstStatus.OK):
        broken = [(0x10000 * (n + 1) + k * 0x1000 + n, 700 + k) for k in range(3)]
        bad[broken[n % 3][0]] = status
        good = [(0x900000 + 0x1000 * n + 5, 1000 + n)]
        lists += [broken, good]
        wrong.append(status)
    for segments in lists:
        bench.fill(segments)
        await bench.give(segments)
    packets = await bench.packets(len(lists))
    assert [status for _, status in packets[::2]] == wrong
    for (content, status), segments in zip(packets[1::2], lists[1::2]):
        assert (content, status) == (bench.expected(segments), BurstStatus.OK)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def a_failed_list_ends_behind_its_last_read(dut):
    """DMA-READ-6: once the packet of a failed list has ended [VIRTIO1.4 2.7.8], no read of the list is to come."""
    bench = Bench(dut, latency=lambda: 30, status=lambda burst: BurstStatus.FAULT if burst.address in bad else BurstStatus.OK)
    await bench.begin()
    bench.o.set_ready(1)
    for failing in ([0], [2], [0, 3], [6]):
        segments = [(0x10000 * n + 5, 40 if n == 0 else 9000) for n in range(7)]
        bad = {segments[n][0] for n in failing}
        bench.fill(segments)
        bench.server.log.clear()
        feeding = cocotb.start_soon(bench.give(segments))
        (content, status), = await bench.packets(1)
        assert status == BurstStatus.FAULT
        assert bench.expected(segments[: failing[0]]) == content
        assert feeding.done() and not bench.server.reads
        served = len(bench.server.log)
        assert served == 1 + 6 * 3
        await ClockCycles(dut.clk, 300)
        assert len(bench.server.log) == served


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def full_rate_at_any_alignment(dut):
    """DMA-READ-3: unaligned 16 KiB segments come at one beat per cycle once the first data is there."""
    bench = Bench(dut, latency=lambda: 1)
    await bench.begin()
    bench.o.set_ready(1)
    for offset in (0, 1, bench.width // 8 - 1):
        segments = [(0x40000 + offset, 16384)]
        bench.fill(segments)
        bench.cycles.clear()
        await bench.give(segments)
        ((content, _),) = await bench.packets(1)
        assert content == bench.expected(segments)
        beats, pages = 16384 * 8 // bench.width, 5
        taken = bench.cycles[-1] - bench.cycles[0] + 1
        dut._log.info("offset %d: %d beats in %d cycles", offset, beats, taken)
        assert taken <= beats + 2 * pages, f"{taken} cycles for {beats} beats"  # the server idles a cycle between bursts


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def stop_empties_it(dut):
    """DMA-READ-4: stop in the middle of lists, or with a burst that nobody takes yet, ends in stopped with nothing left; the next list is
    whole."""
    bench = Bench(dut, latency=lambda: 50)
    await bench.begin()
    bench.o.set_ready(1)
    for round_number in range(6):
        segments = [(0x100000 + 3, 5000), (0x200001, 9000)][: 1 + round_number % 2]
        bench.fill(segments)
        bench.server.bursts.set_ready(round_number % 2)
        feeding = cocotb.start_soon(bench.give(segments))
        await ClockCycles(dut.clk, bench.rng.randrange(1, 200))
        dut.stop.value = 1
        await ClockCycles(dut.clk, 8)
        bench.server.bursts.set_ready(1)
        while not dut.stopped.value:
            await RisingEdge(dut.clk)
        assert feeding.done() and not bench.server.reads
        dut.stop.value = 0
        bench.beats.clear()
        good = [(0x300000 + round_number, 333)]
        bench.fill(good)
        await bench.give(good)
        assert await bench.packets(1) == [(bench.expected(good), BurstStatus.OK)]
