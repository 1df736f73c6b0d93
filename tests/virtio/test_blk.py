"""Blk: answers of the back end, request by request, against a plain reading of the specification."""

import random
import struct

import cocotb
import pytest
from cocotb.triggers import RisingEdge

from ringwall.rtl.dma.layouts import ChainBeat
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.virtio.blk import Blk
from ringwall.rtl.virtio.layouts import Chain
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle, pack, random_ready, start, unpack

SECTORS = 64
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2
SERIAL = b"disk-of-the-test"


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_blk(request, width):
    run(Blk(width=width, capacity_sectors=SECTORS, serial=SERIAL), module=__name__, node=request.node.nodeid,
        params={"width": width})


def test_parameters_are_checked():
    """VIRTIO-BLK-5: width, capacity and serial outside their ranges are refused with a sentence."""
    for bad in ({"width": 8}, {"capacity_sectors": 100}, {"capacity_sectors": 1}, {"serial": bytes(21)}):
        with pytest.raises(ValueError, match=r"must .*, not"):
            Blk(**{"width": 64, "capacity_sectors": 2} | bad)


class Bench:
    def __init__(self, dut):
        self.dut = dut

    async def begin(self):
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.width = params()["width"]
        self.layout = ChainBeat(self.width)
        self.chains, self.readable, self.writable = await start(self.dut, "chains", "readable", "writable")
        self.beats, self.cycles = [], []
        cocotb.start_soon(self.writable.watch(self.beats, self.cycles))
        self.dut.settled.value = 1

    async def give(self, readable, writable_bytes, status=BurstStatus.OK):
        lanes = self.width // 8
        await self.chains.put(pack(Chain, readable_bytes=len(readable), writable_bytes=writable_bytes))
        await self.readable.put_many(
            pack(self.layout, data=int.from_bytes(readable[at : at + lanes], "little"), byte_count=len(readable[at : at + lanes]),
                 first=at == 0, last=at + lanes >= len(readable), status=status if at + lanes >= len(readable) else BurstStatus.OK)
            for at in range(0, len(readable), lanes))

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
                    return content
            await RisingEdge(self.dut.clk)

    async def ask(self, kind, sector, data=b"", writable_bytes=1, status=BurstStatus.OK):
        cocotb.start_soon(self.give(struct.pack("<IIQ", kind, 0, sector) + data, writable_bytes, status))
        return await self.answer()


@cocotb.test(timeout_time=200, timeout_unit="us")
async def requests_are_served(dut):
    """VIRTIO-BLK-1: random requests, good and bad, against a dictionary of sectors (V024, V148)."""
    bench = Bench(dut)
    await bench.begin()
    rng = bench.rng
    cocotb.start_soon(random_ready(bench.writable, rng, 0.7))
    disk = bytearray(SECTORS * 512)
    for _ in range(120):
        sector = rng.choice([0, SECTORS - 1, SECTORS, rng.randrange(SECTORS), 1 << 33, (1 << 64) - 1])
        size = rng.choice([0, 512, 1024, 2048, 511, 513, 20])
        good = size % 512 == 0 and sector + size // 512 <= SECTORS
        kind = rng.choice([IN, OUT, OUT, FLUSH, GET_ID, 2, 99, 1 << 31])
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
        else:
            answer = await bench.ask(kind, sector, b"", size + 1)
            assert answer == bytes(size) + bytes([OK if kind == FLUSH else UNSUPP])


@cocotb.test(timeout_time=200, timeout_unit="us")
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


@cocotb.test(timeout_time=200, timeout_unit="us")
async def status_waits_for_the_data(dut):
    """VIRTIO-BLK-3: an IN's status is given after the writer has settled, and is IOERR when a write failed."""
    bench = Bench(dut)
    await bench.begin()
    bench.writable.set_ready(1)
    for failed, status in ((0, OK), (1, IOERR), (0, OK)):
        dut.settled.value = 0
        dut.failed.value = failed
        asking = cocotb.start_soon(bench.ask(IN, 1, b"", 513))
        for _ in range(200):
            await RisingEdge(dut.clk)
        assert not asking.done()
        dut.settled.value = 1
        assert (await asking)[-1] == status


@cocotb.test(timeout_time=200, timeout_unit="us")
async def full_rate(dut):
    """VIRTIO-BLK-4: 16 KiB in and out at one beat per cycle, the first byte of an answer at most 8 cycles behind the header."""
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
