"""A whole card in a simulation, with a model host, its software and the golden model around it."""

import random
from typing import ClassVar

import cocotb

from ..models.host import CompletionPolicy, Host, enable_msix, enable_virtual, plan_virtual
from ..models.host import enumerate as enumerate_functions
from ..models.iommu.registers import IommuDriver
from ..models.iommu.tables import Allocator, DeviceContext, PageTable
from ..models.virtio.blk import BlkDriver
from ..models.virtio.driver import FIELDS, Feature, StructureType, VirtioPciDriver
from ..models.virtio.virtqueue import make_ring
from ..rtl.config import BlkConfig, EndpointConfig
from ..rtl.verilog import RawCard
from ..rtl.virtio.transport import OFFERED
from .counted import Counted
from .host_port import HostPort
from .ring_checker import DoubtfulBlkDevice
from .session import Session
from .stream import cycle, start
from .tlp_bus import RawLink

__all__ = ["Card", "Disk", "DoubtfulBlkDevice", "MappedMemory", "bench_config"]

PAGE = 4096
OWN, OWN_BYTES = 0x4000_0000, 0x100_0000  # directories, page tables, queues of the IOMMU
FRAMES = 0x1_0000_0000  # physical pages behind the disks' IOVAs, from here on
IOVAS = 0x10_0000_0000  # first IOVA of ring and buffers


def bench_config(width=256):
    """Return the card that system tests share, so that it is built once: an IOMMU and two disks, patience of 10,000 cycles.

    The disks have 1 MiB; the first has a queue of 1024, the second one of 256. They offer split rings only, without options: the judge of
    Linux runs knows no others.
    """
    disks = BlkConfig(capacity_sectors=2048, queue_size=1024), BlkConfig(capacity_sectors=2048)
    return EndpointConfig(width=width, disks=disks, transport_features=OFFERED, completion_timeout_cycles=10_000)


def bench_card(width=256):
    """Return the circuit of :func:`bench_config`, with counters beside it."""
    return Counted(RawCard(bench_config(width)))


