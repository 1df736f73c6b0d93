"""A card's side of Address Translation Services: the cache, and what keeps it true."""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..iommu.layouts import TranslateRequest, TranslateResponse
from ..tlp.layouts import AddressedBurst, BurstData, ConfigState, Invalidation, TlpBeat
from .cache import TranslationCache
from .invalidations import Invalidations
from .layouts import MAX_FUNCTIONS
from .page_requests import PageRequests

COUNTERS = ("hit", "miss", "sent")
# Ports of the page requests that are ours, by our names.
PAGE_PORTS = {"page_responses": "responses", "page_messages": "messages", "page_enable": "enable",
              **{name: name for name in ("restart", "allocation", "permitted", "stopped", "failures", "surprises")}}  # fmt: skip


class HostAts(wiring.Component):
    """Translates for the gate with what a host's IOMMU says, and forgets it when the host says so. [PCIe5 10]

    Behaviour: see :class:`.cache.TranslationCache` and :class:`.invalidations.Invalidations`. With ``has_pasid`` what is asked for a burst
    with a PASID has it too. A page without permission is a fault, or with ``page_requests`` asked for, see
    :class:`.page_requests.PageRequests`.

    Parameters
    ----------
    width, functions : :class:`int`
        Bits of data per beat; functions of the card.
    depth : :class:`int`
        Invalidations that wait.
    page_requests : :class:`int`
        Page requests in flight; 0: none are sent.
    has_pasid : :class:`bool`
        Bursts may have a PASID.
    owners
        With ``page_requests``, as for :class:`.page_requests.PageRequests`.
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
    pasid_enable, pasid_usable : ``In(8)``, ``Out(8)``
        With ``has_pasid``: the same of PASID Enable.
    page_responses, page_messages, page_enable, restart, allocation, permitted, stopped, failures, surprises
        With ``page_requests``, as those of :class:`.page_requests.PageRequests`.
    spare : ``Out(1)``
        Of the cache: it can take a prefetch.
    hit, miss, sent : ``Out(1)``
        Pulses of the cache.
    """

    def __init__(self, *, width, functions, depth, page_requests=0, owners=(), has_pasid=False, **cache):
        self.width, self.functions, self.depth, self.page_requests, self.has_pasid = width, functions, depth, page_requests, has_pasid
        self._cache = TranslationCache(width=width, has_pasid=has_pasid, **cache)
        ports = {}
        if page_requests:
            self._pages = PageRequests(width=width, count=page_requests, slots=self._cache.requests, owners=owners, has_pasid=has_pasid)
            ports = {outer: self._pages.signature.members[inner] for outer, inner in PAGE_PORTS.items()}
        super().__init__({
            "translate_request": In(stream.Signature(TranslateRequest)),
            "translate_response": Out(stream.Signature(TranslateResponse)),
            "spare": Out(1),
            "bursts": Out(stream.Signature(AddressedBurst)),
            "read_data": In(stream.Signature(BurstData(width))),
            "invalidations": In(stream.Signature(Invalidation)),
            "messages": Out(stream.Signature(TlpBeat(width))),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            "config": In(ConfigState).array(functions),
            "enable": In(MAX_FUNCTIONS), "usable": Out(MAX_FUNCTIONS),
            **({"pasid_enable": In(MAX_FUNCTIONS), "pasid_usable": Out(MAX_FUNCTIONS)} if has_pasid else {}),
            **{name: Out(1) for name in COUNTERS},
            **ports,
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.cache = cache = self._cache
        m.submodules.orders = orders = Invalidations(
            width=self.width, functions=self.functions, depth=self.depth, enables=MAX_FUNCTIONS * (1 + self.has_pasid),
            has_pages=self.page_requests > 0)
        for inner, outer in ((cache.request, self.translate_request), (cache.response, self.translate_response),
                             (cache.bursts, self.bursts), (cache.read_data, self.read_data), (orders.i, self.invalidations),
                             (orders.messages, self.messages), (orders.fence, self.fence), (orders.fenced, self.fenced)):  # fmt: skip
            wiring.connect(m, inner, wiring.flipped(outer))
        for n in range(self.functions):
            m.d.comb += orders.config[n].eq(self.config[n])
        m.d.comb += [
            orders.enable[:MAX_FUNCTIONS].eq(self.enable), self.usable.eq(orders.usable), cache.enable.eq(orders.usable),
            cache.forget.eq(orders.forget), cache.forget_av.eq(orders.forget_av), cache.forget_page.eq(orders.forget_page),
            *(getattr(self, name).eq(getattr(cache, name)) for name in ("spare", *COUNTERS)),
        ]  # fmt: skip
        if self.has_pasid:
            m.d.comb += [orders.enable[MAX_FUNCTIONS:].eq(self.pasid_enable), self.pasid_usable.eq(orders.usable[MAX_FUNCTIONS:])]
        if self.page_requests:
            m.d.comb += orders.settled.eq(cache.settled)
            self._join_pages(m, cache)
        return m

    def _join_pages(self, m, cache):
        m.submodules.pages = pages = self._pages
        wiring.connect(m, wiring.flipped(self.page_responses), pages.responses)
        wiring.connect(m, pages.messages, wiring.flipped(self.page_messages))
        wiring.connect(m, pages.over, cache.over)
        for n in range(self.functions):
            m.d.comb += [pages.config[n].eq(self.config[n]), pages.allocation[n].eq(self.allocation[n])]
        m.d.comb += [
            pages.enable.eq(self.page_enable), pages.restart.eq(self.restart), pages.permitted.eq(self.permitted & self.enable),
            *(getattr(self, name).eq(getattr(pages, name)) for name in ("stopped", "failures", "surprises")),
            cache.may_page.eq(pages.may_page),
            pages.wanted.eq(cache.wanted), pages.wants.eq(cache.wants), cache.takes.eq(pages.takes), pages.waits.eq(cache.waits),
        ]  # fmt: skip
