"""The card of :mod:`.card` and its software on a :class:`.compiled.CompiledCard`, without a simulator: nothing waits, time is stepped."""

import random

from ..models.events import HostStore, Operation, TlpReceived, TlpSent
from ..models.host import enumerate as enumerate_functions
from ..models.iommu.tables import Allocator
from ..models.virtio.blk import SECTOR, BlkStatus
from ..models.virtio.split import RingFull
from .card import FRAMES, IOVAS, OWN, OWN_BYTES, PAGE, Card
from .compiled import CompiledCard
from .session import Session

__all__ = ["CompiledBench", "Traffic"]

POLL = 1024  # cycles after which a driver looks into its ring though no interrupt came
SPACE = 64 << 20  # bytes of memory behind frames, and behind IOVAs that are not translated


class _SessionLog:
    """The events of a session that the card does not log by itself go into the card's log."""

    def __init__(self, card):
        self._card = card

    def write(self, event):
        if not isinstance(event, (TlpReceived, TlpSent, Operation, HostStore)):
            self._card.log(event)


class _Port:
    """A host port whose operations have ended when the call returns: awaiting it never waits."""

    def __init__(self, card):
        self._card = card

    async def run(self, software):
        return self._card.run(software)


class CompiledBench(Card):
    """A compiled card with host, drivers and, when it is ``judged``, the golden model around it, enumerated.

    Parameters
    ----------
    config : :class:`ringwall.rtl.config.EndpointConfig`
    seed : :class:`int`
    judged : :class:`bool`
        Every TLP is judged at once by the golden model; without, runs are several times faster.
    path : path or None
        Of the log.
    parameters
        Of :class:`.compiled.CompiledCard`.
    """

    card_kind = CompiledCard

    def __init__(self, config, *, seed, judged=True, path=None, **parameters):
        self.compiled = card = self.card_kind(config, seed=seed, **parameters)
        if path is not None:
            card.record(path)
        self.config, self.rng, self.host, self.port = config, random.Random(seed), card.host, _Port(card)
        self.session = Session(seed=seed, log=_SessionLog(card), cycle=lambda: card.cycle)
        self.session.memory = card.memory
        if judged:
            card.memory.observe, card.observe = self.session._stored, self.session.take
        for address, size in ((OWN, OWN_BYTES), (FRAMES, SPACE), (IOVAS, SPACE)):
            card.map(address, size)
        self.allocator = Allocator(card.memory, OWN, OWN_BYTES, rng=self.rng)
        self.iommu, self._frame, self._next_pscid, self.disks = None, FRAMES // PAGE, 1, {}
        self.functions = card.run(enumerate_functions(card.host))
        for info in self.functions:
            if info.msix is not None:
                self.session.add("MessageChecker", function=info.function, entries=info.msix.count,
                                 is_translated=info.function >= config.first_disk,
                                 table=info.bars[info.msix.table_bar].address + info.msix.table_offset)  # fmt: skip

    @staticmethod
    def now(coroutine):
        """Return what ``coroutine`` (a method of :class:`.card.Card` or :class:`.card.Disk`) returns; RuntimeError when it waits."""
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
        coroutine.close()
        raise RuntimeError("A coroutine of a compiled card must not wait for a simulator")

    def done(self, disk, requests, *, cycles=400_000):
        """Publish what was added, ring the doorbell, step until ``requests`` are back; AssertionError when they do not come."""
        card, end = self.compiled, self.compiled.cycle + cycles
        if disk.blk.publish():
            card.run(disk.driver.notify())
        while True:
            card.step(POLL, until_news=True)
            is_over = card.is_idle or card.cycle >= end
            disk.blk.poll()
            if disk.blk.damage:
                raise AssertionError(disk.blk.damage[0])
            left = sum(not request.is_done for request in requests)
            if not left:
                return
            if is_over:
                raise AssertionError(f"{left} requests did not come back by cycle {card.cycle}")


class Traffic:
    """Batches of writes and reads at random places of one disk; every byte read is compared with what was written last.

    Parameters
    ----------
    bench : :class:`CompiledBench`
    disk : :class:`.card.Disk`
    rng : :class:`random.Random`
    sizes : sequence of :class:`int`
        Lengths of requests in sectors, one of which is drawn for each.
    cycles : :class:`int`
        A batch must have come back after so many.

    Attributes
    ----------
    image : :class:`bytearray`
        What the disk must hold.
    batch : list
        Of the requests under way: (request, first byte, data or None for a read).
    moved : :class:`int`
        Bytes asked for so far.
    """

    def __init__(self, bench, disk, rng, sizes, *, cycles=400_000):
        self.bench, self.disk, self.rng, self.sizes, self.cycles = bench, disk, rng, sizes, cycles
        self.image = bytearray(bench.config.all_devices[disk.function - bench.config.first_disk].capacity_sectors * SECTOR)
        self.batch, self.moved = [], 0

    def begin(self, *, least=1, most=8):
        """Make ``least`` to ``most`` requests, fewer when they would overlap (their order is free), and ring the doorbell."""
        rng, blk, taken = self.rng, self.disk.blk, []
        for _ in range(rng.randrange(least, most + 1)):
            count = rng.choice(self.sizes)
            sector = rng.randrange(len(self.image) // SECTOR - count + 1)
            if any(sector < end and begin < sector + count for begin, end in taken):
                continue
            data = rng.randbytes(count * SECTOR) if rng.randrange(2) else None
            try:
                request = blk.read(sector, count * SECTOR) if data is None else blk.write(sector, data)
            except RingFull:
                break
            self.batch.append((request, sector * SECTOR, data))
            taken.append((sector, sector + count))
            self.moved += count * SECTOR
        if blk.publish():
            self.bench.compiled.run(self.disk.driver.notify())

    def end(self):
        """Wait for the batch and compare; AssertionError when a request failed, did not come back or brought other bytes."""
        self.bench.done(self.disk, [request for request, _, _ in self.batch], cycles=self.cycles)
        self.compare()

    def compare(self):
        """Compare a batch that is back; AssertionError when a request failed or brought other bytes."""
        for request, at, data in self.batch:
            if request.status != BlkStatus.OK:
                raise AssertionError(f"status is {request.status} at cycle {self.bench.compiled.cycle}")
            if data is not None:
                self.image[at : at + len(data)] = data
            elif request.data != self.image[at : at + len(request.data)]:
                raise AssertionError(f"a read at byte {at:#x} brought other bytes at cycle {self.bench.compiled.cycle}")
        self.batch.clear()

    def run(self, batches):
        for _ in range(batches):
            self.begin()
            self.end()
