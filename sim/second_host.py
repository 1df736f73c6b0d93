"""A second host for the card, which none of us wrote: the root complex of cocotbext-pcie behind the raw link.

It packs and unpacks TLPs, enumerates, splits completions, keeps flow control credits and delivers MSI-X by its own reading
of PCI Express. The models' software (drivers, page tables) runs on it unchanged: only its operations are performed here.
"""

import logging
import random
import struct

import cocotb
from cocotb.queue import Queue
from cocotb.triggers import Event, SimTimeoutError, Timer, with_timeout
from cocotbext.pcie.core import RootComplex
from cocotbext.pcie.core.port import SimPort
from cocotbext.pcie.core.tlp import Tlp
from cocotbext.pcie.core.utils import PcieId

from ..models.host import Bar, ConfigRead, ConfigWrite, Delay, FunctionInfo, MemoryRead, MemoryWrite, WaitInterrupt
from ..models.iommu.registers import IommuDriver
from ..models.iommu.tables import Allocator, DeviceContext, PageTable
from ..models.virtio.blk import BlkDriver
from ..models.virtio.driver import Feature, VirtioPciDriver
from ..models.virtio.split import SplitDriver
from .card import MappedMemory
from .host_port import drive
from .stream import CLOCK_NS, cycle, start
from .tlp_bus import RawLink

__all__ = ["Bridge", "PoolMemory", "SecondDisk", "SecondHost", "from_dwords", "to_dwords"]

PAGE = 4096
IOVAS = 0x10_0000_0000  # first IOVA of ring and buffers
_WAITING = 8  # TLPs of the card that may wait for credits before the link is not ready


def to_dwords(tlp):
    """Return the dwords of a cocotbext-pcie TLP as the raw link takes them (``rtl/README.md``, contract 1)."""
    raw, size = bytes(tlp.pack()), tlp.get_header_size()
    return [*struct.unpack(f">{size // 4}I", raw[:size]), *struct.unpack(f"<{(len(raw) - size) // 4}I", raw[size:])]


def from_dwords(dwords):
    """Return the cocotbext-pcie TLP of ``dwords``.

    Raises AssertionError when its own rules do not hold, or when it would not pack to the same dwords: then there is something in
    the header that it does not know.
    """
    size = 4 if dwords[0] >> 29 & 1 else 3
    tlp = Tlp.unpack(struct.pack(f">{size}I", *dwords[:size]) + struct.pack(f"<{len(dwords) - size}I", *dwords[size:]))
    if not tlp.check() or to_dwords(tlp) != list(dwords):
        raise AssertionError(f"cocotbext-pcie does not understand {' '.join(f'{dword:08x}' for dword in dwords[:8])} ({tlp!r})")
    return tlp


class Bridge:
    """Joins a port of cocotbext-pcie to the raw link of ``dut``; knows TLPs only as far as it must.

    The far port's credits hold the card back by ``ready``; its own credits come back when the card has taken the TLP.

    Parameters
    ----------
    port : :class:`SimPort`
        Of the root complex; both ends then run at PCIe 3.0 x8.
    latency : callable or None
        Cycles by which a completion is held back, asked for each; those of one tag keep their order.
    tamper : callable or None
        Called with each TLP on its way to the card; returns what the card gets instead, None for nothing.
    loss : callable or None
        Called with each TLP on its way from the card; returns whether it gets lost.
    """

    def __init__(self, dut, port, *, latency=None, tamper=None, loss=None):
        self.latency, self.tamper, self.loss = latency, tamper, loss
        self.port = SimPort(fc_init=[[64, 1024, 64, 64, 0, 0]] * 8)
        for end in (port, self.port):
            end.max_link_speed, end.max_link_width = 3, 8
        self.port.rx_handler = self._to_card
        self.port.connect(port)
        self._received, self._due = Queue(), {}
        self.link = RawLink(dut, ready=lambda: self._received.qsize() < _WAITING, on_receive=self._take)

    def start(self):
        """Start to serve both directions; after the reset."""
        self.link.start()
        cocotb.start_soon(self._from_card())

    async def _to_card(self, tlp):
        sent, now = tlp, cycle()
        if self.tamper is not None:
            sent = self.tamper(Tlp(tlp))
            if sent is None:
                tlp.release_fc()
                return
        if tlp.is_completion() and self.latency is not None:
            key = int(tlp.requester_id), tlp.tag
            now = self._due[key] = max(self._due.get(key, 0), now + self.latency())
        self.link.send(to_dwords(sent), now, tlp.release_fc)

    def _take(self, when, dwords):
        tlp = from_dwords(dwords)
        if self.loss is None or not self.loss(tlp):
            self._received.put_nowait(tlp)

    async def _from_card(self):
        while True:
            await self.port.send(await self._received.get())


