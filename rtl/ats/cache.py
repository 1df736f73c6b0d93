"""The translation cache in front of the host: pages that are known are answered at once, others wait for the host's answer."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..iommu.gate import UNTRANSLATED_LOG2
from ..iommu.iotlb import Iotlb
from ..iommu.layouts import TranslateRequest, TranslateResponse
from ..stream.queue import Queue
from ..tlp.layouts import AddressedBurst, BurstData
from .layouts import MAX_FUNCTIONS, PAGE_BITS, asked_layout, put_space, store_features
from .requests import TranslationRequests

PAGING = ("may_page", "wanted", "wants", "takes", "waits", "over")  # ports towards :class:`.page_requests.PageRequests`


class TranslationCache(wiring.Component):
    """Translates a page per cycle as long as the host's answers are cached; what is not waits beside, without holding up others.

    Answers come out of order, by cookie. One with size 2 ** 63 says that the page must be accessed untranslated: the host says so, the
    address is beyond what can be cached (2 ** 57), or the function has no ``enable``. An invalidation at ``forget`` is effective for every
    request that is accepted later. A page whose cached permission does not suffice is asked for anew. [PCIe5 10.2, 10.3]

    Requests for a page that is asked for wait together. When answers have come all that waits is looked up once more, in its order.

    With ``page_patience_cycles`` requests of one client (of the gate's, whose ``client_cookies`` follow one another) are answered in their
    order, and pages without permission are asked for, see :class:`.requests.TranslationRequests`.

    Latency: 2 cycles from request accepted to response valid when cached; a miss 8 cycles more than the host. Throughput: one request per
    cycle, less one for each that waits whenever an answer comes.

    Parameters
    ----------
    width : :class:`int`
        Bits of burst data per beat.
    entries, ways : :class:`int`
        Translations of 4 KiB; see :class:`..iommu.iotlb.Iotlb`.
    requests : :class:`int`
        Translation requests in flight: 1 to 16.
    waiting : :class:`int`
        Requests that wait: as many as can be unanswered, at least 2.
    client_cookies : :class:`int`
        Cookies of each client, a power of two that divides ``waiting``.
    page_patience_cycles : :class:`int`
        How long a request waits for its page; 0: none does.
    has_pasid : :class:`bool`
        Requests with a ``process_id`` are those of processes, each of which has translations of its own, and so has a function without.

    Members
    -------
    request, response : ``In(stream.Signature(TranslateRequest))``, ``Out(stream.Signature(TranslateResponse))``
        For the gate; ``device_id`` is the function number. A fault has cause 0.
    enable : ``In(8)``
        ATS Enable of each function.
    forget, forget_av, forget_page : ``In(1)``, ``In(1)``, ``In(52)``
        Forget everything, or with ``forget_av`` one page at least.
    bursts, read_data : ``Out(stream.Signature(AddressedBurst))``, ``In(stream.Signature(BurstData(width)))``
        Wall port of the requester.
    settled : ``Out(1)``
        With patience: since the last ``forget`` a request that waited was answered, or the host is asked for nothing but pages. Whoever
        forgets no more often than that leaves room for progress.
    may_page, wanted, wants, takes, waits, over
        With patience, as those of :class:`.requests.TranslationRequests`.
    spare : ``Out(1)``
        A prefetch that is asked for now can ask the host, and leaves room to requests that wait for answers.
    hit, miss, sent : ``Out(1)``
        Pulses for counters: pages found, pages that are asked for, translation requests sent.

    Raises
    ------
    :exc:`ValueError`
        If a size is out of range.
    """

    def __init__(self, *, width, entries=64, ways=4, requests=8, waiting=64, client_cookies=8, page_patience_cycles=0,
                 has_pasid=False):  # fmt: skip
        if requests not in range(1, 17):
            raise ValueError(f"Translation requests in flight must be between 1 and 16, not {requests!r}")
        if waiting not in range(2, 257):
            raise ValueError(f"Requests that wait must be between 2 and 256, not {waiting!r}")
        self.width, self.entries, self.ways, self.requests, self.waiting = width, entries, ways, requests, waiting
        self.client_cookies, self.page_patience_cycles, self.has_pasid = client_cookies, page_patience_cycles, has_pasid
        self._store = Iotlb(entries=entries, ways=ways, features=store_features(has_pasid))
        self._requests = TranslationRequests(width=width, count=requests, page_patience_cycles=page_patience_cycles, has_pasid=has_pasid)
        self._waiting = Queue(asked_layout(has_pasid), waiting)
        super().__init__({
            "request": In(stream.Signature(TranslateRequest)),
            "response": Out(stream.Signature(TranslateResponse)),
            "enable": In(MAX_FUNCTIONS),
            "forget": In(1), "forget_av": In(1), "forget_page": In(52),
            "bursts": Out(stream.Signature(AddressedBurst)),
            "read_data": In(stream.Signature(BurstData(width))),
            "spare": Out(1), "hit": Out(1), "miss": Out(1), "sent": Out(1),
            **({name: self._requests.signature.members[name] for name in PAGING} | {"settled": Out(1)} if page_patience_cycles else {}),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.store, m.submodules.requests, m.submodules.waiting = store, requests, waiting = (
            self._store, self._requests, self._waiting)  # fmt: skip
        wiring.connect(m, requests.bursts, wiring.flipped(self.bursts))
        wiring.connect(m, wiring.flipped(self.read_data), requests.read_data)
        wiring.connect(m, requests.fill, store.fill)
        m.d.comb += [
            requests.enable.eq(self.enable), requests.forget.eq(self.forget), self.sent.eq(requests.sent),
            store.forget.eq(self.forget), store.forget_av.eq(self.forget_av), store.forget_vpn.eq(self.forget_page),
        ]  # fmt: skip

        pages = self.page_patience_cycles != 0
        for name in ("may_page", "takes") if pages else ():
            m.d.comb += getattr(requests, name).eq(getattr(self, name))
        for name in ("wanted", "wants", "waits") if pages else ():
            m.d.comb += getattr(self, name).eq(getattr(requests, name))
        if pages:
            wiring.connect(m, wiring.flipped(self.over), requests.over)

        # First cycle: what waits goes before what is new, while it is looked through.
        count, to_look_up, to_decide = (Signal(range(self.waiting + 1), name=name) for name in ("count", "to_look_up", "to_decide"))
        go, comes, again = Signal(), Signal(), Signal()
        if pages:
            drains, is_behind = Signal(), Signal()  # nothing new comes in front of a look; an older one of the client waits
        first = Signal(asked_layout(self.has_pasid))
        asks = self.request.p
        m.d.comb += [
            again.eq(to_look_up != 0),
            comes.eq(Mux(again, waiting.o.valid, self.request.valid & ~drains if pages else self.request.valid)),
            self.request.ready.eq(go & ~again & ~drains if pages else go & ~again), waiting.o.ready.eq(go & again),
            first.function.eq(asks.device_id), first.page.eq(asks.page), first.is_write.eq(asks.is_write), first.cookie.eq(asks.cookie),
            store.advance.eq(go),
        ]  # fmt: skip
        if self.has_pasid:
            m.d.comb += [first.pasid.valid.eq(asks.process_id_valid), first.pasid.value.eq(asks.process_id)]
        with m.If(again):
            m.d.comb += first.eq(waiting.o.payload)
        m.d.comb += store.vpn.eq(first.page)
        valid, is_old, is_prefetch, asked = Signal(), Signal(), Signal(), Signal(asked_layout(self.has_pasid))
        with m.If(go):
            m.d.sync += [valid.eq(comes), is_old.eq(again), is_prefetch.eq(asks.is_prefetch & ~again), asked.eq(first)]

        # Second cycle: decide.
        found, answer = store.found, requests.answer
        is_known, hits, passes, answers, waits = Signal(), Signal(), Signal(), Signal(), Signal()
        has_answer = passes | hits | requests.is_answered
        m.d.comb += [
            *put_space(store.space, asked, self.has_pasid), requests.sought.eq(asked),
            passes.eq(asked.page[PAGE_BITS:].any()),
            is_known.eq(found.hit & ~passes),
            hits.eq(is_known & (found.U | Mux(asked.is_write, found.writable, found.readable))),
            answers.eq(has_answer & ~is_behind if pages else has_answer),
            waits.eq(valid & ~answers),
            store.discard.eq(valid & is_known & ~hits & go),
            requests.ask.eq((valid & ~has_answer if pages else waits) & ~requests.is_pending & requests.has_room & go),
            waiting.i.valid.eq(waits & ~is_prefetch & go), waiting.i.payload.eq(asked),
            go.eq(~valid | ~answers | is_prefetch | ~self.response.valid | self.response.ready),
            self.hit.eq(valid & (hits & answers if pages else hits) & go), self.miss.eq(requests.ask),
            self.spare.eq(requests.spare & ~(valid & is_prefetch)),
        ]  # fmt: skip
        response = self.response.payload
        with m.If(~self.response.valid | self.response.ready):
            m.d.sync += [
                self.response.valid.eq(valid & answers & ~is_prefetch), response.cookie.eq(asked.cookie), response.fault.eq(0),
                response.page.eq(found.ppn), response.readable.eq(found.readable), response.writable.eq(found.writable),
                response.size_log2.eq(12),
            ]  # fmt: skip
            with m.If(~hits):
                m.d.sync += [
                    response.page.eq(answer.page), response.readable.eq(answer.readable), response.writable.eq(answer.writable),
                    response.fault.eq(answer.fault & ~passes),
                ]  # fmt: skip
            with m.If(passes | Mux(hits, found.U, answer.untranslated & ~answer.fault)):
                m.d.sync += [
                    response.page.eq(asked.page), response.readable.eq(1), response.writable.eq(1),
                    response.size_log2.eq(UNTRANSLATED_LOG2),
                ]  # fmt: skip

        # All that waits is looked up again when there are answers, or when there is room for what found none.
        looks, decided, left_out = Signal(), Signal(), Signal()
        is_due = (to_decide == 0) & (requests.has_answers | (left_out & requests.has_room))
        m.d.comb += [
            looks.eq(drains & ~valid if pages else is_due),
            requests.begins.eq(looks),
            decided.eq(valid & is_old & go),
            requests.release.eq((decided & (to_decide == 1)) | (looks & (count == 0))),
        ]
        puts, takes = waiting.i.valid, waiting.o.ready & waiting.o.valid
        m.d.sync += [
            count.eq(count + puts - takes),
            to_look_up.eq(Mux(looks, count, to_look_up - takes)), to_decide.eq(Mux(looks, count, to_decide - decided)),
        ]
        with m.If(looks):
            m.d.sync += left_out.eq(0)
        with m.If(puts & ~requests.is_pending & ~requests.has_room):
            m.d.sync += left_out.eq(1)
        if pages:  # nothing of a client overtakes what waits, so that the gate holds no answer back
            waits_of, client = Signal(self.waiting // self.client_cookies), asked.cookie[(self.client_cookies - 1).bit_length() :]
            m.d.comb += [drains.eq(is_due), is_behind.eq(waits_of.bit_select(client, 1) & ~is_prefetch)]
            is_served = Signal()
            m.d.comb += self.settled.eq(is_served | ~requests.is_asking)
            with m.If(self.forget):
                m.d.sync += is_served.eq(0)
            with m.Elif(valid & answers & ~hits & ~is_prefetch & go):
                m.d.sync += is_served.eq(1)
            with m.If(looks):
                m.d.sync += waits_of.eq(0)
            with m.Elif(puts):
                m.d.sync += waits_of.bit_select(client, 1).eq(1)
        return m
