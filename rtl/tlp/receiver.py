"""Received TLPs, apart: requests for us, completions for our requests."""

from amaranth import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.demux import Demux
from ..stream.transaction import TransactionQueue
from .codec import is_completion
from .layouts import TlpBeat, connect_beats


class Receiver(wiring.Component):
    """Splits received TLPs into requests and completions.

    Requests wait in a queue until they are whole, so that completions pass a busy completer and nothing of a damaged request is seen. Of
    a damaged completion nothing is passed on if it is one beat; else its last beat brings no dword, so that it is none
    that fits its request. Order within each kind is kept.

    Latency: none for completions, 2 cycles from the last beat for requests. Throughput: 1 beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    depth : :class:`int`
        Beats of requests that wait: a power of two, and no request has more.
    has_pasid : :class:`bool`
        Requests may have a PASID.

    Members
    -------
    i : ``In(stream.Signature(TlpBeat(width, has_pasid)))``
        From the link adapter.
    requests, completions : ``Out(stream.Signature(TlpBeat(width, has_pasid)))``, ``Out(stream.Signature(TlpBeat(width)))``
        To completer and requester.
    spoilt : ``Out(1)``
        1 while the last beat of a damaged completion, which brings no dword, is at ``completions``.
    """

    def __init__(self, *, width, depth=64, has_pasid=False):
        self.width, self.depth, self.has_pasid = width, depth, has_pasid
        beat = stream.Signature(TlpBeat(width, has_pasid))
        super().__init__({"i": In(beat), "requests": Out(beat), "completions": Out(stream.Signature(TlpBeat(width))), "spoilt": Out(1)})

    def elaborate(self, platform):
        m = Module()
        layout = TlpBeat(self.width, self.has_pasid)
        m.submodules.waiting = waiting = TransactionQueue(layout, self.depth)
        m.submodules.split = split = Demux(layout, 2, packets=True)
        beat, ends, vanishes = self.i.payload, Signal(), Signal()
        m.d.comb += [
            split.select.eq(is_completion(beat.header)),
            vanishes.eq(split.select & beat.first & beat.last & beat.damaged),
            split.i.payload.eq(beat),
            split.i.valid.eq(self.i.valid & ~vanishes),
            self.i.ready.eq(split.i.ready | vanishes),
            ends.eq(waiting.i.valid & waiting.i.ready & beat.last),
            waiting.commit.eq(ends & ~beat.damaged),
            waiting.rollback.eq(ends & beat.damaged),
            self.spoilt.eq(self.completions.valid & beat.last & beat.damaged),
        ]
        wiring.connect(m, split.o[0], waiting.i)
        if self.has_pasid:
            connect_beats(m, split.o[1], self.completions)
        else:
            wiring.connect(m, split.o[1], wiring.flipped(self.completions))
        with m.If(self.spoilt):
            m.d.comb += self.completions.payload.dword_count.eq(0)
        wiring.connect(m, waiting.o, wiring.flipped(self.requests))
        return m
