"""What is around a virtio-iommu and its gate in a simulation: who fills its queues, clients that do DMA, a requester, the golden device."""

import random

import cocotb
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.queue import Queue
from cocotb.triggers import ClockCycles, Event, Lock, RisingEdge

from ..models.virtio.iommu import IommuDevice as GoldenDevice
from ..models.virtio.iommu_formats import IommuConfig, Range, Region, RegionType
from ..models.virtio.iommu_rules import IommuDescription, Verdict
from ..rtl.dma.layouts import ChainBeat
from ..rtl.iommu.gate import Gate
from ..rtl.spec import virtio_iommu as spec
from ..rtl.tlp.layouts import Burst, BurstRetired, BurstStatus, Hint
from ..rtl.viommu.unit import Viommu
from ..rtl.virtio.layouts import Chain, ConfigWrite
from .back_end import beats_of
from .run import params
from .stream import Stream, cycle, pack, start, unpack

__all__ = ["Wall", "WallBench", "description_of"]

REQUESTS, EVENTS = 0, 1
FILL = 0xA5  # what buffers hold before
RECORD_BYTES = 24


def description_of(device):
    """Return the golden description of a :class:`ringwall.rtl.viommu.device.IommuDevice`."""
    regions = tuple(Region(r.start, r.end, RegionType.MSI if r.is_msi else RegionType.RESERVED) for r in device.regions)
    told = IommuConfig.unpack(device.configuration)
    return IommuDescription(
        dict.fromkeys(device.endpoints, regions), features=device.device_features, page_size_mask=told.page_size_mask,
        input_range=told.input_range, domain_range=told.domain_range, probe_size=told.probe_size, bypass=int(device.bypass),
        capacity=device.intervals, physical=(Range(0, (1 << 56) - 1),))  # fmt: skip


class Wall(wiring.Component):
    """A :class:`Viommu` and the gate that asks it; client n of the gate is that of function n + 1."""

    def __init__(self, *, width, device):
        self._gate = Gate(clients=len(device.endpoints), functions=len(device.endpoints) + 1, doorbells=True)
        self._unit = Viommu(width=width, device=device)
        gates, units = self._gate.signature.members, self._unit.signature.members
        self._theirs = ("bursts", "o", "hints", "bypass", "retired_reads", "retired_writes")
        between = ("translate_request", "translate_response", "spare", "fence", "fenced")
        self._ours = [name for name in units if name not in between]
        super().__init__({**{name: gates[name] for name in self._theirs}, **{name: units[name] for name in self._ours},
                          "fences": Out(1), "drained": Out(1)})  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.gate, m.submodules.unit = gate, unit = self._gate, self._unit
        for source, names in ((gate, self._theirs), (unit, self._ours)):
            for name in names:
                member, inner, outer = source.signature.members[name], getattr(source, name), getattr(self, name)
                pairs = zip(inner, outer) if member.dimensions else [(inner, outer)]
                for one, other in pairs:
                    if not member.is_port:
                        wiring.connect(m, one, wiring.flipped(other))
                    else:
                        m.d.comb += one.eq(other) if member.flow == In else other.eq(one)
        for source, sink in ((gate.translate_request, unit.translate_request), (unit.translate_response, gate.translate_response),
                             (unit.fence, gate.fence), (gate.fenced, unit.fenced)):  # fmt: skip
            wiring.connect(m, source, sink)
        m.d.comb += gate.spare.eq(unit.spare)
        m.d.comb += [self.fences.eq(gate.fence.valid & gate.fence.ready), self.drained.eq(gate.fenced.valid & gate.fenced.ready)]
        return m


class Inbox(Queue):
    """A queue that a stream can be watched into."""

    append = Queue.put_nowait


