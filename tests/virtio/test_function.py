"""A virtio function as a host sees it: configuration space, decoder, register buses, MSI-X, transport, under the model's software."""

import random

import cocotb
import pytest
from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles, RisingEdge

from ringwall.models.host import ConfigRead, ConfigWrite, Delay, Host, MemoryRead, MemoryWrite, enable_msix, enumerate
from ringwall.models.memory import GuestMemory
from ringwall.models.virtio.driver import DriverError, VirtioPciDriver
from ringwall.models.virtio.split import SplitLayout
from ringwall.rtl.function.config_space import ConfigSpace
from ringwall.rtl.function.decoder import AddressDecoder
from ringwall.rtl.function.description import Bar, FunctionDescription, MsixCapability
from ringwall.rtl.function.msix import Msix, MsixFunction
from ringwall.rtl.regs.bus import RegisterBus as RegisterBusSignature
from ringwall.rtl.regs.router import Merger, Range, Router
from ringwall.rtl.tlp.layouts import Burst, BurstData, BurstDone, ConfigRequest, ConfigResponse, DecodeRequest, DecodeResponse
from ringwall.rtl.virtio.layouts import Notification, QueueCommand
from ringwall.rtl.virtio.transport import MSIX_BAR, MSIX_BYTES, REGISTERS_BAR, REGISTERS_BYTES, PciTransport, virtio_function
from ringwall.sim.host_port import drive
from ringwall.sim.regs_bus import RegisterBus
from ringwall.sim.run import run
from ringwall.sim.stream import Stream, pack, start, unpack

WIDTH, VECTORS, CONFIG_BYTES = 64, 3, 60
QUEUES = (256, 64)
BLK_FLUSH, BLK_SEG_MAX = 1 << 9, 1 << 2
VERSION_1, ACCESS_PLATFORM, ORDER_PLATFORM = 1 << 32, 1 << 33, 1 << 36


