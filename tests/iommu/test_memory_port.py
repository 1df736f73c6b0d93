"""The memory port between random readers and writers and a memory behind bursts; each byte is compared."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.memory import GuestMemory
from ringwall.rtl.iommu.layouts import MemoryRead, MemoryReadData, MemoryUpdate, MemoryWrite, MemoryWriteDone
from ringwall.rtl.iommu.memory_port import MemoryPort
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.sim.burst_bus import BurstMemory
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, random_ready, start, unpack

READERS, WRITERS = 2, 3
TESTS = ["reads_and_writes_move_their_bytes", "reads_are_issued_every_cycle", "a_write_that_hangs_holds_up_no_read"]


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_memory_port(request, width):
    updates = width in (64, 256)
    run(MemoryPort(width=width, readers=READERS, writers=WRITERS, updaters=range(READERS) if updates else ()), module=__name__,
        node=request.node.nodeid, params={"width": width, "updates": updates},
        testcase=[*TESTS, *(["updates_are_done"] if updates else [])])  # fmt: skip


def test_memory_port_parameters():
    """IOMMU-MEM-1: parameters out of range are refused with a sentence."""
    for bad, message in (({"width": 32}, "Width must be 64, 128, 256 or 512 bits, not 32"),
                         ({"width": 64, "readers": 0}, "Readers .*not 0"), ({"width": 64, "writers": 17}, "Writers .*not 17"),
                         ({"width": 64, "client": 64}, "Client .*not 64"),
                         ({"width": 64, "updaters": (1,)}, r"Updaters .*not \(1,\)")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            MemoryPort(**bad)


class Bench:
    """Streams of readers and writers, and the memory. ``status(burst)`` is how a burst ends."""

    def __init__(self, dut, rng, status=lambda burst: BurstStatus.OK, latency=None):
        self.dut, self.rng, self.status, self.latency = dut, rng, status, latency or (lambda: rng.randrange(5, 60))
        self.got = [[] for _ in range(READERS)]
        self.done = [[] for _ in range(WRITERS)]

    async def begin(self, gaps=None):
        dut = self.dut
        await start(dut)
        self.memory = GuestMemory()
        self.pattern = self.rng.randbytes(1 << 14)
        self.memory.write(0, self.pattern)
        self.read = [Stream(dut, f"read__{n}") for n in range(READERS)]
        self.read_data = [Stream(dut, f"read_data__{n}") for n in range(READERS)]
        self.write = [Stream(dut, f"write__{n}") for n in range(WRITERS)]
        self.write_done = [Stream(dut, f"write_done__{n}") for n in range(WRITERS)]
        for streams, seen in ((self.read_data, self.got), (self.write_done, self.done)):
            for stream, items in zip(streams, seen):
                stream.set_ready(1)
                cocotb.start_soon(stream.watch(items))
        self.bursts, self.arrivals = Stream(dut, "bursts"), []
        cocotb.start_soon(self.bursts.watch([], self.arrivals))
        self.host = BurstMemory(self.memory, width=params()["width"], bursts=self.bursts, read_data=Stream(dut, "burst_read_data"),
                                write_data=Stream(dut, "burst_write_data"), write_done=Stream(dut, "burst_done"), ordered=False,
                                operands=Stream(dut, "operands") if params()["updates"] else None,
                                status=self.status, latency=self.latency, gaps=gaps).start()  # fmt: skip
        return self

    async def wait(self, condition, what, cycles=20000):
        for _ in range(cycles):
            if condition():
                return
            await RisingEdge(self.dut.clk)
        raise AssertionError(f"waited {cycles} cycles for {what}")

    def reads(self, number):
        """Return the reads that ended, by cookie: ``(status, words)``; items of two reads do not mix."""
        out, words = {}, []
        for payload in self.got[number]:
            item = unpack(MemoryReadData, payload)
            if words:
                assert item.cookie == words[0].cookie, "words of two reads are mixed"
            words.append(item)
            if item.last:
                assert item.cookie not in out
                out[item.cookie] = (item.status, [w.data for w in words])
                words = []
        assert not words
        return out


def write_beats(address, content, cookie):
    """Return the payloads of one write."""
    rows = [content[at : at + 8] for at in range(0, len(content), 8)]
    return [pack(MemoryWrite, address=address, length_bytes=len(content), cookie=cookie, data=int.from_bytes(row, "little"),
                 last=n == len(rows) - 1) for n, row in enumerate(rows)]  # fmt: skip


def a_place(rng):
    """Return address and length of an access of whole words inside one block."""
    begin = rng.randrange(8)
    return 64 * rng.randrange(128) + 8 * begin, 8 * rng.randrange(1, 9 - begin)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def reads_and_writes_move_their_bytes(dut):
    """IOMMU-MEM-2: random accesses of all readers and writers with errors: each answered once to who asked, all bytes compared."""
    rng = random.Random(cocotb.RANDOM_SEED)
    fate = {}

    def status(burst):
        assert burst.is_wall and burst.verdict == BurstStatus.OK
        assert burst.function == 0 and burst.client == 0 and not burst.relaxed_ordering
        return fate.setdefault((burst.is_write, burst.cookie), rng.choice([BurstStatus.OK] * 6 + [BurstStatus.UR, BurstStatus.TIMEOUT]))

    bench = await Bench(dut, rng, status).begin(lambda: rng.choice([0, 0, 3]))
    cocotb.start_soon(random_ready(bench.bursts, rng, 0.8))
    for stream in bench.read_data + bench.write_done:
        cocotb.start_soon(random_ready(stream, rng, 0.6))
    asked = [[a_place(rng) for _ in range(100)] for _ in range(READERS)]
    for n in range(READERS):
        payloads = [pack(MemoryRead, address=a, length_bytes=b, cookie=k) for k, (a, b) in enumerate(asked[n])]
        cocotb.start_soon(bench.read[n].put_many(payloads, lambda: rng.randrange(4)))
    written, beats = [[] for _ in range(WRITERS)], [[] for _ in range(WRITERS)]
    for n in range(WRITERS):
        for k in range(50):
            base = 0x100000 + 0x10000 * n + 128 * k
            address, length = (base + 4 * rng.randrange(16), 4) if rng.random() < 0.4 else a_place(rng)
            if length != 4:
                address = base + address % 64
            written[n].append((address, rng.randbytes(length)))
            beats[n] += write_beats(*written[n][-1], k)
        cocotb.start_soon(bench.write[n].put_many(beats[n], lambda: rng.randrange(4)))
    await bench.wait(lambda: sum(map(len, bench.done)) == 50 * WRITERS and len(bench.host.log) == 50 * WRITERS + 100 * READERS, "the end")
    await ClockCycles(dut.clk, 100)
    for n in range(READERS):
        found = bench.reads(n)
        assert sorted(found) == list(range(100))
        for k, (address, length) in enumerate(asked[n]):
            status, words = found[k]
            assert status == fate[0, n << 8 | k]
            if status == BurstStatus.OK:
                assert b"".join(w.to_bytes(8, "little") for w in words) == bench.pattern[address : address + length]
            else:
                assert len(words) == 1
    for n in range(WRITERS):
        ends = [unpack(MemoryWriteDone, payload) for payload in bench.done[n]]
        assert [(e.cookie, e.status) for e in ends] == [(k, fate[1, n << 8 | k]) for k in range(50)]
        model = GuestMemory()
        for k, (address, content) in enumerate(written[n]):
            if ends[k].status == BurstStatus.OK:
                model.write(address, content)
        assert bench.memory.read(0x100000 + 0x10000 * n, 0x2000) == model.read(0x100000 + 0x10000 * n, 0x2000), "also around the writes"
    assert bench.memory.read(0, len(bench.pattern)) == bench.pattern
    assert {BurstStatus.UR, BurstStatus.TIMEOUT} <= set(fate.values())


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def reads_are_issued_every_cycle(dut):
    """IOMMU-MEM-3: two readers together issue one read per cycle, 8 bytes each come back at one per cycle."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng, latency=lambda: 40).begin()
    begin = cycle()
    for n in range(READERS):
        cocotb.start_soon(bench.read[n].put_many([pack(MemoryRead, address=64 * k + 8 * n, length_bytes=8, cookie=k) for k in range(100)]))
    await bench.wait(lambda: sum(map(len, bench.got)) == 200, "all reads", 600)
    assert bench.arrivals[-1] - bench.arrivals[0] == 199
    assert cycle() - begin <= 200 + 40 + 60, f"{cycle() - begin} cycles"
    for n in range(READERS):
        found = bench.reads(n)
        assert all(found[k][1][0].to_bytes(8, "little") == bench.pattern[64 * k + 8 * n :][:8] for k in range(100))


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def a_write_that_hangs_holds_up_no_read(dut):
    """IOMMU-MEM-4: while nobody takes the data of a write, reads go out and come back."""
    rng = random.Random(cocotb.RANDOM_SEED)
    bench = await Bench(dut, rng, latency=lambda: 10).begin()
    bench.host.writes = type("Nothing", (list,), {"__bool__": lambda self: False})()
    cocotb.start_soon(bench.write[0].put_many(write_beats(0x1000, bytes(64), 1)))
    await ClockCycles(dut.clk, 20)
    for k in range(20):
        await bench.read[0].put(pack(MemoryRead, address=8 * k, length_bytes=8, cookie=k))
    await bench.wait(lambda: len(bench.got[0]) == 20, "reads", 200)
    assert not bench.done[0]


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def updates_are_done(dut):
    """IOMMU-MEM-5: updates of two readers between reads and writes, some failing: each a CAS with both operands, answered once to its
    reader with what was there."""
    rng = random.Random(cocotb.RANDOM_SEED)
    fate = {}

    def status(burst):
        assert burst.is_wall and burst.function == 0 and burst.client == 0
        return fate.setdefault((burst.is_write, burst.cookie), rng.choice([BurstStatus.OK] * 4 + [BurstStatus.UR, BurstStatus.REFUSED]))

    bench = await Bench(dut, rng, status).begin(lambda: rng.choice([0, 0, 3]))
    for stream in (bench.bursts, bench.host.operands, *bench.read_data):
        cocotb.start_soon(random_ready(stream, rng, 0.6))
    reads = [pack(MemoryRead, address=8 * k, length_bytes=8, cookie=k) for k in range(60)]
    for n in range(READERS):
        cocotb.start_soon(bench.read[n].put_many(reads, lambda: rng.randrange(4)))
    beats = [beat for k in range(30) for beat in write_beats(0x100000 + 64 * k, rng.randbytes(8), k)]
    cocotb.start_soon(bench.write[1].put_many(beats, lambda: rng.randrange(6)))
    wanted, updates = {}, [[] for _ in range(READERS)]
    for k in range(100, 160):
        address, swap = 0x1000 + 8 * k, rng.randbytes(8)
        old = bench.pattern[address : address + 8]
        compare = old if rng.random() < 0.7 else bytes([old[0] ^ 1 << rng.randrange(8)]) + old[1:]
        wanted[k] = address, old, swap if compare == old else old
        operands = {"compare": int.from_bytes(compare, "little"), "swap": int.from_bytes(swap, "little")}
        updates[k % READERS].append(pack(MemoryUpdate, address=address, cookie=k, **operands))
    for n in range(READERS):
        cocotb.start_soon(Stream(dut, f"update__{n}").put_many(updates[n], lambda: rng.randrange(4)))
    await bench.wait(lambda: len(bench.host.log) == 30 + 60 * READERS + 60, "the end")
    await ClockCycles(dut.clk, 100)
    found = [bench.reads(n) for n in range(READERS)]
    assert all(sorted(found[n]) == [*range(60), *range(100 + n, 160, READERS)] for n in range(READERS))
    for k, (address, old, new) in wanted.items():
        end, words = found[k % READERS][k]
        assert end == fate[0, k % READERS << 8 | k] and len(words) == 1
        assert end != BurstStatus.OK or words[0].to_bytes(8, "little") == old
        assert bench.memory.read(address, 8) == (new if end == BurstStatus.OK else old)
