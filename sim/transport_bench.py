"""The bench of PciTransport: a driver's register accesses, and everything else around it."""

import random

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from ..rtl.function.layouts import MsixRequest
from ..rtl.virtio.layouts import Notification, QueueCommand, QueueOperation
from ..rtl.virtio.transport import PciTransport
from .regs_bus import RegisterBus
from .stream import Stream, pack, start, unpack

FUNCTION, FIRST, VECTORS, CONFIG_BYTES = 3, 5, 4, 61
QUEUES = (256, 16, 32768)
DEVICE_FEATURES = 1 << 2 | 1 << 6 | 1 << 9
OFFERED = DEVICE_FEATURES | 1 << 32 | 1 << 33 | 1 << 36
VERSION_1, ACCESS_PLATFORM = 1 << 32, 1 << 33
NO_VECTOR = 0xFFFF

# Offsets in BAR 0 as the capabilities name them, and fields of the common configuration. [VIRTIO1.4 4.1.4.3]
ISR, CONFIG, NOTIFY = 0x1000, 0x2000, 0x3000
DEVICE_SELECT, DEVICE_FEATURE, DRIVER_SELECT, DRIVER_FEATURE = 0x00, 0x04, 0x08, 0x0C
CONFIG_VECTOR, NUM_QUEUES, STATUS, GENERATION, QUEUE_SELECT = 0x10, 0x12, 0x14, 0x15, 0x16
SIZE, VECTOR, ENABLE, NOTIFY_OFF, DESC, DRIVER, DEVICE = 0x18, 0x1A, 0x1C, 0x1E, 0x20, 0x28, 0x30
NOTIFY_DATA, QUEUE_RESET = 0x38, 0x3A


def component(**changes):
    """Return the transport of these numbers, or with others."""
    return PciTransport(**{"function": FUNCTION, "device_features": DEVICE_FEATURES, "queues": QUEUES, "first_queue": FIRST,
                           "config_bytes": CONFIG_BYTES, "vectors": VECTORS, **changes})  # fmt: skip


