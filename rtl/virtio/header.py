"""Takes the header off the front of a chain's readable bytes."""

from functools import cache

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import ChainBeat
from ..tlp.layouts import BurstStatus

HEADER_BYTES = 16


@cache
def Front(width=8 * HEADER_BYTES):
    """The first 16 bytes of a packet; ``complete`` unless the packet was shorter or could not be fetched."""
    return data.StructLayout({"data": width, "complete": 1})


class HeaderSplitter(wiring.Component):
    """Splits each packet into its first 16 bytes and the packet of the rest, from byte 0 up.

    For each packet of ``i`` there is one item of ``header``, then one packet of ``o`` (an empty last beat when nothing is
    left), which carries the status of ``i``.

    In reset (``ResetInserter``) it takes and drops its input.

    Latency: 1 cycle to ``header``, 1 to 2 to ``o``. Throughput: one beat per cycle; up to 2 cycles more per packet.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.

    Members
    -------
    i : ``In(stream.Signature(ChainBeat(width)))``
        Packets.
    header : ``Out(stream.Signature(Front()))``
        Their first 16 bytes.
    o : ``Out(stream.Signature(ChainBeat(width)))``
        The rest.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({
            "i": In(stream.Signature(ChainBeat(width))),
            "header": Out(stream.Signature(Front())),
            "o": Out(stream.Signature(ChainBeat(width))),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.width // 8
        beat = self.i.payload
        surplus = max(lanes - HEADER_BYTES, 0)  # payload bytes that share the header's beat
        hold = Signal(max(8 * surplus, 1))
        hold_count, hold_status = Signal(range(lanes + 1)), Signal(BurstStatus)
        front, whole = Signal(8 * HEADER_BYTES), Signal()
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

        with m.FSM():
            with m.State("TAKE_HEADER"):
                m.d.comb += self.i.ready.eq(1)
                with m.If(self.i.valid):
                    if lanes < HEADER_BYTES:
                        m.d.sync += front.eq(beat.data)
                        complete = 0
                    else:
                        m.d.sync += [front.eq(beat.data[: 8 * HEADER_BYTES]), hold.eq(beat.data[8 * HEADER_BYTES :])]
                        complete = (beat.byte_count >= HEADER_BYTES) & (~beat.last | (beat.status == BurstStatus.OK))
                    m.d.sync += [
                        whole.eq(complete),
                        hold_count.eq(Mux(beat.byte_count >= HEADER_BYTES, beat.byte_count - HEADER_BYTES, 0)),
                        hold_status.eq(beat.status),
                    ]
                    with m.If(beat.last):
                        m.next = "GIVE_SHORT"
                    with m.Else():
                        m.next = "TAKE_SECOND" if lanes < HEADER_BYTES else "GIVE_HEADER"
            if lanes < HEADER_BYTES:
                with m.State("TAKE_SECOND"):
                    m.d.comb += self.i.ready.eq(1)
                    with m.If(self.i.valid):
                        m.d.sync += [
                            front[self.width :].eq(beat.data),
                            whole.eq(
                                (beat.byte_count == lanes) & (~beat.last | (beat.status == BurstStatus.OK))),
                            hold_status.eq(beat.status),
                        ]
                        m.next = "GIVE_HEADER"
                        with m.If(beat.last):
                            m.next = "GIVE_SHORT"
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
                        fits = beat.byte_count <= HEADER_BYTES
                        m.d.sync += hold.eq(beat.data[8 * HEADER_BYTES :])
                        m.d.sync += [hold_count.eq(beat.byte_count - HEADER_BYTES), hold_status.eq(beat.status)]
                        m.d.sync += emit(
                            Cat(hold, beat.data[: 8 * HEADER_BYTES]), surplus + Mux(fits, beat.byte_count, HEADER_BYTES),
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
