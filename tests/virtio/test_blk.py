"""Blk: answers of the back end, request by request, against a plain reading of the specification."""

import random
import struct

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.dma.layouts import ChainBeat
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.virtio.blk import Blk, Extent
from ringwall.rtl.virtio.blk_device import BlkDevice
from ringwall.rtl.virtio.layouts import Chain, ConfigWrite
from ringwall.rtl.virtio.store import RowData, RowWrite, Store
from ringwall.sim.back_end import beats_of
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, pack, random_ready, start, unpack

SECTORS = 64
IN, OUT, FLUSH, GET_ID, DISCARD, SECURE_ERASE, WRITE_ZEROES = 0, 1, 4, 8, 11, 14, 13
OK, IOERR, UNSUPP = 0, 1, 2
SERIAL = b"disk-of-the-test"
DISCARDS, ZEROES = (20, 3), (8, 5)  # most sectors of a segment, most segments
ALL = BlkDevice(capacity_sectors=SECTORS, serial=SERIAL, queues=3, size_max=0x1234_5678, seg_max=0x7E, block_bytes=4096,
                topology=(3, 1, 0x0102, 0x0304_0506), has_cache_control=True, max_discard_sectors=DISCARDS[0],
                max_discard_segments=DISCARDS[1], discard_alignment=8, max_zero_sectors=ZEROES[0], max_zero_segments=ZEROES[1])  # fmt: skip
PLAIN = BlkDevice(capacity_sectors=SECTORS, serial=SERIAL)
READ_ONLY = BlkDevice(capacity_sectors=SECTORS, serial=SERIAL, is_read_only=True)
OUTSIDE = BlkDevice(capacity_sectors=SECTORS - 5, serial=SERIAL, max_discard_sectors=DISCARDS[0], max_discard_segments=DISCARDS[1],
                    max_zero_sectors=ZEROES[0], max_zero_segments=ZEROES[1])  # fmt: skip
COMMON = ["requests_are_served", "broken_chains_are_answered", "status_waits_for_the_data", "full_rate"]
LIMIT = {"timeout_time": 400, "timeout_unit": "us"}


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_blk(request, width):
    run(Blk(width=width, device=ALL), module=__name__, node=request.node.nodeid, params={"width": width, "capacity": SECTORS, "all": True},
        testcase=[*COMMON, "segments_are_checked", "configuration_is_shown", "suspend_is_told"])  # fmt: skip


@pytest.mark.parametrize("device", [PLAIN, READ_ONLY], ids=["plain", "read_only"])
def test_blk_with_less(request, device):
    run(Blk(width=128, device=device), module=__name__, node=request.node.nodeid,
        params={"width": 128, "capacity": SECTORS, "all": False, "read_only": device.is_read_only}, testcase=["less_is_unsupported"])


@pytest.mark.parametrize("width", [64, 256])
def test_blk_outside(request, width):
    run(Blk(width=width, device=OUTSIDE, has_memory_port=True), module=__name__, node=request.node.nodeid,
        params={"width": width, "capacity": SECTORS - 5, "all": True, "outside": True},
        testcase=["requests_are_served", "segments_are_checked", "memory_may_fail", "stop_waits_for_the_memory", "capacity_changes"])


def test_parameters_are_checked():
    """VIRTIO-BLK-5 (V139): numbers outside their ranges, features that contradict each other, are refused with a sentence."""
    for bad in ({"capacity_sectors": 1}, {"capacity_sectors": (1 << 32) + 1}, {"serial": bytes(21)}, {"queues": 0}, {"queues": 65},
                {"block_bytes": 256}, {"capacity_sectors": 7, "block_bytes": 1024}, {"size_max": 1 << 32}, {"max_discard_segments": 0},
                {"topology": (256, 0, 0, 0)}, {"is_read_only": True, "max_zero_sectors": 1}):  # fmt: skip
        with pytest.raises(ValueError, match=r"must .*, not"):
            BlkDevice(**{"capacity_sectors": 2} | bad)
    with pytest.raises(ValueError, match=r"must .*, not"):
        Blk(width=8)
    with pytest.raises(ValueError, match=r"must .*, not"):
        Store(width=64, depth=1)
    assert BlkDevice().device_features == 1 << 9  # FLUSH always, so also with CONFIG_WCE
    assert ALL.device_features == sum(1 << bit for bit in (1, 2, 6, 9, 10, 11, 12, 13, 14))
    assert READ_ONLY.device_features == 1 << 5 | 1 << 9
    assert (ALL.device_type, ALL.class_code, ALL.config_bytes) == (2, 0x018000, 60)
    assert [port.sizes for port in ALL.ports] == [(256, 256, 256)]


