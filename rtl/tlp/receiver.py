"""Received TLPs, apart: requests for us, completions for our requests."""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.demux import Demux
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
        m.submodules.split = split = Demux(TlpBeat(self.width), 2, packets=True)
        m.d.comb += split.select.eq(is_completion(self.i.payload.header))
        wiring.connect(m, wiring.flipped(self.i), split.i)
        wiring.connect(m, split.o[0], waiting.i)
        wiring.connect(m, split.o[1], wiring.flipped(self.completions))
        wiring.connect(m, waiting.o, wiring.flipped(self.requests))
        return m
