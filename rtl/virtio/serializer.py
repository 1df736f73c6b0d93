"""Packets into single bytes."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..dma.layouts import ChainBeat
from ..tlp.layouts import BurstStatus


class ByteOrEnd(data.Struct):
    """A byte of a packet; or, with ``end``, what comes behind its last byte: whether all could be fetched (``ok``)."""

    byte: 8
    end: 1
    ok: 1


class Serializer(wiring.Component):
    """Gives packets byte by byte, and an item of its own for the end of each.

    A beat is kept until its last byte, or the end, was taken. The bytes of a last beat whose status is not OK are not given.

    Latency: 1 cycle. Throughput: 1 item per cycle.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.

    Members
    -------
    i : ``In(stream.Signature(ChainBeat(width)))``
        Packets.
    o : ``Out(stream.Signature(ByteOrEnd))``
        Their bytes and ends.
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"i": In(stream.Signature(ChainBeat(width))), "o": Out(stream.Signature(ByteOrEnd))})

    def elaborate(self, platform):
        m = Module()
        beat, out = self.i.payload, self.o.payload
        row, left, is_last, ok, final = Signal(self.width), Signal.like(beat.byte_count), Signal(), Signal(), Signal()
        m.d.comb += [
            final.eq(Mux(is_last, left == 0, left == 1)),
            self.i.ready.eq(~self.o.valid | (self.o.ready & final)),
            out.byte.eq(row[:8]),
            out.end.eq(left == 0),
            out.ok.eq(ok),
        ]
        with m.If(self.i.ready):
            good = ~beat.last | (beat.status == BurstStatus.OK)
            m.d.sync += [
                self.o.valid.eq(self.i.valid), row.eq(beat.data), left.eq(Mux(good, beat.byte_count, 0)), is_last.eq(beat.last),
                ok.eq(good),
            ]  # fmt: skip
        with m.Elif(self.o.ready):
            m.d.sync += [row.eq(row >> 8), left.eq(left - 1)]
        return m
