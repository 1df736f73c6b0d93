"""A whole card whose host has the IOMMU: the card caches its translations, and the golden model judges every use of them."""

from collections import Counter
from typing import ClassVar

from ..models.events import Operation
from ..models.host import MemoryRead, MemoryWrite, enable_ats
from ..models.host_iommu import HostIommu
from ..models.iommu.commands import AtsInval, IotinvalVma
from ..models.iommu.registers import Capabilities, IommuDriver
from ..models.iommu.unit import Unit
from ..models.tlp import TRANSLATION_REQUEST, UNTRANSLATED, TlpType, encode
from .card import Card
from .host_port import HostPort
from .stream import cycle

__all__ = ["HostAtsCard"]

REGISTERS, REGISTERS_BYTES = 0x5000_0000, 4096  # of the host's IOMMU: no TLP leads there
FRAME = 4096


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
        for tlp in self.iommu.invalidations(self.host.ROUTING_ID):
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

    def connect(self):
        super().connect()
        self.host.iommu = self.port.iommu = self.host_iommu = HostIommu(Unit(self.session.memory, Capabilities(ATS=True)))
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

    async def invalidate(self, disk, iova=None, *, is_range=False):
        """Have the IOMMU and the card forget what the table of ``disk`` said of the page at ``iova``, or of all; wait for the end."""
        rid = self.host.bus << 8 | disk.function
        order = AtsInval(rid, (1 << 63) - FRAME if iova is None else iova, is_range=iova is None or is_range)
        await self.port.run(self.iommu.submit([IotinvalVma(address=iova), order]))
        await self.port.run(self.iommu.fence())
