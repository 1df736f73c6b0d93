"""A card's side of Address Translation Services: the cache, and what keeps it true."""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..iommu.layouts import TranslateRequest, TranslateResponse
from ..tlp.layouts import Burst, BurstData, ConfigState, Invalidation, TlpBeat
from .cache import TranslationCache
from .invalidations import Invalidations
from .layouts import MAX_FUNCTIONS

COUNTERS = ("hit", "miss", "sent")


class HostAts(wiring.Component):
    """Translates for the gate with what a host's IOMMU says, and forgets it when the host says so. [PCIe5 10]

    Behaviour: see :class:`.cache.TranslationCache` and :class:`.invalidations.Invalidations`. No page requests are sent, requests carry no
    PASID: a page without permission is a fault.

    Parameters
    ----------
    width, functions : :class:`int`
        Bits of data per beat; functions of the card.
    depth : :class:`int`
        Invalidations that wait.
    cache
        Keyword parameters of :class:`.cache.TranslationCache`.

    Members
    -------
    translate_request, translate_response, fence, fenced
        Of the gate.
    bursts, read_data
        Wall port of the requester.
    invalidations, messages : ``In(stream.Signature(Invalidation))``, ``Out(stream.Signature(TlpBeat(width)))``
        From the completer, to the transmitter.
    config : ``In(ConfigState).array(functions)``
        Of each function.
    enable, usable : ``In(8)``, ``Out(8)``
        ATS Enable of each function; whether it may be used, see :class:`.invalidations.Invalidations`.
    hit, miss, sent : ``Out(1)``
        Pulses of the cache.
    """

    def __init__(self, *, width, functions, depth, **cache):
        self.width, self.functions, self.depth = width, functions, depth
        self._cache = TranslationCache(width=width, **cache)
        super().__init__({
            "translate_request": In(stream.Signature(TranslateRequest)),
            "translate_response": Out(stream.Signature(TranslateResponse)),
            "bursts": Out(stream.Signature(Burst)),
            "read_data": In(stream.Signature(BurstData(width))),
            "invalidations": In(stream.Signature(Invalidation)),
            "messages": Out(stream.Signature(TlpBeat(width))),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            "config": In(ConfigState).array(functions),
            "enable": In(MAX_FUNCTIONS), "usable": Out(MAX_FUNCTIONS),
            **{name: Out(1) for name in COUNTERS},
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.cache = cache = self._cache
        m.submodules.orders = orders = Invalidations(width=self.width, functions=self.functions, depth=self.depth)
        for inner, outer in ((cache.request, self.translate_request), (cache.response, self.translate_response),
                             (cache.bursts, self.bursts), (cache.read_data, self.read_data), (orders.i, self.invalidations),
                             (orders.messages, self.messages), (orders.fence, self.fence), (orders.fenced, self.fenced)):  # fmt: skip
            wiring.connect(m, inner, wiring.flipped(outer))
        for n in range(self.functions):
            m.d.comb += orders.config[n].eq(self.config[n])
        m.d.comb += [
            orders.enable.eq(self.enable), self.usable.eq(orders.usable), cache.enable.eq(orders.usable), cache.forget.eq(orders.forget),
            cache.forget_av.eq(orders.forget_av), cache.forget_page.eq(orders.forget_page),
            *(getattr(self, name).eq(getattr(cache, name)) for name in COUNTERS),
        ]  # fmt: skip
        return m