class MappedMemory:
    """Memory as a device addresses it: the pages of ``frames`` (IOVA page number -> physical page number)."""

    def __init__(self, memory):
        self.memory, self.frames = memory, {}

    def places(self, address, length):
        """Yield the bus addresses and lengths, in order, of the pieces that ``length`` bytes at ``address`` consist of."""
        while length:
            size = min(length, PAGE - address % PAGE)
            yield self.frames.get(address // PAGE, address // PAGE) * PAGE + address % PAGE, size
            address, length = address + size, length - size

    def read(self, address, length):
        return b"".join(self.memory.read(at, size) for at, size in self.places(address, length))

    def write(self, address, data):
        done = 0
        for at, size in self.places(address, len(data)):
            self.memory.write(at, data[done : done + size])
            done += size


class Disk:
    """One virtio-blk function and its driver, as :meth:`Card.disk` brings it up.

    Attributes
    ----------
    function : :class:`int`
        Function number, and device_id.
    driver : :class:`VirtioPciDriver`
    blk : :class:`BlkDriver`
    table : :class:`PageTable` or None
        The device's page table; None when it is not translated.
    memory : :class:`MappedMemory`
    features : :class:`int`
        Bits that say what kind of ring it has, and how that is used.
    golden : :class:`DoubtfulBlkDevice`
        The model of the device, once it is watched.
    """

    def __init__(self, card, function, table, memory, features, driver, blk):
        self.card, self.function, self.table, self.memory, self.features = card, function, table, memory, features
        self.driver, self.blk, self.layout = driver, blk, blk.ring.layout

    @property
    def golden(self):
        return self.card.session.devices[self.function]

    def watch(self, *, vector, is_running=False):
        """Let the golden device judge the queue, from in front of the reset on or when it runs already."""
        config, layout = self.card.config.all_devices[self.function - self.card.config.first_disk], self.layout
        status = self.driver.structure(StructureType.COMMON).address + FIELDS["device_status"][0]
        desc, avail, used = (at for at, _ in layout.parts)
        self.card.session.add(
            "RingChecker", function=self.function, size=layout.size, desc=desc, avail=avail, used=used, features=self.features,
            device={"capacity_sectors": config.capacity_sectors, "serial": config.serial.hex()}, vector=vector,
            status=None if is_running else status, **({"pages_come": True} if self.card.pages_come else {}))  # fmt: skip

    async def start(self, *, wanted, vectors, config_vector, before_ok=None):
        """Reset the function, zero its ring, bring it up; ``before_ok()`` is awaited in front of DRIVER_OK. [VIRTIO1.4 2.4, 3.1.1]

        What was under way is lost: what it should have written is in doubt.
        """
        driver, run = self.driver, self.card.port.run
        self._settings = {"wanted": wanted, "vectors": vectors, "config_vector": config_vector}
        await run(driver.find())
        if self.function not in self.card.session.devices:
            self.watch(vector=vectors[0] if vectors else None)
        await run(driver.reset())
        for request in self.blk.requests.values():
            self.golden.forget_request(request)
        self.blk.abandon()
        self.blk.ring.reset()
        await run(driver.acknowledge())
        await run(driver.negotiate(wanted, 1 << Feature.VERSION_1 | self.features))
        await run(driver.set_config_vector(config_vector))
        await run(driver.set_up_queue(0, self.layout, vector=vectors[0] if vectors else 0xFFFF))
        if before_ok is not None:
            await before_ok()
        await run(driver.driver_ok())

    async def restart(self, *, before_ok=None):
        """As :meth:`start`, with the settings of last time."""
        await self.start(**self._settings, before_ok=before_ok)

    async def offer(self):
        """Publish what was added and ring the doorbell."""
        if self.blk.publish():
            await self.card.port.run(self.driver.notify(0, self.blk.ring))

    async def done(self, requests, *, cycles=60_000, may_fail=False):
        """Publish what was added, ring the doorbell, wait until all of ``requests`` came back; raises AssertionError when they do not.

        ``may_fail``: the golden device allows that they end in IOERR.
        """
        doubtful = {(request.kind, request.sector) for request in requests} if may_fail else set()
        self.golden.doubtful |= doubtful
        await self.offer()
        if not await self.card.port.until(lambda: self._are_back(requests), cycles):
            raise AssertionError(f"{sum(not r.is_done for r in requests)} requests did not come back in {cycles} cycles")
        self.golden.doubtful -= doubtful
        for request in requests if may_fail else ():
            self.golden.settle(request)

    def _are_back(self, requests):
        if self.blk.ring.has_used:
            self.blk.poll()
            if self.blk.damage:
                raise AssertionError(self.blk.damage[0])
        return all(request.is_done for request in requests)


class Card:
    """The card ``dut`` of ``config`` on a paced raw link, enumerated on demand, watched by a :class:`Session`.

    Parameters
    ----------
    dut
        A simulated :class:`ringwall.rtl.verilog.RawCard`, perhaps inside of :class:`.counted.Counted`.
    config : :class:`ringwall.rtl.config.EndpointConfig`
    seed : :class:`int`
    latency : :class:`int`
        Cycles from the card's read to the host's first completion.
    policy : :class:`CompletionPolicy` or None
        Instead of one with ``latency``.
    log : :class:`.log.Log` or None
    link : dict
        Further parameters of :class:`.tlp_bus.RawLink`.
    """

    port_kind = HostPort
    pages_come = False  # the disks wait for pages that are out of reach
    context: ClassVar = {}  # fields of the disks' device contexts beside their table

    def __init__(self, dut, config, *, seed, latency=250, policy=None, log=None, link=None, mps=256, mrrs=512):
        self.dut, self.config, self.rng = dut, config, random.Random(seed)
        self.session = Session(seed=seed, log=log, cycle=cycle)
        self.host = Host(self.session.memory, rng=self.rng, policy=policy or CompletionPolicy(latency=latency), mps=mps, mrrs=mrrs)
        self.link_options = {"bytes_per_cycle": config.width / 8 * 128 / 130} | (link or {})  # PCIe 3.0: 128b/130b
        self.observers = [self.session.take]
        self.allocator = Allocator(self.session.memory, OWN, OWN_BYTES, rng=self.rng)
        self.iommu, self._frame, self._next_pscid = None, FRAMES // PAGE, 1
        self.disks = {}

    async def begin(self):
        """Reset, start the link, enumerate; ``functions`` are what software found."""
        await start(self.dut)
        self.connect()
        return await self.enumerate()

    def connect(self):
        """Start the link; for a card that runs already, in front of :meth:`enumerate`."""
        self.link = RawLink(self.dut, **self.link_options)
        self.port = self.port_kind(self.host, self.link, observe=self._observe)
        self.link.start()

    async def enumerate(self):
        """Let software find ``functions``."""
        self.functions = await self.port.run(enumerate_functions(self.host))
        for info in self.functions:
            if info.msix is not None:
                is_iommu = info.function < self.config.first_disk
                self.session.add("MessageChecker", function=info.function, entries=info.msix.count, is_translated=not is_iommu,
                                 table=info.bars[info.msix.table_bar].address + info.msix.table_offset)  # fmt: skip
        return self

    def _observe(self, event, tlp):
        for observer in self.observers:
            observer(event, tlp)

    async def enable_iommu(self, *, levels=1):
        """Bring the card's IOMMU up with an empty directory; from here on the disks are translated, or refused."""
        info = self.functions[0]
        await self.port.run(enable_msix(info, 2))
        self.session.add("AccessChecker", iommu_function=0, own=[[OWN, OWN_BYTES, "r"]])
        self.session.add("FenceChecker")
        self.iommu = IommuDriver(info.bars[0].address, self.session.memory, self.allocator, allowed=self.session.allowed)
        await self.port.run(self.iommu.init(levels))
        self.session.add("FaultQueueChecker", base=self.iommu.fq_base, entries=self.iommu.fq_entries, registers=info.bars[0].address)
        return self.iommu

    async def enable_virtual(self, number, count, plan=None):
        """Enable ``count`` virtual functions of disk ``number``; returns the plan for the next time. ``functions`` has them behind others.

        They are disks, as :meth:`disk` brings them up, in the order of their function numbers.
        """
        info = self.functions[self.config.first_disk + number]
        plan = plan or await self.port.run(plan_virtual(self.host, info))
        found = await self.port.run(enable_virtual(self.host, info, plan, count))
        self.functions += [None] * (self.config.functions - len(self.functions))
        for one in found:
            if self.functions[one.function] is None:
                self.session.add("MessageChecker", function=one.function, entries=one.msix.count,
                                 table=one.bars[one.msix.table_bar].address + one.msix.table_offset)  # fmt: skip
            self.functions[one.function] = one
        return plan

    def map(self, table, memory, iova, pages, *, perms="rwu"):
        """Map ``pages`` pages from ``iova`` on to fresh physical pages, scattered."""
        frames = [self._frame + n for n in range(pages)]
        self._frame += pages
        self.rng.shuffle(frames)
        for n, frame in enumerate(frames):
            memory.frames[iova // PAGE + n] = frame
            table.map_page(iova + PAGE * n, frame * PAGE, perms=perms)

    async def disk(self, number, *, queue_size=64, buffer_pages=600, platform=True, framing="parts", alignment=1, vectors=True,
                   spread=False, base=IOVAS, features=0):  # fmt: skip
        """Bring disk ``number`` (from 0) up: tables if there is an IOMMU in use, context, MSI-X, virtio; return the :class:`Disk`.

        ``spread``: descriptors, available ring and used ring each have a page of their own. ``base``: first address of ring and buffers.
        ``features``: of the ring, which the card must offer.
        """
        function = self.config.first_disk + number
        info = self.functions[function]
        translated = self.iommu is not None and platform
        memory, table = MappedMemory(self.session.memory), None
        area = base + 0x10_0000, buffer_pages * PAGE
        if translated:
            table = PageTable(self.session.memory, self.allocator, observer=self.session.allowed)
            self.map(table, memory, base, 16)
            self.map(table, memory, area[0], buffer_pages)
            message = info.msix.message_address & -PAGE
            table.map_page(message, message, perms="rwu")
            self.iommu.directory.set(function, DeviceContext.sv39(table.root, PSCID=self._next_pscid, **self.context))
            self._next_pscid += 1
            await self.port.run(self.iommu.invalidate_context(function))
        elif self.iommu is not None:
            self.session.allowed.bypassed(function, True)
        if vectors:
            await self.port.run(enable_msix(info, 2))
        driver = VirtioPciDriver(info)
        parts = {"addresses": (base, base + 4 * PAGE, base + 8 * PAGE)} if spread else {"base": base}
        ring = make_ring(memory, features, size=queue_size, **parts)
        wanted = features | 1 << Feature.VERSION_1 | 1 << 9 | (1 << Feature.ACCESS_PLATFORM if platform else 0)
        blk = BlkDriver(ring, memory, area=area, rng=self.rng, framing=framing, alignment=alignment)
        disk = self.disks[number] = Disk(self, function, table, memory, features, driver, blk)
        await disk.start(wanted=wanted, vectors=[1] if vectors else [], config_vector=0 if vectors else 0xFFFF)
        return disk

    def finish(self):
        """End the run: nothing may differ, no rule of the link may be broken."""
        if self.host.violations:
            raise AssertionError(self.host.violations[0])
        if self.session.board.checkers:
            self.session.add("MemoryChecker")
        self.session.finish()
        cocotb.log.info("%d comparisons, 0 differences", self.session.board.comparisons)