class Outside:
    """A memory behind the port, with a random latency; ``bad``: rows that can be neither read nor written."""

    def __init__(self, bench, streams):
        self.bench, self.rows, self.bad, self.discarded = bench, {}, set(), []
        self.reads, self.answers, self.writes, self.written, self.discards = streams
        self.reading, self.writing = [], []  # what is not answered
        self.is_stuck = False
        for stream in (self.reads, self.writes):
            cocotb.start_soon(random_ready(stream, bench.rng, 0.8))
        for run_it in (self.read(), self.write(), self.discard()):
            cocotb.start_soon(run_it)

    async def rest(self):
        while self.is_stuck:
            await RisingEdge(self.bench.dut.clk)
        for _ in range(self.bench.rng.choice([0, 0, 0, 0, 20])):
            await RisingEdge(self.bench.dut.clk)

    async def read(self):
        cocotb.start_soon(self.reads.watch(self.reading))
        while True:
            while not self.reading:
                await RisingEdge(self.bench.dut.clk)
            row = self.reading[0]
            value = pack(RowData(self.bench.width), data=self.rows.get(row, 0), ok=row not in self.bad)
            await self.rest()
            await self.answers.put(value)
            del self.reading[0]

    async def write(self):
        layout = RowWrite(self.bench.width, (SECTORS - 5) * 4096 // self.bench.width)
        cocotb.start_soon(self.writes.watch(self.writing))
        while True:
            while not self.writing:
                await RisingEdge(self.bench.dut.clk)
            one = unpack(layout, self.writing[0])
            await self.rest()
            if one.row not in self.bad:
                self.rows[one.row] = one.data
            await self.written.put(int(one.row not in self.bad))
            del self.writing[0]

    async def discard(self):
        while True:
            while not self.discards.read_valid():
                await RisingEdge(self.bench.dut.clk)
            await self.rest()
            one = unpack(Extent, await self.discards.get())
            self.discarded.append((one.sector, one.count))
            await RisingEdge(self.bench.dut.clk)  # valid is that of the next one then


class Bench:
    def __init__(self, dut):
        self.dut = dut

    async def begin(self):
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.width, self.capacity = params()["width"], params()["capacity"]
        self.layout = ChainBeat(self.width)
        is_outside = params().get("outside")
        names = ("memory__reads", "memory__rows", "memory__writes", "memory__written", "discards") if is_outside else ()
        self.chains, self.readable, self.writable, *streams = await start(self.dut, "chains__0", "readable__0", "writable__0", *names)
        if is_outside:
            self.memory = Outside(self, streams)
            self.dut.sectors.value = self.capacity
        self.beats, self.cycles, self.told = [], [], []
        cocotb.start_soon(self.writable.watch(self.beats, self.cycles))
        self.dut.assured__0.value = 1

    async def give(self, readable, writable_bytes, status=BurstStatus.OK):
        await self.chains.put(pack(Chain, readable_bytes=len(readable), writable_bytes=writable_bytes))
        if readable:
            await self.readable.put_many(beats_of(self.layout, readable, status=status))

    async def answer(self):
        """Return the bytes of the next packet, having checked its form."""
        content, lanes = b"", self.width // 8
        while True:
            while self.beats:
                beat = unpack(self.layout, self.beats.pop(0))
                assert beat.first == (not content)
                assert beat.last or beat.byte_count == lanes
                content += beat.data.to_bytes(lanes, "little")[: beat.byte_count]
                if beat.last:
                    self.told.append(beat.status != BurstStatus.OK)
                    return content
            await RisingEdge(self.dut.clk)

    async def ask(self, kind, sector, data=b"", writable_bytes=1, status=BurstStatus.OK):
        cocotb.start_soon(self.give(struct.pack("<IIQ", kind, 0, sector) + data, writable_bytes, status))
        return await self.answer()


def segment(sector, count, flags=0):
    """The bytes of one of a DISCARD or WRITE_ZEROES. [VIRTIO1.4 5.2.6]"""
    return struct.pack("<QII", sector, count, flags)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def requests_are_served(dut):
    """VIRTIO-BLK-1 (V024, V145, V148): random requests, good and bad, against a dictionary of sectors."""
    bench = Bench(dut)
    await bench.begin()
    rng, capacity = bench.rng, bench.capacity
    cocotb.start_soon(random_ready(bench.writable, rng, 0.7))
    disk = bytearray(capacity * 512)
    for _ in range(160):
        sector = rng.choice([0, capacity - 1, capacity, rng.randrange(capacity), 1 << 33, (1 << 64) - 1])
        size = rng.choice([0, 512, 1024, 2048, 511, 513, 20])
        good = size % 512 == 0 and sector + size // 512 <= capacity
        kind = rng.choice([IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, WRITE_ZEROES, SECURE_ERASE, 2, 99, 1 << 31])
        if kind == OUT:
            content, extra = rng.randbytes(size), rng.choice([1, 1, 1, 5, 200])
            answer = await bench.ask(OUT, sector, content, extra)
            assert answer == bytes(extra - 1) + bytes([OK if good else IOERR]), (sector, size)
            if good:
                disk[512 * sector : 512 * sector + size] = content
        elif kind == IN:
            answer = await bench.ask(IN, sector, rng.choice([b"", b"surplus"]), size + 1)
            want = disk[512 * sector : 512 * sector + size] + bytes([OK]) if good else bytes(size) + bytes([IOERR])
            assert answer == want, (sector, size)
        elif kind == GET_ID:
            answer = await bench.ask(GET_ID, 0, b"", size + 1)
            assert answer == (SERIAL.ljust(20, b"\0") + bytes(size))[:size] + bytes([OK])
        elif kind in (DISCARD, WRITE_ZEROES):
            count = rng.randrange(ZEROES[0] + 1)
            at = min(sector, capacity - count)
            assert await bench.ask(kind, 0, segment(at, count)) == bytes([OK])
            if kind == WRITE_ZEROES:
                disk[512 * at : 512 * (at + count)] = bytes(512 * count)
        else:
            answer = await bench.ask(kind, sector, b"", size + 1)
            assert answer == bytes(size) + bytes([OK if kind == FLUSH else UNSUPP])
    assert not any(bench.told)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def segments_are_checked(dut):
    """VIRTIO-BLK-6 (V143, V144, V145, V148): segments of DISCARD and WRITE_ZEROES, each good or bad: an unknown flag is UNSUPP whatever the
    others are, beyond the capacity or the limits IOERR; what is zeroed is what the good ones in front say."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    rng, capacity = bench.rng, bench.capacity
    disk, discarded = bytearray((await bench.ask(IN, 0, b"", capacity * 512 + 1))[:-1]), []  # a RAM keeps what a test before left
    for n in range(36 if params().get("outside") else 72):
        if n % 6 == 0:  # something to zero
            sector, content = rng.randrange(capacity - 15), rng.randbytes(16 * 512)
            assert await bench.ask(OUT, sector, content) == bytes([OK])
            disk[512 * sector : 512 * sector + len(content)] = content
        kind = rng.choice([DISCARD, WRITE_ZEROES])
        most_sectors, most = DISCARDS if kind == DISCARD else ZEROES
        count = rng.choice([1, 1, 2, most, most, most + 1, 0])
        data, want, done = b"", OK if 0 < count <= most else IOERR, []
        for _ in range(count):
            sectors, flags = rng.randrange(most_sectors + 1), rng.choice([0, 0, 0, 1]) if kind == WRITE_ZEROES else 0
            sector = rng.randrange(capacity - sectors + 1)
            bad = rng.choice([""] * 12 + ["flag", "unmap", "long", "beyond", "far", "wrap"])
            if bad == "flag":
                flags |= 1 << rng.randrange(1, 32)
            elif bad == "unmap":
                flags |= 1
            elif bad == "long":
                sector, sectors = 0, most_sectors + 1
            elif bad:
                sectors = sectors or 1
                sector = {"beyond": capacity - sectors + 1, "far": 1 << 33, "wrap": (1 << 64) - 1}[bad]
            data += segment(sector, sectors, flags)
            if flags >> 1 or (kind == DISCARD and flags):
                want = UNSUPP
            elif want == OK:
                want = IOERR if bad and bad != "unmap" else OK
                done += [(sector, sectors)] if want == OK else []
        if count and rng.random() < 0.1:  # a part of one
            data, want, done = data + bytes(rng.randrange(1, 16)), UNSUPP if want == UNSUPP else IOERR, []
        assert await bench.ask(kind, 0, data, 3) == bytes([0, 0, want]), (kind, data.hex(" ", 16))
        for sector, sectors in done:
            if kind == WRITE_ZEROES:
                disk[512 * sector : 512 * (sector + sectors)] = bytes(512 * sectors)
            else:
                discarded.append((sector, sectors))
        for status in (BurstStatus.CA,) if n % 10 == 0 else ():
            assert await bench.ask(WRITE_ZEROES, 0, segment(0, 1), status=status) == bytes([IOERR])
        if n % 12 == 11:
            assert await bench.ask(IN, 0, b"", capacity * 512 + 1) == bytes(disk) + bytes([OK])
    if params().get("outside"):
        assert bench.memory.discarded == discarded
    assert await bench.ask(WRITE_ZEROES, 0, segment(0, 1), 0) == b""
    assert await bench.ask(IN, 0, b"", 513) == bytes(disk[:512]) + bytes([OK])


@cocotb.test(**LIMIT)
async def less_is_unsupported(dut):
    """VIRTIO-BLK-7 (V142, V147): what is not offered, zone requests too, is UNSUPP; with RO every write is IOERR and changes nothing."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    for kind in (DISCARD, WRITE_ZEROES, SECURE_ERASE, 10, 15, 16, 18, 20, 22, 24, 26):
        assert await bench.ask(kind, 0, segment(0, 1)) == bytes([UNSUPP])
    for size in (512, 0, 511, 4096):
        assert await bench.ask(OUT, 3, b"\xaa" * size) == bytes([IOERR if params()["read_only"] or size == 511 else OK])
    wrote = bytes if params()["read_only"] else b"\xaa".__mul__
    assert await bench.ask(IN, 3, b"", 4097) == wrote(4096) + bytes([OK])


@cocotb.test(**LIMIT)
async def configuration_is_shown(dut):
    """VIRTIO-BLK-8 (V012, V140, V141): each offered field, the others and padding 0; writeback is what was written, 0 after a stop."""
    bench = Bench(dut)
    await bench.begin()

    async def check(writeback):
        await ClockCycles(dut.clk, 2)
        assert int(dut.config.value).to_bytes(60, "little") == (
            struct.pack("<QIIHBBI", SECTORS, 0x1234_5678, 0x7E, 0, 0, 0, 4096) + struct.pack("<BBHI", 3, 1, 0x0102, 0x0304_0506)
            + struct.pack("<BBH", writeback, 0, 3) + struct.pack("<IIIIIB3x", DISCARDS[0], DISCARDS[1], 8, ZEROES[0], ZEROES[1], 0))

    async def write(word, enable, value):
        dut.config_write.value = pack(ConfigWrite, enable=enable, word=word, data=value)
        await RisingEdge(dut.clk)
        dut.config_write.value = 0

    await check(0)
    for value, seen in ((1, 1), (0, 0), (0xFF, 0), (0xFFFF_FF01, 1)):
        await write(4, 1, value)
        await check(seen)
    for word, enable in ((4, 0xFE), (3, 0xFF), (0, 0xFF), (5, 1), (511, 0xFF)):
        await write(word, enable, 0)
        await check(1)
    dut.stop.value = 1
    await ClockCycles(dut.clk, 3)
    dut.stop.value = 0
    await check(0)
    assert int(dut.config_changed.value) == int(dut.needs_reset.value) == 0


@cocotb.test(**LIMIT)
async def suspend_is_told(dut):
    """VIRTIO-BLK-9 (V023): suspended only when no request is at work; a chain that it has is finished, and then the next, all the same."""
    bench = Bench(dut)
    await bench.begin()
    dut.assured__0.value = 0
    bench.writable.set_ready(1)

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            assert not (dut.suspended.value and dut.chains__0__valid.value)

    cocotb.start_soon(watch())
    asking = cocotb.start_soon(bench.ask(IN, 0, b"", 513))
    await ClockCycles(dut.clk, 100)
    dut.suspend.value = 1
    for _ in range(50):
        await RisingEdge(dut.clk)
        assert not dut.suspended.value
    dut.assured__0.value = 1
    assert (await asking)[-1] == OK
    await ClockCycles(dut.clk, 2)
    assert dut.suspended.value == 1
    assert await bench.ask(FLUSH, 0) == bytes([OK])
    dut.suspend.value = 0
    await ClockCycles(dut.clk, 2)
    assert not dut.suspended.value


@cocotb.test(**LIMIT)
async def broken_chains_are_answered(dut):
    """VIRTIO-BLK-2: short headers, no status byte, failed fetches: an answer of the right length, nothing stored behind the failure."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    for size in (1, 8, 15):
        cocotb.start_soon(bench.give(bytes(size), 3))
        assert await bench.answer() == bytes([0, 0, IOERR])
    cocotb.start_soon(bench.give(b"", 1))
    assert await bench.answer() == bytes([IOERR])
    for kind in (IN, OUT, FLUSH):
        assert await bench.ask(kind, 0, b"", 0) == b""
    assert await bench.ask(OUT, 3, bytes([0xAA]) * 512) == bytes([OK])
    for status in (s for s in BurstStatus if s != BurstStatus.OK):
        assert await bench.ask(OUT, 3, bytes([0xBB]) * 512, status=status) == bytes([IOERR])
        lanes = bench.width // 8  # the beat that could not be fetched
        assert (await bench.ask(IN, 3, b"", 513))[-lanes - 1 :] == bytes([0xAA]) * lanes + bytes([OK])
        assert await bench.ask(OUT, 3, bytes([0xAA]) * 512) == bytes([OK])
        assert await bench.ask(FLUSH, 0, b"", 1, status=status) == bytes([IOERR])


@cocotb.test(**LIMIT)
async def status_waits_for_the_data(dut):
    """VIRTIO-BLK-3: the status of an IN, of a GET_ID, of an OUT with bytes in front of it, is given when its data is assured; it is
    IOERR when a write failed, and the packet says that it tells of it."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    for failed, status in ((0, OK), (1, IOERR), (0, OK)):
        for kind, data, size in ((IN, b"", 513), (GET_ID, b"", 200), (OUT, bytes(512), 200)):
            dut.assured__0.value = 0
            dut.failed__0.value = failed
            asking = cocotb.start_soon(bench.ask(kind, 1, data, size))
            for _ in range(200):
                await RisingEdge(dut.clk)
            assert not asking.done()
            dut.assured__0.value = 1
            assert (await asking)[-1] == status
            assert bench.told.pop() == failed
    dut.assured__0.value, dut.failed__0.value = 0, 1
    assert await bench.ask(FLUSH, 0) == bytes([OK])  # nothing in front of the status: what failed was another's
    assert not bench.told.pop()
    dut.assured__0.value = 1
    assert (await bench.ask(99, 1, b"", 200))[-1] == UNSUPP
    assert bench.told.pop()


@cocotb.test(**LIMIT)
async def full_rate(dut):
    """VIRTIO-BLK-4: 16 KiB in and out at one beat per cycle, the first byte of an answer at most 8 cycles behind the header; a row of
    zeroes per cycle."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    content = bench.rng.randbytes(16384)
    beats = 16384 * 8 // bench.width
    begun = cycle()
    assert await bench.ask(OUT, 0, content) == bytes([OK])
    dut._log.info("OUT: %d beats in %d cycles", beats, cycle() - begun)
    assert cycle() - begun <= beats + 16
    begun = cycle()
    bench.cycles.clear()
    assert await bench.ask(IN, 0, b"", 16385) == content + bytes([OK])
    assert bench.cycles[-1] - bench.cycles[0] <= beats + 3
    assert bench.cycles[0] - begun <= 3 + 8
    begun = cycle()
    assert await bench.ask(WRITE_ZEROES, 0, segment(0, ZEROES[0])) == bytes([OK])
    assert cycle() - begun <= ZEROES[0] * 4096 // bench.width + 20


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def memory_may_fail(dut):
    """VIRTIO-BLK-10 (V146): the status comes when all is stored, and is IOERR when a row could not be read or written; the next works."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    memory, per_sector = bench.memory, 4096 // bench.width
    content = bench.rng.randbytes(8 * 512)
    memory.bad = {12 * per_sector + 3}
    assert await bench.ask(OUT, 10, content) == bytes([IOERR])
    assert await bench.ask(WRITE_ZEROES, 0, segment(10, 8)) == bytes([IOERR])
    assert (await bench.ask(IN, 10, b"", len(content) + 1))[-1] == IOERR
    assert (await bench.ask(IN, 13, b"", 513))[-1] == OK
    memory.bad = set()
    for _ in range(5):
        memory.is_stuck = True
        asking = cocotb.start_soon(bench.ask(OUT, 10, content))
        await ClockCycles(dut.clk, 600)
        assert not asking.done()
        memory.is_stuck = False
        assert await asking == bytes([OK])
        lanes = bench.width // 8
        rows = [int.from_bytes(content[at : at + lanes], "little") for at in range(0, len(content), lanes)]
        assert [memory.rows[10 * per_sector + n] for n in range(len(rows))] == rows
    assert await bench.ask(IN, 10, b"", len(content) + 1) == content + bytes([OK])


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def stop_waits_for_the_memory(dut):
    """VIRTIO-BLK-11 (R24): stop at any moment ends when the memory has answered all it was asked; the next requests get their own rows."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    rng, memory = bench.rng, bench.memory
    for n in range(20):
        cases = (OUT, rng.randbytes(4096), 1), (IN, b"", 4097), (WRITE_ZEROES, segment(0, 8), 1), (DISCARD, segment(0, 8), 1)
        kind, data, size = cases[n % 4]
        memory.is_stuck = n // 4 % 2 == 1
        giving = cocotb.start_soon(bench.give(struct.pack("<IIQ", kind, 0, 0) + data, size))
        await ClockCycles(dut.clk, rng.randrange(4, 150))
        memory.is_stuck |= rng.random() < 0.5
        await ClockCycles(dut.clk, 10)
        dut.stop.value = 1
        await ClockCycles(dut.clk, 60)
        memory.is_stuck = False
        while not (dut.stopped.value and giving.done()):
            await RisingEdge(dut.clk)
        assert not memory.reading and not memory.writing and not dut.discards__valid.value
        await ClockCycles(dut.clk, 3)
        dut.stop.value = 0
        await ClockCycles(dut.clk, 3)
        bench.beats.clear()
        content = rng.randbytes(1024)
        assert await bench.ask(OUT, 20, content) == bytes([OK])
        assert await bench.ask(IN, 20, b"", 1025) == content + bytes([OK])


@cocotb.test(**LIMIT)
async def capacity_changes(dut):
    """VIRTIO-BLK-12 (V019, V149): another capacity is shown with a pulse of config_changed, and obeyed; not before resume if suspended."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    await ClockCycles(dut.clk, 3)
    pulses = []

    async def count():
        before = int(dut.config.value)
        while True:
            await RisingEdge(dut.clk)
            now = int(dut.config.value)
            if now != before or dut.config_changed.value == 1:
                pulses.append((now != before, dut.config_changed.value == 1))
            before = now

    cocotb.start_soon(count())
    for sectors in (7, 20, 0, bench.capacity):
        dut.sectors.value = sectors
        await ClockCycles(dut.clk, 4)
        assert int(dut.config.value) & (1 << 64) - 1 == sectors
        assert pulses == [(True, True)]
        pulses.clear()
        for at in {max(sectors - 1, 0), sectors}:
            assert (await bench.ask(IN, at, b"", 513))[-1] == (OK if at < sectors else IOERR)
    dut.suspend.value = 1
    await ClockCycles(dut.clk, 4)
    dut.sectors.value = 9
    await ClockCycles(dut.clk, 20)
    assert not pulses
    dut.suspend.value = 0
    await ClockCycles(dut.clk, 4)
    assert pulses == [(True, True)]
    assert int(dut.config.value) & (1 << 64) - 1 == 9
