"""Translation by the mappings of a virtio-iommu: the IOTLB in front, the intervals behind."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..iommu.features import Features
from ..iommu.gate import MAX_FUNCTIONS, UNTRANSLATED_LOG2
from ..iommu.iotlb import Iotlb, superpages
from ..iommu.layouts import DwordRequest, TranslateResponse
from ..spec import virtio_iommu as spec
from ..stream.queue import Queue
from .intervals import Interval
from .layouts import SLOT_BITS, Endpoint, Forget, Report

FEATURES = {39: Features(), 48: Features(Sv48=True), 57: Features(Sv48=True, Sv57=True)}  # of an IOTLB for so many bits of an address
FRAME_BITS = 44  # of its physical page numbers
PAGE_BITS = 12


class Translator(wiring.Component):
    """Translates a page per cycle as long as it is cached; what is not is looked up in the intervals, one page after the other.

    Answers come out of order, by cookie. A page of an endpoint that bypasses is its own translation; one in ``window`` is too, for
    writes of an aligned dword by an endpoint that is attached. What is filled into the IOTLB is
    the largest page of its sizes around the address that lies in the interval. What is forgotten serves no request that is accepted
    later. [VIRTIO1.4 5.13.6]

    Latency: 2 cycles from request accepted to response valid when cached; a miss 10 cycles more than the lookup, 8 if it is in the
    interval of the miss before. Throughput: one request per cycle; the answer of a miss takes the place of one hit.

    Parameters
    ----------
    input_bits : :class:`int`
        Bits of an address: 39, 48 or 57; what is beyond is not mapped.
    window : pair of :class:`int` or None
        First and last page number of the MSI doorbells.
    entries, ways, superpage_entries : :class:`int`
        See :class:`..iommu.iotlb.Iotlb`.
    misses : :class:`int`
        Requests that wait for the intervals before what is behind them stalls; prefetches do not wait.

    Members
    -------
    request, response : ``In(stream.Signature(DwordRequest))``, ``Out(stream.Signature(TranslateResponse))``
        Of the gate; ``device_id`` is the function number, ``cause`` of a fault means nothing.
    endpoints : ``In(Endpoint).array(8)``
        Of each function.
    bypass, lost : ``In(1)``, ``In(1)``
        1: functions that are not attached bypass; whose page is looked up is not attached any more.
    find, found : ``Out(stream.Signature(key_bits))``, ``In(stream.Signature(Interval(key_bits, 44)))``
        Of the intervals; a key is a slot above a page number.
    forget : ``In(stream.Signature(Forget))``
        Always taken.
    reports : ``Out(stream.Signature(Report))``
        What was refused; whoever records it takes it at once.
    spare : ``Out(1)``
        Nothing waits for the intervals: a prefetch that is asked for now is in front of the next miss with one other at most.
    hit, miss : ``Out(1)``
        Pulses for counters.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    def __init__(self, *, input_bits=48, window=(0xFEE00, 0xFEEFF), entries=64, ways=4, superpage_entries=8, misses=16):
        if input_bits not in FEATURES:
            raise ValueError(f"Bits of an address must be 39, 48 or 57, not {input_bits!r}")
        self.input_bits, self.window, self.misses = input_bits, window, misses
        self.page_bits = input_bits - PAGE_BITS
        self.key_bits = SLOT_BITS + self.page_bits
        self._iotlb = Iotlb(entries=entries, ways=ways, superpage_entries=superpage_entries, features=FEATURES[input_bits])
        super().__init__({
            "request": In(stream.Signature(DwordRequest)),
            "response": Out(stream.Signature(TranslateResponse)),
            "endpoints": In(Endpoint).array(MAX_FUNCTIONS),
            "bypass": In(1),
            "lost": In(1),
            "find": Out(stream.Signature(self.key_bits)),
            "found": In(stream.Signature(Interval(self.key_bits, FRAME_BITS))),
            "forget": In(stream.Signature(Forget)),
            "reports": Out(stream.Signature(Report)),
            "spare": Out(1),
            "hit": Out(1),
            "miss": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        Asked = data.StructLayout({
            "request": DwordRequest, "passes": 1, "attached": 1, "slot": SLOT_BITS, "is_doorbell": 1, "is_beyond": 1})  # fmt: skip
        m.submodules.iotlb = iotlb = self._iotlb
        m.submodules.missed = missed = Queue(Asked, self.misses)
        m.d.comb += [
            self.forget.ready.eq(1), iotlb.forget.eq(self.forget.valid), iotlb.forget_av.eq(self.forget.p.is_page),
            iotlb.forget_vpn.eq(self.forget.p.page),
        ]  # fmt: skip

        # First cycle: where the endpoint is attached; the IOTLB is read. Second cycle: decide.
        request, asked, valid, go = self.request.p, Signal(Asked), Signal(), Signal()
        endpoint = Array(self.endpoints)[request.device_id[: (MAX_FUNCTIONS - 1).bit_length()]]
        m.d.comb += [self.request.ready.eq(go), iotlb.vpn.eq(request.page), iotlb.advance.eq(go), iotlb.space.PSCID.eq(asked.slot)]
        with m.If(go):
            m.d.sync += [
                valid.eq(self.request.valid), asked.request.eq(request), asked.attached.eq(endpoint.attached), asked.slot.eq(endpoint.slot),
                asked.passes.eq(Mux(endpoint.attached, endpoint.is_bypass, self.bypass)),
                asked.is_beyond.eq(request.page[self.page_bits :] != 0),
            ]  # fmt: skip
            if self.window:
                m.d.sync += asked.is_doorbell.eq((request.page >= self.window[0]) & (request.page <= self.window[1]))
        found, decided, refused, permitted = iotlb.found, Signal(), Signal(), Signal()
        answer, report = Signal(TranslateResponse), Signal(Report)
        m.d.comb += [
            permitted.eq(Mux(asked.request.is_write, found.writable, found.readable)),
            decided.eq(asked.passes | ~asked.attached | asked.is_doorbell | asked.is_beyond | found.hit),
            answer.cookie.eq(asked.request.cookie), answer.page.eq(asked.request.page), answer.fault.eq(refused),
        ]  # fmt: skip
        with m.If(asked.passes | (asked.is_doorbell & asked.attached & asked.request.is_dword)):
            m.d.comb += [answer.readable.eq(1), answer.writable.eq(1), answer.size_log2.eq(UNTRANSLATED_LOG2)]
        with m.Elif(~asked.attached | asked.is_doorbell | asked.is_beyond):
            m.d.comb += refused.eq(1)
        with m.Else():
            m.d.comb += [
                refused.eq(~permitted), answer.page.eq(found.ppn), answer.readable.eq(found.readable), answer.writable.eq(found.writable),
                answer.size_log2.eq(found.size_log2),
            ]  # fmt: skip

        late = stream.Signature(TranslateResponse).create()  # the answer of a miss
        free, told, is_lost = Signal(), Signal(Asked), Signal()
        m.d.comb += [
            free.eq(~self.response.valid | self.response.ready), late.ready.eq(free), missed.i.payload.eq(asked),
            missed.i.valid.eq(valid & ~decided),
            go.eq(~valid | asked.request.is_prefetch | Mux(decided, free & ~late.valid, missed.i.ready)),
            self.spare.eq(~missed.o.valid & ~(valid & asked.request.is_prefetch)),
            self.hit.eq(valid & go & found.hit & asked.attached & ~asked.passes), self.miss.eq(missed.i.valid & missed.i.ready),
            told.eq(Mux(late.valid, missed.o.payload, asked)),
        ]  # fmt: skip
        with m.If(free):
            m.d.sync += [
                self.response.valid.eq(late.valid | (valid & decided & ~asked.request.is_prefetch)),
                self.response.payload.eq(Mux(late.valid, late.payload, answer)),
            ]
            m.d.sync += [
                self.reports.valid.eq(Mux(late.valid, late.p.fault, valid & decided & refused & ~asked.request.is_prefetch)),
                report.reason.eq(Mux(told.attached & ~(late.valid & is_lost), spec.FAULT_R_MAPPING, spec.FAULT_R_DOMAIN)),
                report.is_write.eq(told.request.is_write), report.endpoint.eq(told.request.device_id),
                report.address.eq(Cat(told.request.offset, told.request.page)),
            ]  # fmt: skip
        with m.Else():
            m.d.sync += self.reports.valid.eq(0)
        m.d.comb += self.reports.payload.eq(report)

        self._look_up(m, missed.o, late, is_lost)
        return m

    def _look_up(self, m, missed, late, is_lost):
        """Answer requests that the IOTLB cannot, by the interval of the one before or by a lookup, and fill the IOTLB.

        ``is_lost``: the one that is answered was not attached any more when it was looked up.
        """
        iotlb, pages = self._iotlb, superpages(FEATURES[self.input_bits])
        asked = missed.p.request
        key, interval = Signal(self.key_bits), Signal(Interval(self.key_bits, FRAME_BITS))
        is_kept, may_fill = Signal(), Signal()  # the interval is not forgotten; nothing was since this one began
        is_inside, offset, frame = Signal(), Signal(self.page_bits), Signal(FRAME_BITS)
        sizes = Signal(len(pages))
        m.d.comb += [key.eq(Cat(asked.page[: self.page_bits], missed.p.slot)), self.find.payload.eq(key)]

        permitted = Mux(asked.is_write, interval.writable, interval.readable)
        entry = iotlb.fill.p
        m.d.comb += [
            late.p.cookie.eq(asked.cookie), late.p.fault.eq(~interval.hit | ~permitted), late.p.page.eq(frame),
            late.p.readable.eq(interval.readable), late.p.writable.eq(interval.writable), late.p.size_log2.eq(PAGE_BITS),
            entry.vpn.eq(asked.page), entry.PSCID.eq(missed.p.slot), entry.ppn.eq(frame), entry.readable.eq(interval.readable),
            entry.writable.eq(interval.writable),
        ]  # fmt: skip
        with m.If(is_lost):
            m.d.comb += [
                late.p.fault.eq(~self.bypass), late.p.page.eq(asked.page), late.p.readable.eq(1), late.p.writable.eq(1),
                late.p.size_log2.eq(UNTRANSLATED_LOG2),
            ]  # fmt: skip
        for reach, (_, size_log2) in enumerate(pages, 1):
            with m.If(sizes[reach - 1]):
                m.d.comb += entry.reach.eq(reach)
                with m.If(~is_lost):
                    m.d.comb += late.p.size_log2.eq(size_log2)
        with m.FSM():
            with m.State("COMPARE"):
                m.d.sync += [is_inside.eq(is_kept & (key >= interval.first) & (key <= interval.last)), may_fill.eq(1), is_lost.eq(0)]
                with m.If(missed.valid):
                    m.next = "DECIDE"
            with m.State("DECIDE"):
                m.next = "FIND"
                with m.If(is_inside):
                    m.next = "PLACE"
            with m.State("FIND"):
                m.d.comb += self.find.valid.eq(1)
                with m.If(self.find.ready):
                    m.next = "TAKE"
            with m.State("TAKE"):
                m.d.comb += self.found.ready.eq(1)
                m.d.sync += [interval.eq(self.found.payload), is_kept.eq(self.found.p.hit & may_fill), is_lost.eq(self.lost)]
                with m.If(self.found.valid):
                    m.next = "PLACE"
            with m.State("PLACE"):
                m.d.sync += offset.eq(key - interval.first)
                m.next = "MEASURE"
            with m.State("MEASURE"):
                m.d.sync += frame.eq(interval.page + offset)
                for n, (low, _) in enumerate(pages):
                    m.d.sync += sizes[n].eq(
                        (Cat(Const(0, low), key[low:]) >= interval.first) & (Cat(Const(-1, low), key[low:]) <= interval.last)
                        & (interval.page[:low] == interval.first[:low]))  # fmt: skip
                m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += [late.valid.eq(~asked.is_prefetch), missed.ready.eq(late.ready | asked.is_prefetch)]
                with m.If(missed.ready):
                    m.d.comb += iotlb.fill.valid.eq(interval.hit & may_fill)
                    m.next = "COMPARE"
        with m.If(self.forget.valid):
            m.d.sync += [is_kept.eq(0), may_fill.eq(0)]
