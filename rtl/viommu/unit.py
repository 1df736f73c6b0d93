"""virtio-iommu as one back end: requests, mappings, translation, events."""

from amaranth import Const, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..iommu.layouts import DwordRequest, TranslateResponse
from ..spec import virtio_iommu as spec
from ..stream.queue import Queue
from ..virtio.device import back_end_ports
from ..virtio.ports import join_port
from .events import Events
from .intervals import Intervals
from .layouts import Report
from .requests import Requests
from .translator import FRAME_BITS, Translator

REQUESTS, EVENTS = 0, 1  # queues [VIRTIO1.4 5.13.2]


class Viommu(wiring.Component):
    """A virtio-iommu: the back end of its function, and the translator of the gate.

    Behaviour: see :class:`.requests.Requests`, :class:`.translator.Translator`, :class:`.intervals.Intervals`, :class:`.events.Events`.

    A stop detaches all endpoints and takes out all mappings; it is over when no access by them is under way. Lookups that it meets find
    the endpoint detached. ``bypass`` stays as it is; what is written to it counts at once, and is shown when no access by what it was
    is under way. [VIRTIO1.4 5.13.4, 5.13.5]

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    device : :class:`.device.IommuDevice`
        What it tells of itself, its sizes, and the functions that it translates for.

    Members
    -------
    restore : ``In(1)``
        1: ``bypass`` becomes what it was at power-on.
    translate_request, translate_response : ``In(stream.Signature(DwordRequest))``, ``Out(stream.Signature(TranslateResponse))``
        Of the gate, which has ``doorbells``.
    fence, fenced : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        Of the gate.
    spare : ``Out(1)``
        Of the translator: it can take a prefetch.
    look : ``Out(stream.Signature(0))``
        A report waits and there is no buffer for it: let the ring engine look into the event queue, once per report. Linux rings no
        doorbell for the buffers that it gives at first. One that a stop meets is still made, and finds nothing.
    hit, miss : ``Out(1)``
        Pulses of the translator, for counters.
    dropped : ``Out(32)``
        Faults that came when all places for reports were taken.
    Others
        See :func:`..virtio.device.back_end_ports`: a port for requests and one for events, which waits. Of the configuration ``bypass``
        alone can be written.
    """

    def __init__(self, *, width, device):
        self.width, self.device = width, device
        self._requests = Requests(width=width, device=self.device)
        self._translator = Translator(input_bits=self.device.input_bits, window=self.device.window, entries=self.device.entries,
                                      ways=self.device.ways)  # fmt: skip
        super().__init__({
            **back_end_ports(width, 2, device.config_bytes),
            "restore": In(1),
            "translate_request": In(stream.Signature(DwordRequest)),
            "translate_response": Out(stream.Signature(TranslateResponse)),
            "spare": Out(1),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            "look": Out(stream.Signature(0)),
            "hit": Out(1),
            "miss": Out(1),
            "dropped": Out(32),
        })

    def elaborate(self, platform):
        m = Module()
        requests, translator, events = self._requests, self._translator, Events(width=self.width)
        join_port(m, self, REQUESTS, requests)
        join_port(m, self, EVENTS, events)
        intervals = Intervals(intervals=self.device.intervals, key_bits=requests.key_bits, page_bits=FRAME_BITS)
        m.submodules.translator, m.submodules.intervals = translator, ResetInserter(self.stop)(intervals)
        reports = Queue(Report, self.device.events)
        m.submodules.reports = ResetInserter(self.stop)(reports)
        for one, other in ((requests.orders, intervals.orders), (intervals.outcomes, requests.outcomes), (reports.o, events.reports),
                           (wiring.flipped(self.translate_request), translator.request),
                           (translator.response, wiring.flipped(self.translate_response))):  # fmt: skip
            wiring.connect(m, one, other)
        m.d.comb += [
            reports.i.payload.eq(translator.reports.payload), reports.i.valid.eq(translator.reports.valid), translator.reports.ready.eq(1),
        ]  # fmt: skip
        with m.If(translator.reports.valid & ~reports.i.ready):
            m.d.sync += self.dropped.eq(self.dropped + 1)
        has_looked = Signal()  # for the report at hand
        with m.If(self.look.ready):
            m.d.sync += self.look.valid.eq(0)
        with m.If(reports.o.valid & ~self.chains[EVENTS].valid & ~has_looked & ~self.suspend & ~self.stop):
            m.d.sync += [self.look.valid.eq(1), has_looked.eq(1)]
        with m.If((reports.o.valid & reports.o.ready) | self.stop):
            m.d.sync += has_looked.eq(0)
        forget, find, found = translator.forget, translator.find, translator.found
        has_stopped = Signal()  # a lookup of the last cycle of a stop is answered behind it
        m.d.sync += has_stopped.eq(self.stop)
        m.d.comb += [
            requests.features.eq(self.features),
            forget.valid.eq(requests.forget.valid | self.stop), forget.p.is_page.eq(requests.forget.p.is_page & ~self.stop),
            forget.p.page.eq(requests.forget.p.page), requests.forget.ready.eq(1),
            intervals.find.payload.eq(find.payload), intervals.find.valid.eq(find.valid & ~self.stop),
            find.ready.eq(intervals.find.ready | self.stop), intervals.found.ready.eq(found.ready),
            found.valid.eq(intervals.found.valid | self.stop | has_stopped),
            found.payload.eq(Mux(self.stop | has_stopped, 0, intervals.found.payload)), translator.lost.eq(self.stop | has_stopped),
            *(ours.eq(theirs) for ours, theirs in zip(translator.endpoints, requests.attachments)),
            events.suspend.eq(self.suspend), self.spare.eq(translator.spare), self.hit.eq(translator.hit), self.miss.eq(translator.miss),
        ]  # fmt: skip

        bypass, shown, byte = Signal(init=self.device.bypass), Signal(init=self.device.bypass), spec.CONFIG_BYPASS % 8
        with m.If((self.config_write.word == spec.CONFIG_BYPASS // 8) & self.config_write.enable[byte]
                  & self.features[spec.F_BYPASS_CONFIG]):  # fmt: skip
            m.d.sync += bypass.eq(self.config_write.data.word_select(byte, 8)[0])
        with m.If(self.restore):
            m.d.sync += bypass.eq(self.device.bypass)
        m.d.comb += [
            translator.bypass.eq(bypass),
            self.config.eq(Const(int.from_bytes(self.device.configuration, "little"), len(self.config)) | shown << 8 * spec.CONFIG_BYPASS),
        ]  # fmt: skip

        # Fences of requests, of a stop, of another bypass. A request whose fence is under way when a stop comes does not wait any more.
        is_clean, is_stop, is_request, aim = Signal(), Signal(), Signal(), Signal()
        with m.If(~self.stop):
            m.d.sync += is_clean.eq(0)
        with m.FSM():
            with m.State("AWAIT"):
                m.d.sync += [is_stop.eq(self.stop), is_request.eq(requests.fence.valid & ~self.stop), aim.eq(bypass)]
                m.d.comb += requests.fence.ready.eq(1)
                with m.If((self.stop & ~is_clean) | (~self.stop & requests.fence.valid) | (bypass != shown)):
                    m.next = "FENCE"
            with m.State("FENCE"):
                m.d.comb += self.fence.valid.eq(1)
                with m.If(self.fence.ready):
                    m.next = "DRAIN"
            with m.State("DRAIN"):
                m.d.comb += self.fenced.ready.eq(1)
                with m.If(self.fenced.valid):
                    m.d.sync += [is_clean.eq(is_stop), shown.eq(aim)]
                    m.next = "AWAIT"
                    with m.If(is_request):
                        m.next = "TELL"
            with m.State("TELL"):
                m.d.comb += requests.fenced.valid.eq(1)
                with m.If(requests.fenced.ready | self.stop):
                    m.next = "AWAIT"
        m.d.comb += [
            self.stopped.eq(self.stop & is_clean & self.port_stopped.all()),
            self.suspended.eq(self.suspend & requests.is_idle & ~self.chains[REQUESTS].valid & events.is_idle & self.settled[EVENTS]),
        ]
        return m