class _Complaints(logging.Handler):
    """What cocotbext-pcie warns of. It drops requests that it does not like and says so in its log alone."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


class PoolMemory:
    """Regions of the root complex's memory, as the models use memory.

    Parameters
    ----------
    pool : :class:`cocotbext.axi.address_space.Pool`
        Where :meth:`allocate` takes them from.
    """

    def __init__(self, pool):
        self.pool, self.regions = pool, []

    def allocate(self, size):
        """Return the address of ``size`` more bytes of zeros, aligned to a page at least."""
        region = self.pool.alloc_region(max(size, PAGE))
        self.regions.append((region.get_absolute_address(0), region.mem))
        return self.regions[-1][0]

    def read(self, address, length):
        mem, at = self._find(address, length)
        return mem[at : at + length]

    def write(self, address, data):
        mem, at = self._find(address, len(data))
        mem[at : at + len(data)] = bytes(data)

    def _find(self, address, length):
        for base, mem in self.regions:
            if base <= address and address + length <= base + len(mem):
                return mem, address - base
        raise ValueError(f"Memory of the host must be allocated before it is used, not {length} bytes at {address:#x}")


class SecondDisk:
    """One virtio-blk function and its driver, as :meth:`SecondHost.disk` brings it up. Its driver learns of the end by MSI-X only."""

    def __init__(self, host, function, memory, table, ring, driver, blk):
        self.host, self.function, self.memory, self.table = host, function, memory, table
        self.ring, self.driver, self.blk = ring, driver, blk

    async def done(self, requests, *, cycles=60_000):
        """Publish what was added, ring the doorbell, take interrupts until all of ``requests`` came back.

        Raises AssertionError when no interrupt comes for ``cycles``, or when bytes beside a buffer changed.
        """
        await self.ring_doorbell()
        while not all(request.is_done for request in requests):
            await self.interrupt(cycles)
            self.blk.poll()
            if self.blk.damage:
                raise AssertionError(self.blk.damage[0])

    async def raw(self, readable, writable, *, cycles=60_000):
        """Hand one chain of (address, length) to the device, with none other under way; return the length in its used element."""
        head = self.ring.add_chain(readable, writable)
        await self.ring_doorbell()
        while not (used := self.ring.poll_used()):
            await self.interrupt(cycles)
        if [each for each, _ in used] != [head]:
            raise AssertionError(f"used elements must be of chain {head} alone, not {used}")
        return used[0][1]

    async def ring_doorbell(self):
        """Publish what was added; ring if the device wants it."""
        if self.blk.publish():
            await self.host.run(self.driver.notify())

    async def interrupt(self, cycles):
        """Wait for the next interrupt of the queue."""
        if not await self.host.interrupt(self.function, 1, cycles):
            raise AssertionError(f"function {self.function} did not interrupt for {cycles} cycles")


class SecondHost:
    """The card ``dut`` of ``config`` below a root port of cocotbext-pcie.

    Parameters
    ----------
    dut
        A simulated :class:`ringwall.rtl.verilog.RawCard`.
    config : :class:`ringwall.rtl.config.EndpointConfig`
    seed : :class:`int`
    mps : :class:`int`
        Max_Payload_Size that the root complex gives, bytes.
    above : :class:`bool`
        DMA memory lies above 4 GiB: 4 DW headers.
    rcb : :class:`int` or None
        Read completion boundary at which the root complex cuts every completion; None: as seldom as it can.
    bridge : dict
        Parameters of :class:`Bridge`.
    timeout_cycles : :class:`int`
        How long the root complex waits for a completion of the card.

    Attributes
    ----------
    rc : :class:`RootComplex`
    devices, functions : dict
        Function number -> what the root complex found, as its own object and as :class:`FunctionInfo`.
    memory : :class:`PoolMemory`
    interrupts : dict
        (function, vector) -> messages that the root complex got.
    complaints : list of :class:`str`
        What the root complex warned of: requests that it refused or dropped, completions that it did not expect.
    """

    driver = VirtioPciDriver  # of disks
    join = Bridge  # what joins the root complex to ``dut``

    def __init__(self, dut, config, *, seed, mps=256, above=False, rcb=None, bridge=None, timeout_cycles=20_000):
        if mps not in (128, 256, 512):
            raise ValueError(f"Max_Payload_Size must be 128, 256 or 512 bytes, not {mps!r}")
        if rcb not in (None, 64, 128):
            raise ValueError(f"Read completion boundary must be 64 or 128 bytes or None, not {rcb!r}")
        self.dut, self.config, self.rng, self.timeout_ns = dut, config, random.Random(seed), timeout_cycles * CLOCK_NS
        logger, handler = logging.getLogger("cocotb.pcie"), _Complaints()
        logger.propagate, logger.handlers, self.complaints = False, [handler], handler.texts
        logger.setLevel(logging.WARNING)
        self.rc = RootComplex()
        self.rc.max_payload_size = mps.bit_length() - 8
        self.rc.split_on_all_rcb, self.rc.read_completion_boundary = rcb is not None, rcb == 128
        self.root_port = self.rc.make_port()
        self.bridge = self.join(dut, self.root_port.downstream_port, **(bridge or {}))
        pool = self.rc.mem_address_space.create_pool(1 << 32, 1 << 32) if above else self.rc.mem_pool
        self.memory = PoolMemory(pool)
        self.devices, self.functions = {}, {}
        self.iommu, self._next_pscid = None, 1
        self.interrupts, self._taken, self._news = {}, {}, Event()

    async def begin(self):
        """Reset, let the root complex enumerate, enable what it found."""
        await start(self.dut)
        self.bridge.start()
        await self.rc.enumerate(timeout=self.timeout_ns, timeout_unit="ns")
        # It warns of each empty place beside the root port, on its own bus 0.
        self.complaints[:] = [text for text in self.complaints if not text.startswith("Failed to route config type 0")]
        for number in range(8):
            device = self.rc.find_device(PcieId(1, 0, number))
            if device is not None:
                self.devices[number], self.functions[number] = device, _info(number, device)
                await device.enable_device()
                await device.set_master()
        return self

    def finish(self, *expected):
        """End the run: raises AssertionError unless the complaints are such as begin with one of ``expected``, and each of these came."""
        for text in self.complaints:
            if not text.startswith(expected):
                raise AssertionError(f"the root complex complains: {text}")
        for begin in expected:
            if not any(text.startswith(begin) for text in self.complaints):
                raise AssertionError(f"the root complex should complain: {begin}")

    # -- software --

    async def run(self, software):
        """Perform what the generator ``software`` yields, one operation after the other; return what it returns."""
        return await drive(software, self.perform)

    async def perform(self, operation):
        """Perform one operation of :mod:`ringwall.models.host` by the root complex; return its result.

        A failed or missing completion of a memory read raises :exc:`Exception`, as the root complex does.
        """
        limit = {"timeout": self.timeout_ns, "timeout_unit": "ns"}
        match operation:
            case ConfigRead(function, offset, size):
                return int.from_bytes(await self.rc.config_read(PcieId(1, 0, function), offset, size, **limit), "little")
            case ConfigWrite(function, offset, size, value):
                await self.rc.config_write(PcieId(1, 0, function), offset, value.to_bytes(size, "little"), **limit)
            case MemoryRead(address, size):
                return int.from_bytes(await self.rc.mem_read(address, size, **limit), "little")
            case MemoryWrite(address, size, value):
                await self.rc.mem_write(address, value.to_bytes(size, "little"))
            case Delay(cycles):
                await self.delay(cycles)
            case WaitInterrupt(function, vector, cycles):
                return await self.interrupt(function, vector, cycles)
            case _:
                raise ValueError(f"Operation must be one of models.host, not {operation!r}")
        return None

    async def delay(self, cycles):
        """Let ``cycles`` pass."""
        if cycles:
            await Timer(cycles * CLOCK_NS, "ns")

    # -- interrupts --

    async def enable_msix(self, function):
        """Let the root complex program and enable all vectors of a function; ``interrupts`` counts what comes of them."""
        device = self.devices[function]
        if device.msix_enabled:
            return len(device.msi_vectors)
        count = await device.alloc_irq_vectors(1, 2048)
        if count < 1 or not device.msix_enabled:
            raise AssertionError(f"function {function} must have MSI-X, alloc_irq_vectors returned {count}")
        for vector in range(count):
            self.interrupts[function, vector] = self._taken[function, vector] = 0
            device.request_irq(vector, self._handler(function, vector))
        return count

    def _handler(self, function, vector):
        async def count():
            self.interrupts[function, vector] += 1
            self._news.set()

        return count

    async def interrupt(self, function, vector, cycles):
        """Wait for interrupts of a vector that were not waited for yet and take them; return False after ``cycles`` without any."""
        key, end = (function, vector), cycle() + cycles
        while self.interrupts[key] == self._taken[key]:
            if end <= cycle():
                return False
            self._news.clear()
            try:
                await with_timeout(self._news.wait(), (end - cycle()) * CLOCK_NS, "ns")
            except SimTimeoutError:
                return False
        self._taken[key] = self.interrupts[key]
        return True

    # -- devices --

    async def enable_iommu(self, *, levels=2):
        """Bring the card's IOMMU up with an empty directory, its queues and tables in the root complex's memory."""
        await self.enable_msix(0)
        size = 0x40_0000
        self.allocator = Allocator(self.memory, self.memory.allocate(size), size, rng=self.rng)
        registers = self.functions[0].bars[self.config.iommu_bar or 0].address
        self.iommu = IommuDriver(registers, self.memory, self.allocator)
        await self.run(self.iommu.init(levels))
        return self.iommu

    async def disk(self, number, *, queue_size=64, buffer_pages=240, platform=True):
        """Bring disk ``number`` (from 0) up, translated by Sv39 if an IOMMU is in use and ``platform``; return the :class:`SecondDisk`."""
        function = self.config.first_disk + number
        pages, memory, base, table = 16 + buffer_pages, self.memory, self.memory.allocate((16 + buffer_pages) * PAGE), None
        await self.enable_msix(function)
        if self.iommu is not None and platform:
            memory, table = MappedMemory(self.memory), PageTable(self.memory, self.allocator)
            frames = [base // PAGE + n for n in range(pages)]
            self.rng.shuffle(frames)
            for n, frame in enumerate(frames):
                memory.frames[IOVAS // PAGE + n] = frame
                table.map_page(IOVAS + PAGE * n, frame * PAGE, perms="rwu")
            message = self.devices[function].msi_vectors[0].addr & -PAGE
            table.map_page(message, message, perms="rwu")
            self.iommu.directory.set(function, DeviceContext.sv39(table.root, PSCID=self._next_pscid))
            self._next_pscid += 1
            await self.run(self.iommu.invalidate_context(function))
            base = IOVAS
        driver, ring = self.driver(self.functions[function]), SplitDriver(memory, size=queue_size, base=base)
        wanted = 1 << Feature.VERSION_1 | 1 << 9 | (1 << Feature.ACCESS_PLATFORM if platform else 0)
        await self.run(driver.start([ring.layout], wanted=wanted, vectors=[1], config_vector=0))
        if driver.problems:
            raise AssertionError(driver.problems[0])
        blk = BlkDriver(ring, memory, area=(base + 16 * PAGE, buffer_pages * PAGE), rng=self.rng)
        return SecondDisk(self, function, memory, table, ring, driver, blk)


def _info(number, device):
    """Return what the root complex found out about a function, as the models' drivers want it."""
    info = FunctionInfo(number, device.vendor_id, device.device_id, device.revision_id, device.class_code,
                        device.subsystem_vendor_id, device.subsystem_id, is_multi_function=device.multifunction,
                        mps_supported=128 << device.pcie_mpss)  # fmt: skip
    for found, into in ((device.capabilities, info.capabilities), (device.ext_capabilities, info.ext_capabilities)):
        for kind, at in found:
            into.setdefault(int(kind), []).append(at)
    for n in range(6):
        if device.bar_addr[n] is not None:
            kind = device.bar[n]
            info.bars[n] = Bar(device.bar_addr[n], device.bar_size[n], kind & 7 == 4, kind & 9 == 8, bool(kind & 1))
    return info
