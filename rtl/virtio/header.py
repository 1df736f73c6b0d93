"""Takes the header off the front of a packet, or puts one there."""

from functools import cache

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import ChainBeat
from ..tlp.layouts import BurstStatus

HEADER_BYTES = 16  # of a request to a disk


@cache
def Front(header_bytes=HEADER_BYTES):
    """The first bytes of a packet; ``complete`` unless the packet was shorter or could not be fetched."""
    return data.StructLayout({"data": 8 * header_bytes, "complete": 1})


class HeaderSplitter(wiring.Component):
    """Splits each packet into its header and the packet of the rest, from byte 0 up.

    For each packet of ``i`` there is one item of ``header``, then one packet of ``o`` (an empty last beat when nothing is
    left), which carries the status of ``i``.

    In reset (``ResetInserter``) it takes and drops its input.

    Latency: 1 cycle to ``header``, 1 to 2 to ``o``. Throughput: one beat per cycle; up to 2 cycles more per packet.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    header_bytes : :class:`int`
        Length of a header: 1 to 16.

    Members
    -------
    i : ``In(stream.Signature(ChainBeat(width)))``
        Packets.
    header : ``Out(stream.Signature(Front(header_bytes)))``
        Their headers.
    o : ``Out(stream.Signature(ChainBeat(width)))``
        The rest.
    """

    def __init__(self, *, width, header_bytes=HEADER_BYTES):
        self.width, self.header_bytes = width, header_bytes
        super().__init__({
            "i": In(stream.Signature(ChainBeat(width))),
            "header": Out(stream.Signature(Front(header_bytes))),
            "o": Out(stream.Signature(ChainBeat(width))),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        beat = self.i.payload
        ends = (self.header_bytes - 1) % lanes + 1  # where the header ends in its last beat
        surplus = lanes - ends  # payload bytes that share that beat
        hold = Signal(max(8 * surplus, 1))
        hold_count, hold_status = Signal(range(lanes + 1)), Signal(BurstStatus)
        front, whole = Signal(8 * self.header_bytes), Signal()
        out = self.o.payload
        free, first = Signal(), Signal(init=1)
        m.d.comb += free.eq(~self.o.valid | self.o.ready)
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)

        def emit(value, count, last, status):
            return [
                self.o.valid.eq(1), out.data.eq(value), out.byte_count.eq(count), out.first.eq(first), out.last.eq(last),
                out.status.eq(status), first.eq(last),
            ]

        def take(state, is_last, following):
            """A state that takes a beat of the header."""
            with m.State(state):
                m.d.comb += self.i.ready.eq(1)
                with m.If(self.i.valid):
                    m.d.sync += [hold_count.eq(0), hold_status.eq(beat.status), whole.eq(0)]
                    if is_last:
                        m.d.sync += [front[8 * (self.header_bytes - ends) :].eq(beat.data), hold.eq(beat.data[8 * ends :])]
                        with m.If(beat.byte_count >= ends):
                            m.d.sync += [hold_count.eq(beat.byte_count - ends), whole.eq(~beat.last | (beat.status == BurstStatus.OK))]
                    else:
                        m.d.sync += front.eq(beat.data)
                    m.next = following
                    with m.If(beat.last):
                        m.next = "GIVE_SHORT"

        with m.FSM():
            if lanes < self.header_bytes:
                take("TAKE_HEADER", False, "TAKE_SECOND")
                take("TAKE_SECOND", True, "GIVE_HEADER")
            else:
                take("TAKE_HEADER", True, "GIVE_HEADER")
            with m.State("GIVE_HEADER"):  # more of the packet follows
                m.d.comb += self.header.valid.eq(1)
                with m.If(self.header.ready):
                    m.next = "PASS"
            with m.State("GIVE_SHORT"):  # the packet is over: what is held is all
                m.d.comb += self.header.valid.eq(1)
                with m.If(self.header.ready):
                    m.next = "FLUSH"
            with m.State("PASS"):
                m.d.comb += self.i.ready.eq(free)
                with m.If(self.i.valid & free):
                    if surplus:
                        bad = beat.status != BurstStatus.OK
                        fits = beat.byte_count <= ends
                        m.d.sync += hold.eq(beat.data[8 * ends :])
                        m.d.sync += [hold_count.eq(beat.byte_count - ends), hold_status.eq(beat.status)]
                        m.d.sync += emit(
                            Cat(hold, beat.data[: 8 * ends]), surplus + Mux(fits, beat.byte_count, ends),
                            beat.last & (fits | bad), beat.status)
                        with m.If(beat.last):
                            m.next = "FLUSH"
                            with m.If(fits | bad):
                                m.next = "TAKE_HEADER"
                    else:
                        m.d.sync += emit(beat.data, beat.byte_count, beat.last, beat.status)
                        with m.If(beat.last):
                            m.next = "TAKE_HEADER"
            with m.State("FLUSH"):
                with m.If(free):
                    m.d.sync += emit(hold if surplus else 0, hold_count if surplus else 0, 1, hold_status)
                    m.next = "TAKE_HEADER"
        m.d.comb += [self.header.payload.data.eq(front), self.header.payload.complete.eq(whole)]
        return m


class HeaderJoiner(wiring.Component):
    """Puts a header in front of each packet.

    Latency: 1 cycle from the header, 1 from a beat. Throughput: one beat per cycle; a cycle per packet besides, and one for a beat more.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    header_bytes : :class:`int`
        Length of a header: 1 to 15, not ``width / 8``.

    Members
    -------
    header : ``In(stream.Signature(8 * header_bytes))``
        One per packet.
    i : ``In(stream.Signature(ChainBeat(width)))``
        Packets, none empty; ``status`` is not passed on.
    o : ``Out(stream.Signature(ChainBeat(width)))``
        Headers with their packets.
    """

    def __init__(self, *, width, header_bytes):
        self.width, self.header_bytes = width, header_bytes
        super().__init__({
            "header": In(stream.Signature(8 * header_bytes)),
            "i": In(stream.Signature(ChainBeat(width))),
            "o": Out(stream.Signature(ChainBeat(width))),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        held = self.header_bytes % lanes  # bytes of the header, then of each beat, that wait for the next beat
        beat, out = self.i.payload, self.o.payload
        hold, rest, first = Signal(8 * held), Signal(range(lanes + 1)), Signal()
        free, total = Signal(), Signal(range(2 * lanes + 1))
        m.d.comb += [free.eq(~self.o.valid | self.o.ready), total.eq(held + beat.byte_count)]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.FSM():
            with m.State("TAKE_HEADER"):
                m.d.comb += self.header.ready.eq(free)
                m.d.sync += hold.eq(self.header.payload[8 * (self.header_bytes - held) :])
                m.d.sync += first.eq(self.header_bytes < lanes)
                with m.If(free & self.header.valid):
                    if self.header_bytes > lanes:
                        m.d.sync += [
                            self.o.valid.eq(1), out.data.eq(self.header.payload), out.byte_count.eq(lanes), out.first.eq(1), out.last.eq(0),
                        ]  # fmt: skip
                    m.next = "PASS"
            with m.State("PASS"):
                m.d.comb += self.i.ready.eq(free)
                with m.If(free & self.i.valid):
                    m.d.sync += [
                        self.o.valid.eq(1), out.data.eq(Cat(hold, beat.data)), out.byte_count.eq(Mux(total <= lanes, total, lanes)),
                        out.first.eq(first), out.last.eq(beat.last & (total <= lanes)), first.eq(0),
                        hold.eq(beat.data[8 * (lanes - held) :]), rest.eq(total - lanes),
                    ]  # fmt: skip
                    with m.If(beat.last):
                        m.next = "TAKE_HEADER"
                        with m.If(total > lanes):
                            m.next = "GIVE_REST"
            with m.State("GIVE_REST"):
                with m.If(free):
                    m.d.sync += [self.o.valid.eq(1), out.data.eq(hold), out.byte_count.eq(rest), out.first.eq(0), out.last.eq(1)]
                    m.next = "TAKE_HEADER"
        return m
