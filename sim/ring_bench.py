"""A ring engine alone, for its tests: the models' drivers in front of it, a back end in Python behind each of its ports."""

import random
from collections import deque

import cocotb
from cocotb.triggers import Event, RisingEdge, Timer

from ..models.memory import GuestMemory
from ..models.virtio.driver import Feature
from ..models.virtio.virtqueue import make_ring
from ..rtl.dma.layouts import Segment, WriterDone
from ..rtl.tlp.layouts import BurstStatus
from ..rtl.virtio.layouts import Chain, Notification, QueueCommand, QueueOperation
from .burst_bus import BurstMemory
from .stream import CLOCK_NS, Stream, cycle, pack, start, unpack

RULES = {"packed": Feature.RING_PACKED, "indirect": Feature.INDIRECT_DESC, "event_index": Feature.EVENT_IDX, "in_order": Feature.IN_ORDER}


class BackEnd:
    """Takes the chains of one port and finishes them in order, each ``latency()`` cycles after it came at the earliest.

    ``chains``: of each chain its queue's index, its readable and its writable segments (address, length). ``goes_on()``: whether the packet
    of the chain that ends now goes on in the next.
    """

    def __init__(self, dut, port, latency):
        self.latency, self.chains, self.held, self.era, self.goes_on = latency, [], False, 0, lambda: False
        self.news, self.parts = Event(), {name: deque() for name in ("chains", "readable", "writable")}
        for name, part in self.parts.items():
            stream = Stream(dut, f"{name}__{port}")
            stream.set_ready(1)
            cocotb.start_soon(stream.watch(_Told(part, self.news)))
        self.done = Stream(dut, f"finished__{port}")
        self.waiting, self.edge = deque(), RisingEdge(dut.clk)

    def start(self):
        cocotb.start_soon(self._take())
        cocotb.start_soon(self._finish())
        return self

    def list_of(self, name):
        """Take a whole list, or None while it is not whole."""
        part, found = self.parts[name], []
        for number, payload in enumerate(part):
            one = unpack(Segment, payload)
            if one.length_bytes:
                found.append((one.address, one.length_bytes))
            if one.last:
                for _ in range(number + 1):
                    part.popleft()
                return found
        return None

    async def _take(self):
        while True:
            while not self.parts["chains"]:
                self.news.clear()
                await self.news.wait()
            chain = unpack(Chain, self.parts["chains"].popleft())
            lists, era = [], self.era
            for name, length in (("readable", chain.readable_bytes), ("writable", chain.writable_bytes)):
                found = [] if name == "readable" and not length else self.list_of(name)
                while found is None and era == self.era:
                    self.news.clear()
                    await self.news.wait()
                    found = self.list_of(name)
                if found is None or era != self.era:
                    break
                assert sum(size for _, size in found) == length, f"{name} {found} of {chain}"
                lists.append(found)
            else:
                self.chains.append((chain.queue, *lists))
                self.waiting.append((cycle() + self.latency(), chain.writable_bytes))
                self.news.set()

    async def _finish(self):
        while True:
            while not self.waiting or self.held:
                self.news.clear()
                await self.news.wait()
            due, length = self.waiting[0]
            while due > cycle() and self.waiting:
                await Timer(min(due - cycle(), 50) * CLOCK_NS, "ns")
                await self.edge
            if self.waiting and not self.held:
                await self.done.put(pack(WriterDone, length_bytes=length, status=BurstStatus.OK, more=self.goes_on()))
                if self.waiting:
                    self.waiting.popleft()

    def forget(self):
        """Drop all that was not finished."""
        self.era += 1
        self.news.set()
        for part in (*self.parts.values(), self.waiting):
            part.clear()


class _Told:
    def __init__(self, items, news):
        self.items, self.news = items, news

    def append(self, item):
        self.items.append(item)
        self.news.set()


