"""A whole card whose host has the IOMMU: the card caches its translations, and the golden model judges every use of them."""

from collections import Counter
from typing import ClassVar

from ..models.events import Operation
from ..models.host import ConfigRead, ConfigWrite, MemoryRead, MemoryWrite, enable_ats, enable_msix, enable_pri
from ..models.host_iommu import HostIommu
from ..models.iommu.ats import PAGE_REQUEST_BYTES, PageRequest
from ..models.iommu.commands import AtsInval, AtsPrgr, IotinvalVma
from ..models.iommu.registers import Capabilities, IommuDriver
from ..models.iommu.unit import Unit
from ..models.tlp import TRANSLATION_REQUEST, UNTRANSLATED, TlpType, encode
from ..rtl.config import BlkConfig, EndpointConfig, HostAtsConfig
from .card import Card
from .host_port import HostPort
from .stream import cycle

__all__ = ["FRAME", "SECTOR", "HostAtsCard", "host_ats_config"]

REGISTERS, REGISTERS_BYTES = 0x5000_0000, 4096  # of the host's IOMMU: no TLP leads there
FRAME, SECTOR = 4096, 512
EXPRESS, DEVICE_STATUS = 0x10, 0x14  # capability ID; place in BAR 0
BARS = range(0x10, 0x20, 4)


def host_ats_config():
    """Return the card that tests of host ATS share: a disk and its virtual function, 2 page requests with patience of 4000 cycles."""
    return EndpointConfig(
        width=64, iommu=None, host_ats=HostAtsConfig(entries=16, ways=2, requests=4, page_requests=2, page_patience_cycles=4000),
        completion_timeout_cycles=3000, tags=32, wall_tags=8, read_buffer_bytes=4096,
        disks=(BlkConfig(capacity_sectors=256, queue_size=64, virtual_functions=1),))  # fmt: skip


class _Port(HostPort):
    """A host port whose software finds the IOMMU of the host at ``REGISTERS``."""

    iommu: HostIommu

    async def perform(self, operation):
        is_ours = isinstance(operation, (MemoryRead, MemoryWrite)) and REGISTERS <= operation.address < REGISTERS + REGISTERS_BYTES
        if not is_ours:
            return await super().perform(operation)
        unit, offset, result = self.iommu.unit, operation.address - REGISTERS, None
        if isinstance(operation, MemoryRead):
            result = unit.registers.read(offset, operation.size)
        else:
            unit.registers.write(offset, operation.size, operation.value)
        self.run_commands()
        if self.observe is not None:
            self.observe(Operation(cycle(), operation, result), None)
        return result

    def run_commands(self):
        """Let the IOMMU do what it can, and send what it wants sent."""
        self.iommu.unit.run_commands()
        for tlp in self.iommu.messages(self.host.ROUTING_ID):
            self.link.send(encode(tlp), cycle())


