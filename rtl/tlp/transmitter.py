"""The one transmit order: posted, non-posted and completion TLPs and messages into one stream."""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.arbiter import Arbiter
from .layouts import TlpBeat


class Transmitter(wiring.Component):
    """Joins the kinds of TLPs, whole and in turn.

    Nothing waits in here, so a TLP that is offered after a posted TLP was accepted leaves behind it; each kind keeps its
    order, and none of them can keep the others out. [PCIe5 2.4.1]

    Latency: none. Throughput: 1 beat per cycle.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    has_pasid : :class:`bool`
        TLPs may have a PASID.

    Members
    -------
    posted, non_posted, completions, messages : ``In(stream.Signature(TlpBeat(width, has_pasid)))``
        TLPs; one that has begun comes without bubbles. Messages are posted TLPs too; one that must be behind
        others is offered when those were accepted.
    o : ``Out(stream.Signature(TlpBeat(width, has_pasid)))``
        To the link adapter.
    """

    def __init__(self, *, width, has_pasid=False):
        self.width, self.has_pasid = width, has_pasid
        beat = stream.Signature(TlpBeat(width, has_pasid))
        super().__init__({"posted": In(beat), "non_posted": In(beat), "completions": In(beat), "messages": In(beat), "o": Out(beat)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.arbiter = arbiter = Arbiter(TlpBeat(self.width, self.has_pasid), 4, packets=True, direct=True)
        for n, kind in enumerate((self.posted, self.non_posted, self.completions, self.messages)):
            wiring.connect(m, wiring.flipped(kind), arbiter.i[n])
        wiring.connect(m, arbiter.o, wiring.flipped(self.o))
        return m