class RingBench:
    """Drives a ring engine whose ports are ``ports``: tuples of (function, sizes)."""

    def __init__(self, dut, width, ports, *, latency=None, back_latency=None):
        self.dut, self.width, self.ports = dut, width, ports
        self.rng = random.Random(cocotb.RANDOM_SEED)
        self.latency = latency or (lambda: self.rng.randrange(5, 60))
        self.back_latency = back_latency or (lambda: self.rng.randrange(2, 80))
        self.status = lambda burst: BurstStatus.OK
        self.memory = GuestMemory()
        self.queue_functions = [function for function, sizes in ports for _ in sizes]
        self.functions = max(self.queue_functions) + 1
        self.rings, self.features, self.notes, self.broken, self.stopped = {}, {}, [], [], set()
        self.kicked, self.kick_news = deque(), Event()

    async def begin(self):
        dut = self.dut
        self.commands, self.kicks, notes = await start(dut, "commands", "kicks", "notifications")
        Stream(dut, "hints").set_ready(1)
        self.servers = []
        for n in range(self.functions):
            streams = {k: Stream(dut, f"{k}__{n}") for k in ("bursts", "read_data", "write_data", "write_done")}
            self.servers.append(BurstMemory(self.memory, width=self.width, ordered=False, latency=self.latency,
                                            status=self._status, **streams).start())
            cocotb.start_soon(self._watch_break(n))
        self.backs = [BackEnd(dut, n, self.back_latency).start() for n in range(len(self.ports))]
        cocotb.start_soon(self._kick())
        cocotb.start_soon(self._stop_ports())
        notes.set_ready(1)
        cocotb.start_soon(notes.watch(self.notes))
        return self

    def _status(self, burst):
        return self.status(burst)

    async def _watch_break(self, n):
        signal = getattr(self.dut, f"needs_reset__{n}")
        while True:
            await RisingEdge(signal)
            await RisingEdge(self.dut.clk)
            if signal.value:
                self.broken.append(n)

    async def _stop_ports(self):
        dut = self.dut
        while True:
            await RisingEdge(dut.clk)
            stop = int(dut.port_stop.value)
            for n, back in enumerate(self.backs):
                if stop >> n & 1:
                    back.forget()
            dut.port_stopped.value = stop

    async def enable(self, queue, size, features, **options):
        """Make a ring and hand it to the engine."""
        ring = make_ring(self.memory, features, size=size, base=0x100000 * (queue + 1), rng=self.rng, **options)
        await self.give(queue, ring.layout, features)
        self.rings[queue], self.features[queue] = ring, features
        return ring

    async def give(self, queue, layout, features):
        """Hand a ring to the engine that is there already."""
        descriptor, driver, device = (part[0] for part in layout.parts)
        rules = {name: features >> bit & 1 for name, bit in RULES.items()}
        await self.commands.put(pack(
            QueueCommand, operation=QueueOperation.ENABLE, queue=queue, size=layout.size, rules=rules,
            descriptor_iova=descriptor, driver_iova=driver, device_iova=device))  # fmt: skip

    async def reset(self, queue, cycles=4000):
        """Take a queue back and wait until nothing of it is left."""
        await self.commands.put(pack(QueueCommand, operation=QueueOperation.RESET, queue=queue))
        await self.until(lambda: int(self.dut.idle.value) >> queue & 1, cycles)

    async def stop(self, function):
        """Stop a function and let it go again; its queues are gone."""
        getattr(self.dut, f"stop__{function}").value = 1
        await self.until(lambda: int(getattr(self.dut, f"stopped__{function}").value))
        for (owner, _), back in zip(self.ports, self.backs):
            if owner == function:
                back.forget()
        await self.until(lambda: int(getattr(self.dut, f"stopped__{function}").value))
        getattr(self.dut, f"stop__{function}").value = 0
        await RisingEdge(self.dut.clk)

    async def publish(self, queue, *, always=False):
        """Let the engine see what was added, and ring if it wants that."""
        if self.rings[queue].publish() or always:
            self.kicked.append(queue)
            self.kick_news.set()
            return True
        return False

    async def _kick(self):
        while True:
            while not self.kicked:
                self.kick_news.clear()
                await self.kick_news.wait()
            await self.kicks.put(self.kicked.popleft())

    async def until(self, condition, cycles=6000):
        begun = cycle()
        while not condition():
            await Timer(5 * CLOCK_NS, "ns")
            await RisingEdge(self.dut.clk)
            assert cycle() - begun < cycles, "it takes too long"

    def spans(self, most):
        """Return random buffers: readable, writable."""
        count = self.rng.randrange(1, most + 1)
        cut = self.rng.randrange(count + 1)
        all_spans = [(self.rng.randrange(1 << 40), self.rng.choice((1, 64, 4096, self.rng.randrange(1, 9000)))) for _ in range(count)]
        return all_spans[:cut], all_spans[cut:]

    def told(self, queue):
        """Return how many notifications of a queue came since the last call."""
        count = sum(unpack(Notification, note).queue == queue for note in self.notes)
        self.notes[:] = [note for note in self.notes if unpack(Notification, note).queue != queue]
        return count