class Bench:
    """A driver's register accesses, and everything else around the transport.

    Parameters
    ----------
    ready : :class:`bool`
        Commands, kicks and interrupts are taken.
    stop : :class:`bool`
        What works for the function stops when it is told to.
    features : :class:`int`
        What :meth:`start` accepts.
    """

    def __init__(self, dut, rng, *, ready=True, stop=True, features=OFFERED):
        self.dut, self.rng, self.features = dut, rng, features
        self.bus = RegisterBus(dut, hold=lambda: rng.choice([0, 0, 0, 3]))
        self.notifications = Stream(dut, "notifications")
        self.commands, self.kicks, self.interrupts = [], [], []
        self.unserved = []  # commands of :meth:`serve`
        for name, log in (("commands", self.commands), ("kicks", self.kicks), ("interrupts", self.interrupts)):
            stream = Stream(dut, name)
            cocotb.start_soon(stream.watch(log))
            stream.set_ready(int(ready))
        self.content = rng.randbytes(CONFIG_BYTES)
        dut.config.value = int.from_bytes(self.content, "little")
        dut.stopped.value = 0
        cocotb.start_soon(self._check_commands())
        if stop:
            cocotb.start_soon(self.obey())

    async def obey(self):
        """Stop when told to, some cycles later."""
        while True:
            await RisingEdge(self.dut.clk)
            if self.dut.stop.value == 1:
                await ClockCycles(self.dut.clk, self.rng.randrange(20))
                self.dut.stopped.value = 1
                while self.dut.stop.value == 1:
                    await RisingEdge(self.dut.clk)
                self.dut.stopped.value = 0

    async def serve(self):
        """Be a ring engine: take queues and give them back, suspend and resume, each some cycles late."""
        rng, idle = self.rng, (1 << len(QUEUES)) - 1
        cocotb.start_soon(Stream(self.dut, "commands").watch(self.unserved))
        cocotb.start_soon(self._check_kicks())
        while True:
            self.dut.idle.value = idle
            await RisingEdge(self.dut.clk)
            if self.unserved:
                command = unpack(QueueCommand, self.unserved[0])
                await ClockCycles(self.dut.clk, rng.randrange(40))
                self.unserved.pop(0)
                here = 1 << command.queue - FIRST
                assert bool(idle & here) == (command.operation == QueueOperation.ENABLE), f"{command} of a queue that is not so"
                idle ^= here
            elif self.dut.suspend.value != self.dut.suspended.value:
                await ClockCycles(self.dut.clk, rng.randrange(40))
                self.dut.suspended.value = int(self.dut.suspend.value)
            elif self.dut.stop.value == 1:
                idle = (1 << len(QUEUES)) - 1

    async def _check_kicks(self):
        kicks = Stream(self.dut, "kicks")
        while True:
            await RisingEdge(self.dut.clk)
            if kicks.read_valid() and not self.dut.stop.value:  # one may outlive its queue in a stop
                here = 1 << kicks.read_payload() - FIRST
                assert not int(self.dut.idle.value) & here, "a kick before the engine knows of the queue"

    async def _check_commands(self):
        """Whatever is under way when a stop begins: no command is offered in it."""
        stop, valid, edge = self.dut.stop, self.dut.commands__valid, RisingEdge(self.dut.clk)
        while True:
            await RisingEdge(stop)
            await edge
            was_valid = valid.value
            while stop.value:
                await edge
                assert was_valid or not valid.value, "a command is offered in a stop"
                was_valid = valid.value

    async def read(self, offset, size):
        return await self.bus.read(offset, size, function=FUNCTION)

    async def write(self, offset, value, size):
        await self.bus.write(offset, value, size, function=FUNCTION)

    async def reset(self):
        await self.write(STATUS, 0, 1)
        for _ in range(200):
            if await self.read(STATUS, 1) == 0:
                return
        raise AssertionError("the device reset does not end")

    async def offer(self):
        """Return the features that the device offers."""
        found = 0
        for select in range(4):
            await self.write(DEVICE_SELECT, select, 4)
            found |= await self.read(DEVICE_FEATURE, 4) << 32 * select
        return found

    async def accept(self, features):
        """Write the driver's features and FEATURES_OK; return whether the device took them."""
        for select in range(4):
            await self.write(DRIVER_SELECT, select, 4)
            await self.write(DRIVER_FEATURE, features >> 32 * select & 0xFFFFFFFF, 4)
        await self.write(STATUS, 11, 1)
        return bool(await self.read(STATUS, 1) & 8)

    async def queue(self, number, *, size=None, vector=None, enable=True):
        """Set a queue up; its addresses are made from its number."""
        await self.write(QUEUE_SELECT, number, 2)
        if size is not None:
            await self.write(SIZE, size, 2)
        if vector is not None:
            await self.write(VECTOR, vector, 2)
        for field, address in zip((DESC, DRIVER, DEVICE), self.addresses(number)):
            await self.write(field, address & 0xFFFFFFFF, 4)
            await self.write(field + 4, address >> 32, 4)
        if enable:
            await self.write(ENABLE, 1, 2)

    @staticmethod
    def addresses(number):
        return tuple(0x1234_5678_0000_0000 + 0x10000 * number + 0x1000 * part for part in range(3))

    async def start(self, features=None, *, queues=range(len(QUEUES)), vectors=None):
        """A driver's whole way to DRIVER_OK. [VIRTIO1.4 3.1.1]"""
        await self.reset()
        await self.write(STATUS, 1, 1)
        await self.write(STATUS, 3, 1)
        assert await self.accept(self.features if features is None else features)
        for n in queues:
            await self.queue(n, vector=None if vectors is None else vectors[n])
        await self.write(STATUS, 15, 1)
        assert await self.read(STATUS, 1) == 15

    async def ring(self, number, *, value=None, size=2):
        await self.write(NOTIFY + 4 * number, number if value is None else value, size)

    async def notify(self, number):
        await self.notifications.put(pack(Notification, queue=FIRST + number))

    def level(self, name):
        return int(getattr(self.dut, name).value)

    async def pulse(self, name):
        getattr(self.dut, name).value = 1
        await RisingEdge(self.dut.clk)
        getattr(self.dut, name).value = 0

    def vectors(self):
        """Return the vectors sent since the last call."""
        found = []
        for payload in self.interrupts:
            request = unpack(MsixRequest, payload)
            assert request.function == FUNCTION
            found.append(request.vector)
        self.interrupts.clear()
        return found


async def begin(dut, **how):
    """Return bench and random numbers of a test."""
    rng = random.Random(cocotb.RANDOM_SEED)
    await start(dut, "bus__request")
    return Bench(dut, rng, **how), rng