class HostAtsCard(Card):
    """The card ``dut`` below a root complex with an IOMMU, whose software enables ATS; as :class:`Card` else.

    Attributes
    ----------
    host_iommu : :class:`HostIommu`
    kinds : :class:`collections.Counter`
        Requests of the card by (type, address type).
    """

    port_kind = _Port
    context: ClassVar = {"EN_ATS": True}
    capabilities = Capabilities(ATS=True)  # of the IOMMU

    def connect(self):
        super().connect()
        self.host.iommu = self.port.iommu = self.host_iommu = HostIommu(Unit(self.session.memory, self.capabilities))
        self.kinds = Counter()

    def _observe(self, event, tlp):
        """Show the checkers what memory saw; translation requests and refused requests are none of it."""
        if tlp is not None and tlp.type in (TlpType.MRD, TlpType.MWR):
            self.kinds[tlp.type, tlp.at] += 1
            if tlp.at == TRANSLATION_REQUEST:
                return
            if tlp.at == UNTRANSLATED and tlp.address >> 20 != self.host.msi_window[0] >> 20:
                tlp = self.host_iommu.routed_to
                if tlp is None:
                    return
        super()._observe(event, tlp)
        if tlp is not None and tlp.type is TlpType.MSG:
            self.port.run_commands()  # a fence may have waited for it

    async def enable_iommu(self, *, levels=1, ats=True):
        """Bring the host's IOMMU up with an empty directory, and ATS of all functions if wanted."""
        self.session.add("AccessChecker", iommu_function=None)
        self.iommu = IommuDriver(REGISTERS, self.session.memory, self.allocator, allowed=self.session.allowed)
        await self.port.run(self.iommu.init(levels))
        if ats:
            for info in self.functions:
                await self.port.run(enable_ats(info))
        return self.iommu

    async def enable_pages(self, most=64, *, log2_entries=6):
        """Let the IOMMU queue page requests, and function 0 send up to ``most``. The devices' contexts have EN_PRI."""
        base = self.allocator.pages(max(1, (PAGE_REQUEST_BYTES << log2_entries) // FRAME))
        await self.port.run(self.iommu.write("pqb", base >> 12 << 10 | log2_entries - 1))
        await self.port.run(self.iommu.write("pqcsr", 1))
        self.page_queue, self.page_entries = base, 1 << log2_entries
        self.host_iommu.allocation = await self.port.run(enable_pri(self.functions[0], most))

    async def page_requests(self):
        """Take what is in the page-request queue: (function, page address, group, reads, writes) of each."""
        return [(one.device_id, one.address, one.group, one.reads, one.writes) for one in await self.page_records()]

    async def page_records(self):
        """Take what is in the page-request queue, each as a :class:`PageRequest`."""
        run, found = self.port.run, []
        head, tail = await run(self.iommu.read("pqh")), await run(self.iommu.read("pqt"))
        while head != tail:
            record = self.session.memory.read(self.page_queue + head * PAGE_REQUEST_BYTES, PAGE_REQUEST_BYTES)
            first, body = (int.from_bytes(part, "little") for part in (record[:8], record[8:]))
            found.append(PageRequest(first >> 40, body & -FRAME, body >> 3 & 0x1FF, bool(body & 1), bool(body & 2), bool(body & 4),
                                     first >> 12 & 0xFFFFF if first >> 32 & 1 else None))  # fmt: skip
            head = (head + 1) % self.page_entries
        await run(self.iommu.write("pqh", head))
        return found

    async def answer_page(self, function, group, code=0, pid=None):
        """Send a PRG Response by ATS.PRGR."""
        await self.port.run(self.iommu.submit([AtsPrgr(self.host.bus << 8 | function, group, code, pid)]))

    async def invalidate(self, disk, iova=None, *, is_range=False):
        """Have the IOMMU and the card forget what the table of ``disk`` said of the page at ``iova``, or of all; wait for the end."""
        rid = self.host.bus << 8 | disk.function
        order = AtsInval(rid, (1 << 63) - FRAME if iova is None else iova, is_range=iova is None or is_range)
        await self.port.run(self.iommu.submit([IotinvalVma(address=iova), order]))
        await self.port.run(self.iommu.fence())

    async def traffic(self, disk, rounds):
        """Write random sectors and read them back, and compare."""
        image = {}
        for _ in range(rounds):
            batch = []
            for sector in self.rng.sample(range(0, 256, 16), 6):
                count = self.rng.randrange(1, 17)
                data = self.rng.randbytes(count * SECTOR)
                batch.append((sector, data, disk.blk.write(sector, data)))
            await disk.done([request for *_, request in batch])
            for sector, data, request in batch:
                assert request.status == 0
                image[sector] = data
            reads = [(sector, disk.blk.read(sector, len(data))) for sector, data in image.items()]
            await disk.done([request for _, request in reads])
            assert all(request.data == image[sector] for sector, request in reads)

    async def level_reset(self, disk):
        """Do a function level reset of function 0, which is ``disk``, and bring it up again, without ATS."""
        bars = await self.bars()
        await self.port.perform(ConfigWrite(0, self.functions[0].capabilities[EXPRESS][0] + 8, 2, 1 << 15))
        await self.put_back(bars)
        await disk.restart()

    async def bars(self):
        """Return the BARs of function 0, for `put_back`."""
        return [await self.port.perform(ConfigRead(0, at, 4)) for at in BARS]

    async def put_back(self, bars):
        """Bring function 0 back as it was in front of a reset, ATS off; its BARs were ``bars``."""
        info, perform = self.functions[0], self.port.perform
        for at, value in zip(BARS, bars):
            await perform(ConfigWrite(0, at, 4, value))
        while await perform(MemoryRead(info.bars[0].address + DEVICE_STATUS, 1)) == 0xFF:
            await perform(ConfigWrite(0, 4, 2, 6))
        await self.port.run(enable_msix(info, 2))
