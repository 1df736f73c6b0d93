"""Rng: buffers filled with entropy, at any pace of the source, in one go or cut short by a suspend."""

import itertools
import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.virtio.rng import Rng, RngDevice, XorShift
from ringwall.sim.back_end import BackEndBench
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, random_ready, start

CASES = ["buffers_are_filled", "full_rate", "suspend_cuts_short", "suspend_lets_an_empty_buffer_end", "stop_empties_it"]


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_rng(request, width):
    run(Rng(width=width), module=__name__, node=request.node.nodeid, params={"width": width}, testcase=CASES)


@pytest.mark.parametrize("width", [64, 512])
def test_xor_shift(request, width):
    run(XorShift(width=width), module=__name__, node=request.node.nodeid, params={"width": width}, testcase="words_are_xorshift64")


def test_parameters_are_checked():
    """VIRTIO-RNG-5: a wrong width or queue is refused with a sentence; the device has no features and no configuration."""
    with pytest.raises(ValueError, match=r"must .*, not"):
        Rng(width=32)
    device = RngDevice(queue_size=16)
    assert (device.device_type, device.device_features, device.config_bytes) == (4, 0, 0)
    assert [(port.sizes, port.waits) for port in device.ports] == [((16,), True)]
    assert isinstance(device.back_end(128), Rng)


class Bench(BackEndBench):
    async def begin(self):
        (self.port,) = await super().begin()
        self.entropy, self.words = Stream(self.dut, "entropy"), []
        cocotb.start_soon(self.entropy.watch(self.words))

    async def source(self, gap):
        """Give words for ever, each after ``gap()`` cycles."""
        await self.entropy.put_many((self.rng.getrandbits(self.width) for _ in iter(int, 1)), gap)

    def drawn(self, size):
        """Return the ``size`` bytes of the oldest words taken, which are forgotten."""
        count = -(-size // self.lanes)
        content = b"".join(word.to_bytes(self.lanes, "little") for word in self.words[:count])[:size]
        del self.words[:count]
        return content


@cocotb.test(timeout_time=200, timeout_unit="us")
async def buffers_are_filled(dut):
    """VIRTIO-RNG-1: buffers of all sizes, empty and with readable bytes too, at random pace: whole, each bit used once, in order."""
    bench = Bench(dut)
    await bench.begin()
    rng = bench.rng
    cocotb.start_soon(bench.source(lambda: rng.choice([0, 0, 0, 1, 5])))
    cocotb.start_soon(random_ready(bench.port.writable, rng))
    sizes = [0, 1, bench.lanes - 1, bench.lanes, bench.lanes + 1, 64, *(rng.randrange(1, 400) for _ in range(30))]
    rng.shuffle(sizes)

    async def chains():
        for size in sizes:
            await bench.port.give(rng.choice([b"", b"", b"surplus" * 30]), size, rng.choice([BurstStatus.OK, BurstStatus.UR]))

    cocotb.start_soon(chains())
    for size in sizes:
        assert await bench.port.answer() == bench.drawn(size)


@cocotb.test(timeout_time=200, timeout_unit="us")
async def full_rate(dut):
    """VIRTIO-RNG-2: a word per cycle when the source has them; without entropy nothing but patience."""
    bench = Bench(dut)
    await bench.begin()
    bench.port.writable.set_ready(1)
    await bench.port.give(writable_bytes=4096)
    await ClockCycles(dut.clk, 500)
    assert not bench.port.answers
    begun = cycle()
    cocotb.start_soon(bench.source(lambda: 0))
    assert len(await bench.port.answer()) == 4096
    assert cycle() - begun <= 4096 // bench.lanes + 8


@cocotb.test(timeout_time=400, timeout_unit="us")
async def suspend_cuts_short(dut):
    """VIRTIO-RNG-3: a suspend ends a buffer that has bytes, with them; another is left, not one word is taken; after it all goes on."""
    bench = Bench(dut)
    await bench.begin()
    rng, port = bench.rng, bench.port
    cocotb.start_soon(bench.source(lambda: rng.randrange(6)))
    cocotb.start_soon(random_ready(port.writable, rng, 0.7))

    async def chains():
        while True:
            await port.give(writable_bytes=rng.choice([0, 1, 100, 1000]))

    cocotb.start_soon(chains())
    cut = 0
    for _ in range(30):
        await ClockCycles(dut.clk, rng.randrange(1, 120))
        dut.suspend.value = 1
        if rng.randrange(2):
            dut.settled__0.value = 0
            await ClockCycles(dut.clk, 40)
            assert not dut.suspended.value
            dut.settled__0.value = 1
        while not dut.suspended.value:
            await RisingEdge(dut.clk)
        while port._end():
            content = await port.answer()
            cut += len(content) not in (0, 1, 100, 1000)
            assert content == bench.drawn(len(content))
        assert not bench.words and not port.answers
        for _ in range(20):
            await RisingEdge(dut.clk)
            assert dut.suspended.value and not bench.words
        dut.suspend.value = 0
    assert cut > 5


@cocotb.test(timeout_time=10, timeout_unit="us")
async def suspend_lets_an_empty_buffer_end(dut):
    """VIRTIO-RNG-7: a buffer without room that was taken in the cycle in front of a suspend is given back before it is suspended."""
    bench = Bench(dut)
    await bench.begin()
    await bench.gives_an_empty_buffer_back(bench.port)


@cocotb.test(timeout_time=200, timeout_unit="us")
async def stop_empties_it(dut):
    """VIRTIO-RNG-4: a stop, of the device or of the port, drops what is there and comes; afterwards it is as new."""
    bench = Bench(dut)
    await bench.begin()
    rng, port = bench.rng, bench.port
    cocotb.start_soon(bench.source(lambda: rng.randrange(3)))
    for stop, stopped in [(dut.stop, dut.stopped), (dut.port_stop, dut.port_stopped)] * 4:
        port.writable.set_ready(rng.randrange(2))
        giving = cocotb.start_soon(port.give(bytes(300), 1000))
        await ClockCycles(dut.clk, rng.randrange(1, 30))
        stop.value, dut.suspend.value = 1, rng.randrange(2)
        port.writable.set_ready(1)  # as a mover that is stopped
        await giving
        await port.give(b"late", 9)
        while not stopped.value:
            await RisingEdge(dut.clk)
        stop.value = dut.suspend.value = 0
        await RisingEdge(dut.clk)
        port.answers.clear()
        bench.words.clear()
        await port.give(writable_bytes=77)
        assert await port.answer() == bench.drawn(77)


@cocotb.test(timeout_time=10, timeout_unit="us")
async def words_are_xorshift64(dut):
    """VIRTIO-RNG-6: the source that is none follows xorshift64 in each lane, no lane like another, and stands still while nobody takes."""
    (source,) = await start(dut, "o")
    words, mask = [], (1 << 64) - 1
    cocotb.start_soon(source.watch(words))
    cocotb.start_soon(random_ready(source, random.Random(cocotb.RANDOM_SEED)))
    while len(words) < 50:
        await RisingEdge(dut.clk)
    for at in range(0, params()["width"], 64):
        for before, after in itertools.pairwise(words):
            x = before >> at & mask
            x ^= x << 13 & mask
            x ^= x >> 7
            x ^= x << 17 & mask
            assert after >> at & mask == x
    assert all(len({word >> at & mask for at in range(0, params()["width"], 64)}) == params()["width"] // 64 for word in words)
