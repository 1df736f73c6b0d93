"""Console: bytes both ways, whatever the sizes of the buffers and the pace of the parties."""

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.virtio.console import PATIENCE, Console, ConsoleDevice
from ringwall.rtl.virtio.layouts import ConfigWrite
from ringwall.sim.back_end import BackEndBench
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, cycle, pack, random_ready


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_console(request, width):
    device = ConsoleDevice(columns=132, rows=43, emergency=width > 64)
    run(Console(width=width, device=device), module=__name__, node=request.node.nodeid, params={"width": width})


def test_parameters_are_checked():
    """VIRTIO-CON-7: wrong width and sizes are refused with a sentence; the device says its features and ports."""
    with pytest.raises(ValueError, match=r"must .*, not"):
        Console(width=8, device=ConsoleDevice())
    for bad in ({"columns": 80}, {"rows": 25}, {"columns": 1 << 16, "rows": 1}):
        with pytest.raises(ValueError, match=r"must .*, not"):
            ConsoleDevice(**bad)
    assert ConsoleDevice().device_features == 0
    device = ConsoleDevice(80, 25, emergency=True, queue_size=8)
    assert (device.device_type, device.device_features, device.config_bytes) == (3, 0b101, 12)
    assert [(port.sizes, port.waits) for port in device.ports] == [((8,), True), ((8,), False)]
    assert device.back_end(64).device is device


class Bench(BackEndBench):
    async def begin(self):
        self.receive, self.transmit = await super().begin(2)
        self.to_driver, self.from_driver = Stream(self.dut, "to_driver"), Stream(self.dut, "from_driver")
        self.sent = []
        cocotb.start_soon(self.from_driver.watch(self.sent))

    async def until(self, condition):
        while not condition():
            await RisingEdge(self.dut.clk)


@cocotb.test(timeout_time=200, timeout_unit="us")
async def received_bytes_fill_buffers(dut):
    """VIRTIO-CON-1: bytes at random pace into buffers of random sizes: in order, none lost, no empty buffer but one that has no room."""
    bench = Bench(dut)
    await bench.begin()
    rng, content, sizes, answers = bench.rng, bench.rng.randbytes(1500), [], []
    cocotb.start_soon(random_ready(bench.receive.writable, rng))
    cocotb.start_soon(bench.to_driver.put_many(content, lambda: rng.choice([0, 0, 0, 0, 1, 3, 14, 20, 60])))

    async def chains():
        while True:
            sizes.append(rng.choice([0, 1, bench.lanes - 1, bench.lanes, bench.lanes + 1, 3 * bench.lanes, 4096]))
            await bench.receive.give(rng.choice([b"", b"", b"x" * 100]), sizes[-1], rng.choice([BurstStatus.OK, BurstStatus.CA]))

    cocotb.start_soon(chains())
    while sum(map(len, answers)) < len(content):
        answers.append(await bench.receive.answer())
        assert len(answers[-1]) <= sizes[len(answers) - 1]
        assert bool(answers[-1]) == bool(sizes[len(answers) - 1])
    assert b"".join(answers) == content


@cocotb.test(timeout_time=100, timeout_unit="us")
async def a_pause_ends_a_buffer(dut):
    """VIRTIO-CON-2: bytes reach the driver when none came for 16 cycles, in one buffer if the gaps are shorter; no byte, no buffer."""
    bench = Bench(dut)
    await bench.begin()
    bench.receive.writable.set_ready(1)
    await bench.receive.give(writable_bytes=4096)
    await ClockCycles(dut.clk, 200)
    assert not bench.receive.answers
    content = bytes(range(2 * bench.lanes))  # the last beat is full before the pause
    await bench.to_driver.put_many(content, lambda: 14)
    begun = cycle()
    assert await bench.receive.answer() == content
    assert 15 <= cycle() - begun <= 22
    await bench.receive.give(writable_bytes=4096)
    await bench.to_driver.put(0x61)
    assert await bench.receive.answer() == b"a"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def rates(dut):
    """VIRTIO-CON-3: to the driver a beat in lanes + 1 cycles, from it a byte per cycle, the first 3 cycles behind its beat."""
    bench = Bench(dut)
    await bench.begin()
    bench.receive.writable.set_ready(1)
    bench.from_driver.set_ready(1)
    content = bench.rng.randbytes(1024)
    cocotb.start_soon(bench.receive.give(writable_bytes=1024))
    begun = cycle()
    cocotb.start_soon(bench.to_driver.put_many(content))
    assert await bench.receive.answer() == content
    assert cycle() - begun <= 1024 // bench.lanes * (bench.lanes + 1) + 6
    bench.transmit.writable.set_ready(1)
    begun = cycle()
    cocotb.start_soon(bench.transmit.give(content))
    await bench.until(lambda: bench.sent)
    assert cycle() - begun <= 1 + 3 + 1
    assert await bench.transmit.answer() == b""
    assert bytes(bench.sent) == content and cycle() - begun <= 1024 + 8


