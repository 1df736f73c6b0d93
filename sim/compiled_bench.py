"""The card of :mod:`.card` and its software on a :class:`.compiled.CompiledCard`, without a simulator: nothing waits, time is stepped."""

import random

from ..models.events import HostStore, Operation, TlpReceived, TlpSent
from ..models.host import enumerate as enumerate_functions
from ..models.iommu.tables import Allocator
from .card import FRAMES, IOVAS, OWN, OWN_BYTES, PAGE, Card
from .compiled import CompiledCard
from .session import Session

__all__ = ["CompiledBench"]

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

    def __init__(self, config, *, seed, judged=True, path=None, **parameters):
        self.compiled = card = CompiledCard(config, seed=seed, **parameters)
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
