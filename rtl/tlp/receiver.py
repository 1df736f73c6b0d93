"""Received TLPs, apart: requests for us, completions for our requests."""

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.queue import Queue
from .codec import is_completion
from .layouts import TlpBeat


class Receiver(wiring.Component):
    """Splits received TLPs into requests and completions.

    Requests wait in a queue, so that completions pass a busy completer. Order within each kind is kept.

    Latency: none for completions, 2 cycles for requests. Throughput: 1 beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    depth : :class:`int`
        Beats of requests that wait.

    Members
    -------
    i : ``In(stream.Signature(TlpBeat(width)))``
        From the link adapter.
    requests, completions : ``Out(stream.Signature(TlpBeat(width)))``
        To completer and requester.
    """

    def __init__(self, *, width, depth=64):
        self.width, self.depth = width, depth
        beat = stream.Signature(TlpBeat(width))
        super().__init__({"i": In(beat), "requests": Out(beat), "completions": Out(beat)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.waiting = waiting = Queue(TlpBeat(self.width), self.depth)
        wiring.connect(m, waiting.o, wiring.flipped(self.requests))
        to_requester, latest = Signal(), Signal()
        m.d.comb += to_requester.eq(latest)
        with m.If(self.i.payload.first):
            m.d.comb += to_requester.eq(is_completion(self.i.payload.header))
        with m.If(self.i.valid):
            m.d.sync += latest.eq(to_requester)
        m.d.comb += [
            self.completions.valid.eq(self.i.valid & to_requester),
            self.completions.payload.eq(self.i.payload),
            waiting.i.valid.eq(self.i.valid & ~to_requester),
            waiting.i.payload.eq(self.i.payload),
        ]
        with m.If(to_requester):
            m.d.comb += self.i.ready.eq(self.completions.ready)
        with m.Else():
            m.d.comb += self.i.ready.eq(waiting.i.ready)
        return m