@cocotb.test(timeout_time=200, timeout_unit="us")
async def transmitted_bytes_come_whole(dut):
    """VIRTIO-CON-4: buffers of random sizes, some without bytes, some with writable ones, some that cannot be fetched: bytes in order; a
    buffer is used, with nothing written, when its last byte was taken."""
    bench = Bench(dut)
    await bench.begin()
    rng, buffers = bench.rng, []
    cocotb.start_soon(random_ready(bench.transmit.writable, rng))
    for _ in range(60):
        content = rng.randbytes(rng.choice([0, 1, bench.lanes - 1, bench.lanes, bench.lanes + 1, rng.randrange(200)]))
        buffers.append((content, rng.choice([0, 0, 0, 50]), rng.choice([BurstStatus.OK] * 5 + [BurstStatus.FAULT])))

    async def chains():
        for buffer in buffers:
            await bench.transmit.give(*buffer)

    cocotb.start_soon(chains())
    taking, done = None, b""
    for content, _, status in buffers:
        done += content if status == BurstStatus.OK or not content else content[: (len(content) - 1) // bench.lanes * bench.lanes]
        assert (len(bench.sent) < len(done)) <= (not bench.transmit.answers)
        taking = taking or cocotb.start_soon(random_ready(bench.from_driver, rng))
        assert await bench.transmit.answer() == b""
        await bench.until(lambda done=done: len(bench.sent) >= len(done) or not bench.from_driver.read_valid())
        assert bytes(bench.sent[: len(done)]) == done
    await ClockCycles(dut.clk, 20)
    assert bytes(bench.sent) == done


@cocotb.test(timeout_time=10, timeout_unit="us")
async def suspend_lets_an_empty_buffer_end(dut):
    """VIRTIO-CON-8: a buffer without room that was taken in the cycle in front of a suspend is given back before it is suspended."""
    bench = Bench(dut)
    await bench.begin()
    await bench.gives_an_empty_buffer_back(bench.receive)


@cocotb.test(timeout_time=400, timeout_unit="us")
async def suspend_and_stop(dut):
    """VIRTIO-CON-5: a suspend ends a buffer that has bytes and takes no more; a stop of either port drops what is there and comes."""
    bench = Bench(dut)
    await bench.begin()
    rng, content, got = bench.rng, bench.rng.randbytes(3000), b""
    taking = cocotb.start_soon(random_ready(bench.receive.writable, rng))
    giving = cocotb.start_soon(bench.to_driver.put_many(content, lambda: rng.choice([0, 1, 2])))

    async def chains():
        while True:
            await bench.receive.give(writable_bytes=rng.choice([0, 5, 100, 4096]))

    feeding = cocotb.start_soon(chains())
    while not giving.done():
        await ClockCycles(dut.clk, rng.randrange(1, 200))
        dut.suspend.value = 1
        if rng.randrange(2):
            dut.settled__0.value = 0
            await ClockCycles(dut.clk, 10)
            assert not dut.suspended.value
            dut.settled__0.value = 1
        since = cycle()
        await bench.until(lambda: dut.suspended.value)
        assert cycle() - since < PATIENCE
        for _ in range(20):
            await RisingEdge(dut.clk)
            assert dut.suspended.value and not dut.to_driver__ready.value
        while bench.receive._end():
            got += await bench.receive.answer()
        assert not bench.receive.answers
        dut.suspend.value = 0
    while len(got) < len(content):
        got += await bench.receive.answer()
    assert got == content
    feeding.cancel()
    taking.cancel()
    bench.receive.chains._valid(0)

    for n, port in enumerate((bench.receive, bench.transmit)):
        for stop, stopped, bit in ((dut.stop, dut.stopped, 1), (dut.port_stop, dut.port_stopped, 1 << n)) * 3:
            port.writable.set_ready(0)
            bench.from_driver.set_ready(0)
            giving = cocotb.start_soon(port.give(b"z" * 70, 1000))
            filling = cocotb.start_soon(bench.to_driver.put_many(b"abc"))
            await ClockCycles(dut.clk, rng.randrange(1, 60))
            stop.value = bit
            port.writable.set_ready(1)
            await giving
            await bench.until(lambda stopped=stopped, bit=bit: int(stopped.value) & bit == bit)
            stop.value = 0
            if not filling.done():
                filling.cancel()
                bench.to_driver._valid(0)
            bench.from_driver.set_ready(1)
            await ClockCycles(dut.clk, 4)
            port.answers.clear()
            bench.sent.clear()
            await bench.receive.give(writable_bytes=3)
            await bench.to_driver.put_many(b"xyz")
            bench.receive.writable.set_ready(1)
            assert await bench.receive.answer() == b"xyz"
            bench.transmit.writable.set_ready(1)
            await bench.transmit.give(b"klm")
            assert await bench.transmit.answer() == b""
            await bench.until(lambda: len(bench.sent) >= 3)
            assert bytes(bench.sent) == b"klm"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def configuration_and_emergency(dut):
    """VIRTIO-CON-6: the configuration has the size; what is written into emerg_wr comes at any time, between bytes of a buffer too."""
    bench = Bench(dut)
    await bench.begin()
    assert int(dut.config.value).to_bytes(12, "little") == bytes([132, 0, 43, 0]) + bytes(8)
    if bench.width == 64:
        return  # has none

    async def emergency(text, pause=0):
        for byte in text:
            dut.config_write.value = pack(ConfigWrite, word=1, enable=0b1111, data=byte)
            await RisingEdge(dut.clk)
            dut.config_write.value = 0
            await ClockCycles(dut.clk, 1 + pause)

    dut.stop.value = 1
    bench.from_driver.set_ready(1)
    await emergency(b"before all")
    await ClockCycles(dut.clk, 4)
    assert bytes(bench.sent) == b"before all"
    dut.stop.value = 0
    bench.sent.clear()
    cocotb.start_soon(bench.transmit.give(b"-" * 200))
    await emergency(b"amid", 10)
    await bench.until(lambda: len(bench.sent) == 204)
    assert bytes(bench.sent).replace(b"-", b"") == b"amid" and bench.sent[-1] == ord("-")