class WallBench:
    """Drives a :class:`Wall`. Accesses are judged by the golden ``device`` when they are over, so that its fences count.

    Parameter of the run is ``width``; ``latency()`` gives the cycles from a burst that left the gate to its end.
    """

    def __init__(self, dut, device):
        self.dut, self.latency = dut, lambda: 5
        self.width, self.device = params()["width"], GoldenDevice(description_of(device))

    async def begin(self):
        dut = self.dut
        self.rng = random.Random(cocotb.RANDOM_SEED)
        await start(dut)
        self.edge = RisingEdge(dut.clk)
        self.chains, self.readable, self.writable = (
            [Stream(dut, f"{name}__{n}") for n in (REQUESTS, EVENTS)] for name in ("chains", "readable", "writable"))  # fmt: skip
        self.beats = Inbox(), Inbox()
        for n in (REQUESTS, EVENTS):
            cocotb.start_soon(self.writable[n].watch(self.beats[n]))
            self.writable[n].set_ready(1)
        self.ports = {one: (Stream(dut, f"bursts__{n}"), Lock()) for n, one in enumerate(self.device.description.endpoints)}
        self.hints = Stream(dut, "hints"), Lock()
        self.o, self.under_way, self.cookie = Stream(dut, "o"), {}, 0
        self.times = []  # cycles in which bursts left the gate
        cocotb.start_soon(self.o.watch(self, self.times))
        self.o.set_ready(1)
        self.retired = Queue(), Queue()
        for name, ends in zip(("retired_reads", "retired_writes"), self.retired):
            cocotb.start_soon(self._retire(Stream(dut, name), ends))
        dut.bypass.value = dut.settled__1.value = 1
        dut.features.value = self.device.description.features
        self.device.negotiate(self.device.description.features)
        return self

    # -- queues --

    async def give(self, queue, readable, room, status=BurstStatus.OK):
        """Hand a chain to a queue."""
        await self.chains[queue].put(pack(Chain, queue=queue, readable_bytes=len(readable), writable_bytes=room))
        if readable:
            await self.readable[queue].put_many(beats_of(ChainBeat(self.width), readable, status=status))

    async def packet(self, queue):
        """Return the bytes of the next packet, having checked its form."""
        content, lanes = b"", self.width // 8
        while True:
            beat = unpack(ChainBeat(self.width), await self.beats[queue].get())
            assert beat.first == (not content)
            assert beat.last or beat.byte_count == lanes
            content += beat.data.to_bytes(lanes, "little")[: beat.byte_count]
            if beat.last:
                return content

    async def ask(self, readable, room, status=BurstStatus.OK):
        """Return what is written for a request."""
        await self.give(REQUESTS, readable, room, status)
        return await self.packet(REQUESTS)

    async def serve(self, readable, room):
        """The same, judged by the golden device."""
        self.device.serve(readable, room)
        written, before = await self.ask(readable, room), bytes([FILL]) * room
        problem = self.device.settle(before, written + before[len(written) :], len(written))
        assert not problem, f"{readable.hex()} with {room}: {problem}"
        return written

    async def write_bypass(self, value):
        """Write config.bypass, and read it until it is so."""
        self.device.write_config(spec.CONFIG_BYPASS, bytes([value]))
        word, byte = divmod(spec.CONFIG_BYPASS, 8)
        self.dut.config_write.value = pack(ConfigWrite, enable=1 << byte, word=word, data=value << 8 * byte)
        await self.edge
        self.dut.config_write.value = 0
        while int(self.dut.config.value) >> 8 * spec.CONFIG_BYPASS & 1 != value:
            await self.edge
        self.check_config()

    def check_config(self):
        """Compare the device configuration with the golden one."""
        problem = self.device.config_read(int(self.dut.config.value).to_bytes(spec.CONFIG_BYTES, "little"))
        assert not problem, problem

    async def reset(self):
        """Reset the device, and negotiate all features again; return the cycles that it took."""
        self.device.begin_reset()
        began = cycle()
        self.dut.stop.value = 1
        await self.edge
        while not int(self.dut.stopped.value):
            await self.edge
        self.dut.stop.value = 0
        self.device.reset()
        self.device.negotiate(self.device.description.features)
        return cycle() - began

    # -- accesses --

    async def send(self, *accesses):
        """Let accesses of one endpoint enter the gate, back to back; return an event for the last that has its ``verdict`` when it is over
        and judged."""
        bursts, over = [], None
        for one in accesses:
            self.cookie, over = self.cookie + 1 & 0xFFF, Event()
            self.under_way[self.cookie] = self.device.begin(one), over
            bursts.append(pack(Burst, address=one.address, length_bytes=one.length, is_write=one.is_write, function=one.endpoint,
                               cookie=self.cookie))  # fmt: skip
        port, lock = self.ports[accesses[0].endpoint]
        async with lock:
            await port.put_many(bursts)
        return over

    async def access(self, access):
        """Return the verdict of an access that is over."""
        over = await self.send(access)
        await over.wait()
        return over.verdict

    def append(self, payload):
        """A burst left the gate."""
        cocotb.start_soon(self._end(unpack(Burst, payload)))

    async def _end(self, burst):
        opened, over = self.under_way.pop(burst.cookie)
        await ClockCycles(self.dut.clk, self.latency())
        refused = burst.verdict != BurstStatus.OK
        verdict = next((v for v in self.device.allowed(opened) if not refused and v.phys == burst.address),
                       Verdict() if refused else Verdict(burst.address))  # fmt: skip
        problem = self.device.judge(opened, verdict)
        assert not problem, problem
        over.verdict = verdict
        over.set()
        self.retired[burst.is_write].put_nowait(pack(BurstRetired, function=burst.function, epoch=burst.epoch))

    async def _retire(self, port, ends):
        while True:
            await port.put(await ends.get())

    async def hint(self, endpoint, address, is_write=0):
        """Tell that a page will be wanted."""
        port, lock = self.hints
        async with lock:
            await port.put(pack(Hint, function=endpoint, is_write=is_write, page=address >> 12))
