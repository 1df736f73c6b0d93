"""Invalidate Requests of the host: forget, wait for what used the old translations, say so. [PCIe5 10.3]"""

from amaranth import Array, Cat, Const, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..stream.queue import Queue
from ..tlp.layouts import ConfigState, Invalidation, TlpBeat
from .layouts import MAX_FUNCTIONS

COMPLETIONS = 1  # Completion Count: one for each request, in the one traffic class [PCIe5 10.3.2]


class Invalidations(wiring.Component):
    """Serves Invalidate Requests in their order, and answers each with one Invalidate Completion.

    The completion is offered after the fence that followed ``forget`` has ended: every read that used a forgotten translation has its
    data, every write has been accepted into the transmit order. Translations are forgotten for all functions, also when ATS Enable of
    one falls: that one is not ``usable`` until a fence has ended that followed. So it is with PASID Enable. A range forgets everything, and
    what is forgotten of a page is forgotten of every process, Global Invalidate or not. [PCIe5 10.3.2, 10.3.3, 10.3.8]

    Latency: 2 cycles from a request to ``forget`` when none is at work; then that of the fence, and 1.

    Parameters
    ----------
    width : :class:`int`
        Bits of TLP data per beat.
    functions : :class:`int`
        Functions of the card.
    depth : :class:`int`
        Requests that wait: 32 for each function that announces so many.
    enables : :class:`int`
        ATS Enable of 8 functions; 16 with their PASID Enable behind.
    has_pages : :class:`bool`
        A fence does not wait for requests without an answer, so those are left room between two invalidations.

    Members
    -------
    i : ``In(stream.Signature(Invalidation))``
        Requests.
    messages : ``Out(stream.Signature(TlpBeat(width)))``
        Invalidate Completions.
    config : ``In(ConfigState).array(functions)``
        For requester IDs.
    enable, usable : ``In(enables)``, ``Out(enables)``
        Each Enable; the same, and nothing waits that entered the gate or was translated before it was 0 for the last time.
    forget, forget_av, forget_page : ``Out(1)``, ``Out(1)``, ``Out(52)``
        For the cache.
    fence, fenced : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        Of the gate.
    settled : ``In(1)``
        With ``has_pages``: the cache may forget again.
    """

    def __init__(self, *, width, functions, depth=32, enables=MAX_FUNCTIONS, has_pages=False):
        self.width, self.functions, self.depth, self.enables, self.has_pages = width, functions, depth, enables, has_pages
        super().__init__({
            "i": In(stream.Signature(Invalidation)),
            "messages": Out(stream.Signature(TlpBeat(width))),
            "config": In(ConfigState).array(functions),
            "enable": In(enables), "usable": Out(enables),
            "forget": Out(1), "forget_av": Out(1), "forget_page": Out(52),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            **({"settled": In(1)} if has_pages else {}),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.waiting = waiting = Queue(Invalidation, self.depth)
        wiring.connect(m, wiring.flipped(self.i), waiting.i)
        order, message = waiting.o.payload, self.messages.payload
        was_enabled, is_disabled = Signal(self.enables), Signal()
        fell, fallen, drained = (Signal(self.enables, name=name) for name in ("fell", "fallen", "drained"))
        m.d.comb += [fell.eq(was_enabled & ~self.enable), self.usable.eq(self.enable & ~(fallen | drained))]
        m.d.sync += [was_enabled.eq(self.enable), is_disabled.eq(fell.any()), fallen.eq(fallen | fell)]
        itags, is_order = Signal(32), Signal()  # the fence is that of a request
        m.d.comb += itags.bit_select(order.itag, 1).eq(1)
        ids = Array(Cat(self.config[n].device, self.config[n].bus) for n in range(self.functions))
        m.d.comb += [
            self.forget.eq(is_disabled), self.forget_av.eq(~order.is_range & ~is_disabled), self.forget_page.eq(order.page),
            message.header.fmt.eq(1 << pcie.FMT_4DW),
            message.header.type.eq(pcie.TYPE_MESSAGE | pcie.ROUTED_BY_ID),
            message.header.message_code.eq(pcie.MESSAGE_INVALIDATED),
            message.header.requester_id.eq(Cat(order.function, ids[order.function])),
            message.header.address.eq(Cat(itags, Const(COMPLETIONS, 16), order.requester_id)),
            message.first.eq(1), message.last.eq(1),
        ]  # fmt: skip
        with m.FSM():
            with m.State("FORGET"):
                with m.If(waiting.o.valid & self.settled if self.has_pages else waiting.o.valid):
                    m.d.comb += self.forget.eq(1)
                    m.d.sync += is_order.eq(1)
                    m.next = "FENCE"
                with m.Elif(fallen.any()):
                    m.d.sync += is_order.eq(0)
                    m.next = "FENCE"
            with m.State("FENCE"):
                m.d.comb += self.fence.valid.eq(1)
                with m.If(self.fence.ready):
                    m.d.sync += [drained.eq(fallen), fallen.eq(fell)]
                    m.next = "DRAIN"
            with m.State("DRAIN"):
                m.d.comb += self.fenced.ready.eq(1)
                with m.If(self.fenced.valid):
                    m.d.sync += drained.eq(0)
                    m.next = "FORGET"
                    with m.If(is_order):
                        m.next = "COMPLETE"
            with m.State("COMPLETE"):
                m.d.comb += self.messages.valid.eq(1)
                with m.If(self.messages.ready):
                    m.d.comb += waiting.o.ready.eq(1)
                    m.next = "FORGET"
        return m