class Card(wiring.Component):
    """Function 0 without registers, function 1 virtio: everything between the completer and the ring engine."""

    def __init__(self):
        self.functions = (
            FunctionDescription(vendor_id=0x1B36, device_id=0x0014, class_code=0x080600, bars=(Bar(0, 4096),)),
            virtio_function(device_type=2, class_code=0x018000, queues=len(QUEUES), config_bytes=CONFIG_BYTES, vectors=VECTORS),
        )
        super().__init__({
            "requests": In(stream.Signature(ConfigRequest)),
            "responses": Out(stream.Signature(ConfigResponse)),
            "decode_requests": In(stream.Signature(DecodeRequest)),
            "decode_responses": Out(stream.Signature(DecodeResponse)),
            "bus": In(RegisterBusSignature()),
            "commands": Out(stream.Signature(QueueCommand)),
            "kicks": Out(stream.Signature(6)),
            "notifications": In(stream.Signature(Notification)),
            "bursts": Out(stream.Signature(Burst)),
            "write_data": Out(stream.Signature(BurstData(WIDTH))),
            "write_done": In(stream.Signature(BurstDone)),
            "config": In(8 * CONFIG_BYTES),
            "config_changed": In(1),
            "needs_reset": In(1),
            "stop": Out(1),
            "stopped": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.space = space = ConfigSpace(functions=self.functions)
        m.submodules.decoder = decoder = AddressDecoder(functions=self.functions)
        m.submodules.merger = merger = Merger(count=2)
        m.submodules.router = router = Router(targets=(
            (Range(1, REGISTERS_BAR, 0, REGISTERS_BYTES),), (Range(1, MSIX_BAR, 0, MSIX_BYTES),)))  # fmt: skip
        m.submodules.transport = transport = PciTransport(
            function=1, device_features=BLK_FLUSH | BLK_SEG_MAX, queues=QUEUES, first_queue=0, config_bytes=CONFIG_BYTES, vectors=VECTORS)
        m.submodules.msix = msix = Msix(width=WIDTH, functions=[MsixFunction(1, self.functions[1].capability(MsixCapability), 3)])
        for inner, outer in (
            (space.requests, self.requests), (space.responses, self.responses), (decoder.requests, self.decode_requests),
            (decoder.responses, self.decode_responses), (merger.initiators[0], self.bus), (msix.bursts[0], self.bursts),
            (msix.write_data[0], self.write_data), (msix.write_done[0], self.write_done), (transport.commands, self.commands),
            (transport.kicks, self.kicks), (transport.notifications, self.notifications),
        ):  # fmt: skip
            wiring.connect(m, inner, wiring.flipped(outer))
        wiring.connect(m, space.registers, merger.initiators[1])
        wiring.connect(m, merger.bus, router.bus)
        wiring.connect(m, router.targets[0], transport.bus)
        wiring.connect(m, router.targets[1], msix.bus)
        wiring.connect(m, transport.interrupts, msix.requests)
        m.d.comb += [
            [decoder.state[n].eq(space.state[n]) for n in range(2)],
            [decoder.bars[n].eq(space.bars[n]) for n in range(len(space.bars))],
            space.interrupt[1].eq(transport.interrupt),
            msix.state[0].eq(space.state[1]),
            transport.config.eq(self.config),
            transport.config_changed.eq(self.config_changed),
            transport.needs_reset.eq(self.needs_reset),
            transport.msix_enable.eq(space.state[1].msix_enable),
            self.stop.eq(transport.stop),
            msix.stop[0].eq(transport.stop),
            transport.stopped.eq(self.stopped & msix.stopped[0]),
        ]
        return m


def test_function(request):
    run(Card(), module=__name__, node=request.node.nodeid)


class Bench:
    """Performs what the model's software asks for, at the completer's side of the card."""

    def __init__(self, dut, rng):
        self.dut = dut
        self.requests, self.responses = Stream(dut, "requests"), Stream(dut, "responses")
        self.decode, self.decoded = Stream(dut, "decode_requests"), Stream(dut, "decode_responses")
        self.bus = RegisterBus(dut)
        self.host = Host(GuestMemory(), rng=rng)
        self.commands, self.kicks, self.messages = [], [], []
        for name, log in (("commands", self.commands), ("kicks", self.kicks)):
            cocotb.start_soon(Stream(dut, name).watch(log))
            Stream(dut, name).set_ready(1)
        self.content = rng.randbytes(CONFIG_BYTES)
        dut.config.value = int.from_bytes(self.content, "little")
        dut.stopped.value = 1
        cocotb.start_soon(self.take_messages())

    async def take_messages(self):
        bursts, write_data, done = (Stream(self.dut, name) for name in ("bursts", "write_data", "write_done"))
        while True:
            burst, beat = unpack(Burst, await bursts.get()), unpack(BurstData(WIDTH), await write_data.get())
            self.messages.append((burst.address, beat.data >> 8 * (burst.address % 8) & 0xFFFFFFFF))
            await done.put(pack(BurstDone))

    async def config(self, function, offset, size, value=None):
        lane = offset % 4
        await self.requests.put(pack(ConfigRequest, function=function, bus=1, register=offset // 4, is_write=value is not None,
                                     byte_enable=((1 << size) - 1) << lane, data=(value or 0) << 8 * lane))  # fmt: skip
        answer = unpack(ConfigResponse, await self.responses.get())
        return (-1 if answer.unsupported else answer.data >> 8 * lane) & (1 << 8 * size) - 1

    async def memory(self, address, size, value=None):
        await self.decode.put(pack(DecodeRequest, address=address & ~7))
        place = unpack(DecodeResponse, await self.decoded.get())
        if not place.hit:
            return (1 << 8 * size) - 1
        return await self.bus.access(place.offset + address % 8, size, value, function=place.function, bar=place.bar)

    async def run(self, software):
        """Drive a generator of operations to its end; return what it returns."""
        return await drive(software, self.perform)

    async def perform(self, operation):
        match operation:
            case ConfigRead(function, offset, size):
                return await self.config(function, offset, size)
            case ConfigWrite(function, offset, size, value):
                await self.config(function, offset, size, value)
            case MemoryRead(address, size):
                return await self.memory(address, size)
            case MemoryWrite(address, size, value):
                await self.memory(address, size, value)
            case Delay(cycles):
                await ClockCycles(self.dut.clk, cycles)

    async def pulse(self, name):
        getattr(self.dut, name).value = 1
        await RisingEdge(self.dut.clk)
        getattr(self.dut, name).value = 0

    async def bring_up(self):
        """Enumerate, enable MSI-X, start the driver; return it and the messages of the vectors."""
        found = await self.run(enumerate(self.host))
        assert [(f.function, f.vendor, f.device, f.problems) for f in found] == [(0, 0x1B36, 0x14, []), (1, 0x1AF4, 0x1042, [])]
        messages = await self.run(enable_msix(found[1], VECTORS))
        driver = VirtioPciDriver(found[1])
        layouts = [SplitLayout.at(0x1_2345_0000 + 0x10000 * n, 32 << n) for n in range(2)]
        features = await self.run(driver.start(layouts, wanted=-1 & (1 << 128) - 1, vectors=(1, 2), config_vector=0))
        assert features == BLK_FLUSH | BLK_SEG_MAX | VERSION_1 | ACCESS_PLATFORM | ORDER_PLATFORM
        assert not driver.problems
        await ClockCycles(self.dut.clk, 20)
        commands = [unpack(QueueCommand, command) for command in self.commands]
        assert [(c.queue, c.size, c.descriptor_iova, c.driver_iova, c.device_iova) for c in commands] == [
            (n, at.size, at.desc, at.avail, at.used) for n, at in zip(range(2), layouts)]  # fmt: skip
        return driver, messages


async def begin(dut):
    await start(dut, "requests")
    return Bench(dut, random.Random(cocotb.RANDOM_SEED))


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def driver_finds_and_starts_the_function(dut):
    """VIRTIO-PCI-19 (R46, V003, V012, V069-V078, V091-V095): the model's host and driver bring it up, without a complaint."""
    bench = await begin(dut)
    driver, messages = await bench.bring_up()
    bench.kicks.clear()
    for n in (1, 0, 1):
        await bench.run(driver.notify(n))
        await ClockCycles(dut.clk, 10)
    assert bench.kicks == [1, 0, 1]
    notifications = Stream(dut, "notifications")
    for n in (0, 1):
        await notifications.put(pack(Notification, queue=n))
        await ClockCycles(dut.clk, 30)
    assert bench.messages == [messages[1], messages[2]]
    fields = [(0, 8), (8, 4), (20, 4), (34, 2)]
    assert await bench.run(driver.read_device_config(fields)) == [int.from_bytes(bench.content[at : at + n], "little") for at, n in fields]
    await bench.run(driver.check_alive())
    await bench.pulse("needs_reset")
    await ClockCycles(dut.clk, 30)
    assert bench.messages[2:] == [messages[0]]
    with pytest.raises(DriverError, match="needs a reset"):
        await bench.run(driver.check_alive())
    await bench.run(driver.reset())
    assert await bench.run(driver.status()) == 0


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def window_reaches_what_the_bars_reach(dut):
    """VIRTIO-PCI-20 (V106-V109): structures read and written through configuration space, also with memory space off; ISR is cleared."""
    bench = await begin(dut)
    driver, _ = await bench.bring_up()
    await bench.config(1, 4, 2, 0x0004)  # memory space off
    assert await bench.run(driver.status()) == 0xFF
    assert await bench.run(driver.window_read(0, 0x14, 1)) == 15
    for at in range(0, 56, 4):
        assert await bench.run(driver.window_read(0, 0x2000 + at, 4)) == int.from_bytes(bench.content[at : at + 4], "little")
    await bench.run(driver.window_write(0, 0x16, 2, 1))
    assert await bench.run(driver.window_read(0, 0x18, 2)) == 64
    bench.kicks.clear()
    await bench.run(driver.window_write(0, 0x3004, 2, 1))
    await ClockCycles(dut.clk, 10)
    assert bench.kicks == [1]
    await bench.pulse("config_changed")
    await ClockCycles(dut.clk, 10)
    assert await bench.run(driver.window_read(0, 0x1000, 1)) == 2
    assert await bench.run(driver.window_read(0, 0x1000, 1)) == 0
    await bench.config(1, 4, 2, 0x0006)
    assert await bench.run(driver.status()) == 15
