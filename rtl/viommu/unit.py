"""virtio-iommu as one back end: requests, mappings, translation, events."""

from amaranth import Cat, Const, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..iommu.layouts import DwordRequest, TranslateResponse
from ..spec import virtio_iommu as spec
from ..virtio.device import back_end_ports
from ..virtio.layouts import ConfigWrite
from .device import IommuDevice
from .events import Events
from .intervals import Intervals
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
        Its sizes and features.
    endpoints : tuple of :class:`int`
        Functions that it translates for.

    Members
    -------
    chains, readable, writable, settled, failed, flows, features, config, config_changed, needs_reset, stop, stopped, port_stop,
    port_stopped, suspend, suspended
        See :func:`..virtio.device.back_end_ports`: a port for requests and one for events, which waits.
    config_write : ``In(ConfigWrite)``
        The driver writes ``bypass``; nothing else can be written.
    restore : ``In(1)``
        1: ``bypass`` becomes what it was at power-on.
    translate_request, translate_response : ``In(stream.Signature(DwordRequest))``, ``Out(stream.Signature(TranslateResponse))``
        Of the gate, which has ``doorbells``.
    fence, fenced : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        Of the gate.
    hit, miss : ``Out(1)``
        Pulses of the translator, for counters.
    dropped : ``Out(32)``
        Faults that were not recorded.
    """

    def __init__(self, *, width, device=None, endpoints):
        self.width, self.device, self.endpoints = width, device or IommuDevice(), tuple(endpoints)
        self._requests = Requests(width=width, device=self.device, endpoints=self.endpoints)
        self._translator = Translator(input_bits=self.device.input_bits, window=self.device.window, entries=self.device.entries,
                                      ways=self.device.ways)  # fmt: skip
        super().__init__({
            **back_end_ports(width, 2, spec.CONFIG_BYTES),
            "config_write": In(ConfigWrite),
            "restore": In(1),
            "translate_request": In(stream.Signature(DwordRequest)),
            "translate_response": Out(stream.Signature(TranslateResponse)),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            "hit": Out(1),
            "miss": Out(1),
            "dropped": Out(32),
        })

    def elaborate(self, platform):
        m = Module()
        begin_anew = ResetInserter(self.stop)
        requests, translator = self._requests, self._translator
        intervals = Intervals(intervals=self.device.intervals, key_bits=requests.key_bits, page_bits=FRAME_BITS)
        m.submodules.translator = translator
        m.submodules.requests, m.submodules.intervals = begin_anew(requests), begin_anew(intervals)
        m.submodules.events = events = Events(width=self.width, depth=self.device.events)
        outer = wiring.flipped
        for one, other in ((outer(self.chains[REQUESTS]), requests.chains), (requests.writable, outer(self.writable[REQUESTS])),
                           (outer(self.chains[EVENTS]), events.chains), (outer(self.readable[EVENTS]), events.readable),
                           (events.writable, outer(self.writable[EVENTS])), (requests.orders, intervals.orders),
                           (intervals.outcomes, requests.outcomes), (translator.reports, events.reports),
                           (outer(self.translate_request), translator.request),
                           (translator.response, outer(self.translate_response))):  # fmt: skip
            wiring.connect(m, one, other)
        readable, forget, find, found = self.readable[REQUESTS], translator.forget, translator.find, translator.found
        has_stopped = Signal()  # a lookup of the last cycle of a stop is answered behind it
        m.d.sync += has_stopped.eq(self.stop)
        m.d.comb += [
            requests.features.eq(self.features),
            requests.readable.payload.eq(readable.payload), requests.readable.valid.eq(readable.valid),
            readable.ready.eq(requests.readable.ready | self.stop),
            forget.valid.eq(requests.forget.valid | self.stop), forget.p.is_page.eq(requests.forget.p.is_page & ~self.stop),
            forget.p.page.eq(requests.forget.p.page), requests.forget.ready.eq(1),
            intervals.find.payload.eq(find.payload), intervals.find.valid.eq(find.valid & ~self.stop),
            find.ready.eq(intervals.find.ready | self.stop), intervals.found.ready.eq(found.ready),
            found.valid.eq(intervals.found.valid | self.stop | has_stopped),
            found.payload.eq(Mux(self.stop | has_stopped, 0, intervals.found.payload)), translator.lost.eq(self.stop | has_stopped),
            *(ours.eq(theirs) for ours, theirs in zip(translator.endpoints, requests.attachments)),
            events.stop.eq(self.stop | self.port_stop[EVENTS]), events.suspend.eq(self.suspend),
            self.hit.eq(translator.hit), self.miss.eq(translator.miss), self.dropped.eq(events.dropped),
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
        none_come = ~Cat(chain.valid for chain in self.chains).any() & ~Cat(beat.valid for beat in self.readable).any()
        m.d.comb += [
            self.stopped.eq(self.stop & is_clean & none_come),
            self.port_stopped.eq(Cat(1, ~self.chains[EVENTS].valid & ~self.readable[EVENTS].valid) & self.port_stop),
            self.suspended.eq(self.suspend & requests.is_idle & events.is_idle & ~self.chains[REQUESTS].valid),
        ]
        return m
