"""Joins the model host to the raw link: software runs against the card, the card's requests meet the host's memory."""

from functools import partial

import cocotb
from cocotb.triggers import Event, SimTimeoutError, Timer, with_timeout

from ..models.events import Operation as OperationEvent
from ..models.events import TlpReceived, TlpSent
from ..models.host import Delay, WaitInterrupt
from ..models.tlp import TlpType, decode, encode
from .stream import CLOCK_NS, cycle

__all__ = ["HostPort", "drive"]


async def drive(software, perform):
    """Let ``perform(operation)`` do what the generator ``software`` yields, one operation after the other; return what it returns."""
    result = None
    while True:
        try:
            operation = software.send(result)
        except StopIteration as end:
            return end.value
        result = await perform(operation)


class HostPort:
    """The root complex ``host`` (:class:`ringwall.models.host.Host`) at the far end of ``link``.

    TLPs of the card go to the host in the cycle in which they ended; its replies go out after the delay that it asks for
    and as the link has room. Any number of software generators may :meth:`run` at once. A rule that the card broke as the
    host sees it (``host.violations``), and an operation that is not answered within ``limit_cycles``, raise AssertionError.

    Parameters
    ----------
    observe : callable or None
        Called as ``observe(event, tlp)`` with each :mod:`ringwall.models.events` object and, where it is about one, the
        decoded TLP: what the card sent after the host has dealt with it, what the host sent when the card has taken it,
        operations when they have ended.
    limit_cycles : :class:`int`
        Bound of the wait for the answer to one operation.
    """

    def __init__(self, host, link, *, observe=None, limit_cycles=50_000):
        self.host, self.link, self.observe, self.limit_cycles = host, link, observe, limit_cycles
        self._waiting = []  # (is it so now, event to set)
        link.on_receive = self._received
        link.on_sent = self._sent

    async def run(self, software):
        """Perform what the generator ``software`` yields, one operation after the other; return what it returns."""
        return await drive(software, self.perform)

    def start(self, software):
        """Run ``software`` beside the caller; returns the task, which gives the generator's result when awaited."""
        return cocotb.start_soon(self.run(software))

    async def perform(self, operation):
        """Perform one operation and return its result."""
        if isinstance(operation, Delay):
            if operation.cycles:
                await Timer(operation.cycles * CLOCK_NS, "ns")
            result = None
        elif isinstance(operation, WaitInterrupt):
            result = await self.until(lambda: self.host.take_interrupt(operation.function, operation.vector),
                                      operation.timeout_cycles)  # fmt: skip
        else:
            pending, now = self.host.start(operation), cycle()
            for tlp in pending.tlps:
                self.link.send(encode(tlp), now)
            if not pending.done and not await self.until(lambda: pending.done, self.limit_cycles):
                raise AssertionError(f"the card did not answer {operation} within {self.limit_cycles} cycles")
            result = pending.result
        if self.observe is not None:
            self.observe(OperationEvent(cycle(), operation, result), None)
        return result

    async def until(self, is_so, cycles):
        """Wait until ``is_so()`` or for ``cycles``; return whether it is. Asked now, and when the card sent anything but a read."""
        if is_so():
            return True
        event = Event()
        entry = is_so, event
        self._waiting.append(entry)
        try:
            await with_timeout(event.wait(), cycles * CLOCK_NS, "ns")
        except SimTimeoutError:
            self._waiting.remove(entry)
            return False
        return True

    def _received(self, when, dwords):
        host, link = self.host, self.link
        for reply in host.receive(dwords, when):
            done = partial(host.sent, reply) if reply.ends is not None else None
            link.send(encode(reply.tlp), when + reply.delay_cycles, done)
        if host.violations:
            shown = " ".join(f"{dword:08x}" for dword in dwords[:8])
            raise AssertionError(f"the card broke a rule at cycle {when}: {'; '.join(host.violations)}: TLP {shown}")
        tlp = decode(dwords)
        if self.observe is not None:
            self.observe(TlpReceived(when, dwords), tlp)
        if self._waiting and tlp.type is not TlpType.MRD:
            for entry in [entry for entry in self._waiting if entry[0]()]:
                self._waiting.remove(entry)
                entry[1].set()

    def _sent(self, when, dwords):
        if self.observe is not None:
            self.observe(TlpSent(when, dwords), None)
