"""The translation path: caches in front, walker behind."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import riscv_iommu as spec
from ..stream.queue import Queue
from .contexts import Context, ContextCache
from .iotlb import VPN_BITS, Iotlb
from .layouts import FaultReport, Invalidate, InvalidateKind, MemoryRead, MemoryReadData, TranslateRequest, TranslateResponse
from .walker import Walker


class Translator(wiring.Component):
    """Translates a page per cycle as long as contexts and translations are cached; walks run beside.

    Answers come out of order, by cookie. An invalidation that was accepted is effective for every request that is accepted later: caches
    forget, and what walks in flight bring neither fills a cache nor serves such a request. With ddtp Bare every page is its own
    translation. [RVIOMMU1.0 3.3]

    Latency: 2 cycles from request accepted to response valid when cached; a miss 8 cycles more than its reads. Throughput: one
    request per cycle; the answer of a miss takes the place of one hit, and so does a request that comes back from the walker.

    Parameters
    ----------
    entries, ways, superpage_entries : :class:`int`
        See :class:`.iotlb.Iotlb`.
    walks, context_entries : :class:`int`
        Walks in flight; device contexts cached.
    misses : :class:`int`
        Requests that wait in front of the walker before what is behind them stalls; prefetches do not wait.
    physical_address_bits : :class:`int`
        See :class:`.walker.Walker`.

    Members
    -------
    request, response : ``In(stream.Signature(TranslateRequest))``, ``Out(stream.Signature(TranslateResponse))``
        Translation; whoever asks takes answers at once.
    memory_read, memory_read_data : streams
        The walker's reads.
    ddtp_mode, ddtp_ppn : ``In(4)``, ``In(44)``
        From the registers.
    faults : ``Out(stream.Signature(FaultReport))``
        What is to be recorded.
    invalidate : ``In(stream.Signature(Invalidate))``
        Always taken.
    hit, miss, begun, merged, read : ``Out(1)``
        Pulses for counters: translations found in the IOTLB, requests for the walker, walks begun, requests that joined a walk, reads.

    Raises
    ------
    :exc:`ValueError`
        If a size is out of range.
    """

    def __init__(self, *, entries=64, ways=4, superpage_entries=8, walks=8, context_entries=8, misses=16, physical_address_bits=56):
        self.entries, self.ways, self.superpage_entries = entries, ways, superpage_entries
        self.walks, self.context_entries, self.misses, self.physical_address_bits = walks, context_entries, misses, physical_address_bits
        self._iotlb = Iotlb(entries=entries, ways=ways, superpage_entries=superpage_entries)
        self._contexts = ContextCache(entries=context_entries, ports=2)
        self._walker = Walker(walks=walks, physical_address_bits=physical_address_bits)
        self._missed = Queue(TranslateRequest, misses)
        super().__init__({
            "request": In(stream.Signature(TranslateRequest)),
            "response": Out(stream.Signature(TranslateResponse)),
            "memory_read": Out(stream.Signature(MemoryRead)),
            "memory_read_data": In(stream.Signature(MemoryReadData)),
            "ddtp_mode": In(4),
            "ddtp_ppn": In(44),
            "faults": Out(stream.Signature(FaultReport)),
            "invalidate": In(stream.Signature(Invalidate)),
            "hit": Out(1),
            "miss": Out(1),
            "begun": Out(1),
            "merged": Out(1),
            "read": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.iotlb = iotlb = self._iotlb
        m.submodules.contexts = contexts = self._contexts
        m.submodules.walker = walker = self._walker
        m.submodules.missed = missed = self._missed
        wiring.connect(m, missed.o, walker.i)
        wiring.connect(m, walker.memory_read, wiring.flipped(self.memory_read))
        wiring.connect(m, wiring.flipped(self.memory_read_data), walker.memory_read_data)
        wiring.connect(m, walker.faults, wiring.flipped(self.faults))
        wiring.connect(m, walker.fill, iotlb.fill)
        wiring.connect(m, walker.fill_context, contexts.fill)
        m.d.comb += [
            walker.mode.eq(self.ddtp_mode), walker.root_ppn.eq(self.ddtp_ppn),
            contexts.device_id[1].eq(walker.device_id),
            walker.context.eq(contexts.context[1]), walker.context_found.eq(contexts.found[1]),
            self.begun.eq(walker.begun), self.merged.eq(walker.merged), self.read.eq(walker.read),
        ]

        # Invalidations.
        order = self.invalidate.payload
        translations = (order.kind == InvalidateKind.VMA) | (order.kind == InvalidateKind.GVMA) | (order.kind == InvalidateKind.ALL)
        m.d.comb += self.invalidate.ready.eq(1)
        with m.If(self.invalidate.valid):
            m.d.comb += [
                walker.forget.eq(1),
                iotlb.forget.eq(translations),
                iotlb.forget_av.eq(order.av & (order.kind == InvalidateKind.VMA)),
                walker.forget_tables.eq(translations & ~iotlb.forget_av),
                contexts.forget.eq((order.kind == InvalidateKind.DDT) | (order.kind == InvalidateKind.ALL)),
            ]
        m.d.comb += iotlb.forget_vpn.eq(order.page)

        # First cycle: context and IOTLB are read. Second cycle: decide. Then the response, unless the walker's answer goes first.
        request, go = Signal(TranslateRequest), Signal()
        valid, asked = Signal(), Signal(TranslateRequest)
        context, context_found = Signal(Context), Signal()
        m.d.comb += [
            request.eq(Mux(walker.retry.valid, walker.retry.payload, self.request.payload)),
            walker.retry.ready.eq(go), self.request.ready.eq(go & ~walker.retry.valid),
            contexts.device_id[0].eq(request.device_id),
            iotlb.vpn.eq(request.page), iotlb.advance.eq(go), iotlb.PSCID.eq(context.PSCID),
        ]
        with m.If(go):
            m.d.sync += [valid.eq(walker.retry.valid | self.request.valid), asked.eq(request), context.eq(contexts.context[0]),
                         context_found.eq(contexts.found[0])]
        found = iotlb.found
        plain, passes, found_ours, hits = Signal(), Signal(), Signal(), Signal()
        canonical = (asked.page[VPN_BITS - 1 :] == 0) | asked.page[VPN_BITS - 1 :].all()
        in_directory = (self.ddtp_mode != spec.OFF) & (self.ddtp_mode != spec.BARE)
        permitted = Signal()
        with m.If(asked.is_write):
            m.d.comb += permitted.eq(found.writable)
        with m.Else():
            m.d.comb += permitted.eq(found.readable)
        m.d.comb += [
            plain.eq(~asked.process_id_valid & ~asked.execute),
            passes.eq((self.ddtp_mode == spec.BARE) | (in_directory & plain & context_found & context.is_bare)),
            found_ours.eq(in_directory & plain & context_found & ~context.is_bare & canonical & found.hit),
            hits.eq(found_ours & permitted),
            iotlb.discard.eq(valid & found_ours & ~permitted & go),  # the walk brings what memory says now
        ]
        answered, unanswered = Signal(), Signal()
        m.d.comb += [
            answered.eq(valid & (passes | hits)),
            unanswered.eq(valid & ~passes & ~hits),
            missed.i.payload.eq(asked),
        ]
        answer = Signal(TranslateResponse)
        m.d.comb += [
            answer.cookie.eq(asked.cookie), answer.readable.eq(passes | found.readable), answer.writable.eq(passes | found.writable),
            answer.page.eq(found.ppn), answer.size_log2.eq(found.size_log2),
        ]
        with m.If(passes):
            m.d.comb += [answer.page.eq(asked.page), answer.size_log2.eq(63)]

        free = Signal()
        m.d.comb += [
            free.eq(~self.response.valid | self.response.ready),
            walker.o.ready.eq(free),
            # A second cycle ends when its answer or its miss has a place.
            go.eq(~valid | asked.is_prefetch | (answered & free & ~walker.o.valid) | (unanswered & missed.i.ready)),
            missed.i.valid.eq(unanswered),
            self.hit.eq(valid & hits & go), self.miss.eq(missed.i.valid & missed.i.ready),
        ]
        with m.If(free):
            m.d.sync += self.response.valid.eq(walker.o.valid | (answered & ~asked.is_prefetch))
            m.d.sync += self.response.payload.eq(answer)
            with m.If(walker.o.valid):
                m.d.sync += self.response.payload.eq(walker.o.payload)
        return m
