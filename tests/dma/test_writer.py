"""Writer: memory afterwards is what the packets and lists say, guard bytes included."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.memory import GuestMemory
from ringwall.rtl.dma.layouts import ChainBeat, Segment, WriterDone
from ringwall.rtl.dma.writer import Writer
from ringwall.rtl.tlp.layouts import Burst, BurstDone, BurstStatus, Hint
from ringwall.sim.burst_bus import BurstMemory
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, pack, random_ready, start, unpack


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_writer(request, width):
    run(Writer(width=width, function=1, client=2), module=__name__, node=request.node.nodeid, params={"width": width})


def test_parameters_are_checked():
    """DMA-WRITE-6: parameters outside their ranges are refused with a sentence."""
    for bad in ({"width": 32}, {"function": -1}, {"client": 64}, {"max_burst": 100}, {"buffer_bytes": 512}):
        with pytest.raises(ValueError, match=r"must .*, not"):
            Writer(**{"width": 64, "function": 0, "client": 0} | bad)


def packet(width, content, status=BurstStatus.OK):
    """Return the ChainBeat payloads of ``content``, the last with ``status``; an empty one has one beat."""
    lanes, layout = width // 8, ChainBeat(width)
    cuts = range(0, max(len(content), 1), lanes)
    return [
        pack(layout, data=int.from_bytes(content[n : n + lanes], "little"), byte_count=len(content[n : n + lanes]),
             first=n == 0, last=n + lanes >= len(content), status=status if n + lanes >= len(content) else BurstStatus.OK)
        for n in cuts
    ]


class Bench:
    def __init__(self, dut, **options):
        self.dut, self.options = dut, options

    async def begin(self):
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.width = params()["width"]
        self.memory = GuestMemory()
        names = ("segments", "i", "bursts", "write_data", "write_done", "done")
        self.segments, self.i, bursts, data, ends, self.done = await start(self.dut, *names)
        self.server = BurstMemory(
            self.memory, width=self.width, bursts=bursts, write_data=data, write_done=ends, **self.options).start()

    async def give_list(self, segments):
        await self.segments.put_many(
            pack(Segment, address=a, length_bytes=n, last=k == len(segments) - 1) for k, (a, n) in enumerate(segments))

    async def give_packet(self, content, gaps=None):
        await self.i.put_many(packet(self.width, content), gaps)

    async def ended(self):
        done = unpack(WriterDone, await self.done.get())
        return done.length_bytes, done.status


@cocotb.test(timeout_time=8, timeout_unit="ms")
async def memory_is_what_the_packets_say(dut):
    """DMA-WRITE-1: random lists and packets, exact, short and long (R12, R14): memory, guards and byte counts agree."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = Bench(dut, latency=lambda: 1)
    await bench.begin()
    expected = GuestMemory()
    jobs, place = [], 0x10000
    for _ in range(50):
        segments = []
        for _ in range(rng.choice([1, 1, 2, 3, 6])):
            length = rng.choice([0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 512, rng.randrange(1, 6000)])
            place += rng.randrange(0, 200)
            segments.append((place, length))
            place += length
        size = sum(length for _, length in segments)
        content = rng.randbytes(max(0, size + rng.choice([0, 0, 0, -1, 1, -size, 200, -rng.randrange(size + 1)])))
        at = 0
        for address, length in segments:
            expected.write(address, content[at : at + length])
            at += length
        jobs.append((segments, content, min(size, len(content))))

    async def lists():
        for segments, _, _ in jobs:
            await bench.give_list(segments)

    async def packets():
        for _, content, _ in jobs:
            await bench.give_packet(content, lambda: rng.choice([0, 0, 0, 2]))

    cocotb.start_soon(lists())
    cocotb.start_soon(packets())
    for n, (_, _, written) in enumerate(jobs):
        assert await bench.ended() == (written, BurstStatus.OK), f"list {n}: {jobs[n][0]}"
    assert bench.memory.read(0, place + 4096) == expected.read(0, place + 4096)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def failures_are_counted_up_to_the_first(dut):
    """DMA-WRITE-2: a failed burst gives its status and the bytes in front of it; failed shows it; the next list is OK."""
    bad = {}
    bench = Bench(dut, status=lambda burst: bad.get(burst.address, BurstStatus.OK))
    await bench.begin()
    for n, status in enumerate(s for s in BurstStatus if s != BurstStatus.OK):
        base = 0x100000 * (n + 1)
        bad.clear()
        bad[base + 0x1000] = status
        cocotb.start_soon(bench.give_list([(base + 0x800, 0x2000), (base + 0x8000, 10)]))
        cocotb.start_soon(bench.give_packet(bytes(range(256)) * 32 + b"0123456789"))
        while not dut.failed.value:
            await RisingEdge(dut.clk)
        assert await bench.ended() == (0x800, status)
        await bench.give_list([(base, 5)])
        await bench.give_packet(b"hello")
        assert await bench.ended() == (5, BurstStatus.OK)
        assert bench.memory.read(base, 5) == b"hello"


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def full_rate_at_any_alignment(dut):
    """DMA-WRITE-3: rows come at one per cycle at any alignment; data is complete when its burst is offered."""
    bench = Bench(dut)
    await bench.begin()
    content, lanes = bench.rng.randbytes(16384), bench.width // 8
    rows, cycles = [], []
    cocotb.start_soon(bench.server.write_data.watch(rows, cycles))
    for offset in (0, 1, lanes - 1):
        cycles.clear()
        cocotb.start_soon(bench.give_list([(0x40000 + offset, len(content))]))
        cocotb.start_soon(bench.give_packet(content))
        assert await bench.ended() == (len(content), BurstStatus.OK)
        assert bench.memory.read(0x40000 + offset, len(content)) == content
        taken = cycles[-1] - cycles[0] + 1
        bursts = 16384 // 512 + 1
        dut._log.info("offset %d: %d rows in %d cycles", offset, len(cycles), taken)
        assert taken <= 16384 // lanes + 4 * bursts  # the server takes 3 cycles between bursts


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def settled_means_answered(dut):
    """DMA-WRITE-4: settled is low while a burst is unanswered and high when only a partial burst waits for bytes."""
    bench = Bench(dut)
    await bench.begin()
    lanes = bench.width // 8
    cocotb.start_soon(bench.give_list([(0x7000, 1024), (0x9000, 1)]))
    beats = packet(bench.width, bytes(1024) + b"!")
    await bench.i.put_many(beats[:-1])
    await RisingEdge(dut.clk)
    while not dut.settled.value:
        await RisingEdge(dut.clk)
    assert len(bench.server.log) == 2 and not bench.server.writes
    await bench.i.put_many(beats[-1:])
    await ClockCycles(dut.clk, 2)
    assert not dut.settled.value
    assert await bench.ended() == (1025, BurstStatus.OK)
    await bench.give_list([(0x7000, 4 * lanes)])  # the status byte shares the data's burst: it must settle all the same
    beats = packet(bench.width, bytes(4 * lanes - 1))
    await bench.i.put_many(beats[:-1])
    for _ in range(50):
        await RisingEdge(dut.clk)
    assert dut.settled.value
    await bench.i.put_many(beats[-1:])
    assert await bench.ended() == (4 * lanes - 1, BurstStatus.OK)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def stop_empties_it(dut):
    """DMA-WRITE-5: stop in the middle of lists ends in stopped with nothing left; the next list is whole."""
    bench = Bench(dut)
    await bench.begin()
    cocotb.start_soon(random_ready(bench.done, bench.rng))
    for round_number in range(8):
        a = cocotb.start_soon(bench.give_list([(0x40003, 3000), (0x80001, 2000)]))
        b = cocotb.start_soon(bench.give_packet(bytes(5000)))
        await ClockCycles(dut.clk, bench.rng.randrange(1, 400))
        dut.stop.value = 1
        await ClockCycles(dut.clk, 2)
        while not (dut.stopped.value and a.done() and b.done()):
            await RisingEdge(dut.clk)
        dut.stop.value = 0
        ends = []
        watching = cocotb.start_soon(bench.done.watch(ends))
        await bench.give_list([(0x100000 + round_number, 77)])
        await bench.give_packet(bytes(range(77)))
        while not ends:
            await RisingEdge(dut.clk)
        watching.cancel()
        done = unpack(WriterDone, ends[0])
        assert (done.length_bytes, done.status) == (77, BurstStatus.OK)
        assert bench.memory.read(0x100000 + round_number, 77) == bytes(range(77))


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def hints_go_in_front(dut):
    """DMA-WRITE-7: each page of a segment but its first is hinted once, in order, when the third in front of it begins at the latest,
    no more than three ahead; hints that nobody takes hold up nothing."""
    bench = Bench(dut, latency=lambda: 1)
    await bench.begin()
    rng, hints, told, bursts, times = bench.rng, [], [], [], []
    port = Stream(dut, "hints")
    cocotb.start_soon(port.watch(hints, told))
    cocotb.start_soon(Stream(dut, "bursts").watch(bursts, times))
    for is_taken in (1, 0, 1):
        port.set_ready(is_taken)
        for each in (hints, told, bursts, times):
            each.clear()
        wanted, segments, place = [], [], rng.getrandbits(40) << 12
        for length in (1, 4096, 40000, 4097, 8192, 20000, 1, 13000):
            address = place + rng.choice([0, 1, 4095, rng.randrange(4096)])
            last = address + length - 1 >> 12
            segments.append((address, length))
            wanted += [(page, address >> 12) for page in range((address >> 12) + 1, last + 1)]
            place = last + 2 << 12
        cocotb.start_soon(bench.give_list(segments))
        cocotb.start_soon(bench.give_packet(bytes(sum(length for _, length in segments))))
        assert (await bench.ended())[1] == BurstStatus.OK
        begun = {}
        for burst, at in zip(bursts, times, strict=True):
            begun.setdefault(unpack(Burst, burst).address >> 12, at)
        found = [unpack(Hint, hint) for hint in hints]
        if not is_taken:
            assert not found
            port.set_ready(1)
            await ClockCycles(dut.clk, 10)
            continue
        assert [hint.page for hint in found] == [page for page, _ in wanted]
        assert all(hint.is_write and hint.function == 1 for hint in found)
        for (page, first), at in zip(wanted, told, strict=True):
            assert at < begun[max(first, page - 3)] + 8, "late"
            assert page - 4 < first or at > begun[page - 4] - 8, "early"


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def packets_flow_over_lists(dut):
    """DMA-WRITE-8: with flows, random packets lie over the lists as they come; every list but a packet's last is full and says more."""
    bench = Bench(dut, latency=lambda: 1)
    await bench.begin()
    dut.flows.value = 1
    rng, expected, lists, contents, wanted, place = bench.rng, GuestMemory(), [], [], [], 0x10000
    for _ in range(60):
        content, at, over = rng.randbytes(rng.choice([0, 1, 64, rng.randrange(1, 300), rng.randrange(1, 3000)])), 0, False
        contents.append(content)
        while not over:
            segments, begun = [], at
            for size in (rng.choice([0, 0, 1, 12, 31, 64, rng.randrange(1, 2000)]) for _ in range(rng.choice([1, 1, 2, 3]))):
                place += rng.randrange(0, 100)
                segments.append((place, size))
                expected.write(place, content[at : at + size])
                place, at = place + size, min(at + size, len(content))
            has_bytes = any(size for _, size in segments)  # without bytes it takes no packet
            over = at == len(content) and has_bytes
            lists.append(segments)
            wanted.append((at - begun, at > 0 and not over))

    async def give_lists():
        for segments in lists:
            await bench.give_list(segments)

    async def give_packets():
        for content in contents:
            await bench.give_packet(content, lambda: rng.choice([0, 0, 0, 2]))

    cocotb.start_soon(give_lists())
    cocotb.start_soon(give_packets())
    for n, (written, more) in enumerate(wanted):
        done = unpack(WriterDone, await bench.done.get())
        assert (done.length_bytes, done.status, done.more) == (written, BurstStatus.OK, more), f"list {n}: {lists[n]}"
    assert bench.memory.read(0, place + 4096) == expected.read(0, place + 4096)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def what_a_packet_tells_of_is_no_failure(dut):
    """DMA-WRITE-9 (R18): a failure that the last beat tells of leaves ``done`` OK, with the bytes in front of it; one behind that, or that
    nothing tells of, does not. ``failed`` is never that of a list before."""
    bad = {}
    bench = Bench(dut, status=lambda burst: bad.get(burst.address, BurstStatus.OK))
    await bench.begin()
    lanes = bench.width // 8
    for status in (s for s in BurstStatus if s != BurstStatus.OK):
        for is_told, last_fails in ((True, False), (True, True), (False, False), (False, True)):
            bad.clear()
            bad.update({0x10200: status, **({0x20000: BurstStatus.UR} if last_fails else {})})
            beats = packet(bench.width, bytes(1024) + b"!", BurstStatus.CA if is_told else BurstStatus.OK)
            cocotb.start_soon(bench.give_list([(0x10000, 1024), (0x20000, 1)]))
            await bench.i.put_many(beats[:-1])
            while not dut.settled.value:
                await RisingEdge(dut.clk)
            assert dut.failed.value == 1
            await bench.i.put_many(beats[-1:])
            cocotb.start_soon(bench.give_list([(0x30000, lanes + 1)]))  # the next list is there before the end of this one is taken
            await bench.i.put_many(packet(bench.width, bytes(lanes + 1))[:-1])
            for _ in range(60):
                await RisingEdge(dut.clk)
                assert not (dut.settled.value and dut.failed.value)
            wanted = BurstStatus.UR if last_fails and is_told else BurstStatus.OK if is_told else status
            assert await bench.ended() == (512, wanted)
            while not dut.settled.value:
                await RisingEdge(dut.clk)
            assert dut.failed.value == 0
            await bench.i.put_many(packet(bench.width, bytes(lanes + 1))[-1:])
            assert await bench.ended() == (lanes + 1, BurstStatus.OK)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def assured_by_what_has_passed(dut):
    """DMA-WRITE-10 (R18): assured is high when all bursts have passed; not while one may be refused, or a list before has not ended."""
    segments, i, bursts, data, ends, done = await start(dut, "segments", "i", "bursts", "write_data", "write_done", "done")
    width, rng, issued = params()["width"], random.Random(cocotb.RANDOM_SEED), []
    cocotb.start_soon(bursts.watch(issued))
    bursts.set_ready(1)
    data.set_ready(1)

    async def give(address, size):
        """Give a list of ``size`` bytes and a last one apart, all but that; return the beat that is left, and the bursts."""
        issued.clear()
        parts = [pack(Segment, address=a, length_bytes=n, last=n == 1) for a, n in ((address, size), (0x9000, 1))]
        cocotb.start_soon(segments.put_many(parts))
        beats = packet(width, bytes(size) + b"!")
        await i.put_many(beats[:-1])
        while len(issued) < size // 512:
            await RisingEdge(dut.clk)
        return beats[-1:]

    async def passes(count):
        """Let so many bursts pass; assured may rise behind the last alone."""
        for _ in range(count):
            for _ in range(rng.randrange(1, 20)):
                await RisingEdge(dut.clk)
                assert not dut.assured.value
            dut.passed.value = 1
            await RisingEdge(dut.clk)
            dut.passed.value = 0
        await ClockCycles(dut.clk, 2)

    async def answer(*statuses):
        await ends.put_many([pack(BurstDone, status=status) for status in statuses])

    for _ in range(3):
        last = await give(0x4000, 2048)
        await passes(4)
        assert dut.assured.value and not dut.settled.value
        await i.put_many(last)
        while len(issued) < 5:
            await RisingEdge(dut.clk)
        await passes(1)
        second = await give(0x6000, 1024)
        await passes(2)
        for _ in range(20):  # the end of the list before is not there
            await RisingEdge(dut.clk)
            assert not dut.assured.value
        await answer(*[BurstStatus.OK] * 5)
        assert unpack(WriterDone, await done.get()).length_bytes == 2049
        await ClockCycles(dut.clk, 4)
        assert dut.assured.value and not dut.settled.value and not dut.failed.value
        # One that is refused never passes: what is known of it comes with the answers.
        await i.put_many(second)
        await answer(*[BurstStatus.OK] * 3)
        assert unpack(WriterDone, await done.get()).length_bytes == 1025
        last = await give(0x4000, 2048)
        await passes(3)
        await answer(BurstStatus.OK, BurstStatus.FAULT, BurstStatus.OK)
        for _ in range(20):
            await RisingEdge(dut.clk)
            assert not dut.assured.value
        await answer(BurstStatus.OK)
        await ClockCycles(dut.clk, 6)
        assert dut.assured.value and dut.settled.value and dut.failed.value
        await i.put_many(last)
        await answer(BurstStatus.OK)
        assert unpack(WriterDone, await done.get()).status == BurstStatus.FAULT
